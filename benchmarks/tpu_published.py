"""Speed by the TPU compiler's clock against published runs of the same model, slice, batch and sequence.

    python -m benchmarks.tpu_published [--only NAME] [--json benchmarks/results/tpu_published.json]

The published runs are MaxText's, the predictions are of jaxllm's own step: a ratio of 1 says that both would be as fast if the
prediction were exact.  Sources: the table of models that MaxText certifies
(https://maxtext.readthedocs.io/en/latest/reference/models/tiering.html) and the run files it links to (batch per chip).
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

ROWS = (
    Row("llama3.1-8b-v6e-256", "llama3-8b.yaml", "v6e:16x16",
        ("parallel.fsdp=256", "training.micro_batch=3", "training.global_batch=768"),
        {"tokens_per_second_per_chip": 7207, "source": TIERING}),
    Row("llama3.1-70b-v6e-256", "llama3-70b.yaml", "v6e:16x16",
        ("parallel.fsdp=256", "parallel.tensor=1", "training.micro_batch=2", "training.global_batch=512"),
        {"tokens_per_second_per_chip": 960, "source": TIERING}),
    Row("llama2-70b-v6e-256", "llama3-70b.yaml", "v6e:16x16",
        (*LLAMA2_70B, "parallel.fsdp=256", "parallel.tensor=1", "training.micro_batch=2", "training.global_batch=512"),
        {"tokens_per_second_per_chip": 900, "source": TIERING}),
    Row("llama2-70b-v5p-256", "llama3-70b.yaml", "v5p:4x8x8",
        (*LLAMA2_70B, "parallel.fsdp=256", "parallel.tensor=1", "training.micro_batch=4", "training.global_batch=1024"),
        {"tokens_per_second_per_chip": 692, "source": TIERING}),
    Row("llama3.1-405b-v6e-256", "llama3-405b.yaml", "v6e:16x16",
        ("parallel.fsdp=64", "parallel.tensor=4", "training.micro_batch=1", "training.global_batch=64"),
        {"tokens_per_second_per_chip": 123, "source": TIERING}),
)  # fmt: skip


def judge(row: Row, found: Study) -> dict[str, Any]:
    """Predicted over published."""
    speed = found.prediction.tokens_per_second_per_chip if found.prediction else 0.0
    published = row.reference["tokens_per_second_per_chip"]
    return {"predicted": speed, "published": published, "ratio": speed / published, "fits": found.fits}


if __name__ == "__main__":
    run(__doc__, ROWS, judge)
