#!/usr/bin/env bash
#SBATCH --job-name=lvrpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
# Runs the job under SLURM, one process a node; jax.distributed starts by itself. Submit from the
# root of the repository. Options of sbatch on its command line override those above.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=12:00:00 launch/slurm.sh [--config.KEY=VALUE ...]
#   GPUS_PER_NODE=8 launch/slurm.sh --dry-run [--config.KEY=VALUE ...]
#
# CONFIG, WORKDIR   configuration file, and folder of the run on a disk that all nodes see
#                   (runs/<config name>)
# VENV              virtual environment with '.[cuda13]' on a disk that all nodes see (.venv)
# GPUS_PER_NODE     GPUs of a node (those that SLURM gives)
# XLA_CLIENT_MEM_FRACTION   share of the memory of each GPU that JAX takes at once (0.9)
#
# SLURM sends SIGTERM two minutes before the time limit; the job saves, is queued again and goes on.
set -euo pipefail
# SLURM runs a copy of this file, which has no neighbours.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
# shellcheck source=launch/common.sh
. launch/common.sh
: "${CONFIG:=configs/bagel_7b.py}"
: "${WORKDIR:=runs/$(basename "$CONFIG" .py)}"
: "${VENV:=.venv}" "${XLA_CLIENT_MEM_FRACTION:=0.9}" "${GPUS_PER_NODE:=${SLURM_GPUS_ON_NODE:-}}"
: "${GPUS_PER_NODE:?number of GPUs of a node, unless SLURM gave some (sbatch --gpus-per-node=8)}"
[[ $DRY_RUN ]] || : "${SLURM_JOB_ID:?submit this script: sbatch launch/slurm.sh}"

need srun 'It comes with SLURM.'
# Under SLURM, JAX gives a process only the GPU of its local rank unless it is told otherwise.
devices=$(seq -s, 0 $((GPUS_PER_NODE - 1)))
status=0
run srun env JAX_LOCAL_DEVICE_IDS="$devices" XLA_CLIENT_MEM_FRACTION="$XLA_CLIENT_MEM_FRACTION" \
  "$VENV/bin/python" -m lvrpo_jax.main --config="$CONFIG" --workdir="$WORKDIR" "$@" || status=$?

# 143: stopped by SIGTERM. A job that was cancelled or preempted is not RUNNING any more, and SLURM
# itself queues the preempted one again.
if ((status == 143)) && [[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) == RUNNING ]]; then
  echo "stopped by SIGTERM; queued again" >&2
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
