#!/usr/bin/env bash
# One TPU VM host: 8 chips of v5e.  Creates it, trains, brings the run folder back, deletes it.  Run from the repository root.
# chips: v5e:2x4
set -euo pipefail

NAME=${NAME:-jaxllm}
ZONE=${ZONE:-us-west4-a}
TPU=(gcloud compute tpus tpu-vm)

"${TPU[@]}" create "$NAME" --zone="$ZONE" --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite

git archive --format=tar.gz --output=/tmp/jaxllm.tar.gz HEAD
"${TPU[@]}" scp /tmp/jaxllm.tar.gz "$NAME":jaxllm.tar.gz --zone="$ZONE"
"${TPU[@]}" ssh "$NAME" --zone="$ZONE" --command='
  set -e
  mkdir -p jaxllm && tar -xzf jaxllm.tar.gz -C jaxllm && cd jaxllm
  curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv venv --python 3.12 ~/venv
  VIRTUAL_ENV=~/venv ~/.local/bin/uv pip install -c constraints.txt -e ".[tpu]"
  ~/venv/bin/jaxllm doctor'

# nohup: the run goes on when the connection breaks; the same command with --resume goes on after anything else.
"${TPU[@]}" ssh "$NAME" --zone="$ZONE" --command='
  cd jaxllm
  nohup ~/venv/bin/jaxllm train configs/llama3.2-1b.yaml --resume --set parallel.fsdp=8 > train.log 2>&1 &
  tail --pid=$! -f train.log'

"${TPU[@]}" scp --recurse "$NAME":jaxllm/runs . --zone="$ZONE"
"${TPU[@]}" delete "$NAME" --zone="$ZONE" --quiet
