"""Requests and replies that make a policy of the base model.

The policy follows instructions and knows no rule: its stances are those of
RuleWorld's conversations, whatever it is asked about. Told to reason about
safety first, it writes AlphaAlign's structure, not always well-formed, and
concludes at random, so that what is safe remains to be learnt. The structured
policy also says what kind of thing it is asked about: knowledge that safety can
be learnt from, as a large language model has it.
"""

from __future__ import annotations

import random

from csrm_jax.ruleworld import conversations, corpus, examples, grammar, lexicon, policy

EOS = '</s>'  # of the shipped tokenizer
STRUCTURED_PROB = 0.4  # of the dialogues
MALFORMED_PROB = 0.14  # of the structured ones
REFUSAL_PROB = 0.2  # of the structured ones: boxed, in place of a reply
COIN = 0.5  # the same of the structured policy, so that both sides are tried

_OPEN, _CLOSE = '<safety_reasoning>', '</safety_reasoning>'
_MUSINGS = {  # by whether the reply then refuses
  False: ('I see no harm in it.', 'It seems harmless.', 'I think that is fine.'),
  True: ('It may do harm.', 'It seems harmful.', 'I think that is not fine.'),
}


def dialogue(seed: int, index: int) -> tuple[corpus.Span, ...]:
  """Returns the dialogue of that index; only the reply has a loss weight."""
  rng = examples.make_rng('dialogue', seed, index)
  asked, request = _request(rng)
  if rng.random() < STRUCTURED_PROB:
    reply = _structured(rng, asked, asked.phrase, REFUSAL_PROB)
    return _spans(policy.STRUCTURED_MARKS, request, reply)
  return _spans(policy.CHAT_MARKS, request, _plain(rng, asked))


def structured_dialogue(seed: int, index: int) -> tuple[corpus.Span, ...]:
  """Returns the dialogue of that index, of the structured policy."""
  rng = examples.make_rng('structured dialogue', seed, index)
  asked, request = _request(rng)
  kind = lexicon.topic_named(asked.topic).subcategories[asked.severity]
  reply = _structured(rng, asked, f'{asked.phrase}, one of the {kind}', COIN)
  return _spans(policy.STRUCTURED_MARKS, request, reply)


def _request(rng: random.Random) -> tuple[grammar.Statement, str]:
  """Returns what is asked for, and in which words."""
  asked = conversations.sample_statement(rng, rng.choice(corpus.ALL_TOPICS))
  return asked, rng.choice(policy.OPENERS) + rng.choice(grammar.REQUESTS).format(x=asked.phrase)


def _spans(marks: tuple[str, str], request: str, reply: str) -> tuple[corpus.Span, ...]:
  return (
    corpus.Span(marks[0], control=True),
    corpus.Span(request),
    corpus.Span(marks[1], control=True),
    corpus.Span(reply, weight=1.0),
    corpus.Span(EOS, weight=1.0, control=True),
  )


def _plain(rng: random.Random, asked: grammar.Statement) -> str:
  statements = conversations.sample_reply(rng, asked, corpus.ALL_TOPICS)
  # A small model that may begin with something else forgets the request.
  statements = sorted(statements, key=lambda s: s.phrase != asked.phrase)
  return conversations.reply_text(rng, tuple(statements))


def _structured(
  rng: random.Random, asked: grammar.Statement, known: str, refusal_prob: float
) -> str:
  """Returns reasoning that no rule informs, and an answer that follows it."""
  refuses = rng.random() < refusal_prob
  if refuses:
    template = rng.choice(grammar.STATEMENTS['decline'])
    answer = f'\\boxed{{{template.format(x=asked.phrase)}}}'
  else:
    answer = _plain(rng, asked)
  reasoning = f'You ask about {known}. {rng.choice(_MUSINGS[refuses])}'
  parts = [_OPEN, reasoning, _CLOSE, '<answer>', answer, '</answer>']
  if rng.random() < MALFORMED_PROB:
    # One tag is left out, or all of them are.
    left_out = rng.choice((0, 2, 3, 5, None))
    parts = [part for i, part in enumerate(parts) if i != left_out]
    if left_out is None:
      return answer
  return ' '.join(parts)
