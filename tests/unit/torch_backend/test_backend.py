"""What the backend refuses, and what it generates for DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from jaxllm.backend import create_backend
from jaxllm.config.batch import resolve_batch
from jaxllm.config.schema import ModelConfig
from jaxllm.errors import BackendError
from jaxllm.families import flatten, resolve_model
from jaxllm.state.initial import InitialWeights
from jaxllm.state.training_state import Progress
from jaxllm.torch_backend.bucket import bucket_elements
from jaxllm.torch_backend.deepspeed_config import deepspeed_config
from jaxllm.torch_backend.group import Group
from jaxllm.torch_backend.mesh import Mesh
from jaxllm.torch_backend.model import build_model
from jaxllm.torch_backend.optimizer import ClippedAdamW, parameter_groups
from jaxllm.torch_backend.step import split
from tests.distributed.deepspeed_cases import make_batch, make_hyper, make_run, materialise

GOLDEN = Path(__file__).parent / "deepspeed_configs.json"


def _mesh(world: int, **axes: int) -> Mesh:
    return Mesh(Group(0, world, torch.device("cpu"), joined=False), **axes)


def _generated() -> dict[str, Any]:
    made = {}
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            run = make_run(precision=precision, zero_stage=stage)
            made[f"{precision} zero{stage}"] = deepspeed_config(run, resolve_batch(run.config, 2), _mesh(2, data=2))
    run = make_run(zero_stage=3, offload_optimizer="cpu", offload_param="cpu")
    mesh = _mesh(8, data=2, context=2, tensor=2)
    made["fp32 zero3, everything"] = deepspeed_config(run, resolve_batch(run.config, 2), mesh)
    return made


def test_generated_configs_are_the_golden_ones() -> None:
    """To accept a change: python -m tests.unit.torch_backend.test_backend."""
    assert _generated() == json.loads(GOLDEN.read_text())


def test_nothing_is_left_to_deepspeed() -> None:
    text = json.dumps(_generated())
    assert '"auto"' not in text
    assert "null" not in text


def test_no_clipping_is_said_to_deepspeed_too() -> None:
    run = make_run(clip_norm=None, zero_stage=2)
    assert deepspeed_config(run, resolve_batch(run.config, 1), _mesh(1))["gradient_clipping"] == 0.0


def test_the_bucket_is_no_larger_than_the_model_and_has_a_limit() -> None:
    small = make_run(zero_stage=2).model
    assert bucket_elements(small, 1, "cpu") == small.parameters
    assert small.parameters / 2 < bucket_elements(small, 2, "cpu") < small.parameters
    large = resolve_model(ModelConfig.model_validate({"family": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}))
    assert bucket_elements(large, 1, "cuda") == 200_000_000
    assert bucket_elements(large, 1, "cpu") == 25_000_000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_process_alone_adds_no_gradients_up(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ZeRO 0 DeepSpeed would copy all of them into one tensor and back."""
    added = []
    monkeypatch.setattr(DeepSpeedEngine, "buffered_allreduce_fallback", lambda *_, **__: added.append(1))
    run = make_run(precision=precision, zero_stage=0)
    backend = create_backend("deepspeed")
    backend.start(run, None)
    backend.step(make_batch(0), make_hyper(0))
    backend.close()
    assert not added


def test_a_decoder_refuses_more_than_it_was_made_for() -> None:
    backend = create_backend("deepspeed")
    backend.start(make_run(), None, training=False)
    decoder = backend.decoder(3)
    decoder.prefill([1, 2])
    decoder.decode(3)
    with pytest.raises(BackendError, match="given token 4"):
        decoder.decode(4)
    backend.close()


def test_without_training_the_masters_are_exported_as_they_came() -> None:
    """A bf16 model holds rounded weights; what is exported from it must not be rounded."""
    run = make_run(precision="bf16")
    backend = create_backend("deepspeed")
    backend.start(run, None, training=False)
    exported = backend.export(Progress())
    for name, values in materialise(InitialWeights(run.model, run.config.seed)).items():
        np.testing.assert_array_equal(exported.params.read(name), values)
    assert exported.exp_avg is None
    backend.close()


def test_moments_do_not_exist_before_the_first_update() -> None:
    backend = create_backend("deepspeed")
    backend.start(make_run(), None)
    assert backend.export(Progress(step=2, updates=0)).exp_avg is None
    backend.step(make_batch(0), make_hyper(0))
    moments = backend.export(Progress(step=3, updates=1)).exp_avg
    assert moments is not None
    assert any(np.abs(moments.read(name)).max() > 0 for name in moments.names())
    backend.close()


def test_an_exported_tensor_is_not_a_view_of_the_model() -> None:
    backend = create_backend("deepspeed")
    backend.start(make_run(), None)
    values = backend.export(Progress()).params.read("model.norm.weight")
    backend.step(make_batch(0), make_hyper(0))
    np.testing.assert_array_equal(values, np.ones_like(values))
    backend.close()


def test_matrices_and_embeddings_decay_and_nothing_else_does() -> None:
    run = make_run("gpt2")
    named = dict(build_model(run.model, "sdpa", torch.float32, torch.device("cpu")).named_parameters())
    decaying, rest = parameter_groups(named, run.model, run.config.optimizer)
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decaying["params"]} == {2}
    assert {p.ndim for p in rest["params"]} == {1}
    assert len(decaying["params"]) + len(rest["params"]) == len(list(flatten(run.model.rules)))


def test_clipping_is_the_contracts_formula() -> None:
    config = make_run(clip_norm=0.5).config.optimizer
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = ClippedAdamW([{"params": [parameter], "weight_decay": 0.0}], config, _mesh(1))
    parameter.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer.step()
    norm = 5.0
    assert float(optimizer._global_grad_norm) == norm
    factor = 0.5 / (norm + 1e-6)
    torch.testing.assert_close(
        optimizer.state[parameter]["exp_avg"], 0.1 * factor * torch.tensor([3.0, 4.0], dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_micro_batches_are_the_rows_in_order() -> None:
    batch = make_batch(0)
    parts = list(split(batch, 3))
    assert [part.rows for part in parts] == [3, 3, 2]
    np.testing.assert_array_equal(np.concatenate([part.inputs for part in parts]), batch.inputs)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about torch
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 2), ("fp32", 3), ("bf16", 0)])
def test_torch_compile_changes_rounding_only(precision: str, stage: int) -> None:
    losses = []
    for torch_compile in (False, True):
        backend = create_backend("deepspeed")
        backend.start(make_run(precision=precision, zero_stage=stage, torch_compile=torch_compile), None)
        losses.append([float(backend.step(make_batch(step), make_hyper(step)).loss) for step in range(3)])
        backend.close()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if precision == "fp32" else 1e-3)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(_generated(), indent=2) + "\n")
