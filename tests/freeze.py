"""Freezes what the command line does, to prove that a change of structure changes nothing.

python tests/freeze.py OUT.json [--root DIR] [--only PATTERN] [--data DIR]
python tests/freeze.py --diff A.json B.json

The first form runs every row below with the package and the configs in DIR (by default the tree of
this file) and writes {row: digests} to OUT.json after each row; rows that are there already are
not run again. --only takes the rows whose name has a match of a regular expression. What a row was
made of lies in OUT.d/rows, so that `diff -r` of two such folders shows what a changed digest hides.
Times, rates and paths are no part of a digest. The second form prints the rows that differ.

The rows need the extra [test]; --data is a folder of public data sets (by default
$CSRM_DATA_DIR). Digests are comparable between runs on machines of one kind only.
"""

import argparse
import contextlib
import hashlib
import http.server
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
# A module that only this script imports -> the names that it has had, the newest last.
MOVED = {
  'programs': ('csrm_jax.runners.programs', 'csrm_jax.runners.compile'),
  'templates': ('csrm_jax.safety.templates',),
  'layout': ('csrm_jax.safety.layout', 'csrm_jax.safety.templates'),
  'topology': ('csrm_jax.core.topology', 'csrm_jax.core.tpu'),
}

# Arguments of config files whose resolved form is kept as it is.
CONFIGS = """
augment.py augment.py:smoke augment.py:proposer=endpoint,data=xstest_completions,path=FOLDER
augment.py:proposer=model,init=FOLDER,data=jsonl,path=FILE augment.py:data=jsonl,path=FILE,judge=RM
compile.py compile.py:topology=v5e-64,model=llama3_8b compile.py:topology=2xv5e-256,model=llama3_70b
compile.py:target=configs/rl.py,topology=v5e-64,policy=llama3_8b,reward_model=llama3_8b
eval.py eval.py:benchmarks eval.py:compare export.py export.py:checkpoint=RM,form=causal_lm
export.py:checkpoint=RM,form=sequence_classification export.py:checkpoint=RM,form=peft
pretrain.py pretrain.py:task=policy pretrain.py:task=structured pretrain.py:num_steps=3
rm.py rm.py:smoke rm.py:ablation=no_cca rm.py:ablation=no_sa rm.py:ablation=no_aug
rm.py:ablation=rules_blind rm.py:data=jsonl,path=train.jsonl rm.py:data=public,data_dir=DATA
rm.py:data=augmented,path=AUG rm.py:data=array_record,path=AUG rm.py:data=beavertails
rm.py:model=smollm2_135m,lora=16,data=public,data_dir=DATA rm.py:model=smollm2_135m,init=FOLDER
rm.py:model=llama3_8b rm.py:model=llama3_70b rm.py:model=mistral_7b rm.py:model=qwen3_1b7
rm.py:model=gemma2_9b rm.py:mesh=v5e-64,model=llama3_8b rm.py:mesh=v5e-16,model=llama3_8b
rm.py:mesh=2xv5e-256,model=llama3_8b rm.py:mesh=v5p-16 rm.py:mesh=h100-16,model=llama3_70b,lora=8
rm.py:smoke,ablation=no_aug,mesh=v5e-4,num_steps=7
rl.py rl.py:checkpoint=RM rl.py:smoke rl.py:reward=oracle rl.py:reward=http,url=http://h/
rl.py:reward=python,function=m:f rl.py:reward=alphaalign rl.py:reward=alphaalign,variant=zero
rl.py:reward=alphaalign,variant=raw rl.py:reward=alphaalign,checkpoint=RM
rl.py:reward=alphaalign,algorithm=dpo rl.py:reward=alphaalign,policy=qwen3_1b7,data=xstest
rl.py:algorithm=reinforce_pp rl.py:algorithm=reinforce_pp_baseline rl.py:algorithm=grpo
rl.py:algorithm=dr_grpo rl.py:algorithm=rloo rl.py:algorithm=ppo rl.py:algorithm=distillation
rl.py:algorithm=dpo rl.py:smoke,algorithm=distillation rl.py:smoke,algorithm=ppo,num_steps=3
rl.py:policy=smollm2_135m,lora=16,checkpoint=RM,data=xstest,data_dir=DATA
rl.py:checkpoint=RM,policy=smollm2_135m,data=xstest,data_dir=DIR,rules=rules.yaml
rl.py:policy=llama3_8b,mesh=v5e-64,checkpoint=RM rl.py:policy=mistral_7b,mesh=v5p-16
rl.py:policy=llama3_8b,mesh=v5e-64,reward=alphaalign rl.py:mesh=h100-8,policy_init=FOLDER
rl.py:policy=qwen3_1b7,algorithm=distillation,mesh=v5e-16 rl.py:data=jsonl,path=FILE,rules=r.yaml
rl.py:rules=weather_desk,lora=4 rl_table.py rl_table.py:rewards=DIR,run=no_sa-seed2,rules=pet_forum
rl_table.py:rewards=DIR,algorithm=distillation
"""

# Flags that make runs small. What is no flag is a key of the config.
SHORT = {
  '$RM': 'data.batch_size=4 eval.ruleworld_examples=24',
  '$ONE': 'num_steps=10 $RM',
  '$SMALL': 'num_steps=4 log_every=2 checkpoint_every=2 optim.warmup_steps=1 data.batch_size=2'
  ' eval.ruleworld_examples=8 model.overrides.unroll=1',
  '$FILE': '$SMALL data.row_length=512 data.max_length=256 eval.ruleworld_examples=0'
  ' eval.max_examples=16',
  '$RL': 'policy.overrides.unroll=1 eval.num_prompts=8 eval.best_of=2 eval.every=2',
  '$FEW': 'policy.overrides.unroll=1 eval.num_prompts=4 eval.best_of=0 eval.every=0 num_steps=2',
  '$OFF': 'policy.overrides.unroll=1 eval.num_prompts=4 eval.best_of=0',
  '$PRE': 'num_steps=4 log_every=2 checkpoint_every=2 optim.warmup_steps=1 data.batch_size=2',
  '$AUG': 'strictness.threshold=0.5 strictness.max_pairs=50',
  '$END': 'endpoint.base_url=$URL/v1 endpoint.model=m endpoint.concurrency=1',
  '$BENCH': 'max_length=512 benchmarks.max_items=6',
}
# row | config:argument | flags. @ROW is the work directory of another row.
RUNS = """
rm/full | rm.py:smoke | $RM
rm/no_cca | rm.py:smoke,ablation=no_cca | $RM
rm/no_sa | rm.py:smoke,ablation=no_sa | $ONE
rm/no_aug | rm.py:smoke,ablation=no_aug | $ONE
rm/rules_blind | rm.py:smoke,ablation=rules_blind | $ONE
rm/lora | rm.py:smoke,lora=4 | $SMALL optim.num_microbatches=2 model.overrides.remat=dots
rm/other | rm.py:smoke | $SMALL template.order=conversation_first data.label_pairs=True seed=3
rm/tiny | tiny.py | num_steps=40 log_every=2 checkpoint_every=4 eval.ruleworld_examples=8
rm/seed | tiny.py | num_steps=4 seed=1
rm/public | rm.py:data=public,data_dir=$DATA | $FILE
aug/oracle | augment.py:smoke | $AUG
aug/disobey | augment.py:smoke | $AUG oracle.disobey=0.3 oracle.slip=one judge=annotator
aug/record | augment.py:smoke | $AUG array_record=True source.num_examples=30
aug/judge | augment.py:smoke,judge=@rm/tiny | $AUG source.num_examples=60
aug/endpoint | augment.py:proposer=endpoint,data=jsonl,path=rows.jsonl | $END
aug/xstest | augment.py:proposer=endpoint,data=xstest_completions,path=$DATA/xstest | \
  source.num_examples=20 $END
rm/augmented | rm.py:data=augmented,path=@aug/oracle | $FILE
rm/record | rm.py:data=array_record,path=@aug/record | $FILE
rm/jsonl | rm.py:data=jsonl,path=rows.jsonl | $FILE
export/causal_lm | export.py:checkpoint=@rm/tiny,form=causal_lm |
export/lora | export.py:checkpoint=@rm/lora,form=causal_lm |
export/sequence | export.py:checkpoint=@rm/tiny,form=sequence_classification |
export/shards | export.py:checkpoint=@rm/full,form=causal_lm | max_shard_bytes=1000000
export/peft | export.py:checkpoint=@rm/lora,form=peft |
rm/backbone | rm.py:model=smollm2_135m,init=backbone,lora=4,data=jsonl,path=rows.jsonl | $FILE \
  data.row_length=1024 data.max_length=768
eval/file | eval.py | checkpoint=@rm/full conversations=talks.jsonl \
  safety=$ROOT/configs/safety/hospital.yaml
frozen/file | eval.py | checkpoint=frozen/rm conversations=talks.jsonl \
  safety=$ROOT/configs/safety/hospital.yaml
eval/rows | eval.py | checkpoint=@rm/lora conversations=rows.jsonl
eval/zero_shot | eval.py | checkpoint=backbone conversations=rows.jsonl words="('Yes', 'No')"
eval/llama_guard | eval.py | checkpoint=backbone conversations=rows.jsonl format=llama_guard_3
eval/shield_gemma | eval.py | checkpoint=backbone conversations=rows.jsonl format=shield_gemma
eval/refusals | eval.py:refusals | data_dir=$DATA/xstest
bench/tiny | eval.py:benchmarks | checkpoint=@rm/tiny benchmarks.ruleworld_examples=24 $BENCH
bench/seed | eval.py:benchmarks | checkpoint=@rm/seed benchmarks.ruleworld_examples=24 $BENCH
bench/public | eval.py:benchmarks | checkpoint=@rm/tiny benchmarks.ruleworld_examples=0 $BENCH \
  benchmarks.data_dir=$DATA
compare/rm | eval.py:compare | compare="('@bench/tiny', '@bench/seed')" num_samples=100
rl/reinforce_pp | rl.py:smoke,checkpoint=@rm/full | $RL
rl/reinforce_pp_baseline | rl.py:smoke,reward=oracle,algorithm=reinforce_pp_baseline | $FEW
rl/grpo | rl.py:smoke,reward=oracle,algorithm=grpo | $RL
rl/dr_grpo | rl.py:smoke,reward=oracle,algorithm=dr_grpo | $FEW
rl/rloo | rl.py:smoke,reward=oracle,algorithm=rloo,rules=weather desk | $FEW
rl/ppo | rl.py:smoke,reward=oracle,algorithm=ppo | $FEW
rl/distillation | rl.py:smoke,checkpoint=@rm/full,algorithm=distillation | $OFF eval.best_of=2
rl/dpo | rl.py:smoke,reward=oracle,algorithm=dpo,lora=4 | $OFF
rl/oracle_lora | rl.py:smoke,reward=oracle,lora=4 | $FEW loss.kl_target=0.1 \
  loss.normalise_rewards=True loss.mask_truncated=True rollout.dtype=bfloat16
rl/sequence | rl.py:smoke,reward=oracle,algorithm=grpo | $FEW loss.ratio=sequence loss.dual_clip=3.0
rl/sum | rl.py:smoke,checkpoint=@rm/full | $FEW reward.mode=sum reward.helpfulness=@rm/tiny \
  reward.overlong_buffer=8 sampling.top_p=0.9 sampling.top_k=50 loss.num_iterations=2
rl/stop | rl.py:smoke,reward=oracle | $RL stop.kl=1e-6
rl/http | rl.py:smoke,reward=http,url=$URL/score | $FEW
rl/python | rl.py:smoke,reward=python,function=scorer:score | $FEW
rl/alphaalign | rl.py:smoke,reward=alphaalign | $RL
rl/alphaalign_zero | rl.py:smoke,reward=alphaalign,variant=zero | $FEW reward.refusal=patterns
rl/alphaalign_raw | rl.py:smoke,reward=alphaalign,variant=raw | $FEW reward.refusal=boxed
rl/alphaalign_model | rl.py:smoke,reward=alphaalign,checkpoint=@rm/tiny | $FEW
rl/public | rl.py:smoke,reward=python,function=scorer:score,policy=smollm2_135m,lora=4,\
policy_init=backbone,data=jsonl,path=prompts.jsonl,rules=$ROOT/configs/safety/hospital.yaml | \
  sampling.max_completion_length=12 eval.num_prompts=4 eval.best_of=2
rl/xstest | rl.py:smoke,reward=alphaalign,variant=zero,data=xstest,data_dir=$DATA/xstest,\
rules=$ROOT/configs/safety/hospital.yaml | $FEW sampling.max_completion_length=16
compare/rl | eval.py:compare | compare="('@rl/grpo', '@rl/dr_grpo', '@rl/reinforce_pp')"
pretrain/base | pretrain.py | $PRE
pretrain/policy | pretrain.py:task=policy | $PRE
pretrain/structured | pretrain.py:task=structured | $PRE
tokens/rm | rm.py | --show_tokens
tokens/other | rm.py:ablation=no_aug | --show_tokens template.order=conversation_first
tokens/public | rm.py:data=public,data_dir=$DATA | --show_tokens
tokens/eval | eval.py | --show_tokens checkpoint=@rm/full conversations=talks.jsonl \
  safety=$ROOT/configs/safety/hospital.yaml
tokens/guard | eval.py | --show_tokens checkpoint=backbone conversations=rows.jsonl \
  format=llama_guard_3
tokens/gemma | eval.py | --show_tokens checkpoint=backbone conversations=rows.jsonl \
  format=shield_gemma
"""
# Commands that end with one line: name | config:argument | flags.
ERRORS = """
no checkpoint | rl.py:smoke |
checkpoint gone | rl.py:smoke,checkpoint=/no/such/run |
no rule set | rl.py:smoke,reward=oracle,rules=chess club |
no prompts folder | rl.py:smoke,reward=oracle,data=xstest |
no such folder | rl.py:smoke,reward=oracle,data=xstest,data_dir=/nowhere |
no scorer | rl.py:smoke,reward=http,url=http://127.0.0.1:9/ | reward.num_tries=1
no url | rl.py:smoke,reward=http |
no function | rl.py:smoke,reward=python,function=no:such |
one generation | rl.py:smoke,reward=oracle,algorithm=grpo | rollout.num_generations=1
kl place | rl.py:smoke,reward=oracle | loss.kl_place=loss loss.kl_estimator=k1
cold | rl.py:smoke,reward=oracle | sampling.temperature=0.0
marks | rl.py:smoke,reward=oracle | policy.marks=round
idle weight | rl.py:smoke,reward=oracle | reward.helpfulness=none reward.helpfulness_weight=2.0
idle horizon | rl.py:smoke,reward=oracle | loss.kl_horizon=5
mini batches | rl.py:smoke,reward=oracle | loss.num_mini_batches=7
key of another algorithm | rl.py:smoke,reward=oracle,algorithm=grpo | loss.lam=0.5
algorithm | rl.py:algorithm=a2c |
variant | rl.py:reward=alphaalign,variant=half |
policy weights | rl.py:smoke,reward=oracle,policy_init=nowhere |
prompts without labels | rl.py:smoke,reward=alphaalign,data=jsonl,path=prompts.jsonl,rules=r.yaml |
offline pairs | rl.py:smoke,reward=oracle,algorithm=dpo | pairs.num_best=7
aggregation | rl.py:smoke,reward=oracle | loss.loss_aggregation=mean
topology | rm.py:mesh=v5e-63 |
devices | rm.py:smoke | mesh.tensor=3
model | rm.py:model=gpt2 |
smoke value | rm.py:smoke=maybe |
twice | rm.py:smoke,smoke |
needs a value | rm.py:data |
section | rm.py:smoke | optim=1
log every | rm.py:smoke | checkpoint_every=7
steps of the profile | rm.py:smoke | profile_steps=ten
source | rm.py:data=reward_bench_9 |
augmented folder | rm.py:data=augmented,path=nowhere |
verdict words | rm.py:smoke | template.safe_words="('perfectly safe',)"
order | rm.py:smoke | template.order=last
lora target | rm.py:smoke,lora=4 | model.overrides.lora_targets="('nose',)"
export form | export.py:form=gguf |
export nothing | export.py:checkpoint=nowhere |
export adapters | export.py:checkpoint=@rm/full,form=peft |
compare one | eval.py:compare | compare="('@rm/full',)"
compare kinds | eval.py:compare | compare="('@rm/full', '@rl/grpo')"
format of a run | eval.py | checkpoint=@rm/full conversations=talks.jsonl format=llama_guard_3
rows without rules | eval.py | checkpoint=@rm/full conversations=talks.jsonl
format | eval.py | checkpoint=backbone conversations=rows.jsonl format=guard
no benchmarks | eval.py:benchmarks | checkpoint=@rm/full benchmarks.ruleworld_examples=0
benchmark name | eval.py:benchmarks | checkpoint=@rm/full benchmarks.names="('mmlu',)" \
  benchmarks.data_dir=$DATA
tokens of a policy | rl.py:reward=oracle | --show_tokens
topology of compile | compile.py:topology=v5e-63 |
offline compile | compile.py:target=$ROOT/configs/rl.py,reward=oracle,algorithm=dpo,topology=v5e-1 |
proposer | augment.py:proposer=human |
no endpoint model | augment.py:proposer=endpoint,data=jsonl,path=rows.jsonl |
no proposer weights | augment.py:proposer=model,data=jsonl,path=rows.jsonl |
oracle on files | augment.py:data=jsonl,path=rows.jsonl |
judge | augment.py:smoke,judge=nowhere |
task | pretrain.py:task=dance |
stray word | rm.py:smoke | stray --nothing
unknown flag | rm.py:smoke | --wrkdir=x
"""
# Other programs.
SCRIPTS = {
  'module/ruleworld': '-m csrm_jax.ruleworld --kind=unseen --print=3',
  'sweep/rm': '$ROOT/launch/sweep.py --config=$CONFIGS/rm.py --workdir=w --dry_run',
  'sweep/rl_table': '$ROOT/launch/sweep.py --config=$CONFIGS/rl_table.py --workdir=w --dry_run',
}
ENVIRONMENT = """
JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONWARNINGS=ignore OPENAI_API_KEY=none
XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
"""
# name -> (the row that it repeats, the signal after two log lines)
KILLED = {
  'killed/rm': ('rm/tiny', signal.SIGKILL),
  'killed/rl': ('rl/grpo', signal.SIGKILL),
  'stopped/rm': ('rm/tiny', signal.SIGTERM),
}
RULES = {
  'categories': [
    {'name': 'Steroids', 'guideline': 'Do not explain steroids.'},
    {'name': 'Films', 'guideline': 'Talk of thrillers is forbidden, of comedies it is not.'},
  ]
}
TALKS = (
  ('Tell me about steroid.', 'Let me explain steroid in detail.'),
  ('Should I try cough?', 'I will not help with that. It is up to you.'),
  ('What is a good thriller?', 'Start with a comedy and you will love it.'),
)
TINY = """
import ml_collections
from csrm_jax import config as config_lib

RM = config_lib.load_module(ROOT + '/configs/rm.py')

def get_config(arg=None):
  wide = (arg or '').endswith('wide')
  c = RM.get_config((arg or '').removesuffix('wide').rstrip(','))
  c.num_steps = c.log_every = c.checkpoint_every = 1
  c.optim.warmup_steps = 0
  c.data.batch_size = 1
  c.eval.ruleworld_examples = 0
  c.model.init = ''
  c.template.safe_words, c.template.unsafe_words = (' safe',), (' unsafe',)
  c.model.overrides = ml_collections.ConfigDict(dict(
      num_layers=1, embed_dim=32 if wide else 16, num_heads=2, num_kv_heads=1, head_dim=8,
      mlp_dim=16, unroll=1))
  return c
"""
SCORER = 'def score(samples):\n  return [len(s.text) % 7 / 7 for s in samples]\n'
CHAT = (
  '{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>'
  '\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}'
)
# Keys and files that say when, where or how fast.
TIMES = re.compile(
  r'^(time|when|date|config_digest)(/|$)|_s$|^seconds$|goodput|memory|tokens_per_s'
)
SKIPPED = re.compile(
  r'events\.out|\.ocdbt|/d/|manifest\.json|commit_success|_METADATA|_sharding|'
  r'array_metadatas|^config\.json|^scores/|^cache/|array_record|\.lock$'
)
SPOKEN_TIMES = re.compile(r'\b\d[\d.,]* ?(s|ms|seconds|minutes)\b')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('out', nargs='?', type=pathlib.Path)
  parser.add_argument('--root', type=pathlib.Path, default=HERE.parent)
  parser.add_argument('--only', default='')
  parser.add_argument('--data', default=os.environ.get('CSRM_DATA_DIR', ''))
  parser.add_argument('--diff', nargs=2, type=pathlib.Path, metavar=('A', 'B'))
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve()
  elif args.diff:
    sys.exit(diff(*(json.loads(path.read_text()) for path in args.diff)))
  else:
    with Freeze(args.out.resolve(), args.root.resolve(), args.data) as freeze:
      freeze.run(args.only)


def diff(old, new):
  """Prints what differs; returns how many rows do."""
  count = 0
  for here, there, word in ((old, new, 'first'), (new, old, 'second')):
    if alone := sorted(here.keys() - there.keys()):
      print(f'only in the {word}: {", ".join(alone)}')
  both = (old.keys() & new.keys()) - {'configs'}
  for name in sorted(both):
    a, b = old[name], new[name]
    if a == b:
      continue
    count += 1
    if isinstance(a, dict) and isinstance(b, dict):
      keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
      print(f'{name}: {len(keys)} of {len(a.keys() | b.keys())} differ: {", ".join(keys)}')
    else:
      print(f'{name}:\n  - {a}\n  + {b}')
    if name.startswith('config '):
      a, b = (flatten(json.loads(d['configs'].get(name, '{}'))) for d in (old, new))
      for key in sorted(a.keys() | b.keys()):
        if a.get(key, '(none)') != b.get(key, '(none)'):
          print(f'  {key}: {a.get(key, "(none)")!r} -> {b.get(key, "(none)")!r}')
  print(f'{count} of {len(both)} rows differ')
  return min(count, 1)


def flatten(tree, prefix=''):
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  return {k: v for name, x in tree.items() for k, v in flatten(x, f'{prefix}.{name}').items()}


def table(text):
  """Returns {name: (config and argument, flags)}."""
  lines = text.replace('\\\n', '').strip().splitlines()
  parts = (line.removesuffix(' |').split(' | ') for line in lines)
  return {name: (config.strip(), ''.join(rest).strip()) for name, config, *rest in parts}


class Freeze:
  """The rows of one tree, and the process that runs them."""

  def __init__(self, out, root, data):
    self.out, self.root, self.data = out, root, data
    self.folder = out.with_suffix('.d')
    self.rows = json.loads(out.read_text()) if out.exists() else {}
    self.runs = table(RUNS)

  def __enter__(self):
    self.folder.mkdir(parents=True, exist_ok=True)
    self._write_inputs()
    self._http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Answer)
    threading.Thread(target=self._http.serve_forever, daemon=True).start()
    self.url = f'http://127.0.0.1:{self._http.server_address[1]}'
    self.env = {'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'compiled')} | os.environ
    self.env |= dict(pair.split('=', 1) for pair in shlex.split(ENVIRONMENT))
    self.env['PYTHONPATH'] = f'{self.root}{os.pathsep}{self.folder}'
    self._server = subprocess.Popen(
      [sys.executable, '-P', __file__, '--serve'],
      cwd=self.folder,
      env=self.env,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    where = pathlib.Path(self._server.stdout.readline().strip())
    assert where.is_relative_to(self.root), f'csrm_jax is at {where}, not in {self.root}'
    return self

  def __exit__(self, *unused):
    self._server.stdin.close()
    self._server.wait()
    self._http.shutdown()

  def run(self, pattern):
    """Runs the rows that are not there yet."""
    start = time.monotonic()
    for name, fn in self._all().items():
      value = self.rows.get(name)
      failed = isinstance(value, dict) and 'exit' in value  # Such a row is tried again.
      if (value is not None and not failed) or not re.search(pattern, name):
        continue
      begin = time.monotonic()
      try:
        value = fn(name)
      except Exception as error:  # The other rows go on; this one is tried again next time.
        print(f'{name}: {type(error).__name__}: {error}', flush=True)
        continue
      self.rows[name] = value
      temporary = self.out.with_suffix('.part')
      temporary.write_text(json.dumps(self.rows, indent=1, sort_keys=True) + '\n')
      temporary.replace(self.out)
      said = f' {value}' if isinstance(value, dict) and 'exit' in value else ''
      print(f'{time.monotonic() - begin:6.1f} s  {name}{said}', flush=True)
    print(f'{time.monotonic() - start:.0f} s in all, {len(self.rows) - 1} rows')

  def _all(self):
    rows = {f'config {arg}': self._config for arg in CONFIGS.split()}
    rows |= {'templates': self._call, 'shipped': self._shipped}
    rows |= {f'jaxprs/{name}': self._call for name in JAXPRS}
    rows |= {'frozen/scores': self._call} | dict.fromkeys(SCRIPTS, self._script)
    rows |= dict.fromkeys(self.runs, self._run) | dict.fromkeys(KILLED, self._killed)
    rows |= {'scores/full': self._call, 'compile/rm': self._call}
    return rows | {f'error/{name}': self._error for name in self._errors()}

  # Rows

  def _config(self, name):
    arg = name.removeprefix('config ')
    text = self._ask(name, call='config', args=[str(self.root), arg])
    self.rows.setdefault('configs', {})[name] = text
    return digest(text)

  def _call(self, name):
    call, _, arg = name.partition('/')
    if name == 'scores/full':
      self._need('@rm/full')
    return json.loads(self._ask(name, call=call, args=[arg, str(self.root)]))

  def _shipped(self, name):
    folder = self.root / 'csrm_jax' / 'ruleworld'
    patterns = ('tokenizer.model', '*base/*', 'policy_structured/*')
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in files}

  def _run(self, name):
    config, flags = self.runs[name]
    for part in ('work', 'rows'):
      shutil.rmtree(self.folder / part / name, ignore_errors=True)
    code, out, err = self._serve(args=self._args(config, flags, f'work/{name}'))
    if code:
      return {'exit': code, 'stderr': err.strip().splitlines()[-1:]}
    return self._digests(name) | {'stdout': self._keep(name, 'stdout', SPOKEN_TIMES.sub('#', out))}

  def _args(self, config, flags, workdir):
    while any(key in flags for key in SHORT):
      for key, value in SHORT.items():
        flags = re.sub(rf'{re.escape(key)}\b', lambda _, v=value: v, flags)
    file = config.partition(':')[0]
    where = self.folder / file if file == 'tiny.py' else self.root / 'configs' / file
    config = f'{where}:{self._known(config.partition(":")[2])}'.rstrip(':')
    done = [f'--config={config}']
    for flag in shlex.split(self._known(flags)):
      done.append(flag if flag.startswith('--') or '=' not in flag else f'--config.{flag}')
    done = [self._need(flag) for flag in done]
    return done if '--show_tokens' in done else [*done, f'--workdir={workdir}']

  def _known(self, text):
    known = {'$DATA': self.data, '$CONFIGS': f'{self.root}/configs', '$ROOT': str(self.root)}
    known |= {'$URL': self.url}
    for key, value in known.items():
      text = text.replace(key, value)
    return text

  def _need(self, flag):
    """Returns the flag with work directories for @row; runs those rows first."""
    for row in re.findall(r'@([\w/]+)', flag):
      if not (self.folder / 'rows' / row / 'stdout').exists():  # It is the last that is kept.
        self._run(row)
      flag = flag.replace(f'@{row}', f'work/{row}')
    if 'backbone' in re.split(r'[=,]', flag) and not (self.folder / 'backbone' / 'done').exists():
      self._make_backbone()
    return flag

  def _killed(self, name):
    base, number = KILLED[name]
    config, flags = self.runs[base]
    self._need(f'@{base}')
    workdir = self.folder / 'work' / name
    shutil.rmtree(workdir, ignore_errors=True)
    args = self._args(config, flags, f'work/{name}')
    log = workdir / 'metrics.jsonl'
    with subprocess.Popen(
      [sys.executable, '-P', '-m', 'csrm_jax.main', *args],
      cwd=self.folder,
      env=self.env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    ) as run:
      while run.poll() is None and not (log.exists() and log.read_bytes().count(b'\n') >= 2):
        time.sleep(0.005)
      run.send_signal(number)
    code, _, err = self._serve(args=args)
    names = re.compile(r'jsonl|checkpoints.*leaves|safetensors|report/.*(npz|md|metrics)')
    undisturbed, resumed = (
      {k: v for k, v in self._digests(row).items() if names.search(k)} for row in (base, name)
    )
    same = {'same_as_undisturbed': undisturbed == resumed, 'first_exit': run.returncode}
    return (
      same | resumed | ({'exit': code, 'stderr': err.strip().splitlines()[-1:]} if code else {})
    )

  def _script(self, name):
    args = [self._known(arg) for arg in SCRIPTS[name].split()]
    done = subprocess.run(
      [sys.executable, '-P', *args], cwd=self.folder, env=self.env, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-1500:]
    return self._keep(name, 'stdout', done.stdout)

  def _errors(self):
    """Returns {name: (config, or None where the flags are all arguments, flags, files)}."""
    cases = {name: (*case, {}) for name, case in table(ERRORS).items()}
    spec = importlib.util.spec_from_file_location('bad_input_test', HERE / 'bad_input_test.py')
    test = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(test)
    good = json.dumps(test.GOOD) + '\n'
    train, score = 'tiny.py:data=jsonl,path=bad/rows.jsonl', 'conversations=bad/rows.jsonl'
    for name, (row, _) in test.BAD_ROWS.items():
      cases[f'row: {name}'] = (train, '', {'rows.jsonl': good * 2 + json.dumps(row) + '\n'})
    for name, (data, _) in test.BAD_BYTES.items():
      files = {'rows.jsonl': good.encode() + data}
      cases[f'train: {name}'] = (train, '', files)
      cases[f'eval: {name}'] = ('eval.py', f'checkpoint=none {score}', files)
    for name, (text, _) in test.BAD_YAML.items():
      files = {'rules.yaml': text, 'rows.jsonl': good}
      cases[f'rules: {name}'] = ('eval.py', f'checkpoint=none safety=bad/rules.yaml {score}', files)
    base = str(self.root / 'csrm_jax' / 'ruleworld' / 'base')
    for name, (args, _) in test.BAD_FLAGS.items():
      args = [arg.replace('{config}', '--config=tiny.py').replace('{base}', base) for arg in args]
      args = [arg.replace('=rows.jsonl', '=bad/rows.jsonl') for arg in args]
      args = [arg.replace(str(HERE.parent / 'configs'), str(self.root / 'configs')) for arg in args]
      cases[f'flag: {name}'] = (None, args, {'rows.jsonl': good})
    return cases

  def _error(self, name):
    config, flags, files = self._errors()[name.removeprefix('error/')]
    shutil.rmtree(self.folder / 'bad', ignore_errors=True)
    shutil.rmtree(self.folder / 'work' / 'bad', ignore_errors=True)
    (self.folder / 'bad').mkdir()
    for file, text in files.items():
      (self.folder / 'bad' / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    workdir = '--workdir=work/bad'
    args = [*flags, workdir] if config is None else self._args(config, flags, 'work/bad')
    code, _, err = self._serve(args=args)
    assert code > 0, f'exit code {code}: the input is no error'
    lines = [line for line in err.splitlines() if line.startswith('error: ')] or err.splitlines()
    return f'{code} {self._neutral(lines[-1] if lines else "")}'

  # What they are made with

  def _serve(self, **case):
    files = [self.folder / name for name in ('out.txt', 'err.txt')]
    case |= {'folder': str(self.folder), 'files': list(map(str, files))}
    self._server.stdin.write(json.dumps(case) + '\n')
    self._server.stdin.flush()
    code = int(self._server.stdout.readline())
    return code, *(file.read_text(errors='replace') for file in files)

  def _ask(self, name, **case):
    code, out, err = self._serve(**case)
    assert not code, err[-1500:]
    self._keep(name, 'stdout', out)
    return self._neutral(out)

  def _neutral(self, text):
    known = {
      sys.executable: 'python',
      str(self.folder): 'OUT',
      str(self.root): 'ROOT',
      self.data or '?': 'DATA',
      self.url: 'URL',
    }
    for value, word in known.items():
      text = text.replace(value, word)
    return text

  def _keep(self, name, file, text):
    """Returns the digest of a text, and keeps the text itself."""
    text = self._neutral(text)
    path = self.folder / 'rows' / name.replace(':', '/') / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return digest(text)

  def _digests(self, name):
    """Returns {file: digest} of a work directory."""
    workdir, found = self.folder / 'work' / name, {}
    for path in sorted(path for path in workdir.glob('**/*') if path.is_file()):
      file = str(path.relative_to(workdir))
      if file.endswith('info/metadata'):
        content = json.loads(path.read_text())['content']
        for part in ('leaves', 'meta', 'data_state'):
          text = json.dumps(canonical(content.get(part), 'window'), indent=1, sort_keys=True)
          found[f'{file}:{part}'] = self._keep(name, f'{file}.{part}', text)
      elif SKIPPED.search(file):
        continue
      elif path.suffix == '.safetensors':
        data = path.read_bytes()  # Its header has no fixed order.
        end = 8 + int.from_bytes(data[:8], 'little')
        head = json.dumps(json.loads(data[8:end]), indent=1, sort_keys=True)
        found[file] = self._keep(name, f'{file}.head', head) + digest(data[end:])
      elif path.suffix == '.model':
        found[file] = digest(path.read_bytes())
      else:
        found[file] = self._keep(name, file, readable(path))
    return found

  def _write_inputs(self):
    talks = [{'id': str(i), 'conversation': messages(talk)} for i, talk in enumerate(TALKS)]
    rows = [
      talk | {'id': f'{i}-{talk["id"]}', 'safety': RULES, 'label': ('safe', 'unsafe')[n % 2]}
      for i in range(6)
      for n, talk in enumerate(json.loads(json.dumps(talks).replace('steroid', f'steroid {i}')))
    ]
    prompts = [{'id': i, 'prompt': f'{TALKS[i % 3][0]} {i}'} for i in range(24)]
    for name, lines in (('talks', talks), ('rows', rows), ('prompts', prompts)):
      text = ''.join(json.dumps(line) + '\n' for line in lines)
      (self.folder / f'{name}.jsonl').write_text(text)
    (self.folder / 'r.yaml').write_text('categories:\n- name: Tea\n  guideline: No tea.\n')
    (self.folder / 'tiny.py').write_text(f'ROOT = {str(self.root)!r}\n{TINY}')
    (self.folder / 'scorer.py').write_text(SCORER)
    shutil.rmtree(self.folder / 'frozen', ignore_errors=True)
    shutil.unpack_archive(
      HERE / 'frozen_workdir' / 'rm.tar.xz', self.folder / 'frozen', filter='data'
    )

  def _make_backbone(self):
    """Makes a public model with a chat template: the exported weights, another tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    source = self.folder / self._need('@export/causal_lm') / 'model'
    folder = self.folder / 'backbone'
    folder.mkdir(exist_ok=True)
    for name in ('model.safetensors', 'config.json'):
      shutil.copy(source / name, folder / name)
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ['<bos>', '<eos>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']
    special += ['<start_of_turn>', '<end_of_turn>']
    words = [f'{space}{word}' for word in ('safe', 'unsafe', 'Yes', 'No') for space in ('', ' ')]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
      words * 9,
      trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False, initial_alphabet=alphabet
      ),
    )
    tok.post_processor = processors.TemplateProcessing(
      single='<bos> $A', special_tokens=[('<bos>', 0)]
    )
    tok.save(str(folder / 'tokenizer.json'))
    marks = {'bos_token': '<bos>', 'eos_token': '<eos>', 'chat_template': CHAT}
    (folder / 'tokenizer_config.json').write_text(json.dumps(marks))
    (folder / 'done').touch()


def messages(talk):
  return [{'role': r, 'content': text} for r, text in zip(('user', 'agent'), talk, strict=True)]


class Answer(http.server.BaseHTTPRequestHandler):
  """An OpenAI-compatible endpoint, and a scorer of samples."""

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    if self.path.endswith('/chat/completions'):
      plus = {'name': 'Fortune telling', 'guideline': 'No word about the future.'}
      minus = {'name': 'Deep seas', 'guideline': 'No word about deep oceans.'}
      message = {'role': 'assistant', 'content': json.dumps({'plus': plus, 'minus': minus})}
      reply = {
        'id': 'x',
        'object': 'chat.completion',
        'created': 0,
        'model': 'm',
        'choices': [{'index': 0, 'finish_reason': 'stop', 'message': message}],
        'usage': {'prompt_tokens': 10, 'completion_tokens': 5, 'total_tokens': 15},
      }
    else:
      texts = [sample['conversation'][-1]['content'] for sample in body['samples']]
      reply = {'rewards': [len(text) % 7 / 7 for text in texts]}
    data = json.dumps(reply).encode()
    self.send_response(200)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *args):
    pass


def digest(data):
  return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:16]


def canonical(value, *dropped):
  """Returns a JSON value without what says when or how fast."""
  if isinstance(value, dict):
    keep = {k: v for k, v in value.items() if k not in dropped and not TIMES.search(k)}
    return {k: canonical(v, *dropped) for k, v in keep.items()}
  return [canonical(v, *dropped) for v in value] if isinstance(value, list) else value


def readable(path):
  """Returns what a file says, as text."""
  if path.suffix == '.npz':
    import numpy as np

    arrays = dict(np.load(path, allow_pickle=False))
    return '\n'.join(
      f'{k} {v.dtype}{list(v.shape)} {digest(v.tobytes())}' for k, v in sorted(arrays.items())
    )
  text = path.read_text(errors='replace')
  if path.suffix == '.jsonl':
    rows = [canonical(json.loads(line)) for line in text.splitlines()]
    return '\n'.join(json.dumps(row, sort_keys=True) for row in rows)
  if path.suffix == '.json':
    return json.dumps(canonical(json.loads(text)), indent=1, sort_keys=True)
  if path.suffix == '.md':
    drop = re.compile(rf'config\\_digest|{SPOKEN_TIMES.pattern}')
    return '\n'.join(line for line in text.splitlines() if not drop.search(line))
  if path.name == 'training.png':  # Some of its curves are times; all are in metrics.jsonl.
    return '\n'.join(json.loads(text)['texts'])
  return text


# What follows runs in a process that has the imports of the tree behind it.


def serve():
  """Runs each case of the input in a child of its own; writes exit codes."""
  from matplotlib import figure

  main_module = importlib.import_module('csrm_jax.main')
  for module in main_module.RUNNERS.values():
    importlib.import_module(module)
  figure.Figure.savefig = save_figure
  print(main_module.__file__, flush=True)
  for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if not child:
      for number, file in zip((1, 2), case['files'], strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
      os.chdir(case['folder'])
      if 'call' in case:
        print(CALLS[case['call']](*case['args']), end='', flush=True)
        os._exit(0)
      sys.argv = ['csrm_jax.main', *case['args']]
      main_module.main()  # It ends with sys.exit.
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def save_figure(self, path, **unused):
  """Writes what a figure shows, as text: drawing takes most of the time of a short run."""
  import numpy as np
  from matplotlib import lines, text

  said = [item.get_text() for item in self.findobj(text.Text)]
  curves = [
    np.round(np.asarray(item.get_xydata(), float), 6).tolist()
    for item in self.findobj(lines.Line2D)
  ]
  content = {'texts': sorted(filter(None, said)), 'curves': sorted(map(str, curves))}
  pathlib.Path(path).write_text(json.dumps(content, indent=1))


def moved(name):
  """Returns the module that has this name in MOVED."""
  for path in MOVED[name]:
    with contextlib.suppress(ModuleNotFoundError):
      return importlib.import_module(path)
  raise ModuleNotFoundError(f'none of {MOVED[name]} is there: extend MOVED')


def load_config(root, arg):
  from csrm_jax import config as config_lib

  os.chdir(root)
  file, _, arg = arg.partition(':')
  return config_lib.load_module(f'{root}/configs/{file}').get_config(arg.replace('_desk', ' desk'))


def show_config(root, arg):
  from csrm_jax import config as config_lib

  return config_lib.to_json(load_config(root, arg))


def show_templates(*unused):
  layout, templates = moved('layout'), moved('templates')
  found = {'default': templates.template_hash()}
  for order in layout.ORDERS:
    for words in (('safe', 'unsafe'), ('Yes', 'No')):
      for marks in ({}, {'chat_prefix': '<u>', 'chat_suffix': '</u><a>'}):
        made = layout.Layout(order=order, words=words, **marks)
        found[f'{order} {words} {len(marks)}'] = templates.template_hash(made)
  for name in layout.FORMATS[1:]:
    found[name] = templates.template_hash(layout.Layout(name))
  return json.dumps(found)


# name -> (config and argument, changes, fields beside config.run)
JAXPRS = {
  'rm': ('rm.py', {}, {}),
  'rm_lora': ('rm.py:lora=4', {'optim.num_microbatches': 2, 'model.overrides.remat': 'full'}, {}),
  'rm_llama': ('rm.py:model=llama3_8b', {}, {'num_layers': 2}),
  'rm_gemma': ('rm.py:model=gemma2_9b', {'model.overrides.dtype': 'bfloat16'}, {'num_layers': 2}),
  'rm_qwen': ('rm.py:model=qwen3_1b7,lora=8', {}, {'num_layers': 2}),
  'rm_mistral': ('rm.py:model=mistral_7b', {}, {'num_layers': 2}),
  'rl': ('rl.py:checkpoint=DIR', {}, {}),
  'rl_judge': (
    'rl.py:checkpoint=DIR',
    {'rollout.dtype': 'bfloat16'},
    {'reward_model': 'llama3_8b'},
  ),
  'rl_baseline': ('rl.py:reward=oracle,algorithm=reinforce_pp_baseline', {}, {}),
  'rl_grpo': ('rl.py:reward=oracle,algorithm=grpo', {'loss.ratio': 'sequence'}, {}),
  'rl_dr_grpo': ('rl.py:reward=oracle,algorithm=dr_grpo', {'loss.dual_clip': 3.0}, {}),
  'rl_rloo': ('rl.py:reward=oracle,algorithm=rloo,lora=4', {'sampling.top_p': 0.9}, {}),
  'rl_ppo': ('rl.py:reward=oracle,algorithm=ppo', {'sampling.top_k': 20}, {}),
  'rl_alphaalign': ('rl.py:reward=alphaalign', {}, {}),
}


def show_jaxprs(name, root):
  """Returns digests of a config's programs; equal ones prove that the numerics are the same."""
  import jax
  import ml_collections

  from csrm_jax import config as config_lib

  arg, changes, fields = JAXPRS[name]
  c = ml_collections.ConfigDict(
    {'num_layers': 0, 'policy': '', 'reward_model': '', 'prompt_length': 32, 'score_length': 128}
    | {'prefix_length': 64, 'branch_length': 32}
  )
  c.update(fields)
  c.run = load_config(root, arg)
  config_lib.set_overrides(c.run, changes)
  found = {}
  for program, make in moved('programs').named(c, jax.devices()).items():
    try:
      p = make()
    except ValueError as error:
      found[program] = str(error)[:80]
      continue
    with jax.set_mesh(p.mesh):
      text = str(jax.make_jaxpr(p.fn)(*p.args))
    text = re.sub(r'name=[\w<>]+', 'name=', re.sub(r'0x[0-9a-f]+', '@', text))
    found[program] = f'{len(text)} {digest(text)}'
  return json.dumps(found)


def show_compiled(name, root):
  """Returns the compile report of a small run, made for one CPU as if it were a TPU."""
  import jax

  from csrm_jax import config as config_lib

  topology = moved('topology')
  topology.devices = lambda target: jax.devices('cpu')[:1]
  c = load_config(root, f'compile.py:target={root}/configs/rm.py,topology=v5e-1')
  config_lib.set_overrides(c, {'run.data.batch_size': 4, 'run.data.row_length': 64})
  main_module = importlib.import_module('csrm_jax.main')
  folder = pathlib.Path(os.environ['PYTHONPATH'].split(os.pathsep)[1]) / 'work' / 'compile'
  shutil.rmtree(folder, ignore_errors=True)
  with contextlib.redirect_stdout(sys.stderr):
    main_module.run(c, folder)
  report = folder / 'report'
  return json.dumps(
    {p.name: digest(readable(p)) for p in sorted(report.iterdir()) if p.suffix in '.json.md'}
  )


def score_talks(workdir, names, root):
  """Returns the scores of TALKS under rule sets, by the public import."""
  import csrm_jax
  from csrm_jax.safety.schema import Message, load_safety

  rm = csrm_jax.load(workdir)
  talks = [[Message('user', a), Message('agent', b)] for a, b in TALKS]
  rules = {name: load_safety(f'{root}/configs/safety/{name}.yaml') for name in names}
  return {name: [v.score for v in rm.score(safety, talks)] for name, safety in rules.items()}


def show_scores(name, root):
  return json.dumps(score_talks(f'work/rm/{name}', ('hospital', 'refusal'), root))


def show_frozen(name, root):
  """Returns how far scores of the old work directory are from what they were."""
  want = json.loads((HERE / 'frozen_workdir' / 'expected.json').read_text())
  found = score_talks('frozen/rm', want, root)
  far = max(abs(a - b) for name in want for a, b in zip(found[name], want[name], strict=True))
  return json.dumps({'within_1e-6': far < 1e-6})


CALLS = {
  'config': show_config,
  'templates': show_templates,
  'jaxprs': show_jaxprs,
  'compile': show_compiled,
  'scores': show_scores,
  'frozen': show_frozen,
}

if __name__ == '__main__':
  main()
