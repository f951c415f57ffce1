"""The tokenizer of a run: trained here or taken from a folder or the hub, always through `tokenizers`.

`transformers` is not used, because importing it imports torch; the folder that `Tokenizer.save` writes is one that
`transformers.AutoTokenizer.from_pretrained` opens as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from jaxllm.data.special_tokens import CONVENTIONS, Convention, train_bpe, train_wordpiece
from jaxllm.data.template import Template, pair_template, single_template
from jaxllm.errors import ConfigError, DataError
from jaxllm.families import Vocabulary

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
# Beside tokenizer.json, what transformers reads and a copy of a tokenizer must therefore keep.
COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Where older or leaner folders name their end-of-text token.
EOS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
_WANTED = tuple(dict.fromkeys((TOKENIZER_FILE, *COMPANION_FILES, *EOS_FILES)))
_BYTES, _LETTERS = 256, 100
_ROLE_FILES = ("tokenizer_config.json", "special_tokens_map.json")


class Tokenizer:
    """Text to tokens and back.

    backend: the `tokenizers` object.  eos_token: the end-of-text token, or None where the tokenizer names none.  companions:
    file name -> text of the files kept beside tokenizer.json.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_token: str | None, companions: Mapping[str, str] | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_token = eos_token
        self._companions = dict(companions or {})

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        progress: bool = False,
        *,
        algorithm: Literal["bpe", "wordpiece"] = "bpe",
        special_tokens: str = "gpt2",
    ) -> Tokenizer:
        """A tokenizer of at most vocab_size entries; the same texts always give the same one.

        special_tokens: a name in `jaxllm.data.special_tokens.CONVENTIONS`.
        Every byte is in the alphabet of a byte-level BPE, so that it can encode any text.  Fewer entries than asked for come
        out when the texts have no more pairs to merge.  ConfigError when vocab_size cannot hold the alphabet and the special
        tokens.
        """
        convention = CONVENTIONS[special_tokens]
        kind, alphabet = ("byte-level", "the bytes") if algorithm == "bpe" else ("WordPiece", "some letters")
        least = len(convention.tokens) + (_BYTES if algorithm == "bpe" else _LETTERS)
        if vocab_size < least:
            said = ", ".join(convention.tokens[:5]) + (", ..." if len(convention.tokens) > 5 else "")
            raise ConfigError(
                "data.tokenizer.vocab_size",
                f"{vocab_size} is too small for a {kind} tokenizer; use at least {least}: {alphabet} and {said}",
            )
        train = train_bpe if algorithm == "bpe" else train_wordpiece
        backend = train(texts, vocab_size, convention, progress)
        return cls(backend, convention.roles.get("eos_token"), convention.companions())

    @classmethod
    def load(cls, name: str) -> Tokenizer:
        """The tokenizer of a local folder or of a hub repository.

        DataError when there is none, or it has no tokenizer.json.
        """
        files = tokenizer_files(name)
        try:
            from tokenizers import Tokenizer as Backend

            backend = Backend.from_file(str(files[TOKENIZER_FILE]))
        except Exception as error:  # noqa: BLE001 - `tokenizers` raises bare Exception
            raise DataError(f"{files[TOKENIZER_FILE]} is not a tokenizer that `tokenizers` can read: {error}") from None
        texts = {file: _read(path) for file, path in files.items() if file != TOKENIZER_FILE}
        eos_token = _find_eos({file: _parse(files[file], text) for file, text in texts.items() if file in EOS_FILES}, backend)
        return cls(backend, eos_token, {file: texts[file] for file in COMPANION_FILES if file in texts})

    @cached_property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the highest token id + 1."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eos_id(self) -> int | None:
        """Id of the end-of-text token, or None where the tokenizer names none."""
        return None if self.eos_token is None else self.backend.token_to_id(self.eos_token)

    def special_id(self, role: str) -> int | None:
        """Id of the token that has a role (`mask_token`, `pad_token`, ...), or None where the tokenizer names none."""
        for file in _ROLE_FILES:
            named = _json_or_empty(self._companions.get(file)).get(role)
            named = named.get("content") if isinstance(named, dict) else named
            if isinstance(named, str) and (number := self.backend.token_to_id(named)) is not None:
                return int(number)
        token = _usual(self.backend, role)
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What a model must know of it."""
        return Vocabulary(self.vocab_size, self.eos_id, self.special_id("bos_token"), self.special_id("pad_token"))

    @cached_property
    def single_template(self) -> Template:
        """What belongs around a single text."""
        return single_template(self.backend)

    @cached_property
    def pair_template(self) -> Template:
        """What belongs around a pair of texts."""
        return pair_template(self.backend)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Every special token: those with a role and those that the templates use."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def continues_word(self) -> NDArray[np.bool_]:
        """For every entry of the vocabulary whether it goes on with the word of the token before it.

        WordPiece marks such pieces with ##; byte-level BPE and SentencePiece mark all others, by a leading blank.
        """
        model = json.loads(self.backend.to_str())["model"]
        prefix = model.get("continuing_subword_prefix")
        continues = np.zeros(self.vocab_size, np.bool_)
        for token, number in self.backend.get_vocab(with_added_tokens=True).items():
            marked = token.startswith(prefix) if prefix else not token.startswith(("\u0120", "\u2581", "\u010a"))
            continues[number] = marked and number not in self.special_ids
        return continues

    def encode(self, text: str) -> list[int]:
        """Tokens of one text, without added special tokens."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without added special tokens, on all the threads that `tokenizers` may use."""
        # The fast variant leaves out the offsets into the text, which nobody here needs.
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_words(self, examples: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int | None]]]:
        """For each list of words its tokens and, for every token, the number of its word."""
        encodings = self.backend.encode_batch([list(words) for words in examples], True, add_special_tokens=False)
        return [(encoding.ids, encoding.word_ids) for encoding in encodings]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def save(self, folder: Path) -> None:
        """Write a folder (made if missing) that `transformers.AutoTokenizer.from_pretrained` opens as it is."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / TOKENIZER_FILE))
        for file, text in self._companions.items():
            (folder / file).write_text(text, encoding="utf-8")


class StreamDecoder:
    """Turns tokens into text one at a time, handing out only whole characters.

    The texts pushed out, and `flush()` at the end, joined together are `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Tokens not yet handed out, behind those handed out last: some decoders (SentencePiece) treat a leading token
        # differently, so new text is what the window's text has grown by.
        self._window: list[int] = []
        self._printed = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._window.append(token)
        text = self._text(self._window)
        if text.endswith("�"):
            return ""
        return self._hand_out(text)

    def flush(self) -> str:
        """The rest, incomplete characters as U+FFFD."""
        return self._hand_out(self._text(self._window))

    def _hand_out(self, text: str) -> str:
        done = self._text(self._window[: self._printed])
        if len(text) <= len(done):
            return ""
        self._window = self._window[self._printed :]
        self._printed = len(self._window)
        return text[len(done) :]

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


def tokenizer_files(name: str) -> dict[str, Path]:
    """The files of a tokenizer, file name -> path: tokenizer.json and those of COMPANION_FILES and EOS_FILES that exist.

    name: a local folder, or else a hub repository.  DataError when there is no tokenizer.json.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or not _could_be_hub_name(name):
            raise DataError(f"there is no tokenizer folder {name}; give a folder that holds {TOKENIZER_FILE}, or a hub name")
        folder = _download(name)
    if (folder / TOKENIZER_FILE).is_file():
        return {file: folder / file for file in _WANTED if (folder / file).is_file()}
    raise DataError(
        f"the tokenizer {name} has no {TOKENIZER_FILE}; if it is a slow tokenizer, convert it once with transformers, "
        f"AutoTokenizer.from_pretrained({name!r}).save_pretrained(FOLDER), and give that folder"
    )


def _could_be_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def _download(name: str) -> Path:
    """The tokenizer files of a hub repository, in the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:  # noqa: BLE001 - no such repository, no permission, no network: the hub says which
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the tokenizer {name} is neither a local folder nor readable from the hub: {reason}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the tokenizer file {path}: {error}") from None


def _parse(path: Path, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"the tokenizer file {path} is not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _json_or_empty(text: str | None) -> Mapping[str, Any]:
    value = json.loads(text) if text else {}
    return value if isinstance(value, dict) else {}


def _find_eos(files: Mapping[str, Mapping[str, Any]], backend: tokenizers.Tokenizer) -> str | None:
    """The end-of-text token: as the folder names it, else the usual one if the vocabulary has it."""
    for file in EOS_FILES:
        named = files.get(file, {}).get("eos_token")
        if isinstance(named, dict):
            named = named.get("content")
        if named is None:
            number = files.get(file, {}).get("eos_token_id")
            number = number[0] if isinstance(number, list) and number else number
            named = backend.id_to_token(number) if isinstance(number, int) else None
        if isinstance(named, str) and backend.token_to_id(named) is not None:
            return named
    return _usual(backend, "eos_token")


def _usual(backend: tokenizers.Tokenizer, role: str) -> str | None:
    """What folders that name no roles call the token of a role; None where the vocabulary has no such token.

    Conventions that are there as a whole come first: RoBERTa's vocabulary has GPT-2's <|endoftext|>, too, as any other token.
    """

    def whole(convention: Convention) -> int:
        return len(convention.tokens) if all(backend.token_to_id(each) is not None for each in convention.tokens) else 0

    likely = sorted(CONVENTIONS.values(), key=whole, reverse=True)
    named = (convention.roles.get(role) for convention in likely)
    return next((token for token in named if token and backend.token_to_id(token) is not None), None)
