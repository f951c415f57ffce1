"""What the one-pass levels feed to both sides: real text, random tokens and rare tokens, packed and padded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxllm.config import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.data.fields import EXAMPLE_OBJECTIVES
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData
from jaxllm.families import ModelSpec

ROWS = 4
"""Sequences of one comparison, unless the run's global batch is smaller."""

_SEARCHED = 64
_CHOSEN = 0.15  # share of the tokens that a masked language model predicts


def one_pass_config(config: RunConfig) -> RunConfig:
    """The run with a global batch small enough to be compared on one device: two micro-batches of half of it, if it is even."""
    rows = min(config.training.global_batch, ROWS)
    training = config.training.model_copy(update={"global_batch": rows, "micro_batch": rows // 2 if rows % 2 == 0 else rows})
    return config.model_copy(update={"training": training})


def data_inputs(config: RunConfig, data: PreparedData, vocab_size: int) -> dict[str, Batch]:
    """Name -> batch at the full sequence length: one of the run's own first batches, documents padded, random and rare tokens.

    config: of `one_pass_config`.  Rare tokens are those that the training text holds least often, many of them never.
    """
    if isinstance(config.objective, EXAMPLE_OBJECTIVES):
        examples = _batch(config, data, "none")
        return {
            "examples": examples,
            "random tokens": with_tokens(examples, random_tokens(config, vocab_size)),
            "rare tokens": with_tokens(examples, _rare_tokens(config, data, vocab_size)),
        }
    packed = _batch(config, data, "concatenate")
    return {
        "packed text": packed,
        "padded text": _batch(config, data, "none"),
        "random tokens": with_tokens(packed, random_tokens(config, vocab_size)),
        "rare tokens": with_tokens(packed, _rare_tokens(config, data, vocab_size)),
    }


def random_inputs(config: RunConfig, spec: ModelSpec) -> dict[str, Batch]:
    """The inputs of a model that comes without data: random tokens, padded, and packed as three documents a row.

    Where outputs are for whole rows, or a row is a pair of texts, instead of the packed one there is a full one.
    """
    rows, length = config.training.global_batch, config.data.sequence_length
    whole = spec.head.kind in ("sequence-classification", "seq2seq")
    filled = _documents(rows, length, (length,) if whole else (length // 3, length // 2, length))
    padded = _documents(rows, length, (max(length * 3 // 4, 2),))
    layouts = {"full" if whole else "packed": filled, "padded": padded}
    return {f"random tokens, {name}": _with_random_targets(batch, config, spec) for name, batch in layouts.items()}


def _with_random_targets(batch: Batch, config: RunConfig, spec: ModelSpec) -> Batch:
    """The documents filled with random tokens, and with targets for the model's head."""
    random, head = np.random.default_rng(config.seed + 1), spec.head
    filled = with_tokens(batch, random_tokens(config, spec.vocab_size))
    real_BS, shape = batch.segments > 0, batch.inputs.shape
    if head.kind == "masked-lm":
        chosen_BS = real_BS & (random.random(shape) < _CHOSEN)
        targets_BS = np.where(chosen_BS, random.integers(0, spec.vocab_size, shape, np.int32), np.int32(0))
        return replace(filled, targets=targets_BS, weights=chosen_BS.astype(np.float32))
    if head.kind == "token-classification":
        labels_BS = np.where(real_BS, random.integers(0, head.outputs, shape, np.int32), np.int32(0))
        return replace(filled, targets=labels_BS, weights=real_BS.astype(np.float32))
    if head.kind == "seq2seq":
        source_BS = np.where(real_BS, random.integers(0, spec.vocab_size, shape, np.int32), np.int32(0))
        return replace(filled, source=source_BS, source_segments=batch.segments)
    if head.kind != "sequence-classification":
        return filled
    outputs = (batch.rows, 1 if head.loss == "cross-entropy" else head.outputs)
    targets: NDArray[Any] = random.integers(0, head.outputs if head.loss == "cross-entropy" else 2, outputs, np.int32)
    if head.loss == "binary-cross-entropy":
        targets = targets.astype(np.float32)
    elif head.loss == "squared-error":
        targets = random.standard_normal(outputs, np.float32)
    types_BS = np.where(real_BS, np.arange(shape[1]) * 2 // shape[1] % max(spec.token_types, 1), 0).astype(np.int32)
    return replace(filled, targets=targets, weights=np.ones(outputs, np.float32), token_types=types_BS)


def with_tokens(batch: Batch, tokens_BS: NDArray[np.int32]) -> Batch:
    """The batch with other tokens in the same documents; tokens: (B, N), of at least S + 1 tokens, and R of a source.

    Targets that are tokens are the tokens that follow; labels stay as they are.  A source reads the tokens from behind.
    """
    zero = np.int32(0)
    length = batch.sequence_length
    inputs = np.where(batch.segments > 0, tokens_BS[:, :length], zero)
    if batch.token_types is not None:
        return replace(batch, inputs=inputs)
    targets = np.where(batch.weights > 0, tokens_BS[:, 1 : length + 1], zero)
    changed = replace(batch, inputs=inputs, targets=targets)
    if batch.source_segments is None:
        return changed
    source = tokens_BS[:, ::-1][:, : batch.source_segments.shape[1]]
    return replace(changed, source=np.where(batch.source_segments > 0, source, zero))


def counted(batch: Batch, outputs: NDArray[Any], *, of_source: bool = False) -> NDArray[np.bool_]:
    """Which of (B, S, ...) or (B, 1, ...) values belong to tokens that are not padding, or to rows that hold any.

    of_source: the values are of the tokens of a source.
    """
    segments = batch.source_segments if of_source and batch.source_segments is not None else batch.segments
    real: NDArray[np.bool_] = segments > 0
    return real if outputs.shape[1] == real.shape[1] else np.asarray(real.any(axis=1, keepdims=True))


def random_tokens(config: RunConfig, vocab_size: int) -> NDArray[np.int32]:
    """Uniform tokens (B, S + 1) from the run's seed; S: the longest of source and target, where there are both."""
    longest = max(config.data.sequence_length, config.data.target_length or 0)
    shape = (config.training.global_batch, longest + 1)
    return np.random.default_rng(config.seed).integers(0, vocab_size, shape, dtype=np.int32)


def _rare_tokens(config: RunConfig, data: PreparedData, vocab_size: int) -> NDArray[np.int32]:
    counts = np.zeros(vocab_size, np.int64)
    batches = BatchPipeline(data, config, "train")
    for number in range(_SEARCHED):
        counts += np.bincount(batches.batch(number).inputs.ravel(), minlength=vocab_size)
    rarest = np.argsort(counts, kind="stable")[: max(vocab_size // 8, 1)].astype(np.int32)
    return rarest[random_tokens(config, rarest.size)]


def _batch(config: RunConfig, data: PreparedData, packing: str) -> Batch:
    """Of the run's first batches the one with the most documents in a row, or else the most padding."""
    changed = config.data.model_copy(update={"packing": packing})
    pipeline = BatchPipeline(data, config.model_copy(update={"data": changed}), "train")
    batches = (pipeline.batch(number) for number in range(_SEARCHED))
    return max(batches, key=lambda batch: (int(batch.segments.max()), int((batch.segments == 0).sum())))


def _documents(rows: int, length: int, ends: tuple[int, ...]) -> Batch:
    """Rows of documents that end at `ends`; what is left is padding."""
    segments, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    weights = np.zeros(length, np.float32)
    start = 0
    for number, end in enumerate(ends, start=1):
        segments[start:end] = number
        positions[start:end] = np.arange(end - start)
        weights[start : max(end - 1, start)] = 1.0
        start = end
    table: Mapping[str, NDArray[np.generic]] = {"weights": weights, "positions": positions, "segments": segments}
    repeated = {name: np.tile(values, (rows, 1)) for name, values in table.items()}
    empty = np.zeros((rows, length), np.int32)
    return Batch(inputs=empty, targets=empty, **repeated)
