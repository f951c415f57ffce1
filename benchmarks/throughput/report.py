"""From answers to numbers: medians, model FLOP/s, ratios with their spread, and whether all contenders did the same work."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.throughput.contenders import CONTENDERS, TARGETS
from benchmarks.throughput.driver import Entry, Found
from benchmarks.throughput.prepared import model_of
from jaxllm.metrics.flops import flops_per_token

SAME_LOSS = {"fp32": 1e-4, "bf16": 2e-2}
"""How far apart, relative, the losses of two contenders may be after the same steps; bf16 is rounded in different places."""


def summary(found: Found, peak: float | None) -> dict[str, Any]:
    """One case as JSON.  peak: FLOP/s of the device in bf16, where it is known."""
    case = found.case
    model = model_of(case)
    flops = case.tokens * flops_per_token(model.spec, case.sequence).training
    rows = [_row(entry, case.tokens, flops, peak if case.precision == "bf16" else None) for entry in found.entries]
    reference = next((entry.answers[0].losses for entry in found.entries if entry.answers), ())
    for row in rows:
        if "losses" in row:
            row["loss_difference"] = _difference(row["losses"], reference)
            row["same_work"] = row["loss_difference"] <= SAME_LOSS[case.precision]
    fastest = max(found.limit.values(), default=None)
    return {
        "case": {name: value for name, value in asdict(case).items() if name not in ("jax", "deepspeed")},
        "parameters": model.parameters,
        "model_flops_per_step": flops,
        "matmul_flops_per_s": found.limit,
        "limit_tokens_per_s": None if fastest is None else case.tokens * fastest / flops,
        "contenders": rows,
        "ratios": [ratio for target in TARGETS if (ratio := _ratio(found.entries, *target)) is not None],
    }


def _row(entry: Entry, tokens: int, flops: float, peak: float | None) -> dict[str, Any]:
    if not entry.answers:
        return {"name": entry.contender.name, "failure": entry.failure or "not started"}
    blocks = [seconds for answer in entry.answers for seconds in answer.step_seconds]
    seconds = statistics.median(blocks)
    last = entry.answers[-1]
    return {
        "name": entry.contender.name,
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_range": [tokens / max(blocks), tokens / min(blocks)],
        "model_tflops": flops / seconds / 1e12,
        "mfu": None if peak is None else flops / seconds / peak,
        "memory_bytes": max(answer.memory_bytes for answer in entry.answers),
        "added_bytes": max((answer.added_bytes or 0) for answer in entry.answers) or None,
        "compile_seconds": max(statistics.median(answer.first_seconds for answer in entry.answers) - seconds, 0.0),
        "start_seconds": statistics.median(answer.start_seconds for answer in entry.answers),
        "losses": list(last.losses),
        "rounds": [list(answer.step_seconds) for answer in entry.answers],
        "stopped": entry.failure,
        "versions": dict(last.versions),
    }


def stamp_all(measured: dict[str, Any], stamp: dict[str, Any]) -> None:
    """Say of every row and ratio of a case when and how it was measured."""
    for part in (*measured["contenders"], *measured["ratios"]):
        part["measured"] = stamp


def added(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """A case measured again, with the contenders and the ratios of `old` that were not; contenders in their usual order."""
    if old is None:
        return new
    rows = {row["name"]: row for row in (*old["contenders"], *new["contenders"])}
    ratios = {(ratio["of"], ratio["over"]): ratio for ratio in (*old["ratios"], *new["ratios"])}
    order = [contender.name for contender in CONTENDERS]
    targets = [(first, second) for first, second, _ in TARGETS]
    return new | {
        "contenders": [rows[name] for name in order if name in rows],
        "ratios": [ratios[pair] for pair in targets if pair in ratios],
    }


def _difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    return max((abs(loss - wanted) / abs(wanted) for loss, wanted in zip(losses, reference, strict=True)), default=0.0)


def _ratio(entries: Sequence[Entry], first: str, second: str, target: float) -> dict[str, Any] | None:
    """Speed of one contender over another's, round by round: rounds are next to each other in time."""
    ours, theirs = ([entry for entry in entries if entry.contender.name == name] for name in (first, second))
    if not ours or not theirs:
        return None
    ratios = [
        statistics.median(slow.step_seconds) / statistics.median(fast.step_seconds)
        for fast, slow in zip(ours[0].answers, theirs[0].answers, strict=False)
    ]
    if not ratios:
        return None
    ratio = statistics.median(ratios)
    return {
        "of": first, "over": second, "ratio": ratio, "rounds": len(ratios), "range": [min(ratios), max(ratios)],
        "target": target, "reached": ratio >= target,
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """One case as text."""
    said = [
        (
            f"{found['case']['name']}: {found['parameters'] / 1e6:.1f} M parameters, {found['case']['rows']} x "
            f"{found['case']['sequence']} tokens, {found['case']['precision']}"
        )
    ]
    if found["limit_tokens_per_s"]:
        fastest = max(found["matmul_flops_per_s"].values())
        said.append(
            f"  {'limit: products alone':30} {found['limit_tokens_per_s']:10,.0f} tokens/s   {fastest / 1e12:.3f} TFLOP/s"
        )
    for row in found["contenders"]:
        if "failure" in row:
            said.append(f"  {row['name']:30} {row['failure']}")
            continue
        low, high = row["tokens_per_s_range"]
        mfu = f"  MFU {row['mfu']:.1%}" if row["mfu"] is not None else ""
        said.append(
            f"  {row['name']:30} {row['tokens_per_s']:10,.0f} tokens/s ({low:,.0f} to {high:,.0f})  {row['model_tflops']:.3f} "
            f"TFLOP/s{mfu}  {row['memory_bytes'] / 2**30:.2f} GiB  compile {row['compile_seconds']:.1f} s  losses "
            f"{' '.join(f'{loss:.4f}' for loss in row['losses'])}{'' if row['same_work'] else '  NOT THE SAME WORK'}"
        )
    for ratio in found["ratios"]:
        low, high = ratio["range"]
        said.append(
            f"  {ratio['of']} / {ratio['over']}: {ratio['ratio']:.3f} ({low:.3f} to {high:.3f}), wanted {ratio['target']}: "
            f"{'reached' if ratio['reached'] else 'MISSED'}"
        )
    return said
