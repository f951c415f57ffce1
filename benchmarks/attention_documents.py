"""Attention of the PyTorch backend on a CPU, forward and backward: from document to document against a mask, alternating.

    python -m benchmarks.attention_documents [--pairs 9] [--json OUT]

Rows of equal documents, causal, fp32, all processors.  Results are checked to be the same first; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks._report import write
from jaxllm.torch_backend.document_attention import DocumentAttention
from jaxllm.torch_backend.documents import Documents
from jaxllm.torch_backend.model import packed_mask

SHAPES = ((1, 2048, 8, 32), (4, 512, 8, 32))
DOCUMENTS = (1, 4, 16, 64)


def compare(shape: tuple[int, int, int, int], documents: int, pairs: int) -> dict[str, float]:
    """Milliseconds with a mask and by documents of (B, S, heads, head_dim), and the median of their ratios."""
    batch, length, heads, head_dim = shape
    segments = np.repeat(np.arange(1, documents + 1, dtype=np.int32), length // documents)[None].repeat(batch, axis=0)
    attention, module = DocumentAttention("sdpa"), torch.nn.Module()
    leaves = [torch.randn(batch, length, heads, head_dim).transpose(1, 2).requires_grad_() for _ in range(3)]
    weights = torch.randn(batch, length, heads, head_dim)
    mask, told = packed_mask(torch.from_numpy(segments), "sdpa", torch.float32), Documents.of(segments)

    def once(by_documents: bool) -> tuple[float, torch.Tensor]:
        begin = time.perf_counter()
        attention.tell(told if by_documents else None)
        mixed = attention(module, *leaves, None if by_documents else mask)[0]
        torch.autograd.grad((mixed * weights).sum(), leaves)
        return 1e3 * (time.perf_counter() - begin), mixed.detach()

    torch.testing.assert_close(once(True)[1], once(False)[1], rtol=1e-4, atol=1e-5)
    found = [(once(False)[0], once(True)[0]) for _ in range(pairs)]
    masked, by_documents = (statistics.median(column) for column in zip(*found, strict=True))
    return {"mask": masked, "documents": by_documents, "ratio": statistics.median(b / a for a, b in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for shape in SHAPES:
        for documents in DOCUMENTS:
            name = f"{shape[0]} x {shape[1]:,}, {shape[2]} x {shape[3]}, {documents} documents"
            results[name] = compare(shape, documents, arguments.pairs)
            print(name, {key: round(value, 2) for key, value in results[name].items()}, flush=True)
    write(arguments.json, results)


if __name__ == "__main__":
    main()
