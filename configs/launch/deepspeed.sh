#!/usr/bin/env bash
# The deepspeed launcher on 2 nodes of 8 GPUs that reach each other by ssh without a password; edit configs/launch/hostfile.
# The repository and its environment .venv are at the same path on both, and output_dir is on a disk they share.
# --no_local_rank: jaxllm reads LOCAL_RANK from the environment and takes no --local_rank.
# chips: h100x16
set -euo pipefail

.venv/bin/deepspeed --hostfile=configs/launch/hostfile --no_local_rank --master_addr=gpu-node-1 --module \
  jaxllm train configs/llama3-8b.yaml --backend deepspeed --resume --set parallel.fsdp=16
