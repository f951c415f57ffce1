"""Token files: grown document by document, mapped when read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxllm.data.token_file import TokenFile, TokenWriter


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocab_size, size) for size in generator.integers(0, 1000, 200)]
    with TokenWriter(tmp_path, vocab_size) as writer:
        for start in range(0, 200, 7):
            some = documents[start : start + 7]
            writer.append(np.concatenate(some), np.array([document.size for document in some]))
    file = TokenFile.open(tmp_path)
    assert isinstance(file.tokens, np.memmap)
    assert file.tokens.dtype == dtype
    assert file.offsets.dtype == np.int64
    for number, document in enumerate(documents):
        assert np.array_equal(file.tokens[file.offsets[number] : file.offsets[number + 1]], document)
    assert file.offsets[-1] == file.tokens.size == sum(document.size for document in documents)
    # An ordinary .npy file, whatever its length was when the header was first written.
    assert np.array_equal(np.load(tmp_path / "tokens.npy"), file.tokens)


def test_nothing_written(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, 10):
        pass
    assert np.load(tmp_path / "tokens.npy").size == 0
    assert np.load(tmp_path / "offsets.npy").tolist() == [0]
