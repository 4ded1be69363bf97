#!/usr/bin/env bash
# A run on a GKE cluster of TPUs, through xpk (github.com/AI-Hypercomputer/xpk):
#
#   launch/xpk.sh --cluster=pods --zone=us-west4-a --name=rm-8b \
#     --topology=2xv5e-256 --image=REGISTRY/csrm_jax -- \
#     --config=configs/rm.py:mesh=2xv5e-256,model=llama3_8b --workdir=gs://BUCKET/rm
#
# --image holds this repository in its working directory, installed with
# pip install -e ".[tpu,hf,gcs]". '2x' before a slice: two of them. --dry_run
# prints the command and runs nothing.
set -euo pipefail

cluster='' zone='' name='' topology='' image='' dry_run=''

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
    --image=*) image=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    *) fail "$1 is unknown; see the head of $0" ;;
  esac
  shift
done
shift || true
for flag in cluster zone name topology image; do
  [[ -n ${!flag} ]] || fail "--$flag is required"
done
[[ $# -gt 0 ]] || fail 'after -- the arguments of csrm_jax.main are needed'
[[ $topology =~ ^(([0-9]+)x)?(v[0-9]+[ep]?)-([0-9]+)$ ]] ||
  fail "--topology=$topology: as in v5e-64, v5p-16 or 2xv5e-256"
slices=${BASH_REMATCH[2]:-1}
type=${BASH_REMATCH[3]}-${BASH_REMATCH[4]}
[[ ${BASH_REMATCH[3]} == v5e ]] && type=v5litepod-${BASH_REMATCH[4]}

command=(xpk workload create --cluster="$cluster" --zone="$zone"
  --workload="$name" --tpu-type="$type" --num-slices="$slices"
  --docker-image="$image"
  --command="python -m csrm_jax.main --multihost $(printf '%q ' "$@")")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
command -v xpk > /dev/null || fail 'xpk is not installed: pip install xpk'
"${command[@]}"
