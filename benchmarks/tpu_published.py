"""Speed by the TPU compiler's clock against published runs of the same model, slice, batch and sequence.

    python -m benchmarks.tpu_published [--only NAME] [--json benchmarks/results/tpu_published.json]

Nearly all published runs are MaxText's, the predictions are of jaxllm's own step: a ratio of 1 says that both would be as
fast if the prediction were exact.  Speeds are of the table of models that MaxText certifies (TIERING), rows per chip of the
run files that it links to; where a recipe shows the log of its run, both are of that log.  What the backward pass keeps is
each side's choice.  AUTORESEARCH is another trainer in JAX (mean of three runs): pure fsdp, everything recomputed,
collectives on SparseCores.
"""

from __future__ import annotations

from typing import Any

from benchmarks._tpu import Row, run
from jaxllm.planning.tpu.study import Study

TIERING = "https://maxtext.readthedocs.io/en/latest/reference/models/tiering.html"

LLAMA2_70B = (
    "model.vocab_size=32000", "model.max_position_embeddings=4096", "model.bos_token_id=1", "model.eos_token_id=2",
    "model.rope_parameters={rope_type: default, rope_theta: 10000.0}", "data.sequence_length=4096",
)  # fmt: skip

RECIPES = "https://github.com/AI-Hypercomputer/tpu-recipes/tree/main/training/trillium"
AUTORESEARCH = (
    "https://github.com/vlasenkoalexey/tpu_performance_autoresearch_wiki/blob/main/wiki/experiments/"
    "llama3_8B_autoresearch_optimization/jax/experiments/2026-04-26-jax-exp27-28-sparsecore-rs-ag-offload-frontier.md"
)
HOST, FULL, MOMENTS = "jax.remat=[layer_input@host]", "jax.remat=full", "jax.offload_optimizer=moments"


def _pure_fsdp(chips: int, rows: int) -> tuple[str, ...]:
    """So many rows on each chip."""
    return (f"parallel.fsdp={chips}", f"training.micro_batch={rows}", f"training.global_batch={chips * rows}")


def _published(tokens: float, source: str) -> dict[str, Any]:
    return {"tokens_per_second_per_chip": tokens, "source": source}


ROWS = (
    Row("llama3-8b-v6e-8", "llama3-8b.yaml", "v6e:2x4", (*_pure_fsdp(8, 4), FULL), _published(7700, AUTORESEARCH)),
    Row("mistral-7b-v6e-8", "mistral-7b.yaml", "v6e:2x4", ("model.sliding_window=null", *_pure_fsdp(8, 6), HOST),
        _published(7777, f"{RECIPES}/Mistral-7B-MaxText")),
    Row("llama3.1-8b-v6e-256", "llama3-8b.yaml", "v6e:16x16", _pure_fsdp(256, 4),
        _published(7207, f"{RECIPES}/Llama3.1-8B-MaxText/v6e-256")),
    Row("llama3.1-70b-v6e-256", "llama3-70b.yaml", "v6e:16x16", (*_pure_fsdp(256, 5), HOST),
        _published(960, f"{RECIPES}/Llama3.1-70B-MaxText/v6e-256")),
    Row("llama2-70b-v6e-256", "llama3-70b.yaml", "v6e:16x16", (*LLAMA2_70B, *_pure_fsdp(256, 2), FULL),
        _published(905, f"{RECIPES}/Llama2-70B-MaxText")),
    Row("llama2-70b-v5p-256", "llama3-70b.yaml", "v5p:4x8x8", (*LLAMA2_70B, *_pure_fsdp(256, 4), FULL),
        _published(692, TIERING)),
    Row("llama3.1-405b-v6e-256", "llama3-405b.yaml", "v6e:16x16",
        ("parallel.fsdp=64", "parallel.tensor=4", "training.micro_batch=4", "training.global_batch=256", HOST, MOMENTS),
        _published(123, TIERING)),
)  # fmt: skip


def judge(row: Row, found: Study) -> dict[str, Any]:
    """Predicted over published."""
    speed = found.prediction.tokens_per_second_per_chip if found.prediction else 0.0
    published = row.reference["tokens_per_second_per_chip"]
    return {"predicted": speed, "published": published, "ratio": speed / published, "fits": found.fits}


if __name__ == "__main__":
    run(__doc__, ROWS, judge)
