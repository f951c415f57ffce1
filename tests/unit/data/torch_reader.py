"""Run by test_stream_hash.py in processes of their own: each is one rank of a gloo group and hashes its shard.

python torch_reader.py RUN_JSON STORE RANK WORLD START BATCHES; rank 0 prints the digest of the stream.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed

from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Shard
from jaxllm.data.prepare import prepare
from jaxllm.data.stream_hash import combine, shard_digests


def main(run: str, store: str, rank: int, world: int, start: int, batches: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    config = RunConfig.model_validate_json(Path(run).read_text())
    digests = shard_digests(prepare(config, progress=False), config, Shard(rank, world), batches, start)
    gathered: list[list[list[bytes]]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(gathered, digests)
    if rank == 0:
        sys.stdout.write(combine(gathered))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
