"""How far rules from one-bit alarms agree with the hidden ones, by bits and false alarms.

python tests/benchmarks/induced_rules.py

RuleWorld's exact inducer; seeds draw conversations and alarms, and new conversations of three rule
sets test. Prints means over seeds with half of the 95 % t-interval.
"""

import numpy as np

from csrm_jax.augmentation import induction
from csrm_jax.ruleworld import alarms, proposer

SETS, SEEDS, STUDENT = ('film club', 'pet forum', 'savings bank'), range(5), 2.776
NEW = 500  # conversations


def agreement(name, seed, num, false_alarms):
  taught = [alarms.alarm(seed, i, name, false_alarms) for i in range(num)]
  new = [alarms.alarm(1000 + seed, i, name) for i in range(NEW)]
  rules = alarms.induce([e.conversation for e in taught], [e.label == 'unsafe' for e in taught])
  fires = induction.where(rules, [e.conversation for e in new], proposer.make_judge())
  truth = [e.probability > 0 for e in new]
  return np.mean(np.equal(fires, truth)), 1 - np.mean(truth)


def main():
  for share in (0.0, 0.25, 0.5):
    for num in (64, 256, 1024):
      by_seed = [np.mean([agreement(name, s, num, share) for name in SETS], 0) for s in SEEDS]
      mean, half = np.mean(by_seed, 0), STUDENT * np.std(by_seed, 0, ddof=1) / len(SEEDS) ** 0.5
      print(
        f'{share:.0%} false alarms, {num} bits: {mean[0]:.3f} ± {half[0]:.3f}; '
        f'no rules {mean[1]:.3f}',
        flush=True,
      )


if __name__ == '__main__':
  main()
