"""Scores conversations with a model, under rules of your own.

python -m csrm_jax.main --config=configs/eval.py --workdir=/tmp/scored \
  --config.checkpoint=/tmp/rm --config.safety=configs/safety/hospital.yaml \
  --config.conversations=conversations.jsonl

The model is a trained reward model, an instruction-tuned model as it is, or a
guard model: --config.checkpoint=org/name --config.format=llama_guard_3

All benchmarks on one model, and the reports of several side by side:

python -m csrm_jax.main --config=configs/eval.py:benchmarks \\
  --workdir=/tmp/full --config.checkpoint=/tmp/rm \\
  --config.benchmarks.data_dir=DATA
python -m csrm_jax.main --config=configs/eval.py:compare --workdir=/tmp/both \\
  --config.compare="('/tmp/full', '/tmp/no_cca')"

How often the verifier of refusals is right, by people's labels of XSTest's completions:

python -m csrm_jax.main --config=configs/eval.py:refusals --workdir=/tmp/refusals \\
  --config.data_dir=DATA/xstest
"""

import ml_collections

from csrm_jax import config as config_lib


def get_config(arg=None):
  """Returns the config; arg: benchmarks, compare, refusals, or nothing for a file."""
  arg = config_lib.parse_arg(arg, benchmarks=False, compare=False, refusals=False)
  c = ml_collections.ConfigDict()
  if arg.compare:
    c.runner = 'compare'
    c.title = ''  # of the report
    # Work directories of configs/eval.py:benchmarks, or of configs/rl.py; '*'
    # stands for anything.
    c.compare = ()
    # What the others are compared with: a folder's name; of policies, what
    # the report calls it, as 'reinforce_pp, full'. '' for the first.
    c.reference = ''
    c.num_samples = 1000  # of the paired bootstrap of reward models
    return c
  if arg.refusals:
    c.runner = 'refusals'
    c.data_dir = ''  # of XSTest, with its *completions*.csv
    # A reward model, or a public model, to be measured beside the patterns, under rules that
    # forbid to refuse, such as configs/safety/refusal.yaml; '' for neither.
    c.checkpoint = ''
    c.safety = ''
    c.words = ('safe', 'unsafe')  # of a public model
    return c
  c.runner = 'benchmark' if arg.benchmarks else 'evaluate'
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
  c.numerics = ml_collections.ConfigDict(
    {
      'dtype': '',  # of activations: float32 or bfloat16; '' for float32
      'param_dtype': '',  # of parameters; '' for that of the file
    }
  )
  # Tokens a prompt may have before its history and response are shortened; more
  # than in training is possible, and needed for long rules.
  c.max_length = 2048
  if arg.benchmarks:
    c.title = ''  # of the report; '' names the model
    c.benchmarks = ml_collections.ConfigDict(
      {
        'ruleworld_examples': 1000,  # of the two largest sets; 0 for none
        'ruleworld_seed': 2000,  # the same for all that is compared
        'data_dir': '',  # a folder for each public set; '' for none
        'names': (),  # of public sets; () for all
        'max_items': 0,  # of each benchmark, evenly spread; 0 for all
      }
    )
    return c
  # Rules for all rows (YAML or JSON); empty: each row brings its own `safety`.
  c.safety = ''
  # JSONL: {"id", "conversation": [{"role", "content"}, …], "label" or not}.
  c.conversations = ''
  return c
