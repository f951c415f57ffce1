"""What a model's config and the tokenizer of a run must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.families.tasks import Task


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, as far as it concerns a model.  None: unknown, or the tokenizer names no such token.

    size: rows that an embedding needs.  end, begin: the tokens that end and begin a text.  padding: the one that fills rows up.
    """

    size: int | None = None
    end: int | None = None
    begin: int | None = None
    padding: int | None = None

    def filled(self, keys: Mapping[str, Any], task: Task, padding_of_family: int | None) -> dict[str, Any]:
        """A run file's keys, and what they leave open.

        padding_of_family: the family's default; a language model whose rows need no padding has a padding token only if its
        family has one.
        """
        wants_padding = task.reads_padding or padding_of_family is not None
        known = {
            "vocab_size": self.size,
            "bos_token_id": self.end if self.begin is None else self.begin,
            "eos_token_id": self.end,
            "pad_token_id": self._padding(task) if wants_padding else None,
        }
        known = {key: value for key, value in known.items() if value is not None}
        return {**known, **self.filled_folder(keys, task)}

    def filled_folder(self, keys: Mapping[str, Any], task: Task) -> dict[str, Any]:
        """The keys of a checkpoint, which has no padding token if it was never needed."""
        if not task.reads_padding or keys.get("pad_token_id") is not None or self._padding(task) is None:
            return dict(keys)
        return {**keys, "pad_token_id": self._padding(task)}

    def _padding(self, task: Task) -> int | None:
        """Without a padding token of its own a tokenizer of a decoder is told to take the end of a text."""
        return self.end if self.padding is None and task.head == "sequence-classification" else self.padding

    def check(self, keys: Any, task: Task, folder: str | None) -> None:
        """ConfigError when a key says another token than the tokenizer does, where the model's numbers depend on it.

        folder: that the keys come from, if they are not a run file's.
        """
        if not task.reads_padding:
            return
        if self.padding is not None and keys.pad_token_id != self.padding:
            what = "fills rows up with" if task.head != "seq2seq" else "fills rows up, and a decoder begins, with"
            raise _differs("pad_token_id", keys.pad_token_id, f"{what} token {self.padding}", self.padding, folder)
        ends = keys.eos_token_id if isinstance(keys.eos_token_id, list) else [keys.eos_token_id]
        if task.head == "seq2seq" and self.end is not None and self.end not in ends:
            raise _differs("eos_token_id", keys.eos_token_id, f"ends texts with token {self.end}", self.end, folder)


def _differs(key: str, written: object, what: str, right: int, folder: str | None) -> ConfigError:
    shown = "null" if written is None else written
    if folder is not None:
        return ConfigError(
            "model.from",
            f"{folder}: config.json has {key} {shown}, but the tokenizer {what}; use the tokenizer that belongs to the model",
        )
    return ConfigError(f"model.{key}", f"{shown} is not the tokenizer's, which {what}; leave the key out or set it to {right}")
