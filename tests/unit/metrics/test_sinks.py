from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import jaxllm
from jaxllm.config.schema import RunConfig
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.metrics.records import TrainRecord, ValidationRecord
from jaxllm.metrics.sinks import Sinks, make_sinks, parse_metrics
from jaxllm.metrics.sinks.jsonl import JsonlSink
from jaxllm.metrics.sinks.tensorboard import TensorBoardSink

TRAIN = TrainRecord(1, 2.5, 1e-3, 0.5, 1000.0, 0.25, None, 2**30, 4096, 12.0, 100.0)
VALIDATION = ValidationRecord.from_sums(1, 30.0, 10.0, 4.0, 0.5)


def run_config(*sinks: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "model": {"family": "llama"},
            "data": {"tokenizer": {"train": "bpe", "vocab_size": 300}, "sequence_length": 16},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 10, "global_batch": 4},
            "logging": {"sinks": sinks},
        }
    )


def write(sink: JsonlSink | TensorBoardSink, steps: range, start: int = 0) -> None:
    sink.open(100, start)
    for step in steps:
        sink.train(replace(TRAIN, step=step))
        if step % 2 == 0:
            sink.validation(replace(VALIDATION, step=step))
    sink.close()


def kept(path: Path) -> list[tuple[int, str]]:
    return [(record["step"], record["split"]) for record in map(json.loads, path.read_text().splitlines())]


# ------------------------------------------------------------------------------------------------------------------ jsonl


def test_jsonl_is_one_object_a_line_on_disk_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl")
    sink.open(10, 0)
    sink.train(TRAIN)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == TRAIN.to_json()
    sink.validation(VALIDATION)
    assert kept(tmp_path / "run" / "metrics.jsonl") == [(1, "train"), (1, "validation")]
    sink.close()
    sink.close()


def test_jsonl_holds_each_step_once_after_resuming(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(JsonlSink(path), range(1, 8))
    write(JsonlSink(path), range(5, 11), start=4)
    assert kept(path) == [(step, split) for step in range(1, 11) for split in ("train", "validation")[: 2 - step % 2]]


def test_jsonl_starts_over_with_a_run_that_has_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(JsonlSink(path), range(1, 8))
    write(JsonlSink(path), range(1, 2))
    assert kept(path) == [(1, "train")]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_jsonl_drops_a_line_that_a_crash_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(JsonlSink(path), range(1, 6, 2))
    path.write_bytes(path.read_bytes()[:-cut])
    # Cut by one byte the last line is whole but for its end, and stays; what is written next must not be glued to it.
    write(JsonlSink(path), range(7, 8), start=6)
    assert kept(path) == [(1, "train"), (3, "train"), *([(5, "train")] if cut == 1 else []), (7, "train")]


def test_jsonl_of_a_killed_process_can_be_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = (
        "import sys; from pathlib import Path; from jaxllm.metrics.records import TrainRecord\n"
        "from jaxllm.metrics.sinks.jsonl import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1])); sink.open(10, 0)\n"
        "for step in range(1, 4): sink.train(TrainRecord(step, 1.0, 1.0, 1.0, None, None, None, None, 1, 1.0))\n"
        "print('written', flush=True); sys.stdin.read()"
    )
    root = Path(jaxllm.__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert [step for step, _ in kept(path)] == [1, 2, 3]
    write(JsonlSink(path), range(3, 4), start=2)
    assert [step for step, _ in kept(path)] == [1, 2, 3]


def test_jsonl_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxllmError, match=r"cannot write .*metrics\.jsonl: Not a directory|cannot write .*File exists"):
        JsonlSink(tmp_path / "file" / "metrics.jsonl").open(10, 0)
    full = JsonlSink(Path("/dev/full"))
    full._file = full._path.open("a")
    with pytest.raises(JaxllmError, match=r"cannot write /dev/full: No space left on device; make room and resume the run"):
        full.train(TRAIN)
    full.close()


def test_parse_metrics_leaves_out_what_is_no_record() -> None:
    text = '{"step": 1, "split": "train"}\n[1]\n{"step": "x", "split": "train"}\n{"split": "train"}\n\n{"step": 2, "spl'
    assert parse_metrics(text) == [{"step": 1, "split": "train"}]


# ------------------------------------------------------------------------------------------------------------ TensorBoard


def events(folder: Path) -> Iterator[Any]:
    """Events of every file in order: TFRecords of length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def test_tensorboard_events_carry_every_known_number(tmp_path: Path) -> None:
    write(TensorBoardSink(tmp_path), range(2, 3))
    found = {value.tag: (event.step, value.simple_value) for event in events(tmp_path) for value in event.summary.value}
    wanted = {f"train/{key}": value for key, value in TRAIN.to_json().items()}
    wanted |= {f"validation/{key}": value for key, value in VALIDATION.to_json().items()}
    expected = {tag for tag, value in wanted.items() if value is not None and not tag.endswith(("/step", "/split"))}
    assert set(found) == expected
    for tag in expected:
        assert found[tag] == (2, pytest.approx(wanted[tag]))


def test_tensorboard_hides_steps_that_are_done_again(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import SessionLog

    write(TensorBoardSink(tmp_path), range(1, 8))
    write(TensorBoardSink(tmp_path), range(5, 11), start=4)
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [1, 5]


def test_tensorboard_loads_no_framework(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from jaxllm.metrics.sinks.tensorboard import TensorBoardSink\n"
        "sink = TensorBoardSink(Path(sys.argv[1])); sink.open(1, 0); sink.close()\n"
        "print([name for name in ('jax', 'torch', 'tensorflow') if name in sys.modules])\n"
        "import torch, tensorboardX; print(torch.nn.Linear(1, 1).weight.shape)"
    )
    root = Path(jaxllm.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines() == ["[]", "torch.Size([1, 1])"]


# ------------------------------------------------------------------------------------------------------- Weights & Biases


def test_wandb_that_is_not_installed_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.sinks: the sink 'wandb' needs .* pip install 'jaxllm\[wandb\]'"):
        make_sinks(run_config("jsonl", "wandb"), tmp_path, Console())
    assert list(tmp_path.iterdir()) == []


def test_wandb_goes_on_in_the_same_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    identities = []
    for start in (0, 4):
        with make_sinks(run_config("wandb"), tmp_path, Console()) as sinks:
            sinks.open(10, start)
            sinks.train(replace(TRAIN, step=start + 1))
            sinks.validation(replace(VALIDATION, step=start + 1))
        identities.append(json.loads((tmp_path / "wandb.json").read_text())["id"])
    assert identities[0] == identities[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identities[0]}"))) >= 1


# ---------------------------------------------------------------------------------------------------------------- fan-out


class Recorder:
    """A sink that notes its calls in a shared list."""

    def __init__(self, name: str, calls: list[tuple[str, str]], fail_on_close: bool = False) -> None:
        self.name, self.calls, self.fail_on_close = name, calls, fail_on_close

    def open(self, total_steps: int, start_step: int) -> None:
        self.calls.append((self.name, f"open {total_steps} {start_step}"))

    def train(self, record: TrainRecord) -> None:
        self.calls.append((self.name, f"train {record.step}"))

    def validation(self, record: ValidationRecord) -> None:
        self.calls.append((self.name, f"validation {record.step}"))

    def message(self, text: str) -> None:
        self.calls.append((self.name, text))

    def close(self) -> None:
        self.calls.append((self.name, "close"))
        if self.fail_on_close:
            raise OSError("lost")


def test_every_sink_gets_everything_in_order() -> None:
    calls: list[tuple[str, str]] = []
    with Sinks([Recorder("a", calls), Recorder("b", calls)]) as sinks:
        sinks.open(10, 3)
        sinks.train(TRAIN)
        sinks.validation(VALIDATION)
        sinks.message("hello")
    expected = ["open 10 3", "train 1", "validation 1", "hello", "close"]
    assert [call for name, call in calls if name == "a"] == expected
    assert [call for name, call in calls if name == "b"] == expected


def test_every_sink_is_closed_when_the_run_or_a_sink_fails() -> None:
    calls: list[tuple[str, str]] = []
    sinks = Sinks([Recorder("a", calls), Recorder("b", calls, fail_on_close=True), Recorder("c", calls)])
    with pytest.raises(OSError, match="lost"):
        sinks.close()
    assert sorted(calls) == [("a", "close"), ("b", "close"), ("c", "close")]


def test_processes_that_report_nothing_have_no_sinks() -> None:
    with Sinks() as sinks:
        sinks.open(1, 0)
        sinks.train(TRAIN)


def test_the_run_file_names_the_sinks_and_their_order_does_not_repeat(tmp_path: Path) -> None:
    with make_sinks(run_config("jsonl", "tensorboard", "jsonl"), tmp_path, Console()) as sinks:
        sinks.open(10, 0)
        sinks.train(TRAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert kept(tmp_path / "metrics.jsonl") == [(1, "train")]
