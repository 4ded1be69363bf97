"""Aligns a policy to rules, with a configurable reward model as its reward.

python -m csrm_jax.main --config=configs/rl.py:checkpoint=/tmp/rm \
  --workdir=/tmp/rl
python -m csrm_jax.main --config=configs/rl.py:checkpoint=/tmp/rm,\
algorithm=distillation --workdir=...
python -m csrm_jax.main --config=configs/rl.py:reward=alphaalign --workdir=...
python -m csrm_jax.main --config=configs/rl.py:checkpoint=/tmp/smol,\
policy=smollm2_135m,data=xstest,data_dir=DIR,rules=rules.yaml --workdir=...
python launch/sweep.py --config=configs/rl.py:checkpoint=/tmp/rm --workdir=...

Beside settings that all runs have there are those of the algorithm and of the
reward: what would do nothing is not there.
"""

import pathlib

import ml_collections
from ml_collections.config_dict import placeholder

import csrm_jax
from csrm_jax import config as config_lib
from csrm_jax.core import topology

ALGORITHMS = (
  'reinforce_pp',
  'reinforce_pp_baseline',
  'grpo',
  'dr_grpo',
  'rloo',
  'ppo',
  'distillation',
  'dpo',
)
REWARDS = ('csrm', 'oracle', 'http', 'python', 'alphaalign')
# Public instruction-tuned models -> their weights on the hub.
POLICIES = {
  'smollm2_135m': 'HuggingFaceTB/SmolLM2-135M-Instruct',
  'llama3_8b': 'meta-llama/Llama-3.1-8B-Instruct',
  'mistral_7b': 'mistralai/Mistral-7B-Instruct-v0.1',
  'qwen3_1b7': 'Qwen/Qwen3-1.7B',
}
# AlphaAlign and its ablations -> what becomes of the helpfulness.
ALPHAALIGN = {'full': 'standardised', 'zero': 'none', 'raw': 'raw'}


def get_config(arg=None):
  """Returns the config.

  arg: algorithm, reward (see ALGORITHMS, REWARDS; algorithm=auto is grpo with
  alphaalign, else reinforce_pp); checkpoint (work directory of the reward
  model: reward=csrm), url (of the scorer: reward=http), function (module:name:
  reward=python), variant (full|zero|raw: reward=alphaalign); policy (ruleworld
  or a name of POLICIES) and policy_init (its weights: a folder, a hub id, or
  the policy/ that an earlier run has written), lora (rank of adapters; 0 trains
  all weights); data=ruleworld|xstest|jsonl with data_dir or path, rules (a
  RuleWorld rule set, or a YAML or JSON file); mesh (TPUs or GPUs as they are
  rented: v5e-64, v5p-16, h100-8), num_steps, smoke (a run of a minute that
  exercises everything).
  """
  arg = config_lib.parse_arg(
    arg,
    algorithm=('auto', *ALGORITHMS),
    reward=REWARDS,
    checkpoint='',
    url='',
    function='',
    variant=tuple(ALPHAALIGN),
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
  c = ml_collections.ConfigDict()
  c.runner = 'align'
  c.title = 'Aligned policy'  # of the report
  c.seed = 0  # of prompts, draws, mini batches and adapters
  c.algorithm = (
    arg.algorithm
    if arg.algorithm != 'auto'
    else ('grpo' if arg.reward == 'alphaalign' else 'reinforce_pp')
  )
  is_online = c.algorithm not in ('distillation', 'dpo')
  c.num_steps = 60 if is_online else 200  # rollouts; offline: updates
  c.log_every = 1 if is_online else 10  # steps a line of metrics.jsonl sums up
  c.checkpoint_every = 10 if is_online else 50  # a multiple of log_every
  # Steps of a profiler trace in workdir/profile, as in '10:13'; '' for none.
  c.profile_steps = ''

  _set_policy(c, arg)
  _set_data(c, arg)
  _set_reward(c, arg)
  c.sampling = ml_collections.ConfigDict()
  c.sampling.max_completion_length = 36  # tokens, the stop token included
  c.sampling.temperature = 1.0  # also of all log-probabilities
  c.sampling.top_p = 1.0  # 1 for all tokens
  c.sampling.top_k = 0  # 0 for all tokens
  # Devices that a copy of the weights to sample from is cut over, by heads;
  # each such group draws completions of its own.
  c.sampling.tensor = 1
  if is_online:
    _set_online(c, c.algorithm)
  else:
    _set_offline(c)

  c.optim = ml_collections.ConfigDict()
  c.optim.lr = 1e-3  # peak; warm-up, then cosine
  c.optim.warmup_steps = 5 if is_online else 20  # updates
  c.optim.b1 = 0.9
  c.optim.b2 = 0.95
  c.optim.weight_decay = 0.0  # decoupled; not on norm scales
  c.optim.clip_norm = 1.0  # largest global gradient norm
  c.optim.end_lr_fraction = 0.1  # last learning rate over the peak
  c.optim.num_microbatches = 1  # gradient accumulation within an update

  # Devices along each axis; -1 takes what is left. Of num_slices (or nodes),
  # which a slow network connects, data is a multiple.
  c.mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1, 'num_slices': 1})

  c.eval = ml_collections.ConfigDict()
  c.eval.num_prompts = 128  # held out; also answered by the unaligned policy
  c.eval.best_of = 8  # of so many samples of the unaligned policy; 0 for none
  if is_online:
    # Steps between looks at reward and, in RuleWorld, truth of held-out
    # prompts; 0 for none.
    c.eval.every = 10

  if arg.reward == 'alphaalign':
    _set_structured(c, is_online)
  if arg.policy != 'ruleworld':
    _set_public(c, is_online)
  if arg.mesh:
    _set_slice(c, arg, is_online)
  if arg.smoke:
    _set_smoke(c, is_online)
  if arg.num_steps:
    c.num_steps = arg.num_steps
  return c


def _set_policy(c, arg):
  package = pathlib.Path(csrm_jax.__file__).parent
  c.policy = ml_collections.ConfigDict()
  # Weights: a folder with safetensors and config.json, a hub id or .gguf file.
  c.policy.init = str(
    package / 'ruleworld' / ('policy_structured' if arg.reward == 'alphaalign' else 'policy_base')
  )
  # SentencePiece model (.model) or tokenizer.json; '' takes that of init.
  c.policy.tokenizer = str(package / 'ruleworld' / 'tokenizer.model')
  # What stands around a user's turn: 'plain' and 'structured' are those of
  # RuleWorld's policy, 'chat' is init's chat template.
  c.policy.marks = 'structured' if arg.reward == 'alphaalign' else 'plain'
  # Template text in front of the first turn, such as how to answer.
  c.policy.instruction = ''
  if arg.policy_init:
    c.policy.init = arg.policy_init
  if arg.policy != 'ruleworld':
    c.policy.init = arg.policy_init or POLICIES[arg.policy]
    c.policy.tokenizer, c.policy.marks = '', 'chat'
  # Fields of the model that are no property of the weights.
  c.policy.overrides = ml_collections.ConfigDict(
    {
      'dtype': 'float32',  # of activations; or bfloat16
      'param_dtype': 'float32',  # of parameters; or bfloat16
      'remat': 'none',  # recomputed in the backward pass: none, dots, full
      'unroll': 4,  # layers a step of the scan over depth; more suits CPUs
      'lora_rank': arg.lora,  # of the adapters that are trained; 0 for none
      'lora_alpha': 2.0 * arg.lora or 16.0,  # over the rank: their scale
      'lora_targets': ('query', 'key', 'value', 'out', 'gate', 'up', 'down'),
    }
  )


def _set_data(c, arg):
  c.data = ml_collections.ConfigDict()
  # Prompts: ruleworld; xstest (its CSV file); jsonl (lines of id, prompt and,
  # where known, label 'harmful' or 'benign').
  c.data.source = arg.data
  c.data.path = arg.path or arg.data_dir  # of a file or its folder
  # In force for all prompts: the name of a RuleWorld rule set, or a file.
  c.data.rules = arg.rules or ('film club' if arg.data == 'ruleworld' else '')
  c.data.num_prompts = 1024  # to train on; of files, those not held out
  # As many harmful prompts to train on as benign ones: of labels alone it pays
  # to treat all like the more frequent kind.
  c.data.balance = arg.reward == 'alphaalign'
  c.data.eval_seed = 1  # of RuleWorld's held-out prompts
  c.data.eval_fraction = 0.2  # of files, held out by a hash of the prompt


def _set_reward(c, arg):
  c.reward = ml_collections.ConfigDict()
  r = c.reward
  r.name = arg.reward
  if arg.reward == 'alphaalign':
    _set_alphaalign(c, arg)
    return
  if arg.reward == 'csrm':
    r.checkpoint = arg.checkpoint  # work directory of configs/rm.py
    r.a, r.b = 1.0, 0.0  # R = sigmoid(a * score + b)
    r.max_length = 2048  # tokens a prompt of the reward model may have
  elif arg.reward == 'http':
    r.url = arg.url  # is sent samples, answers {"rewards": [...]}
    r.timeout_s = 60.0  # of a request
    r.num_tries = 3  # of a request
    r.backoff_s = 1.0  # before the second try; doubles
    r.batch_size = 64  # samples a request
  elif arg.reward == 'python':
    r.function = arg.function  # module:name of samples -> numbers
  _set_helpfulness(c, arg)
  r.mode = 'product'  # of safety and helpfulness; or sum
  r.safety_weight = 1.0  # exponent in a product, factor in a sum
  r.helpfulness_weight = 1.0  # likewise
  r.overlong_buffer = 0  # tokens before the limit that are punished; 0: none
  r.overlong_penalty = 1.0  # at the limit
  r.clip = ()  # (low, high) of the total


def _set_helpfulness(c, arg):
  r = c.reward
  # Of the answer, 1 to 5: oracle (RuleWorld's), none, or the work directory of
  # a reward model that was trained on preference pairs without rules.
  r.helpfulness = 'oracle' if arg.data == 'ruleworld' else 'none'
  r.helpfulness_a, r.helpfulness_b = 1.0, 0.0  # 1 + 4 sigmoid(a * score + b)


def _set_alphaalign(c, arg):
  r = c.reward
  r.variant = ALPHAALIGN[arg.variant]  # helpfulness: standardised, raw, none
  r.format_weight = 1.0  # r_f
  r.answer_weight = 2.0  # r_a
  # V_r: oracle (RuleWorld's), patterns, boxed (patterns in \boxed{} only), or
  # the work directory of a reward model, asked whether the answer refuses.
  r.refusal = arg.checkpoint or ('oracle' if arg.data == 'ruleworld' else 'patterns')
  # Which such a model is asked by: rules that forbid to refuse.
  r.refusal_rules = str(pathlib.Path(__file__).parent / 'safety' / 'refusal.yaml')
  if ALPHAALIGN[arg.variant] != 'none':
    _set_helpfulness(c, arg)


def _set_online(c, algorithm):
  c.rollout = ml_collections.ConfigDict()
  c.rollout.num_prompts = 64  # a step
  c.rollout.num_generations = 8  # completions of each
  # Of a copy of the weights that is sampled from, as bfloat16; '' for none.
  c.rollout.dtype = ''
  c.rollout.samples_every = 10  # steps between tables in samples.jsonl; 0: none
  c.rollout.num_samples = 16  # of each table

  c.loss = ml_collections.ConfigDict()
  c.loss.epsilon = 0.2  # ratios below 1 - epsilon are clipped
  c.loss.epsilon_high = 0.2  # ratios above 1 + epsilon_high are
  c.loss.dual_clip = placeholder(float)  # largest ratio where A < 0; above 1
  c.loss.ratio = 'token'  # or sequence (GSPO)
  # token-mean, seq-mean-token-mean, seq-mean-token-sum-norm; None: as the
  # algorithm has it. The same for kl_place and kl_estimator.
  c.loss.loss_aggregation = placeholder(str)
  c.loss.kl_place = placeholder(str)  # reward, loss or none
  c.loss.kl_estimator = placeholder(str)  # k1 in the reward; k2, k3 in the loss
  c.loss.kl_coef = 0.02  # 0 without a KL
  c.loss.kl_target = placeholder(float)  # kl/ref that adapts kl_coef
  c.loss.kl_horizon = 10_000  # samples within which it adapts
  c.loss.num_iterations = 1  # times that a step's samples are used
  c.loss.num_mini_batches = 2  # updates of each time
  c.loss.mask_truncated = False  # cut-off completions have no part in the loss
  c.loss.normalise_rewards = False  # by mean and spread of all so far
  if algorithm in ('reinforce_pp', 'reinforce_pp_baseline', 'ppo'):
    c.loss.gamma = 1.0  # discount a token
  if algorithm == 'ppo':
    c.loss.lam = 0.95  # of GAE
    c.loss.value_clip = 0.2  # of a value's change, in units of the reward
    c.loss.vf_coef = 0.1  # weight of the critic's loss

  c.stop = ml_collections.ConfigDict()
  c.stop.kl = placeholder(float)  # kl/ref of a log line that ends the run
  # How far reward/mean may fall below its best log line before the run ends.
  c.stop.reward_drop = placeholder(float)


def _set_offline(c):
  c.pairs = ml_collections.ConfigDict()
  # The paper pairs the 5 best of 100 with the 5 worst. The policy of RuleWorld
  # learns more from all of 24, from more prompts.
  c.pairs.num_prompts = 512  # the first of data.num_prompts
  c.pairs.num_samples = 24  # completions of each
  c.pairs.num_best = 12  # of them, paired at random with as many of the worst
  c.pairs.num_parallel = 16  # prompts whose completions are drawn at once
  c.pairs.batch_size = 48  # pairs an update
  c.pairs.beta = 0.3  # of the loss
  # Of -log p of the better completion, a token, which is added. Without it both
  # sides of a pair lose probability to text that was never drawn.
  c.pairs.nll_coef = 2.0
  if 'clip' in c.reward:
    # Nothing is worse: log R of two bad completions differs by chance.
    highest = 1.0 if c.reward.helpfulness == 'none' else 5.0
    c.reward.clip = (0.05 * highest, highest)


def _set_structured(c, is_online):
  """What suits AlphaAlign's longer completions and its labels."""
  c.sampling.max_completion_length = 96
  c.eval.num_prompts = 256  # for rates of a few percent
  c.optim.lr = 5e-4  # at 1e-3 the format is lost
  if is_online:
    # Refusing is unlearnt before it is learnt where it belongs, unless many
    # completions of a prompt, and the KL, keep it in sight.
    c.rollout.num_prompts, c.rollout.num_generations = 32, 16
    c.loss.num_mini_batches, c.loss.kl_coef = 8, 0.05


def _set_public(c, is_online):
  """A public model: few steps on a CPU, more where there is an accelerator."""
  c.num_steps = 4 if is_online else 20
  c.policy.overrides.unroll = 1
  c.policy.overrides.remat = 'dots'
  c.optim.lr = 1e-4 if c.policy.overrides.lora_rank else 1e-6
  c.optim.warmup_steps = 1
  c.sampling.max_completion_length = max(64, c.sampling.max_completion_length)
  c.eval.num_prompts = 16
  if is_online:
    c.rollout.num_prompts = 8
    c.optim.num_microbatches = 4
  else:
    c.pairs.num_prompts, c.pairs.num_samples, c.pairs.num_best = 8, 16, 4
    c.pairs.num_parallel, c.pairs.batch_size = 2, 4


def _set_slice(c, arg, is_online):
  """What suits a public model on a slice of TPUs, or nodes of GPUs."""
  num = topology.num_devices(arg.mesh)
  c.mesh.update(topology.layout(arg.mesh))
  c.policy.overrides.dtype = 'bfloat16'
  c.policy.overrides.remat = 'full'
  c.policy.overrides.unroll = 1
  c.sampling.max_completion_length = 512
  if arg.policy not in ('ruleworld', 'smollm2_135m'):
    # Their 8 heads of keys; a node's devices are the nearest to each other.
    c.sampling.tensor = min(8, num // c.mesh.num_slices)
  if is_online:
    c.rollout.num_prompts = 64
    c.rollout.dtype = 'bfloat16'
    rows = 64 * c.rollout.num_generations // c.loss.num_mini_batches
    c.optim.num_microbatches = max(1, rows // (4 * num))  # 4 rows a device


def _set_smoke(c, is_online):
  c.num_steps, c.log_every, c.checkpoint_every = 4, 1, 2
  c.optim.warmup_steps = 1
  c.data.num_prompts = 16
  c.eval.num_prompts = 16
  if is_online:
    c.rollout.num_prompts, c.rollout.num_generations = 4, 4
    c.rollout.samples_every = 2
  else:
    c.pairs.num_prompts, c.pairs.num_samples, c.pairs.num_best = 8, 8, 2
    c.pairs.batch_size = 4


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
