"""What each objective makes of rows: masks, spans and shifted targets, the same whoever reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config import RunConfig
from jaxllm.data.batch import Batch, Shard
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData, prepare
from jaxllm.errors import DataError

TEXT = "\n\n".join(f"the film number {n} is long and the actors of part {n % 7} are splendid" for n in range(80))


def make(tmp_path: Path, objective: dict[str, Any], tokenizer: dict[str, Any], **data: Any) -> tuple[RunConfig, PreparedData]:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    source = data.pop("source", {"kind": "text", "files": str(file), "document": "paragraph"})
    config = RunConfig.model_validate(
        {
            "name": "objectives",
            "seed": 3,
            "model": {"family": "bert"},
            "objective": objective,
            "data": {
                "source": source,
                "validation_fraction": 0.1,
                "tokenizer": tokenizer,
                "sequence_length": 48,
                "cache_dir": str(tmp_path / "cache"),
                **data,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch": 4},
        }
    )
    return config, prepare(config, progress=False)


def batch(config: RunConfig, data: PreparedData, number: int = 0, shard: Shard = Shard(0, 1)) -> Batch:
    with BatchPipeline(data, config, "train", shard) as pipeline:
        return pipeline.batch(number)


WORDPIECE = {"train": "wordpiece", "vocab_size": 150}


def test_masks_have_the_shares_of_bert(tmp_path: Path) -> None:
    config, data = make(tmp_path, {"kind": "masked-lm"}, WORDPIECE)
    mask = data.tokenizer.special_id("mask_token")
    special = list(data.tokenizer.special_ids)
    chosen = masked = kept = candidates = 0
    for number in range(40):
        each = batch(config, data, number)
        at = each.weights > 0
        candidates += int((~np.isin(np.where(at, each.targets, each.inputs), special) & (each.segments > 0)).sum())
        chosen += int(at.sum())
        masked += int((each.inputs[at] == mask).sum())
        kept += int((each.inputs[at] == each.targets[at]).sum())
        assert not np.isin(each.targets[at], special).any()
        assert not each.targets[~at].any()
    assert chosen / candidates == pytest.approx(0.15, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.04)
    assert kept / chosen == pytest.approx(0.1, abs=0.04)


def test_masks_are_new_in_every_epoch_unless_they_are_static(tmp_path: Path) -> None:
    for dynamic in (True, False):
        config, data = make(tmp_path, {"kind": "masked-lm", "dynamic": dynamic}, WORDPIECE)
        with BatchPipeline(data, config, "train") as pipeline:
            found: dict[int, set[bytes]] = {}
            for number in range(3 * pipeline.sequences // 4 + 1):
                for sequence, weights in zip(pipeline.sequence_numbers(number), pipeline.batch(number).weights, strict=True):
                    found.setdefault(int(sequence), set()).add(weights.tobytes())
        assert (max(map(len, found.values())) > 1) == dynamic


def test_masks_do_not_depend_on_who_reads_them(tmp_path: Path) -> None:
    config, data = make(tmp_path, {"kind": "masked-lm", "whole_words": True}, WORDPIECE)
    whole = batch(config, data, 5)
    parts = [batch(config, data, 5, Shard(index, 2)) for index in range(2)]
    for name, array in whole.fields().items():
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), array)


def test_whole_words_are_chosen_whole(tmp_path: Path) -> None:
    config, data = make(tmp_path, {"kind": "masked-lm", "whole_words": True}, {"train": "wordpiece", "vocab_size": 110})
    continues = data.tokenizer.continues_word
    some = 0
    for number in range(30):
        each = batch(config, data, number)
        at = each.weights > 0
        tokens = np.where(at, each.targets, each.inputs)
        # Where the model sees the token itself: elsewhere another stands in its place.
        inside = continues[tokens[:, 1:]] & (each.segments[:, 1:] == each.segments[:, :-1]) & at[:, :-1]
        assert (at[:, 1:][inside]).all()
        some += int(inside.sum())
    assert some > 10


def test_spans_and_text_make_the_whole_again(tmp_path: Path) -> None:
    tokenizer = {"train": "bpe", "special_tokens": "t5", "vocab_size": 500}
    config, data = make(tmp_path, {"kind": "span-corruption"}, tokenizer, target_length=16)
    each = batch(config, data)
    end, sentinels = data.tokenizer.eos_id, {data.tokenizer.backend.token_to_id(f"<extra_id_{n}>") for n in range(100)}
    assert each.source is not None
    assert each.source_segments is not None
    assert each.source.shape == (4, 48)
    assert each.inputs.shape == (4, 16)
    for row in range(4):
        source = each.source[row][each.source_segments[row] > 0].tolist()
        target = each.targets[row][each.segments[row] > 0].tolist()
        assert source.pop() == target.pop() == end
        spans: dict[int, list[int]] = {}
        for token in target:
            if token in sentinels:
                spans[token] = []
                last = token
            else:
                spans[last].append(token)
        whole = [token for each_token in source for token in spans.get(each_token, [each_token])]
        assert list(spans) == [token for token in source if token in sentinels]
        noise = sum(map(len, spans.values()))
        assert noise / len(whole) == pytest.approx(0.15, abs=0.03)
        assert data.tokenizer.decode(whole).strip()
    np.testing.assert_array_equal(each.inputs[:, 1:][each.segments[:, 1:] > 0], each.targets[:, :-1][each.segments[:, 1:] > 0])
    assert set(each.inputs[:, 0].tolist()) == {data.tokenizer.special_id("pad_token")}


def test_pairs_of_source_and_target(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one two\nthree\n" * 4)
    (tmp_path / "a.de").write_text("eins zwei\ndrei\n" * 4)
    source = {"kind": "parallel-text", "files": str(tmp_path / "a.en"), "target_files": str(tmp_path / "a.de")}
    tokenizer = {"train": "bpe", "special_tokens": "t5", "vocab_size": 400}
    config, data = make(tmp_path, {"kind": "seq2seq"}, tokenizer, source=source, packing="none", target_length=12)
    each = batch(config, data)
    assert each.source is not None
    pairs = {
        (data.tokenizer.decode(source[source > 0].tolist(), True), data.tokenizer.decode(target[target > 0].tolist(), True))
        for source, target in zip(each.source, each.targets, strict=True)
    }
    assert pairs == {("one two", "eins zwei"), ("three", "drei")}
    short = config.model_copy(update={"data": config.data.model_copy(update={"target_length": 2})})
    with pytest.raises(DataError, match=r"a\.en:\d.*: the target has \d+ tokens.*data\.target_length is 2"):
        batch(short, data)
