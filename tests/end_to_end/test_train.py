"""`jaxllm train` from a run file to a run folder, on both backends, and what can be done with the result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jaxllm.parity.tolerances import TOLERANCES
from tests.end_to_end.runs import STEPS, Site

BACKENDS = ("jax", "deepspeed")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_leaves_what_it_promises(shared_site: Site, finished: Callable[..., str], backend: str) -> None:
    name = finished(backend)
    folder = shared_site.path(name)
    train = shared_site.metrics(name)
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    wanted = {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "model_tflops", "memory_bytes"}
    assert all(wanted <= line.keys() for line in train)
    assert train[-1]["loss"] < train[0]["loss"] - 0.1
    assert train[-1]["tokens_per_second"] > 0
    validation = shared_site.metrics(name, "validation")
    assert [line["step"] for line in validation] == [6, STEPS]
    assert validation[-1]["perplexity"] == pytest.approx(math.exp(validation[-1]["loss"]))
    assert validation[-1]["bits_per_byte"] > 0
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["jax" if backend == "jax" else "deepspeed"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "sample.txt").read_text().startswith("def ")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (4, 8, 12)]
    shared_site.run("config", "check", folder / "config.yaml")
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["vocab_size"] == 384


def test_both_backends_train_the_same_model(shared_site: Site, finished: Callable[..., str]) -> None:
    jax, deepspeed = finished("jax"), finished("deepspeed")
    for split in ("train", "validation"):
        reference, other = shared_site.losses(jax, split), shared_site.losses(deepspeed, split)
        assert reference.keys() == other.keys()
        for step, loss in reference.items():
            assert other[step] == pytest.approx(loss, rel=TOLERANCES["fp32"].trajectory_loss)
    assert (shared_site.path(jax) / "sample.txt").read_text() == (shared_site.path(deepspeed) / "sample.txt").read_text()


def test_both_backends_are_one_in_double_precision(shared_site: Site, finished: Callable[..., str]) -> None:
    reference, other = (shared_site.losses(finished(backend, "fp64")) for backend in BACKENDS)
    for step, loss in reference.items():
        assert other[step] == pytest.approx(loss, rel=TOLERANCES["fp64"].trajectory_loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_loads_the_export_and_gives_the_same_logits(
    shared_site: Site, finished: Callable[..., str], backend: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jaxllm.backend import create_backend
    from jaxllm.checkpointing import open_state
    from jaxllm.generation.load import load_trained

    name = finished(backend)
    shared_site.run("export", shared_site.path(name), tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")("def main(self): return")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        reference = model(torch.tensor([tokens])).logits[0, -1].numpy()

    trained = load_trained(shared_site.path(name), None, print)
    assert trained.tokenizer.encode("def main(self): return") == tokens
    assert trained.checkpoint is not None
    jax = create_backend("jax")
    jax.start(trained.run, open_state(trained.checkpoint.folder, trained.run.model), training=False)
    logits = jax.decoder(32).prefill(tokens)
    jax.close()
    assert np.abs(logits - reference).max() <= TOLERANCES["fp32"].value * np.abs(reference).max()


def test_export_refuses_to_overwrite_and_writes_bfloat16(
    shared_site: Site, finished: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = shared_site.path(finished("jax"))
    refused = shared_site.run("export", run, tmp_path, check=False)
    assert refused.returncode == 1
    assert refused.stderr == f"error: {tmp_path} already exists; choose a new folder or remove it\n"
    shared_site.run("export", run, tmp_path / "model", "--dtype", "bfloat16", "--step", 4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_generate_writes_the_same_text_on_either_backend(shared_site: Site, finished: Callable[..., str]) -> None:
    run = shared_site.path(finished("jax"))
    arguments = (
        "generate",
        run,
        "--prompt",
        "import ",
        "--max-new-tokens",
        12,
        "--temperature",
        0.7,
        "--top-p",
        0.9,
        "--seed",
        3,
    )
    texts = {backend: shared_site.run(*arguments, "--backend", backend).stdout for backend in BACKENDS}
    assert texts["jax"].startswith("import ")
    assert len(texts["jax"]) > len("import \n")
    assert texts["jax"] == texts["deepspeed"]


def test_gpt2_trains_on_both_backends(shared_site: Site) -> None:
    model = {"family": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    for backend in BACKENDS:
        shared_site.run("train", shared_site.write(f"gpt2-{backend}", model=model, training={"steps": 4}), "--backend", backend)
    reference, other = (shared_site.losses(f"gpt2-{backend}") for backend in BACKENDS)
    for step, loss in reference.items():
        assert other[step] == pytest.approx(loss, rel=TOLERANCES["fp32"].trajectory_loss)
