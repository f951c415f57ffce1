"""The documents of every kind of source, one after the other, with where each came from.

Documents without any text are left out; what is broken ends the run with one sentence that names the file.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from jaxllm.config.schema import (
    CsvSource,
    FileSource,
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    PythonSource,
    Source,
    TextSource,
)
from jaxllm.errors import DataError

_ROWS = 1000
# The codecs of `encodings` and the topics of `pydoc_data` are tables that programs wrote, a fifth of all tokens.
_TABLES = frozenset({"encodings", "pydoc_data"})
_NOT_LIBRARY = _TABLES | {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """text: never empty.  origin: where it came from, for messages: `FILE`, `FILE:LINE` or `DATASET[ROW]`."""

    text: str
    origin: str


@dataclass
class SkipCount:
    """What was left out.  broken: lines that `skip_broken` passed over.  empty: documents without any text."""

    broken: int = 0
    empty: int = 0


def read_documents(source: Source, skipped: SkipCount) -> Iterator[Document]:
    """The documents of a source, in an order that depends on the source alone; counts what is left out in `skipped`.

    DataError when a file cannot be read, a field is missing, or there is no document at all.
    """
    documents = (document for document in _read(source, skipped) if _has_text(document, skipped))
    count = 0
    for document in islice(documents, source.max_documents):
        count += 1
        yield document
    if count == 0:
        broken = f" ({skipped.broken} broken lines were skipped)" if skipped.broken else ""
        raise DataError(f"{describe(source)} holds no document with any text{broken}")


def describe(source: Source) -> str:
    """The source in a few words, for messages."""
    match source:
        case PythonSource():
            return f"the Python standard library at {_library_folder()}"
        case HuggingFaceSource():
            return f"the dataset {source.name} (split {source.split})"
        case _:
            return ", ".join(source.files)


def source_files(source: FileSource | PythonSource) -> list[Path]:
    """The files of a source: of every path or glob in the order given, each glob sorted, no file twice.

    DataError when a path does not exist or a glob matches nothing.
    """
    if isinstance(source, PythonSource):
        return _library_files()
    files = [path for pattern in source.files for path in _expand(pattern)]
    return list(dict.fromkeys(files))


def load_huggingface(source: HuggingFaceSource) -> Any:
    """The `datasets.Dataset` (or `IterableDataset` when streaming) of a source, checked to have its text column."""
    import datasets

    try:
        dataset = datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:  # noqa: BLE001 - every dataset fails in its own way
        raise DataError(f"cannot open the dataset {source.name} (split {source.split}): {_first_line(error)}") from None
    columns = dataset.column_names
    if columns is not None and source.text_field not in columns:
        raise _missing(f"the dataset {source.name} (split {source.split})", "column", source.text_field, columns)
    return dataset


# --------------------------------------------------------------------------------------------------------- one per kind


def _read(source: Source, skipped: SkipCount) -> Iterator[Document]:
    match source:
        case PythonSource():
            return _python(skipped)
        case TextSource():
            return _each(source, lambda path: _text(path, source.document))
        case JsonlSource():
            return _each(source, lambda path: _jsonl(path, source, skipped))
        case CsvSource():
            return _each(source, lambda path: _csv(path, source))
        case ParquetSource():
            return _each(source, lambda path: _parquet(path, source.text_field))
        case HuggingFaceSource():
            return _huggingface(source)


def _each(source: FileSource, read: Callable[[Path], Iterator[Document]]) -> Iterator[Document]:
    for path in source_files(source):
        with _readable(path):
            yield from read(path)


def _python(skipped: SkipCount) -> Iterator[Document]:
    for path in _library_files():
        try:
            with tokenize.open(path) as file:  # decodes as Python does: by the file's coding line
                yield Document(file.read(), str(path))
        except (SyntaxError, UnicodeDecodeError):
            skipped.broken += 1
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _text(path: Path, unit: str) -> Iterator[Document]:
    if unit == "file":
        with _open(path) as stream:
            yield Document(stream.read().decode("utf-8-sig"), str(path))
        return
    with _open_text(path, newline=None) as lines:
        if unit == "line":
            for number, line in enumerate(lines, 1):
                yield Document(line.rstrip("\n"), f"{path}:{number}")
            return
        block: list[str] = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                block.append(line)
            elif block:
                yield Document("".join(block).rstrip("\n"), f"{path}:{number - len(block)}")
                block = []
        if block:
            yield Document("".join(block).rstrip("\n"), f"{path}:{number - len(block) + 1}")


def _jsonl(path: Path, source: JsonlSource, skipped: SkipCount) -> Iterator[Document]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = _jsonl_text(line, source.text_field)
            except ValueError as error:
                if not source.skip_broken:
                    raise DataError(f"{path}:{number} {error}; correct it, or set skip_broken: true to pass over it") from None
                skipped.broken += 1
                continue
            yield Document(text, f"{path}:{number}")


def _jsonl_text(line: bytes, field: str) -> str:
    """The text of one line; ValueError with what is wrong, as the end of a sentence."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"holds a JSON {type(row).__name__}, not an object")  # noqa: TRY004 - a broken line, not a bug
    if field not in row:
        raise ValueError(f"has no field {field!r} (it has {_listed(row)})")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"has {type(text).__name__} in field {field!r}, not a string")  # noqa: TRY004
    if not _is_unicode(text):
        raise ValueError(f"has half a surrogate pair in field {field!r}")
    return text


def _csv(path: Path, source: CsvSource) -> Iterator[Document]:
    # The default limit of 128 KiB per cell is shorter than many documents; the limit is the process's own.
    csv.field_size_limit(2**31 - 1)
    with _open_text(path, newline="") as lines:
        rows = csv.DictReader(lines, delimiter=source.delimiter, strict=True)
        try:
            if source.text_field not in (rows.fieldnames or ()):
                raise _missing(str(path), "column", source.text_field, rows.fieldnames or ())
            for row in rows:
                yield Document(row[source.text_field] or "", f"{path}:{rows.line_num}")
        except csv.Error as error:
            raise DataError(f"{path}:{rows.reader.line_num} is not valid CSV: {error}") from None


def _parquet(path: Path, field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        if field not in schema.names:
            raise _missing(str(path), "column", field, schema.names)
        kind = schema.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: the column {field!r} holds {kind}, not text; name a text column with text_field")
        row = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
            for text in batch.column(0).to_pylist():
                yield Document(text or "", f"{path}[{row}]")
                row += 1
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {_first_line(error)}") from None


def _huggingface(source: HuggingFaceSource) -> Iterator[Document]:
    rows = _huggingface_rows(source)
    for number, text in enumerate(rows):
        origin = f"{source.name}[{number}]"
        if text is not None and not isinstance(text, str):
            raise DataError(f"{origin} has {type(text).__name__} in column {source.text_field!r}, not text")
        yield Document(text or "", origin)


def _huggingface_rows(source: HuggingFaceSource) -> Iterator[Any]:
    dataset = load_huggingface(source)
    if dataset.column_names is not None:
        dataset = dataset.select_columns([source.text_field])
    try:
        for rows in dataset.iter(batch_size=_ROWS):
            if source.text_field not in rows:
                raise _missing(f"the dataset {source.name} (split {source.split})", "column", source.text_field, rows)
            yield from rows[source.text_field]
    except (GeneratorExit, DataError):
        raise
    except Exception as error:  # noqa: BLE001 - a stream can fail anywhere: network, decoding, a damaged shard
        raise DataError(f"reading the dataset {source.name} (split {source.split}) failed: {_first_line(error)}") from None


# --------------------------------------------------------------------------------------------------------------- files


def _library_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _library_files() -> list[Path]:
    """Every module of the standard library but tests and tables, sorted by name and not by the order of the file system."""
    folder = _library_folder()
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY and not name.startswith("config-")]
        # _sysconfigdata* records how and where this Python was built.
        found += [Path(parent, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise DataError(f"{pattern} is a folder, not a file; name its files, for example {path / '*'}")
    if not glob.has_magic(pattern):
        raise DataError(f"there is no file {pattern}; correct the path (relative ones start in the working directory)")
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 - takes absolute patterns
    files = [match for match in matches if match.is_file()]
    if not files:
        raise DataError(f"the pattern {pattern} matches no file; correct it (relative ones start in the working directory)")
    return files


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    """A file as bytes, unpacked by its suffix."""
    match path.suffix:
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case _:
            return path.open("rb")


def _open_text(path: Path, newline: str | None) -> IO[str]:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline=newline)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what reading a file can raise into one sentence that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x}); convert it to UTF-8") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _has_text(document: Document, skipped: SkipCount) -> bool:
    if not document.text or document.text.isspace():
        skipped.empty += 1
        return False
    return True


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _missing(where: str, what: str, name: str, there: Any) -> DataError:
    return DataError(f"{where} has no {what} {name!r} (it has {_listed(there)}); name one of these with text_field")


def _listed(names: Any, limit: int = 8) -> str:
    shown = [repr(name) for name in islice(names, limit + 1)]
    return ", ".join([*shown[:limit], "..."] if len(shown) > limit else shown) or "none"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
