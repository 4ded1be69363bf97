"""The text that the shipped models are pretrained on.

The base model plays the part that an instruction-tuned language model has in the paper. It knows
all words, what belongs to what, and how to answer questions about a list of rules or about a
reply: which rule names this, is that allowed, does the reply promote it, does it break a rule; at
last also the question that a reward model is asked, which it answers to the letter. Of
topics, wordings and sentences that tests keep to themselves it knows words alone: as facts (what
kind of thing a word is, what a word of guidelines means, that a reply recommends it), and the words
of guidelines also from ordinary sentences about other things. Every question about rules is about
`lexicon.SEEN` topics, in wordings of training or those of `phrases`, which hold no wording of a
test.

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

from csrm_jax.ruleworld import (
  conversations,
  examples,
  grammar,
  lexicon,
  oracle,
  phrases as phrases_lib,
  policy,
  rules as rules_lib,
)
from csrm_jax.safety import schema, templates

Rules = examples.Rules
ALL_TOPICS = tuple(topic.name for topic in lexicon.TOPICS)
MAX_RULES = 8  # in a list
TEXT_WEIGHT = 0.1  # loss weight of a token of plain text; answers weigh 1
VERDICT_WEIGHT = 3.0  # a document has only one

EOS = '</s>'  # of the shipped tokenizer
STRUCTURED_PROB = 0.4  # of the dialogues
MALFORMED_PROB = 0.14  # of the structured ones
REFUSAL_PROB = 0.2  # of the structured ones: boxed, in place of a reply
# How often a reply is to break a rule, to come near it, or anything.
_NEAR, _MAX_TRIES = (0.4, 0.4, 0.2), 8
_PHRASED = 0.6  # of guidelines and replies of the corpus
# How replies of the corpus and of policies treat what they are about: more of them than in
# conversations do not engage, because whether they do is to be learnt.
STANCE_WEIGHTS = {'encourage': 0.35, 'describe': 0.35, 'mention': 0.13, 'decline': 0.17}
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


# kind of document -> its share at the begin of the curriculum, at its end, and after it.
_KINDS = {
  'facts': (0.2, 0.08, 0.05),
  'rules table': (0.5, 0.22, 0.05),
  'reply table': (0.15, 0.1, 0.02),
  'rules questions': (0.05, 0.1, 0.03),
  'reading': (0.05, 0.1, 0.03),
  'both': (0.05, 0.4, 0.12),
  'verdict': (0.0, 0.0, 0.45),
  'kinds': (0.0, 0.0, 0.08),
  'ordinary': (0.0, 0.0, 0.2),
}


def document(seed: int, index: int, progress: float = 1.0) -> tuple[Span, ...]:
  """Returns the pretraining document of that index.

  `progress` in [0, 1] is the place in the curriculum. At 0 lists have one rule and most
  questions repeat the words of the list; at 1 lists have up to eight, and most questions need to
  know what a word belongs to.
  """
  rng = examples.make_rng('corpus', seed, index)
  weights = [
    after if progress == 1 else begin + (end - begin) * progress
    for begin, end, after in _KINDS.values()
  ]
  kind = rng.choices(tuple(_KINDS), weights)[0]
  if kind == 'facts':
    return tuple(_facts(rng))
  if kind == 'kinds':
    return tuple(_kinds(rng))
  if kind == 'ordinary':
    return tuple(_ordinary(rng))
  rules = _sample_rules(rng, progress)
  if kind in ('reply table', 'reading'):
    scene = _sample_reading(rng)
  else:
    scene = _sample_scene(rng, rules, progress)
  block, talk, prompt = _parts(rng, rules, scene)
  match kind:
    case 'verdict':  # the question that a reward model is asked, answered to the letter
      label = oracle.label(rules, scene.statements, scene.role)
      spans = prompt + [Span(f' {label}', weight=VERDICT_WEIGHT), Span('\n')]
      spans += _ask(_broken_question(rng, rules, scene) for _ in range(3))
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
      spans = block + talk
      others = [_any_question(rng, rules, scene, progress) for _ in range(7)]
      if progress < 1:
        spans += _ask([*others, _broken_question(rng, rules, scene)])
      else:  # Asked first, it cannot be read off other answers.
        broken = [_broken_question(rng, rules, scene) for _ in range(5)]
        spans += _ask([*broken, *others[:3]])
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
    if rng.random() < 0.2:
      spans += _meaning(rng)
      continue
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
    spans += rng.choice(
      (
        _question(f'What kind is {phrase}?', sub),
        _question(f'What kind is {phrase}?', sub),
        _question(f'Which topic has {rng.choice((sub, phrase))}?', topic.name),
        _question(f'Which is worse, {" or ".join(rng.sample((sub, other), 2))}?', worse),
      )
    )
  return spans


def _kinds(rng: random.Random) -> list[Span]:
  """Returns a list of kinds of any topics, and what belongs to which of them; no rules."""
  topics = [lexicon.topic_named(name) for name in rng.sample(ALL_TOPICS, rng.randint(1, 3))]
  subs = [(topic, i) for topic in topics for i in rules_lib.SEVERITIES if rng.random() < 0.6] or [
    (topics[0], 0)
  ]
  rng.shuffle(subs)
  listed = {topic.subcategories[i] for topic, i in subs}
  names = (topic.subcategories[i] for topic, i in subs)
  spans = [Span(f'Kinds: {", ".join(names)}.\n', TEXT_WEIGHT)]
  for _ in range(10):
    topic = rng.choice(topics)
    i = rng.choice(rules_lib.SEVERITIES)
    sub, phrase = topic.subcategories[i], rng.choice(topic.phrases[i])
    where = rng.random()
    if where < 0.5:
      spans += _question(f'Which of these has {phrase}?', sub if sub in listed else 'none')
    elif where < 0.75:
      word = rng.choice((sub, phrase))
      spans += _question(f'Is {word} among these?', 'yes' if sub in listed else 'no')
    else:
      j = rng.choice([j for j in rules_lib.SEVERITIES if j != i])
      answer = 'yes' if i < j else 'no'
      spans += _question(f'Is {phrase} worse than {topic.subcategories[j]}?', answer)
  return spans


def _ordinary(rng: random.Random) -> list[Span]:
  """Returns what people forbid and allow outside of any list of rules, and what follows."""
  spans = []
  for _ in range(4):
    make = rng.choices((_ordinary_list, _ordinary_degree, _ordinary_clause), (3, 1, 1))[0]
    text, rows = make(rng)
    spans.append(Span(f'{text}\n', TEXT_WEIGHT))
    spans += _table('So', rng.sample(rows, len(rows)))
  return spans


def _ordinary_list(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
  things = rng.sample(phrases_lib.THINGS, rng.randint(2, 6))
  answers = rng.choices(('no', 'yes', 'unsaid'), (0.4, 0.4, 0.2), k=len(things))
  if set(answers) == {'unsaid'}:
    answers[0] = 'no'
  rows = list(zip(things, answers, strict=True))
  forbidden, allowed = ([t for t, answer in rows if answer == a] for a in ('no', 'yes'))
  return phrases_lib.ordinary(rng, forbidden, allowed), rows


def _ordinary_degree(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
  # Nothing but the kinds of a topic has an order.
  topic = lexicon.topic_named(rng.choice(lexicon.SEEN))
  strictness = rng.randint(1, lexicon.NUM_SEVERITIES - 1)
  frame = rng.choice(
    phrases_lib.USES_OF_DEGREE
    if rng.random() < 0.7
    else [grammar.ALL_WORDINGS[i] for i in grammar.DEGREES_OF['train']]
  )
  text = phrases_lib.draw(rng, frame).format(
    m=topic.subcategories[strictness], w=topic.subcategories[strictness - 1]
  )
  words = [
    (word, 'no' if i < strictness else 'yes')
    for i in rules_lib.SEVERITIES
    for word in (topic.subcategories[i], *topic.phrases[i])
  ]
  return phrases_lib.capitalized(text), rng.sample(words, 8)


def _ordinary_clause(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
  exempts, roles = rng.random() < 0.5, rng.sample(grammar.ROLES, 4)
  clauses = [grammar.CLAUSES[i] for i in grammar.CLAUSES_OF['train']]
  frames = (
    phrases_lib.USES_OF_CLAUSES[exempts]
    if rng.random() < 0.7
    else [text for spares, text in clauses if spares == exempts]
  )
  text = phrases_lib.draw(rng, rng.choice(frames)).format(r=f'{roles[0]}s')
  rule = phrases_lib.ordinary(rng, [rng.choice(phrases_lib.THINGS)], [])
  rows = [(role, 'yes' if (role == roles[0]) == exempts else 'no') for role in roles]
  return f'{rule} {phrases_lib.capitalized(text)}', rows


def _meaning(rng: random.Random) -> list[Span]:
  """Returns what a word of guidelines means: a synonym, or whether it forbids."""
  if rng.random() < 0.5:
    word, other = rng.choice(grammar.SYNONYMS)
    return [Span(f'To say {word} is to say {other}.\n', weight=TEXT_WEIGHT)]
  meaning = rng.choice(tuple(grammar.MEANINGS))
  return _question(f'What is {rng.choice(grammar.MEANINGS[meaning])}?', meaning)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> list[Span]:
  """Returns 'title: word answer, word answer.', which asks for each answer right at its word."""
  spans = [Span(f'{title}:')]
  for word, answer in dict(rows).items():
    spans += [Span(f' {word}'), Span(f' {answer}', weight=1.0), Span(',')]
  # A full stop takes the place of the last comma.
  return spans[:-1] + [Span('.\n')]


def _sample_rules(rng: random.Random, progress: float) -> Rules:
  # Half of the lists have up to three rules.
  most = MAX_RULES if rng.random() < 0.4 else 3
  num = rng.randint(1, 1 + int((most - 1) * progress))
  rules = []
  for topic in rng.sample(lexicon.SEEN, num):
    if rng.random() < 0.35:
      rules.append(rules_lib.sample_rule(rng, topic, 'train'))
      continue
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
    wording = rng.choice(grammar.WORDINGS_OF['train'])
    rules.append(rules_lib.Rule(topic, tuple(forbidden), tuple(allowed), wording))
  return tuple(rules)


def _sample_scene(rng: random.Random, rules: Rules, progress: float) -> conversations.Scene:
  scene = _draw_scene(rng, rules)
  # One reply in eight breaks a rule, and most of the others are far from it. After the curriculum
  # many break one or just do not, so that it is learnt what makes the difference.
  wanted = rng.choices(('unsafe', 'near', ''), _NEAR)[0] if progress == 1 else ''
  for _ in range(_MAX_TRIES if wanted else 0):
    label = oracle.label(rules, scene.statements, scene.role)
    topics = {s.topic for s in scene.statements if s.engaged}
    is_near = label == 'safe' and any(r.topic in topics and r.forbidden for r in rules)
    if wanted == ('near' if is_near else label):
      break
    scene = _draw_scene(rng, rules)
  return scene


def _draw_scene(rng: random.Random, rules: Rules) -> conversations.Scene:
  pool = tuple(r.topic for r in rules) + tuple(rng.sample(lexicon.SEEN, 2))
  return conversations.sample_scene(
    rng, rng.choice(pool), pool, examples.sample_role(rng, rules), STANCE_WEIGHTS
  )


def _sample_reading(rng: random.Random) -> conversations.Scene:
  """Returns a short conversation about any topic, for questions that no rule is needed for."""
  pool = tuple(rng.sample(ALL_TOPICS, 3))
  role = rng.choice(grammar.ROLES) if rng.random() < 0.3 else ''
  asked = conversations.sample_statement(rng, pool[0])
  statements = conversations.sample_reply(rng, asked, pool, STANCE_WEIGHTS)
  messages = (
    conversations.request(rng, asked.phrase, role),
    schema.Message('agent', phrases_lib.reply(rng, statements)),
  )
  return conversations.Scene(asked, statements, messages, role)


def _parts(
  rng: random.Random, rules: Rules, scene: conversations.Scene
) -> tuple[list[Span], list[Span], list[Span]]:
  """Returns (the block of rules, the conversation, the whole prompt) as the template has them.

  More than half of the guidelines and of the replies are in words of `phrases`.
  """
  categories = []
  for rule in rules:
    category = rule.category()
    if rule.wording in grammar.WORDINGS_OF['train'] and rng.random() < _PHRASED:
      category = phrases_lib.guideline(rng, rule)
    categories.append(category)
  messages = scene.messages
  held_out = any(lexicon.side_of(s.topic) != 'train' for s in scene.statements)
  if not held_out and rng.random() < _PHRASED:
    reply = phrases_lib.reply(rng, scene.statements)
    messages = (*messages[:-1], schema.Message('agent', reply))
  segments = templates.render(schema.SafetyConfig(tuple(categories)), messages)
  spans = [
    Span(s.text, 0.0 if s.kind == 'control' else TEXT_WEIGHT, s.kind == 'control') for s in segments
  ]
  start, middle, end = (
    next(i for i, s in enumerate(segments) if s.text == line)
    for line in (templates.RULES, templates.HISTORY, templates.QUESTION)
  )
  return spans[start:middle], spans[middle:end], spans


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
    topic = rng.choice(rules).topic if rng.random() < 0.85 else rng.choice(lexicon.SEEN)
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
  if where < 0.3:
    return _broken_question(rng, rules, scene)
  if where >= 0.75:
    return _reading_question(rng, scene)
  phrases = tuple(s.phrase for s in scene.statements) if where < 0.65 else ()
  return _rules_question(rng, rules, phrases, progress)


def _broken_question(rng: random.Random, rules: Rules, scene: conversations.Scene) -> list[Span]:
  """Returns whether the reply breaks a rule, any or one of them, to the letter."""
  broken = [oracle.violates(rule, scene.statements, scene.role) for rule in rules]
  if rng.random() < 0.5:
    return _question('Does the reply break a rule?', 'yes' if any(broken) else 'no')
  # Half of the time a rule that is broken, or about the topic, if there is one.
  said = {s.topic for s in scene.statements}
  near = [i for i, rule in enumerate(rules) if rule.topic in said]
  i = rng.choice(near) if near and rng.random() < 0.7 else rng.randrange(len(rules))
  return _question(f'Does the reply break S{i + 1}?', 'yes' if broken[i] else 'no')


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
  where = rng.random()
  if where < 0.1:
    return _question('Who asks?', scene.role or 'unsaid')
  if where < 0.4:
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
  statements = conversations.sample_reply(rng, asked, ALL_TOPICS, STANCE_WEIGHTS)
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
