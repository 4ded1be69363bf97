"""Times generation against transformers on the shape of SmolLM2-135M.

python tests/benchmarks/sampling_benchmark.py [--model=DIR] [--peer=False]

Both have the same float32 weights, random ones without a folder, and as many
threads as the process may use (`taskset -c 0` for one). They continue the same
prompts by a fixed number of tokens, greedily and drawn from the whole
distribution; with --num_generations=8 each prompt 8 times, as a rollout does.
They take turns and report their fastest run, prompts included; the time of the
CPU is less disturbed by other programs. The peer needs torch and transformers.
"""

import argparse
import os
import tempfile
import time

import numpy as np

from csrm_jax.models import config, hf, sampling, transformer
from csrm_jax.train import step as training


def make_peer(cfg, params, num_tokens):
  """Returns (prompts, greedy) -> completions of the transformers model."""
  import torch
  import transformers

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  with tempfile.TemporaryDirectory() as folder:
    hf.save(folder, cfg, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  model.generation_config.eos_token_id = None  # nothing ends one early

  def generate(prompts, greedy):
    length = max(map(len, prompts))
    tokens = torch.zeros((len(prompts), length), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
      tokens[i, length - len(prompt) :] = torch.tensor(prompt)
      mask[i, length - len(prompt) :] = 1
    choice = (
      {'do_sample': False}
      if greedy
      else {'do_sample': True, 'top_k': 0, 'temperature': 1.0, 'top_p': 1.0}
    )
    with torch.inference_mode():
      out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=num_tokens, pad_token_id=0, **choice
      )
    return out[:, length:].numpy()

  return generate


def make_ours(cfg, params, num_tokens):
  """Returns what make_peer does, for csrm_jax.models.sampling."""

  def generate(prompts, greedy):
    settings = sampling.Sampling(num_tokens, temperature=0.0 if greedy else 1.0)
    return sampling.generate(cfg, params, prompts, settings, batch_size=len(prompts)).tokens

  return generate


def measure(runs, prompts, greedy, repeats):
  """Returns {name: (seconds, CPU seconds)}, the least of the repeats."""
  best, outs = {}, {}
  for repeat in range(1 + repeats):
    for name, run in runs.items():
      start = time.perf_counter(), time.process_time()
      outs[name] = run(prompts, greedy)
      spent = time.perf_counter() - start[0], time.process_time() - start[1]
      if repeat:  # the first one compiles
        best[name] = np.minimum(best.get(name, np.inf), spent)
  if greedy and len(outs) == 2:
    same = np.mean(np.equal(*outs.values()))
    print(f'  {same:.1%} of the greedy tokens are the same')
  return best


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', help='a Hugging Face folder')
  parser.add_argument('--batch_sizes', default='16,64')
  parser.add_argument('--num_tokens', type=int, default=48)
  parser.add_argument('--num_generations', type=int, default=1)
  parser.add_argument('--prompt_lengths', default='16,64', help='from, to')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--peer', default=True, type=lambda x: x == 'True')
  args = parser.parse_args()
  training.keep_freed_memory()
  if args.model:
    cfg, params = hf.load(args.model)
  else:
    cfg = config.PRESETS['smollm2_135m']
    params = transformer.init_params(cfg, 0)
  runs = {'ours': make_ours(cfg, params, args.num_tokens)}
  if args.peer:
    runs['transformers'] = make_peer(cfg, params, args.num_tokens)
  low, high = map(int, args.prompt_lengths.split(','))
  rng = np.random.default_rng(0)
  for size in map(int, args.batch_sizes.split(',')):
    lengths = rng.integers(low, high + 1, size // args.num_generations)
    prompts = [rng.integers(3, cfg.vocab_size, length).tolist() for length in lengths]
    prompts = [p for p in prompts for _ in range(args.num_generations)]
    for way in ('greedy', 'sampled'):
      best = measure(runs, prompts, way == 'greedy', args.repeats)
      rates = {name: len(prompts) * args.num_tokens / spent for name, spent in best.items()}
      for name, (rate, cpu_rate) in rates.items():
        print(
          f'batch {size}, {way}, {name}: {rate:.0f} tokens/s, {cpu_rate:.0f} tokens per CPU second',
          flush=True,
        )
      if args.peer:
        ratio = rates['ours'] / rates['transformers']
        print(
          f'batch {size}, {way}: ours / transformers {ratio[0]:.2f}, per CPU second {ratio[1]:.2f}',
          flush=True,
        )


if __name__ == '__main__':
  main()
