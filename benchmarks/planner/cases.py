"""The planner's cases: a model, a place to measure it, and a setting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.planner.models import (
    BERT,
    BERT_SMALL,
    BERT_TINY,
    GPT2,
    GPT2_SMALL,
    GPT2_TINY,
    GPT2_XL,
    LARGE_VOCABULARY,
    LLAMA_1B,
    LLAMA_8B,
    LLAMA_100M,
    LLAMA_SMALL,
    LLAMA_TINY,
    LLAMA_WIDE,
    MIXTRAL_8X7B,
    MIXTRAL_SMALL,
    MIXTRAL_TINY,
    QWEN3,
    QWEN3_30B,
    T5_BASE,
    T5_SMALL,
    T5_TINY,
)

BOUND, FLOPS_BOUND = 0.10, 0.02

MASKED_LM = {"kind": "masked-lm"}
SEQUENCE_LABELS = {"kind": "sequence-classification", "num_labels": 3}
TOKEN_LABELS = {"kind": "token-classification", "num_labels": 9}
SEQ2SEQ = {"kind": "seq2seq"}


@dataclass(frozen=True)
class Case:
    """One measurement.

    where: `cpu:N` devices, a TPU topology, or `deepspeed:N` processes.  target: tokens of an encoder-decoder's target.
    """

    name: str
    where: str
    model: dict[str, Any]
    sequence: int
    batch: int
    micro: int
    parallel: dict[str, int] = field(default_factory=dict)
    precision: str = "bf16"
    jax: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    loss_chunk: int | str = "auto"
    objective: dict[str, Any] = field(default_factory=lambda: {"kind": "causal-lm"})
    target: int | None = None

    @property
    def kind(self) -> str:
        """The table that it belongs to."""
        place = self.where.partition(":")[0]
        return place if place in ("cpu", "deepspeed") else "tpu"

    @property
    def devices(self) -> int:
        """Devices or processes."""
        return math.prod(self.parallel.values())

    def config(self) -> dict[str, Any]:
        """The run file."""
        return {
            "name": "planner",
            "model": self.model,
            "objective": self.objective,
            "data": {
                "tokenizer": {"train": "bpe", "vocab_size": self.model["vocab_size"]},
                "sequence_length": self.sequence,
                "target_length": self.target,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {
                "steps": 1,
                "global_batch": self.batch,
                "micro_batch": self.micro,
                "precision": self.precision,
                "loss_chunk": self.loss_chunk,
            },
            "parallel": {"data": 1, **self.parallel},
            "jax": {**self.jax, "cpu_devices": self.devices} if self.kind == "cpu" else self.jax,
            "deepspeed": self.deepspeed,
        }


def _cpu(name: str, model: dict[str, Any], sequence: int, batch: int, micro: int, remat: str, **parallel: int) -> Case:
    devices = math.prod(parallel.values())
    return Case(name, f"cpu:{devices}", model, sequence, batch, micro, parallel, "fp32", {"remat": remat, "attention": "xla"})


def _tpu(
    name: str, where: str, model: dict[str, Any], sequence: int, batch: int, micro: int, remat: str, **parallel: int
) -> Case:
    return Case(name, where, model, sequence, batch, micro, parallel, "bf16", {"remat": remat})


def _ds(
    name: str, model: dict[str, Any], sequence: int, batch: int, micro: int, precision: str, stage: int, world: int, **more: Any
) -> Case:
    parallel = {"fsdp": world} if stage else {"data": world}
    return Case(
        name, f"deepspeed:{world}", model, sequence, batch, micro, parallel, precision, {}, {"zero_stage": stage, **more}
    )


CPU = (
    _cpu("llama, full", LLAMA_SMALL, 384, 4, 4, "full"),
    _cpu("llama, none", LLAMA_SMALL, 384, 4, 4, "none"),
    _cpu("llama, dots", LLAMA_SMALL, 384, 4, 4, "dots"),
    _cpu("llama, 2 micro-batches", LLAMA_SMALL, 384, 8, 4, "full"),
    _cpu("llama 100M, fsdp 8", LLAMA_100M, 512, 8, 1, "full", fsdp=8),
    _cpu("llama 100M, fsdp 4 x tensor 2", LLAMA_100M, 512, 8, 2, "full", fsdp=4, tensor=2),
    _cpu("llama 100M, tensor 4", LLAMA_100M, 512, 2, 2, "none", tensor=4),
    _cpu("llama 100M, data 2 x fsdp 2 x tensor 2", LLAMA_100M, 256, 8, 2, "none", data=2, fsdp=2, tensor=2),
    _cpu("gpt2, none", GPT2_SMALL, 512, 4, 4, "none"),
    _cpu("gpt2, data 4, dots", GPT2_SMALL, 512, 8, 2, "dots", data=4),
    _cpu("gpt2, full", GPT2_SMALL, 1024, 2, 2, "full"),
    _cpu("gpt2, fsdp 4, full", GPT2_SMALL, 512, 8, 2, "full", fsdp=4),
    _cpu("llama, tied, none", {**LLAMA_SMALL, "tie_word_embeddings": True}, 256, 4, 4, "none"),
    _cpu("llama, fsdp 2 x tensor 2, dots", LLAMA_SMALL, 384, 8, 4, "dots", fsdp=2, tensor=2),
    _cpu("llama 100M, fsdp 2, dots", LLAMA_100M, 512, 4, 2, "dots", fsdp=2),
    _cpu("llama 100M, data 8, none", LLAMA_100M, 256, 8, 1, "none", data=8),
    _cpu("llama 100M, tensor 2, full", LLAMA_100M, 512, 2, 2, "full", tensor=2),
    _cpu("qwen3, fsdp 4, full", QWEN3, 384, 8, 2, "full", fsdp=4),
    replace(_cpu("llama, loss in chunks", LARGE_VOCABULARY, 384, 4, 4, "full"), loss_chunk=256),
    replace(
        _cpu("llama, loss in chunks, fsdp 2 x tensor 2", LARGE_VOCABULARY, 384, 8, 4, "full", fsdp=2, tensor=2), loss_chunk=256
    ),
    _cpu("mixtral, full", MIXTRAL_SMALL, 384, 4, 4, "full"),
    _cpu("mixtral, none", MIXTRAL_SMALL, 384, 4, 4, "none"),
    _cpu("mixtral, fsdp 2 x expert 4", MIXTRAL_SMALL, 384, 16, 2, "full", fsdp=2, expert=4),
    replace(_cpu("bert, masked-lm, none", BERT_SMALL, 512, 4, 4, "none"), objective=MASKED_LM),
    replace(_cpu("bert, labels of texts, full", BERT_SMALL, 512, 8, 8, "full"), objective=SEQUENCE_LABELS),
    replace(_cpu("bert, labels of words, fsdp 4", BERT_SMALL, 512, 16, 4, "dots", fsdp=4), objective=TOKEN_LABELS),
    replace(_cpu("t5, none", T5_SMALL, 384, 4, 4, "none"), objective=SEQ2SEQ, target=128),
    replace(_cpu("t5, fsdp 4, full", T5_SMALL, 512, 16, 4, "full", fsdp=4), objective=SEQ2SEQ, target=256),
)
TPU = (
    _tpu("1B, fsdp 8, full", "v5e:2x4", LLAMA_1B, 2048, 8, 1, "full", fsdp=8),
    _tpu("1B, fsdp 8, dots", "v5e:2x4", LLAMA_1B, 2048, 8, 1, "dots", fsdp=8),
    _tpu("1B, fsdp 8, none", "v5e:2x4", LLAMA_1B, 1024, 8, 1, "none", fsdp=8),
    _tpu("gpt2, data 4, none", "v5e:2x2", GPT2, 1024, 16, 4, "none", data=4),
    _tpu("1B, fsdp 4 x tensor 4", "v5e:4x4", LLAMA_1B, 2048, 16, 4, "full", fsdp=4, tensor=4),
    _tpu("1B, 4 micro-batches", "v5e:2x4", LLAMA_1B, 2048, 32, 1, "full", fsdp=8),
    _tpu("8B, fsdp 8, dots", "v5p:2x2x2", LLAMA_8B, 2048, 8, 1, "dots", fsdp=8),
    _tpu("gpt2 xl, fsdp 8", "v4:2x2x2", GPT2_XL, 1024, 16, 2, "full", fsdp=8),
    _tpu("8B, fsdp 8", "tpu7x:2x2x1", LLAMA_8B, 2048, 8, 1, "full", fsdp=8),
    _tpu("mixtral 8x7b, fsdp 8 x expert 8", "v5p:4x4x4", MIXTRAL_8X7B, 4096, 64, 1, "full", fsdp=8, expert=8),
    _tpu("qwen3 30B-A3B, fsdp 64", "v5p:4x4x4", QWEN3_30B, 4096, 64, 1, "full", fsdp=64),
    replace(_tpu("bert, masked-lm, data 4", "v5e:2x2", BERT, 512, 64, 16, "none", data=4), objective=MASKED_LM),
    replace(_tpu("bert, labels, fsdp 4", "v5p:2x2x1", BERT, 512, 128, 32, "full", fsdp=4), objective=SEQUENCE_LABELS),
    replace(_tpu("t5 base, fsdp 4", "v5e:2x2", T5_BASE, 512, 64, 16, "full", fsdp=4), objective=SEQ2SEQ, target=256),
)
DEEPSPEED = (
    _ds("llama, stage 0", LLAMA_TINY, 448, 4, 4, "fp32", 0, 1),
    _ds("llama, stage 0, bf16", LLAMA_TINY, 448, 4, 4, "bf16", 0, 1),
    _ds("llama, eager attention", LLAMA_TINY, 448, 4, 4, "bf16", 0, 1, attention="eager"),
    _ds("llama, activation checkpointing", LLAMA_TINY, 448, 4, 4, "fp32", 0, 1, activation_checkpointing=True),
    _ds("gpt2, stage 0", GPT2_TINY, 448, 4, 4, "fp32", 0, 1),
    _ds("llama, stage 1", LLAMA_WIDE, 512, 2, 1, "fp32", 1, 2),
    _ds("llama, stage 2", LLAMA_WIDE, 512, 2, 1, "fp32", 2, 2),
    _ds("llama, stage 3", LLAMA_WIDE, 512, 2, 1, "fp32", 3, 2),
    _ds("llama, stage 1, bf16", LLAMA_WIDE, 512, 2, 1, "bf16", 1, 2),
    _ds("llama, stage 2, bf16", LLAMA_WIDE, 512, 4, 1, "bf16", 2, 2),
    _ds("llama, stage 3, bf16", LLAMA_WIDE, 512, 4, 1, "bf16", 3, 2),
    _ds("gpt2, stage 2, bf16", GPT2_TINY, 448, 4, 2, "bf16", 2, 2),
    replace(_ds("llama, loss in chunks", {**LLAMA_TINY, "vocab_size": 16000}, 448, 4, 4, "fp32", 0, 1), loss_chunk=128),
    replace(_ds("llama, loss in chunks, bf16", {**LLAMA_TINY, "vocab_size": 16000}, 448, 4, 4, "bf16", 0, 1), loss_chunk=128),
    _ds("mixtral, stage 0", MIXTRAL_TINY, 448, 4, 4, "fp32", 0, 1),
    _ds("mixtral, stage 0, bf16", MIXTRAL_TINY, 448, 4, 4, "bf16", 0, 1),
    _ds("mixtral, stage 3, bf16", MIXTRAL_TINY, 448, 4, 2, "bf16", 3, 2),
    replace(_ds("bert, masked-lm, stage 0", BERT_TINY, 448, 4, 4, "fp32", 0, 1), objective=MASKED_LM),
    replace(_ds("bert, labels, stage 2, bf16", BERT_TINY, 448, 8, 4, "bf16", 2, 2), objective=SEQUENCE_LABELS),
    replace(_ds("t5, stage 0", T5_TINY, 384, 4, 4, "fp32", 0, 1), objective=SEQ2SEQ, target=192),
    replace(_ds("t5, stage 2, bf16", T5_TINY, 384, 8, 4, "bf16", 2, 2), objective=SEQ2SEQ, target=192),
)
CASES = (*CPU, *TPU, *DEEPSPEED)
