"""What one process of a JAX test does: every mesh in one go, since starting up takes seconds.

Run: python jax_worker.py FOLDER, as a worker that `jaxllm.jax_backend.launch` starts.  Process 0 leaves what it found in FOLDER
as findings.npz, every process its shards as shards-N.json; the tests judge them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from jaxllm.jax_backend import JaxBackend
from jaxllm.state import Progress
from tests.distributed.jax_cases import MESHES, mesh_run
from tests.unit.jax_backend.cases import hyper_of, make_batch, read_all


def main(folder: Path) -> None:
    """Three steps, an evaluation, a checkpoint and a decoder on every mesh; rows as the backend's shard says."""
    found: dict[str, np.ndarray] = {}
    shards: dict[str, tuple[int, int]] = {}
    backend = JaxBackend()
    for name in MESHES:
        run = mesh_run(name)
        backend.start(run, None)
        shard = backend.shard
        shards[name] = (shard.index, shard.count)
        rows = 16 // shard.count

        def part(seed: int, shard=shard, rows=rows):
            return make_batch(seed).select(shard.index * rows, (shard.index + 1) * rows)

        results = [backend.step(part(step), hyper_of(step, run)) for step in range(3)]
        found[f"{name}/losses"] = np.asarray([float(result.loss) for result in results])
        found[f"{name}/norms"] = np.asarray([float(result.gradient_norm) for result in results])
        evaluated = backend.evaluate([part(8), part(9)])
        found[f"{name}/evaluation"] = np.asarray([evaluated.loss_sum, evaluated.target_tokens])
        for tensor, values in read_all(backend.export(Progress(3)).params).items():
            found[f"{name}/params/{tensor}"] = values
        if backend.is_main:
            (folder / name).mkdir()
        backend.barrier(f"folder {name}")
        backend.save(folder / name, Progress(3, 3, 48, 1000))
        backend.wait()
        after = backend.step(part(3), hyper_of(3, run))
        backend.restore(folder / name)
        again = backend.step(part(3), hyper_of(3, run))
        found[f"{name}/resumed"] = np.asarray([float(after.loss), float(again.loss)])
        found[f"{name}/any"] = np.asarray([backend.any(flag) for flag in (shard.index == 1, False, False)])
        found[f"{name}/decoded"] = backend.decoder(24).prefill(list(range(20)))
    if backend.is_main:
        np.savez(folder / "findings.npz", **found)
        (folder / "device.json").write_text(json.dumps(backend.device_description()))
    (folder / f"shards-{backend.is_main:d}.json").write_text(json.dumps(shards))
    backend.barrier("done")
    backend.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
