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

A run is `base`, which the parts that `get_config` names change in their order; --config.KEY=VALUE
comes last. Every run has all keys; those that do nothing with its algorithm or reward are empty
(csrm_jax.rl.algorithms says which).
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
# AlphaAlign and its ablations -> what they do with the helpfulness.
VARIANTS = {'full': 'standardised', 'zero': 'none', 'raw': 'raw'}


def get_config(arg=None):
  """Returns the config.

  arg: algorithm (a name of csrm_jax.rl.algorithms; auto is grpo with alphaalign, else
  reinforce_pp), reward (see REWARDS); with reward=csrm checkpoint (the reward model's work
  directory), with http url (the scorer's), with python function (module:name), with alphaalign
  variant (full|zero|raw); policy (ruleworld or a name of POLICIES) and policy_init (its weights: a
  folder, a hub id, or the policy/ that an earlier run has written), lora (the rank of adapters; 0
  trains all weights); data=ruleworld|xstest|jsonl with data_dir or path, rules (a RuleWorld rule
  set, or a YAML or JSON file); mesh (TPUs or GPUs as they are rented: v5e-64, v5p-16, h100-8),
  num_steps, smoke (a run of a minute that exercises everything).
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
    # A slice runs the paper's recipe instead of a laptop's.
    (LAPTOP if is_online else LAPTOP_OFFLINE) if is_public and (not arg.mesh or arg.smoke) else {},
  )
  config = common.merge(
    config,
    slice_part(arg, config) if arg.mesh else {},
    SMOKE if arg.smoke else {},
    {'num_steps': arg.num_steps} if arg.num_steps else {},
  )
  # An empty key keeps its type, so that a flag that sets it parses and check_idle can refuse it.
  for key in algorithms.idle_keys(config):
    section, last = config_lib.find(config, key)
    kind = section.get_type(last)
    del section[last]
    section[last] = placeholder(kind)
  return config


def base(arg):
  """Returns all keys, set for an online run in RuleWorld on a laptop."""
  in_world, alphaalign = arg.data == 'ruleworld', arg.reward == 'alphaalign'
  start = f'{common.RULEWORLD}/{"policy_structured" if alphaalign else "policy_base"}'
  return {
    'runner': 'align',
    'title': 'Aligned policy',  # the report's title
    'seed': 0,  # decides prompts, draws, mini batches and adapters
    'algorithm': arg.algorithm,  # a name of csrm_jax.rl.algorithms
    'num_steps': 60,  # rollouts; with an offline algorithm updates
    # Where metrics go beside metrics.jsonl, which is always there: tensorboard, wandb, trackio,
    # mlflow.
    'loggers': ('jsonl', 'tensorboard'),
    'log_every': 1,  # steps that one line of metrics.jsonl sums up
    'checkpoint_every': 10,  # steps; a multiple of log_every
    # The steps of a profiler trace in workdir/profile, such as '10:13'; '' for no trace.
    'profile_steps': '',
    # Whether a run goes on although weights, prompts or rewards have changed since its checkpoint.
    'accept_changes': False,
    'policy': {
      # The weights: a folder with safetensors and config.json, a hub id or a .gguf file.
      'init': arg.policy_init or start,
      # A SentencePiece model (.model) or a tokenizer.json; '' takes the tokenizer of `init`.
      'tokenizer': common.TOKENIZER,
      # The text around a user's turn: RuleWorld's policy knows 'plain' and 'structured'; 'chat'
      # takes the chat template of `init`.
      'marks': 'structured' if alphaalign else 'plain',
      # Template text that opens a user's turn, in front of the prompt; it may say how to answer.
      'instruction': '',
      'overrides': common.OVERRIDES | {'lora_rank': arg.lora, 'lora_alpha': 2.0 * arg.lora or 16.0},
    },
    'data': {
      # Where prompts come from: ruleworld; xstest (its CSV file); jsonl (lines of id, prompt and,
      # where it is known, label 'harmful' or 'benign').
      'source': arg.data,
      'path': arg.path or arg.data_dir,  # the prompts' file, or its folder
      # The rules for all prompts: the name of a RuleWorld rule set, or a file.
      'rules': arg.rules or ('film club' if in_world else ''),
      'num_prompts': 1024,  # how many to train on; from files at most those not held out
      # Trains on as many harmful prompts as benign ones. Where labels alone decide the reward, it
      # pays to treat all prompts like the more frequent kind.
      'balance': alphaalign,
      'eval_seed': 1,  # decides RuleWorld's held-out prompts
      'eval_fraction': 0.2,  # the share of a file that a hash of the prompt holds out
    },
    'reward': {
      'name': arg.reward,  # csrm, oracle, http, python, alphaalign
      # What reward models compute in and are held in: float32 or bfloat16; '' as they are stored.
      'dtype': '',
      # reward=csrm: R = sigmoid(a * score + b).
      'checkpoint': arg.checkpoint,  # the work directory of a run of configs/rm.py
      'combine': 'mean',  # of several, A+B+C: what is made of their scores, as in configs/eval.py
      'a': 1.0,  # the slope; above 0
      'b': 0.0,  # the offset, in nats
      'max_length': 2048,  # the most tokens that one pass of the reward model reads
      # What becomes of longer completions: 'window' reads them in parts and takes the worst, 'mark'
      # leaves out their end, 'error' stops. reward/unread tells the share that was not read.
      'on_cut': 'window',
      # Whether prompts and rules may be in words foreign to what the reward model was trained on.
      # Completions are never refused: reward/out_of_domain is the share of those that are foreign.
      'allow_out_of_domain': False,
      # reward=http
      'url': arg.url,  # the scorer, which is sent samples and answers {"rewards": [...]}
      'form': 'csrm',  # what it is asked in: csrm, openrlhf or openai (moderation, no prompt)
      'policy': '',  # its name for the rules, or its model; '' sends the prompts' own rules
      'timeout_s': 60.0,  # how long a reply may take
      'num_tries': 3,  # how often a request is sent that fails on the way
      'backoff_s': 1.0,  # the wait before the second try; it doubles with each further one
      'batch_size': 64,  # samples in a request
      'connections': 1,  # requests at once
      'key_variable': '',  # the environment variable with its bearer token; '' sends none
      'ca_file': '',  # PEM certificates to trust in place of the system's
      # reward=python
      'function': arg.function,  # module:name of a function: samples -> numbers
      # reward=alphaalign
      'variant': VARIANTS[arg.variant],  # how helpfulness counts: standardised, raw, none
      'format_weight': 1.0,  # r_f
      'answer_weight': 2.0,  # r_a
      # Who decides whether an answer refuses (V_r): oracle (RuleWorld's), patterns, boxed (patterns
      # within \boxed{} only), or a reward model, given as its work directory.
      'refusal': arg.checkpoint or ('oracle' if in_world else 'patterns'),
      # The rules that such a reward model judges by: they forbid to refuse.
      'refusal_rules': 'builtin:configs/safety/refusal.yaml',
      # Who rates how helpful an answer is, from 1 to 5: oracle (RuleWorld's), none, or a reward
      # model that was trained on preference pairs without rules, given as its work directory.
      'helpfulness': 'oracle' if in_world else 'none',
      'helpfulness_a': 1.0,  # such a model's rating is 1 + 4 sigmoid(a * score + b)
      'helpfulness_b': 0.0,  # the b of that, in nats
      # All rewards but alphaalign
      # How safety and helpfulness are combined: product, or sum; or attack, which rewards what the
      # reward model calls safe and RuleWorld's oracle does not: a policy that finds its holes.
      'mode': 'product',
      'safety_weight': 1.0,  # the exponent in a product, the factor in a sum
      'helpfulness_weight': 1.0,  # likewise
      'overlong_buffer': 0,  # how many tokens before the limit are punished; 0 for none
      'overlong_penalty': 1.0,  # the penalty at the limit; in the buffer it grows linearly
      'clip': (),  # (low, high) bounds of the total; () for none
    },
    'sampling': {
      'max_completion_length': 44,  # tokens, the stop token included
      'temperature': 1.0,  # it also scales all log-probabilities of the losses
      'top_p': 1.0,  # draws from the likeliest tokens that together have this; 1 for all
      'top_k': 0,  # draws from so many of the likeliest tokens; 0 for all
      # How many devices share one copy of the weights to sample from, which is cut by heads; each
      # such group draws completions of its own.
      'tensor': 1,
    },
    # Online algorithms.
    'rollout': {
      'num_prompts': 64,  # prompts in a step
      'num_generations': 8,  # completions of each prompt
      # Completions are drawn from a copy of the weights in this dtype, such as bfloat16; '' draws
      # from the weights as they are.
      'dtype': '',
      'samples_every': 10,  # steps between tables in samples.jsonl; 0 for none
      'num_samples': 16,  # rows of each table
    },
    'loss': {
      'epsilon': 0.2,  # ratios below 1 - epsilon are clipped
      'epsilon_high': 0.2,  # ratios above 1 + epsilon_high are clipped
      'dual_clip': placeholder(float),  # the largest ratio where A < 0; above 1; None for no limit
      'ratio': 'token',  # the ratio of each token, or of the whole 'sequence' (GSPO)
      # token-mean, seq-mean-token-mean or seq-mean-token-sum-norm. This, kl_place and kl_estimator
      # are as the algorithm has them where they are None.
      'loss_aggregation': placeholder(str),
      'kl_place': placeholder(str),  # where the KL is penalised: reward, loss or none
      'kl_estimator': placeholder(str),  # k1 in the reward; k2 or k3 in the loss
      'kl_coef': 0.02,  # the weight of the KL penalty; 0 for none
      'kl_target': placeholder(float),  # kl_coef adapts so that kl/ref comes near this
      'kl_horizon': 10_000,  # about how many samples that takes
      'num_iterations': 1,  # how often a step's samples are used
      'num_mini_batches': 2,  # updates each time
      'mask_truncated': False,  # leaves completions that were cut off out of the loss
      'normalise_rewards': False,  # by the mean and spread of all rewards so far
      'gamma': 1.0,  # the discount per token, of reinforce_pp, reinforce_pp_baseline and ppo
      # Only for ppo:
      'lam': 0.95,  # the λ of GAE
      'value_clip': 0.2,  # the largest change of a value, in units of the reward
      'vf_coef': 0.1,  # the weight of the critic's loss
    },
    'stop': {
      'kl': placeholder(float),  # the run ends where kl/ref of a log line is above this
      # How far reward/mean may fall below its best log line before the run ends.
      'reward_drop': placeholder(float),
    },
    # Offline algorithms. The paper pairs the 5 best of 100 with the 5 worst. RuleWorld's policy
    # learns more from more prompts, when all of 24 completions are paired.
    'pairs': {
      'num_prompts': 512,  # the first of data.num_prompts
      'num_samples': 24,  # completions of each prompt
      'num_best': 12,  # how many of them are paired, at random, with as many of the worst
      'num_parallel': 16,  # prompts whose completions are drawn at once
      'batch_size': 48,  # pairs in an update
      'beta': 0.3,  # the β of the pair loss
      # The weight of -log p per token of the better completion, which is added to the loss.
      # Without it both sides of a pair lose probability to text that was never drawn.
      'nll_coef': 2.0,
    },
    'optim': common.OPTIM | {'lr': 1e-3, 'warmup_steps': 5},
    'mesh': common.MESH,
    'eval': {
      'num_prompts': 128,  # held-out prompts, which the unaligned policy answers too
      'best_of': 8,  # also reports the best of so many unaligned samples; 0 does not
      # Steps between looks at held-out prompts, which measure the reward and, in RuleWorld, the
      # truth; 0 for none.
      'every': 10,
    },
  }


def offline_part(arg):
  """Returns the part for an algorithm that learns from pairs."""
  highest = 5.0 if arg.data == 'ruleworld' else 1.0  # R * H with helpfulness, else R alone
  return {
    'num_steps': 200,
    'log_every': 10,
    'checkpoint_every': 50,
    'optim.warmup_steps': 20,
    # All rewards below the lower bound count the same: how much the log R of two bad completions
    # differ is chance.
    'reward.clip': (0.05 * highest, highest),
  }


# The part for AlphaAlign, whose completions are longer.
ALPHAALIGN = {
  'sampling.max_completion_length': 96,
  'eval.num_prompts': 256,  # enough to measure rates of a few percent
  'optim.lr': 5e-4,  # at 1e-3 the policy loses the format
  # The policy forgets how to refuse before it learns where to, unless many completions of a prompt,
  # and the KL, keep refusals among its samples.
  'rollout.num_prompts': 32,
  'rollout.num_generations': 16,
  'loss.num_mini_batches': 8,
  'loss.kl_coef': 0.05,
}


def public_part(arg):
  """Returns the part for a public model, on a laptop and on a slice."""
  return {
    'policy.init': arg.policy_init or POLICIES[arg.policy],
    'policy.tokenizer': '',
    'policy.marks': 'chat',
    'policy.overrides.unroll': 1,
    'policy.overrides.remat': 'dots',
    'optim.lr': 1e-4 if arg.lora else 1e-6,
    'sampling.max_completion_length': lambda num: max(64, num),
  }


# A few steps of a public model on a CPU.
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
  """Returns the part for a slice of TPUs, or nodes of GPUs."""
  num, is_online = topology.num_devices(arg.mesh), algorithms.get(arg.algorithm).online
  part = common.on_slice('policy', arg.mesh) | {
    'sampling.max_completion_length': 512,
    'rollout.num_prompts': 64,
    'rollout.dtype': 'bfloat16',
  }
  if arg.policy not in ('ruleworld', 'smollm2_135m'):
    # The others have 8 heads of keys to cut by. A group stays within a slice, where devices are
    # near to each other.
    part['sampling.tensor'] = min(8, num // part['mesh.num_slices'])
  samples = 64 * config.rollout.num_generations
  rows = samples // config.loss.num_mini_batches if is_online else 0  # rows of an update
  if arg.policy != 'ruleworld' and not arg.smoke:
    # The paper's recipe: five passes over 1,024 prompts, or over the pairs of the 5 best and 5
    # worst of 100 completions; an update has 128 samples or pairs, but at least one per device.
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
  part['optim.num_microbatches'] = max(1, rows // (4 * num))  # 4 rows per device at a time
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
  pairs = (0.25, 0.0), (0.5, 0.0), (1.0, -2.0), (1.0, 0.0), (1.0, 2.0), (2.0, 0.0), (4.0, 0.0)
  return [{'name': f'a={a}-b={b}', 'overrides': {'reward.a': a, 'reward.b': b}} for a, b in pairs]
