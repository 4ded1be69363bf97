"""Compiles a run's programs for TPUs that are not there: does it fit, how fast?

python -m csrm_jax.main --workdir=/tmp/compiled \
  --config=configs/compile.py:topology=v5e-64,model=llama3_8b
python -m csrm_jax.main --workdir=/tmp/compiled \
  --config=configs/compile.py:target=configs/rl.py,topology=v5e-64,\
policy=llama3_8b,reward_model=llama3_8b

It needs the package libtpu (pip install -e ".[tpu]"), but no TPU and no weights. Arguments that
this file does not have go to the target. The same run on that slice is

python -m csrm_jax.main --workdir=gs://... \
  --config=configs/rm.py:mesh=v5e-64,model=llama3_8b
"""

import ml_collections

from csrm_jax import config as config_lib


def get_config(arg=None):
  """Returns the config.

  arg: topology (a slice as it is rented: v5e-64, v5p-16, 2xv5e-256), target (the config file of the
  run), reward_model (with target=configs/rl.py: the model that scores completions, a name of
  models.config.PRESETS), and the target's own arguments.
  """
  own, rest = config_lib.split_arg(arg, ('topology', 'target', 'reward_model'))
  arg = config_lib.parse_arg(own, topology='v5e-64', target='configs/rm.py', reward_model='')
  c = ml_collections.ConfigDict()
  c.runner = 'compile'
  c.topology = arg.topology  # a slice as it is rented, such as v5e-64
  # How many layers the compiled model has; 0 for all. All layers are one loop, so few layers
  # compile to the same program, but the memory shown is then that of few layers.
  c.num_layers = 0
  # The share of a chip's peak that large products reach in practice.
  c.product_efficiency = 0.7
  # If training does not fit, compiles it with settings that need less memory until it does, and
  # says which. This takes minutes more.
  c.advise = True
  # The run itself, as its own file makes it.
  target = config_lib.load_module(arg.target)
  mesh = f'mesh={arg.topology}'
  c.run = target.get_config(','.join(part for part in (rest, mesh) if part))
  if c.run.runner != 'align':
    # What is assumed of a row in which prompts share tokens (data.share_prefix): how many they
    # share, such as a conversation or rules, and how many each has of its own.
    c.prefix_length = 512
    c.branch_length = 128
    c.programs = ('train', 'score')
    return c
  c.programs = ('prefill', 'decode', 'logprobs', 'update')
  # A name of models.config.PRESETS with the shape of run.policy.init, whose files then need not be
  # here; '' reads init.
  presets = {init: name for name, init in target.POLICIES.items()}
  c.policy = presets.get(c.run.policy.init, '')
  c.reward_model = arg.reward_model
  if arg.reward_model:
    c.programs += ('score',)
  c.prompt_length = 256  # tokens in the longest prompt of a batch
  c.score_length = 1024  # tokens in a prompt of the reward model: rules and conversation
  return c
