"""Makes the weights that the package ships: base, policy_base, policy_structured in ruleworld/.

python -m csrm_jax.main --config=configs/pretrain.py --workdir=/tmp/pretrain
python -m csrm_jax.main --config=configs/pretrain.py:task=read --workdir=... \
  --config.model.weights=/tmp/pretrain/base
python -m csrm_jax.main --config=configs/pretrain.py:task=verdicts --workdir=... \
  --config.model.weights=.../read
python -m csrm_jax.main --config=configs/pretrain.py:task=ordinary --workdir=... \
  --config.model.weights=.../verdicts
python -m csrm_jax.main --config=configs/pretrain.py:task=policy --workdir=...
(or task=structured)

base: a language model that has read RuleWorld text and questions about it.
read: it goes on with what follows its curriculum, such as replies that just do not break a rule.
verdicts: it is asked a reward model's question, too, on topics and in wordings of training.
ordinary: it reads what people forbid and allow in ordinary sentences, too; the package ships the
result as its base. These three read the same documents: the corpus's last shares and kinds were
set in between, and 1,200 steps of `ordinary` with fewer sentences came before its last 1,000, so
what is shipped is not quite what these commands make.
policy: the base, taught to answer requests; it knows no rules.
structured: the policy, taught to reason first, for AlphaAlign.
"""

import pathlib

from csrm_jax import config as config_lib

common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))


def get_config(arg=None):
  """Returns the config; arg: task (a key of TASKS), num_steps."""
  arg = config_lib.parse_arg(arg, task=tuple(TASKS), num_steps=int)
  return common.merge(
    BASE,
    {'task': arg.task} | TASKS[arg.task],
    {} if arg.num_steps is None else {'num_steps': arg.num_steps},
  )


BASE = {
  'runner': 'pretrain',
  'seed': 0,  # decides the first weights and the corpus
  'task': 'base',  # also the name of the folder that the weights are written to
  'num_steps': 6000,  # updates
  # Where metrics go beside metrics.jsonl, which is always there: tensorboard, wandb, trackio,
  # mlflow.
  'loggers': ('jsonl', 'tensorboard'),
  'log_every': 100,  # steps that one line of metrics.jsonl sums up
  'checkpoint_every': 500,  # steps; a multiple of log_every
  # The steps of a profiler trace in workdir/profile, such as '10:13'; '' for no trace.
  'profile_steps': '',
  # Whether a run goes on although its weights have changed since its checkpoint.
  'accept_changes': False,
  # A SentencePiece model (.model) or a Hugging Face tokenizer.json.
  'tokenizer': common.TOKENIZER,
  'model': {
    'preset': 'tiny',  # a name of models.config.PRESETS; '' takes the shape of `weights`
    'weights': '',  # the weights to start from; '' for random ones
    'overrides': {'unroll': 4, 'dtype': 'bfloat16'},  # fields of the model
    'saved_dtype': 'float32',  # the dtype of the weights that are written
  },
  'data': {
    'num_documents': 2_000_000,  # the corpus repeats after these
    # Not of policies: documents until lists of rules have their full length; they start with one.
    'curriculum_length': 90_000,
    'batch_size': 12,  # packed rows in a step
    'row_length': 384,  # tokens in a row
    'max_segments': 8,  # the most documents in a row
  },
  'optim': common.OPTIM
  | {'optimizer': 'muon', 'lr': 2e-3, 'warmup_steps': 200, 'weight_decay': 0.05},
}

# A policy starts from weights. It is saved as float16, because the package ships it, and is
# loaded as float32.
_POLICY = {
  'model.preset': '',
  'model.saved_dtype': 'float16',
  'model.overrides.dtype': 'float32',
  'data.batch_size': 16,
  'data.row_length': 128,
  'optim.optimizer': 'adamw',
  'optim.lr': 1e-3,
  'optim.warmup_steps': 50,
}
# What goes on after the curriculum.
_FURTHER = {
  'model.preset': '',
  'data.curriculum_length': 1,
  'optim.lr': 1.5e-3,
  'optim.warmup_steps': 30,
}
TASKS = {
  'base': {},
  'read': _FURTHER | {'seed': 1, 'num_steps': 1600, 'optim.warmup_steps': 50},
  'verdicts': _FURTHER | {'seed': 3, 'num_steps': 1400},
  'ordinary': _FURTHER | {'seed': 5, 'num_steps': 1000},
  'policy': _POLICY | {'num_steps': 1000, 'model.weights': f'{common.RULEWORLD}/base'},
  'structured': _POLICY | {'num_steps': 500, 'model.weights': f'{common.RULEWORLD}/policy_base'},
}
