#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice: creates it, copies the commit that is checked out, installs, and runs one command on
# every worker. When the slice is preempted it does so again, and training continues from its last checkpoint.
#
#   experiments/launch/tpu_vm.sh --config=configs/dlc/generator_imagenet.py:L512 --workdir=/mnt/runs/generator
#   experiments/launch/tpu_vm.sh --dry_run --config=…      # first argument: print the commands, run none
#
# Everything after goes to `python -m experiments.train --distributed`. --workdir must be on the shared disk: each
# worker writes its part of a checkpoint, and the disk outlives the slice. Set the variables here or in the environment.
set -euo pipefail

NAME=${NAME:-dlc}
ZONE=${ZONE:-us-east5-b}
ACCELERATOR=${ACCELERATOR:-v6e-16}    # v4-16, v5e-16 (Google Cloud writes v5litepod-16), v5p-16, v6e-16
RUNTIME=${RUNTIME:-}                  # image of the machines; '': the one that Google Cloud names for the generation
SPOT=${SPOT:-1}                       # 0: on demand
QUEUED=${QUEUED:-0}                   # 1: wait in the queue for capacity (queued resources)
NFS=${NFS:-}                          # shared disk, such as 10.0.0.2:/share (Filestore); mounted on every worker
MOUNT=${MOUNT:-/mnt/runs}             # … here
MODULE=${MODULE:-experiments.train}
KEEP=${KEEP:-0}                       # 1: leave the slice running at the end
ATTEMPTS=${ATTEMPTS:-100}
WAIT=${WAIT:-60}                      # seconds between attempts, and between looks at the queue

root=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
dry_run=0
if [[ ${1:-} == --dry_run ]]; then dry_run=1; shift; fi
if [[ $# == 0 ]]; then echo "usage: $0 [--dry_run] --config=… --workdir=$MOUNT/…" >&2; exit 2; fi

ACCELERATOR=${ACCELERATOR/#v5e-/v5litepod-}
case $ACCELERATOR in
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v4-*) image=tpu-ubuntu2204-base ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  *) echo "$0: ACCELERATOR=$ACCELERATOR is none of v4-N, v5e-N, v5p-N and v6e-N" >&2; exit 2 ;;
esac
RUNTIME=${RUNTIME:-$image}
extras=runner,tpu
if [[ "$*" == *gs://* ]]; then extras+=,gcs; fi

run() {
  printf '+'; printf ' %q' "$@"; printf '\n'
  if [[ $dry_run == 0 ]]; then "$@"; fi
}

vm() { local verb=$1; shift; run gcloud compute tpus tpu-vm "$verb" "$@" --zone="$ZONE"; }
queue() { local verb=$1; shift; run gcloud compute tpus queued-resources "$verb" "$NAME" "$@" --zone="$ZONE"; }
# Hours may pass without a line of output; the keep-alive keeps routers from closing the connection meanwhile.
everywhere() {
  vm ssh "$NAME" --worker=all --ssh-flag='-o ServerAliveInterval=30 -o ServerAliveCountMax=10' --command="$1"
}

describe() {  # what, field: its value, or ABSENT where there is no such thing
  if [[ $dry_run == 1 ]]; then echo ABSENT; return; fi
  gcloud compute tpus "$1" describe "$NAME" --zone="$ZONE" --format="value($2)" 2>/dev/null || echo ABSENT
}
state() { describe tpu-vm state; }
queue_state() { describe queued-resources state.state; }

create() {
  local flags=(--accelerator-type="$ACCELERATOR")
  if [[ $SPOT == 1 ]]; then flags+=(--spot); fi
  if [[ $QUEUED == 0 ]]; then vm create "$NAME" "${flags[@]}" --version="$RUNTIME"; return; fi
  # A queued request outlives the slice it was granted.
  if [[ $(queue_state) != ABSENT ]]; then delete || return; fi
  queue create --node-id="$NAME" "${flags[@]}" --runtime-version="$RUNTIME" || return
  while [[ $dry_run == 0 && $(state) != READY ]]; do
    case $(queue_state) in FAILED | SUSPENDED | ABSENT) return 1 ;; esac
    sleep "$WAIT"
  done
}

delete() {
  if [[ $QUEUED == 0 ]]; then vm delete "$NAME" --quiet; else queue delete --force --quiet; fi
}

prepare() {
  local archive copied=0
  archive=$(mktemp --suffix=.tar.gz)
  git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
    vm scp "$archive" "$NAME:dlc.tar.gz" --worker=all || copied=$?
  rm -f "$archive"
  if [[ $copied != 0 ]]; then return "$copied"; fi
  if [[ -n $NFS ]]; then
    everywhere "sudo apt-get -qq install -y nfs-common && sudo mkdir -p $MOUNT && \
      (mountpoint -q $MOUNT || sudo mount -t nfs $NFS $MOUNT) && sudo chmod a+rwx $MOUNT" || return
  fi
  # What a lost connection left behind still holds the chips. The images come with Python 3.10; uv brings a newer one.
  everywhere "(pkill -f '[p]ython -m $MODULE --distributed' && sleep 60); \
    rm -rf dlc && mkdir dlc && tar -xzf dlc.tar.gz -C dlc && cd dlc && python3 -m pip install -q --user uv && \
    ~/.local/bin/uv venv -q --python 3.12 && ~/.local/bin/uv pip install -q -e '.[$extras]'"
}

# A run that is told to stop saves, says how to go on, and exits with status 0, as a finished one does.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
train() {
  everywhere "cd dlc && .venv/bin/python -m $MODULE --distributed $(printf '%q ' "$@")" 2>&1 | tee "$log"
}
interrupted() { grep -q 'run the same command to continue' "$log"; }

for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  status=0
  case $(state) in
    READY) ;;
    ABSENT) create || status=$? ;;
    *) delete && create || status=$? ;;
  esac
  if [[ $status == 0 ]]; then prepare && train "$@" || status=$?; fi
  if [[ $status == 0 ]] && ! interrupted; then
    if [[ $KEEP == 0 ]]; then delete; fi
    exit 0
  fi
  if [[ $status != 0 && $(state) == READY ]]; then
    echo "$0: failed with status $status on a healthy slice, which is left up; the same command retries" >&2
    exit "$status"
  fi
  echo "$0: the slice was lost or not to be had (attempt $attempt of $ATTEMPTS); again in $WAIT s" >&2
  sleep "$WAIT"
done
echo "$0: gave up after $ATTEMPTS attempts; the same command continues" >&2
exit 1
