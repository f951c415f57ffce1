"""Packing and the causal-lm objective against a reference that is written as one thinks it: token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.data.batch import Batch
from jaxllm.data.order import permutation
from jaxllm.data.packing import create_packing
from jaxllm.data.prepare import PreparedSplit
from jaxllm.data.token_file import TokenFile
from jaxllm.errors import DataError
from jaxllm.objectives.causal_lm import CausalLM

MakeSplit: TypeAlias = Callable[..., PreparedSplit]
MakeConfig: TypeAlias = Callable[..., Any]
Sequence: TypeAlias = list[tuple[int, int, float, int, int]]  # input, target, weight, position, segment at each place

FIELDS = [field.name for field in fields(Batch) if field.default is MISSING]


# ----------------------------------------------------------------------------------------------------------- reference


def concatenated(documents: list[list[int]], length: int, crossing: bool) -> list[Sequence]:
    """Every sequence of documents laid end to end."""
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    sequences = []
    start = 0
    while start + 1 < len(stream):
        sequences.append(one_sequence(stream[start : start + length + 1], length, crossing))
        start += length
    return sequences


def single(documents: list[list[int]], length: int, crossing: bool) -> list[Sequence]:
    """One sequence per document."""
    return [
        one_sequence([(token, 0) for token in document[: length + 1]], length, crossing)
        for document in documents
        if len(document) >= 2
    ]


def one_sequence(window: list[tuple[int, int]], length: int, crossing: bool) -> Sequence:
    sequence: Sequence = []
    segment, position = 0, 0
    for place in range(length):
        if place >= len(window):
            sequence.append((0, 0, 0.0, 0, 0))
            continue
        token, document = window[place]
        if place == 0 or window[place - 1][1] != document:
            segment, position = segment + 1, 0
        target, weight = 0, 0.0
        if place + 1 < len(window) and (crossing or window[place + 1][1] == document):
            target, weight = window[place + 1][0], 1.0
        sequence.append((token, target, weight, place if crossing else position, 1 if crossing else segment))
        position += 1
    return sequence


def as_sequences(batch: Batch) -> list[Sequence]:
    columns = [getattr(batch, name).tolist() for name in FIELDS]
    return [list(zip(*(column[row] for column in columns), strict=True)) for row in range(batch.rows)]


def in_memory(documents: list[list[int]], chosen: list[int]) -> PreparedSplit:
    tokens = np.array([token for document in documents for token in document], np.uint32)
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    return PreparedSplit("train", TokenFile(tokens, offsets), np.array(chosen, np.int64), 0, 0)


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize("kind", ["concatenate", "none"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=30),
    length=st.integers(2, 9),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_packing_equals_the_reference(
    make_config: MakeConfig, kind: str, crossing: bool, lengths: list[int], length: int, seed: int, data: st.DataObject
) -> None:
    first = np.cumsum([0, *lengths])
    documents = [list(range(10 + start, 10 + start + count)) for start, count in zip(first, lengths, strict=False)]
    chosen = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    in_order = [documents[number] for number in chosen]
    if kind == "concatenate":
        order = permutation(len(chosen), seed, "train documents")
        expected = concatenated([in_order[number] for number in order], length, crossing)
    else:
        expected = single(in_order, length, crossing)
    config = make_config(packing=kind, sequence_length=length, cross_document_attention=crossing)
    split = in_memory(documents, chosen)
    if not expected:
        with pytest.raises(DataError, match="too few tokens"):
            create_packing(split, config.data, 1, seed)
        return
    packing = create_packing(split, config.data, 1, seed)
    assert len(packing) == len(expected)
    asked = data.draw(st.permutations(range(len(expected))))
    batch = CausalLM(crossing).batch(packing.rows(np.array(asked, np.int64)))
    assert as_sequences(batch) == [expected[number] for number in asked]


def test_the_picture_in_the_documentation(make_split: MakeSplit, make_config: MakeConfig) -> None:
    """The example of packing.py, with the documents in an order found by the seed."""
    documents = [[11] * 5, [22] * 3, [33] * 10]
    order = permutation(3, 0, "train documents")
    split = make_split([documents[np.flatnonzero(order == number)[0]] for number in range(3)])
    rows = create_packing(split, make_config(sequence_length=6).data, 1, seed=0).rows(np.arange(2))
    assert rows.tokens.tolist() == [[11, 11, 11, 11, 11, 22, 22], [22, 22, 33, 33, 33, 33, 33]]
    assert rows.segments.tolist() == [[1, 1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 2, 2, 2]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 0, 1, 2, 3, 4]]


def test_no_token_is_lost_or_predicted_twice(make_split: MakeSplit, make_config: MakeConfig) -> None:
    """Over all sequences, every token but the first of each document is a target exactly once."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(1000, 70_000, size).tolist() for size in generator.integers(1, 80, 50)]
    packing = create_packing(make_split(documents), make_config(sequence_length=16).data, 1, seed=7)
    batch = CausalLM().batch(packing.rows(np.arange(len(packing))))
    targets = np.sort(batch.targets[batch.weights == 1])
    assert targets.tolist() == sorted(token for document in documents for token in document[1:])
    assert batch.targets[batch.weights == 0].max() == 0


def test_types_and_layout(make_split: MakeSplit, make_config: MakeConfig) -> None:
    packing = create_packing(make_split([[1, 2, 3], [4, 5]]), make_config(sequence_length=4).data, 1, seed=0)
    for crossing in (False, True):
        batch = CausalLM(crossing).batch(packing.rows(np.arange(1)))
        for name in FIELDS:
            values = getattr(batch, name)
            assert values.dtype == (np.float32 if name == "weights" else np.int32)
            assert values.shape == (1, 4)
            assert values.flags.c_contiguous


def test_documents_without_tokens_do_not_count(make_split: MakeSplit, make_config: MakeConfig) -> None:
    """A tokenizer may drop all of a text; segments stay 1, 2, 3."""
    config = make_config(sequence_length=6).data
    packing = create_packing(make_split([[1, 2], [], [3, 4], [], [], [5, 6]]), config, 1, seed=0)
    assert packing.rows(np.arange(1)).segments.tolist() == [[1, 1, 2, 2, 3, 3, 0]]


def test_order_of_documents_is_a_matter_of_the_seed(make_split: MakeSplit, make_config: MakeConfig) -> None:
    split = make_split([[number] * 3 for number in range(1, 40)])
    config = make_config(sequence_length=8).data
    first = [create_packing(split, config, 1, seed).rows(np.arange(14)).tokens for seed in (0, 0, 1)]
    assert np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])


def test_token_ids_above_16_bits_survive(make_split: MakeSplit, make_config: MakeConfig, tmp_path: Path) -> None:
    split = make_split([[69_999, 65_536, 65_535]])
    assert split.file.tokens.dtype == np.uint32
    packing = create_packing(split, make_config(packing="none", sequence_length=2).data, 1, seed=0)
    assert packing.rows(np.arange(1)).tokens.tolist() == [[69_999, 65_536, 65_535]]
