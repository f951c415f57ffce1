"""What a transformers model is told about its sequences beside the tokens: windows of its layers, length of its positions.

A model of windows takes one mask for each type of layer.  Rotary positions that stretch with the sequence take the length of
whole rows, so that nothing depends on how a batch is divided; left to itself transformers takes the largest position of
whatever micro-batch it is given, and remembers it.

Shape legend: B sequences, Q queries, K keys.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from jaxllm.errors import ConfigError
from jaxllm.families import Model
from jaxllm.torch_backend.document_attention import kernel_of, set_documents
from jaxllm.torch_backend.documents import Documents

Mask: TypeAlias = torch.Tensor | dict[str, torch.Tensor]


def attention_implementation(model: Model, wanted: str) -> str:
    """Transformers' name of the attention that a model runs with.  ConfigError when it cannot run with the one asked for."""
    softcap = model.spec.attention.softcap
    if wanted == "auto":
        return "sdpa" if softcap is None else "eager"
    if wanted != "eager" and softcap is not None:
        raise ConfigError("deepspeed.attention", f"{wanted} cannot cap scores (at {softcap:g}) as this model does; use auto")
    return wanted


class SequenceHook:
    """A forward pre-hook that turns the mask of a batch into what the model of a family expects.

    It is given (B, 1, Q, K) masks, true or 0 where a query sees a key, over whole rows, or the `Documents` that stand for one.
    Without either, transformers makes its own mask.
    """

    def __init__(self, model: Model) -> None:
        types = model.huggingface_config.get("layer_types")
        attentions = model.spec.attentions
        self._window = attentions[0].window
        self._windows: dict[str, int | None] | None = None
        if isinstance(types, list):
            self._windows = {name: attention.window for name, attention in zip(types, attentions, strict=True)}

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of `torch.nn.Module.register_forward_pre_hook`, with_kwargs."""
        told = kwargs.get("attention_mask")
        if isinstance(told, Documents):
            fix_rope_length(module, told.length)
            set_documents(module, told)
            kwargs = {**kwargs, "attention_mask": None}
            return args, kwargs
        set_documents(module, None)
        if isinstance(told, torch.Tensor):
            fix_rope_length(module, told.shape[-1])
            kwargs = {**kwargs, "attention_mask": self._seen(module, told)}
        return args, kwargs

    def _seen(self, module: Any, mask_B1QK: torch.Tensor) -> Mask:
        if kernel_of(module) == "eager" and mask_B1QK.dtype == torch.bool:
            dtype = module.dtype
            lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask_B1QK.device)
            mask_B1QK = torch.where(mask_B1QK, torch.zeros_like(lowest), lowest)
        if self._windows is None:
            return windowed(mask_B1QK, self._window)
        return {name: windowed(mask_B1QK, window) for name, window in self._windows.items()}


def windowed(mask_B1QK: torch.Tensor, window: int | None) -> torch.Tensor:
    """The mask of a layer whose tokens see themselves and the `window - 1` before them, as far as the mask lets them."""
    queries, keys = mask_B1QK.shape[-2:]
    if window is None or window >= keys:
        return mask_B1QK
    inside_QK = torch.ones(queries, keys, dtype=torch.bool, device=mask_B1QK.device).triu(keys - queries - window + 1)
    if mask_B1QK.dtype == torch.bool:
        return mask_B1QK & inside_QK
    return mask_B1QK.masked_fill(~inside_QK, torch.finfo(mask_B1QK.dtype).min)


def fix_rope_length(model: torch.nn.Module, length: int) -> None:
    """Rotary frequencies of a model whose kind depends on the length of the sequence: those for `length` tokens."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary: Any
    for rotary in model.modules():
        if not isinstance(getattr(rotary, "rope_type", None), str):
            continue
        kind = rotary.config.rope_parameters["rope_type"]
        if kind in ("dynamic", "longrope") and getattr(rotary, "fixed_length", None) != length:
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](rotary.config, rotary.inv_freq.device, seq_len=length)
            rotary.register_buffer("inv_freq", frequencies, persistent=False)
            rotary.attention_scaling, rotary.fixed_length = factor, length
            rotary.rope_type = "default"  # from now on it computes with the frequencies that it has
