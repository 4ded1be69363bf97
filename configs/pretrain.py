"""Makes the base weights of the default backbone (shipped in the package).

python -m csrm_jax.main --config=configs/pretrain.py --workdir=/tmp/pretrain

A language model of RuleWorld text and of questions about it; no verdicts.
"""

import pathlib

import ml_collections

import csrm_jax
from csrm_jax import config as config_lib


def get_config(arg=None):
  """Returns the config; arg: num_steps."""
  arg = config_lib.parse_arg(arg, num_steps=6000)
  package = pathlib.Path(csrm_jax.__file__).parent
  c = ml_collections.ConfigDict()
  c.runner = 'pretrain'
  c.seed = 0  # of the weights and of the corpus
  c.num_steps = arg.num_steps  # updates
  c.log_every = 100  # steps a line of metrics.jsonl sums up
  c.checkpoint_every = 500  # steps; a multiple of log_every
  # SentencePiece model (.model) or Hugging Face tokenizer.json.
  c.tokenizer = str(package / 'ruleworld' / 'tokenizer.model')

  c.model = ml_collections.ConfigDict()
  c.model.preset = 'tiny'  # a name of models.config.PRESETS
  c.model.overrides = ml_collections.ConfigDict({'unroll': 4})  # its fields

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
  return c
