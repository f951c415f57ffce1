"""The loss in chunks of tokens: the same loss and gradients, and no tensor as large as the logits of all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from jaxllm.config import RunConfig
from jaxllm.families import resolve_model
from jaxllm.families.tasks import task_of
from jaxllm.parity.tolerances import TOLERANCES, relative_error
from jaxllm.probe import Pass
from jaxllm.run import Run
from jaxllm.torch_backend.combinations import check_combinations
from jaxllm.torch_backend.probe import TorchProbe
from tests.distributed.deepspeed_cases import ROWS, SEQUENCE, VOCABULARY, make_batch, make_hyper, make_run, random_state

CHUNK = 13  # of the 48 tokens of a micro-batch of two rows


def _masked_lm(loss_chunk: int | str) -> Run:
    sizes = {"hidden_size": 20, "intermediate_size": 27, "num_hidden_layers": 2, "num_attention_heads": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "model": {"family": "bert", "vocab_size": VOCABULARY, "max_position_embeddings": 32, **sizes, **no_dropout},
            "objective": {"kind": "masked-lm"},
            "data": {"tokenizer": {"train": "wordpiece", "vocab_size": VOCABULARY}, "sequence_length": SEQUENCE},
            "optimizer": {"learning_rate": 1e-2},
            "training": {
                "steps": 10, "global_batch": ROWS, "micro_batch": 2, "precision": "fp64", "loss_chunk": loss_chunk,
            },
        }
    )  # fmt: skip
    return Run(config, resolve_model(config.model, task=task_of(config.objective)), 10)


def _passes(run: Run) -> Pass:
    probe = TorchProbe()
    probe.load(run, random_state(run).params)
    return probe.passes(make_batch(0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "tiny-gemma2", "bert"])
def test_losses_and_gradients_are_those_without_chunks(family: str) -> None:
    """A head of its own, a tied one, capped logits, a bias."""
    bound = TOLERANCES["fp64"].value
    runs = [_masked_lm(c) if family == "bert" else make_run(family, precision="fp64", loss_chunk=c) for c in (CHUNK, "none")]
    found, wanted = (_passes(run) for run in runs)
    assert found.loss == pytest.approx(wanted.loss, rel=bound)
    np.testing.assert_array_equal(found.logits, wanted.logits)
    largest = max(float(np.abs(gradient).max()) for gradient in wanted.gradients.values())
    for name, gradient in wanted.gradients.items():
        error = relative_error(found.gradients[name], gradient)
        assert error <= bound or float(np.abs(gradient).max()) < 1e-12 * largest, name


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation yields, in elements."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in _pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return output


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_logits_of_all_tokens_never_exist(precision: str) -> None:
    largest = {}
    for chunk in (CHUNK, "none"):
        run = make_run("llama", precision=precision, loss_chunk=chunk, model={"vocab_size": 1024}, micro_batch=ROWS)
        probe = TorchProbe()
        probe.load(run, random_state(run).params)
        with _Largest() as seen:
            probe.after_step(make_batch(0), make_hyper(0))
        largest[chunk] = seen.elements
    assert largest["none"] == ROWS * SEQUENCE * 1024
    assert largest[CHUNK] <= 1024 * 20 + 1  # the head's weight is larger than a chunk's logits


def test_processes_that_share_a_tied_head_have_it_whole() -> None:
    run = make_run("llama-tied", parallel={"tensor": 2}, loss_chunk=8)
    check_combinations(run.config, run.model, None)
