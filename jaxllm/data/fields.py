"""From a row of a source to a document: which fields the objective asks for, and what may stand in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.config.objective import (
    ObjectiveConfig,
    Seq2SeqObjective,
    SequenceClassificationObjective,
    TokenClassificationObjective,
)
from jaxllm.config.schema import RunConfig
from jaxllm.config.source import Columns, ParallelTextSource, Source
from jaxllm.data.document import Document
from jaxllm.data.labels import LabelReader
from jaxllm.errors import ConfigError

EXAMPLE_OBJECTIVES = (SequenceClassificationObjective, TokenClassificationObjective, Seq2SeqObjective)
_LABELLED = (SequenceClassificationObjective, TokenClassificationObjective)


@dataclass(frozen=True)
class Fields:
    """The fields of a table's rows that make a document.

    text, second: names.  words: whether the text is a list of words.  labels: reads the label field.  example: whether a
    document is an example of its own, which may not be empty.
    """

    text: str
    second: str | None = None
    words: bool = False
    labels: LabelReader | None = None
    example: bool = False

    @classmethod
    def of(cls, source: Columns, objective: ObjectiveConfig) -> Fields:
        """What an objective reads from a source."""
        labels = None
        if isinstance(objective, _LABELLED) and source.label_field is not None:
            labels = LabelReader(objective, source.label_field)
        return cls(
            text=source.text_field,
            second=source.target_field if isinstance(objective, Seq2SeqObjective) else source.second_field,
            words=isinstance(objective, TokenClassificationObjective),
            labels=labels,
            example=isinstance(objective, EXAMPLE_OBJECTIVES),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The fields, each once."""
        wanted = (self.text, self.second, self.labels.field if self.labels else None)
        return tuple(dict.fromkeys(name for name in wanted if name is not None))

    def document(self, row: Mapping[str, Any], origin: str, *, column: str = "column", text: str = "text") -> Document:
        """The document of a row that has all fields; ValueError with what is wrong, as the end of a sentence.

        column, text: what a field and its content are called in this kind of file.
        """
        words: tuple[str, ...] = ()
        if self.words:
            words = _words(row[self.text], self.text)
            said = " ".join(words)
        else:
            said = _text(row[self.text], self.text, column, text)
        second = None if self.second is None else _text(row[self.second], self.second, column, text)
        if self.example:
            for name, content in ((self.text, said), (self.second, second)):
                if content is not None and (not content or content.isspace()):
                    raise ValueError(f"has no text in {name!r}")
        labels = () if self.labels is None else self.labels.read(row[self.labels.field], len(words))
        return Document(said, origin, words, second, labels)


def _text(value: object, name: str, column: str, text: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"has {type(value).__name__} in {column} {name!r}, not {text}")  # noqa: TRY004 - the data's, no bug
    if not _is_unicode(value):
        raise ValueError(f"has half a surrogate pair in {column} {name!r}")
    return value


def _words(value: object, name: str) -> tuple[str, ...]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"has no list of words in {name!r}")
    for number, word in enumerate(words, 1):
        if not word or word.isspace() or not _is_unicode(word):
            raise ValueError(f"has no text in word {number} of {name!r}")
    return tuple(words)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_examples(config: RunConfig) -> None:
    """ConfigError unless the sources hold what the objective reads, and every key about examples means something to it."""
    data, objective = config.data, config.objective
    for key, source in _sources(config):
        _check_source(key, source, objective)
    example = isinstance(objective, EXAMPLE_OBJECTIVES)
    if example and data.packing != "none":
        raise ConfigError("data.packing", f"{objective.kind} has one example in a row; set packing to none")
    if data.truncate and not example:
        raise ConfigError("data.truncate", f"means nothing to {objective.kind}, which cuts documents anyway; remove it")
    if data.append_eos is not None and objective.kind != "causal-lm":
        raise ConfigError(
            "data.append_eos",
            f"means nothing to {objective.kind}, whose texts have the tokenizer's own special tokens; remove it",
        )
    if data.target_length is not None and objective.kind not in ("seq2seq", "span-corruption"):
        raise ConfigError("data.target_length", f"means nothing to {objective.kind}, which has no targets; remove it")
    if data.cross_document_attention and objective.kind not in ("causal-lm", "masked-lm"):
        raise ConfigError(
            "data.cross_document_attention", f"means nothing to {objective.kind}, which has one text in a row; remove it"
        )


def _sources(config: RunConfig) -> Iterator[tuple[str, Source]]:
    yield "data.source", config.data.source
    if config.data.validation_source is not None:
        yield "data.validation_source", config.data.validation_source


def _check_source(key: str, source: Source, objective: ObjectiveConfig) -> None:
    kind = objective.kind
    if isinstance(source, ParallelTextSource):
        if not isinstance(objective, Seq2SeqObjective):
            raise ConfigError(f"{key}.kind", f"parallel-text holds pairs for seq2seq, not texts for {kind}; use another source")
        return
    if not isinstance(source, Columns):
        if isinstance(objective, EXAMPLE_OBJECTIVES):
            raise ConfigError(f"{key}.kind", f"{source.kind} holds plain texts, but {kind} needs examples; use a table")
        return
    wanted = {
        "second_field": None if isinstance(objective, SequenceClassificationObjective) else False,
        "target_field": isinstance(objective, Seq2SeqObjective),
        "label_field": isinstance(objective, _LABELLED),
    }
    for name, needed in wanted.items():
        given = getattr(source, name) is not None
        if needed and not given:
            raise ConfigError(f"{key}.{name}", f"is missing; name the field that {kind} reads")
        if given and needed is False:
            raise ConfigError(f"{key}.{name}", f"means nothing to {kind}; remove it")
