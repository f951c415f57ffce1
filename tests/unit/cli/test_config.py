"""`jaxllm config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner, Result

from jaxllm.cli.main import main
from jaxllm.config import load_run
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.families import Vocabulary, resolve_model
from tests.unit.config.example import EXAMPLE, changed


def jaxllm(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["config", *arguments])


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(EXAMPLE.replace("hidden_size: 64", "hidden_size: 64\n  num_hidden_layers: 2\n  num_attention_heads: 4"))
    return file


# ---------------------------------------------------------------------------------------------------------------- check


def test_check(run_file: Path) -> None:
    said = jaxllm("check", str(run_file))
    assert (said.exit_code, said.stderr) == (0, "")
    parameters = resolve_model(load_run(run_file).config.model, Vocabulary(300)).parameters
    expected = f"{run_file}: valid: example trains a llama of {parameters:,} parameters for 10 steps of 256 tokens\n"
    assert said.stdout == expected


def test_check_refuses_a_layout_of_the_backend_that_is_asked_for(run_file: Path) -> None:
    layout = ("--set", "deepspeed.offload_optimizer=cpu")
    assert jaxllm("check", str(run_file), *layout).exit_code == 0
    said = jaxllm("check", str(run_file), *layout, "--set", "backend=deepspeed")
    assert (said.exit_code, said.stdout) == (1, "")
    assert "deepspeed.offload_optimizer: cpu is not possible (offload_optimizer with zero_stage 0): " in said.stderr
    assert len(said.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.sequence_length=4096",
         "data.sequence_length: 4096 tokens do not fit into the model's 2048 positions (max_position_embeddings); "),
        ("model.vocab_size=100", "model.vocab_size: the model's vocabulary of 100 is smaller than the tokenizer's 300; "),
        ("model.family=lama", "model.family: unknown family 'lama'; did you mean 'llama'? "),
        ("model.hidden_sise=3", "model.hidden_sise: unknown key; did you mean 'hidden_size'? "),
        ("training.micro_batch=3", "training.micro_batch: global_batch 8 over 1 data-parallel devices leaves 8 sequences "),
        ("parallel.fsdp=3", "training.global_batch: 8 sequences cannot be split evenly over 3 data-parallel devices; use 6"),
        ("schedule.warmup_steps=11", "schedule.warmup_steps: the warm-up of 11 steps is longer than the run of 10; "),
        ("model={from: /nowhere}", "model.from: '/nowhere' is neither a local folder nor a model the hub gives ("),
        ("training.stepz=3", "training.stepz: unknown key; did you mean 'steps'?"),
    ],
)  # fmt: skip
def test_check_refuses(run_file: Path, override: str, sentence: str) -> None:
    said = jaxllm("check", str(run_file), "--set", override)
    assert (said.exit_code, said.stdout) == (1, "")
    assert len(said.stderr.splitlines()) == 1
    # A mesh that the batch does not fit is reported at the batch.
    blamed = f"{run_file}:19: " if override == "parallel.fsdp=3" else f"--set {override}: "
    assert said.stderr.startswith(blamed + sentence)


def test_check_names_the_line(run_file: Path) -> None:
    run_file.write_text(changed("sequence_length: 32", "sequence_length: 9999"))
    said = jaxllm("check", str(run_file))
    assert said.stderr.startswith(
        f"{run_file}:11: data.sequence_length: 9999 tokens do not fit into the model's 2048 positions"
    )


def test_check_for_a_number_of_devices(run_file: Path) -> None:
    assert jaxllm("check", str(run_file), "--devices", "4").exit_code == 0
    said = jaxllm("check", str(run_file), "--devices", "3")
    assert said.exit_code == 1
    assert said.stderr.startswith(f"{run_file}:19: training.global_batch: 8 sequences cannot be split evenly over 3 ")
    said = jaxllm("check", str(run_file), "--devices", "2", "--set", "parallel.tensor=4")
    assert said.stderr.startswith(f"{run_file}: parallel.data: -1 takes every device that the other axes leave, but 2 are not ")


def test_check_reports_every_error_of_a_file(run_file: Path) -> None:
    said = jaxllm("check", str(run_file), "--set", "seed=x", "--set", "jax.remat=y")
    assert said.exit_code == 1
    assert [line.split(": ")[1] for line in said.stderr.splitlines()] == ["seed", "jax.remat"]


def test_check_without_a_file() -> None:
    assert jaxllm("check").exit_code == 2
    said = jaxllm("check", "nope.yaml")
    assert (said.exit_code, said.stderr) == (1, "nope.yaml: there is no such run file\n")


# ----------------------------------------------------------------------------------------------------------------- show


def test_show_is_a_run_file_of_the_same_run(run_file: Path, tmp_path: Path) -> None:
    said = jaxllm("show", str(run_file))
    assert said.exit_code == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(said.stdout)
    assert jaxllm("show", str(resolved)).stdout == said.stdout
    before, after = load_run(run_file).config, load_run(resolved).config
    assert before.model_copy(update={"model": None}) == after.model_copy(update={"model": None})
    known = Vocabulary(300, end=0)
    assert resolve_model(before.model, known) == resolve_model(after.model, known)


def test_show_writes_out_the_defaults(run_file: Path) -> None:
    shown = json.loads(jaxllm("show", str(run_file), "--json").stdout)["config"]
    assert shown["model"]["rms_norm_eps"] == 1e-6
    assert shown["model"]["vocab_size"] == 300
    assert shown["model"]["eos_token_id"] == 0
    assert shown["schedule"] == {"kind": "cosine", "warmup_steps": 0, "final_fraction": 0.1}
    assert shown["deepspeed"]["zero_stage"] == 0


def test_summary(run_file: Path) -> None:
    arguments = [
        "--devices",
        "8",
        "--set",
        "parallel.tensor=2",
        "--set",
        "training.micro_batch=1",
        "--set",
        "training.steps=null",
    ]
    said = jaxllm("show", str(run_file), "--json", "--set", "training.tokens=1000", *arguments)
    summary: dict[str, Any] = json.loads(said.stdout)["summary"]
    flops = summary.pop("training_flops")
    assert summary == {
        "family": "llama",
        "parameters": 300 * 64 * 2 + 2 * (4 * 64 * 64 + 3 * 64 * 11008 + 2 * 64) + 64,
        "embedding_parameters": 300 * 64,
        "decayed_parameters": 300 * 64 * 2 + 2 * (4 * 64 * 64 + 3 * 64 * 11008),
        "steps": 4,
        "sequences_per_step": 8,
        "sequence_length": 32,
        "tokens_per_step": 256,
        "tokens": 1024,
        "devices": 8,
        "data_parallel": 4,
        "batch": {"micro_batch": 1, "accumulation": 2},
    }
    matrices = 300 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 11008)
    assert flops == 1024 * 3 * (2 * matrices + 2 * 2 * 64 * 32)


def test_summary_for_a_person(run_file: Path) -> None:
    comments = [line for line in jaxllm("show", str(run_file)).stdout.splitlines() if line.startswith("#")]
    assert "# tokens per step  8 x 32 = 256" in comments
    assert "# batch            8 sequences x 1 accumulated x 1 data-parallel = 8" in comments


def test_show_takes_the_size_of_a_local_tokenizer(run_file: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["some text to make a small tokenizer of"], 270)
    tokenizer.save(tmp_path / "tokenizer")
    override = f"data.tokenizer={{from: {tmp_path / 'tokenizer'}}}"
    shown = json.loads(jaxllm("show", str(run_file), "--json", "--set", override).stdout)["config"]
    assert shown["model"]["vocab_size"] == tokenizer.vocab_size
    assert shown["model"]["eos_token_id"] == tokenizer.eos_id


def test_show_of_a_pretrained_model(run_file: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2)
    config.save_pretrained(tmp_path / "model")
    said = jaxllm("show", str(run_file), "--set", f"model={{from: {tmp_path / 'model'}}}")
    assert said.exit_code == 0
    assert f"model:\n  from: {tmp_path / 'model'}\n" in said.stdout
    assert said.stdout.startswith("# model            gpt2, ")


# --------------------------------------------------------------------------------------------------------------- schema


def test_schema() -> None:
    said = jaxllm("schema")
    assert said.exit_code == 0
    assert json.loads(said.stdout)["title"] == "jaxllm run file"
    assert "yaml-language-server: $schema=" in jaxllm("schema", "--help").output
