#!/usr/bin/env bash
# xpk: make a cluster with a v6e slice, run the main job on all of its hosts, follow it.
#
#   PROJECT=... ZONE=us-east5-b BUCKET=gs://... IMAGE=... experimental/launch/xpk.sh [v6e-16]
#
# The image is made of experimental/launch/Dockerfile. Compiled for v6e-16 (docs/tpu.md); not yet run on one.
set -euo pipefail

: "${PROJECT:?the Google Cloud project}" "${ZONE:?a zone that has these TPUs}"
: "${BUCKET:?gs://... for checkpoints}" "${IMAGE:?the image, see Dockerfile}"
slice=${1:-v6e-16}
chips=${slice#*-}
case $slice in v5p-*) chips=$((chips / 2)) ;; esac # its names count cores
common=(--cluster torchprime --project "$PROJECT" --zone "$ZONE")

pip install --quiet xpk
xpk cluster create "${common[@]}" --tpu-type="$slice" --num-slices=1 --spot
xpk workload create "${common[@]}" --tpu-type="$slice" --num-slices=1 --workload gsm8k \
  --docker-image "$IMAGE" --max-restarts 10 \
  --command "python3 torchprime/torch_xla_models/train.py --config-name llama-3-8b-sft-w-gsm8k \
    ici_mesh.fsdp=$chips run_name=gsm8k output_dir=/tmp/outputs checkpoint.folder=$BUCKET/torchprime"
xpk workload list "${common[@]}" --wait-for-job-completion=gsm8k
