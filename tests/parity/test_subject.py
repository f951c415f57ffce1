"""What parity examines: the user's run without its dropout, and the run files of the runs it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxllm.config import RunConfig, load_run, write_yaml
from jaxllm.parity.ladder import Extent, check_fits
from jaxllm.parity.layouts import Layout, one_device
from jaxllm.parity.runs import Runs, run_document
from jaxllm.parity.subject import examine
from jaxllm.state import write_safetensors
from jaxllm.state.initial import InitialWeights
from tests.end_to_end.runs import Site
from tests.parity.trajectories import make_run

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "family": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "attention_dropout": 0.25,
    },
    "gpt2": {"family": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "embd_pdrop": 0.0},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("cache"))


def _config(site: Site, name: str, **changes: Any) -> RunConfig:
    return load_run(site.write(name, **changes)).config


@pytest.mark.parametrize(
    ("family", "listed"), [("llama", "attention_dropout 0.25"), ("gpt2", "resid_pdrop 0.1, attn_pdrop 0.1")]
)
def test_dropout_is_switched_off_and_said_so(site: Site, tmp_path: Path, family: str, listed: str) -> None:
    subject = examine(_config(site, family, model=MODELS[family]), tmp_path)
    spec = subject.run.model.spec
    assert (spec.attention.dropout, spec.embedding_dropout, spec.residual_dropout) == (0.0, 0.0, 0.0)
    assert len(subject.notes) == 1
    assert f"({listed} in the run file)" in subject.notes[0]
    document = run_document(subject.run, one_device("jax", "fp32"), 10)
    assert not any(value for key, value in document["model"].items() if "drop" in key and isinstance(value, float))


def test_without_dropout_nothing_is_said(site: Site, tmp_path: Path) -> None:
    assert examine(_config(site, "plain"), tmp_path).notes == ()


def test_dropout_of_a_pretrained_model_is_switched_off_in_a_copy(site: Site, tmp_path: Path) -> None:
    run = examine(_config(site, "source", model=MODELS["llama"]), tmp_path / "unused").run
    source, weights = tmp_path / "pretrained", InitialWeights(run.model, 0)
    write_safetensors(weights, source, dtype="float32")
    keys = {**run.model.huggingface_config, "attention_dropout": 0.25}
    (source / "config.json").write_text(json.dumps(keys))
    subject = examine(_config(site, "from", model={"from": str(source)}), tmp_path / "copy")
    assert subject.run.model.spec.attention.dropout == 0.0
    assert json.loads((source / "config.json").read_text())["attention_dropout"] == 0.25
    copy = Path(str(subject.run.model.pretrained))
    assert copy != source
    assert (copy / "model.safetensors").samefile(source / "model.safetensors")


# ------------------------------------------------------------------------------------------------- run files of the runs


def _document(layout: Layout, steps: int = 100, **training: Any) -> RunConfig:
    """The run file of a layout, as the process that reads it gets it."""
    run = make_run("llama", "fp32", 1000)
    config = run.config.model_copy(update={"training": run.config.training.model_copy(update=training)})
    document = run_document(replace(run, config=config), layout, steps) | {"name": "x"}
    return RunConfig.model_validate_json(json.dumps(yaml.safe_load(write_yaml(document))), strict=True)


def test_a_run_file_is_changed_in_what_the_comparison_needs() -> None:
    config = _document(Layout("deepspeed", "fp32", zero_stage=2, processes=2), micro_batch=4)
    assert (config.training.steps, config.training.tokens, config.training.precision) == (100, None, "fp32")
    assert (config.deepspeed.zero_stage, config.parallel.data) == (2, 2)
    assert (config.logging.every, config.logging.sinks) == (1, ("jsonl",))
    assert (config.evaluation.every, config.checkpoint.every, config.checkpoint.keep) == (None, 4, None)
    assert config.sample.max_new_tokens == 0
    assert config.schedule.warmup_steps == 1  # 4 of 1,000
    assert config.optimizer == make_run("llama", "fp32", 1000).config.optimizer


@pytest.mark.parametrize(
    ("layout", "wanted", "micro_batch"),
    [
        (Layout("jax", "fp32"), 8, 8),
        (Layout("jax", "fp32"), 3, 2),
        (Layout("jax", "fp32"), None, None),
        (Layout("jax", "fp32", fsdp=4, tensor=2), 8, 2),
        (Layout("jax", "fp32", data=8), 4, 1),
        (Layout("deepspeed", "fp32", processes=2), 4, 4),
        (Layout("jax", "fp32", micro_batch=4), 2, 4),
    ],
)
def test_the_micro_batch_is_the_largest_that_fits(layout: Layout, wanted: int | None, micro_batch: int | None) -> None:
    assert _document(layout, micro_batch=wanted).training.micro_batch == micro_batch


def test_a_mesh_over_processes_shares_the_virtual_devices() -> None:
    config = _document(Layout("jax", "fp32", fsdp=4, processes=2))
    assert (config.jax.cpu_devices, config.parallel.fsdp) == (2, 4)


@pytest.mark.parametrize(("micro_batch", "control"), [(None, 4), (8, 4), (4, 2), (2, 1), (1, 2)])
def test_the_control_has_another_micro_batch(tmp_path: Path, micro_batch: int | None, control: int) -> None:
    run = make_run("llama", "fp32", 10)
    training = run.config.training.model_copy(update={"micro_batch": micro_batch})
    runs = Runs(replace(run, config=run.config.model_copy(update={"training": training})), tmp_path, 10)
    layout = runs.control_layout("fp32")
    assert layout is not None
    assert layout.micro_batch == control


def test_a_step_of_a_balanced_mixture_of_experts_is_one_micro_batch(tmp_path: Path) -> None:
    run = make_run("mixtral", "fp32", 10)
    training = run.config.training.model_copy(update={"micro_batch": 2})
    run = replace(run, config=run.config.model_copy(update={"training": training}))
    for layout, rows in (
        (Layout("jax", "fp32"), 8),
        (Layout("jax", "fp32", data=8), 1),
        (Layout("deepspeed", "fp32", processes=2), 4),
    ):
        assert run_document(run, layout, 10)["training"]["micro_batch"] == rows
    runs = Runs(run, tmp_path, 10)
    assert runs.control_layout("fp32") is None
    (note,) = check_fits(runs, Extent())
    assert note.startswith("a step of every run is one micro-batch, not several of 2: the load-balancing loss is one number of")


def test_a_single_sequence_has_no_control(tmp_path: Path) -> None:
    run = make_run("llama", "fp32", 10)
    training = run.config.training.model_copy(update={"global_batch": 1, "micro_batch": None})
    assert (
        Runs(replace(run, config=run.config.model_copy(update={"training": training})), tmp_path, 10).control_layout("fp32")
        is None
    )


def test_meshes_that_cut_sequences_are_left_out_for_an_encoder(tmp_path: Path) -> None:
    notes = check_fits(Runs(make_run("bert", "fp32", 10), tmp_path, 10), Extent(full=True))
    left_out = [note.partition(" is left out: ")[0] for note in notes]
    assert left_out == [
        "JAX, data 2 x context 4",
        "JAX, fsdp 2 x tensor 2 x context 2",
        "DeepSpeed ZeRO 3, tensor 2, 2 processes",
        "DeepSpeed ZeRO 2, context 2, 2 processes",
        "DeepSpeed ZeRO 1, tensor 2, context 2, 4 processes",
    ]


def test_meshes_that_do_not_fit_are_left_out_and_named(tmp_path: Path) -> None:
    run = make_run("llama", "fp32", 10)
    odd = run.model.spec.with_attention(kv_heads=1)
    training = run.config.training.model_copy(update={"global_batch": 4})
    config = run.config.model_copy(update={"training": training})
    runs = Runs(replace(run, config=config, model=replace(run.model, spec=odd)), tmp_path, 10)
    assert check_fits(runs, Extent()) == []
    notes = check_fits(runs, Extent(full=True))
    assert notes == [
        "JAX, data 8 is left out: global_batch 4 cannot be split over 8 groups of devices",
        "JAX, fsdp 8 is left out: global_batch 4 cannot be split over 8 groups of devices",
        "JAX, fsdp 4 x tensor 2 is left out: 1 key/value heads cannot be split over tensor 2",
        "JAX, data 2 x fsdp 2 x tensor 2 is left out: 1 key/value heads cannot be split over tensor 2",
        "JAX, fsdp 2 x tensor 2 x context 2 is left out: 1 key/value heads cannot be split over tensor 2",
        "DeepSpeed ZeRO 3, tensor 2, 2 processes is left out: 1 key/value heads cannot be split over tensor 2",
        "DeepSpeed ZeRO 1, tensor 2, context 2, 4 processes is left out: 1 key/value heads cannot be split over tensor 2",
    ]
