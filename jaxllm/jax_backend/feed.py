"""From this process's rows (numpy) to a global batch on the devices.

Shape legend: R rows of this process, A micro-batches, B sequences of one micro-batch over all devices, M over one device.
"""

from __future__ import annotations

from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxllm.config.batch import BatchPlan
from jaxllm.data.batch import Batch, Shard
from jaxllm.jax_backend.sharding import Layout, data_parallel
from jaxllm.jax_backend.step import DeviceBatch


class BatchFeed:
    """Places batches: rows over data, fsdp, expert, tokens over context; each device's rows in `accumulation` micro-batches."""

    def __init__(self, mesh: Mesh, plan: BatchPlan) -> None:
        self._plan = plan
        self._layout = Layout(mesh)
        self._tokens = self._layout.sharding(None, "batch", "sequence")
        self._rows = self._layout.sharding(None, "batch", None)
        self._parallel = data_parallel(mesh)
        self.shard = _process_shard(mesh)

    @property
    def rows(self) -> int:
        """Rows of a whole global batch that this process reads."""
        return self._plan.accumulation * self._plan.micro_batch * self._parallel // self.shard.count

    def __call__(self, batch: Batch) -> DeviceBatch:
        """The global batch, (A, B, S); a batch that is short of rows is filled up with rows of padding."""
        if batch.rows > self.rows:
            raise ValueError(f"a batch of {batch.rows} rows does not fit the {self.rows} rows this process reads")
        placed = {}
        for name, rows_RT in batch.fields().items():
            per_token = rows_RT.shape[1] == batch.sequence_length or name.startswith("source")
            # Here and nowhere else: whatever belongs to a token goes where the token goes.
            order = self._layout.token_order(rows_RT.shape[1]) if per_token else slice(None)
            placed[name] = self._place(rows_RT[:, order], self._tokens if per_token else self._rows)
        return DeviceBatch(**placed)

    def in_order(self, parts_AB: np.ndarray) -> np.ndarray:
        """Rows of a global batch in their order, from what was computed for (A, B) of them; leading axes A and B."""
        plan = self._plan
        split = parts_AB.reshape(plan.accumulation, self._parallel, plan.micro_batch, *parts_AB.shape[2:])
        return split.swapaxes(0, 1).reshape(-1, *parts_AB.shape[2:])

    def _place(self, rows_RS: np.ndarray, sharding: NamedSharding) -> jax.Array:
        plan, length = self._plan, rows_RS.shape[1]
        missing = self.rows - rows_RS.shape[0]
        if missing:
            rows_RS = np.concatenate([rows_RS, np.zeros((missing, length), rows_RS.dtype)])
        rows = rows_RS.reshape(-1, plan.accumulation, plan.micro_batch, length).swapaxes(0, 1)
        local_ABS = np.ascontiguousarray(rows.reshape(plan.accumulation, -1, length))
        shape = (plan.accumulation, plan.micro_batch * self._parallel, length)
        placed: jax.Array = jax.make_array_from_process_local_data(sharding, local_ABS, shape)
        return placed


def _process_shard(mesh: Mesh) -> Shard:
    """Which rows this process reads: those of its devices; processes whose devices share rows read the same ones."""
    groups = Layout(mesh).sharding("batch").devices_indices_map((data_parallel(mesh),))
    rows_of: dict[int, set[int]] = {}
    for device, (part,) in groups.items():
        rows_of.setdefault(cast(jax.Device, device).process_index, set()).update(range(data_parallel(mesh))[part])
    distinct = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    return Shard(distinct.index(tuple(sorted(rows_of[jax.process_index()]))), len(distinct))
