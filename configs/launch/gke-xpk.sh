#!/usr/bin/env bash
# Google Kubernetes Engine through xpk: a cluster with a v5p-32 slice (16 chips, 4 hosts), and a workload on it.
# xpk puts the working directory into an image on top of --base-docker-image.  Run from the repository root.
# The run folder is on a Filestore share that the cluster mounts: `xpk storage create` makes it once.
# chips: v5p:2x2x4
set -euo pipefail

CLUSTER=${CLUSTER:-jaxllm}
ZONE=${ZONE:-us-east5-a}
PROJECT=${PROJECT:-$(gcloud config get-value project)}
WHERE=(--cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT")

pip install xpk
xpk cluster create "${WHERE[@]}" --tpu-type=v5p-32 --num-slices=1 --spot --enable-gcpfilestore-csi-driver
xpk storage create shared "${WHERE[@]}" --type=gcpfilestore --mount-point=/mnt/shared --readonly=false \
  --size=1024 --tier=BASIC_HDD --vol=shared --auto-mount=true

xpk workload create "${WHERE[@]}" --workload=llama3-8b --tpu-type=v5p-32 --num-slices=1 \
  --base-docker-image=python:3.12 --script-dir=. --max-restarts=100 \
  --command="pip install -c constraints.txt -e '.[tpu]' && jaxllm train configs/llama3-8b.yaml --resume \
    --set parallel.fsdp=16 --set output_dir=/mnt/shared/runs --set data.cache_dir=/mnt/shared/data"

xpk workload list "${WHERE[@]}"
echo "to end it: xpk workload delete --workload=llama3-8b --cluster=$CLUSTER --zone=$ZONE --project=$PROJECT"
