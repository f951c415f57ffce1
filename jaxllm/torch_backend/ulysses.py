"""Ulysses sequence parallelism (arXiv:2309.14509): every process has a part of each sequence, and of all heads in attention.

Everything but attention works on tokens one by one, so a process computes it for its own tokens.  Around attention, an
all-to-all exchanges "some tokens, all heads" for "all tokens, some heads" and back.  The attention inside is the one the run
asks for, over whole sequences, so packed documents stay as exact as without.  Where it can, it goes from document to document
(`Documents`): nothing of S x S is ever made, which at the lengths that Ulysses is for would be the largest tensor of all.

Shape legend: B sequences, S tokens, H heads of this process's queries (or of its keys and values), D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from jaxllm.torch_backend.document_attention import DocumentAttention, install, kernel_of
from jaxllm.torch_backend.mesh import Mesh

_NAME = "jaxllm_ulysses"  # under which transformers finds it


class UlyssesAttention:
    """An attention function of transformers that exchanges tokens for heads, attends, and exchanges back.

    kernel: the attention implementation inside.  A model whose key/value heads are fewer than the processes that share a
    sequence gets copies of them: of size / heads each.
    """

    def __init__(self, kernel: str, mesh: Mesh) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self.inner = DocumentAttention(kernel)
        self._size = mesh.context
        self._exchange = DistributedAttention(self._attend, mesh.context_group, scatter_idx=2, gather_idx=1)

    def __call__(
        self,
        module: nn.Module,
        query_BHSD: torch.Tensor,
        key_BHSD: torch.Tensor,
        value_BHSD: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        copies = -(-self._size // key_BHSD.shape[1])
        if copies > 1:
            key_BHSD, value_BHSD = (heads.repeat_interleave(copies, dim=1) for heads in (key_BHSD, value_BHSD))
        given = (heads.transpose(1, 2).contiguous() for heads in (query_BHSD, key_BHSD, value_BHSD))
        batch_axis = 0
        context_BSHD = self._exchange(*given, batch_axis, None, module, mask, options)
        return context_BSHD, None

    def _attend(
        self,
        query_BSHD: torch.Tensor,
        key_BSHD: torch.Tensor,
        value_BSHD: torch.Tensor,
        module: nn.Module,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Attention of some heads over all tokens."""
        query_BHSD, key_BHSD, value_BHSD = (heads.transpose(1, 2) for heads in (query_BSHD, key_BSHD, value_BSHD))
        with _queries_per_key(module, query_BSHD.shape[2] // key_BSHD.shape[2]):
            return self.inner(module, query_BHSD, key_BHSD, value_BHSD, mask, **options)[0].contiguous()


@contextmanager
def _queries_per_key(module: nn.Module, count: int) -> Iterator[None]:
    """Within it, an attention module knows how many queries share a key here, where keys may have been copied."""
    before = getattr(module, "num_key_value_groups", None)
    if before is not None:
        module.num_key_value_groups = count  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is not None:
            module.num_key_value_groups = before


def share_sequences(model: Any, mesh: Mesh) -> None:
    """Let a transformers.PreTrainedModel attend over sequences that the mesh's context groups share."""
    attention = UlyssesAttention(kernel_of(model), mesh)
    install(model, _NAME, attention, attention.inner)
