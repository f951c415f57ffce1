"""Cross-entropy of a large vocabulary in chunks of tokens, in the output head of an unmodified transformers model.

While the logits of a chunk are there, their gradient is made too, and goes at once into the gradients of the hidden states and
of the head's weight (as in Liger Kernel, arXiv:2410.10989): the logits of all tokens never exist at once, and no product is
computed twice.  It happens within the head module's own call, so that ZeRO's hooks gather its weight as for any other module.

Shape legend: B sequences, S tokens, E hidden, V vocabulary, T = B S tokens, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from jaxllm.families import ModelSpec

_SOFTCAP = "final_logit_softcapping"  # the key of a transformers config


@dataclass(frozen=True)
class Tokens:
    """What the loss of a pass is taken of.  targets, weights: (B, S).  chunk: tokens whose logits exist at once."""

    targets: torch.Tensor
    weights: torch.Tensor
    chunk: int


class LossHead:
    """The output head of a transformers language model, which within `losses_of` gives a loss in place of logits."""

    def __init__(self, module: Any, spec: ModelSpec, *, compiled: bool) -> None:
        self._config = module.config
        self._softcap = spec.final_softcap
        self._tokens: Tokens | None = None
        self._linear: nn.Linear = module.get_output_embeddings()
        self._logits = self._linear.forward
        self._linear.forward = _left_out_of_compiled_code(self._call) if compiled else self._call

    @contextmanager
    def losses_of(self, tokens: Tokens) -> Iterator[None]:
        """Within it, what the model calls its logits is the sum over tokens of weight * cross-entropy, in nats.

        The loss is in float32, or float64 where the model is.
        """
        self._tokens = tokens
        if self._softcap is not None:
            setattr(self._config, _SOFTCAP, None)  # the model would cap the loss
        try:
            yield
        finally:
            self._tokens = None
            if self._softcap is not None:
                setattr(self._config, _SOFTCAP, self._softcap)

    def _call(self, hidden_BSE: torch.Tensor) -> torch.Tensor:
        tokens = self._tokens
        if tokens is None:
            logits_BSV: torch.Tensor = self._logits(hidden_BSE)
            return logits_BSV
        apply: Any = _ChunkedLoss.apply
        loss: torch.Tensor = apply(
            hidden_BSE.flatten(0, 1),
            self._linear.weight,
            self._linear.bias,
            tokens.targets.flatten(),
            tokens.weights.flatten(),
            _Options(tokens.chunk, self._softcap, torch.is_grad_enabled()),
        )
        return loss


def attach_loss_head(module: Any, spec: ModelSpec, *, compiled: bool) -> None:
    """Give `module` a `loss_head`; None where it is no language model, or where processes share its head (AutoTP).

    compiled: whether torch.compile will see the module.
    """
    is_language_model = spec.head.kind in ("causal-lm", "masked-lm")
    is_whole = is_language_model and isinstance(module.get_output_embeddings(), nn.Linear)
    module.loss_head = LossHead(module, spec, compiled=compiled) if is_whole else None


def _left_out_of_compiled_code(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`call`, which a compiled model calls as it is; seconds of import, so for models that are compiled only."""
    compiler: Any = torch.compiler
    left_out: Callable[..., torch.Tensor] = compiler.disable(call)
    return left_out


@dataclass(frozen=True)
class _Options:
    chunk: int
    softcap: float | None
    differentiated: bool


class _ChunkedLoss(torch.autograd.Function):
    """Sum over tokens of weight * cross-entropy, from hidden states (T, E), a head's weight (V, E) and its bias (V,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TE: torch.Tensor,
        weight_VE: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_T: torch.Tensor,
        weights_T: torch.Tensor,
        options: _Options,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden_TE.dtype, torch.float32)
        wanted = [options.differentiated and needed for needed in ctx.needs_input_grad[:3]]
        to_hidden_TE = torch.empty_like(hidden_TE) if wanted[0] else None
        to_weight_VE = torch.zeros_like(weight_VE, dtype=wide) if wanted[1] else None
        to_bias_V = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and wanted[2] else None
        total = hidden_TE.new_zeros((), dtype=wide)
        for start in range(0, len(hidden_TE), options.chunk):
            chunk = slice(start, start + options.chunk)
            hidden_CE, weights_C = hidden_TE[chunk], weights_T[chunk].to(wide)
            logits_CV, slope_CV = _logits(hidden_CE, weight_VE, bias_V, options.softcap)
            loss, gradient_CV = _loss(logits_CV, targets_T[chunk], weights_C, with_gradient=any(wanted))
            total += loss
            if gradient_CV is None:
                continue
            if slope_CV is not None:
                gradient_CV.mul_(slope_CV)
            if to_bias_V is not None:
                to_bias_V += gradient_CV.sum(0)
            gradient_CV = gradient_CV.to(hidden_TE.dtype)
            if to_hidden_TE is not None:
                torch.mm(gradient_CV, weight_VE, out=to_hidden_TE[chunk])
            if to_weight_VE is not None:
                _add_product(to_weight_VE, gradient_CV.t(), hidden_CE)
        ctx.save_for_backward(to_hidden_TE, *_narrowed((to_weight_VE, weight_VE), (to_bias_V, bias_V)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The loss has been weighed by its share already, so that this is 1 (or NaN) and rounds nothing.
        scaled = (None if saved is None else saved * gradient for saved in ctx.saved_tensors)
        return (*scaled, None, None, None)


def _logits(
    hidden_CE: torch.Tensor, weight_VE: torch.Tensor, bias_V: torch.Tensor | None, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (C, V) in float32 or float64, rounded to the model's dtype as it would round them; and the slope of their cap."""
    logits_CV = nn.functional.linear(hidden_CE, weight_VE, bias_V)
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    if softcap is None:
        return logits_CV.to(wide), None
    logits_CV = (torch.tanh(logits_CV / softcap) * softcap).to(wide)
    return logits_CV, 1.0 - (logits_CV / softcap).square()


def _loss(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, weights_C: torch.Tensor, *, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of weight * cross-entropy, and its gradient with respect to the logits.  Both are written over the logits.

    Passes over C x V numbers cost as much as the products of a small model, so there are five of them, and one exponential.
    """
    targets_C1, weights_C1 = targets_C[:, None], weights_C[:, None]
    logits_CV.sub_(logits_CV.amax(1, keepdim=True))
    wanted_C1 = logits_CV.gather(1, targets_C1)
    exponentials_CV = logits_CV.exp_()
    sum_C1 = exponentials_CV.sum(1, keepdim=True)
    loss = ((sum_C1.log() - wanted_C1) * weights_C1).sum()
    if not with_gradient:
        return loss, None
    return loss, exponentials_CV.mul_(weights_C1 / sum_C1).scatter_add_(1, targets_C1, -weights_C1)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to `total`, in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _narrowed(*gradients: tuple[torch.Tensor | None, torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Sums of gradients in the dtypes of what they are gradients of."""
    return [None if total is None or of is None else total.to(of.dtype) for total, of in gradients]
