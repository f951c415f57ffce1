"""Beam search against transformers' own, on both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from jaxllm.backend import Backend, create_backend
from jaxllm.config import RunConfig
from jaxllm.families import resolve_model, task_of
from jaxllm.generation.search import Search, translate
from jaxllm.run import Run
from jaxllm.state import Progress, TrainingState, write_weights
from jaxllm.state.initial import initial_weights

VOCABULARY, LONGEST, PAD = 12, 9, 0
ENDS = (2, 3)  # tokens that these weights like to write
SOURCES = np.random.default_rng(3).integers(2, VOCABULARY, (6, 7), dtype=np.int32)
LENGTHS = (7, 3, 5, 1, 7, 2)
SEGMENTS = (np.arange(7) < np.asarray(LENGTHS)[:, None]).astype(np.int32)
SEARCHES = [Search(1, LONGEST), Search(4, LONGEST), Search(3, LONGEST, 0.0), Search(4, LONGEST, 2.0), Search(2, 2)]


@pytest.fixture(scope="module")
def run() -> Run:
    config = RunConfig.model_validate(
        {
            "name": "search",
            "model": {"family": "t5", "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 1,
                      "num_heads": 3, "vocab_size": VOCABULARY, "relative_attention_num_buckets": 8,
                      "relative_attention_max_distance": 6, "initializer_factor": 1.0, "tie_word_embeddings": False},
            "objective": {"kind": "seq2seq"},
            "data": {"source": {"kind": "jsonl", "files": "unused.jsonl", "target_field": "b"},
                     "packing": "none", "sequence_length": 16,
                     "tokenizer": {"train": "bpe", "special_tokens": "t5", "vocab_size": 400}},
            "optimizer": {"learning_rate": 0.0},
            "training": {"steps": 1, "global_batch": 1, "precision": "fp64"},
        }
    )  # fmt: skip
    return Run(config, resolve_model(config.model, task=task_of(config.objective)), total_steps=1)


@pytest.fixture(scope="module", params=["jax", "deepspeed"])
def backend(request: Any, run: Run) -> Any:
    started: Backend = create_backend(request.param)
    started.start(run, None, training=False)
    yield started
    started.close()


@pytest.fixture(scope="module")
def reference(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("model")
    weights = initial_weights(run.model, run.config.seed)
    write_weights(TrainingState(Progress(), weights), folder, run.model.huggingface_config, dtype="float64")
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_targets_are_those_of_transformers(backend: Backend, reference: Any, search: Search, end: int) -> None:
    found = searched(backend, search, end)
    wanted = reference.generate(
        torch.from_numpy(SOURCES).long(), attention_mask=torch.from_numpy(SEGMENTS), num_beams=search.beams, eos_token_id=end,
        max_new_tokens=search.max_new_tokens, length_penalty=search.length_penalty, do_sample=False,
    ).tolist()  # fmt: skip
    for mine, theirs in zip(found, wanted, strict=True):
        assert [PAD, *mine] == theirs[: len(mine) + 1]
        assert all(token in (PAD, end) for token in theirs[len(mine) + 1 :])
        assert end not in mine


def test_targets_end_at_different_lengths(backend: Backend) -> None:
    """Otherwise the test above says little."""
    found = [searched(backend, search, end) for search in SEARCHES[:2] for end in ENDS]
    assert all(len({len(target) for target in targets}) > 1 for targets in found)
    assert found[0] != found[len(ENDS)]  # more beams find other targets


def searched(backend: Backend, search: Search, end: int) -> list[list[int]]:
    return translate(backend.translator(search.beams, LONGEST), SOURCES, SEGMENTS, search, start=PAD, end=end)


def test_more_tokens_than_there_is_room_for_are_refused(backend: Backend) -> None:
    translator = backend.translator(1, 2)
    rows = np.arange(6, dtype=np.int32)
    translator.start(SOURCES, SEGMENTS, PAD)
    translator.advance(rows, rows)
    with pytest.raises(Exception, match="2 tokens"):
        translator.advance(rows, rows)
