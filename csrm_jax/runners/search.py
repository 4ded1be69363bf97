"""Scores samples of a policy and looks at the truth of what search finds in them."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import ml_collections

from csrm_jax import config as config_lib
from csrm_jax.core import checks, files
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import report, suites
from csrm_jax.models import hf
from csrm_jax.models.sampling import Sampling
from csrm_jax.reward import model as reward_model, monitor, scoring
from csrm_jax.rl import multifurcation, online
from csrm_jax.ruleworld import policy as world
from csrm_jax.runners import align, evaluate
from csrm_jax.safety import schema

PROMPTS_AT_ONCE = 16
# So many samples of a prompt show a multifurcation model how replies may begin.
_SAMPLES_EACH = 8


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/report; reports of several reward models are compared by prompt."""
  if evaluate.show_finished(workdir):
    return
  if config.num_samples < 2:
    raise ValueError(f'config.num_samples={config.num_samples} must be at least 2')
  beams = tuple(config.beams)
  if beams:
    _check_beams(config)
  rm = evaluate.load_model(config, allow_out_of_domain=True)
  score_fn = evaluate.keep_scores(rm.score_fn, workdir / 'scores', rm.digest)
  todo = []
  find = _make_beam_search(config, score_fn) if beams else None
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
    if find:
      items = [(*item, *more) for item, more in zip(items, find(rules), strict=True)]
    options = {'beams': beams} if beams else {}
    todo.append(Benchmark(name, 'search', items, about, options=options))
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
  policy, params, sampling = _load_policy(made)

  def draw(prompts, num, seed):
    drawn, _ = online.rollout(policy, params, prompts, sampling, num, seed)
    return [drawn[i * num : (i + 1) * num] for i in range(len(prompts))]

  return draw


def _load_policy(made: ml_collections.ConfigDict) -> tuple[online.Policy, Any, Sampling]:
  source = hf.Source(made.policy.init)
  policy = align.make_policy(made, source)
  params = hf.load_params(source, dataclasses.replace(policy.model, lora_rank=0))
  return policy, params, align.make_sampling(made, (policy.tokenizer.eos_id,))


def _check_beams(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for beams that cannot be searched with, before anything is loaded."""
  if min(config.beams) < 1 or len(set(config.beams)) < len(config.beams):
    raise ValueError(f'config.beams={tuple(config.beams)} must be different numbers from 1 on')
  checks.at_least(
    config.multifurcation, ('num_samples', 'every', 'num_steps', 'batch_size', 'lora_rank')
  )
  if len(reward_model.members(config.checkpoint)) > 1:
    raise ValueError(
      f'config.checkpoint={config.checkpoint}: of several models there is no next-token model; '
      'give one, or leave config.beams empty'
    )


def _make_beam_search(
  config: ml_collections.ConfigDict, score_fn: scoring.ScoreFn
) -> Callable[[str], list[list[schema.Example]]]:
  """Returns a function: rules -> what beam search finds for each prompt with config.beams.

  The model that guides it learns from the policy's samples for other prompts.
  """
  settings, names = config.multifurcation, config.rules or tuple(world.RULE_SETS)
  policy, params, sampling = _load_policy(config_lib.load_module('rl').get_config('reward=oracle'))
  spec, weights, tokenizer = reward_model.load_parts(
    config.checkpoint, **evaluate.model_options(config)
  )
  ask = multifurcation.asker(spec, tokenizer, policy, sampling.max_completion_length)
  num = max(settings.num_samples // (_SAMPLES_EACH * len(names)), 1)
  prompts = [p for rules in names for p in world.prompts(config.seed, num, rules, 'train')]
  drawn = online.rollout(policy, params, prompts, sampling, _SAMPLES_EACH, config.seed)

  def reward(examples):
    with evaluate.progress_bar('prefixes', len(examples)) as bar:
      return scoring.probabilities(score_fn(examples, bar.update))[1]

  rewards = multifurcation.observe(policy, *drawn, reward, settings.every)
  made, errors = multifurcation.fit(
    *(spec, weights, ask, policy), *drawn, rewards, settings, config.seed
  )
  print(
    f'multifurcation: error {errors["error"]:.3g}, of the mean {errors["error_of_mean"]:.3g}',
    file=sys.stderr,
  )
  sampling = dataclasses.replace(sampling, top_p=settings.top_p)

  def find(rules):
    prompts = world.prompts(config.seed, config.num_prompts, rules, 'test')
    found: list[list[schema.Example]] = [[] for _ in prompts]
    with evaluate.progress_bar('beams', len(prompts) * len(config.beams)) as bar:
      for beams, i in itertools.product(config.beams, range(0, len(prompts), PROMPTS_AT_ONCE)):
        some = prompts[i : i + PROMPTS_AT_ONCE]
        best, _ = multifurcation.search(
          policy, params, made, some, sampling, beams, settings.min_length
        )
        for own, sample in zip(found[i : i + PROMPTS_AT_ONCE], best, strict=True):
          own.append(_known(sample))
        bar.update(len(some))
    return found

  return find


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
