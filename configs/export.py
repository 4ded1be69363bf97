"""Writes a trained reward model for other programs to open.

python -m csrm_jax.main --workdir=/tmp/exported \
  --config=configs/export.py:checkpoint=/tmp/rm,form=causal_lm

The folder is /tmp/exported/model (with form=peft, /tmp/exported/adapter).
"""

import ml_collections

from csrm_jax import config as config_lib


def get_config(arg=None):
  """Returns the config; arg: checkpoint, form."""
  arg = config_lib.parse_arg(
    arg, checkpoint='', form=('causal_lm', 'sequence_classification', 'peft', 'gguf')
  )
  c = ml_collections.ConfigDict()
  c.runner = 'export'
  c.checkpoint = arg.checkpoint  # the work directory of a training run
  # causal_lm writes the whole model, adapters merged; the verdict is its next token.
  # sequence_classification has one logit, the score, at the last token of the prompt; it needs one
  # verdict token for each label.
  # peft writes the adapters alone, for the weights that they were trained on.
  # gguf writes model/model.gguf, adapters merged, for llama.cpp (families llama, mistral, qwen3).
  c.form = arg.form
  # Of the written weights: float32, bfloat16; with gguf float16; '' is that of the run.
  c.dtype = ''
  # Rules that judge where a caller of the chat template gives none: a file; '' for none, which is
  # an error of the caller's then.
  c.safety = ''
  c.threshold = 0.5  # P(unsafe) from which on readers of config.json flag a response
  c.hub = ''  # org/name on the Hugging Face hub to upload to, as you are logged in; '' for none
  c.hub_private = True  # whether a repository that is new there is private
  c.max_shard_bytes = 5_000_000_000  # the largest file; a larger model is written as several
  c.seed = 0  # draws the tokens on which the written model is checked
  return c
