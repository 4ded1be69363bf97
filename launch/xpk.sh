#!/usr/bin/env bash
# A run on a GKE cluster of TPUs or GPUs, through xpk (github.com/AI-Hypercomputer/xpk):
#
#   launch/xpk.sh --cluster=pods --zone=us-west4-a --name=rm-8b \
#     --topology=2xv5e-256 --image=REGISTRY/csrm_jax -- \
#     --config=configs/rm.py:mesh=2xv5e-256,model=llama3_8b --workdir=gs://BUCKET/rm
#
# --image holds this repository in its working directory, installed with
# pip install -e ".[tpu,hf,gcs]"; edits that are not committed cannot be in it, and are refused.
# --base_image=... in its place has the packages alone: xpk puts this folder, edits included, on top
# of it. '2x' before a slice: two of them; --device_type=h100-mega-80gb-8 in place of --topology is
# xpk's own name of a machine. All other options before -- are xpk's, such as --project=...,
# --priority=high or --num-nodes=4.
#
# A run that its machine is taken from saves, exits with 75, and is restarted up to 10 times
# (--max-restarts=N). HF_TOKEN, if it is set here, is set there, unless --env or --env-file says what
# is. --dry_run prints the command and runs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

cluster='' zone='' name='' topology='' device_type='' image='' base_image='' dry_run=''
others=() env=${HF_TOKEN:+--env-file=launch/xpk.env}

fail() {
  echo "error: $1" >&2
  exit 2
}

while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --device_type=*) device_type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --base_image=*) base_image=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --env=* | --env-file=*) others+=("$1") env='' ;;
    --*) others+=("$1") ;;
    *) fail "$1 is unknown: write --name=value; see the head of $0" ;;
  esac
  shift
done
shift || true
for flag in cluster zone name; do
  [[ -n ${!flag} ]] || fail "--$flag is required"
done
[[ $# -gt 0 ]] || fail 'after -- the arguments of csrm_jax.main are needed'
if [[ -n $topology && -z $device_type ]]; then
  [[ $topology =~ ^(([0-9]+)x)?(v[0-9]+[ep]?)-([0-9]+)$ ]] ||
    fail "--topology=$topology: as in v5e-64, v5p-16 or 2xv5e-256"
  slices=${BASH_REMATCH[2]:-1}
  type=${BASH_REMATCH[3]}-${BASH_REMATCH[4]}
  [[ ${BASH_REMATCH[3]} == v5e ]] && type=v5litepod-${BASH_REMATCH[4]}
  machines=(--tpu-type="$type" --num-slices="$slices")
elif [[ -n $device_type && -z $topology ]]; then
  machines=(--device-type="$device_type")
else
  fail 'give one of --topology and --device_type'
fi
if [[ -n $image && -z $base_image ]]; then
  code=(--docker-image="$image")
elif [[ -n $base_image && -z $image ]]; then
  [[ -f setup.py ]] || fail "--base_image needs a checkout, and $PWD is none: give --image"
  code=(--base-docker-image="$base_image" --script-dir="$PWD")
else
  fail 'give one of --image and --base_image'
fi

command=(xpk workload create --cluster="$cluster" --zone="$zone" --workload="$name"
  "${machines[@]}" "${code[@]}" --max-restarts=10 --restart-on-exit-codes=75
  --termination-grace-period-seconds=120 ${env:+"$env"}
  ${others[@]+"${others[@]}"}
  --command="python -m csrm_jax.main --multihost $(printf '%q ' "$@")")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
if [[ -n $image && -f setup.py && -n $(git status --porcelain 2> /dev/null) ]]; then
  fail "changes that are not committed are not in $image: commit them and build it again, or give \
--base_image"
fi
command -v xpk > /dev/null || fail 'xpk is not installed: pip install xpk'
"${command[@]}"
