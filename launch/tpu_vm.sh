#!/usr/bin/env bash
# A run on a slice of TPU VMs, through gcloud:
#
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a --topology=v5e-64 create
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a install
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a run \
#     --config=configs/rm.py:mesh=v5e-64,model=llama3_8b --workdir=gs://BUCKET/rm
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a tail
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a delete
#
# --dry_run prints the gcloud commands and runs none; --spot rents cheaper
# machines that may be taken away: the run saves in time, and the same `run`
# resumes. All hosts share the work directory: a bucket, or a mounted folder.
set -euo pipefail
cd "$(dirname "$0")/.."

name='' zone='' topology='' spot='' dry_run=''

fail() {
  echo "error: $1" >&2
  exit 2
}

gcloud_do() {
  if [[ -n $dry_run ]]; then
    printf '%q ' gcloud "$@"
    echo
  else
    gcloud "$@"
  fi
}

on_hosts() { # on_hosts WORKERS COMMAND
  gcloud_do compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" \
    --command="$2"
}

accelerator() { # our name of a slice -> gcloud's, and the software it needs
  case $topology in
    v4-*) echo "$topology tpu-ubuntu2204-base" ;;
    v5e-*) echo "v5litepod-${topology#v5e-} v2-alpha-tpuv5-lite" ;;
    v5p-*) echo "$topology v2-alpha-tpuv5" ;;
    v6e-*) echo "$topology v2-alpha-tpuv6e" ;;
    *) fail "--topology=$topology: give one slice, as in v5e-64 or v5p-16" ;;
  esac
}

create() {
  local both type version
  both=$(accelerator) || exit 2
  read -r type version <<< "$both"
  gcloud_do compute tpus tpu-vm create "$name" --zone="$zone" \
    --accelerator-type="$type" --version="$version" ${spot:+--spot}
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud_do compute tpus tpu-vm scp "$archive" "$name":csrm_jax.tar.gz \
    --zone="$zone" --worker=all
  on_hosts all 'mkdir -p csrm_jax && tar xzf csrm_jax.tar.gz -C csrm_jax &&
    cd csrm_jax && python3 -m venv ~/venv && ~/venv/bin/pip install -q -e ".[tpu,hf,gcs]"'
  rm -f "$archive"
}

run() {
  [[ $# -gt 0 ]] || fail 'run needs the arguments of csrm_jax.main'
  # Detached: it goes on when this terminal is closed; `tail` looks at it.
  on_hosts all "cd csrm_jax && nohup ~/venv/bin/python -m csrm_jax.main \
--multihost $(printf '%q ' "$@")> ~/run.log 2>&1 < /dev/null &"
}

while [[ ${1:-} == --* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    *) fail "$1 is unknown; see the head of $0" ;;
  esac
  shift
done
action=${1:-}
[[ -n $name && -n $zone ]] || fail '--name and --zone are required'
[[ -n $dry_run ]] || command -v gcloud > /dev/null ||
  fail 'gcloud is not installed: see cloud.google.com/sdk'
case $action in
  create) create ;;
  install) install ;;
  run) run "${@:2}" ;;
  tail) on_hosts 0 'tail -n 50 -f ~/run.log' ;;
  delete) gcloud_do compute tpus tpu-vm delete "$name" --zone="$zone" --quiet ;;
  *) fail "action ${action:-(none)}: create, install, run, tail or delete" ;;
esac
