#!/usr/bin/env bash
# The recipe for judged texts on one GPU, without a network: three runs that each leave out a third
# of some rules, all at once on the card; each is measured on the test side, and their mean printed.
#
#   launch/gpu_real.sh --base=SMOLLM2 --data_dir=DATA --workdir=DIR [--steps=N] [--side=dev] \
#     [-- --config.KEY=VALUE ...]
#
# SMOLLM2 is a folder with the weights, config.json and tokenizer.json; DATA has a folder for each
# set. An H200 reads some 200,000 tokens a second: 420 steps took 160 s, 20 s more to measure.
# --dry_run prints the commands and runs none.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

base='' data_dir='' workdir='' steps=1200 side='test' dry_run=''

fail() {
  echo "error: $1" >&2
  exit 2
}

while [[ $# -gt 0 ]]; do
  case $1 in
    --base=* | --data_dir=* | --workdir=* | --steps=* | --side=*)
      value=${1#--*=} key=${1#--}
      printf -v "${key%%=*}" %s "$value"
      ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) fail "unknown option $1; see the head of $0" ;;
  esac
  shift
done
for key in base data_dir workdir; do
  [[ -n ${!key} ]] || fail "--$key is missing; see the head of $0"
  [[ ${!key} == /* ]] || printf -v "$key" %s "$here/${!key}"
done

# XLA tries every way of each product: for minutes, where a run takes minutes. Its first guess is as
# fast here.
export XLA_FLAGS=${XLA_FLAGS:---xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.3}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/cache}

job() { # job LOG ARGUMENTS...
  local log=$1
  shift
  if [[ -n $dry_run ]]; then
    printf '%q ' python -m csrm_jax.main "$@"
    echo
  else
    mkdir -p "$workdir"
    python -m csrm_jax.main "$@" > "$log" 2>&1 || {
      tail -n 3 "$log" >&2
      fail "it stopped, see $log; the same command goes on"
    }
  fi
}

fold() { # fold NUMBER FLAGS...: trains and measures
  local run=$workdir/fold$1
  job "$run.log" --workdir="$run" \
    --config="configs/rm.py:recipe=real,init=$base,data_dir=$data_dir,num_steps=$steps" \
    --config.seed="$1" --config.data.judged.fold="$1" --config.checkpoint_every="$steps" \
    --config.model.overrides.dtype=bfloat16 --config.eval.real.data_dir= "${@:2}"
  job "$run.$side.log" --workdir="$run/$side" \
    --config="configs/eval.py:real,checkpoint=$run,data_dir=$data_dir,side=$side"
}

pids=()
for k in 0 1 2; do
  fold "$k" "$@" &
  pids+=($!)
  [[ -z $dry_run ]] || wait
done
[[ -z $dry_run ]] || exit 0
for pid in "${pids[@]}"; do
  wait "$pid"
done
python -m csrm_jax.evals.judged "$workdir"/fold{0,1,2}/"$side"
