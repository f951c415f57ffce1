"""What an encoder-decoder writes for the sources of a split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.backend import Backend, Translator
from jaxllm.data.batch import Batch
from jaxllm.data.pipeline import BatchPipeline
from jaxllm.data.prepare import PreparedData
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import JaxllmError
from jaxllm.generation.load import Trained
from jaxllm.generation.search import Search, Tokens, translate
from jaxllm.objectives.seq2seq import start_token
from jaxllm.run import Run


@dataclass(frozen=True)
class Written:
    """One example: the source as the model read it, the target as the data have it, and what the model wrote."""

    source: str
    target: str
    written: str


def write_targets(backend: Backend, run: Run, data: PreparedData, search: Search, limit: int | None = None) -> list[Written]:
    """Write a target for every example of the validation split, or for the first `limit` (collective: all write all).

    Evaluation's number of batches does not apply.
    """
    config = run.config
    examples = data.validation.documents.size if limit is None else min(limit, data.validation.documents.size)
    training = config.training.model_copy(update={"global_batch": min(config.training.global_batch, examples)})
    evaluation = config.evaluation.model_copy(update={"batches": None})
    whole = config.model_copy(update={"evaluation": evaluation, "training": training})
    translator = backend.translator(search.beams, search.max_new_tokens)
    found: list[Written] = []
    with BatchPipeline(data, whole, "validation") as batches:
        for batch in batches:
            targets = _targets(translator, batch, data.tokenizer, search)
            for row in range(min(len(targets), examples - len(found))):
                source = decoded(data.tokenizer, _sources(batch)[0][row])
                found.append(Written(source, reference(data, len(found)), targets[row]))
            if len(found) == examples:
                break
    return found


def write_one(backend: Backend, tokenizer: Tokenizer, tokens: Sequence[int], search: Search) -> str:
    """The target of one source."""
    source = np.asarray([tokens], np.int32)
    translator = backend.translator(search.beams, search.max_new_tokens)
    (target,) = translate(translator, source, np.ones_like(source), search, start_token(tokenizer), end_token(tokenizer))
    return decoded(tokenizer, target)


def source_tokens(trained: Trained, text: str) -> list[int]:
    """A source as it was in training: behind the run's prefix, with what the tokenizer puts around a text.

    JaxllmError when it is empty.
    """
    if not text:
        raise JaxllmError("an encoder-decoder needs a source; give a text (--prompt)")
    prefix = getattr(trained.run.config.objective, "prefix", "")
    return trained.tokenizer.single_template.apply(trained.tokenizer.encode(prefix + text))[0]


def end_token(tokenizer: Tokenizer) -> int:
    """What ends a target.  JaxllmError when the tokenizer names none."""
    if tokenizer.eos_id is None:
        raise JaxllmError("the tokenizer names no end-of-text token, with which a target ends; use one that does")
    return tokenizer.eos_id


def reference(data: PreparedData, number: int) -> str:
    """The target text of the example with this number in the validation split, as the data have it."""
    split = data.validation
    return bytes(split.columns["references"].document(int(split.documents[number]))).decode()


def save_written(file: Path, written: Sequence[Written]) -> None:
    """One JSON object a line."""
    lines = (json.dumps(vars(each), ensure_ascii=False) for each in written)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def decoded(tokenizer: Tokenizer, tokens: Sequence[int] | Tokens) -> str:
    """Text without special tokens, padding among them."""
    return tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True).strip()


def _targets(translator: Translator, batch: Batch, tokenizer: Tokenizer, search: Search) -> list[str]:
    start, end = start_token(tokenizer), end_token(tokenizer)
    return [decoded(tokenizer, tokens) for tokens in translate(translator, *_sources(batch), search, start, end)]


def _sources(batch: Batch) -> tuple[Tokens, Tokens]:
    if batch.source is None or batch.source_segments is None:
        raise JaxllmError("only an encoder-decoder writes targets; use a model of family t5")
    return batch.source, batch.source_segments
