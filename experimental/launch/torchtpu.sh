#!/usr/bin/env bash
# TorchTPU on one host of several: the launcher's variables, then one process per chip. Every host runs the same command.
#
#   experimental/launch/torchtpu.sh --config-name NAME ici_mesh.fsdp=16
#
# It needs TPU_WORKER_HOSTNAMES, the hosts' names in their order, and TORCH_TPU_TOPOLOGY, the slice's shape (4,4,1 for
# v6e-16). GKE sets the first one. Not yet run on a TPU.
set -euo pipefail

: "${TPU_WORKER_HOSTNAMES:?the names or addresses of all hosts, with commas between them}"
: "${TORCH_TPU_TOPOLOGY:?the shape of the slice, such as 4,4,1}"
python=${PYTHON:-python3}
set -a
eval "$("$python" -m torch.tpu.distributed)"
set +a
addresses=${TORCH_TPU_SLICEBUILDER_ADDRESSES//[^,]/}
chips=$((${#addresses} + 1))
exec "$python" -m torch.distributed.run --nnodes="$NNODES" --node_rank="$NODE_RANK" \
  --nproc_per_node=$((chips / NNODES)) --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
  -m torchprime.cli.main train device=tpu "$@"
