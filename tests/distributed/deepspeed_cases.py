"""Tiny runs, batches and a hand-written reference that the DeepSpeed tests share, in this process and in workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jaxllm.backend import Hyper
from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch, Shard
from jaxllm.families import flatten, resolve_model, task_of
from jaxllm.run import Run
from jaxllm.state.training_state import Progress, TensorReader, TrainingState
from tests.tiny import TINY, tiny

VOCABULARY, SEQUENCE, ROWS, CLIP_NORM = 61, 24, 8, 0.5
MODELS: dict[str, dict[str, Any]] = {
    # Sizes whose tensors are not divisible by 2 or 3 processes; grouped queries; biases; tied and untied heads.
    "llama": {
        "family": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 20,
        "intermediate_size": 27,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    # Heads for two processes, of a size of their own; an MLP and a vocabulary that two processes cannot share evenly.
    "llama-heads": {
        "family": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 20,
        "head_dim": 6,
        "intermediate_size": 27,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "gpt2": {
        "family": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 21,
        "n_inner": 35,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
MODELS |= {  # every family, with heads for two processes
    f"tiny-{family}": {**tiny(family), "vocab_size": VOCABULARY, **({} if family == "gpt2" else {"num_key_value_heads": 2})}
    for family in TINY
}
MODELS["llama-tied"] = {**MODELS["llama-heads"], "tie_word_embeddings": True}
MODELS["gpt2-heads"] = {**MODELS["gpt2"], "n_embd": 20, "n_head": 4}


def make_run(
    family: str = "llama",
    *,
    precision: str = "fp32",
    model: dict[str, Any] | None = None,
    parallel: dict[str, int] | None = None,
    clip_norm: float | None = CLIP_NORM,
    micro_batch: int = 2,
    loss_chunk: int | str = "auto",
    objective: dict[str, Any] | None = None,
    **deepspeed: Any,
) -> Run:
    """A resolved run of a tiny model: in micro-batches of 2 rows, 2 (two processes) or 4 (one) are accumulated."""
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "model": {**MODELS[family], **(model or {})},
            "objective": objective or {"kind": "causal-lm"},
            "data": {"tokenizer": {"train": "bpe", "vocab_size": VOCABULARY}, "sequence_length": SEQUENCE},
            "optimizer": {"learning_rate": 1e-2, "clip_norm": clip_norm, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "training": {
                "steps": 10,
                "global_batch": ROWS,
                "micro_batch": micro_batch,
                "precision": precision,
                "loss_chunk": loss_chunk,
            },
            "parallel": parallel or {},
            "deepspeed": deepspeed,
        }
    )
    return Run(config, resolve_model(config.model, task=task_of(config.objective)), 10)


@dataclass(frozen=True)
class MeshCase:
    """A layout of a tiny run over `world` processes."""

    world: int
    parallel: tuple[tuple[str, int], ...]
    zero_stage: int = 0
    precision: str = "fp32"
    family: str = "llama-heads"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """For its findings."""
        parts = [f"{name}{value}" for name, value in (*self.parallel, *self.options)]
        return "/".join([self.family, self.precision, f"zero{self.zero_stage}", *parts])

    @property
    def run(self) -> Run:
        """The run, laid out so."""
        options: dict[str, Any] = {"zero_stage": self.zero_stage, **dict(self.options)}
        return make_run(self.family, precision=self.precision, parallel=dict(self.parallel), **options)


def mesh_cases(world: int) -> list[MeshCase]:
    """What is tried in so many processes."""
    stages, case = (0, 1, 2, 3), partial(MeshCase, world)
    tensor, context, fsdp = (("tensor", 2),), (("context", 2),), (("fsdp", 2),)
    optimizer, parameters = ("offload_optimizer", "cpu"), ("offload_param", "cpu")
    checkpointing, chunks = ("activation_checkpointing", True), ("loss_chunk", 7)
    if world == 2:
        return [
            *(case(axis, stage) for axis in (tensor, context) for stage in stages),
            *(case(axis, stage, "bf16") for axis in (tensor, context) for stage in stages),
            *(case(axis, 0, "fp64") for axis in (tensor, context)),
            case(context, 0, "fp64", "llama"),  # fewer key/value heads than processes
            case(context, 0, "fp64", "gpt2-heads"),
            case(context, 3, family="gpt2-heads", options=(("attention", "eager"),)),
            case(tensor, 3, family="llama-tied"),
            case(tensor, 3, family="llama-tied", options=(chunks,)),
            case(context, 3, options=(chunks,)),
            *(case(fsdp, stage, options=(optimizer,)) for stage in (1, 2, 3)),
            *(case(fsdp, stage, "bf16", options=(optimizer,)) for stage in (1, 2, 3)),
            *(case(fsdp, 3, options=offload) for offload in ((parameters,), (optimizer, parameters))),
            *(case(axis, 3, options=(optimizer, parameters, checkpointing)) for axis in (tensor, context)),
        ]
    return [
        *(case(tensor + context, stage) for stage in (1, 2, 3)),
        case(tensor + fsdp, 2),
        case(tensor + fsdp, 3),
        case(context + fsdp, 1),
        case(context + fsdp, 3),
        *(case(mesh, 0, "fp64") for mesh in ((*tensor, *context), (*tensor, ("data", 2)), (*context, ("data", 2)))),
        case((("context", 4),), 2),
        case((*tensor, *context), 3, options=(optimizer, parameters, checkpointing)),
    ]


def make_batch(step: int, shard: Shard = Shard(0, 1)) -> Batch:
    """This process's rows of a packed, padded batch whose rows have very uneven numbers of target tokens."""
    random = np.random.default_rng(step)
    shape = (ROWS, SEQUENCE)
    segments = np.sort(random.integers(1, 4, shape), axis=1)
    segments[:, SEQUENCE - 3 :] = 0
    positions = np.zeros(shape, dtype=np.int64)
    for column in range(1, SEQUENCE):
        same = segments[:, column] == segments[:, column - 1]
        positions[:, column] = np.where(same, positions[:, column - 1] + 1, 0)
    weights = (random.random(shape) < np.linspace(0.1, 1.0, ROWS)[:, None]) & (segments > 0)
    whole = Batch(
        inputs=random.integers(0, VOCABULARY, shape).astype(np.int32),
        targets=random.integers(0, VOCABULARY, shape).astype(np.int32),
        weights=weights.astype(np.float32),
        positions=positions.astype(np.int32),
        segments=segments.astype(np.int32),
    )
    return whole.select(shard.index * ROWS // shard.count, (shard.index + 1) * ROWS // shard.count)


def with_labels(batch: Batch, labels: int) -> Batch:
    """The batch with a label for every row, which follows from its first token."""
    targets = batch.inputs[:, :1] % labels
    return replace(batch, targets=targets, weights=np.ones(targets.shape, np.float32))


def make_hyper(step: int) -> Hyper:
    """A learning rate that changes, so that a step which ignores it is found out."""
    return Hyper(1e-2 / (1 + step), 1.0 - 0.9 ** (step + 1), 1.0 - 0.95 ** (step + 1))


class Arrays:
    """Arrays in memory as a TensorReader."""

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.arrays = arrays

    def names(self) -> list[str]:
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def read(self, name: str, index: Any = None) -> NDArray[Any]:
        return self.arrays[name][tuple(index)] if index else self.arrays[name]


def random_state(run: Run, updates: int = 7) -> TrainingState:
    """A state such as no initialiser makes: every element of weights and moments its own number."""
    random = np.random.default_rng(11)

    def arrays(scale: float, positive: bool = False) -> Arrays:
        made = {}
        for name, rule, _ in flatten(run.model.rules):
            values = random.standard_normal(rule.shape) * scale
            made[name] = np.asarray(np.abs(values) if positive else values, dtype=np.float32)
        return Arrays(made)

    return TrainingState(Progress(9, updates, 9 * ROWS, 500), arrays(0.2), arrays(1e-3), arrays(1e-5, positive=True))


def materialise(reader: TensorReader | None) -> dict[str, NDArray[Any]]:
    """Every tensor of a reader, read now."""
    return {} if reader is None else {name: reader.read(name) for name in reader.names()}


class Reference:
    """The same training by hand: one process, the whole batch at once, stock torch, no mask tricks but a loop over rows.

    Rows are cut at document boundaries and every document goes through the model alone, unpadded.
    """

    def __init__(self, run: Run, params: TensorReader, dtype: torch.dtype) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        keys = dict(run.model.huggingface_config)
        config = AutoConfig.for_model(str(keys.pop("model_type")), **keys)
        self.model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
        self.named = dict(self.model.named_parameters())
        self.rules = {name: rule for name, rule, _ in flatten(run.model.rules)}
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(torch.from_numpy(params.read(name)))
        optimizer = run.config.optimizer
        groups = [
            {
                "params": [p for name, p in self.named.items() if self.rules[name].decays is decays],
                "weight_decay": optimizer.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=optimizer.betas, eps=optimizer.eps)
        self.clip_norm = optimizer.clip_norm

    def load_moments(self, state: TrainingState) -> None:
        assert state.exp_avg is not None
        assert state.exp_avg_sq is not None
        for name, parameter in self.named.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.progress.updates)),
                "exp_avg": torch.from_numpy(state.exp_avg.read(name)).to(parameter.dtype),
                "exp_avg_sq": torch.from_numpy(state.exp_avg_sq.read(name)).to(parameter.dtype),
            }

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(batch.rows):
            segments = batch.segments[row]
            for segment in sorted(set(segments.tolist()) - {0}):
                where = np.flatnonzero(segments == segment)
                assert (np.diff(where) == 1).all()
                tokens = torch.from_numpy(batch.inputs[row, where]).long()[None]
                logits = self.model(input_ids=tokens, use_cache=False).logits[0]
                targets = torch.from_numpy(batch.targets[row, where]).long()
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
                total = total + (losses * torch.from_numpy(batch.weights[row, where]).double()).sum()
        return total

    def step(self, batch: Batch, learning_rate: float) -> tuple[float, float]:
        """Loss and gradient norm before clipping."""
        self.optimizer.zero_grad()
        loss = self.loss_sum(batch) / batch.target_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        norm = float(torch.sqrt(sum((g.double() ** 2).sum() for g in gradients)))
        if self.clip_norm is not None:
            for gradient in gradients:
                gradient.mul_(min(1.0, self.clip_norm / (norm + 1e-6)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return float(loss.detach()), norm

    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.named.items()}
