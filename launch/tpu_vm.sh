#!/usr/bin/env bash
# A run on slices of TPU VMs, through gcloud:
#
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a --topology=v5e-64 create
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a install
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a run \
#     --config=configs/rm.py:mesh=v5e-64,model=llama3_8b --workdir=gs://BUCKET/rm
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a tail
#   launch/tpu_vm.sh --name=rm --zone=us-west4-a delete
#
# --queued, which all actions need then, waits in a queue for the machines: `status` tells when they
# are ACTIVE. So are several slices rented, --queued --topology=2xv5e-256. What else begins with --
# goes to gcloud's create: --project=..., --reserved, --network=....
#
# install brings this folder as it is, edits included, and a Python of its own: the images' is too
# old. HF_TOKEN, if it is set here, goes to the hosts with `run`, in a file that only you can read.
# --dry_run prints the gcloud commands and runs none; --spot rents cheaper machines that may be taken
# away: the run saves in time, and the same `run` resumes. All hosts share the work directory: a
# bucket, or a mounted folder.
set -euo pipefail
cd "$(dirname "$0")/.."

name='' zone='' topology='' queued='' dry_run=''
# For create; what it does not know itself is gcloud's.
flags=() unknown=''

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

# The noun of gcloud's commands, and the flags that name every node of it.
resource() { [[ -n $queued ]] && echo queued-resources || echo tpu-vm; }
on_nodes() { [[ -n $queued ]] && echo "--node=$1" || true; }

on_hosts() { # on_hosts WORKERS COMMAND
  local nodes
  nodes=$(on_nodes "$1")
  gcloud_do compute tpus "$(resource)" ssh "$name" --zone="$zone" ${nodes:+"$nodes"} \
    --worker="$1" --command="$2"
}

to_hosts() { # to_hosts FILE NAME
  local nodes
  nodes=$(on_nodes all)
  gcloud_do compute tpus "$(resource)" scp "$1" "$name:$2" --zone="$zone" ${nodes:+"$nodes"} \
    --worker=all
}

accelerator() { # our name of a slice -> gcloud's, and the software it needs
  case $1 in
    v4-*) echo "$1 tpu-ubuntu2204-base" ;;
    v5e-*) echo "v5litepod-${1#v5e-} v2-alpha-tpuv5-lite" ;;
    v5p-*) echo "$1 v2-alpha-tpuv5" ;;
    v6e-*) echo "$1 v2-alpha-tpuv6e" ;;
    *) fail "--topology=$topology: as in v5e-64 or v5p-16, 2xv5e-256 for two" ;;
  esac
}

create() {
  local both type version slices=1 slice=$topology
  if [[ $topology =~ ^([0-9]+)x(.+)$ ]]; then
    slices=${BASH_REMATCH[1]} slice=${BASH_REMATCH[2]}
    [[ -n $queued ]] || fail "--topology=$topology: several slices need --queued"
  fi
  both=$(accelerator "$slice") || exit 2
  read -r type version <<< "$both"
  if [[ -z $queued ]]; then
    gcloud_do compute tpus tpu-vm create "$name" --zone="$zone" \
      --accelerator-type="$type" --version="$version" ${flags[@]+"${flags[@]}"}
    return
  fi
  local nodes=(--node-id="$name")
  [[ $slices == 1 ]] || nodes=(--node-count="$slices" --node-prefix="$name")
  gcloud_do compute tpus queued-resources create "$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$version" "${nodes[@]}" ${flags[@]+"${flags[@]}"}
}

install() {
  local folder
  if [[ ! -f setup.py ]] || ! git rev-parse HEAD > /dev/null 2>&1; then
    fail "$PWD is no git checkout, from which install takes what it brings"
  fi
  folder=$(mktemp -d)
  # What git knows or would add, as it is now; a file that was deleted is left out.
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      [[ ! -e $file && ! -L $file ]] || printf '%s\0' "$file"
    done | tar --null --files-from=- -czf "$folder/csrm_jax.tar.gz"
  [[ -z $(git status --porcelain) ]] || echo 'note: changes that are not committed go along' >&2
  to_hosts "$folder/csrm_jax.tar.gz" csrm_jax.tar.gz
  rm -r "$folder"
  on_hosts all 'mkdir -p csrm_jax && tar xzf csrm_jax.tar.gz -C csrm_jax &&
    (command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh) > /dev/null &&
    ~/.local/bin/uv venv --quiet --clear --python 3.12 ~/venv && cd csrm_jax &&
    ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e ".[tpu,hf,gcs]"'
}

run() {
  [[ $# -gt 0 ]] || fail 'run needs the arguments of csrm_jax.main'
  local token='rm -f ~/.csrm_env'
  if [[ -n ${HF_TOKEN:-} ]]; then
    local folder
    folder=$(mktemp -d) # only we can read it
    printf 'export HF_TOKEN=%q\n' "$HF_TOKEN" > "$folder/env"
    chmod 600 "$folder/env"
    to_hosts "$folder/env" .csrm_env
    rm -r "$folder"
    token='. ~/.csrm_env && chmod 600 ~/.csrm_env'
  fi
  # Detached: it goes on when this terminal is closed; `tail` looks at it.
  on_hosts all "$token && cd csrm_jax && nohup ~/venv/bin/python -m csrm_jax.main \
--multihost $(printf '%q ' "$@")> ~/run.log 2>&1 < /dev/null &"
}

while [[ ${1:-} == --* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --spot) flags+=(--spot) ;;
    --queued) queued=1 ;;
    --dry_run) dry_run=1 ;;
    *) flags+=("$1") unknown=${unknown:-$1} ;;
  esac
  shift
done
action=${1:-}
[[ -n $name && -n $zone ]] || fail '--name and --zone are required'
[[ -n $dry_run ]] || command -v gcloud > /dev/null ||
  fail 'gcloud is not installed: see cloud.google.com/sdk'
[[ -z $unknown || $action == create ]] ||
  fail "$unknown is unknown, and only create passes options on; see the head of $0"
case $action in
  create) create ;;
  install) install ;;
  run) run "${@:2}" ;;
  tail) on_hosts 0 'tail -n 50 -f ~/run.log' ;;
  status) gcloud_do compute tpus "$(resource)" describe "$name" --zone="$zone" ;;
  delete)
    gcloud_do compute tpus "$(resource)" delete "$name" --zone="$zone" --quiet \
      ${queued:+--force}
    ;;
  *) fail "action ${action:-(none)}: create, install, run, tail, status or delete" ;;
esac
