"""Aligns by several reward models under several rule sets: the paper's Table 5.

python launch/sweep.py --config=configs/rm.py --workdir=/tmp/rewards \\
  --seeds=0,1,2
python launch/sweep.py --config=configs/rl_table.py:rewards=/tmp/rewards \\
  --workdir=/tmp/table
python -m csrm_jax.main --config=configs/eval.py:compare \\
  --workdir=/tmp/report --config.compare="('/tmp/table/*',)"

The first trains the full reward model and its ablations; each of its seeds is
the reward of one seed here. `--only=` and `algorithm=` choose among the runs.
"""

import pathlib

from csrm_jax import config as config_lib
from csrm_jax.rl import algorithms

# Held-out rule sets; the settings of configs/rl.py were chosen on another one.
RULES = ('pet forum', 'savings bank', 'music school', 'weather desk')
REWARDS = ('full', 'rules_blind', 'no_cca', 'no_sa')
NUM_SEEDS = 3


def get_config(arg=None):
  """Returns the config of one run.

  arg: rewards (the work directory of a sweep of configs/rm.py), run (one of its folders), rules,
  and the other arguments of configs/rl.py.
  """
  text, rest = config_lib.split_arg(arg, ('rewards', 'run'))
  own = config_lib.parse_arg(text, rewards='', run='full-seed0')
  path = pathlib.Path(__file__).parent / 'rl.py'
  checkpoint = pathlib.Path(own.rewards) / own.run if own.rewards else ''
  c = config_lib.load_module(path).get_config(
    ','.join(part for part in (f'checkpoint={checkpoint}', rest) if part)
  )
  c.seed = int(own.run.rpartition('seed')[2])
  if algorithms.get(c.algorithm).online:
    # A third of the samples, each used for more updates, is enough to tell rewards apart.
    c.num_steps, c.rollout.num_prompts, c.loss.num_mini_batches = 40, 32, 4
    c.eval.every = 0
  return c


def sweep():
  """A run for each seed, rule set and reward."""
  return [
    {
      'name': f'{rules.replace(" ", "_")}-{reward}-seed{seed}',
      'arg': f'run={reward}-seed{seed},rules={rules}',
    }
    for seed in range(NUM_SEEDS)
    for rules in RULES
    for reward in REWARDS
  ]
