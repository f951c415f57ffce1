"""A small corpus of real text, and run configs over it."""

from __future__ import annotations

import calendar
import colorsys
import fnmatch
import inspect
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config.schema import RunConfig
from jaxllm.data.prepare import PreparedSplit
from jaxllm.data.token_file import TokenFile, TokenWriter

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Functions of the standard library, one document each, and some texts that are hard on a tokenizer."""
    modules = (calendar, colorsys, fnmatch, shlex)
    names = {module.__name__ for module in modules}
    functions = [value for module in modules for value in vars(module).values() if inspect.isfunction(value)]
    found = {inspect.getsource(value) for value in functions if value.__module__ in names}
    return [*sorted(found), "é 日本語 😀\u200d🔥\n", "x", "\ttabs \r\n and\x00control"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The documents as a JSON Lines file."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """A run config; keywords replace keys of `data`, `run` those of the top level.  All share one cache."""
    cache = tmp_path_factory.mktemp("cache")

    def make(run: dict[str, Any] | None = None, **data: Any) -> RunConfig:
        defaults = {
            "source": {"kind": "jsonl", "files": str(corpus)},
            "validation_fraction": 0.2,
            "tokenizer": {"train": "bpe", "vocab_size": 400},
            "sequence_length": 32,
            "cache_dir": str(cache),
            "prefetch": 2,
        }
        return RunConfig.model_validate(
            {
                "name": "data",
                "model": {"family": "llama"},
                "data": defaults | data,
                "optimizer": {"learning_rate": 1e-3},
                "training": {"steps": 1, "global_batch": 8},
                **(run or {}),
            }
        )

    return make


@pytest.fixture
def make_split(tmp_path: Path) -> Callable[..., PreparedSplit]:
    """A split over documents given as lists of tokens."""

    def make(documents: list[list[int]], chosen: list[int] | None = None) -> PreparedSplit:
        folder = tmp_path / f"split{len(list(tmp_path.iterdir()))}"
        with TokenWriter(folder, vocab_size=70_000) as writer:
            for document in documents:
                writer.append(np.array(document, np.uint32), np.array([len(document)]))
        numbers = np.arange(len(documents)) if chosen is None else np.array(chosen)
        tokens = sum(len(documents[number]) for number in numbers)
        return PreparedSplit("train", TokenFile.open(folder), numbers.astype(np.int64), tokens, 4 * tokens)

    return make
