"""Times generation against transformers on the shape of SmolLM2-135M.

python tests/benchmarks/sampling_benchmark.py [--batch_sizes=16,64]

Both have the same random float32 weights and draw from the whole distribution,
a fixed number of tokens for prompts of one length. They take turns and report
their fastest run, prompts included; the time of the CPU is less disturbed by
other programs. The peer needs torch and transformers.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
import transformers

from csrm_jax import sampling, training
from csrm_jax.models import config, hf, transformer


def make_peer(cfg, params):
  """Returns the transformers model with these parameters."""
  with tempfile.TemporaryDirectory() as folder:
    hf.save(folder, cfg, params)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32).eval()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--batch_sizes', default='16,64')
  parser.add_argument('--prompt_length', type=int, default=64)
  parser.add_argument('--num_tokens', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=3)
  args = parser.parse_args()
  training.keep_freed_memory()
  cfg = config.PRESETS['smollm2_135m']
  params = transformer.init_params(cfg, 0)
  peer = make_peer(cfg, params)
  settings = sampling.Sampling(max_completion_length=args.num_tokens)
  rng = np.random.default_rng(0)

  def ours(prompts):
    return sampling.generate(
        cfg, params, prompts, settings, batch_size=len(prompts)).tokens

  def theirs(prompts):
    prompts = torch.tensor(prompts)
    with torch.no_grad():
      return peer.generate(
          prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
          top_k=0, max_new_tokens=args.num_tokens, pad_token_id=0,
          min_new_tokens=args.num_tokens)[:, args.prompt_length:]

  for size in map(int, args.batch_sizes.split(',')):
    prompts = rng.integers(
        0, cfg.vocab_size, (size, args.prompt_length)).tolist()
    best = {}
    for repeat in range(1 + args.repeats):
      for name, run in (('ours', ours), ('transformers', theirs)):
        start = time.perf_counter(), time.process_time()
        assert run(prompts).shape == (size, args.num_tokens)
        spent = time.perf_counter() - start[0], time.process_time() - start[1]
        if repeat:  # the first one compiles
          best[name] = np.minimum(best.get(name, np.inf), spent)
    rates = {name: size * args.num_tokens / spent
             for name, spent in best.items()}
    for name, (rate, cpu_rate) in rates.items():
      print(f'batch {size}, {name}: {rate:.0f} tokens/s, {cpu_rate:.0f} tokens '
            'per CPU second')
    print('batch {}: ours / transformers {:.2f}, per CPU second {:.2f}'.format(
        size, *(rates['ours'] / rates['transformers'])), flush=True)


if __name__ == '__main__':
  main()
