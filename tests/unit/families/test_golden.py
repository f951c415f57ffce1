"""Tables of parameters and resolved run files, against what is written down in tests/golden."""

from __future__ import annotations

import pytest

from tests.golden.remake import HERE, PATTERNS, golden_files

FILES = golden_files()


def test_nothing_is_left_over() -> None:
    assert {file.name for pattern in PATTERNS for file in HERE.glob(pattern)} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_golden(name: str) -> None:
    assert FILES[name] == (HERE / name).read_text(), "if this change is meant: python tests/golden/remake.py"
