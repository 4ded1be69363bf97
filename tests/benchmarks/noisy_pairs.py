"""What losses of pairs do where a quarter of the orders is wrong: linear heads on a frozen trunk.

python tests/benchmarks/noisy_pairs.py WORKDIR   # of a run of configs/rm.py

Prints the table of docs/neighbours.md. Pairs are RuleWorld's; those of the test are ordered by the
truth, and those whose sides are closer than 0.05 are left out. Seeds draw pairs, flips and heads.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from csrm_jax import config as config_lib
from csrm_jax.data import features
from csrm_jax.models import transformer
from csrm_jax.reward import heads, model as reward_model
from csrm_jax.ruleworld import defects, examples
from csrm_jax.train import losses

LOSSES = ('bt', 'soft:smoothing=0.2', 'soft:smoothing=0.5')
SEEDS, STUDENT = 5, 2.776  # and the 97.5 % quantile of t with 4 degrees of freedom
ROWS, LENGTH, STEPS = 16, 256, 400


def encode(workdir, pairs):
  """Returns the last hidden states of both sides of each pair, float32 [N,2,D]."""
  spec, params, tokenizer = reward_model.load_parts(workdir)
  encoder, body = features.Encoder(tokenizer, LENGTH, spec.layout), heads.body(params)

  @jax.jit
  def compute(tokens, lengths):
    places = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    used = (places < lengths[:, None]).astype(jnp.int32)
    hidden = transformer.hidden(spec.model, body, tokens, places, used)
    return hidden[jnp.arange(len(tokens)), lengths - 1]

  sides = [side for pair in pairs for side in (pair.safer, pair.other)]
  prompts = [features.require(features.encode(side, encoder)).prompts[0].tokens for side in sides]
  found = []
  for start in range(0, len(prompts), ROWS):
    rows = prompts[start : start + ROWS]
    rows += rows[-1:] * (ROWS - len(rows))
    tokens = np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows])
    found.append(np.asarray(compute(tokens, np.array([len(row) for row in rows]))))
  return np.concatenate(found)[: len(prompts)].reshape(len(pairs), 2, -1)


def fit(difference, text, seed):
  """Returns the weights [D] of a linear head that full batches of pairs have taught."""
  loss, optimizer = config_lib.choose('loss', losses.PAIR_LOSSES, text), optax.adam(3e-2)
  ones = jnp.ones(len(difference))

  @jax.jit
  def step(weights, state):
    slope = jax.grad(lambda w: loss(difference @ w, ones, ones).mean())(weights)
    updates, state = optimizer.update(slope, state)
    return optax.apply_updates(weights, updates), state

  weights = 0.01 * jax.random.normal(jax.random.key(seed), difference.shape[1:])
  state = optimizer.init(weights)
  for _ in range(STEPS):
    weights, state = step(weights, state)
  return np.asarray(weights)


def main(workdir):
  train = [examples.preference_pair(50, i) for i in range(1200)]
  tests = {
    'seen rules': [examples.preference_pair(60, i) for i in range(600)],
    'unseen guidelines': [examples.strictness_pair(60, i, 'unseen') for i in range(400)],
  }
  hidden, known = encode(workdir, train), {}
  for name, pairs in tests.items():
    gaps = np.array([pair.other.probability - pair.safer.probability for pair in pairs])
    states = encode(workdir, pairs)
    known[name] = ((states[:, 0] - states[:, 1]) * np.sign(gaps)[:, None])[np.abs(gaps) > 0.05]
  found = {}
  for num in (150, 1200):
    for seed in range(SEEDS):
      rng = np.random.default_rng(seed)
      chosen = rng.permutation(len(train))[:num]
      difference = hidden[chosen, 0] - hidden[chosen, 1]
      turned = [defects.flip(train[i], rng) is not train[i] for i in chosen]
      noisy = np.where(np.array(turned)[:, None], -difference, difference)
      runs = {'bt, no flips': fit(difference, 'bt', seed)}
      runs |= {text: fit(noisy, text, seed) for text in LOSSES}
      for run, weights in runs.items():
        for name, gap in known.items():
          values = (gap @ weights > 0).mean(), np.logaddexp(0, -(gap @ weights)).mean()
          found.setdefault((num, run, name), []).append(values)
  print('| pairs | loss | tested on | accuracy | NLL, nats | NLL − that of bt |')
  print('|---|---|---|---|---|---|')
  for (num, run, name), values in found.items():
    accuracy, nll = np.mean(values, 0)
    apart = np.subtract(values, found[num, 'bt', name])[:, 1]
    half = STUDENT * apart.std(ddof=1) / SEEDS**0.5
    cell = '' if run == 'bt' else f'{apart.mean():+.3f} ± {half:.3f}'
    print(f'| {num:,} | {run} | {name} | {accuracy:.3f} | {nll:.3f} | {cell} |')


if __name__ == '__main__':
  main(sys.argv[1])
