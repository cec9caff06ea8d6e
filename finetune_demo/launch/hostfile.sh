#!/usr/bin/env bash
# The same on several machines that share a disk and that this one reaches by ssh and pdsh.
set -euo pipefail
usage="Usage: hostfile.sh HOSTFILE BASE TRAIN_DATA [option ...]
HOSTFILE: a line \`NAME slots=8\` per machine; the rest, and every path, as for one_machine.sh, seen alike by all machines.
Environment: RUN (runs/finetune), TOKENIZER (BASE)."
# shellcheck source=SCRIPTDIR/command.sh
source "$(dirname "$0")/command.sh"

hostfile=${1-}
set_command "${@:2}"
if [[ ! -r $hostfile ]]; then
    # DeepSpeed 0.19.8 would train on this machine alone.
    printf 'hostfile.sh: %s is no file that can be read\n%s\n' "$hostfile" "$usage" >&2
    exit 2
fi
exec "${launcher[@]}" --hostfile "$hostfile" "${command[@]}"
