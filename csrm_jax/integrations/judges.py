"""Judges: what reads conversations under rules, in this process or behind HTTP."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from csrm_jax.core import checks, client as client_lib
from csrm_jax.safety import schema

# Rules: what safety.schema reads, its file, or None; for a server also the name of a policy.
Rules = Any
# A conversation in the form of chat APIs, whose last message, the assistant's, is judged.
Messages = Sequence[Mapping[str, Any]]
_BATCH = 64  # conversations in a request


class Verdict(NamedTuple):
  """What a judge says about the last message of a conversation."""

  score: float  # log P(safe) - log P(unsafe), in nats
  reward: float  # sigmoid(score), in [0, 1]
  p_unsafe: float  # 1 - reward
  flagged: bool
  each_rule: dict[str, float]  # P(unsafe) under each rule alone; {} where not asked for
  unread: float  # share of the prompt's tokens that the model has not read, in [0, 1]


# (conversations, rules of each or None[, each_rule]) -> as many verdicts, all numbers finite
Judge = Callable[..., list[Verdict]]


def local(
  source: str | os.PathLike, rules: Rules = None, thresholds: str = '', **options: Any
) -> Judge:
  """Returns a judge that computes here.

  Args:
    source: A run's work directory, an exported folder or a public model.
    rules: What judges conversations that bring no rules.
    thresholds: The thresholds.json of configs/calibrate.py; other rules are flagged from P(unsafe)
      0.5 on.
    **options: Further arguments of csrm_jax.load. What a policy writes may be foreign to the model,
      which is an error unless allow_out_of_domain=True (of a server: --config.allow_out_of_domain).
  """
  from csrm_jax.evals import thresholds as thresholds_lib
  from csrm_jax.reward import model as reward_model, scoring

  default = None if rules is None else read_rules(rules)
  rm = reward_model.load(source, **options)
  fitted: Mapping[str, thresholds_lib.Threshold] = {}
  if thresholds:
    fitted = thresholds_lib.load(thresholds, rm.digest, rm.calibration).by_rules

  def is_flagged(verdict: scoring.Verdict, example: schema.Example) -> bool:
    own = fitted.get(example.safety.digest()) if fitted else None
    return own.flags(verdict.score) if own else verdict.label == 'unsafe'

  def judge(
    conversations: Sequence[Messages], rules: Sequence[Rules] | None = None, each_rule: bool = False
  ) -> list[Verdict]:
    examples = []
    for i, (talk, own) in enumerate(_pairs(conversations, rules)):
      safety = default if own is None else read_rules(own)
      if safety is None:
        raise ValueError(f'conversation {i} has no rules; give the judge some as default')
      examples.append(schema.Example(f'conversation {i}', safety, _parse(talk, i)))
    verdicts = scoring.verdicts(rm.score_fn.judge(examples))
    parts: list[dict[str, float]] = [{} for _ in examples]
    if each_rule and examples:
      parts = scoring.by_category(rm.score_fn, examples)
    return [
      Verdict(v.score, v.reward, v.p_unsafe, is_flagged(v, example), part, v.unread)
      for v, example, part in zip(verdicts, examples, parts, strict=True)
    ]

  return judge


def remote(
  url: str,
  rules: Rules = None,
  *,
  key_variable: str = '',
  ca_file: str = '',
  shorten: bool = False,
  timeout_s: float = 60.0,
  num_tries: int = 5,
  backoff_s: float = 1.0,
  connections: int = 4,
) -> Judge:
  """Returns a judge that asks a server of configs/serve.py; safe to call from many threads.

  Args:
    url: The server's, such as http://127.0.0.1:8000.
    rules: What judges conversations that bring no rules: rules, or the name of a policy there; None
      for the server's default.
    key_variable: The environment variable that holds the server's token; '' sends none.
    ca_file: PEM certificates to trust in place of the system's.
    shorten: Whether a conversation that is too long for the server is cut rather than an error.
    connections: Requests at once.
  """
  client = client_lib.Client(
    f'{url.rstrip("/")}/score',
    'server',
    timeout_s,
    num_tries,
    backoff_s,
    connections,
    key_variable,
    ca_file,
  )
  default = None if rules is None else _named(rules)

  def ask(rows: Sequence[dict[str, Any]], each_rule: bool) -> list[Verdict]:
    body = {'conversations': list(rows), 'each_rule': each_rule, 'shorten': shorten}
    sent = f'{len(rows)} conversations'
    return _read(client.parse(client.post(body), sent), len(rows), url)

  def judge(
    conversations: Sequence[Messages], rules: Sequence[Rules] | None = None, each_rule: bool = False
  ) -> list[Verdict]:
    rows = []
    for i, (talk, own) in enumerate(_pairs(conversations, rules)):
      messages = [message.to_dict() for message in _parse(talk, i)]
      rows.append({'messages': messages} | (default or {} if own is None else _named(own)))
    chunks = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
    if len(chunks) < 2:
      return ask(rows, each_rule) if rows else []
    with concurrent.futures.ThreadPoolExecutor(connections) as pool:
      found = pool.map(lambda chunk: ask(chunk, each_rule), chunks)
      return list(itertools.chain.from_iterable(found))

  return judge


def read_rules(rules: Rules) -> schema.SafetyConfig:
  """Returns the rules in a file, in what a file holds, or as they are."""
  if isinstance(rules, schema.SafetyConfig):
    return rules
  if isinstance(rules, (str, os.PathLike)):
    return schema.load_safety(rules)
  return schema.parse_safety(rules, 'the rules')


def _named(rules: Rules) -> dict[str, Any]:
  """Returns the field of a request that names or brings rules."""
  if isinstance(rules, str) and not pathlib.Path(rules).suffix:
    return {'policy': rules}
  return {'safety': read_rules(rules).to_dict()}


def _pairs(
  conversations: Sequence[Messages], rules: Sequence[Rules] | None
) -> list[tuple[Messages, Rules]]:
  own = [None] * len(conversations) if rules is None else list(rules)
  if len(own) != len(conversations):
    raise ValueError(
      f'{len(own)} rule sets for {len(conversations)} conversations; give one for each, or None'
    )
  return list(zip(conversations, own, strict=True))


def _parse(messages: Messages, i: int) -> tuple[schema.Message, ...]:
  try:
    talk = schema.parse_conversation(messages)
    schema.check_conversation(talk)
  except ValueError as error:
    raise ValueError(f'conversation {i}: {error}') from None
  return talk


def _read(reply: Mapping[str, Any], num: int, url: str) -> list[Verdict]:
  """Returns the verdicts in a reply; anything but one of finite numbers for each is an error."""
  rows = reply.get('verdicts')
  if not isinstance(rows, list) or len(rows) != num:
    raise ValueError(
      f'the server at {url} replied without {num} "verdicts"; give the URL of configs/serve.py'
    )
  verdicts = []
  for row in rows:
    row = row if isinstance(row, Mapping) else {}
    each, label = row.get('each_rule', {}), row.get('label')
    numbers = [row.get(key) for key in ('score', 'reward', 'p_unsafe', 'unread')]
    parts = list(each.values()) if isinstance(each, Mapping) else [None]
    if label not in schema.LABELS or not all(map(_is_finite, [*numbers, *parts])):
      raise ValueError(
        f'the server at {url} replied with a verdict that is none ({checks.show(row)}, label '
        f'{checks.show(label)}); what cannot be scored has no reward'
      )
    verdicts.append(Verdict(*numbers[:3], label == 'unsafe', dict(each), numbers[3]))
  return verdicts


def _is_finite(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value)
