"""What a run reports: one record per logging interval, one per evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainRecord:
    """A training step, and the throughput since the record before it.

    step: steps done, counted from 1.  loss: nats per target token, over the global batch of this step.  learning_rate: of
    this step.  gradient_norm: global norm before clipping.  tokens_per_second, model_tflops, mfu: see `Meter`; None when the
    interval holds no timed step.  model_tflops: 1e12 model FLOP/s over all devices.  mfu: a fraction of the peak of all
    devices.  memory_bytes: peak of the busiest local device.  tokens: target tokens consumed since the start of the run.
    seconds: wall-clock time since this process began to train.  seconds_left: an estimate for people, not written to files.
    statistics: more to report, by name (`jaxllm.metrics.routing`).
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float | None
    model_tflops: float | None
    mfu: float | None
    memory_bytes: int | None
    tokens: int
    seconds: float
    seconds_left: float | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The line of metrics.jsonl; a value that is not finite, which JSON cannot hold, becomes null."""
        return {
            "step": self.step,
            "split": "train",
            "loss": _finite(self.loss),
            "learning_rate": _finite(self.learning_rate),
            "gradient_norm": _finite(self.gradient_norm),
            "tokens_per_second": _finite(self.tokens_per_second),
            "model_tflops": _finite(self.model_tflops),
            "mfu": _finite(self.mfu),
            "memory_bytes": self.memory_bytes,
            "tokens": self.tokens,
            "seconds": _finite(self.seconds),
            **{name: _finite(value) for name, value in self.statistics.items()},
        }


@dataclass(frozen=True)
class ValidationRecord:
    """An evaluation on the validation split.

    step: steps done before it.  loss: per target, in nats where targets are tokens or labels.  perplexity: exp(loss); None
    where targets are not tokens.  bits_per_byte: loss in bits per byte of text, which can be compared across tokenizers; None
    where not every token of a text is predicted.  target_tokens: targets evaluated.  seconds: how long the evaluation took.
    measures: further ones of the task, as accuracy.
    """

    step: int
    loss: float
    perplexity: float | None
    bits_per_byte: float | None
    target_tokens: float
    seconds: float
    measures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_sums(
        cls, step: int, loss_sum: float, target_tokens: float, bytes_per_token: float | None, seconds: float
    ) -> ValidationRecord:
        """The record of summed token losses (nats) over `target_tokens` tokens that stand for bytes_per_token bytes each."""
        loss = loss_sum / target_tokens if target_tokens else math.nan
        bits_per_byte = loss / math.log(2) / bytes_per_token if bytes_per_token else None
        return cls(step, loss, perplexity(loss), bits_per_byte, target_tokens, seconds)

    def to_json(self) -> dict[str, Any]:
        """The line of metrics.jsonl; a value that is not finite, which JSON cannot hold, becomes null."""
        return {
            "step": self.step,
            "split": "validation",
            "loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "bits_per_byte": _finite(self.bits_per_byte),
            "target_tokens": self.target_tokens,
            "seconds": _finite(self.seconds),
            **{name: _finite(value) for name, value in self.measures.items()},
        }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond double precision."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
