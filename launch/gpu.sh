#!/usr/bin/env bash
# Runs the job on the GPUs of this machine, in a virtual environment that is made when missing.
#
#   CONFIG=configs/bagel_7b.py launch/gpu.sh [--dry-run] [--config.KEY=VALUE ...]
#
# CONFIG, WORKDIR   configuration file, and folder of the run (runs/<config name>)
# VENV              virtual environment (.venv)
# XLA_CLIENT_MEM_FRACTION   share of the memory of each GPU that JAX takes at once (0.9)
#
# Paths start at the root of the repository. SIGTERM saves, and the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
: "${CONFIG:=configs/bagel_7b.py}"
: "${WORKDIR:=runs/$(basename "$CONFIG" .py)}"
: "${VENV:=.venv}" "${XLA_CLIENT_MEM_FRACTION:=0.9}"

need python3 'The project needs Python 3.11 or newer.'
if [[ $DRY_RUN ]] || ! "$VENV/bin/python" -c 'import jax_cuda13_plugin' 2>/dev/null; then
  run python3 -m venv "$VENV"
  run "$VENV/bin/python" -m pip install --quiet -e '.[cuda13]'
fi
run_last env XLA_CLIENT_MEM_FRACTION="$XLA_CLIENT_MEM_FRACTION" \
  "$VENV/bin/python" -m lvrpo_jax.main --config="$CONFIG" --workdir="$WORKDIR" "$@"
