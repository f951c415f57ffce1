"""Tiny runs, batches and references for the tests of the JAX backend, in one process and in several.

B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from jaxllm.backend import Hyper
from jaxllm.config import RunConfig
from jaxllm.config.schema import ModelConfig
from jaxllm.data.batch import Batch
from jaxllm.families import Model, resolve_model
from jaxllm.families.tasks import task_of
from jaxllm.jax_backend import JaxBackend
from jaxllm.run import Run
from jaxllm.state import Progress
from jaxllm.torch_backend.float64 import true_float64
from jaxllm.torch_backend.visibility import SequenceHook
from tests.tiny import TINY, tiny

VOCABULARY = 96

LLAMA: dict[str, Any] = {
    "family": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.1,
}
GPT2: dict[str, Any] = {
    "family": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.1,
}


FAMILIES = {family: tiny(family, vocab_size=VOCABULARY, initializer_range=0.1) for family in TINY}
FAMILIES |= {"llama": LLAMA, "gpt2": GPT2}


def make_run(model: Mapping[str, Any] = LLAMA, **sections: Mapping[str, Any]) -> Run:
    """A run of a tiny model; sections of the run file are merged over small defaults."""
    written: dict[str, Any] = {
        "name": "test",
        "model": dict(model),
        "data": {"tokenizer": {"train": "bpe", "vocab_size": VOCABULARY}, "sequence_length": 32},
        "optimizer": {"learning_rate": 1e-2, "clip_norm": 1.0},
        "training": {"steps": 10, "global_batch": 16, "precision": "fp32"},
        "parallel": {"data": 1},
        "seed": 3,
    }
    for section, values in sections.items():
        written[section] = {**written.get(section, {}), **values}
    config = RunConfig.model_validate(written)
    return Run(config, resolve_model(config.model, task=task_of(config.objective)), 10)


def make_batch(seed: int = 0, rows: int = 16, length: int = 32, packed: bool = True) -> Batch:
    """Random tokens with uneven weights: several documents a row and padding at the end, or one document."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    if packed:
        for row in range(rows):
            first, second = sorted(generator.integers(1, length, 2))
            segments[row, first:] = 2
            segments[row, second:] = 0 if row % 2 else 3
    starts = np.zeros((rows, length), np.int64)
    starts[:, 1:] = np.where(segments[:, 1:] != segments[:, :-1], np.arange(1, length), 0)
    positions = (np.arange(length) - np.maximum.accumulate(starts, axis=1)).astype(np.int32)
    weights = ((segments > 0) & (generator.random((rows, length)) < 0.8)).astype(np.float32)
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), weights, positions, segments)


def hyper_of(step: int, run: Run) -> Hyper:
    """The scalars of 0-based step `step` at a constant learning rate."""
    beta1, beta2 = run.config.optimizer.betas
    return Hyper(run.config.optimizer.learning_rate, 1.0 - beta1 ** (step + 1), 1.0 - beta2 ** (step + 1))


@dataclass
class Trajectory:
    """Losses and norms of some steps, and the state after them by Hugging Face name."""

    losses: list[float]
    norms: list[float]
    params: dict[str, np.ndarray]
    exp_avg: dict[str, np.ndarray]
    exp_avg_sq: dict[str, np.ndarray]


def read_all(reader: Any) -> dict[str, np.ndarray]:
    """Every tensor of a reader."""
    return {name: reader.read(name) for name in reader.names()}


def take_steps(backend: JaxBackend, run: Run, steps: Sequence[int]) -> Trajectory:
    """Steps on the batches of those numbers, then the whole state."""
    results = [backend.step(make_batch(step), hyper_of(step, run)) for step in steps]
    state = backend.export(Progress(steps[-1] + 1))
    assert state.exp_avg is not None
    assert state.exp_avg_sq is not None
    return Trajectory(
        [float(result.loss) for result in results],
        [float(result.gradient_norm) for result in results],
        read_all(state.params),
        read_all(state.exp_avg),
        read_all(state.exp_avg_sq),
    )


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """|found - wanted| / |wanted|, in the norm of the whole tensor."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-300))


def resolve(keys: Mapping[str, Any]) -> Model:
    """The model of a run file's `model` section."""
    return resolve_model(ModelConfig.model_validate(keys))


class Reference:
    """The transformers model of a resolved model, in true float64 or in float32, with random weights everywhere."""

    def __init__(self, model: Model, precision: str) -> None:
        self._mode = true_float64 if precision == "fp64" else nullcontext
        self._dtype = torch.float64 if precision == "fp64" else torch.float32
        keys = {key: value for key, value in model.huggingface_config.items() if key not in ("architectures", "model_type")}
        with self._mode(), torch.random.fork_rng():
            torch.manual_seed(0)
            kind = getattr(transformers, model.huggingface_config["architectures"][0])
            self.experts = model.spec.mlp.experts
            implementation = {} if self.experts is None else {"experts_implementation": "eager"}
            config = kind.config_class(**keys, attn_implementation="eager", **implementation)
            config.output_router_logits = False
            self.module = kind(config).to(self._dtype).eval()
            self._router_logits = []
            for name, module in self.module.named_modules():
                if self.experts is not None and name.endswith("mlp.gate"):
                    module.register_forward_hook(lambda _, __, output: self._router_logits.append(output[0]))
            self.module.register_forward_pre_hook(SequenceHook(model), with_kwargs=True)
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, dtype=self._dtype))

    def names(self) -> list[str]:
        return [name for name, _ in self.module.named_parameters()]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.module.get_parameter(name).shape)

    def read(self, name: str, index: Sequence[slice] | None = None) -> np.ndarray:
        values = self.module.get_parameter(name).detach().numpy()
        return values[tuple(index)] if index is not None else values

    def gradients(self) -> dict[str, np.ndarray]:
        return {name: parameter.grad.numpy() for name, parameter in self.module.named_parameters()}

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits (B, S, V), with the attention mask of the batch's segments."""
        seen = (batch.segments[:, :, None] == batch.segments[:, None, :]) & np.tri(batch.sequence_length, dtype=bool)
        with self._mode():
            hidden = torch.full((), torch.finfo(self._dtype).min, dtype=self._dtype)
            mask = torch.where(torch.tensor(seen)[:, None], torch.zeros((), dtype=self._dtype), hidden)
            inputs, positions = torch.tensor(batch.inputs).long(), torch.tensor(batch.positions).long()
            return self.module(input_ids=inputs, attention_mask=mask, position_ids=positions).logits

    def loss(self, batch: Batch) -> torch.Tensor:
        """Weighted mean of the token losses."""
        self._router_logits.clear()
        logits = self.logits(batch)
        with self._mode():
            targets, weights = torch.tensor(batch.targets).long(), torch.tensor(batch.weights).to(self._dtype)
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            loss = (losses * weights.flatten()).sum() / weights.sum()
            return loss if self.experts is None else loss + self.experts.balance * self.balance_loss(batch)

    def balance_loss(self, batch: Batch) -> torch.Tensor:
        """transformers' load-balancing loss of the forward pass just done, without padding."""
        function = sys.modules[type(self.module).__module__].load_balancing_loss_func
        with self._mode():
            real = torch.tensor(batch.segments > 0).to(self._dtype)
            return function(tuple(self._router_logits), self.experts.count, self.experts.per_token, real)


# Relative distance of parameters after some steps in float64; what the parity ladder allows.
PARAMETER_BOUND = 1e-11


def without_key_bias(name: str, values: np.ndarray) -> np.ndarray:
    """A tensor without the part whose gradient is nothing but rounding, which Adam scales up to lr * rounding / eps.

    Where positions are learned, a bias of the keys shifts all scores of a query alike, and softmax ignores it.
    """
    return np.delete(values.reshape(3, -1), 1, axis=0) if name.endswith("attn.c_attn.bias") else values
