#!/usr/bin/env bash
# Runs the job on TPU slices of a GKE cluster, through xpk (pip install xpk).
#
#   PROJECT=p ZONE=us-east5-b CLUSTER=c WORKLOAD=run-1 TPU_TYPE=v5litepod-16 \
#     DOCKER_IMAGE=image WORKDIR=/mnt/shared/run-1 \
#     launch/gke_xpk.sh [--dry-run] [--config.KEY=VALUE ...]
#
# WORKLOAD          name of the workload; xpk refuses one that exists
# DOCKER_IMAGE      image that starts in the repository, with '.[tpu]' installed
# CONFIG, WORKDIR   configuration file, and folder of the run on a disk that all workers mount, such
#                   as Filestore or a bucket through Cloud Storage FUSE
# NUM_SLICES        slices (1)
# MAX_RESTARTS      how often the workload starts again by itself (20)
# GRACE             seconds between SIGTERM and SIGKILL, for the save (120)
#
# xpk starts a workload again whose status is 42 or from 127 to 255: after a save on SIGTERM (143),
# not after a Python error (1). The same command then goes on from WORKDIR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
: "${PROJECT:?Google Cloud project}" "${ZONE:?zone of the cluster}" "${CLUSTER:?its name}"
: "${WORKLOAD:?name of the workload, a new one each time}" "${TPU_TYPE:?such as v5litepod-16}"
: "${DOCKER_IMAGE:?image with the repository}" "${WORKDIR:?folder of the run that all workers see}"
: "${CONFIG:=configs/bagel_7b.py}" "${NUM_SLICES:=1}" "${MAX_RESTARTS:=20}" "${GRACE:=120}"

need xpk 'Install it with: pip install xpk'
# xpk signals the shell it starts; after `exec` that is Python.
printf -v job '%q ' exec python -m lvrpo_jax.main --config="$CONFIG" --workdir="$WORKDIR" "$@"
run_last xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="$NUM_SLICES" \
  --docker-image="$DOCKER_IMAGE" --max-restarts="$MAX_RESTARTS" \
  --termination-grace-period-seconds="$GRACE" --command="${job% }"
