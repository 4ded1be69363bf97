"""Conversations of RuleWorld: what is asked and what is replied."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterable, Mapping

from csrm_jax.ruleworld import grammar, lexicon
from csrm_jax.safety import schema

# How a reply treats what it talks about; mostly it engages, so that this alone says little.
STANCE_WEIGHTS = {'encourage': 0.45, 'describe': 0.45, 'mention': 0.04, 'decline': 0.06}
MORE_PROB = 0.25  # one more statement, up to three in all
FILLER_PROB = 0.25
HISTORY_PROB = 0.3  # an earlier exchange, about something else


@dataclasses.dataclass(frozen=True)
class Scene:
  """A conversation and what it means.

  Attributes:
    asked: What the last user turn asks for; its stance means nothing.
    statements: What the last agent turn says; fillers are not listed.
    role: Who the user says to be in an earlier turn; '' for nobody.
  """

  asked: grammar.Statement
  statements: tuple[grammar.Statement, ...]
  messages: tuple[schema.Message, ...]
  role: str = ''


def sample_statement(
  rng: random.Random,
  topic: str,
  stance: str = '',
  severity: int | None = None,
  stance_weights: Mapping[str, float] = STANCE_WEIGHTS,
) -> grammar.Statement:
  """Returns a random statement on a topic; stance and severity may be given."""
  if severity is None:
    severity = rng.randrange(lexicon.NUM_SEVERITIES)
  stance = stance or rng.choices(tuple(stance_weights), tuple(stance_weights.values()))[0]
  return grammar.Statement(
    topic,
    severity,
    rng.choice(lexicon.topic_named(topic).phrases[severity]),
    stance,
    _sample_template(rng, topic),
  )


def _sample_template(rng: random.Random, topic: str) -> int:
  # Topics that are kept out of training are talked about in sentences of their own, every second
  # time.
  side = lexicon.side_of(topic)
  own = side != 'train' and rng.random() < 0.5
  return rng.choice(grammar.TEMPLATES_OF[side if own else 'train'])


def sample_reply(
  rng: random.Random,
  asked: grammar.Statement,
  topics: tuple[str, ...],
  stance_weights: Mapping[str, float] = STANCE_WEIGHTS,
) -> tuple[grammar.Statement, ...]:
  """Returns one to three statements, of which at least one is on what was asked for.

  A further statement stays with the phrase, moves within the topic (a partial answer) or leaves
  it for another of `topics`.
  """
  sample = functools.partial(sample_statement, rng, stance_weights=stance_weights)
  first = sample(asked.topic, severity=asked.severity)
  statements = [dataclasses.replace(first, phrase=asked.phrase)]
  while len(statements) < 3 and rng.random() < MORE_PROB:
    where = rng.random()
    if where < 0.25:
      more = sample(asked.topic, severity=asked.severity)
      more = dataclasses.replace(more, phrase=asked.phrase)
    elif where < 0.6:
      more = sample(asked.topic)
    else:
      more = sample(rng.choice(topics))
    statements.append(more)
  rng.shuffle(statements)
  return tuple(statements)


def reply_text(rng: random.Random, statements: tuple[grammar.Statement, ...]) -> str:
  """Returns the reply in words, with a filler sentence now and then."""
  sentences = [s.text() for s in statements]
  if rng.random() < FILLER_PROB:
    sentences.insert(rng.randint(0, len(sentences)), rng.choice(grammar.FILLERS))
  return ' '.join(sentences)


def request(rng: random.Random, phrase: str, role: str = '') -> schema.Message:
  """Returns a user's turn that asks for a phrase, after who the user is if there is a role."""
  text = rng.choice(grammar.REQUESTS).format(x=phrase)
  return schema.Message('user', f'{grammar.STATED.format(r=role)} {text}' if role else text)


def role_of(messages: Iterable[schema.Message]) -> str:
  """Returns who the user says to be, the last time; '' if nowhere."""
  return grammar.read_role(message.content for message in messages if message.role == 'user')


def sample_prompt(
  rng: random.Random, topic: str, topics: tuple[str, ...], role: str = ''
) -> tuple[grammar.Statement, tuple[schema.Message, ...]]:
  """Returns (what is asked, the messages up to the last user turn).

  A role is said at the beginning of an earlier turn.
  """
  messages = []
  if role or rng.random() < HISTORY_PROB:
    other = sample_statement(rng, rng.choice((topic,) + topics[:1]))
    messages += [request(rng, other.phrase, role), schema.Message('agent', other.text())]
  asked = sample_statement(rng, topic)
  messages.append(request(rng, asked.phrase))
  return asked, tuple(messages)


def sample_scene(
  rng: random.Random,
  topic: str,
  topics: tuple[str, ...],
  role: str = '',
  stance_weights: Mapping[str, float] = STANCE_WEIGHTS,
) -> Scene:
  """Returns a conversation about `topic` that may stray to `topics`."""
  asked, messages = sample_prompt(rng, topic, topics, role)
  return answer(rng, asked, messages, topics, role, stance_weights)


def answer(
  rng: random.Random,
  asked: grammar.Statement,
  messages: tuple[schema.Message, ...],
  topics: tuple[str, ...],
  role: str = '',
  stance_weights: Mapping[str, float] = STANCE_WEIGHTS,
) -> Scene:
  """Returns a conversation in which a prompt gets a random reply."""
  statements = sample_reply(rng, asked, topics, stance_weights)
  reply = schema.Message('agent', reply_text(rng, statements))
  return Scene(asked, statements, messages + (reply,), role)
