"""What a source gives out, one after the other: documents, and examples with a second text or labels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """text: of an ordinary document never empty.  origin: where it came from, for messages: `FILE:LINE` or `DATASET[ROW]`.

    words: the words of `text`, where every word has a label.  second: the second text of a pair, or the target.  labels:
    numbers of labels (one, several, or one a word), or the values of a regression.
    """

    text: str
    origin: str
    words: tuple[str, ...] = ()
    second: str | None = None
    labels: tuple[float, ...] = ()


@dataclass
class SkipCount:
    """What was left out.  broken: lines that `skip_broken` passed over.  empty: documents without any text."""

    broken: int = 0
    empty: int = 0
