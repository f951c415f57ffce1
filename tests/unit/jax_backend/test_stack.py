"""Stacks of layers that differ: how they are cut into scans, and that it changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.model.stack import stretches

FULL = AttentionSpec(heads=1, kv_heads=1, head_dim=2, scale=1.0, qkv_bias=False, output_bias=False)
KINDS = {"f": FULL, "s": replace(FULL, window=4), "w": replace(FULL, window=8)}


def layers_of(letters: str) -> tuple[AttentionSpec, ...]:
    return tuple(KINDS[letter] for letter in letters)


@pytest.mark.parametrize(
    ("letters", "wanted"),
    [
        ("ffff", [("f", 4)]),
        ("sf" * 13, [("sf", 13)]),
        ("sssssf" * 4 + "ss", [("sssssf", 4), ("s", 2)]),
        ("f" * 28 + "s" * 4, [("f", 28), ("s", 4)]),
        ("fs", [("f", 1), ("s", 1)]),
        ("f", [("f", 1)]),
        ("fswfsws", [("fsw", 2), ("s", 1)]),
    ],
)
def test_layers_are_covered_by_few_scans(letters: str, wanted: list[tuple[str, int]]) -> None:
    found = stretches(layers_of(letters))
    assert [(stretch.period, stretch.repeats) for stretch in found] == [(layers_of(period), n) for period, n in wanted]
    assert sum((stretch.period * stretch.repeats for stretch in found), ()) == layers_of(letters)
    assert [stretch.start for stretch in found] == [0, *(stretch.stop for stretch in found[:-1])]
