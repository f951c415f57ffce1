"""`jaxllm parity` as a person uses it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from jaxllm.cli.main import main
from jaxllm.cli.parity import _ended_by_sigterm
from jaxllm.parity import ladder
from jaxllm.parity.results import LEVELS, Check, Curve
from jaxllm.parity.runs import MAX_STATES, _call
from jaxllm.parity.tolerances import NOISE_STEPS
from tests.end_to_end.runs import Site, environment

pytest.importorskip("torch", reason="parity needs both backends")

STEPS = NOISE_STEPS  # so few that it is quick, so many that noise has a bound
GPT2 = {"family": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("cache"))


@dataclass(frozen=True)
class Outcome:
    """A finished `jaxllm parity`."""

    status: int
    text: str
    said: str
    json: dict[str, Any]
    html: str


def _parity(site: Site, name: str, *arguments: object, **changes: Any) -> Outcome:
    config = site.write(name, **changes)
    outs = site.folder / f"{name}.json", site.folder / f"{name}.html"
    scratch = site.folder / "scratch"
    scratch.mkdir(exist_ok=True)
    command = ("parity", config, "--steps", STEPS, "--json", outs[0], "--html", outs[1], *arguments)
    done = site.run(*command, check=False, env={**environment(), "TMPDIR": str(scratch)})
    assert "Traceback" not in done.stderr, done.stderr
    assert all(out.exists() for out in outs), f"status {done.returncode}\n{done.stderr}"
    return Outcome(done.returncode, done.stdout, done.stderr, json.loads(outs[0].read_text()), outs[1].read_text())


@pytest.fixture(scope="module")
def llama(site: Site) -> Outcome:
    return _parity(site, "llama", "--stages", "3", "--processes", 2, optimizer={"learning_rate": 1e-3})


@pytest.fixture(scope="module")
def gpt2(site: Site) -> Outcome:
    """With dropout, as the family has it unless it is told otherwise."""
    return _parity(site, "gpt2", "--level", "bf16", model=GPT2, optimizer={"learning_rate": 1e-3})


def test_every_level_is_measured_and_passes(llama: Outcome) -> None:
    assert llama.status == 0, llama.text
    checks = llama.json["checks"]
    assert llama.json["passed"]
    assert all(check["passed"] for check in checks)
    measured = {(check["level"], check["precision"]) for check in checks}
    assert measured == {(level, precision) for level in LEVELS[:-1] for precision in ("fp64", "fp32")} | {("noise", "bf16")}
    bounds = {(check["level"], check["bound"]) for check in checks if check["precision"] == "fp64"}
    assert ("trajectory", 1e-12) in bounds
    assert ("trajectory", 1e-11) in bounds


def test_the_report_says_what_it_ran_on(llama: Outcome) -> None:
    assert llama.json["config"] == "llama"
    assert llama.json["steps"] == STEPS
    assert {"jax", "torch", "deepspeed", "transformers"} <= llama.json["versions"].keys()
    assert llama.json["machine"]["cpus"] > 0
    assert llama.json["notes"] == [
        "parameters are compared every 2 steps: a run saves at most 25 states of at most 2 GB in all"
    ]


def test_curves_have_every_step(llama: Outcome) -> None:
    curves = {(curve["level"], curve["precision"], curve["name"]): curve for curve in llama.json["curves"]}
    reference = curves["trajectory", "fp32", "JAX, 1 device"]
    assert reference["reference"] is None
    assert [step for step, _ in reference["loss"]] == list(range(1, STEPS + 1))
    zero = curves["trajectory", "fp32", "DeepSpeed ZeRO 3, 2 processes"]
    assert zero["reference"] == "JAX, 1 device"
    spacing = STEPS // MAX_STATES
    assert [step for step, _ in zero["parameter_distance"]] == list(range(spacing, STEPS + 1, spacing))
    switched = curves["switch", "fp64", "PyTorch, 1 process, then JAX, 1 device"]
    middle = switched["switched_at"]
    assert abs(middle - STEPS / 2) <= spacing / 2
    assert [step for step, _ in switched["loss_error"]] == list(range(middle + 1, STEPS + 1))
    assert switched["loss"][:middle] == curves["switch", "fp64", "PyTorch, 1 process"]["loss"][:middle]


def test_the_table_shows_measured_bound_and_verdict(llama: Outcome) -> None:
    row = r"fp64 +trajectory +loss, PyTorch, 2 processes, against JAX, 1 device +\d\.\de-\d\d +1\.0e-12 +ok"
    assert re.search(row, llama.text), llama.text
    assert re.search(r"and \d+ more, at most \d\.\de-\d\d", llama.text)
    assert f"passed: {len(llama.json['checks'])} checks, no bound broken" in llama.text


def test_the_gradients_are_shown_worst_first(llama: Outcome) -> None:
    for precision in ("fp64", "fp32"):
        shown = re.findall(rf"{precision} +backward +gradient of .*? (\d\.\de-\d\d) ", llama.text)
        assert len(shown) >= 8
        assert sorted(map(float, shown), reverse=True) == list(map(float, shown))


class _Links(HTMLParser):
    """Everything a page would fetch, and how often each element stands in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        targets = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.fetched += [target for target in targets if not target.startswith("#")]


def test_the_page_needs_nothing_else(llama: Outcome) -> None:
    page = _Links()
    page.feed(llama.html)
    assert page.fetched == []
    assert not {"script", "link", "iframe", "img"} & page.counts.keys()
    assert "@import" not in llama.html
    # Trajectory and switch in two precisions and noise: three pictures each; a map of gradients for each precision.
    assert page.counts["svg"] == 5 * 3 + 2
    assert "model.embed_tokens.weight" in llama.html
    assert "mlp.down_proj.weight" in llama.html


@pytest.mark.nightly
def test_dropout_is_switched_off_and_said_so(gpt2: Outcome) -> None:
    assert gpt2.status == 0, gpt2.text
    assert len(gpt2.json["notes"]) == 2
    assert "dropout is switched off for the proof" in gpt2.json["notes"][0]
    assert "attn_pdrop 0.1" in gpt2.json["notes"][0]
    assert gpt2.json["notes"][0] in gpt2.text


@pytest.mark.nightly
def test_noise_alone_trains_four_runs(gpt2: Outcome) -> None:
    ran = [line for line in gpt2.said.splitlines() if line.startswith("running ")]
    names = ("fp32: JAX, 1 device", "bf16: JAX, 1 device, bf16")
    names += ("fp32: DeepSpeed ZeRO 0, 1 process", "bf16: DeepSpeed ZeRO 0, 1 process, bf16")
    assert ran == [f"running {name}" for name in names]
    _assert_noise(gpt2)


def test_noise_is_that_of_one_pass_and_of_every_loss(llama: Outcome) -> None:
    _assert_noise(llama)


def _assert_noise(outcome: Outcome) -> None:
    bounded = [check for check in outcome.json["checks"] if check["level"] == "noise" and check["bound"] is not None]
    inputs = ("packed text", "padded text", "random tokens", "rare tokens")
    wanted = [f"{what}, {label}" for label in inputs for what in ("logits", "gradients of matrices")] + ["loss of every step"]
    assert [check["name"].partition(", DeepSpeed against")[0] for check in bounded] == wanted
    for check in bounded:
        nearer, further = sorted(check["detail"].values())
        assert 0.0 < check["measured"] <= check["bound"]
        assert nearer <= check["bound"] <= further


def test_what_is_run_is_said_while_it_runs(llama: Outcome) -> None:
    assert "running fp32: DeepSpeed ZeRO 3, 2 processes" in llama.said
    assert "running fp32: JAX, 1 device, then DeepSpeed ZeRO 0, 1 process" in llama.said


# ---------------------------------------------------------------------------------------------------------- broken bounds


def _broken(*_: object) -> Iterator[Check | Curve]:
    yield Check("forward", "fp64", "logits, packed text", 1e-14, 1e-12)
    yield Check("backward", "fp64", "gradient of a.weight, packed text", 3e-9, 1e-12, {"parameter": "a.weight", "input": "x"})


def _invoke(site: Site, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("JAX_PLATFORMS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
    return CliRunner().invoke(main, ["parity", str(site.write("tiny")), *map(str, arguments)])


def test_a_broken_bound_is_named_and_the_status_is_1(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ladder, "climb", _broken)
    done = _invoke(site, monkeypatch, "--json", tmp_path / "out.json", "--html", tmp_path / "out.html")
    assert done.exit_code == 1
    assert re.search(r"gradient of a\.weight, packed text +3\.0e-09 +1\.0e-12 +FAIL", done.stdout), done.stdout
    assert "FAILED: 1 of 2 checks broke their bound" in done.stdout
    assert not json.loads((tmp_path / "out.json").read_text())["passed"]
    assert "Broken bounds" in (tmp_path / "out.html").read_text()


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--stages", "0,4"), 2, "'0,4' names a stage that ZeRO does not have"),
        (("--stages", "all"), 2, "'all' is not a list of ZeRO stages"),
        (("--steps", 1), 2, "1 is not in the range x>=2"),
        (("--model", "somewhere"), 2, "give a run FILE, or --model FOLDER"),
        (("--find", "--html", "x.html"), 2, "--find belongs to a run FILE"),
        (("--find", "--level", "bf16"), 1, "--find cannot tell an error from rounding in bf16"),
        (("--json", "nowhere/out.json"), 1, "cannot write nowhere/out.json"),
        (("--processes", 3), 1, "training.global_batch: global_batch 8 cannot be split over 3 groups of devices"),
        (("--set", "data.sequence_length=4096"), 1, "data.sequence_length"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    site: Site, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], status: int, words: str
) -> None:
    done = _invoke(site, monkeypatch, *arguments)
    assert done.exit_code == status, done.output
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert status == 2 or len(done.stderr.splitlines()) == 1


def test_a_machine_without_torch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else found(name, *rest))
    done = _invoke(site, monkeypatch)
    assert done.exit_code == 1
    assert done.stderr == "error: jaxllm parity needs the package 'torch'; install it with: pip install 'jaxllm[deepspeed]'\n"


def test_a_run_that_fails_says_why(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that no model survives, on the first run there is."""
    from jaxllm.parity.trajectory import trajectory

    monkeypatch.setattr(ladder, "climb", lambda _subject, runs, _extent: trajectory(runs, "fp32", []))
    done = _invoke(site, monkeypatch, "--steps", 6, "--set", "optimizer.learning_rate=1.0e30")
    assert done.exit_code == 1
    assert "the fp32 run on JAX, 1 device failed: " in done.stderr
    assert "optimizer.learning_rate" in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith("running")]) == 1


def test_sigterm_ends_the_run_that_is_under_way(tmp_path: Path) -> None:
    """A child that would sleep for a minute is ended, and the command with it."""
    script = tmp_path / "child.py"
    script.write_text(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    def terminate() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=terminate)
    sender.start()
    with pytest.raises(SystemExit) as ended, _ended_by_sigterm():
        _call([sys.executable, str(script)], os.environ)
    sender.join()
    assert ended.value.code == 128 + signal.SIGTERM
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_nothing_is_left_behind(site: Site, llama: Outcome) -> None:
    assert not (site.folder / "runs").exists()
    assert [path.name for path in (site.folder / "scratch").iterdir() if path.name.startswith("jaxllm")] == []
