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
from typing import TYPE_CHECKING, Any

from jaxllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
# Beside tokenizer.json, what transformers reads and a copy of a tokenizer must therefore keep.
COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Where older or leaner folders name their end-of-text token.
EOS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
_WANTED = tuple(dict.fromkeys((TOKENIZER_FILE, *COMPANION_FILES, *EOS_FILES)))
_BYTES = 256


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
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
        """A byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2) of at most vocab_size entries.

        Every byte is in its alphabet, so any text can be encoded; the same texts always give the same tokenizer.  Fewer
        entries than asked for come out when the texts have no more pairs to merge.  ConfigError when vocab_size cannot hold
        the 256 bytes and the end-of-text token.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < _BYTES + 1:
            raise ConfigError(
                "data.tokenizer.vocab_size",
                f"{vocab_size} is too small for a byte-level tokenizer; use at least {_BYTES + 1}: the bytes and {END_OF_TEXT}",
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, END_OF_TEXT, _trained_companions())

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

    def encode(self, text: str) -> list[int]:
        """Tokens of one text, without added special tokens."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without added special tokens, on all the threads that `tokenizers` may use."""
        # The fast variant leaves out the offsets into the text, which nobody here needs.
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

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
    return next((token for token in (END_OF_TEXT, "</s>") if backend.token_to_id(token) is not None), None)


def _trained_companions() -> dict[str, str]:
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    return {
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
