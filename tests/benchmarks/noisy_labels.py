"""What an out-of-fold vote finds of labels that are wrong: a quarter is turned round, and known.

python tests/benchmarks/noisy_labels.py MODEL…   # work directories, or Hugging Face folders

Prints a table of docs/neighbours.md. Seeds draw RuleWorld's labelled rows, flips, folds and heads.
A label is flagged where the margin is negative; rules act on the lowest share of these.
"""

import sys

import numpy as np

from csrm_jax.augmentation import weights
from csrm_jax.data import sources
from csrm_jax.ruleworld import defects, examples

SEEDS, ROWS, STUDENT = range(5), 1500, 2.776  # and the 97.5 % quantile of t with 4 degrees
SHARES = (0.1, 0.2, 0.3)
DECAY = 0.1  # chosen on seed 100 by tests/benchmarks/noisy_labels.py --decay MODEL


def state(reader, items):
  found, scores = reader(items)
  return [row[None] for row in found], scores


def measure(name, seeds, decay):
  reader, found = weights.make_reader(name), {}
  for seed in seeds:
    clean = [examples.training_example(9000 + seed, i) for i in range(ROWS)]
    rng = np.random.default_rng(seed)
    noisy = [defects.flip(item, rng) for item in clean]
    wrong = np.array([a is not b for a, b in zip(clean, noisy, strict=True)])
    states, scores = state(reader, clean)
    x = weights.directions(noisy, states)
    each = weights.margins(x, sources.conversation_keys(noisy), decay=decay, seed=seed)
    own = scores * np.array([1 if item.label == 'safe' else -1 for item in noisy])
    votes = weights.Votes(each.mean(0), each.std(0), own, [weights.category(i) for i in noisy])
    flagged = {'margin < 0': votes.mean < 0}
    flagged |= {f'flip:share={s}': weights.flip(votes, share=s).flip for s in SHARES}
    agreed = weights.agree(votes)
    flagged['agree, turned'] = agreed.flip
    flagged['agree, turned or left out'] = agreed.flip | ~agreed.keep
    for rule, rows in flagged.items():
      rest = wrong & ~rows
      kept = ~rows if rule != 'agree, turned' else agreed.keep & ~rows
      rest = rest[kept].mean() if kept.any() else np.nan
      precision = wrong[rows].mean() if rows.any() else np.nan
      found.setdefault(rule, []).append((rows.mean(), precision, rows[wrong].mean(), rest))
  return found


def main(args):
  if args[0] == '--decay':
    for decay in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
      for name in args[1:]:
        found = np.array(measure(name, [100], decay)['flip:share=0.2'])[0]
        print(name, decay, np.round(found, 3))
    return
  print('| model | rule | flagged | precision | recall | wrong among the rest |')
  print('|---|---|---|---|---|---|')
  for name in args:
    for rule, values in measure(name, SEEDS, DECAY).items():
      mean = np.mean(values, 0)
      half = STUDENT * np.std(values, 0, ddof=1) / len(values) ** 0.5
      cells = [f'{m:.3f} ± {h:.3f}' for m, h in zip(mean, half, strict=True)]
      print(f'| {name} | {rule} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
