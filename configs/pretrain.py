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

import ml_collections

import csrm_jax
from csrm_jax import config as config_lib


def get_config(arg=None):
  """Returns the config; arg: task (base, policy, structured), num_steps."""
  arg = config_lib.parse_arg(arg, task=('base', 'policy', 'structured'), num_steps=int)
  package = pathlib.Path(csrm_jax.__file__).parent
  c = ml_collections.ConfigDict()
  c.runner = 'pretrain'
  c.seed = 0  # of the weights and of the corpus
  c.task = arg.task  # the weights are written to a folder of this name
  c.num_steps = 6000 if arg.num_steps is None else arg.num_steps  # updates
  c.log_every = 100  # steps a line of metrics.jsonl sums up
  c.checkpoint_every = 500  # steps; a multiple of log_every
  # Steps of a profiler trace in workdir/profile, as in '10:13'; '' for none.
  c.profile_steps = ''
  # SentencePiece model (.model) or Hugging Face tokenizer.json.
  c.tokenizer = str(package / 'ruleworld' / 'tokenizer.model')

  c.model = ml_collections.ConfigDict()
  c.model.preset = 'tiny'  # a name of models.config.PRESETS
  c.model.overrides = ml_collections.ConfigDict({'unroll': 4})  # its fields
  c.model.saved_dtype = 'float32'  # of the weights that are written

  c.data = ml_collections.ConfigDict()
  c.data.num_documents = 2_000_000  # the corpus repeats after these
  c.data.curriculum_length = 90_000  # documents until lists are longest
  c.data.batch_size = 12  # rows a step
  c.data.row_length = 256  # tokens a row
  c.data.max_segments = 8  # documents a row at most

  c.optim = ml_collections.ConfigDict()
  c.optim.lr = 2e-3  # peak; warm-up, then cosine to a tenth
  c.optim.warmup_steps = 200
  c.optim.weight_decay = 0.05  # decoupled; not on norm scales
  if arg.task != 'base':
    _policy(c, arg, package)
  return c


def _policy(c, arg, package):
  """Changes what is another way for a policy."""
  start, num_steps = {'policy': ('base', 1000), 'structured': ('policy_base', 500)}[arg.task]
  c.num_steps = num_steps if arg.num_steps is None else arg.num_steps
  del c.model.preset, c.data.curriculum_length
  c.data.batch_size, c.data.row_length = 16, 128
  c.model.weights = str(package / 'ruleworld' / start)  # to start from
  c.model.saved_dtype = 'float16'  # loaded as float32
  c.optim.lr = 1e-3
  c.optim.warmup_steps = 50
