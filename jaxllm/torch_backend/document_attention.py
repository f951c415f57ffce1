"""Attention from document to document, for models that need no mask (`goes_by_documents`).

A mask of queries x keys makes torch's kernel compute every score of a row, also those that it throws away, and is expanded to
numbers for each layer.  Without one, each document is a causal sequence by itself: only scores that count are computed.

Shape legend: B sequences, S tokens, H heads of queries (or of keys and values), D head_dim, N = B x S tokens one after another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from jaxllm.torch_backend.documents import Documents

_NAME = "jaxllm_documents"  # under which transformers finds it


class DocumentAttention:
    """An attention function of transformers that goes from document to document where it is told of them.

    kernel: transformers' name of the attention inside.
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self._documents: Documents | None = None

    def tell(self, documents: Documents | None) -> None:
        """Of the rows of the next pass.  None: transformers makes a mask, or is given one."""
        self._documents = documents

    def mask(self, *arguments: Any, **options: Any) -> torch.Tensor | None:
        """What transformers asks for the mask of a pass that has none, with the arguments of its `sdpa_mask`."""
        from transformers.masking_utils import sdpa_mask

        found: torch.Tensor | None = sdpa_mask(*arguments, **options) if self._documents is None else None
        return found

    def __call__(
        self,
        module: nn.Module,
        query_BHSD: torch.Tensor,
        key_BHSD: torch.Tensor,
        value_BHSD: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Mixed values (B, S, H, D), and no attention weights."""
        attend = _function(self.kernel, module)
        if mask is not None or self._documents is None or self._documents.whole:
            return attend(module, query_BHSD, key_BHSD, value_BHSD, mask, **options)[0], None
        lengths = self._documents.lengths
        rows = (_one_row(heads) for heads in (query_BHSD, key_BHSD, value_BHSD))
        parts = zip(*(torch.split(row, lengths, dim=2) for row in rows), strict=True)
        mixed_1NHD = torch.cat([attend(module, *part, None, **options)[0] for part in parts], dim=1)
        return mixed_1NHD.view(query_BHSD.shape[0], -1, *mixed_1NHD.shape[2:]), None


def _function(kernel: str, module: nn.Module) -> Callable[..., Any]:
    """Transformers' attention function; `eager` is in no registry, every modelling file has its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(kernel)
    return found or sys.modules[type(module).__module__].eager_attention_forward


def _one_row(heads_BHSD: torch.Tensor) -> torch.Tensor:
    """All rows one after another: (1, H, N, D).  A view where heads came from a product of tokens, as they do."""
    return heads_BHSD.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)


_ATTENTION = DocumentAttention("sdpa")
_BY_NAME = {_NAME: _ATTENTION}


def attend_by_documents(model: Any) -> None:
    """Let a transformers.PreTrainedModel with the kernel `sdpa` go from document to document."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _ATTENTION.mask)
    install(model, _NAME, _ATTENTION, _ATTENTION)


def install(model: Any, name: str, function: Callable[..., Any], attention: DocumentAttention) -> None:
    """Let a transformers.PreTrainedModel attend with `function`, known to transformers as `name`, around `attention`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, function)
    _BY_NAME[name] = attention
    model.config._attn_implementation = name  # noqa: SLF001 - no public name


def set_documents(model: Any, documents: Documents | None) -> None:
    """Tell a model where the documents of its next rows lie; None: it goes by a mask."""
    attention = _BY_NAME.get(model.config._attn_implementation)  # noqa: SLF001 - no public name
    if attention is not None:
        attention.tell(documents)


def kernel_of(model: Any) -> str:
    """Transformers' name of the attention that a model computes, documents and exchanges left aside."""
    name: str = model.config._attn_implementation  # noqa: SLF001 - no public name
    return _BY_NAME[name].kernel if name in _BY_NAME else name


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Within it, attention is the plain kernel, over whole sequences that every process is given."""
    before = model.config._attn_implementation  # noqa: SLF001 - no public name
    model.config._attn_implementation = kernel_of(model)  # noqa: SLF001
    try:
        yield
    finally:
        model.config._attn_implementation = before  # noqa: SLF001
