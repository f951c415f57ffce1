"""Prepared data: documents tokenised once, kept by the fingerprint of their content and of the settings that shape them.

    <cache>/data/<fingerprint>/
        prepared.json           counts
        tokenizer/              opens with transformers.AutoTokenizer
        documents/              tokens.npy, offsets.npy: every document of the source, in its order
        validation_documents/   the same of validation_source, where there is one
        train.npy               which documents are for training
        validation.npy          and which for validation

The split chooses documents, so nothing is copied.  Sequence length, packing and batch size are not part of the fingerprint:
they are applied when the tokens are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.schema import RunConfig, TokenizerConfig
from jaxllm.config.source import FileSource, Source
from jaxllm.data.content import FileDigests, source_digest, tokenizer_digest
from jaxllm.data.fields import EXAMPLE_OBJECTIVES, check_examples
from jaxllm.data.token_file import COLUMNS, TokenFile, column_folder
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import DataError

SplitName: TypeAlias = Literal["train", "validation"]

DEFAULT_CACHE = Path("~/.cache/jaxllm")
_FORMAT = 4
_COUNTS = "prepared.json"


@dataclass(frozen=True)
class PreparedSplit:
    """The documents of one split.

    file: the tokens; documents_N (int64): numbers of this split's documents in it, ascending; tokens: how many, end-of-text
    tokens included; bytes: of the documents' text as UTF-8; columns: what examples have besides tokens, by the names in
    `jaxllm.data.token_file.COLUMNS`.
    """

    name: SplitName
    file: TokenFile
    documents: NDArray[np.int64]
    tokens: int
    bytes: int
    columns: Mapping[str, TokenFile] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedData:
    """Everything that batches are made of.

    fingerprint: of the content and of the settings that shape it.  skipped_lines: broken lines that `skip_broken` passed over.
    empty_documents: documents left out because they hold no text.  unigram_entropy: of the validation tokens, in nats per
    token; the loss of a model that knows only how frequent each token is.
    """

    folder: Path
    fingerprint: str
    tokenizer: Tokenizer
    train: PreparedSplit
    validation: PreparedSplit
    skipped_lines: int
    empty_documents: int
    unigram_entropy: float

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer."""
        return self.tokenizer.vocab_size

    def split(self, name: SplitName) -> PreparedSplit:
        """One of the two splits by name."""
        return self.train if name == "train" else self.validation


def prepare(config: RunConfig, *, progress: bool) -> PreparedData:
    """Tokenise the documents of a run, or find them already tokenised.

    Safe to call from several processes at once: one prepares, the others wait and read.  progress: show bars, if standard
    error is a terminal.  DataError or ConfigError when the data cannot be used; nothing half-written is left behind.
    """
    from filelock import FileLock

    check_examples(config)
    root = (config.data.cache_dir or DEFAULT_CACHE).expanduser()
    fingerprint = data_fingerprint(config, root)
    folder = root / "data" / fingerprint
    prepared = _open(folder, fingerprint)
    if prepared is not None:
        return prepared
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{fingerprint}.lock")):
            prepared = _open(folder, fingerprint)  # another process may have been first
            if prepared is None:
                _build_into(folder, config, progress and sys.stderr.isatty())
                prepared = _open(folder, fingerprint)
    except OSError as error:
        raise DataError(
            f"cannot write prepared data below {root}: {error.strerror or error}; make room there or set data.cache_dir"
        ) from None
    if prepared is None:
        raise DataError(f"the prepared data in {folder} changed while it was read; run again")
    return prepared


def data_fingerprint(config: RunConfig, root: Path) -> str:
    """Hex digest of the content of the sources and of every setting that changes tokens or split.

    root: where digests of unchanged files are remembered.  Where files lie, sequence length, packing and batch size do not
    count.  A local tokenizer or dataset counts by the content of its files, a hub dataset by its fingerprint or revision.
    """
    import tokenizers

    from jaxllm.data.tokenize import ending

    data = config.data
    digests = FileDigests(root / "file-digests.json")
    own_validation = data.validation_source is not None
    settings = {
        "format": _FORMAT,
        "source": _source_settings(data.source, digests),
        "validation_source": _source_settings(data.validation_source, digests) if data.validation_source else None,
        "validation_fraction": None if own_validation else data.validation_fraction,
        "seed": None if own_validation else config.seed,
        "tokenizer": tokenizer_digest(data.tokenizer.from_, digests) if data.tokenizer.from_ else _trained(data.tokenizer),
        "ending": ending(config),
        "examples": config.objective.model_dump(mode="json") if isinstance(config.objective, EXAMPLE_OBJECTIVES) else None,
        "tokenizers": tokenizers.__version__,
    }
    try:
        digests.save()
    except OSError as error:
        raise DataError(f"cannot write to {root}: {error.strerror or error}; make room there or set data.cache_dir") from None
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _trained(tokenizer: TokenizerConfig) -> dict[str, Any]:
    return {"train": tokenizer.train, "vocab_size": tokenizer.vocab_size, "special_tokens": tokenizer.convention}


def _source_settings(source: Source, digests: FileDigests) -> dict[str, Any]:
    where = {"files", "target_files"} if isinstance(source, FileSource) else {"name"}
    return {**source.model_dump(mode="json", exclude=where), "content": source_digest(source, digests)}


def _open(folder: Path, fingerprint: str) -> PreparedData | None:
    """What an earlier run prepared; None when there is nothing, or less than there should be."""
    try:
        counts = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
        files = {name: TokenFile.open(folder / counts[name]["file"]) for name in ("train", "validation")}
        splits = {
            name: PreparedSplit(
                "train" if name == "train" else "validation",
                file,
                np.load(folder / f"{name}.npy", allow_pickle=False),
                counts[name]["tokens"],
                counts[name]["bytes"],
                _columns(folder, counts[name]["file"]),
            )
            for name, file in files.items()
        }
        return PreparedData(
            folder,
            fingerprint,
            Tokenizer.load(str(folder / "tokenizer")),
            splits["train"],
            splits["validation"],
            counts["skipped_lines"],
            counts["empty_documents"],
            counts["unigram_entropy"],
        )
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def _columns(folder: Path, name: str) -> dict[str, TokenFile]:
    """What the documents `name` have besides tokens."""
    folders = {column: folder / column_folder(name, column) for column in COLUMNS if column != "tokens"}
    return {column: TokenFile.open(path) for column, path in folders.items() if path.is_dir()}


def _build_into(folder: Path, config: RunConfig, progress: bool) -> None:
    """Prepare under a temporary name and rename when whole; the caller holds the lock."""
    from jaxllm.data.tokenize import build

    for left_behind in folder.parent.glob(f"{folder.name}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        counts = build(temporary, config, progress)
        (temporary / _COUNTS).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
