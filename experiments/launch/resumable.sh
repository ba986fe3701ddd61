#!/usr/bin/env bash
# Runs a training command as the first process of a container:
#
#   experiments/launch/resumable.sh python -m experiments.train --config=… --workdir=…
#
# Passes on the signal that Kubernetes sends to the first process only. A run that is told to stop saves, says how to go
# on, and exits with status 0; here that becomes 75, because Kubernetes would count 0 as finished.
set -uo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/pipe"
tee "$folder/log" <"$folder/pipe" &
tee=$!
"$@" >"$folder/pipe" 2>&1 &
child=$!

# A trapped signal ends `wait` early; the child then still has a checkpoint to write.
signalled=1
trap 'signalled=1; kill -TERM "$child" 2>/dev/null' TERM INT
while [[ $signalled == 1 ]]; do
  signalled=0
  wait "$child"
  status=$?
done
wait "$tee"

if [[ $status == 0 ]] && grep -q 'run the same command to continue' "$folder/log"; then exit 75; fi
exit "$status"
