"""How fast documents become token files, against the bare tokenizer on texts that are already in memory.

    python -m benchmarks.data_tokenize [--rounds 7] [--json OUT]

Each round times both, one after the other, on the standard library of the running Python, with all the threads that
`tokenizers` takes by itself: `tokenizers.Tokenizer.encode_batch` alone, and `jaxllm.data.prepare` without a cache - reading
and digesting the files, tokenising, appending the end-of-text token, writing the token files, splitting, counting.  The
tokenizer is trained before the first round.  What counts is the ratio of each round's two speeds; its median is the result.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._report import write
from jaxllm.config.schema import RunConfig
from jaxllm.config.source import PythonSource
from jaxllm.data.document import SkipCount
from jaxllm.data.prepare import prepare
from jaxllm.data.sources import read_documents
from jaxllm.data.tokenizer import Tokenizer

GOAL = 0.8


def measure(rounds: int, vocab_size: int) -> dict[str, Any]:
    texts = [document.text for document in read_documents(PythonSource(), SkipCount())]
    raw, prepared = [], []
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Tokenizer.train(texts, vocab_size)
        tokenizer.save(Path(scratch) / "tokenizer")
        for number in range(rounds + 1):  # the first warms up and does not count
            start = time.perf_counter()
            tokens = sum(len(encoding.ids) for encoding in tokenizer.backend.encode_batch(texts, add_special_tokens=False))
            middle = time.perf_counter()
            data = prepare(run_config(Path(scratch), number), progress=False)
            end = time.perf_counter()
            assert data.train.tokens + data.validation.tokens == tokens + len(texts)
            if number:
                raw.append(tokens / (middle - start))
                prepared.append(tokens / (end - middle))
    ratios = [mine / bare for mine, bare in zip(prepared, raw, strict=True)]
    return {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": tokens,
        "raw_tokens_per_second": statistics.median(raw),
        "prepare_tokens_per_second": statistics.median(prepared),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "goal": GOAL,
    }


def run_config(scratch: Path, number: int) -> RunConfig:
    """A run whose data nobody has prepared yet."""
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "model": {"family": "llama"},
            "data": {
                "tokenizer": {"from": str(scratch / "tokenizer")},
                "sequence_length": 1024,
                "cache_dir": str(scratch / f"cache{number}"),
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch": 1},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.vocab_size)
    print(f"bare encode_batch  {result['raw_tokens_per_second'] / 1e6:6.2f} million tokens/s")
    print(f"jaxllm prepare     {result['prepare_tokens_per_second'] / 1e6:6.2f} million tokens/s")
    print(f"ratio              {result['ratio']:6.2f} (goal: at least {GOAL})")
    write(arguments.json, result)


if __name__ == "__main__":
    main()
