"""Completions of prompts against transformers' generate.

python tests/benchmarks/rollout_benchmark.py --model=DIR [--dtype=bfloat16] [--pairs=5]

Both have the same weights and as many threads as the process may use (`taskset -c 0` for one). They
draw 32 tokens from the whole distribution, prompts of about 40 tokens included: 16 rows of 2
prompts, as a rollout of RL does; and 16 distinct prompts. With --greedy the tokens are compared.
"""

import numpy as np
import pairs

NUM_TOKENS = 32
NUM_ROWS = 16
NUM_IDS = 49_152  # of SmolLM2


def make_ours(args):
  from csrm_jax.models import hf, sampling
  from csrm_jax.train import step as training

  training.keep_freed_memory()
  overrides = {'dtype': args.dtype, 'param_dtype': args.dtype}
  cfg, params = hf.load(args.model, **overrides)
  settings = sampling.Sampling(NUM_TOKENS, temperature=0.0 if args.greedy else 1.0)

  def run(prompts):
    return sampling.generate(cfg, params, prompts, settings, batch_size=NUM_ROWS).tokens

  return run


def make_transformers(args):
  import torch
  import transformers

  torch.set_num_threads(pairs.num_threads())
  model = transformers.AutoModelForCausalLM.from_pretrained(
    args.model, dtype=getattr(torch, args.dtype)
  ).eval()
  model.generation_config.eos_token_id = None  # nothing ends one early
  choice = {'do_sample': not args.greedy}
  if not args.greedy:
    choice |= {'top_k': 0, 'temperature': 1.0, 'top_p': 1.0}

  def run(prompts):
    length = max(map(len, prompts))
    tokens = torch.zeros((len(prompts), length), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
      tokens[i, length - len(prompt) :] = torch.tensor(prompt)
      mask[i, length - len(prompt) :] = 1
    with torch.inference_mode():
      out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=NUM_TOKENS, pad_token_id=0, **choice
      )
    return out[:, length:].numpy()

  return run


def main():
  parser = pairs.parser(__doc__)
  parser.add_argument('--greedy', action='store_true', help='take the likeliest tokens')
  args = parser.parse_args()
  rng = np.random.default_rng(0)

  def draw(num):
    return [rng.integers(3, NUM_IDS, length).tolist() for length in rng.integers(32, 49, num)]

  cases = {
    '2 prompts x 8': [prompt for prompt in draw(2) for _ in range(8)],
    '16 prompts': draw(NUM_ROWS),
  }
  work = {name: {'tokens': len(prompts) * NUM_TOKENS} for name, prompts in cases.items()}
  results = pairs.compare('rollout', [make_ours, make_transformers], cases, args, work)
  for case, found in results.items():
    if args.greedy and len(found) == 2:
      print(f'{case}: {np.mean(np.equal(*found.values())):.1%} of the greedy tokens are the same')


if __name__ == '__main__':
  main()
