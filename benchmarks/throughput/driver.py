"""Runs contenders in turn, A B A B, each time in a fresh process, and keeps what they answered or why they did not."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.throughput.cases import Case
from benchmarks.throughput.contenders import Contender
from benchmarks.throughput.environments import HERE, UnavailableError, last_line, python_of
from benchmarks.throughput.prepared import prepare
from benchmarks.throughput.workers.protocol import Answer, Request
from jaxllm.cli.start import huge_page_environment

REPOSITORY = Path(__file__).parents[2]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns fits, as in a shell."""
    return any(fnmatch(name, pattern) for pattern in patterns)


@dataclass
class Entry:
    """One contender's rounds of one case.  failure: why it has none, or no more."""

    contender: Contender
    answers: list[Answer] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    cache: of environments.  device: cpu or cuda.  rounds: processes of each contender and case.  seconds: for one process;
    budget: for everything, after which no process is started any more.  share: of what is left of the budget, which a case may
    use unless it is the last.  once: patterns of contenders that take part in the first round only.
    """

    cache: Path
    device: str
    rounds: int
    seconds: float
    budget: float
    share: float = 1.0
    once: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """entries: of every contender, in their order.  limit: FLOP/s of large products by torch and by JAX."""

    case: Case
    entries: list[Entry]
    limit: dict[str, float]


class Driver:
    """Measures cases one after another.  Environments are built before the clock of the budget starts."""

    def __init__(self, contenders: Sequence[Contender], settings: Settings) -> None:
        self._settings = settings
        self._contenders = contenders
        self._unavailable = {contender.name: self._build(contender) for contender in contenders}
        self._end = time.monotonic() + settings.budget

    def _build(self, contender: Contender) -> str | None:
        try:
            python_of(contender.environment_on(self._settings.device), self._settings.cache)
        except (UnavailableError, OSError) as error:
            return str(error)
        return None

    def run(self, case: Case, *, last: bool) -> Found:
        """All rounds of all contenders of one case, the last of them or not."""
        now = time.monotonic()
        end = self._end if last else now + (self._end - now) * self._settings.share
        entries = [Entry(contender, failure=self._unavailable[contender.name]) for contender in self._contenders]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(case, folder)
            limit = self._limit(case, folder)
            for number in range(self._settings.rounds):
                for entry in entries:
                    if number == 0 or not matches(entry.contender.name, self._settings.once):
                        self._round(case, entry, folder, end)
        return Found(case, entries, limit)

    def _round(self, case: Case, entry: Entry, folder: Path, end: float) -> None:
        if entry.failure is not None:
            return
        left = end - time.monotonic()
        if left <= 0:
            if not entry.answers:
                entry.failure = "not started: the time for all measurements was used up"
            return
        contender = entry.contender
        request = Request(
            str(folder), case.precision, self._settings.device, case.compared, case.warmup, case.blocks, case.block_steps,
            contender.options_for(case),
        )  # fmt: skip
        python = python_of(contender.environment_on(self._settings.device), self._settings.cache)
        try:
            answer = Answer(**self._process(python, contender.worker, request, min(self._settings.seconds, left)))
        except UnavailableError as error:
            entry.failure = str(error)
            print(f"  {contender.name}: {error}", flush=True)
            return
        entry.answers.append(answer)
        print(f"  {contender.name}: {case.tokens / min(answer.step_seconds):,.0f} tokens/s", flush=True)

    def _limit(self, case: Case, folder: Path) -> dict[str, float]:
        size = 8192 if self._settings.device == "cuda" else 2048
        request = Request(str(folder), case.precision, self._settings.device, 0, 0, 0, 0, {"size": size})
        try:
            return self._process(python_of(HERE, self._settings.cache), "matmul", request, self._settings.seconds)
        except UnavailableError as error:
            print(f"  matrix products: {error}", flush=True)
            return {}

    def _process(self, python: Path, worker: str, request: Request, seconds: float) -> dict[str, Any]:
        """The answer of a fresh process.  UnavailableError when it fails or takes too long."""
        with tempfile.TemporaryDirectory() as name:
            asked, answered, said = (Path(name) / part for part in ("request.json", "answer.json", "output"))
            asked.write_text(json.dumps(asdict(request)))
            command = [str(python), "-m", f"benchmarks.throughput.workers.{worker}", str(asked), str(answered)]
            with said.open("wb") as output:
                try:
                    process = subprocess.run(
                        command, cwd=name, env=self._environment(worker, name), stdout=output, stderr=subprocess.STDOUT,
                        check=False, timeout=seconds,
                    )  # fmt: skip
                except subprocess.TimeoutExpired:
                    raise UnavailableError(f"not done after {seconds:.0f} s") from None
            if process.returncode or not answered.exists():
                raise UnavailableError(f"failed: {last_line(said.read_text(errors='replace'))}")
            found: dict[str, Any] = json.loads(answered.read_text())
            return found

    def _environment(self, worker: str, folder: str) -> dict[str, str]:
        variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOKENIZERS_PARALLELISM": "false"}
        if self._settings.device == "cpu":
            variables |= {"JAX_PLATFORMS": "cpu", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if not worker.startswith("jaxllm"):
            return variables
        if self._settings.device == "cpu":
            # Every process compiles, so that the peaks of all hold it; on a GPU they do not, and the suite's time is short.
            variables["JAX_COMPILATION_CACHE_DIR"] = folder
        # What jaxllm's command line begins with.
        return huge_page_environment(["train"], variables) or variables
