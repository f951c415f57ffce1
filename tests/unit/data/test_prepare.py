"""Prepared data: what it holds, when it is made anew, and that processes do not get in each other's way."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config.schema import RunConfig
from jaxllm.data import prepare as module
from jaxllm.data import tokenize
from jaxllm.data.content import FileDigests
from jaxllm.data.document import Document
from jaxllm.data.prepare import PreparedData, PreparedSplit, prepare
from jaxllm.data.split import split_documents
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import ConfigError, DataError

MakeConfig = Callable[..., RunConfig]


def documents(split: PreparedSplit) -> list[list[int]]:
    offsets = split.file.offsets
    return [split.file.tokens[offsets[number] : offsets[number + 1]].tolist() for number in split.documents]


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were prepared and not found."""
    built: list[Path] = []
    real = module._build_into

    def counting(folder: Path, config: RunConfig, progress: bool) -> None:
        built.append(folder)
        real(folder, config, progress)

    monkeypatch.setattr(module, "_build_into", counting)
    return built


# ------------------------------------------------------------------------------------------------------------- content


def test_tokens_counts_and_split(make_config: MakeConfig, texts: list[str]) -> None:
    config = make_config()
    prepared = prepare(config, progress=False)
    train, validation = split_documents(len(texts), 0.2, seed=0)
    tokenizer = Tokenizer.train([texts[number] for number in train], 400)
    assert prepared.tokenizer.backend.to_str() == tokenizer.backend.to_str()
    assert prepared.vocab_size == 400
    for split, numbers in ((prepared.train, train), (prepared.validation, validation)):
        expected = [[*tokenizer.encode(texts[number]), 0] for number in numbers]
        assert documents(split) == expected
        assert split.documents.size == numbers.size
        assert split.tokens == sum(map(len, expected))
        assert split.bytes == sum(len(texts[number].encode()) for number in numbers)
    counts = Counter(token for document in documents(prepared.validation) for token in document)
    shares = [count / prepared.validation.tokens for count in counts.values()]
    assert prepared.unigram_entropy == pytest.approx(-sum(share * math.log(share) for share in shares), rel=1e-12)
    stored = json.loads((prepared.folder / "prepared.json").read_text())
    assert stored["train"]["tokens"] == prepared.train.tokens


def test_without_end_of_text_token(make_config: MakeConfig) -> None:
    with_eos = prepare(make_config(), progress=False)
    without = prepare(make_config(append_eos=False), progress=False)
    assert documents(without.train) == [document[:-1] for document in documents(with_eos.train)]


def test_validation_source(make_config: MakeConfig, texts: list[str], tmp_path: Path) -> None:
    held_out = write_lines(tmp_path / "held_out.jsonl", texts[:3])
    prepared = prepare(make_config(validation_source={"kind": "jsonl", "files": held_out}), progress=False)
    assert prepared.train.documents.size == len(texts)
    assert [prepared.tokenizer.decode(document[:-1]) for document in documents(prepared.validation)] == texts[:3]
    assert [prepared.tokenizer.decode(document[:-1]) for document in documents(prepared.train)] == texts


def test_tokenizer_from_a_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    first = prepare(make_config(), progress=False)
    first.tokenizer.save(tmp_path / "tokenizer")
    again = prepare(make_config(tokenizer={"from": str(tmp_path / "tokenizer")}), progress=False)
    assert again.fingerprint != first.fingerprint
    assert documents(again.train) == documents(first.train)


def test_workers_give_the_same_tokens(make_config: MakeConfig, tmp_path: Path) -> None:
    one = prepare(make_config(), progress=False)
    two = prepare(make_config(workers=2, cache_dir=str(tmp_path)), progress=False)
    assert two.folder != one.folder
    assert two.fingerprint == one.fingerprint
    assert np.array_equal(two.train.file.tokens, one.train.file.tokens)
    assert np.array_equal(two.train.file.offsets, one.train.file.offsets)


def test_left_out_documents_are_counted(make_config: MakeConfig, texts: list[str], tmp_path: Path) -> None:
    path = Path(write_lines(tmp_path / "some.jsonl", [*texts, " ", ""]))
    path.write_text(path.read_text() + "broken\n")
    prepared = prepare(make_config(source={"kind": "jsonl", "files": str(path), "skip_broken": True}), progress=False)
    assert (prepared.empty_documents, prepared.skipped_lines) == (2, 1)


@pytest.mark.parametrize("trained", [False, True])
def test_streaming_stores_only_tokens(make_config: MakeConfig, texts: list[str], tmp_path: Path, trained: bool) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", texts)
    local = prepare(make_config(), progress=False)
    keys: dict[str, Any] = {"source": {"kind": "huggingface", "name": str(tmp_path / "set"), "streaming": True}}
    if not trained:
        keys["tokenizer"] = {"from": str(local.folder / "tokenizer")}
    prepared = prepare(make_config(cache_dir=str(tmp_path / "cache"), **keys), progress=False)
    assert documents(prepared.train) == documents(local.train)
    assert documents(prepared.validation) == documents(local.validation)
    kept = {path.relative_to(prepared.folder).as_posix() for path in prepared.folder.rglob("*") if path.is_file()}
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert kept == {
        "prepared.json", "train.npy", "validation.npy", "documents/tokens.npy", "documents/offsets.npy",
        *(f"tokenizer/{name}" for name in names),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- cache


def test_cache_hit_and_miss(make_config: MakeConfig, texts: list[str], tmp_path: Path, count_builds: list[Path]) -> None:
    path = tmp_path / "a.jsonl"

    def fingerprint(run: dict[str, Any] | None = None, **keys: Any) -> str:
        defaults = {"source": {"kind": "jsonl", "files": str(path)}, "cache_dir": str(tmp_path / "cache")}
        return prepare(make_config(run, **(defaults | keys)), progress=False).fingerprint

    write_lines(path, texts)
    first = fingerprint()
    assert len(count_builds) == 1
    # Nothing of this changes a token.
    for same in (
        {"sequence_length": 64},
        {"packing": "none"},
        {"cross_document_attention": True},
        {"workers": 2},
        {"prefetch": 0},
    ):
        assert fingerprint(**same) == first
    shutil.copy(path, tmp_path / "b.jsonl")
    assert fingerprint(source={"kind": "jsonl", "files": str(tmp_path / "b.jsonl")}) == first
    os.utime(path, (1, 1))
    assert fingerprint() == first
    assert len(count_builds) == 1
    # All of this does.
    others = [
        fingerprint(append_eos=False),
        fingerprint(validation_fraction=0.3),
        fingerprint(tokenizer={"train": "bpe", "vocab_size": 401}),
        fingerprint(run={"seed": 1}),
        fingerprint(source={"kind": "jsonl", "files": str(path), "max_documents": 5}),
    ]
    same_size = texts[0].replace("a", "b", 1)
    write_lines(path, [same_size, *texts[1:]])
    others.append(fingerprint())
    assert len({first, *others}) == 7
    assert len(count_builds) == 7
    write_lines(path, texts)
    assert fingerprint() == first
    assert len(count_builds) == 7


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a changed one is, even when it has the same size and its old time stamp is put back."""
    import hashlib

    path = tmp_path / "a.txt"
    path.write_text("first")
    now = time.time()
    reads: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: reads.append(name) or real(file, name))

    def digest() -> str:
        digests = FileDigests(tmp_path / "memory.json")
        value = digests.digest(path)
        digests.save()
        return value

    first = digest()
    assert digest() == first
    assert len(reads) == 2  # too young to be trusted: it could change again without its time stamp doing so
    monkeypatch.setattr(time, "time", lambda: now + 10)
    digest()
    assert len(reads) == 3
    assert digest() == first
    assert len(reads) == 3
    status = path.stat()
    path.write_text("other")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest() != first
    (tmp_path / "memory.json").write_text("{")
    assert digest() != first


@pytest.mark.parametrize("missing", ["prepared.json", "train.npy", "documents/tokens.npy", "tokenizer/tokenizer.json"])
def test_incomplete_prepared_data_is_made_again(make_config: MakeConfig, tmp_path: Path, missing: str) -> None:
    config = make_config(cache_dir=str(tmp_path))
    first = prepare(config, progress=False)
    expected = documents(first.train)
    (first.folder / missing).unlink()
    assert documents(prepare(config, progress=False).train) == expected
    (first.folder / missing).write_bytes((first.folder / missing).read_bytes()[:20])
    assert documents(prepare(config, progress=False).train) == expected


def test_dataset_folder_counts_by_content(make_config: MakeConfig, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    config = make_config(
        source={"kind": "huggingface", "name": str(tmp_path / "set"), "streaming": True}, cache_dir=str(tmp_path / "cache")
    )
    write_lines(tmp_path / "set" / "train.jsonl", texts)
    first = prepare(config, progress=False)
    assert prepare(config, progress=False).fingerprint == first.fingerprint
    write_lines(tmp_path / "set" / "train.jsonl", texts[1:])
    second = prepare(config, progress=False)
    assert second.fingerprint != first.fingerprint
    assert second.train.documents.size + second.validation.documents.size == len(texts) - 1


# --------------------------------------------------------------------------------------------------- several processes


def test_processes_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two fresh processes start together: one prepares, both read the same."""
    config = make_config(cache_dir=str(tmp_path / "cache"))
    (tmp_path / "run.json").write_text(config.model_dump_json(by_alias=True))
    script = """
import sys, time
from pathlib import Path
from jaxllm.config.schema import RunConfig
from jaxllm.data import prepare as module
from jaxllm.data import tokenize
from jaxllm.data.document import Document
real = module._build_into
def counting(folder, config, progress):
    print("built")
    time.sleep(1)
    real(folder, config, progress)
module._build_into = counting
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
prepared = module.prepare(config, progress=True)
print(prepared.fingerprint, prepared.train.tokens, prepared.train.file.tokens[:5].tolist())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "run.json")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = []
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert errors == ""  # no bars where there is no terminal
        outputs.append(output.splitlines())
    assert sum(output.count("built") for output in outputs) == 1
    assert outputs[0][-1] == outputs[1][-1]
    assert [path.name for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()] == [outputs[0][-1].split()[0]]


def test_threads_at_once(make_config: MakeConfig, tmp_path: Path, count_builds: list[Path]) -> None:
    config = make_config(cache_dir=str(tmp_path))
    results: list[PreparedData] = []
    threads = [threading.Thread(target=lambda: results.append(prepare(config, progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert len(count_builds) == 1


def test_what_a_killed_process_left_is_removed(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(cache_dir=str(tmp_path))
    fingerprint = module.data_fingerprint(config, tmp_path)
    left = tmp_path / "data" / f"{fingerprint}.123.tmp"
    left.mkdir(parents=True)
    prepare(config, progress=False)
    assert not left.exists()


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_leave_nothing_behind(make_config: MakeConfig, texts: list[str], tmp_path: Path) -> None:
    path = Path(write_lines(tmp_path / "a.jsonl", texts))
    path.write_text(path.read_text() + "broken\n")
    config = make_config(source={"kind": "jsonl", "files": str(path)}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"a.jsonl:{len(texts) + 1} is not valid JSON"):
        prepare(config, progress=False)
    assert [entry for entry in (tmp_path / "cache" / "data").iterdir() if entry.is_dir()] == []


def test_one_document_cannot_be_split(make_config: MakeConfig, tmp_path: Path) -> None:
    source = {"kind": "jsonl", "files": write_lines(tmp_path / "a.jsonl", ["only one"])}
    with pytest.raises(DataError, match="has 1 document, which cannot be split"):
        prepare(make_config(source=source), progress=False)


def test_too_little_text(make_config: MakeConfig, tmp_path: Path) -> None:
    source = {"kind": "jsonl", "files": write_lines(tmp_path / "a.jsonl", ["a", "b"])}
    with pytest.raises(DataError, match="hold 1 tokens, too few"):
        prepare(make_config(source=source, append_eos=False), progress=False)


def test_tokenizer_without_end_of_text_token(make_config: MakeConfig, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE({chr(code): code for code in range(128)}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="names no end-of-text token") as caught:
        prepare(make_config(tokenizer={"from": str(tmp_path)}), progress=False)
    assert caught.value.key == "data.append_eos"
    assert prepare(make_config(tokenizer={"from": str(tmp_path)}, append_eos=False), progress=False).vocab_size == 128


def test_cache_that_cannot_be_written(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"cannot write .*set data.cache_dir"):
        prepare(make_config(cache_dir=str(tmp_path / "file")), progress=False)


def test_preparing_loads_no_framework(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(cache_dir=str(tmp_path / "cache"))
    (tmp_path / "run.json").write_text(config.model_dump_json(by_alias=True))
    script = (
        "import sys; from pathlib import Path; from jaxllm.config.schema import RunConfig;"
        "from jaxllm.data.prepare import prepare;"
        "prepare(RunConfig.model_validate_json(Path(sys.argv[1]).read_text()), progress=False);"
        "sys.exit(' '.join({'jax', 'torch', 'transformers', 'tensorflow'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run.json")], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_full_disk(make_config: MakeConfig, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    config = make_config(cache_dir=str(tmp_path / "cache"))
    (tmp_path / "run.json").write_text(config.model_dump_json(by_alias=True))
    script = """
import resource, sys
from pathlib import Path
from jaxllm.config.schema import RunConfig
from jaxllm.data.prepare import prepare
from jaxllm.errors import DataError
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    prepare(config, progress=False)
except DataError as error:
    print(error)
"""
    for limit in (2_000, 14_000):  # full sooner, full later
        command = [sys.executable, "-c", script, str(tmp_path / "run.json"), str(limit)]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(f"cannot write prepared data below {tmp_path / 'cache'}: "), run.stdout
        assert [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()] == []


def test_batches_are_limited_in_documents_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_BATCH", 3)
    monkeypatch.setattr(tokenize, "_BATCH_BYTES", 10)
    texts = ["a", "b", "c", "d", "e" * 20, "f" * 9, "g", "h"]
    batches = tokenize._batched(Document(text, "here") for text in texts)
    wanted = [["a", "b", "c"], ["d", "e" * 20], ["f" * 9, "g"], ["h"]]
    assert [[document.text for document in batch] for batch in batches] == wanted
    assert list(tokenize._batched([])) == []
