from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jaxllm.cli.main import main
from jaxllm.cli.run_summary import resolve
from jaxllm.config import load_run
from jaxllm.metrics.chips import CHIPS, named_chip
from jaxllm.metrics.flops import flops_per_token
from jaxllm.planning.utilization import PUBLISHED, Utilization, expected_utilization

ROOT = Path(__file__).parents[3]
GPT2, LLAMA = str(ROOT / "configs/gpt2-124m.yaml"), str(ROOT / "configs/llama3-8b.yaml")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_a_plan_answers_the_three_questions(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = plan(GPT2, "--chips", "h100x8", "--chips", "v5e:2x4", "--budget-hours", "24", "--json", str(out))
    assert done.exit_code == 0, done.output
    for said in (
        "124,475,904 parameters",
        "per parameter",
        "arXiv:2203.15556",
        "h100x8: 8 x H100 SXM",
        "chip-hours",
        "% of peak (",
        "as written  data 8, micro-batch 8 x 8, remat dots",
        "1.  ",
        "--set ",
        "budget on TPU v5e",
        "best model",
    ):
        assert said in done.output
    written = json.loads(out.read_text())
    assert written["compute"]["parameters"] == 124_475_904
    h100, v5e = written["devices"]
    assert set(h100["backends"]) == {"jax", "deepspeed"}
    assert set(v5e["backends"]) == {"jax"}
    assert v5e["chip_hours"] == pytest.approx(v5e["seconds"] * 8 / 3600)
    for device in written["devices"]:
        for backend in device["backends"].values():
            peaks = [each["memory"]["peak_bytes"] for each in backend["fitting"]]
            seconds = [each["step_seconds"] for each in backend["fitting"]]
            assert peaks
            assert max(peaks) <= device["usable_bytes"]
            assert seconds == sorted(seconds)


def test_every_setting_that_is_proposed_is_a_valid_run_file(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert plan(LLAMA, "--chips", "h100x16", "--chips", "v6e:4x4", "--json", str(out)).exit_code == 0
    for device in json.loads(out.read_text())["devices"]:
        for backend in device["backends"].values():
            for each in backend["fitting"]:
                config = load_run(Path(LLAMA), each["overrides"]).config
                assert config.training.micro_batch == each["micro_batch"]
                assert config.parallel.fsdp == each["mesh"]["fsdp"]


def test_time_is_flops_over_peak_and_utilisation(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert plan(GPT2, "--chips", "v5e:2x4", "--json", str(out)).exit_code == 0
    written = json.loads(out.read_text())
    device = written["devices"][0]
    least = written["compute"]["flops"] / (8 * 197e12 * device["mfu"])
    assert least <= device["seconds"] < 1.2 * least


def test_a_published_speed_comes_out_again() -> None:
    """Llama 3.1 8B with MaxText on v6e: 7,207 tokens/s on each chip at 45.46 % (the table's source)."""
    model = resolve(load_run(Path(LLAMA)).config)
    use = Utilization(0.4546, "", whole_square=True)
    assert 918e12 * use.mfu / use.counted(flops_per_token(model.spec, 8192)) == pytest.approx(7207, rel=0.01)


def test_without_chips_it_looks_at_the_usual_ones_and_shows_those_that_fit() -> None:
    done = plan(LLAMA, "--best", "1")
    assert done.exit_code == 0
    assert done.output.count("% of peak") >= 3
    assert "nothing fits" not in done.output.replace("    nothing fits", "")


def test_bad_input_is_one_sentence() -> None:
    unknown = plan(GPT2, "--chips", "h10x8")
    assert unknown.exit_code == 1
    assert "--chips 'h10x8': unknown chip 'h10'; did you mean 'h100'? (allowed: " in unknown.output
    assert "Traceback" not in unknown.output


def test_a_mesh_that_does_not_match_the_chips_is_said_and_others_are_proposed() -> None:
    done = plan(LLAMA, "--chips", "h100x8")
    assert done.exit_code == 0
    assert (
        "as written  not possible: parallel.data: -1 takes every device that the other axes leave, but 8 are not" in done.output
    )
    assert "1.  " in done.output
    fixed = plan(LLAMA, "--chips", "h100x8", "--set", "parallel.data=1", "--set", "parallel.fsdp=4")
    assert "the mesh fsdp 4 has 4 devices, but there are 8" in fixed.output


def test_heads_that_do_not_divide_are_named() -> None:
    done = plan(LLAMA, "--chips", "h100x16", "--set", "parallel.fsdp=1", "--set", "parallel.tensor=16")
    assert "parallel.tensor: 16 does not divide the number of key/value heads, 8; use a divisor of 8" in done.output


def test_a_run_that_fits_nowhere_says_by_how_much() -> None:
    done = plan(LLAMA, "--chips", "l4x1", "--chips", "rtx4090x1")
    assert done.exit_code == 1
    assert "nothing fits: the smallest" in done.output
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("error: no setting fits on any of the devices looked at; the nearest, ")
    assert re.search(r"lacks [\d.]+ [MG]iB per device: use more devices", last)


def test_published_utilisations_name_chips_of_the_table_and_their_source() -> None:
    keys = {chip.key for chip in CHIPS}
    for each in PUBLISHED:
        assert set(each.chips) <= keys
        assert 0.2 < each.mfu < 0.75
        assert each.source.startswith(("https://", "arXiv:"))
    assert expected_utilization(named_chip("v6e"), 8e9).mfu == pytest.approx(0.4546, abs=0.06)
    assert "assumed" in expected_utilization(named_chip("l4"), 1e9).source


def test_what_a_backend_cannot_combine_is_not_proposed(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert plan(GPT2, "--chips", "h100x8", "--json", str(out)).exit_code == 0
    backends = json.loads(out.read_text())["devices"][0]["backends"]
    assert {each["mesh"]["tensor"] for each in backends["deepspeed"]["fitting"]} == {1}, "AutoTP does not split GPT-2"
    assert backends["jax"]["fitting"]
    refused = plan(GPT2, "--chips", "h100x8", "--set", "parallel.data=4", "--set", "parallel.tensor=2").output
    assert "as written  not possible: parallel.tensor: 2 is not possible (tensor above 1 with a family that AutoTP" in refused


def test_a_mixture_counts_what_a_token_passes_through_and_is_spread_over_experts(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    mixtral = str(ROOT / "configs/mixtral-8x7b.yaml")
    done = plan(mixtral, "--chips", "v5p:4x4x4", "--json", str(out))
    assert "46,702,792,704 parameters, of which a token passes through 12,879,925,248" in done.output
    written = json.loads(out.read_text())
    assert written["compute"]["tokens_per_parameter"] == pytest.approx(written["compute"]["tokens"] / 12_879_925_248)
    assert {1, 2} <= {each["mesh"]["expert"] for each in written["devices"][0]["backends"]["jax"]["fitting"]}


def test_the_law_of_language_models_says_nothing_of_encoders() -> None:
    done = plan(str(ROOT / "configs/bert-base.yaml"), "--chips", "h100x1", "--budget-hours", "1")
    assert "say nothing of masked-lm" in done.output
    assert "compute-optimal for this size" not in done.output
    assert "best model" not in done.output
