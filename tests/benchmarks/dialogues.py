"""Alarms over turns, and pairs of dialogues that differ in one, of models or of the truth itself.

python tests/benchmarks/dialogues.py NUM truth MODEL…   # NUM dialogues a seed; work directories

`truth` judges by an annotator's own probabilities. Prints means over seeds with half of the 95 %
t-interval, and the paired difference of the leads.
"""

import sys

import numpy as np

from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import suites
from csrm_jax.reward import model
from csrm_jax.ruleworld import grammar, oracle, probes, rules

SEEDS, STUDENT = range(3000, 3005), 2.776  # the 97.5 % quantile of t with 4 degrees


def truth(rows):
  made = [
    oracle.unsafe_probability(
      tuple(map(rules.read, e.safety.categories)), grammar.read_reply(e.conversation[-1].content)
    )
    for e in rows
  ]
  return -np.array([oracle.log_odds(p) for p in made])


def main(args):
  num, *names = args
  for name in names:
    score_fn = truth if name == 'truth' else model.load(name, allow_out_of_domain=True).score_fn
    found = {}
    for seed in SEEDS:
      for suite, make in (('drift', probes.drift), ('trajectories', probes.trajectory)):
        todo = Benchmark(suite, suite, [make(seed, i) for i in range(int(num))])
        measured = suites.run(score_fn, [todo], num_samples=0)[suite].metrics
        for metric, one in measured.items():
          found.setdefault(metric, []).append(one['value'])
    found['chain_lead - verdict_lead'] = np.subtract(found['chain_lead'], found['verdict_lead'])
    for metric, values in found.items():
      half = STUDENT * np.std(values, ddof=1) / len(values) ** 0.5
      print(f'{name} {metric}: {np.mean(values):.3f} ± {half:.3f}', flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
