"""Makes the weights that the package ships: base, policy_base and
policy_structured of ruleworld/.

python -m csrm_jax.main --config=configs/pretrain.py --workdir=/tmp/pretrain
python -m csrm_jax.main --config=configs/pretrain.py:task=policy --workdir=...
(or task=structured)

base: a language model of RuleWorld text and of questions about it; no verdicts.
policy: that model, taught to answer requests; it knows no rules.
structured: that policy, taught to reason first, for AlphaAlign.
"""

import pathlib

from csrm_jax import config as config_lib

common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))


def get_config(arg=None):
  """Returns the config; arg: task (base, policy, structured), num_steps."""
  arg = config_lib.parse_arg(arg, task=tuple(TASKS), num_steps=int)
  return common.merge(
    BASE,
    {'task': arg.task} | TASKS[arg.task],
    {} if arg.num_steps is None else {'num_steps': arg.num_steps},
  )


BASE = {
  'runner': 'pretrain',
  'seed': 0,  # of the weights and of the corpus
  'task': 'base',  # the weights are written to a folder of this name
  'num_steps': 6000,  # updates
  'log_every': 100,  # steps a line of metrics.jsonl sums up
  'checkpoint_every': 500,  # steps; a multiple of log_every
  # Steps of a profiler trace in workdir/profile, as in '10:13'; '' for none.
  'profile_steps': '',
  # SentencePiece model (.model) or Hugging Face tokenizer.json.
  'tokenizer': common.TOKENIZER,
  'model': {
    'preset': 'tiny',  # a name of models.config.PRESETS; '' takes that of weights
    'weights': '',  # to start from; '' for random
    'overrides': {'unroll': 4},  # fields of the model
    'saved_dtype': 'float32',  # of the weights that are written
  },
  'data': {
    'num_documents': 2_000_000,  # the corpus repeats after these
    'curriculum_length': 90_000,  # documents until lists are longest; of base
    'batch_size': 12,  # rows a step
    'row_length': 256,  # tokens a row
    'max_segments': 8,  # documents a row at most
  },
  'optim': common.OPTIM
  | {
    'lr': 2e-3,  # peak; warm-up, then cosine
    'warmup_steps': 200,
    'weight_decay': 0.05,
  },
}

# A policy starts from weights, and is saved small: it is loaded as float32.
_POLICY = {
  'model.preset': '',
  'model.saved_dtype': 'float16',
  'data.batch_size': 16,
  'data.row_length': 128,
  'optim.lr': 1e-3,
  'optim.warmup_steps': 50,
}
TASKS = {
  'base': {},
  'policy': _POLICY | {'num_steps': 1000, 'model.weights': str(common.RULEWORLD / 'base')},
  'structured': _POLICY
  | {'num_steps': 500, 'model.weights': str(common.RULEWORLD / 'policy_base')},
}
