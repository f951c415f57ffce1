"""The checkpoint store: whole or not there at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm.errors import CheckpointError
from jaxllm.state.store import CheckpointStore
from jaxllm.state.training_state import Progress

WEIGHTS = "weights/model.safetensors"


def _save(store: CheckpointStore, step: int) -> Path:
    folder = store.begin(step)
    (folder / "weights").mkdir()
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * step)
    progress = Progress(step, step, 4 * step, 64 * step)
    return store.commit(step, progress=progress, backend="jax", config={"seed": 0}, data="abc").folder


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    _save(store, 7)
    checkpoint = store.open(7)
    assert checkpoint.progress == Progress(7, 7, 28, 448)
    assert (checkpoint.backend, checkpoint.config, checkpoint.data) == ("jax", {"seed": 0}, "abc")


def test_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_every=4)
    for step in range(1, 10):
        _save(store, step)
    assert store.steps() == [4, 8, 9]
    assert not list(tmp_path.glob(".*"))


def test_keep_none_keeps_all(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 5):
        _save(store, step)
    assert store.steps() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "weights/model.safetensors is missing"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "has 1 bytes instead of 512"),
        (lambda folder: (folder / WEIGHTS).write_bytes(bytes(512)), "checksum of weights/model.safetensors"),
        (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
        (lambda folder: (folder / "checkpoint.json").write_text("{}"), "checkpoint.json has 2 bytes"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path, damage, reason) -> None:  # type: ignore[no-untyped-def]
    store = CheckpointStore(tmp_path)
    _save(store, 1)
    damage(_save(store, 2))
    with pytest.raises(CheckpointError, match=reason):
        store.open(2)
    reports: list[str] = []
    latest = store.latest(reports.append)
    assert latest is not None
    assert latest.step == 1
    assert len(reports) == 1
    assert "step-00000002" in reports[0]
    assert reason in reports[0]


def test_an_interrupted_save_is_invisible_and_cleared_by_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    _save(store, 1)
    (store.begin(2) / "half").write_text("half")
    assert store.steps() == [1]
    _save(store, 3)
    assert store.steps() == [1, 3]
    assert not list(tmp_path.glob(".saving-*"))


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    _save(store, 5)
    _save(store, 5)
    assert store.steps() == [5]
    store.open(5)


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="set output_dir elsewhere"):
        CheckpointStore(tmp_path / "file" / "checkpoints").begin(1)
