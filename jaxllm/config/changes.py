"""What of a run file defines the run, whatever computes it: compared when a run is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Sections and keys that the numbers of a run depend on.  The rest (backend, parallel, logging, ...) may change between two
# sittings of the same run.
DEFINING = ("seed", "model", "data", "objective", "optimizer", "schedule", "training")
NOT_DEFINING = frozenset({"data.cache_dir", "data.workers", "data.prefetch", "training.micro_batch"})


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys that define a run and differ between two configs, each with its (old, new) value.

    old, new: `RunConfig.model_dump(mode="json", by_alias=True)`, or what was read back from a file that holds it.  A key that
    one of them lacks counts as null there.
    """
    before, after = dict(_defining(old)), dict(_defining(new))
    return {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    }  # fmt: skip


def _defining(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section in DEFINING:
        for key, value in _leaves(section, config.get(section)):
            if key not in NOT_DEFINING:
                yield key, value


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, list(value) if isinstance(value, tuple) else value
