#!/usr/bin/env bash
# A queued resource: 16 chips of v6e, as spot capacity, as soon as there are some within a day.  The start-up script trains and is
# run again whenever the machines come back, so that --resume goes on where a preemption cut the run off.
# Run from the repository root; the code and the runs are in BUCKET and on a shared disk.
# chips: v6e:4x4
set -euo pipefail

NAME=${NAME:-jaxllm-queued}
ZONE=${ZONE:-us-east5-b}
BUCKET=${BUCKET:?set BUCKET to gs://NAME of a bucket that the service account of the TPU may read}
SHARE=${SHARE:?set SHARE to HOST:/SHARE, the address of a Filestore (NFS) share in the network of the TPU}

git archive --format=tar.gz --output=/tmp/jaxllm.tar.gz HEAD
gcloud storage cp /tmp/jaxllm.tar.gz "$BUCKET/jaxllm.tar.gz"

cat > /tmp/jaxllm-startup.sh <<SCRIPT
#!/bin/bash
set -e
apt-get install -y nfs-common && mkdir -p /mnt/shared && mount $SHARE /mnt/shared
mkdir -p /opt/jaxllm && cd /opt/jaxllm
gcloud storage cp $BUCKET/jaxllm.tar.gz . && tar -xzf jaxllm.tar.gz
export HOME=/root
curl -LsSf https://astral.sh/uv/install.sh | sh
/root/.local/bin/uv venv --python 3.12 --allow-existing /opt/venv
VIRTUAL_ENV=/opt/venv /root/.local/bin/uv pip install -c constraints.txt -e '.[tpu]'
/opt/venv/bin/jaxllm train configs/llama3-8b.yaml --resume \
  --set parallel.fsdp=16 --set output_dir=/mnt/shared/runs --set data.cache_dir=/mnt/shared/data
SCRIPT

gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
  --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot --valid-until-duration=1d \
  --metadata-from-file=startup-script=/tmp/jaxllm-startup.sh

gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)'
echo "its output: gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --command='sudo journalctl -fu google-startup-scripts'"
echo "to end it:  gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force --quiet"
