"""The Hugging Face model of a run, and a batch as it wants to see it.  B sequences, S tokens, Q = K = S in masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import Parameter

from jaxllm.data.batch import Batch
from jaxllm.errors import BackendError
from jaxllm.families import Model, flatten
from jaxllm.torch_backend.visibility import SequenceHook, attention_implementation

AttentionKernel = Literal["auto", "sdpa", "eager"]


def build_model(model: Model, attention: AttentionKernel, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformers model that `model` describes, its weights not yet filled (whoever calls fills every one of them).

    Returns a transformers.PreTrainedModel.  BackendError when its parameters are not those of the family's weight table.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    keys = dict(model.huggingface_config)
    config = AutoConfig.for_model(str(keys.pop("model_type")), **keys)
    config.use_cache = False
    with no_init_weights(), device:
        built = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=attention_implementation(model, attention), dtype=dtype
        )
        built.tie_weights()  # part of the initialisation that was left out
    built.register_forward_pre_hook(SequenceHook(model), with_kwargs=True)
    check_parameters(model, {name: tuple(_whole_shape(p)) for name, p in built.named_parameters()})
    return built


def import_model(model: Model) -> None:
    """Load the modelling code of the family, so that its memory does not count as the model's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = dict(model.huggingface_config)
    config = AutoConfig.for_model(str(keys.pop("model_type")), **keys)
    AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001 - imports the class


def _whole_shape(parameter: Parameter) -> torch.Size:
    """Shape of a parameter, also where DeepSpeed has already cut it into partitions."""
    return getattr(parameter, "ds_shape", parameter.shape)


def check_parameters(model: Model, found: dict[str, tuple[int, ...]]) -> None:
    """BackendError unless transformers has exactly the parameters, by name and shape, that the weight table says."""
    expected = {name: rule.shape for name, rule, _ in flatten(model.rules)}
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is not in the table" for name in found.keys() - expected.keys()]
    wrong += [
        f"{name} has shape {list(found[name])} instead of {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if wrong:
        raise BackendError(
            f"the transformers model of family {model.family} differs from the weight table ({'; '.join(sorted(wrong))}); "
            "install the versions in constraints.txt"
        )


@dataclass(frozen=True)
class ModelInputs:
    """What the model and the loss read, on the device.

    tokens_BS, targets_BS, positions_BS (int64); weights_BS (float32, or float64 in an fp64 run); mask_B1QK: for each query
    which keys it may attend to.  Under sequence parallelism S are this process's tokens, Q and K those of whole sequences.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def model_inputs(
    batch: Batch, attention: AttentionKernel, dtype: torch.dtype, device: torch.device, columns: slice | None = None
) -> ModelInputs:
    """A (micro-)batch on the device.  dtype: of the activations.  columns: the tokens of this process; default, all."""
    mine = slice(None) if columns is None else columns
    tokens, positions, targets = (
        torch.from_numpy(array[:, mine]).to(device, torch.int64) for array in (batch.inputs, batch.positions, batch.targets)
    )
    real = np.float64 if dtype == torch.float64 else np.float32
    weights = torch.from_numpy(batch.weights[:, mine].astype(real, copy=False)).to(device)
    mask = packed_mask(torch.from_numpy(batch.segments).to(device), attention, dtype)
    return ModelInputs(tokens, positions, mask, targets, weights)


def packed_mask(segments_BS: torch.Tensor, attention: AttentionKernel, dtype: torch.dtype) -> torch.Tensor:
    """Causal attention within a segment: (B, 1, Q, K), bool, or for eager 0 or the lowest number, to be added.

    Padding is a segment (0) like any other, so that a padding row attends to something and yields no NaN.
    """
    same_BQK = segments_BS[:, :, None] == segments_BS[:, None, :]
    allowed_B1QK = same_BQK.tril()[:, None]
    if attention != "eager":
        return allowed_B1QK
    lowest = torch.finfo(dtype).min
    return torch.zeros(allowed_B1QK.shape, dtype=dtype, device=segments_BS.device).masked_fill(~allowed_B1QK, lowest)


@contextmanager
def mode(module: torch.nn.Module, training: bool) -> Iterator[None]:
    """Dropout and activation checkpointing on or off within; as before afterwards."""
    before = module.training
    module.train(training)
    try:
        yield
    finally:
        module.train(before)
