"""Training on random tokens, without data or files: tiny models of each family, in this process or in a group of workers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxllm.backend import Backend, create_backend
from jaxllm.config.schema import BackendName, Precision, RunConfig
from jaxllm.data.batch import Batch, Shard
from jaxllm.families import Vocabulary, resolve_model, task_of
from jaxllm.families.spec import HeadSpec
from jaxllm.parity.tolerances import has_gradient, relative_error
from jaxllm.run import Run
from jaxllm.schedule import hyper
from jaxllm.state import Progress, TensorReader, TrainingState, write_state
from tests.tiny import TINY, WORDLESS, tiny

VOCABULARY, LENGTH, ROWS = 96, 32, 8
MASK_TOKEN = 1
LANGUAGE_MODEL = HeadSpec()
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MODELS: dict[str, dict[str, Any]] = {family: tiny(family) for family in TINY} | {
    "gemma": tiny("gemma", num_key_value_heads=2),  # a mesh cuts them in two
    # With weights as small as the others' the values of a token can cancel in the output projection of layer 1 (0.015 where 0.1
    # is usual).  As the first of its document it sees nothing but itself, and the norm behind the attention divides by that:
    # between steps 400 and 1,000 such tokens take one rounding up to 1e-9, whether between two runs of one backend or of both.
    "gemma3_text": tiny("gemma3_text", initializer_range=0.1),
    "llama": {
        "family": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt2": {
        "family": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "bert": {"family": "bert", **_ENCODER},
    "roberta": {"family": "roberta", "layer_norm_eps": 1e-5, **_ENCODER},
    "t5": {
        "family": "t5",
        "d_model": 32,
        "d_kv": 6,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "dropout_rate": 0.0,
    },
}
ENCODERS = ("bert", "roberta")
"""They predict masked tokens from both sides."""
HEADS: dict[str, dict[str, Any]] = {
    "single": {"kind": "sequence-classification", "labels": ["a", "b", "c"]},
    "multi": {"kind": "sequence-classification", "num_labels": 4, "problem_type": "multi_label_classification"},
    "regression": {"kind": "sequence-classification", "num_labels": 2, "problem_type": "regression"},
    "words": {"kind": "token-classification", "labels": ["a", "b", "c"]},
}
CLASSIFIERS = (
    *(f"{family}-single" for family in (*TINY, *ENCODERS)),
    *(f"{family}-words" for family in (*TINY, *ENCODERS) if family not in WORDLESS),
    *(f"llama-{losses}" for losses in ("multi", "regression")),
)
"""Families with a head of labels, named as `make_run` has them."""
CLIP_NORMS = {"llama": 0.8, "gpt2": 1.0}
"""Between the norms of the first steps, so that some are clipped and some are not."""
FAMILIES = ("llama", "gpt2")
"""They go through every mesh, ZeRO stage and switch."""
KINDS = ("mixtral", "bert")
"""A mixture of experts and an encoder: they go through every ZeRO stage and mesh."""
OTHERS = tuple(family for family in MODELS if family not in FAMILIES)
"""They go through what depends on a family: training on each backend, and a switch onto a mesh."""
EXPERTS = ("mixtral", "qwen3_moe")
"""Their load-balancing loss belongs to a micro-batch, so that a step is one: rows fall into others on another mesh."""
MESHES: dict[str, dict[str, int]] = {
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "fsdp 4 x tensor 2": {"data": 1, "fsdp": 4, "tensor": 2},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
ONE: dict[str, int] = {"data": 1}
SHARING: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "autotp-zero0": ({"tensor": 2}, {"zero_stage": 0}),
    "autotp-zero3": ({"tensor": 2}, {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}),
    "ulysses-zero2": ({"context": 2}, {"zero_stage": 2}),
    "ulysses-zero3": ({"context": 2}, {"zero_stage": 3, "activation_checkpointing": True}),
}
"""Layouts of two DeepSpeed processes that share rows: mesh, and keys of `deepspeed`; Llama goes through them."""


def make_run(
    family: str,
    precision: Precision,
    steps: int,
    mesh: Mapping[str, int] = ONE,
    groups: int | None = None,
    **deepspeed: Any,
) -> Run:
    """A run of a tiny model.  groups: of devices that see different rows; default, as the mesh has them.

    family: or one of CLASSIFIERS.  A global batch is two micro-batches of each group, as far as there are rows enough.
    """
    groups = groups or mesh.get("data", 1) * mesh.get("fsdp", 1)
    name, (family, _, head) = family, family.partition("-")
    model, objective = MODELS[family], _objective(family)
    if head:  # the padding token, which the last token of a row is told from, is the tokenizer's
        model, objective = {**model, "classifier_dropout": 0.0}, HEADS[head]
        model.pop("pad_token_id", None)
    config = RunConfig.model_validate(
        {
            "name": name,
            "seed": 5,
            "model": model,
            "objective": objective,
            "data": {"tokenizer": {"train": "bpe", "vocab_size": VOCABULARY}, "sequence_length": LENGTH},
            "optimizer": {
                "learning_rate": 1e-3,
                "clip_norm": CLIP_NORMS.get(family, 1.0),
                "betas": [0.9, 0.95],
                "weight_decay": 0.1,
            },
            "schedule": {"kind": "cosine", "warmup_steps": 4},
            "training": {
                "steps": steps,
                "global_batch": ROWS,
                "micro_batch": max(ROWS // groups // (1 if family in EXPERTS else 2), 1),
                "precision": precision,
            },
            "parallel": mesh,
            "jax": {"cpu_devices": math.prod(mesh.values())},
            "deepspeed": deepspeed,
        }
    )
    vocabulary = Vocabulary(VOCABULARY, end=0, padding=0 if head else None)
    return Run(config, resolve_model(config.model, vocabulary, task=task_of(config.objective)), steps)


def _objective(family: str) -> dict[str, Any]:
    """What a family learns without a head of labels."""
    return {"kind": "masked-lm" if family in ENCODERS else "span-corruption" if family == "t5" else "causal-lm"}


def make_batch(step: int, shard: Shard = Shard(0, 1), head: HeadSpec = LANGUAGE_MODEL) -> Batch:
    """This process's rows of a global batch: tokens that mostly follow from the one before, documents packed and padded.

    head: of the model.  For `masked-lm` some tokens are hidden behind MASK_TOKEN, and they are the targets instead of the next
    ones; for `seq2seq` a source holds the tokens from behind, cut at some place; for labels see `_labelled`.

    Where there is nothing to learn, gradients are noise, AdamW makes whole steps of it, and after some hundred steps a
    trajectory amplifies any rounding error.  `RandomState` is frozen for ever, which `default_rng` is not: the golden losses
    hang on it.
    """
    random = np.random.RandomState(1000 + step)
    drawn = random.randint(0, VOCABULARY, (ROWS, LENGTH + 1))
    follows = random.random_sample((ROWS, LENGTH + 1)) < 0.8
    tokens = drawn.astype(np.int32)
    for position in range(1, LENGTH + 1):
        tokens[:, position] = np.where(follows[:, position], (5 * tokens[:, position - 1] + 7) % VOCABULARY, drawn[:, position])
    segments, positions = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), np.int32)
    weights = np.zeros((ROWS, LENGTH), np.float32)
    for row in range(ROWS):
        first = int(random.randint(2, LENGTH - 8))
        last = LENGTH if row % 2 else int(random.randint(first + 4, LENGTH + 1))  # every other row is padded
        for number, (start, end) in enumerate([(0, first), (first, last)], start=1):
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
            weights[row, start : end - 1] = 1.0
    inputs = np.where(segments > 0, tokens[:, :-1], 0).astype(np.int32)
    targets = np.where(weights > 0, tokens[:, 1:], 0).astype(np.int32)
    if head.kind == "masked-lm":
        hidden = (random.random_sample((ROWS, LENGTH)) < 0.2) & (segments > 0)
        inputs, targets = np.where(hidden, np.int32(MASK_TOKEN), inputs), np.where(hidden, inputs, np.int32(0))
        weights = hidden.astype(np.float32)
    whole = Batch(inputs, targets, weights, positions, segments)
    if head.kind == "seq2seq":
        kept = (np.arange(LENGTH) < random.randint(4, LENGTH + 1, (ROWS, 1))).astype(np.int32)
        whole = replace(whole, source=tokens[:, :0:-1] * kept, source_segments=kept)
    if head.kind in ("sequence-classification", "token-classification"):
        whole = _labelled(tokens[:, :-1], (segments > 0).sum(axis=1), head)
    return whole.select(shard.index * ROWS // shard.count, (shard.index + 1) * ROWS // shard.count)


def _labelled(tokens_RS: NDArray[np.int32], lengths_R: NDArray[np.int64], head: HeadSpec) -> Batch:
    """One document in each row, filled up with token 0, which is not among its own; labels that its tokens decide."""
    places = np.arange(LENGTH, dtype=np.int32)
    inside = (places < lengths_R[:, None]).astype(np.int32)
    inputs = np.maximum(tokens_RS, 1) * inside
    targets: NDArray[np.int32] | NDArray[np.float32] = inputs % head.outputs * inside
    weights = (inside * (places % 3 > 0)).astype(np.float32)  # as if every third token went on with a word
    if head.kind == "sequence-classification":
        targets = (inputs[:, :1] + inputs[:, 1:2]) % head.outputs
        if head.loss != "cross-entropy":
            bits = inputs[:, :1] >> np.arange(head.outputs)
            targets = (bits % 2 if head.loss == "binary-cross-entropy" else bits / VOCABULARY).astype(np.float32)
        weights = np.ones(targets.shape, np.float32)
    return Batch(inputs, targets, weights, places * inside, inside)


@dataclass(frozen=True)
class Trained:
    """What a run left: losses and gradient norms by step (from 1), and its parameters and second moments at the end."""

    losses: dict[int, float]
    norms: dict[int, float]
    params: dict[str, NDArray[Any]]
    exp_avg_sq: dict[str, NDArray[Any]]

    def loss_error(self, reference: Trained) -> float:
        """The largest relative difference of a loss of the steps that both took."""
        return max(relative_error(loss, reference.losses[step]) for step, loss in self.losses.items())

    def parameter_error(self, reference: Trained) -> float:
        """The relative difference of the tensor that is furthest away."""
        assert self.params.keys() == reference.params.keys()
        sizes = {name: np.sqrt(values) for name, values in reference.exp_avg_sq.items()}
        largest = max(float(size.max()) for size in sizes.values())
        masks = {name: has_gradient(size, largest) for name, size in sizes.items()}
        return max(relative_error(self.params[name][mask], reference.params[name][mask]) for name, mask in masks.items())


def train(
    name: BackendName, run: Run, state: TrainingState | None = None, stop: int | None = None, keep: Path | None = None
) -> Trained:
    """Train on one backend in this process, from `state`, up to step `stop`.  keep: where the last state is written."""
    backend = create_backend(name)
    backend.start(run, state)
    try:
        return take_steps(backend, run, state.progress.step if state else 0, stop or run.total_steps, keep)
    finally:
        backend.close()


def take_steps(backend: Backend, run: Run, start: int, stop: int, keep: Path | None = None) -> Trained:
    """The steps from `start` to `stop` of a backend that has been started (collective)."""
    losses, norms = {}, {}
    for step in range(start, stop):
        batch = make_batch(step, backend.shard, run.model.spec.head)
        result = backend.step(batch, hyper(step, step, run.total_steps, run.config))
        losses[step + 1], norms[step + 1] = float(result.loss), float(result.gradient_norm)
    state = backend.export(Progress(stop, stop, stop * ROWS))
    if keep is not None:
        dtype = "float64" if run.config.training.precision == "fp64" else "float32"
        write_state(state, keep, run.model.huggingface_config, dtype=dtype, is_writer=backend.is_main)
        backend.barrier("kept")
    assert state.exp_avg_sq is not None
    return Trained(losses, norms, _read(state.params), _read(state.exp_avg_sq))


def _read(reader: TensorReader) -> dict[str, NDArray[Any]]:
    return {name: np.array(reader.read(name)) for name in reader.names()}
