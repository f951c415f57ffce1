"""The `source` sections: where documents and examples come from."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from jaxllm.config.section import Positive, Section


class PythonSource(Section):
    """The standard library of the running Python: real text on every machine, one document per module."""

    kind: Literal["python-source"] = Field("python-source", description="The standard library of the running Python.")
    max_documents: Positive | None = Field(None, description="Use only the first N documents.")


class FileSource(Section):
    """Fields of every source that reads files."""

    files: tuple[str, ...] = Field(
        ...,
        min_length=1,
        description="Paths and globs, relative to the working directory; one, or a list.",
        json_schema_extra={"type": ["array", "string"]},
    )
    max_documents: Positive | None = Field(None, description="Use only the first N documents.")

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value


class Columns(Section):
    """Which fields of a row an example is made of; beyond `text_field`, what the objective asks for."""

    text_field: str = Field("text", description="The field that holds the text, or its list of words.")
    second_field: str | None = Field(None, description="sequence-classification: the second text of a pair.")
    target_field: str | None = Field(None, description="seq2seq: the text to be written.")
    label_field: str | None = Field(None, description="The label, several labels, a number, or a label for every word.")


class TextSource(FileSource):
    """Plain text files."""

    kind: Literal["text"] = Field(..., description="Plain text files.")
    document: Literal["file", "line", "paragraph"] = Field("file", description="What one document is.")


class ParallelTextSource(FileSource):
    """Pairs of text files whose lines belong together: line i of the target is what seq2seq writes for line i of the source."""

    kind: Literal["parallel-text"] = Field(..., description="Line-aligned text files, for seq2seq.")
    target_files: tuple[str, ...] = Field(
        ...,
        min_length=1,
        description="The files of the targets, in the order of `files`.",
        json_schema_extra={"type": ["array", "string"]},
    )

    @field_validator("target_files", mode="before")
    @classmethod
    def _one_or_many_targets(cls, value: object) -> object:
        return cls._one_or_many(value)


class JsonlSource(Columns, FileSource):
    """JSON Lines files: one object per line."""

    kind: Literal["jsonl"] = Field(..., description="JSON Lines files.")
    skip_broken: bool = Field(False, description="Skip and count broken lines instead of stopping at the first.")


class CsvSource(Columns, FileSource):
    """CSV files with a header row."""

    kind: Literal["csv"] = Field(..., description="CSV files.")
    delimiter: str = Field(",", min_length=1, max_length=1, description="The character between two columns.")


class TsvSource(Columns, FileSource):
    """Files of tab-separated columns with a header row, without quoting: a quotation mark is a character like any other."""

    kind: Literal["tsv"] = Field(..., description="Tab-separated files without quoting, as those of GLUE.")


class ParquetSource(Columns, FileSource):
    """Parquet files."""

    kind: Literal["parquet"] = Field(..., description="Parquet files.")


class HuggingFaceSource(Columns, Section):
    """Any dataset that `datasets.load_dataset` opens: a hub name or a local folder."""

    kind: Literal["huggingface"] = Field(..., description="A dataset that `datasets.load_dataset` opens.")
    name: str = Field(..., description="Hub name or local folder.")
    subset: str | None = Field(None, description="Configuration of the dataset, where it has several.")
    split: str = Field("train", description="Split to read, for example `train` or `train[:10%]`.")
    revision: str | None = Field(None, description="Branch, tag or commit; pin it to read the same data for ever.")
    streaming: bool = Field(False, description="Read over the network as needed instead of downloading the whole dataset.")
    max_documents: Positive | None = Field(None, description="Use only the first N documents.")


Source: TypeAlias = Annotated[
    PythonSource | TextSource | ParallelTextSource | JsonlSource | CsvSource | TsvSource | ParquetSource | HuggingFaceSource,
    Field(discriminator="kind"),
]
TableSource: TypeAlias = JsonlSource | CsvSource | TsvSource | ParquetSource | HuggingFaceSource
