"""Every kind of source, what it yields and what it says when it cannot."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from jaxllm.config.source import Source
from jaxllm.data.document import Document, SkipCount
from jaxllm.data.sources import read_documents
from jaxllm.errors import DataError


def read(kind: str, skipped: SkipCount | None = None, **keys: Any) -> list[Document]:
    source: Any = TypeAdapter(Source).validate_python({"kind": kind, **keys})
    return list(read_documents(source, skipped or SkipCount()))


def contents(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def message(kind: str, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(kind, **keys)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------------- python-source


def test_python_source_is_the_standard_library_in_a_fixed_order() -> None:
    documents = read("python-source")
    origins = [document.origin for document in documents]
    assert len(documents) > 300
    assert any(origin.endswith("/argparse.py") for origin in origins)
    assert any(origin.endswith("/json/decoder.py") for origin in origins)
    for part in ("site-packages", "/test/", "/tests/", "/idle_test/", "_sysconfigdata", "/config-"):
        assert not [origin for origin in origins if part in origin]
    assert origins == [document.origin for document in read("python-source")]
    assert len(set(origins)) == len(origins)


def test_python_source_takes_the_first_documents() -> None:
    assert contents(read("python-source", max_documents=5)) == contents(read("python-source"))[:5]


# ---------------------------------------------------------------------------------------------------------------- text


def test_text_files_are_documents(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "\ufeffsecond\n")
    write(tmp_path / "a.txt", "first\r\nline\n")
    documents = read("text", files=str(tmp_path / "*.txt"))
    assert documents == [
        Document("first\r\nline\n", str(tmp_path / "a.txt")),
        Document("second\n", str(tmp_path / "b.txt")),
    ]


def test_text_lines_and_paragraphs_know_where_they_begin(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\r\ntwo\n\n  \nthree\nfour")
    assert read("text", files=path, document="line") == [
        Document("one", f"{path}:1"),
        Document("two", f"{path}:2"),
        Document("three", f"{path}:5"),
        Document("four", f"{path}:6"),
    ]
    assert read("text", files=path, document="paragraph") == [
        Document("one\ntwo", f"{path}:1"),
        Document("three\nfour", f"{path}:5"),
    ]


def test_files_keep_the_order_of_the_patterns_and_come_once(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c", "x[1]"):
        write(tmp_path / f"{name}.txt", name)
    files = [str(tmp_path / "b.txt"), str(tmp_path / "**/*.txt"), str(tmp_path / "x[1].txt")]
    assert contents(read("text", files=files)) == ["b", "a", "sub/c", "x[1]"]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files_are_unpacked(tmp_path: Path, suffix: str, pack: Any) -> None:
    path = write(tmp_path / f"a.txt{suffix}", pack(b"one\ntwo\n"))
    assert contents(read("text", files=path, document="line")) == ["one", "two"]
    damaged = write(tmp_path / f"b.txt{suffix}", pack(b"one\ntwo\n" * 100)[:-9])
    assert damaged in message("text", files=damaged)


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\n \t\ntwo\n")
    skipped = SkipCount()
    assert contents(read("text", skipped, files=path, document="line")) == ["one", "two"]
    assert skipped == SkipCount(broken=0, empty=2)


def test_text_errors_name_the_file(tmp_path: Path) -> None:
    assert "there is no file" in message("text", files=str(tmp_path / "no.txt"))
    assert str(tmp_path / "no.txt") in message("text", files=str(tmp_path / "no.txt"))
    assert "matches no file" in message("text", files=str(tmp_path / "*.none"))
    assert "is a folder" in message("text", files=str(tmp_path))
    latin = write(tmp_path / "latin.txt", "caf\xe9".encode("latin-1"))
    for document in ("file", "line", "paragraph"):
        assert message("text", files=latin, document=document) == f"{latin} is not UTF-8 text (byte 0xe9); convert it to UTF-8"
    empty = write(tmp_path / "empty.txt", "")
    assert message("text", files=empty) == f"{empty} holds no document with any text"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path / "secret.txt", "text")
    Path(path).chmod(0)
    assert message("text", files=path) == f"cannot read {path}: Permission denied"


# --------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "one", "n": 1}\n\n{"body": "t\\u00e9"}\r\n')
    assert read("jsonl", files=path, text_field="body") == [Document("one", f"{path}:1"), Document("té", f"{path}:3")]


BROKEN = {
    '{"text": "a"': "is not valid JSON",
    "[1, 2]": "holds a JSON list, not an object",
    '{"body": "a", "id": 1}': "has no field 'text' (it has 'body', 'id')",
    '{"text": null}': "has null in field 'text'",
    '{"text": 3}': "has int in field 'text', not a string",
    '{"text": "\\ud800"}': "has half a surrogate pair in field 'text'",
    b'{"text": "\xff"}': "is not UTF-8 at byte 10",
    "[" * 100_000: "is not valid JSON",
}


@pytest.mark.parametrize(("line", "reason"), BROKEN.items(), ids=range(len(BROKEN)))
def test_broken_jsonl_line_is_named_or_skipped_and_counted(tmp_path: Path, line: str | bytes, reason: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + raw + b'\n{"text": "more"}\n')
    text = message("jsonl", files=path)
    assert text.startswith(f"{path}:2 {reason}")
    assert "skip_broken: true" in text
    skipped = SkipCount()
    assert contents(read("jsonl", skipped, files=path, skip_broken=True)) == ["good", "more"]
    assert skipped.broken == 1


def test_jsonl_of_broken_lines_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "nonsense\n")
    assert message("jsonl", files=path, skip_broken=True) == (
        f"{path} holds no document with any text (1 broken lines were skipped)"
    )


# ----------------------------------------------------------------------------------------------------------------- csv


def test_csv(tmp_path: Path) -> None:
    long = "x" * 200_000  # above the default limit of Python's csv module
    path = write(tmp_path / "a.csv", f'id;text\n1;"two\nlines; ""quoted"""\n2;\n3;{long}\n')
    skipped = SkipCount()
    documents = read("csv", skipped, files=path, delimiter=";")
    assert contents(documents) == ['two\nlines; "quoted"', long]
    assert skipped.empty == 1
    assert documents[1].origin == f"{path}:5"


def test_csv_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,body\n1,one\n")
    assert message("csv", files=path) == (
        f"{path} has no column 'text' (it has 'id', 'body'); name one of these with text_field"
    )
    assert "has no column 'text' (it has none)" in message("csv", files=write(tmp_path / "empty.csv", ""))
    broken = write(tmp_path / "broken.csv", 'id,text\n1,"open\n')
    assert message("csv", files=broken).startswith(f"{broken}:2 is not valid CSV")


# ------------------------------------------------------------------------------------------------------------- parquet


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3], "text": pa.array(["one", None, "three"], kind)}), path, row_group_size=2)
    skipped = SkipCount()
    assert read("parquet", skipped, files=str(path)) == [Document("one", f"{path}[0]"), Document("three", f"{path}[2]")]
    assert skipped.empty == 1


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), path)
    assert "has no column 'text' (it has 'n', 'body')" in message("parquet", files=str(path))
    assert "the column 'n' holds int64, not text" in message("parquet", files=str(path), text_field="n")
    damaged = write(tmp_path / "b.parquet", path.read_bytes()[:-20])
    assert message("parquet", files=damaged).startswith(f"{damaged} cannot be read as Parquet")


# --------------------------------------------------------------------------------------------------------- huggingface


@pytest.fixture
def dataset_folder(tmp_path: Path) -> str:
    rows = [{"text": f"document {number}", "n": number} for number in range(2500)] + [{"text": None, "n": 1}]
    write(tmp_path / "set/train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "set")


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_local_folder(dataset_folder: str, streaming: bool) -> None:
    skipped = SkipCount()
    documents = read("huggingface", skipped, name=dataset_folder, streaming=streaming)
    assert contents(documents) == [f"document {number}" for number in range(2500)]
    assert documents[7].origin == f"{dataset_folder}[7]"
    assert skipped.empty == 1
    first = read("huggingface", name=dataset_folder, streaming=streaming, max_documents=3)
    assert contents(first) == ["document 0", "document 1", "document 2"]


@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_errors(dataset_folder: str, streaming: bool, tmp_path: Path) -> None:
    keys = {"name": dataset_folder, "streaming": streaming}
    assert "has no column 'body' (it has 'text', 'n')" in message("huggingface", text_field="body", **keys)
    assert f"{dataset_folder}[0] has int in column 'n', not text; correct or remove the row" == message(
        "huggingface", text_field="n", **keys
    )
    assert "cannot open the dataset" in message("huggingface", split="nosuch", **keys)
    assert "cannot open the dataset" in message("huggingface", name=str(tmp_path / "none"), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_out_of_reach(tmp_path: Path, streaming: bool) -> None:
    """In a process of its own, because the hub's libraries read at import whether they may use the network."""
    script = """
import sys
from pathlib import Path
from jaxllm.config.source import HuggingFaceSource
from jaxllm.data.content import FileDigests, source_digest
from jaxllm.data.document import SkipCount
from jaxllm.data.sources import read_documents
from jaxllm.errors import DataError
source = HuggingFaceSource(kind="huggingface", name="someone/nothing", streaming=sys.argv[1] == "True")
for action in (lambda: list(read_documents(source, SkipCount())), lambda: source_digest(source, FileDigests(Path("none")))):
    try:
        action()
    except DataError as error:
        print(error)
pinned = source.model_copy(update={"revision": "0123456789abcdef0123456789abcdef01234567", "streaming": True})
print(source_digest(pinned, FileDigests(Path("none"))))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script, str(streaming)], check=False, capture_output=True, text=True, env=environment, timeout=60
    )
    assert run.returncode == 0, run.stderr
    read_error, digest_error, pinned = run.stdout.splitlines()
    assert read_error.startswith("cannot open the dataset someone/nothing (split train): ")
    assert "someone/nothing" in digest_error
    assert pinned == "0123456789abcdef0123456789abcdef01234567"
