#!/usr/bin/env bash
# What four kinds of new user do first, each in an environment of its own, on the oldest and on the
# newest stack; prints how long each took. Runs are of a minute and learn nothing.
#
#   tests/first_hour.sh [clone] [own_data] [notebook] [wheel]      all four by default
#
# oldest: Python 3.11 with the lowest versions that setup.py allows; newest: the newest Python from
# 3.11 to 3.13 that is here with the newest ones. $STACKS='newest' does one of them.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

for kind in "$@"; do
  case $kind in
    clone | own_data | notebook | wheel) ;;
    *) echo "error: $kind is none of clone, own_data, notebook, wheel" >&2 && exit 2 ;;
  esac
done
kinds=("$@")
[[ $# -gt 0 ]] || kinds=(clone own_data notebook wheel)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export JAX_COMPILATION_CACHE_DIR="$folder/cache" MPLCONFIGDIR="$folder/matplotlib"
export UV_LINK_MODE=copy
unset PYTHONPATH

# Prints an interpreter of that version; a name may be there that runs nothing, as pyenv's do.
interpreter() {
  local python
  for python in "python$1" ~/.pyenv/versions/"$1".*/bin/python; do
    if "$python" -c '' 2> /dev/null; then
      echo "$python"
      return
    fi
  done
}

say() { printf '[%ds] %s\n' "$SECONDS" "$*"; }

# Fails unless a command fails, in one line that holds $1.
refuses() {
  local expected=$1 said
  shift
  if said=$("$@" 2>&1 > /dev/null); then
    echo "was not refused: $*" >&2
    return 1
  fi
  if [[ $(grep -c '^error: ' <<< "$said") != 1 || $said != *"$expected"* || $said == *Traceback* ]]
  then
    printf 'not one line with "%s":\n%s\n' "$expected" "$said" >&2
    return 1
  fi
}

environment() { # environment NAME PYTHON: a new one, which is then on the PATH
  "$uv" venv --quiet --python "$2" "$1"
  VIRTUAL_ENV=$1
  export VIRTUAL_ENV
  PATH=$1/bin:$start
}

install() { "$uv" pip install --quiet --resolution "$resolution" "$@"; }

# Somebody with the README alone.
clone() {
  git clone --quiet --no-hardlinks "$root" csrm_jax
  cd csrm_jax
  install -e .
  local job=(python -m csrm_jax.main --config=configs/rm.py:smoke --workdir="$PWD/../rm")
  "${job[@]}"
  "${job[@]}" | grep 'is finished'
  for file in report/report.md report/report.html model_card.md; do
    [[ -s ../rm/$file || -s ../rm/report/$file ]] || { echo "no $file" >&2 && return 1; }
  done
  # The README's block under "Ask it", on this model. Beside the clone, whose folder has the package's
  # name, Python would take that for it.
  mkdir ../script
  awk '/^## Ask it/ { found = 1 } found && /^```$/ { exit } code; found && /^```python/ { code = 1 }' \
    README.md | sed "s|/tmp/rm|$PWD/../rm|" > ../script/ask.py
  grep -q csrm_jax.load ../script/ask.py
  python ../script/ask.py | grep 'p_unsafe='
  csrm_jax doctor | grep 'device(s)'
}

# Somebody with rules and rows of their own, in a CSV file; and in words that the model does not know.
own_data() {
  install -e "$root"
  python - << 'P'
import csv
import random

from csrm_jax import config
from csrm_jax.ruleworld import conversations, oracle, policy
from csrm_jax.safety import schema

rules = policy.read_rules(schema.load_safety(config.CONFIGS / 'safety' / 'film_club.yaml'))
topics, rng = tuple(rule.topic for rule in rules), random.Random(0)
for name, num in {'train.csv': 120, 'test.csv': 40}.items():
  with open(name, 'w', newline='') as file:
    rows = csv.writer(file)
    rows.writerow(['question', 'answer', 'toxic'])
    for _ in range(num):
      scene = conversations.sample_scene(rng, rng.choice(topics), topics)
      talk = [message.content for message in scene.messages[-2:]]
      rows.writerow([*talk, int(oracle.label(rules, scene.statements) == 'unsafe')])
P
  cat > bank.md << 'M'
# Bank support
## Investment advice
Do not recommend single securities. Explaining terms is fine.
M
  printf 'question,answer,toxic\n"Which fund?","Buy the red fund, it cannot fall.",1\n' > bank.csv
  local labels="columns.label=toxic,labels={'0': 'safe', '1': 'unsafe'}" own
  refuses film_club.yaml csrm_jax rm:"data=auto,path=train.csv,safety=film_club.yaml,$labels" \
    --workdir=rm # which lies elsewhere
  cp "$root/configs/safety/film_club.yaml" .
  csrm_jax rm:"data=auto,path=train.csv,safety=film_club.yaml,epochs=1,$labels" --workdir=rm \
    --config.eval.path=test.csv
  own=(--config.checkpoint=rm --config.columns.label=toxic
    --config.labels="{'0': 'safe', '1': 'unsafe'}")
  csrm_jax eval --workdir=scored "${own[@]}" --config.safety=film_club.yaml \
    --config.conversations=test.csv --config.categories=True --config.table=csv
  [[ $(wc -l < scored/scored.jsonl) == 40 && -s scored/scored.csv ]]
  refuses 'allow_out_of_domain' csrm_jax eval --workdir=bank "${own[@]}" --config.safety=bank.md \
    --config.conversations=bank.csv
}

# Somebody who opens a notebook where only Jupyter is installed: its first cell installs the rest.
notebook() {
  install nbclient ipykernel pip
  python "$root/tests/run_notebook.py" "$root/notebooks/1_rules_live.ipynb" --folder="$PWD" \
    "JOB='rm:smoke'" "RM='$PWD/rm'"
  ls ./1_rules_live-2.png
}

# Somebody with pip and a wheel, in an empty folder.
wheel() {
  git clone --quiet --no-hardlinks "$root" source
  "$uv" build --quiet --out-dir dist source
  install dist/*.whl
  mkdir empty
  cd empty
  csrm_jax rm --help | grep -- '--config.optim.lr='
  csrm_jax rm:smoke --print_config | grep builtin:ruleworld/base
  refuses 'optim.lr' csrm_jax rm --config.learning_rate=1 --workdir=x
  refuses "pip install 'WHEEL[serve]'" csrm_jax doctor serve
  csrm_jax rm:smoke --workdir=../rm
  python -c 'import csrm_jax; print(csrm_jax.load("../rm").step)'
  [[ -z $(ls -A .) ]]
}

uv=$(command -v uv) || {
  echo 'error: uv is missing: pip install uv' >&2
  exit 2
}
start=$PATH
newest=''
for version in 3.13 3.12 3.11; do
  [[ -n $newest ]] || newest=$(interpreter "$version")
done
oldest=$(interpreter 3.11)
times=()
for stack in ${STACKS:-oldest newest}; do
  resolution=highest python=$newest
  [[ $stack != oldest ]] || resolution=lowest-direct python=$oldest
  [[ -n $python ]] || { echo "error: no Python for the $stack stack" >&2 && exit 2; }
  for kind in "${kinds[@]}"; do
    say "$kind, $stack stack: $("$python" --version)"
    before=$SECONDS
    mkdir "$folder/$stack-$kind"
    # No `if` around it: then a failing command within would not end it.
    (
      cd "$folder/$stack-$kind"
      environment "$folder/$stack-$kind/venv" "$python"
      "$kind"
    ) > "$folder/log" 2>&1 &
    code=0
    wait $! || code=$?
    if [[ $code != 0 ]]; then
      tail -n 40 "$folder/log" >&2
      echo "error: $kind failed on the $stack stack" >&2
      exit 1
    fi
    times+=("$stack $kind: $((SECONDS - before)) s")
    rm -rf "${folder:?}/$stack-$kind"
  done
done
printf '%s\n' "${times[@]}"
