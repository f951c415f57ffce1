"""Ulysses sequence parallelism (arXiv:2309.14509): every process has a part of each sequence, and of all heads in attention.

Everything but attention works on tokens one by one, so a process computes it for its own tokens.  Around attention, an
all-to-all exchanges "some tokens, all heads" for "all tokens, some heads" and back.  The attention inside is the one the run
asks for, over whole sequences, so packed documents stay as exact as without.  Where it can, it goes from document to document
(`Documents`): nothing of S x S is ever made, which at the lengths that Ulysses is for would be the largest tensor of all.

Shape legend: B sequences, S tokens, H heads of this process's queries (or of its keys and values), D head_dim.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from jaxllm.torch_backend.documents import Documents
from jaxllm.torch_backend.mesh import Mesh

_NAME = "jaxllm_ulysses"  # under which transformers finds it


class UlyssesAttention:
    """An attention function of transformers that exchanges tokens for heads, attends, and exchanges back.

    kernel: the attention implementation inside.  A model whose key/value heads are fewer than the processes that share a
    sequence gets copies of them: of size / heads each.
    """

    def __init__(self, kernel: str, mesh: Mesh) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self.kernel = kernel
        self.documents: Documents | None = None  # of the rows of this pass, where there is no mask
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
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS.get(self.kernel) or sys.modules[type(module).__module__].eager_attention_forward
        given = [heads.transpose(1, 2) for heads in (query_BSHD, key_BSHD, value_BSHD)]
        with _queries_per_key(module, query_BSHD.shape[2] // key_BSHD.shape[2]):
            if mask is not None or self.documents is None:
                context_BSHD: torch.Tensor = attend(module, *given, mask, **options)[0]
                return context_BSHD.contiguous()
            rows = [
                torch.cat([attend(module, *_part(given, row, *run), None, **options)[0] for run in runs], dim=1)
                for row, runs in enumerate(self.documents.runs)
            ]
        return torch.cat(rows)


def _part(heads_BHSD: list[torch.Tensor], row: int, start: int, stop: int) -> list[torch.Tensor]:
    """One document of queries, keys and values."""
    return [heads[row : row + 1, :, start:stop] for heads in heads_BHSD]


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
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[_NAME] = UlyssesAttention(kernel_of(model), mesh)
    model.config._attn_implementation = _NAME  # noqa: SLF001 - no public name


def set_documents(model: Any, documents: Documents | None) -> None:
    """Tell a model whose processes share sequences where the documents of its next rows lie; None: it is given a mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config._attn_implementation == _NAME:  # noqa: SLF001 - no public name
        ALL_ATTENTION_FUNCTIONS[_NAME].documents = documents


def kernel_of(model: Any) -> str:
    """Transformers' name of the attention that a model computes, exchanges left aside."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name: str = model.config._attn_implementation  # noqa: SLF001 - no public name
    return ALL_ATTENTION_FUNCTIONS[_NAME].kernel if name == _NAME else name


@contextmanager
def whole_sequences(model: Any) -> Iterator[None]:
    """Within it, every process is given whole sequences: attention is the plain kernel."""
    before = model.config._attn_implementation  # noqa: SLF001 - no public name
    model.config._attn_implementation = kernel_of(model)  # noqa: SLF001
    try:
        yield
    finally:
        model.config._attn_implementation = before  # noqa: SLF001
