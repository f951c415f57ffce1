#!/usr/bin/env bash
# A pod slice: v5p-32 is 16 chips (32 TensorCores) in 4 hosts.  Every host runs the same command and JAX finds the others.
# The run folder and the prepared data must be on a disk that all hosts share: a Filestore share, mounted at /mnt/shared.
# Run from the repository root.
# chips: v5p:2x2x4
set -euo pipefail

NAME=${NAME:-jaxllm-pod}
ZONE=${ZONE:-us-east5-a}
SHARE=${SHARE:?set SHARE to HOST:/SHARE, the address of a Filestore (NFS) share in the network of the TPU}
TPU=(gcloud compute tpus tpu-vm)

"${TPU[@]}" create "$NAME" --zone="$ZONE" --accelerator-type=v5p-32 --version=v2-alpha-tpuv5

git archive --format=tar.gz --output=/tmp/jaxllm.tar.gz HEAD
"${TPU[@]}" scp /tmp/jaxllm.tar.gz "$NAME":jaxllm.tar.gz --zone="$ZONE" --worker=all
"${TPU[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="
  set -e
  sudo apt-get install -y nfs-common && sudo mkdir -p /mnt/shared && sudo mount $SHARE /mnt/shared && sudo chmod 777 /mnt/shared
  mkdir -p jaxllm && tar -xzf jaxllm.tar.gz -C jaxllm && cd jaxllm
  curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv venv --python 3.12 ~/venv
  VIRTUAL_ENV=~/venv ~/.local/bin/uv pip install -c constraints.txt -e '.[tpu]'"

# Once on one host, so that the others find the data prepared.
"${TPU[@]}" ssh "$NAME" --zone="$ZONE" --worker=0 --command='
  cd jaxllm && ~/venv/bin/jaxllm data prepare configs/llama3-8b.yaml --set data.cache_dir=/mnt/shared/data'

"${TPU[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command='
  cd jaxllm && ~/venv/bin/jaxllm train configs/llama3-8b.yaml --resume \
    --set parallel.fsdp=16 --set output_dir=/mnt/shared/runs --set data.cache_dir=/mnt/shared/data'

"${TPU[@]}" delete "$NAME" --zone="$ZONE" --quiet
