"""Documents to token files: drawn once, split, and tokenised by `datasets` in one process or several.

The text lies in a temporary Arrow file while this runs, so that a source is read once and a tokenizer can be trained before
anything is tokenised.  Only a streamed dataset with a ready tokenizer needs no such file: its documents become tokens as they
arrive, and nothing but tokens is ever stored.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from jaxllm.config.objective import Seq2SeqObjective, SequenceClassificationObjective, TokenClassificationObjective
from jaxllm.config.schema import RunConfig
from jaxllm.config.source import HuggingFaceSource, Source
from jaxllm.data.document import Document, SkipCount
from jaxllm.data.fields import EXAMPLE_OBJECTIVES
from jaxllm.data.sources import read_documents
from jaxllm.data.split import split_documents
from jaxllm.data.token_file import COLUMNS, NO_LABEL, TokenFile, TokenWriter, column_folder, token_dtype
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Ending = Literal["eos", "template", "none"]

# Handed to the tokenizer at once: enough to keep its threads busy, little enough for any machine's memory.
_BATCH = 1000
_BATCH_BYTES = 1 << 24


def ending(config: RunConfig) -> Ending:
    """What is put around a text when it is tokenised; examples get their special tokens when rows are made of them."""
    if config.objective.kind == "causal-lm":
        return "none" if config.data.append_eos is False else "eos"
    return "template" if config.objective.kind == "masked-lm" else "none"


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
        if counts[name]["tokens"] < 2 and not isinstance(config.objective, EXAMPLE_OBJECTIVES):
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
        self._objective = config.objective
        self._ending = ending(config)
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
            assert self._data.tokenizer.train is not None  # noqa: S101 - as above
            tokenizer = Tokenizer.train(
                self._training_texts(),
                self._data.tokenizer.vocab_size,
                self._progress,
                algorithm=self._data.tokenizer.train,
                special_tokens=self._data.tokenizer.convention,
            )
        if self._ending == "eos" and tokenizer.eos_id is None:
            raise ConfigError(
                "data.append_eos",
                f"the tokenizer {self._data.tokenizer.from_} names no end-of-text token to append; set it to false, or name "
                "eos_token in the tokenizer's tokenizer_config.json",
            )
        return tokenizer

    def write(self, name: str, source: Source, tokenizer: Tokenizer) -> NDArray[np.int64]:
        """Tokenise a source into the token file `name`; returns the UTF-8 bytes of each document."""
        encode = _Encode(tokenizer, self._ending, self._objective if isinstance(self._objective, Seq2SeqObjective) else None)
        sizes: list[NDArray[np.int64]] = []
        with ExitStack() as stack:
            writers: dict[str, TokenWriter] = {}
            for table in self._encoded(name, source, encode):
                for batch in table.to_batches():
                    for column in COLUMNS.keys() & set(batch.schema.names):
                        if column not in writers:
                            path = self._folder / column_folder(name, column)
                            writer = TokenWriter(path, tokenizer.vocab_size, COLUMNS[column])
                            writers[column] = stack.enter_context(writer)
                        lists = batch.column(column)
                        writers[column].append(lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().to_numpy())
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
                remove_columns=texts.column_names,
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
        columns = [name for name in ("text", "second") if name in chosen.column_names]
        return (text for batch in chosen.iter(batch_size=_BATCH) for name in columns for text in batch[name])

    def _spool(self, name: str, source: Source) -> datasets.Dataset:
        """The documents of a source as a dataset over a temporary Arrow file."""
        import datasets
        import pyarrow as pa

        path = str(self._scratch / f"{name}.arrow")
        with pa.ipc.new_stream(path, self._schema()) as stream:
            for table in self._drawn(source):
                stream.write_table(table)
        return datasets.Dataset.from_file(path)

    def _drawn(self, source: Source) -> Iterator[pa.Table]:
        """The documents of a source, some at a time."""
        import pyarrow as pa
        from datasets.utils import tqdm

        documents = tqdm(read_documents(source, self._skipped, self._objective), desc="Reading", unit=" documents")
        schema = self._schema()
        for batch in _batched(documents):
            columns = {name: [getattr(document, name) for document in batch] for name in schema.names}
            yield pa.table(columns, schema)

    def _schema(self) -> pa.Schema:
        """What of a document is kept: beyond its text, what an example has."""
        import pyarrow as pa

        objective = self._objective
        kept = {"text": pa.large_string()}
        if isinstance(objective, EXAMPLE_OBJECTIVES):
            kept["origin"] = pa.large_string()
        if isinstance(objective, Seq2SeqObjective) or getattr(self._data.source, "second_field", None) is not None:
            kept["second"] = pa.large_string()
        if isinstance(objective, TokenClassificationObjective):
            kept["words"] = pa.list_(pa.large_string())
        if isinstance(objective, TokenClassificationObjective | SequenceClassificationObjective):
            kept["labels"] = pa.list_(pa.float32())
        return pa.schema(list(kept.items()))


class _Encode:
    """Tokenises an Arrow table of texts; what `datasets` runs, in this process or in a worker.

    ending: `eos` puts the end-of-text token after each text, `template` what the tokenizer puts around one, `none` nothing.
    pairs: of sources and targets.  The text of targets is kept, since what a model writes is compared with it and not with its
    tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, ending: Ending, pairs: Seq2SeqObjective | None, *, single_threaded: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._ending = ending
        self._pairs = pairs
        self._single_threaded = single_threaded

    def in_worker(self) -> _Encode:
        """The same for one of several processes, each of which keeps to one thread."""
        return _Encode(self._tokenizer, self._ending, self._pairs, single_threaded=True)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Documents -> columns tokens (a list per document), bytes (of the text as UTF-8), and what examples have besides."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._single_threaded:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the only way to tell `tokenizers`; in the worker's process alone
        names = table.column_names
        columns: dict[str, Any] = {"bytes": pc.binary_length(table.column("text")).cast(pa.int64())}
        if "words" in names:
            columns |= self._encode_words(table)
        else:
            columns["tokens"] = self._lists(self._encode(table.column("text").to_pylist()))
        if "second" in names:
            columns["second"] = self._lists(self._tokenizer.encode_batch(table.column("second").to_pylist()))
        if "labels" in names and "labels" not in columns:
            columns["labels"] = table.column("labels").combine_chunks()
        if "origin" in names:
            columns["origins"] = self._bytes(table.column("origin"))
        if self._pairs is not None:
            columns["references"] = self._bytes(table.column("second"))
        return pa.table(columns)

    def _bytes(self, texts: pa.ChunkedArray) -> pa.LargeListArray:
        """Texts themselves, as UTF-8."""
        return self._lists([np.frombuffer(text.encode(), np.uint8) for text in texts.to_pylist()], np.uint8)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._pairs is not None:
            texts = [self._pairs.prefix + text for text in texts]
        encoded = self._tokenizer.encode_batch(texts)
        if self._ending == "eos":
            for tokens in encoded:
                tokens.append(self._tokenizer.eos_id or 0)
        elif self._ending == "template":
            encoded = [self._tokenizer.single_template.apply(tokens)[0] for tokens in encoded]
        return encoded

    def _encode_words(self, table: pa.Table) -> dict[str, Any]:
        """Tokens, and a label for each: the word's at its first token, NO_LABEL at the others."""
        encoded = self._tokenizer.encode_words(table.column("words").to_pylist())
        labels = []
        for (_, word_ids), of_words in zip(encoded, table.column("labels").to_pylist(), strict=True):
            firsts = [number != before for number, before in zip(word_ids, [None, *word_ids[:-1]], strict=True)]
            labels.append(
                [of_words[w] if first and w is not None else NO_LABEL for w, first in zip(word_ids, firsts, strict=True)]
            )
        return {"tokens": self._lists([tokens for tokens, _ in encoded]), "labels": self._lists(labels, np.float32)}

    def _lists(self, values: Sequence[Sequence[Any] | NDArray[Any]], dtype: DTypeLike | None = None) -> pa.LargeListArray:
        """Lists of different lengths as an Arrow array.  dtype: default, the tokens'."""
        import pyarrow as pa

        dtype = token_dtype(self._tokenizer.vocab_size) if dtype is None else dtype
        offsets = np.zeros(len(values) + 1, np.int64)
        np.cumsum([len(each) for each in values], out=offsets[1:])
        flat = np.concatenate([np.array(each, dtype) for each in values])
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + len(document.second or "")
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
