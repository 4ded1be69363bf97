"""Aligns a policy to rules, with a configurable reward model as its reward.

python -m csrm_jax.main --config=configs/rl.py:checkpoint=/tmp/rm \
  --workdir=/tmp/rl
python -m csrm_jax.main --config=configs/rl.py:checkpoint=/tmp/rm,\
algorithm=distillation --workdir=...
python -m csrm_jax.main --config=configs/rl.py:reward=alphaalign --workdir=...
python -m csrm_jax.main --config=configs/rl.py:checkpoint=/tmp/smol,\
policy=smollm2_135m,data=xstest,data_dir=DIR,rules=rules.yaml --workdir=...
python -m csrm_jax.main --config=configs/rl.py:checkpoint=/tmp/rm8b,\
policy=mistral_7b,mesh=h100-8,data=jsonl,path=PROMPTS,rules=rules.yaml \
  --workdir=...
python launch/sweep.py --config=configs/rl.py:checkpoint=/tmp/rm --workdir=...

A run is `base`, changed by the parts that `get_config` names, in their order,
and last by --config.KEY=VALUE. Every run has all keys; those that do nothing
with its algorithm or reward are empty (csrm_jax.rl.algorithms says which).
"""

import pathlib

from ml_collections.config_dict import placeholder

from csrm_jax import config as config_lib
from csrm_jax.core import topology
from csrm_jax.rl import algorithms

common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))

REWARDS = ('csrm', 'oracle', 'http', 'python', 'alphaalign')
# Public instruction-tuned models -> their weights on the hub.
POLICIES = {
  name: common.BACKBONES[name] for name in ('smollm2_135m', 'llama3_8b', 'mistral_7b', 'qwen3_1b7')
}
# AlphaAlign and its ablations -> what becomes of the helpfulness.
VARIANTS = {'full': 'standardised', 'zero': 'none', 'raw': 'raw'}


def get_config(arg=None):
  """Returns the config.

  arg: algorithm (a name of csrm_jax.rl.algorithms; auto is grpo with
  alphaalign, else reinforce_pp), reward (see REWARDS); checkpoint (work
  directory of the reward model: reward=csrm), url (of the scorer: reward=http),
  function (module:name: reward=python), variant (full|zero|raw:
  reward=alphaalign); policy (ruleworld or a name of POLICIES) and policy_init
  (its weights: a folder, a hub id, or the policy/ that an earlier run has
  written), lora (rank of adapters; 0 trains all weights);
  data=ruleworld|xstest|jsonl with data_dir or path, rules (a RuleWorld rule
  set, or a YAML or JSON file); mesh (TPUs or GPUs as they are rented: v5e-64,
  v5p-16, h100-8), num_steps, smoke (a run of a minute that exercises
  everything).
  """
  arg = config_lib.parse_arg(
    arg,
    algorithm=('auto', *algorithms.ALGORITHMS),
    reward=REWARDS,
    checkpoint='',
    url='',
    function='',
    variant=tuple(VARIANTS),
    policy=('ruleworld', *POLICIES),
    policy_init='',
    lora=0,
    data=('ruleworld', 'xstest', 'jsonl'),
    data_dir='',
    path='',
    rules='',
    mesh='',
    num_steps=0,
    smoke=False,
  )
  if arg.algorithm == 'auto':
    arg.algorithm = 'grpo' if arg.reward == 'alphaalign' else 'reinforce_pp'
  is_online = algorithms.get(arg.algorithm).online
  is_public = arg.policy != 'ruleworld'
  config = common.merge(
    base(arg),
    {} if is_online else offline_part(arg),
    ALPHAALIGN if arg.reward == 'alphaalign' else {},
    public_part(arg) if is_public else {},
    # A slice has the paper's recipe instead of a laptop's.
    (LAPTOP if is_online else LAPTOP_OFFLINE) if is_public and (not arg.mesh or arg.smoke) else {},
  )
  config = common.merge(
    config,
    slice_part(arg, config) if arg.mesh else {},
    SMOKE if arg.smoke else {},
    {'num_steps': arg.num_steps} if arg.num_steps else {},
  )
  for key in algorithms.idle_keys(config):
    *sections, last = key.split('.')
    section = config
    for name in sections:
      section = section[name]
    kind = section.get_type(last)
    del section[last]
    section[last] = placeholder(kind)
  return config


def base(arg):
  """Returns all keys there are: of an online run on a laptop, in RuleWorld."""
  in_world, alphaalign = arg.data == 'ruleworld', arg.reward == 'alphaalign'
  start = common.RULEWORLD / ('policy_structured' if alphaalign else 'policy_base')
  return {
    'runner': 'align',
    'title': 'Aligned policy',  # of the report
    'seed': 0,  # of prompts, draws, mini batches and adapters
    'algorithm': arg.algorithm,
    'num_steps': 60,  # rollouts; offline: updates
    'log_every': 1,  # steps a line of metrics.jsonl sums up
    'checkpoint_every': 10,  # a multiple of log_every
    # Steps of a profiler trace in workdir/profile, as in '10:13'; '' for none.
    'profile_steps': '',
    'policy': {
      # Weights: a folder with safetensors and config.json, a hub id or .gguf
      # file.
      'init': arg.policy_init or str(start),
      # SentencePiece model (.model) or tokenizer.json; '' takes that of init.
      'tokenizer': common.TOKENIZER,
      # What stands around a user's turn: 'plain' and 'structured' are those of
      # RuleWorld's policy, 'chat' is init's chat template.
      'marks': 'structured' if alphaalign else 'plain',
      # Template text in front of the first turn, such as how to answer.
      'instruction': '',
      'overrides': common.OVERRIDES | {'lora_rank': arg.lora, 'lora_alpha': 2.0 * arg.lora or 16.0},
    },
    'data': {
      # Prompts: ruleworld; xstest (its CSV file); jsonl (lines of id, prompt
      # and, where known, label 'harmful' or 'benign').
      'source': arg.data,
      'path': arg.path or arg.data_dir,  # of a file or its folder
      # In force for all prompts: the name of a RuleWorld rule set, or a file.
      'rules': arg.rules or ('film club' if in_world else ''),
      'num_prompts': 1024,  # to train on; of files, those not held out
      # As many harmful prompts to train on as benign ones: of labels alone it
      # pays to treat all like the more frequent kind.
      'balance': alphaalign,
      'eval_seed': 1,  # of RuleWorld's held-out prompts
      'eval_fraction': 0.2,  # of files, held out by a hash of the prompt
    },
    'reward': {
      'name': arg.reward,
      # reward=csrm: R = sigmoid(a * score + b).
      'checkpoint': arg.checkpoint,  # work directory of configs/rm.py
      'a': 1.0,
      'b': 0.0,
      'max_length': 2048,  # tokens a prompt of the reward model may have
      # reward=http
      'url': arg.url,  # is sent samples, answers {"rewards": [...]}
      'timeout_s': 60.0,  # of a request
      'num_tries': 3,  # of a request
      'backoff_s': 1.0,  # before the second try; doubles
      'batch_size': 64,  # samples a request
      # reward=python
      'function': arg.function,  # module:name of samples -> numbers
      # reward=alphaalign
      'variant': VARIANTS[arg.variant],  # helpfulness: standardised, raw, none
      'format_weight': 1.0,  # r_f
      'answer_weight': 2.0,  # r_a
      # V_r: oracle (RuleWorld's), patterns, boxed (patterns in \boxed{} only),
      # or the work directory of a reward model, asked whether the answer
      # refuses.
      'refusal': arg.checkpoint or ('oracle' if in_world else 'patterns'),
      # Which such a model is asked by: rules that forbid to refuse.
      'refusal_rules': str(pathlib.Path(__file__).parent / 'safety' / 'refusal.yaml'),
      # Of the answer, 1 to 5: oracle (RuleWorld's), none, or the work directory
      # of a reward model that was trained on preference pairs without rules.
      'helpfulness': 'oracle' if in_world else 'none',
      'helpfulness_a': 1.0,  # 1 + 4 sigmoid(a * score + b)
      'helpfulness_b': 0.0,
      # All but alphaalign
      'mode': 'product',  # of safety and helpfulness; or sum
      'safety_weight': 1.0,  # exponent in a product, factor in a sum
      'helpfulness_weight': 1.0,  # likewise
      'overlong_buffer': 0,  # tokens before the limit that are punished; 0: none
      'overlong_penalty': 1.0,  # at the limit
      'clip': (),  # (low, high) of the total
    },
    'sampling': {
      'max_completion_length': 36,  # tokens, the stop token included
      'temperature': 1.0,  # also of all log-probabilities
      'top_p': 1.0,  # 1 for all tokens
      'top_k': 0,  # 0 for all tokens
      # Devices that a copy of the weights to sample from is cut over, by heads;
      # each such group draws completions of its own.
      'tensor': 1,
    },
    # Online algorithms.
    'rollout': {
      'num_prompts': 64,  # a step
      'num_generations': 8,  # completions of each
      # Of a copy of the weights that is sampled from, as bfloat16; '' for none.
      'dtype': '',
      'samples_every': 10,  # steps between tables in samples.jsonl; 0: none
      'num_samples': 16,  # of each table
    },
    'loss': {
      'epsilon': 0.2,  # ratios below 1 - epsilon are clipped
      'epsilon_high': 0.2,  # ratios above 1 + epsilon_high are
      'dual_clip': placeholder(float),  # largest ratio where A < 0; above 1
      'ratio': 'token',  # or sequence (GSPO)
      # token-mean, seq-mean-token-mean, seq-mean-token-sum-norm; None: as the
      # algorithm has it. The same for kl_place and kl_estimator.
      'loss_aggregation': placeholder(str),
      'kl_place': placeholder(str),  # reward, loss or none
      'kl_estimator': placeholder(str),  # k1 in the reward; k2, k3 in the loss
      'kl_coef': 0.02,  # 0 without a KL
      'kl_target': placeholder(float),  # kl/ref that adapts kl_coef
      'kl_horizon': 10_000,  # samples within which it adapts
      'num_iterations': 1,  # times that a step's samples are used
      'num_mini_batches': 2,  # updates of each time
      'mask_truncated': False,  # cut-off completions have no part in the loss
      'normalise_rewards': False,  # by mean and spread of all so far
      'gamma': 1.0,  # discount a token; of reinforce_pp..., ppo
      'lam': 0.95,  # of GAE; this and what follows: ppo
      'value_clip': 0.2,  # of a value's change, in units of the reward
      'vf_coef': 0.1,  # weight of the critic's loss
    },
    'stop': {
      'kl': placeholder(float),  # kl/ref of a log line that ends the run
      # How far reward/mean may fall below its best log line before the run ends.
      'reward_drop': placeholder(float),
    },
    # Offline algorithms. The paper pairs the 5 best of 100 with the 5 worst.
    # The policy of RuleWorld learns more from all of 24, from more prompts.
    'pairs': {
      'num_prompts': 512,  # the first of data.num_prompts
      'num_samples': 24,  # completions of each
      'num_best': 12,  # of them, paired at random with as many of the worst
      'num_parallel': 16,  # prompts whose completions are drawn at once
      'batch_size': 48,  # pairs an update
      'beta': 0.3,  # of the loss
      # Of -log p of the better completion, a token, which is added. Without it
      # both sides of a pair lose probability to text that was never drawn.
      'nll_coef': 2.0,
    },
    'optim': common.OPTIM | {'lr': 1e-3, 'warmup_steps': 5},
    'mesh': common.MESH,
    'eval': {
      'num_prompts': 128,  # held out; also answered by the unaligned policy
      'best_of': 8,  # of so many samples of the unaligned policy; 0 for none
      # Steps between looks at reward and, in RuleWorld, truth of held-out
      # prompts; 0 for none.
      'every': 10,
    },
  }


def offline_part(arg):
  """Returns what an algorithm changes that learns from pairs."""
  highest = 5.0 if arg.data == 'ruleworld' else 1.0  # with helpfulness, or without
  return {
    'num_steps': 200,
    'log_every': 10,
    'checkpoint_every': 50,
    'optim.warmup_steps': 20,
    # Nothing is worse: log R of two bad completions differs by chance.
    'reward.clip': (0.05 * highest, highest),
  }


# What suits AlphaAlign's longer completions and its labels.
ALPHAALIGN = {
  'sampling.max_completion_length': 96,
  'eval.num_prompts': 256,  # for rates of a few percent
  'optim.lr': 5e-4,  # at 1e-3 the format is lost
  # Refusing is unlearnt before it is learnt where it belongs, unless many
  # completions of a prompt, and the KL, keep it in sight.
  'rollout.num_prompts': 32,
  'rollout.num_generations': 16,
  'loss.num_mini_batches': 8,
  'loss.kl_coef': 0.05,
}


def public_part(arg):
  """Returns what a public model changes, wherever it runs."""
  return {
    'policy.init': arg.policy_init or POLICIES[arg.policy],
    'policy.tokenizer': '',
    'policy.marks': 'chat',
    'policy.overrides.unroll': 1,
    'policy.overrides.remat': 'dots',
    'optim.lr': 1e-4 if arg.lora else 1e-6,
    'sampling.max_completion_length': lambda num: max(64, num),
  }


# A few steps of a public model, for a CPU.
LAPTOP = {
  'num_steps': 4,
  'optim.warmup_steps': 1,
  'optim.num_microbatches': 4,
  'eval.num_prompts': 16,
  'rollout.num_prompts': 8,
}
LAPTOP_OFFLINE = {
  'num_steps': 20,
  'optim.warmup_steps': 1,
  'eval.num_prompts': 16,
  'pairs.num_prompts': 8,
  'pairs.num_samples': 16,
  'pairs.num_best': 4,
  'pairs.num_parallel': 2,
  'pairs.batch_size': 4,
}


def slice_part(arg, config):
  """Returns what suits a slice of TPUs, or nodes of GPUs."""
  num, is_online = topology.num_devices(arg.mesh), algorithms.get(arg.algorithm).online
  part = common.on_slice('policy', arg.mesh) | {
    'sampling.max_completion_length': 512,
    'rollout.num_prompts': 64,
    'rollout.dtype': 'bfloat16',
  }
  if arg.policy not in ('ruleworld', 'smollm2_135m'):
    # Their 8 heads of keys; a node's devices are the nearest to each other.
    part['sampling.tensor'] = min(8, num // part['mesh.num_slices'])
  samples = 64 * config.rollout.num_generations
  rows = samples // config.loss.num_mini_batches if is_online else 0  # of an update
  if arg.policy != 'ruleworld' and not arg.smoke:
    # The paper's recipe: five passes over 1,024 prompts, or over the pairs of
    # the 5 best and 5 worst of 100 completions; updates of 128 samples or
    # pairs, but one a device at least.
    batch_size = max(128, num)
    part |= {
      'num_steps': 5 * 1024 // 64 if is_online else 5 * (5 * 1024) // batch_size,
      'loss.num_mini_batches': max(1, samples // batch_size),
      'pairs.num_prompts': 1024,
      'pairs.num_samples': 100,
      'pairs.num_best': 5,
      'pairs.batch_size': batch_size,
    }
    rows = batch_size if is_online else 2 * batch_size
  part['optim.num_microbatches'] = max(1, rows // (4 * num))  # 4 rows a device
  return part


SMOKE = {
  'num_steps': 4,
  'log_every': 1,
  'checkpoint_every': 2,
  'optim.warmup_steps': 1,
  'data.num_prompts': 16,
  'eval.num_prompts': 16,
  'rollout.num_prompts': 4,
  'rollout.num_generations': 4,
  'rollout.samples_every': 2,
  'pairs.num_prompts': 8,
  'pairs.num_samples': 8,
  'pairs.num_best': 2,
  'pairs.batch_size': 4,
}


def sweep():
  """The safety-helpfulness trade-off: a and b of R = sigmoid(a * score + b)."""
  return [
    {'name': f'a={a}-b={b}', 'overrides': {'reward.a': a, 'reward.b': b}}
    for a, b in (
      (0.25, 0.0),
      (0.5, 0.0),
      (1.0, -2.0),
      (1.0, 0.0),
      (1.0, 2.0),
      (2.0, 0.0),
      (4.0, 0.0),
    )
  ]
