"""Runs of the command line, in processes of their own, as a person would start them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxllm.state.store import CheckpointStore

STEPS = 12


@dataclass(frozen=True)
class Site:
    """A directory to run in.  cache: prepared data, shared by the whole session."""

    folder: Path
    cache: Path

    def write(self, name: str, **changes: Any) -> Path:
        """A run file; `section={...}` changes keys of a section, `model={...}` replaces the model."""
        config: dict[str, Any] = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "model": {
                "family": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
            "data": {
                "source": {"kind": "python-source", "max_documents": 40},
                "tokenizer": {"train": "bpe", "vocab_size": 384},
                "sequence_length": 48,
                "cache_dir": str(self.cache),
            },
            "optimizer": {"learning_rate": 3e-3},
            "schedule": {"warmup_steps": 3},
            "training": {"steps": STEPS, "global_batch": 8, "micro_batch": 4},
            "evaluation": {"every": 6, "batches": 2},
            "checkpoint": {"every": 4, "keep": None},
            "logging": {"every": 1, "sinks": ["console", "jsonl", "tensorboard"]},
            "sample": {"prompt": "def ", "max_new_tokens": 8},
        }
        for section, keys in changes.items():
            if section == "model" or not isinstance(keys, dict):
                config[section] = keys
            else:
                config.setdefault(section, {}).update(keys)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def run(self, *arguments: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """`jaxllm ARGUMENTS`; with `check`, it must succeed."""
        options = {"cwd": self.folder, "env": environment(), "capture_output": True, "text": True, "check": False, **options}
        done = subprocess.run(command(arguments), **options)  # noqa: PLW1510 - check is among the options
        if check:
            assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def path(self, name: str) -> Path:
        """The run folder of that name."""
        return self.folder / "runs" / name

    def fork(self, name: str, into: str, step: int, config: Path) -> None:
        """Copy run `name` to `into` as if it had been stopped right after its checkpoint of `step`."""
        source, copy = self.path(name), self.path(into)
        shutil.copytree(source, copy)
        for later in CheckpointStore(copy / "checkpoints").steps():
            if later > step:
                shutil.rmtree(copy / "checkpoints" / f"step-{later:08d}")
        assert config.stem == into

    def metrics(self, name: str, split: str = "train") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one split."""
        lines = (self.path(name) / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["split"] == split]

    def losses(self, name: str, split: str = "train") -> dict[int, float]:
        """Step -> loss; every step at most once."""
        lines = self.metrics(name, split)
        losses = {line["step"]: line["loss"] for line in lines}
        assert len(losses) == len(lines), "a step is logged twice"
        return losses


def command(arguments: Sequence[object]) -> list[str]:
    """The command line as a process of this Python."""
    return [sys.executable, "-m", "jaxllm", *map(str, arguments)]


def environment() -> dict[str, str]:
    """A quiet environment: the CPU, whatever this machine has."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
