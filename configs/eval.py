"""Scores conversations with a trained model, under rules of your own.

python -m csrm_jax.main --config=configs/eval.py --workdir=/tmp/scored \
  --config.checkpoint=/tmp/rm --config.safety=configs/safety/hospital.yaml \
  --config.conversations=conversations.jsonl
"""

import ml_collections


def get_config():
  """Returns the config."""
  c = ml_collections.ConfigDict()
  c.runner = 'evaluate'
  c.checkpoint = ''  # work directory of a training run
  # Rules for all rows (YAML or JSON); empty: each row brings its own `safety`.
  c.safety = ''
  # JSONL: {"id", "conversation": [{"role", "content"}, …], "label" or not}.
  c.conversations = ''
  # Tokens a prompt may have before its history and response are shortened; more
  # than in training is possible, and needed for long rules.
  c.max_length = 2048
  return c
