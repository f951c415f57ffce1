"""What a tokenizer puts around a text and around a pair of texts: [CLS] A [SEP], <s> A </s></s> B </s>, A </s>."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Any text with at least one token will do: only what stands around it is looked at.
_PROBE = "a"


@dataclass(frozen=True)
class Template:
    """Special tokens before, between and after texts, and the token type (segment A or B) of everything.

    before, after: around a single text, or around a pair; between: the two texts of a pair.  Each is a list of (token, type).
    types: of the tokens of the first and the second text.
    """

    before: tuple[tuple[int, int], ...]
    between: tuple[tuple[int, int], ...]
    after: tuple[tuple[int, int], ...]
    types: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Number of special tokens."""
        return len(self.before) + len(self.between) + len(self.after)

    def apply(self, first: Sequence[int], second: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """Tokens and token types of a text or of a pair."""
        parts = [self.before, [(token, self.types[0]) for token in first]]
        if second is not None:
            parts += [self.between, [(token, self.types[1]) for token in second]]
        parts.append(self.after)
        pairs = [pair for part in parts for pair in part]
        return [token for token, _ in pairs], [kind for _, kind in pairs]


def single_template(backend: Any) -> Template:
    """What a `tokenizers` tokenizer puts around a single text."""
    encoding = backend.encode(_PROBE)
    before, rest = _specials(encoding)
    return Template(before[0], (), rest, (_type_of(encoding, 0), 0))


def pair_template(backend: Any) -> Template:
    """What a `tokenizers` tokenizer puts around a pair of texts."""
    encoding = backend.encode(_PROBE, _PROBE)
    (before, between), after = _specials(encoding)
    return Template(before, between, after, (_type_of(encoding, 0), _type_of(encoding, 1)))


Specials = tuple[tuple[int, int], ...]


def _specials(encoding: Any) -> tuple[list[Specials], Specials]:
    """Special tokens before each text, and after the last."""
    runs: list[list[tuple[int, int]]] = [[]]
    inside: int | None = None
    for token, kind, text in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
        if text is None:
            runs[-1].append((token, kind))
        elif text != inside:
            inside = text
            runs.append([])
    return [tuple(run) for run in runs[:-1]], tuple(runs[-1])


def _type_of(encoding: Any, text: int) -> int:
    return int(encoding.type_ids[encoding.sequence_ids.index(text)])
