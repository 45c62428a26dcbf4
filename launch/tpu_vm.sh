#!/usr/bin/env bash
# Creates a TPU VM unless it exists, then runs the job there (see launch/tpu_pod.sh).
#
#   TPU_NAME=vm ZONE=us-east5-b PROJECT=p REPO=https://host/lvrpo_jax.git \
#     ACCELERATOR_TYPE=v5litepod-8 RUNTIME_VERSION=v2-alpha-tpuv5-lite \
#     launch/tpu_vm.sh [--dry-run] [--config.KEY=VALUE ...]
#
# RUNTIME_VERSION   image; for JAX v2-alpha-tpuv6e (v6e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv5-lite
#                   (v5e) or tpu-ubuntu2204-base (v4 and older)
# REPO, REF         git URL of this repository, and what to check out (its default branch)
# CONFIG, WORKDIR   configuration file, and folder of the run (runs/<config name>, on the VM), which
#                   for several hosts has to lie on a disk that all of them mount
#
# The VM stays; `gcloud compute tpus tpu-vm delete` ends it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
: "${TPU_NAME:?name of the TPU VM}" "${ZONE:?its zone}" "${PROJECT:?Google Cloud project}"
: "${REPO:?git URL of this repository}" "${ACCELERATOR_TYPE:?such as v5litepod-8}"
: "${RUNTIME_VERSION:?such as v2-alpha-tpuv5-lite}"
: "${CONFIG:=configs/bagel_7b.py}"
: "${WORKDIR:=runs/$(basename "$CONFIG" .py)}"
export CONFIG WORKDIR

# A host has at most 8 chips, or 8 cores where a type counts cores.
if [[ $ACCELERATOR_TYPE =~ -([0-9]+)$ ]] && ((BASH_REMATCH[1] > 8)) && [[ $WORKDIR != /* ]]; then
  echo "$0: WORKDIR: $WORKDIR would be another folder on every host of a $ACCELERATOR_TYPE; name" \
    "one on a disk that all of them mount, such as /mnt/shared/run-1" >&2
  exit 1
fi

need gcloud 'See https://cloud.google.com/sdk/docs/install'
vm() {
  run gcloud compute tpus tpu-vm "$1" "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" "${@:2}"
}

if ! vm describe &>/dev/null || [[ $DRY_RUN ]]; then
  vm create --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION"
fi
exec launch/tpu_pod.sh ${DRY_RUN:+"$DRY_RUN"} "$@"
