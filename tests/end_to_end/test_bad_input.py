"""What a user can get wrong: one clear sentence, no traceback, a non-zero exit, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from jaxllm.state.store import CheckpointStore
from tests.end_to_end.runs import Site, environment


def _refused(site: Site, *arguments: object) -> str:
    return _one_sentence(site.run(*arguments, check=False))


def _one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def _run_after(site: Site, preparation: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`jaxllm ARGUMENTS` in a process that has first run a line of Python."""
    program = f"import sys\n{preparation}\nfrom jaxllm.cli.main import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=site.folder, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"global_batc": 8}}, ["training.global_batc", "global_batch"]),
        ({"training": {"steps": "many"}}, ["training.steps", "many", "whole number"]),
        ({"training": {"global_batch": 6}}, ["micro_batch", "6", "4"]),
        ({"data": {"sequence_length": 4096}}, ["data.sequence_length", "4096", "2048"]),
        ({"model": {"family": "lama"}}, ["model.family", "lama", "llama"]),
        ({"model": {"family": "llama", "vocab_size": 300}}, ["vocab_size", "300", "384"]),
        ({"model": {"family": "llama", "hiden_size": 32}}, ["model.hiden_size", "hidden_size"]),
        ({"schedule": {"warmup_steps": 50}}, ["schedule.warmup_steps", "50", "12"]),
    ],
)
@pytest.mark.parametrize("backend", ["jax", "deepspeed"])
def test_a_run_that_cannot_be(site: Site, backend: str, changes: dict[str, Any], words: list[str]) -> None:
    config = site.write("bad", **changes)
    message = _refused(site, "train", config, "--backend", backend)
    assert message.startswith(f"{config}:")
    for word in words:
        assert word in message
    assert not site.path("bad").exists()


def test_what_deepspeed_cannot_combine_is_refused_before_the_data_is_prepared(site: Site) -> None:
    config = site.write("bad", deepspeed={"offload_param": "cpu"}, data={"cache_dir": str(site.folder / "cache")})
    message = _refused(site, "train", config, "--backend", "deepspeed")
    assert "deepspeed.offload_param: cpu is not possible" in message
    assert "set zero_stage to 3" in message
    assert not site.path("bad").exists()
    assert not (site.folder / "cache").exists()


def test_a_mesh_that_does_not_fit(site: Site) -> None:
    config = site.write("bad", parallel={"data": 4})
    message = _refused(site, "train", config)
    assert "parallel" in message
    assert "needs 4 devices" in message
    message = _refused(site, "train", config, "--backend", "deepspeed")
    assert "training.micro_batch" in message
    assert "over 4 data-parallel devices" in message
    message = _refused(site, "train", config, "--backend", "deepspeed", "--processes", 2)
    assert "needs 4 devices, but there are 2" in message
    assert not site.path("bad").exists()


def test_a_pattern_without_a_file_is_named(site: Site) -> None:
    config = site.write("bad", data={"source": {"kind": "text", "files": "nowhere/*.txt"}})
    assert "the pattern nowhere/*.txt matches no file" in _refused(site, "train", config)
    assert not site.path("bad").exists()


def test_a_broken_line_is_named(site: Site) -> None:
    lines = ['{"text": "one two three"}'] * 6
    lines[3] = '{"text": "one'
    (site.folder / "broken.jsonl").write_text("\n".join(lines) + "\n")
    source = {"kind": "jsonl", "files": "broken.jsonl"}
    assert "broken.jsonl:4" in _refused(site, "train", site.write("bad", data={"source": source}))
    skipping = site.write("skipping", data={"source": {**source, "skip_broken": True}})
    assert "1" in site.run("data", "show", skipping).stdout


def test_examples_that_cannot_be_made_leave_the_run_that_is_there(site: Site) -> None:
    """A row that is too long is found when rows are made of the texts, after they have been read."""
    lines = [json.dumps({"text": "one two three", "label": number % 2}) for number in range(8)]
    (site.folder / "long.jsonl").write_text("\n".join([*lines, json.dumps({"text": "one " * 200, "label": 0})]) + "\n")
    source = {"kind": "jsonl", "files": "long.jsonl", "label_field": "label"}
    objective = {"kind": "sequence-classification", "num_labels": 2}
    config = site.write("bad", data={"source": source, "packing": "none"}, objective=objective)
    assert "long.jsonl:9: the text has" in _refused(site, "train", config)
    assert not site.path("bad").exists()
    site.path("bad").mkdir(parents=True)
    (site.path("bad") / "config.yaml").write_text("name: bad\n")
    assert "long.jsonl:9: the text has" in _refused(site, "train", config, "--overwrite")
    assert (site.path("bad") / "config.yaml").read_text() == "name: bad\n"


def test_a_run_folder_is_not_overwritten_unasked(site: Site) -> None:
    config = site.write("twice", training={"steps": 2}, schedule={"warmup_steps": 0})
    site.run("train", config)
    before = (site.path("twice") / "metrics.jsonl").read_text()
    assert "already holds a run" in _refused(site, "train", config)
    # Nor by a worker that torchrun started, whom no first process has checked the folder for.
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    as_worker = site.run("train", config, "--backend", "deepspeed", check=False, env={**environment(), **torchrun})
    assert "already holds a run" in _one_sentence(as_worker)
    assert (site.path("twice") / "metrics.jsonl").read_text() == before
    site.run("train", config, "--overwrite", "--set", "training.steps=3")
    assert max(site.losses("twice")) == 3


@pytest.mark.parametrize("backend", ["jax", "deepspeed"])
def test_a_loss_that_is_not_finite_stops_the_run_or_is_left_out(site: Site, backend: str) -> None:
    diverging = {"learning_rate": 1e30, "clip_norm": None}
    stopping = site.write("stop", optimizer=diverging, schedule={"warmup_steps": 0})
    message = _refused(site, "train", stopping, "--backend", backend)
    assert "loss is nan" in message or "gradient norm" in message
    assert "training.non_finite: skip" in message
    training = {"non_finite": "skip", "non_finite_limit": 3}
    skipping = site.write("skip", optimizer=diverging, schedule={"warmup_steps": 0}, training=training)
    assert "3 steps have been left out, which is training.non_finite_limit" in _refused(
        site, "train", skipping, "--backend", backend
    )


@pytest.mark.parametrize("backend", ["jax", "deepspeed"])
def test_a_full_disk_while_saving_keeps_the_checkpoints_there_are(site: Site, backend: str) -> None:
    config = site.write("full", checkpoint={"every": 2})
    site.run("train", config, "--backend", backend, "--set", "training.steps=4")
    store = CheckpointStore(site.path("full") / "checkpoints")
    assert store.steps() == [2, 4]

    # The kernel refuses to let any file grow beyond this, as a full disk would.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    arguments = ("--backend", backend, "--resume", "--allow-changed", "training.steps")
    message = _one_sentence(_run_after(site, limit, "train", config, *arguments))
    assert "checkpoints" in message
    assert store.steps() == [2, 4]
    store.open(4)
    assert not list(store.folder.glob(".saving-*"))


def test_without_the_extra_one_line_says_what_to_install(site: Site) -> None:
    config = site.write("bare")
    done = _run_after(site, "sys.modules['deepspeed'] = None", "train", config, "--backend", "deepspeed")
    assert _one_sentence(done) == (
        "error: --backend deepspeed needs the package 'deepspeed'; install it with: pip install 'jaxllm[deepspeed]'"
    )
