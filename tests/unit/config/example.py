"""A complete run file, and ways to write it with changes and to hear what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm.config import LoadedRun, load_run
from jaxllm.errors import ConfigError

EXAMPLE = """\
name: example
seed: 1
model:
  family: llama
  hidden_size: 64
data:
  source:
    kind: jsonl
    files: [a.jsonl, b.jsonl]
  tokenizer: {train: bpe, vocab_size: 300}
  sequence_length: 32
optimizer:
  learning_rate: 1e-3
  betas: [0.9, 0.95]
training:
  steps: 10
  global_batch: 8
"""


def load(folder: Path, text: str = EXAMPLE, *overrides: str) -> LoadedRun:
    """Load a text as run.yaml."""
    file = folder / "run.yaml"
    file.write_text(text)
    return load_run(file, overrides)


def complaints(folder: Path, text: str = EXAMPLE, *overrides: str) -> list[str]:
    """The sentences that a text is refused with; the file is run.yaml in them."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(str(folder / "run.yaml"), "run.yaml").splitlines()


def changed(old: str, new: str) -> str:
    """The example with one piece of text replaced."""
    assert EXAMPLE.count(old) == 1, old
    return EXAMPLE.replace(old, new)
