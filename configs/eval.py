"""Scores conversations with a model, under rules of your own.

python -m csrm_jax.main --config=configs/eval.py --workdir=/tmp/scored \
  --config.checkpoint=/tmp/rm --config.safety=configs/safety/hospital.yaml \
  --config.conversations=conversations.jsonl

The model is a trained reward model, an instruction-tuned model as it is, or a
guard model: --config.checkpoint=org/name --config.format=llama_guard_3
"""

import ml_collections


def get_config():
  """Returns the config."""
  c = ml_collections.ConfigDict()
  c.runner = 'evaluate'
  # Work directory of a training run; or a Hugging Face folder, a hub id
  # (org/name) or a .gguf file.
  c.checkpoint = ''
  # What follows is for such a public model; a trained one knows it.
  # Of prompts: csrm, llama_guard_3, llama_guard_3_user (judges the last user
  # message), shield_gemma, shield_gemma_user.
  c.format = 'csrm'
  # For "safe" and "unsafe" in the format csrm; ('Yes', 'No') where a tokenizer
  # splits these.
  c.words = ('safe', 'unsafe')
  c.numerics = ml_collections.ConfigDict({
      'dtype': '',  # of activations: float32 or bfloat16; '' for float32
      'param_dtype': '',  # of parameters; '' for that of the file
  })
  # Rules for all rows (YAML or JSON); empty: each row brings its own `safety`.
  c.safety = ''
  # JSONL: {"id", "conversation": [{"role", "content"}, …], "label" or not}.
  c.conversations = ''
  # Tokens a prompt may have before its history and response are shortened; more
  # than in training is possible, and needed for long rules.
  c.max_length = 2048
  return c
