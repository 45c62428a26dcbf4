#!/usr/bin/env bash
# Requests a spot TPU slice, waits for it and runs the job there (see launch/tpu_pod.sh). When the
# slice is preempted, requests another and runs the same command, which goes on from WORKDIR.
#
#   TPU_NAME=slice ZONE=us-east5-b PROJECT=p REPO=https://host/lvrpo_jax.git \
#     WORKDIR=/mnt/shared/run-1 ACCELERATOR_TYPE=v5litepod-64 RUNTIME_VERSION=v2-alpha-tpuv5-lite \
#     launch/tpu_queued.sh [--dry-run] [--config.KEY=VALUE ...]
#
# REQUEST           name of the queued resource (TPU_NAME); one that exists is used
# REPO, REF         git URL of this repository, and what to check out (its default branch); name a
#                   commit, or a later slice may run newer code
# CONFIG, WORKDIR   configuration file, and folder of the run on a disk that outlives the slice and
#                   that its workers mount, such as Filestore or a bucket through Cloud Storage FUSE
# MAX_RESTARTS      how often another slice is requested (20)
# POLL              seconds between two looks at the state (30)
# MAX_SILENT        looks in a row without an answer after which the script ends (20)
# SETTLE            seconds to wait, after a job failed, for its slice to show as preempted (120)
#
# A job that fails on a slice that stays ends the script with its status. The slice is left then, as
# after success, and the command that deletes it is printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
: "${TPU_NAME:?name of the slice}" "${ZONE:?its zone}" "${PROJECT:?Google Cloud project}"
: "${REPO:?git URL of this repository}" "${WORKDIR:?folder of the run that outlives the slice}"
: "${ACCELERATOR_TYPE:?such as v5litepod-64}" "${RUNTIME_VERSION:?such as v2-alpha-tpuv5-lite}"
: "${REQUEST:=$TPU_NAME}" "${MAX_RESTARTS:=20}" "${POLL:=30}" "${MAX_SILENT:=20}" "${SETTLE:=120}"

need gcloud 'See https://cloud.google.com/sdk/docs/install'
queue() {
  run gcloud compute tpus queued-resources "$1" "$REQUEST" --zone="$ZONE" --project="$PROJECT" \
    "${@:2}"
}

# Prints the state; nothing where there is no resource, or no answer.
state() { queue describe --format='value(state.state)' 2>/dev/null || true; }

# Waits until the slice is there; fails where this request will not bring it. Ends the script where
# nothing can be heard of it: another request would be as silent, and this one may still bring it.
wait_for_slice() {
  local now silent=0
  while now=$(state) && [[ $now != ACTIVE ]]; do
    echo "$(date +%T) $REQUEST: ${now:-no answer}" >&2
    if [[ $now ]]; then
      silent=0
    elif ((++silent >= MAX_SILENT)); then
      queue describe >&2 || true  # Says why.
      echo "$REQUEST: given up, its state was asked $silent times in a row without an answer" >&2
      exit 1
    fi
    case $now in FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;; esac
    sleep "$POLL"
  done
}

# Whether the slice was taken away. A preemption can end the job before it shows in the state.
preempted() {
  local now deadline=$((SECONDS + SETTLE))
  while now=$(state) && [[ $now == ACTIVE || ! $now ]]; do
    ((SECONDS < deadline)) || return 1
    sleep "$POLL"
  done
  echo "$(date +%T) $REQUEST: $now" >&2
}

status=1
for ((restart = 0; restart <= MAX_RESTARTS; restart++)); do
  if ((restart)); then
    echo "$(date +%T) $REQUEST: restart $restart of $MAX_RESTARTS" >&2
    queue delete --force --quiet || true  # Where this fails, create says so.
  fi
  if ((restart)) || [[ ! $(state) ]]; then
    if ! queue create --node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" \
        --runtime-version="$RUNTIME_VERSION" --spot; then
      ((restart)) || exit 1  # The first one is refused for a mistake, later ones are repeated.
      sleep "$POLL"
      continue
    fi
  fi
  [[ $DRY_RUN ]] || wait_for_slice || continue
  status=0
  launch/tpu_pod.sh ${DRY_RUN:+"$DRY_RUN"} "$@" || status=$?
  [[ $DRY_RUN ]] || echo "$(date +%T) $TPU_NAME: the job ended with status $status" >&2
  if ((status == 0)) || ! preempted; then
    echo 'This deletes the slice:' >&2
    DRY_RUN=--dry-run queue delete --force
    exit "$status"
  fi
done
echo "$REQUEST: given up after $MAX_RESTARTS restarts" >&2
exit "$status"
