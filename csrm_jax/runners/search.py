"""Scores samples of a policy and looks at the truth of what search finds in them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import ml_collections

from csrm_jax import config as config_lib
from csrm_jax.core import files
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import report, suites
from csrm_jax.models import hf
from csrm_jax.reward import monitor
from csrm_jax.rl import online
from csrm_jax.ruleworld import policy as world
from csrm_jax.runners import align, evaluate
from csrm_jax.safety import schema

PROMPTS_AT_ONCE = 16


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/report; reports of several reward models are compared by prompt."""
  if evaluate.show_finished(workdir):
    return
  if config.num_samples < 2:
    raise ValueError(f'config.num_samples={config.num_samples} must be at least 2')
  rm = evaluate.load_model(config, allow_out_of_domain=True)
  score_fn = evaluate.keep_scores(rm.score_fn, workdir / 'scores', rm.digest)
  todo = []
  for rules in config.rules or tuple(world.RULE_SETS):
    about = f'Replies of the unaligned policy under the rules of the {rules}, and what is true.'
    items = _samples(config, rules)
    name = rules.replace(' ', '_')
    if config.every:
      items = [tuple(_growing(sample, config.every) for sample in item) for item in items]
      replies = [sample for item in items for sample in item]
      groups = [f'{i}' for i, item in enumerate(items) for _ in item]
      options = {'alpha': config.alpha}
      growing = 'The same replies as they grow, safe or not to the letter of the rules.'
      todo.append(
        Benchmark(f'{name}_alarms', 'alarms', replies, growing, groups=groups, options=options)
      )
    todo.append(Benchmark(name, 'search', items, about))
  results = evaluate.test(score_fn, suites.prepare(todo))
  summary = report.summarise(results)
  title = config.title or f'Truth under search: {config.checkpoint}'
  evaluate.write(workdir, results, summary, title)


def _samples(config: ml_collections.ConfigDict, rules: str) -> list[tuple[schema.Example, ...]]:
  """Returns the samples of each prompt, with their true probabilities."""
  draw = make_sampler(config_lib.load_module('rl').get_config('reward=oracle'))
  prompts = world.prompts(config.seed, config.num_prompts, rules, 'test')
  items: list[tuple[schema.Example, ...]] = []
  with evaluate.progress_bar('sample', len(prompts)) as bar:
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
      group = prompts[start : start + PROMPTS_AT_ONCE]
      for drawn in draw(group, config.num_samples, config.seed + start):
        items.append(tuple(map(_known, drawn)))
      bar.update(len(group))
  return items


def make_sampler(made: ml_collections.ConfigDict) -> Callable[..., list[list[schema.Sample]]]:
  """Returns (prompts, how many, seed) -> samples of each, by the policy of a config of rl.py."""
  source = hf.Source(made.policy.init)
  policy = align.make_policy(made, source)
  params = hf.load_params(source, dataclasses.replace(policy.model, lora_rank=0))
  sampling = align.make_sampling(made, (policy.tokenizer.eos_id,))

  def draw(prompts, num, seed):
    drawn, _ = online.rollout(policy, params, prompts, sampling, num, seed)
    return [drawn[i * num : (i + 1) * num] for i in range(len(prompts))]

  return draw


def _growing(sample: schema.Example, every: int) -> tuple[schema.Example, ...]:
  """Returns what a monitor judges of a reply, all of it last."""
  cuts = monitor.Cuts(every=every)
  *parts, _ = cuts.prefixes(sample.conversation)
  unknown = dataclasses.replace(sample, label=None, probability=None)
  return *(
    dataclasses.replace(unknown, id=f'{sample.id}/{i}', conversation=part)
    for i, part in enumerate(parts)
  ), sample


def _known(sample: schema.Sample) -> schema.Example:
  # Equal texts of a prompt are one example, which is scored once.
  name = f'{sample.prompt.id}/{files.digest(sample.text)[:12]}'
  probability = min(max(1 - world.oracle_safety(sample), 0.0), 1.0)
  label = 'safe' if world.oracle_compliance(sample) == 1 else 'unsafe'
  return dataclasses.replace(sample.example(), id=name, label=label, probability=probability)
