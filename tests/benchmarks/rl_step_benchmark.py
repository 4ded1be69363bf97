"""A step of GRPO against TRL's GRPOTrainer: rollout, reward model, update.

python tests/benchmarks/rl_step_benchmark.py --model=DIR [--dtype=bfloat16] [--kl=0.02]

DIR is a Hugging Face folder of a small instruction-tuned model, such as SmolLM2-135M-Instruct: the
policy, and the reward model, which reads each prompt and completion (ours also reads a rule). A
step draws 4 completions of 32 tokens of each of 4 prompts, scores them and updates all weights
once. Without --kl no reference is computed, as is TRL's default. One run is one step.
"""

import json
import pathlib
import tempfile

import pairs

NUM_PROMPTS, NUM_SAMPLES, NUM_TOKENS, LR = 4, 4, 32, 1e-6
TEXTS = [
  f'Please tell me in a few words what people in {place} eat for {meal} on a usual day in {season}.'
  for place, meal in (('Rome', 'lunch'), ('Oslo', 'dinner'), ('Lima', 'breakfast'), ('Fes', 'tea'))
  for season in ('summer', 'winter')
]


def make_ours(args):
  import jax

  from csrm_jax import config as config_lib
  from csrm_jax.core import mesh as mesh_lib
  from csrm_jax.models import hf
  from csrm_jax.reward import model as reward_model
  from csrm_jax.rl import online
  from csrm_jax.runners import align
  from csrm_jax.safety import schema
  from csrm_jax.train import step as training

  training.keep_freed_memory()
  configs = pathlib.Path(__file__).parents[2] / 'configs'
  config = config_lib.load_module(configs / 'rl.py').get_config(
    f'algorithm=grpo,reward=oracle,policy=smollm2_135m,policy_init={args.model}'
  )
  changes = {
    'rollout.num_prompts': NUM_PROMPTS,
    'rollout.num_generations': NUM_SAMPLES,
    'rollout.samples_every': 0,
    'sampling.max_completion_length': NUM_TOKENS,
    'loss.kl_coef': args.kl,
    'loss.num_mini_batches': 1,
    'optim.num_microbatches': 1,
    'optim.lr': LR,
    'eval.every': 0,
    'policy.overrides.dtype': args.dtype,
    'policy.overrides.remat': 'none',
  }
  config_lib.set_overrides(config, changes)
  policy = align.make_policy(config, hf.Source(args.model))
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  base = hf.load_params(args.model, policy.model)
  params = jax.tree.map(lambda x: x.copy(), base)
  judge = reward_model.load(args.model, dtype=args.dtype)
  rules = schema.SafetyConfig((schema.Category('Food', 'Talk about food only.'),), 'food')
  prompts = [
    schema.Prompt(f'p{i}', (schema.Message('user', text),), rules) for i, text in enumerate(TEXTS)
  ]

  def reward(samples):
    found = judge.score(rules, [one.example().conversation for one in samples])
    import numpy as np

    return np.array([one.reward for one in found], np.float32), {}

  step_fn, state = align.make_step(config, policy, params, mesh)
  work = online.Online(
    config,
    policy,
    {},
    (policy.model, base),
    prompts,
    reward,
    step_fn,
    align.make_sampling(config, ()),
    mesh,
    mesh,
    pathlib.Path(tempfile.mkdtemp()),
  )
  held = {'state': state, 'step': 0}

  def run(_):
    log = _Log()
    with jax.set_mesh(mesh):
      held['step'] += 1
      held['state'], _ = work.step(held['state'], held['step'], log)
    return {name: value for name, value in log.measured.items() if name.startswith('time/')}

  class _Log:
    def add(self, metrics):
      self.measured = metrics[0]
      jax.block_until_ready(metrics)

  return run


def make_trl(args):
  import datasets
  import torch
  import transformers
  import trl

  torch.set_num_threads(pairs.num_threads())
  tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
  tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
  config = trl.GRPOConfig(
    output_dir=tempfile.mkdtemp(),
    use_cpu=True,
    bf16=args.dtype == 'bfloat16',
    gradient_checkpointing=False,
    report_to='none',
    per_device_train_batch_size=NUM_PROMPTS * NUM_SAMPLES,
    num_generations=NUM_SAMPLES,
    max_completion_length=NUM_TOKENS,
    beta=args.kl,
    learning_rate=LR,
    max_steps=1000,
    disable_tqdm=True,
    save_strategy='no',
    logging_steps=1000,
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
  model.generation_config.eos_token_id = None  # nothing ends one early
  judge = transformers.AutoModelForSequenceClassification.from_pretrained(
    args.model, num_labels=1, dtype=getattr(torch, args.dtype)
  )
  judge.config.pad_token_id = tokenizer.pad_token_id
  trainer = trl.GRPOTrainer(
    model,
    reward_funcs=judge,
    args=config,
    train_dataset=datasets.Dataset.from_dict(
      {'prompt': [[{'role': 'user', 'content': text}] for text in TEXTS]}
    ),
    processing_class=tokenizer,
  )
  trainer.create_optimizer()
  trainer.current_gradient_accumulation_steps = 1
  trainer.model.train()
  batches = iter(_forever(trainer.get_train_dataloader))

  def run(_):
    loss = trainer.training_step(trainer.model, next(batches), None)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1
    return {'loss': float(loss)}

  return run


def _forever(make):
  while True:
    yield from make()


def main():
  parser = pairs.parser(__doc__)
  parser.add_argument('--kl', type=float, default=0.0, help='the weight of the KL penalty')
  args = parser.parse_args()
  cases = {f'{NUM_PROMPTS} x {NUM_SAMPLES} x {NUM_TOKENS}, kl {args.kl:g}': None}
  results = pairs.compare('rl_step', [make_ours, make_trl], cases, args)
  for case, found in results.items():
    print(case, json.dumps(found))


if __name__ == '__main__':
  main()
