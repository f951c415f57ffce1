"""Shapes alone, against what a run really gives to its step."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jaxllm.config.batch import resolve_batch
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.jax_backend.abstract import abstract_batch
from jaxllm.jax_backend.feed import BatchFeed
from jaxllm.jax_backend.mesh import create_mesh
from jaxllm.jax_backend.sharding import data_parallel
from tests.parity import subjects, tasks
from tests.parity.tasks import OBJECTIVES

FAMILY = {"masked-lm": "bert", "words": "roberta", "seq2seq": "t5", "spans": "t5"}


@pytest.mark.parametrize("objective", ["causal-lm", *OBJECTIVES])
def test_a_batch_is_placed_as_the_compiled_step_expects_it(objective: str, tmp_path: Path) -> None:
    """Otherwise the step would be compiled a second time, when the first batch comes."""
    if objective == "causal-lm":
        examined = subjects.subject("llama", tmp_path)
    else:
        examined = tasks.subject(FAMILY.get(objective, "llama"), objective, tmp_path)
    run, data = examined.run, examined.data
    mesh = create_mesh(run.config)
    feed = BatchFeed(mesh, resolve_batch(run.config, data_parallel(mesh)))
    with BatchPipeline(data, run.config, "train", feed.shard, 0) as batches:
        placed = feed(next(batches))
    assert jax.tree.map(_described, placed) == jax.tree.map(_described, abstract_batch(run, mesh))


def _described(leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[object, ...]:
    return leaf.shape, leaf.dtype, leaf.sharding
