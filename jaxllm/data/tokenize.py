"""Documents to token files: drawn once, split, and tokenised by `datasets` in one process or several.

The text lies in a temporary Arrow file while this runs, so that a source is read once and a tokenizer can be trained before
anything is tokenised.  Only a streamed dataset with a ready tokenizer needs no such file: its documents become tokens as they
arrive, and nothing but tokens is ever stored.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.schema import HuggingFaceSource, RunConfig, Source
from jaxllm.data.sources import SkipCount, read_documents
from jaxllm.data.split import split_documents
from jaxllm.data.token_file import TokenFile, TokenWriter, token_dtype
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# Handed to the tokenizer at once: enough to keep its threads busy, little enough for any machine's memory.
_BATCH = 1000
_BATCH_BYTES = 1 << 24


def build(folder: Path, config: RunConfig, progress: bool) -> dict[str, Any]:
    """Write tokenizer, token files and split into `folder`; returns the counts."""
    skipped = SkipCount()
    with _progress_bars(progress):
        corpus = _Corpus(folder, config, skipped, progress)
        tokenizer = corpus.tokenizer()
        tokenizer.save(folder / "tokenizer")
        sizes = {"documents": corpus.write("documents", config.data.source, tokenizer)}
        if config.data.validation_source is not None:
            sizes["validation_documents"] = corpus.write("validation_documents", config.data.validation_source, tokenizer)
        corpus.remove()
    counts: dict[str, Any] = {"skipped_lines": skipped.broken, "empty_documents": skipped.empty}
    for name, (file, documents) in _splits(config, sizes).items():
        np.save(folder / f"{name}.npy", documents, allow_pickle=False)
        lengths = np.diff(TokenFile.open(folder / file).offsets)
        counts[name] = {
            "file": file,
            "documents": int(documents.size),
            "tokens": int(lengths[documents].sum()),
            "bytes": int(sizes[file][documents].sum()),
        }
    for name in ("train", "validation"):
        if counts[name]["tokens"] < 2:
            raise DataError(f"the {name} documents hold {counts[name]['tokens']} tokens, too few to predict any; give more")
    held_out = counts["validation"]["file"]
    counts["unigram_entropy"] = unigram_entropy(
        TokenFile.open(folder / held_out), np.load(folder / "validation.npy", allow_pickle=False), tokenizer.vocab_size
    )
    return counts


def unigram_entropy(file: TokenFile, documents: NDArray[np.int64], vocab_size: int) -> float:
    """Entropy of the token frequencies of these documents, in nats per token."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, documents.size, _BATCH):
        chosen = documents[start : start + _BATCH]
        tokens = np.concatenate([file.tokens[file.offsets[d] : file.offsets[d + 1]] for d in chosen])
        counts += np.bincount(tokens, minlength=vocab_size)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _splits(config: RunConfig, sizes: dict[str, NDArray[np.int64]]) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """Split name -> folder of its token file and the documents in it."""
    if "validation_documents" in sizes:
        everything = {name: np.arange(size.size, dtype=np.int64) for name, size in sizes.items()}
        return {
            "train": ("documents", everything["documents"]),
            "validation": ("validation_documents", everything["validation_documents"]),
        }
    train, validation = split_documents(sizes["documents"].size, config.data.validation_fraction, config.seed)
    return {"train": ("documents", train), "validation": ("documents", validation)}


class _Corpus:
    """The text of a run's sources, and its way into token files."""

    def __init__(self, folder: Path, config: RunConfig, skipped: SkipCount, progress: bool) -> None:
        self._folder = folder
        self._data = config.data
        self._seed = config.seed
        self._skipped = skipped
        self._progress = progress
        self._scratch = folder / "scratch"
        self._scratch.mkdir(parents=True)
        self._texts: datasets.Dataset | None = None

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, trained on the training documents if it is trained here."""
        if self._data.tokenizer.from_ is not None:
            tokenizer = Tokenizer.load(self._data.tokenizer.from_)
        else:
            assert self._data.tokenizer.vocab_size is not None  # noqa: S101 - the schema demands it of `train`
            tokenizer = Tokenizer.train(self._training_texts(), self._data.tokenizer.vocab_size, self._progress)
        if self._data.append_eos and tokenizer.eos_id is None:
            raise ConfigError(
                "data.append_eos",
                f"the tokenizer {self._data.tokenizer.from_} names no end-of-text token to append; set it to false, or name "
                "eos_token in the tokenizer's tokenizer_config.json",
            )
        return tokenizer

    def write(self, name: str, source: Source, tokenizer: Tokenizer) -> NDArray[np.int64]:
        """Tokenise a source into the token file `name`; returns the UTF-8 bytes of each document."""
        encode = _Encode(tokenizer, tokenizer.eos_id if self._data.append_eos else None)
        sizes: list[NDArray[np.int64]] = []
        with TokenWriter(self._folder / name, tokenizer.vocab_size) as writer:
            for table in self._encoded(name, source, encode):
                for batch in table.to_batches():
                    tokens = batch.column("tokens")
                    writer.append(tokens.flatten().to_numpy(), tokens.value_lengths().to_numpy())
                    sizes.append(batch.column("bytes").to_numpy())
        return np.concatenate(sizes)

    def remove(self) -> None:
        """Delete the temporary text."""
        self._texts = None
        shutil.rmtree(self._scratch)

    def _encoded(self, name: str, source: Source, encode: _Encode) -> Iterable[pa.Table]:
        if isinstance(source, HuggingFaceSource) and source.streaming and self._texts is None:
            return (encode(table) for table in self._drawn(source))
        texts = self._texts if name == "documents" and self._texts is not None else self._spool(name, source)
        workers = self._data.workers or 1
        with _spawned_workers():
            encoded = texts.with_format("arrow").map(
                encode.in_worker() if workers > 1 else encode,
                batched=True,
                batch_size=max(1, min(_BATCH, _BATCH_BYTES * len(texts) // max(1, texts.data.nbytes))),
                remove_columns=["text"],
                num_proc=workers if workers > 1 else None,
                cache_file_name=str(self._scratch / f"{name}-tokens.arrow"),
                new_fingerprint=name,
                desc="Tokenising",
            )
        return (encoded[start : start + _BATCH] for start in range(0, len(encoded), _BATCH))

    def _training_texts(self) -> Iterator[str]:
        self._texts = self._spool("documents", self._data.source)
        chosen = self._texts
        if self._data.validation_source is None:
            train, _ = split_documents(len(chosen), self._data.validation_fraction, self._seed)
            chosen = chosen.select(train)
        return (text for batch in chosen.iter(batch_size=_BATCH) for text in batch["text"])

    def _spool(self, name: str, source: Source) -> datasets.Dataset:
        """The documents of a source as a dataset over a temporary Arrow file."""
        import datasets
        import pyarrow as pa

        path = str(self._scratch / f"{name}.arrow")
        with pa.ipc.new_stream(path, pa.schema([("text", pa.large_string())])) as stream:
            for table in self._drawn(source):
                stream.write_table(table)
        return datasets.Dataset.from_file(path)

    def _drawn(self, source: Source) -> Iterator[pa.Table]:
        """The documents of a source, some at a time."""
        import pyarrow as pa
        from datasets.utils import tqdm

        documents = tqdm(read_documents(source, self._skipped), desc="Reading", unit=" documents")
        for texts in _batched(document.text for document in documents):
            yield pa.table({"text": pa.array(texts, pa.large_string())})


class _Encode:
    """Tokenises an Arrow table of texts; what `datasets` runs, in this process or in a worker."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int | None, single_threaded: bool = False) -> None:
        self._tokenizer = tokenizer
        self._eos_id = eos_id
        self._single_threaded = single_threaded

    def in_worker(self) -> _Encode:
        """The same for one of several processes, each of which keeps to one thread."""
        return _Encode(self._tokenizer, self._eos_id, single_threaded=True)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Column text -> columns tokens (a list per document) and bytes (of the text as UTF-8)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._single_threaded:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the only way to tell `tokenizers`; in the worker's process alone
        encoded = self._tokenizer.encode_batch(table.column("text").to_pylist())
        dtype = token_dtype(self._tokenizer.vocab_size)
        if self._eos_id is not None:
            for tokens in encoded:
                tokens.append(self._eos_id)
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(tokens) for tokens in encoded], out=offsets[1:])
        flat = np.concatenate([np.array(tokens, dtype) for tokens in encoded])
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
        return pa.table({"tokens": lists, "bytes": pc.binary_length(table.column("text")).cast(pa.int64())})


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide the bars of `datasets` unless they are wanted; one who has switched them off keeps them off."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@contextmanager
def _spawned_workers() -> Iterator[None]:
    """Start the workers of `datasets` as fresh processes: a fork of a process with threads (JAX, tokenizers) can deadlock."""
    import multiprocess  # type: ignore[import-untyped] # what `datasets` starts its workers with

    before = multiprocess.get_start_method(allow_none=True)
    multiprocess.set_start_method("spawn", force=True)
    try:
        yield
    finally:
        multiprocess.set_start_method(before, force=True)
