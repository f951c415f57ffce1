"""The probe's manners: bad weights are refused, nothing is left behind, and it needs neither DeepSpeed nor a process group."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jaxllm.backend import create_probe
from jaxllm.errors import BackendError, CheckpointError
from jaxllm.families import module_points
from jaxllm.torch_backend.capture import capture
from jaxllm.torch_backend.model import build_model
from jaxllm.torch_backend.probe import TorchProbe
from tests.distributed.deepspeed_cases import Arrays, make_batch, make_run, random_state

ATTENTIONS = ["sdpa", "eager"]


def test_weights_may_be_read_only() -> None:
    run = make_run()
    params = {name: random_state(run).params.read(name) for name in random_state(run).params.names()}
    for values in params.values():
        values.flags.writeable = False
    TorchProbe().load(run, Arrays(params))


def test_weights_that_do_not_fit_are_named_and_the_model_stays() -> None:
    probe, run, batch = TorchProbe(), make_run(), make_batch(0)
    probe.load(run, random_state(run).params)
    before = probe.passes(batch).loss
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is missing"):
        probe.load(make_run(), random_state(make_run("gpt2")).params)
    assert probe.passes(batch).loss == before


def test_a_probe_without_a_model_says_so() -> None:
    with pytest.raises(BackendError, match="before `load`"):
        TorchProbe().passes(make_batch(0))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nothing_is_left_behind_when_the_model_fails(attention: str) -> None:
    run = make_run(attention=attention)
    model = build_model(run.model, attention, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    registered, hooked = dict(ALL_ATTENTION_FUNCTIONS), _hooks(model)
    with pytest.raises(IndexError), capture(model, module_points(run.model), gradients=False):
        model(input_ids=torch.tensor([[10**6]]))
    assert _hooks(model) == hooked
    assert dict(ALL_ATTENTION_FUNCTIONS) == registered


def _hooks(model: torch.nn.Module) -> list[tuple[int, ...]]:
    return [(*module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()]


ALONE = """
import sys
import torch
from jaxllm.backend import create_probe
from jaxllm.state.initial import InitialWeights
from tests.distributed.deepspeed_cases import make_batch, make_hyper, make_run
run = make_run(precision="bf16")
probe = create_probe("deepspeed")
probe.load(run, InitialWeights(run.model, 0))
probe.passes(make_batch(0), capture=True)
probe.after_step(make_batch(0), make_hyper(0))
print("deepspeed" in sys.modules, "jax" in sys.modules, torch.distributed.is_initialized())
"""


def test_it_needs_neither_deepspeed_nor_a_process_group() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False", "False", "False"]


def test_it_is_the_probe_of_its_backend() -> None:
    assert isinstance(create_probe("deepspeed"), TorchProbe)
    assert create_probe("deepspeed").name == "deepspeed"
