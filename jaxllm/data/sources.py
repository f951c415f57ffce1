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
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO, Any

from jaxllm.config.objective import CausalLmObjective, ObjectiveConfig
from jaxllm.config.source import (
    CsvSource,
    FileSource,
    HuggingFaceSource,
    JsonlSource,
    ParallelTextSource,
    ParquetSource,
    PythonSource,
    Source,
    TextSource,
    TsvSource,
)
from jaxllm.data.document import Document, SkipCount
from jaxllm.data.fields import Fields
from jaxllm.errors import DataError

_ROWS = 1000
_PLAIN = CausalLmObjective()
# The codecs of `encodings` and the topics of `pydoc_data` are tables that programs wrote, a fifth of all tokens.
_TABLES = frozenset({"encodings", "pydoc_data"})
_NOT_LIBRARY = _TABLES | {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_documents(source: Source, skipped: SkipCount, objective: ObjectiveConfig = _PLAIN) -> Iterator[Document]:
    """The documents of a source, in an order that depends on the source alone; counts what is left out in `skipped`.

    objective: decides which fields of a table make an example.  DataError when a file cannot be read, a field is missing or
    holds what it should not, or there is no document at all.
    """
    documents = (document for document in _read(source, skipped, objective) if _has_text(document, skipped))
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
    files = _expand_all(source.files)
    return [*files, *_expand_all(source.target_files)] if isinstance(source, ParallelTextSource) else files


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


def _read(source: Source, skipped: SkipCount, objective: ObjectiveConfig) -> Iterator[Document]:
    match source:
        case PythonSource():
            return _python(skipped)
        case TextSource():
            return _each(source, lambda path: _text(path, source.document))
        case ParallelTextSource():
            return _parallel(source)
    fields = Fields.of(source, objective)
    match source:
        case JsonlSource():
            return _each(source, lambda path: _jsonl(path, source, fields, skipped))
        case CsvSource():
            return _each(source, lambda path: _csv(path, fields, {"delimiter": source.delimiter, "strict": True}))
        case TsvSource():
            return _each(source, lambda path: _csv(path, fields, {"delimiter": "\t", "quoting": csv.QUOTE_NONE}))
        case ParquetSource():
            return _each(source, lambda path: _parquet(path, fields))
        case HuggingFaceSource():
            return _huggingface(source, fields)


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


def _parallel(source: ParallelTextSource) -> Iterator[Document]:
    """Line i of each file with line i of its target file."""
    texts, targets = _expand_all(source.files), _expand_all(source.target_files)
    if len(texts) != len(targets):
        raise DataError(f"{len(texts)} files of sources and {len(targets)} of targets do not pair; give as many of each")
    for path, target in zip(texts, targets, strict=True):
        with (
            _readable(path),
            _open_text(path, newline=None) as lines,
            _readable(target),
            _open_text(target, newline=None) as others,
        ):
            for number, pair in enumerate(zip_longest(lines, others), 1):
                if None in pair:
                    shorter, longer = (path, target) if pair[0] is None else (target, path)
                    raise DataError(f"{shorter} ends before line {number} of {longer}; the lines of both must belong together")
                text, second = (line.rstrip("\n") for line in pair)
                for file, line in ((path, text), (target, second)):
                    if not line or line.isspace():
                        raise DataError(f"{file}:{number} has no text; remove the line from both files")
                yield Document(text, f"{path}:{number}", second=second)


def _jsonl(path: Path, source: JsonlSource, fields: Fields, skipped: SkipCount) -> Iterator[Document]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                document = _jsonl_document(line, fields, origin)
            except ValueError as error:
                if not source.skip_broken:
                    raise DataError(f"{origin} {error}; correct it, or set skip_broken: true to pass over it") from None
                skipped.broken += 1
                continue
            yield document


def _jsonl_document(line: bytes, fields: Fields, origin: str) -> Document:
    """The document of one line; ValueError with what is wrong, as the end of a sentence."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"holds a JSON {type(row).__name__}, not an object")  # noqa: TRY004 - a broken line, not a bug
    for field in fields.names:
        if field not in row:
            raise ValueError(f"has no field {field!r} (it has {_listed(row)})")
        if row[field] is None:
            raise ValueError(f"has null in field {field!r}")
    return fields.document(row, origin, column="field", text="a string")


def _csv(path: Path, fields: Fields, dialect: dict[str, Any]) -> Iterator[Document]:
    # The default limit of 128 KiB per cell is shorter than many documents; the limit is the process's own.
    csv.field_size_limit(2**31 - 1)
    with _open_text(path, newline="") as lines:
        rows = csv.DictReader(lines, **dialect)
        try:
            _require(str(path), fields, rows.fieldnames or ())
            for row in rows:
                yield _document(fields, row, f"{path}:{rows.line_num}")
        except csv.Error as error:
            raise DataError(f"{path}:{rows.reader.line_num} is not valid CSV: {error}") from None


def _parquet(path: Path, fields: Fields) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        _require(str(path), fields, schema.names)
        kind = schema.field(fields.text).type
        if not fields.words and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: the column {fields.text!r} holds {kind}, not text; name a text column with text_field")
        row = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=list(fields.names)):
            for values in batch.to_pylist():
                yield _document(fields, values, f"{path}[{row}]")
                row += 1
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {_first_line(error)}") from None


def _huggingface(source: HuggingFaceSource, fields: Fields) -> Iterator[Document]:
    for number, row in enumerate(_huggingface_rows(source, fields)):
        yield _document(fields, row, f"{source.name}[{number}]")


def _huggingface_rows(source: HuggingFaceSource, fields: Fields) -> Iterator[dict[str, Any]]:
    dataset = load_huggingface(source)
    where = f"the dataset {source.name} (split {source.split})"
    names = list(fields.names)
    if dataset.column_names is not None:
        _require(where, fields, dataset.column_names)
        dataset = dataset.select_columns(names)
    try:
        for rows in dataset.iter(batch_size=_ROWS):
            _require(where, fields, rows)
            for values in zip(*(rows[name] for name in names), strict=True):
                yield dict(zip(names, values, strict=True))
    except (GeneratorExit, DataError):
        raise
    except Exception as error:  # noqa: BLE001 - a stream can fail anywhere: network, decoding, a damaged shard
        raise DataError(f"reading {where} failed: {_first_line(error)}") from None


def _document(fields: Fields, row: dict[str, Any], origin: str) -> Document:
    try:
        return fields.document(row, origin)
    except ValueError as error:
        raise DataError(f"{origin} {error}; correct or remove the row") from None


def _require(where: str, fields: Fields, there: Any) -> None:
    """DataError unless every field is there."""
    for name in fields.names:
        if name not in there:
            raise _missing(where, "column", name, there, "text_field" if name == fields.text else "the source's keys")


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


def _expand_all(patterns: tuple[str, ...]) -> list[Path]:
    return list(dict.fromkeys(path for pattern in patterns for path in _expand(pattern)))


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


def _missing(where: str, what: str, name: str, there: Any, key: str = "text_field") -> DataError:
    return DataError(f"{where} has no {what} {name!r} (it has {_listed(there)}); name one of these with {key}")


def _listed(names: Any, limit: int = 8) -> str:
    shown = [repr(name) for name in islice(names, limit + 1)]
    return ", ".join([*shown[:limit], "..."] if len(shown) > limit else shown) or "none"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
