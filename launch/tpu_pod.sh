#!/usr/bin/env bash
# Runs the job on all workers of a TPU slice that exists, of one host or many; jax.distributed
# starts by itself.
#
#   TPU_NAME=slice ZONE=us-east5-b PROJECT=p REPO=https://host/lvrpo_jax.git \
#     WORKDIR=/mnt/shared/run-1 launch/tpu_pod.sh [--dry-run] [--config.KEY=VALUE ...]
#
# REPO, REF         git URL of this repository, and what to check out (its default branch)
# CONFIG, WORKDIR   configuration file, and folder of the run on a disk that all workers mount, such
#                   as Filestore or a bucket through Cloud Storage FUSE
#
# With several workers gcloud wants its key in the agent: ssh-add ~/.ssh/google_compute_engine. The
# status is that of the first worker that failed. gcloud starts the command again after a lost
# connection; a start waits while an earlier one still runs on its host.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
: "${TPU_NAME:?name of the TPU VM or slice}" "${ZONE:?its zone}" "${PROJECT:?Google Cloud project}"
: "${REPO:?git URL of this repository}" "${WORKDIR:?folder of the run that all workers see}"
: "${REF:=origin/HEAD}" "${CONFIG:=configs/bagel_7b.py}"

need gcloud 'See https://cloud.google.com/sdk/docs/install'
# Without its options, ssh would wait for ever for a host that was taken away.
on_workers() {
  "$1" gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --project="$PROJECT" \
    --worker=all --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=30 \
    --command="exec 9>~/.lvrpo_jax.lock && flock 9 && $2"
}

# The images may bring a Python that is too old; uv finds a newer one or fetches it.
printf -v setup '%s' \
  "{ [ -d lvrpo_jax ] || git clone --quiet $(printf %q "$REPO") lvrpo_jax; } && cd lvrpo_jax" \
  " && git fetch --quiet && git checkout --quiet --detach $(printf %q "$REF")" \
  " && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv" \
  " && ~/.local/bin/uv venv --quiet --allow-existing --python '>=3.11' .venv" \
  " && ~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"
on_workers run "$setup"

printf -v job '%q ' python -m lvrpo_jax.main --config="$CONFIG" --workdir="$WORKDIR" "$@"
on_workers run_last "cd lvrpo_jax && exec .venv/bin/${job% }"
