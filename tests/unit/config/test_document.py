"""Writing YAML that reads back as the same data."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config.document import dotted, parse_document, undotted, write_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [
        "1e5",
        "0x1",
        "no",
        "12:30",
        ".5",
        "<<",
        "~",
        "",
        "0o7",
        "2026-01-01",
        "1_000",
        "=",
        "+1",
        "1.",
        "null",
        "-",
        "a: b",
        "# c",
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner))


@given(st.dictionaries(TEXTS, VALUES, min_size=1))
def test_there_and_back(data: dict[str, Any]) -> None:
    read = parse_document(write_yaml(data), "x").data
    assert read == data
    assert repr(read) == repr(data)  # 1 is not True, and 1 is not 1.0


def test_lists_of_scalars_stay_on_one_line() -> None:
    assert write_yaml({"betas": [0.9, 0.95], "a": {"b": None}}) == "betas: [0.9, 0.95]\na:\n  b: null\n"


def test_paths() -> None:
    assert dotted(("optimizer", "betas", 1)) == "optimizer.betas[1]"
    assert undotted("optimizer.betas[1]") == ("optimizer", "betas", 1)
    assert undotted("") == ()
