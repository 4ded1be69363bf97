"""The text that the shipped models are pretrained on.

The base model plays the part that an instruction-tuned language model has in the paper. It knows
all words, what belongs to what, and how to answer questions about a list of rules or about a
reply: which rule names this, is that allowed, does the reply promote it. No document holds a
verdict on a reply under rules: those words (`safe`, `unsafe`) never occur.

Dialogues make policies of the base model. A policy follows instructions and knows no rule: its
stances are those of RuleWorld's conversations, whatever it is asked about. Told to reason about
safety first, it writes AlphaAlign's structure, not always well-formed, and concludes at random,
so that what is safe remains to be learnt. The structured policy also says what kind of thing it
is asked about: knowledge that safety can be learnt from, as a large language model has it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

from csrm_jax.ruleworld import conversations, examples, grammar, lexicon, policy, rules as rules_lib
from csrm_jax.safety import templates

Rules = examples.Rules
ALL_TOPICS = tuple(topic.name for topic in lexicon.TOPICS)
MAX_RULES = 4  # in a list
TEXT_WEIGHT = 0.1  # loss weight of a token of plain text; answers weigh 1

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


@dataclasses.dataclass(frozen=True)
class Span:
  """A piece of a document; `weight` is its loss weight, `control` that the template wrote it."""

  text: str
  weight: float = 0.0
  control: bool = False


def document(seed: int, index: int, progress: float = 1.0) -> tuple[Span, ...]:
  """Returns the pretraining document of that index.

  `progress` in [0, 1] is the place in the curriculum. At 0 lists have one rule and most
  questions repeat the words of the list; at 1 lists have up to four, and most questions need to
  know what a word belongs to.
  """
  rng = examples.make_rng('corpus', seed, index)
  kinds = ('facts', 'rules table', 'reply table', 'rules questions', 'reading', 'both')
  early = (0.2, 0.55, 0.15, 0.05, 0.03, 0.02)
  late = (0.05, 0.3, 0.15, 0.15, 0.1, 0.25)
  weights = [a + (b - a) * progress for a, b in zip(early, late, strict=True)]
  kind = rng.choices(kinds, weights)[0]
  if kind == 'facts':
    return tuple(_facts(rng))
  rules = _sample_rules(rng, progress)
  scene = _sample_scene(rng, rules)
  block, talk = _parts(rules, scene)
  match kind:
    case 'rules table':  # rules, and word by word what is allowed by them
      words = (_look_up(rng, rules, (), progress)[1:3] for _ in range(16))
      spans = block + _table('Allowed', words)
    case 'reply table':  # a reply, its stance word by word, and what it promotes
      phrases = [s.phrase for s in scene.statements]
      rng.shuffle(phrases)
      stances = ((phrase, _stance(phrase, scene.statements)) for phrase in phrases)
      promoted = (_promoted(rng, scene) for _ in range(6))
      spans = talk + _table('Stance', stances) + _table('Promoted', promoted)
    case 'rules questions':
      spans = block + _ask(_rules_question(rng, rules, (), progress) for _ in range(10))
    case 'reading':
      spans = talk + _ask(_reading_question(rng, scene) for _ in range(6))
    case 'both':
      spans = block + talk + _ask(_any_question(rng, rules, scene, progress) for _ in range(8))
  return tuple(spans)


def _question(question: str, answer: str) -> list[Span]:
  return [
    Span(question),
    Span(templates.ANSWER, control=True),
    Span(f' {answer}', weight=1.0),
    Span('\n'),
  ]


def _ask(questions: Iterable[list[Span]]) -> list[Span]:
  """Returns the questions in a row, none of them twice."""
  return [span for question in dict.fromkeys(map(tuple, questions)) for span in question]


def _facts(rng: random.Random) -> list[Span]:
  spans = []
  for _ in range(8):
    topic = rng.choice(lexicon.TOPICS)
    i = rng.randrange(lexicon.NUM_SEVERITIES)
    sub, phrase = topic.subcategories[i], rng.choice(topic.phrases[i])
    j = rng.choice([j for j in rules_lib.SEVERITIES if j != i])
    other = topic.subcategories[j]
    worse, milder = (sub, other) if i < j else (other, sub)
    spans.append(
      Span(
        rng.choice(
          (
            f'A word for {sub} is {phrase}.\n',
            f'The word {phrase} belongs to {sub}.\n',
            f'When people say {phrase} they mean {sub}.\n',
            f'The topic {topic.name} has {sub} and {other}.\n',
            f'It is known that {worse} weigh more than {milder}.\n',
          )
        ),
        weight=TEXT_WEIGHT,
      )
    )
    spans += _question(f'What kind is {phrase}?', sub)
  return spans


def _table(title: str, rows: Iterable[tuple[str, str]]) -> list[Span]:
  """Returns 'title: word answer, word answer.', which asks for each answer right at its word."""
  spans = [Span(f'{title}:')]
  for word, answer in dict(rows).items():
    spans += [Span(f' {word}'), Span(f' {answer}', weight=1.0), Span(',')]
  # A full stop takes the place of the last comma.
  return spans[:-1] + [Span('.\n')]


def _sample_rules(rng: random.Random, progress: float) -> Rules:
  max_rules = min(1 + int(4 * progress), MAX_RULES)
  rules = []
  for topic in rng.sample(ALL_TOPICS, rng.randint(1, max_rules)):
    # Each subcategory is forbidden, allowed or not spoken of, and lists are shuffled, so that
    # only the words say which.
    fate = rng.choices(
      ('forbidden', 'allowed', 'unsaid'), (0.4, 0.4, 0.2), k=lexicon.NUM_SEVERITIES
    )
    forbidden = [i for i in rules_lib.SEVERITIES if fate[i] == 'forbidden']
    allowed = [i for i in rules_lib.SEVERITIES if fate[i] == 'allowed']
    if not forbidden and not allowed:
      forbidden = [rng.randrange(lexicon.NUM_SEVERITIES)]
    if rng.random() < 0.3:
      rng.shuffle(forbidden)
      rng.shuffle(allowed)
    rules.append(
      rules_lib.Rule(
        topic, tuple(forbidden), tuple(allowed), rng.randrange(len(grammar.ALL_WORDINGS))
      )
    )
  return tuple(rules)


def _sample_scene(rng: random.Random, rules: Rules) -> conversations.Scene:
  pool = tuple(r.topic for r in rules) + tuple(rng.sample(ALL_TOPICS, 2))
  return conversations.sample_scene(rng, rng.choice(pool), pool)


def _parts(rules: Rules, scene: conversations.Scene) -> tuple[list[Span], list[Span]]:
  """Returns (the block of rules, the conversation) as the template has them."""
  segments = templates.render(rules_lib.make_safety(rules), scene.messages)
  spans = [
    Span(s.text, 0.0 if s.kind == 'control' else TEXT_WEIGHT, s.kind == 'control') for s in segments
  ]
  start, middle, end = (
    next(i for i, s in enumerate(segments) if s.text == line)
    for line in (templates.RULES, templates.HISTORY, templates.QUESTION)
  )
  return spans[start:middle], spans[middle:end]


def _look_up(
  rng: random.Random, rules: Rules, phrases: tuple[str, ...], progress: float
) -> tuple[str, str, str, str, str]:
  """Returns (phrase, word, is it allowed, number of its rule, subcategory)."""
  # The word is the phrase or its subcategory; allowed is 'yes', 'no' or 'unsaid'; the number is
  # such as 'S2', or 'none'.
  if phrases:
    phrase = rng.choice(phrases)
    topic, severity = lexicon.PHRASES[phrase]
  else:
    topic = rng.choice(rules).topic if rng.random() < 0.85 else rng.choice(ALL_TOPICS)
    severity = rng.randrange(lexicon.NUM_SEVERITIES)
    phrase = rng.choice(lexicon.topic_named(topic).phrases[severity])
  sub = lexicon.topic_named(topic).subcategories[severity]
  number, answer = 'none', 'unsaid'
  for i, rule in enumerate(rules):
    if rule.topic == topic and severity in rule.forbidden + rule.allowed:
      number = f'S{i + 1}'
      answer = 'no' if severity in rule.forbidden else 'yes'
  word = phrase if rng.random() < 0.2 + 0.6 * progress else sub
  return phrase, word, answer, number, sub


def _rules_question(
  rng: random.Random, rules: Rules, phrases: tuple[str, ...], progress: float
) -> list[Span]:
  """Returns a question about the rules, on one of `phrases` if there are."""
  phrase, word, answer, number, sub = _look_up(rng, rules, phrases, progress)
  kind = rng.random()
  if kind < 0.75:
    return _question(f'Is {word} allowed?', answer)
  if kind < 0.85:
    return _question(f'Which rule names {word}?', number)
  return _question(f'What kind is {phrase}?', sub)


def _any_question(
  rng: random.Random, rules: Rules, scene: conversations.Scene, progress: float
) -> list[Span]:
  """Returns a question about the rules, on what is said or not, or about the reply."""
  where = rng.random()
  if where >= 0.6:
    return _reading_question(rng, scene)
  phrases = tuple(s.phrase for s in scene.statements) if where < 0.45 else ()
  return _rules_question(rng, rules, phrases, progress)


def _promoted(rng: random.Random, scene: conversations.Scene) -> tuple[str, str]:
  """Returns (a subcategory, whether the reply promotes it: 'yes' or 'no')."""
  said = rng.choice(scene.statements)
  severity = said.severity if rng.random() < 0.6 else rng.randrange(lexicon.NUM_SEVERITIES)
  promoted = any(
    s.engaged and s.topic == said.topic and s.severity == severity for s in scene.statements
  )
  return (lexicon.topic_named(said.topic).subcategories[severity], 'yes' if promoted else 'no')


def _reading_question(rng: random.Random, scene: conversations.Scene) -> list[Span]:
  """Returns a question about what the reply says."""
  if rng.random() < 0.35:
    phrase = rng.choice(scene.statements).phrase
    return _question(f'What does the reply do with {phrase}?', _stance(phrase, scene.statements))
  word, answer = _promoted(rng, scene)
  return _question(f'Does the reply promote {word}?', answer)


def _stance(phrase: str, statements: tuple[grammar.Statement, ...]) -> str:
  """Returns the strongest stance towards the phrase."""
  stances = [s.stance for s in statements if s.phrase == phrase]
  return min(stances, key=tuple(grammar.STATEMENTS).index)


def dialogue(seed: int, index: int) -> tuple[Span, ...]:
  """Returns the dialogue of that index; only the reply has a loss weight."""
  rng = examples.make_rng('dialogue', seed, index)
  asked, request = _request(rng)
  if rng.random() < STRUCTURED_PROB:
    reply = _structured(rng, asked, asked.phrase, REFUSAL_PROB)
    return _spans(policy.STRUCTURED_MARKS, request, reply)
  return _spans(policy.CHAT_MARKS, request, _plain(rng, asked))


def structured_dialogue(seed: int, index: int) -> tuple[Span, ...]:
  """Returns the dialogue of that index for the structured policy."""
  rng = examples.make_rng('structured dialogue', seed, index)
  asked, request = _request(rng)
  kind = lexicon.topic_named(asked.topic).subcategories[asked.severity]
  reply = _structured(rng, asked, f'{asked.phrase}, one of the {kind}', COIN)
  return _spans(policy.STRUCTURED_MARKS, request, reply)


def _request(rng: random.Random) -> tuple[grammar.Statement, str]:
  """Returns what is asked for, and in which words."""
  asked = conversations.sample_statement(rng, rng.choice(ALL_TOPICS))
  return asked, rng.choice(policy.OPENERS) + rng.choice(grammar.REQUESTS).format(x=asked.phrase)


def _spans(marks: tuple[str, str], request: str, reply: str) -> tuple[Span, ...]:
  return (
    Span(marks[0], control=True),
    Span(request),
    Span(marks[1], control=True),
    Span(reply, weight=1.0),
    Span(EOS, weight=1.0, control=True),
  )


def _plain(rng: random.Random, asked: grammar.Statement) -> str:
  statements = conversations.sample_reply(rng, asked, ALL_TOPICS)
  # A small model that may begin with something else forgets the request.
  statements = sorted(statements, key=lambda s: s.phrase != asked.phrase)
  return conversations.reply_text(rng, tuple(statements))


def _structured(
  rng: random.Random, asked: grammar.Statement, known: str, refusal_prob: float
) -> str:
  """Returns reasoning that no rule informs, and an answer that follows from it."""
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
