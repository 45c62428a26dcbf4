# shellcheck shell=bash
# Sourced by the other scripts, after `cd` to the root of the repository: takes a leading --dry-run
# off their arguments, and defines how they run commands.

DRY_RUN=
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=$1
  shift
fi
exec 3>&1  # What --dry-run prints shows also where the output of a command is captured.

# run COMMAND ...: executes it; with --dry-run, prints it as one line to paste.
run() {
  if [[ $DRY_RUN ]]; then
    printf '%q ' "$@" >&3
    echo >&3
  else
    "$@"
  fi
}

# run_last COMMAND ...: the same, in place of the script, so that signals reach the command.
run_last() {
  [[ $DRY_RUN ]] || exec "$@"
  run "$@"
}

# need TOOL ADVICE: ends the script where a tool is missing that it is about to use.
need() {
  if [[ ! $DRY_RUN ]] && ! command -v "$1" >/dev/null; then
    echo "$0: $1 is not installed. $2" >&2
    exit 127
  fi
}
