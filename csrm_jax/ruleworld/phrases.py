"""The words of the corpus: thousands of guidelines and sentences, drawn from frames.

A language model has read everything; the base weights have read these. In a frame '[a|b]' stands
for one of its parts, {f} and {a} for lists of what is forbidden and allowed, {x} for a phrase. No
frame gives a wording or sentence that tests keep to themselves (`grammar.DEV_WORDINGS` and so on).
"""

from __future__ import annotations

import random
import re

from csrm_jax.ruleworld import grammar, lexicon, rules as rules_lib
from csrm_jax.safety import schema

_DO = '[promote|explain|recommend|discuss|praise|support|mention|sell|teach|suggest|defend|show]'
_ON = '[advice on|help with|talk about|praise of|support for|tips on|news of|]'
_WE = '[We|The owners|Our rules|All of us|The authors]'
_THE_AGENT = '[The agent|A reply|An answer|Everyone|The helper]'
_AGENTS = '[Replies|Answers|Agents|Helpers]'
_BAD = '[forbidden|banned|wrong|bad|not okay|not allowed|not permitted|unacceptable|not fine]'
_GOOD = '[allowed|okay|fine|good|permitted|acceptable|right|not forbidden|not banned|not wrong]'
FORBIDS = (
  f'[Do not|Please do not|Do not ever] {_DO} {{f}}.',
  f'It is {_BAD} to {_DO} {{f}}.',
  f'{_WE} [ban|prohibit|reject|exclude|do not accept|do not permit|do not tolerate|refuse] '
  f'{_ON} {{f}}.',
  f'{_AGENTS} [must|should|may|can] not {_DO} {{f}}.',
  f'{_THE_AGENT} [must|should|has to] [avoid|refuse|reject|leave out|stay away from|keep away '
  f'from] {{f}}.',
  '[Forbidden|Banned|Not allowed|Not permitted|Unacceptable|Not okay|No|Prohibited|Refused]: {f}.',
  '{f} are [forbidden|banned|prohibited|not permitted|unacceptable|not okay|not welcome|bad|out].',
  f'[Advice on|Help with|Talk about|Praise of|Support for] {{f}} is {_BAD}.',
  f'[Nobody|No one|No agent] [may|can|should|must] {_DO} {{f}}.',
  'There is [a problem|trouble|something wrong] with {f}.',
  '[Keep|Leave] {f} out [of every reply|of it|].',
  'Say [nothing|no word] [on|of] {f}.',
  '[Anything|Everything|All] but {f} is [fine|okay|allowed|permitted].',
  '[Whoever|Anyone who] asks for {f} gets [no help|no answer|nothing].',
  f'{_WE} [object to|frown on|are tired of|have had enough of|do not want] {{f}}.',
  f'{_AGENTS} [that promote|in favour of|about] {{f}} [break|violate|are against] [this rule|'
  'the rules].',
  'Stay away from {f}.',
)
ALLOWS = (
  f'[You may|Please do|Go on and|You can] {_DO} {{a}}.',
  f'It is {_GOOD} to {_DO} {{a}}.',
  f'{_WE} [welcome|permit|accept|like|tolerate|do not ban|do not prohibit|do not mind] {_ON} '
  f'{{a}}.',
  f'{_AGENTS} [may|can|might] {_DO} {{a}}.',
  f'{_THE_AGENT} [may|can|is free to] [help with|include|deal with|turn to] {{a}}.',
  '[Allowed|Permitted|Fine|Acceptable|Not forbidden|Not banned|Yes|Welcome]: {a}.',
  '{a} are [allowed|permitted|fine|okay|acceptable|welcome|not forbidden|not banned|good|in].',
  f'[Advice on|Help with|Talk about|Praise of|Support for] {{a}} is {_GOOD}.',
  f'[Everybody|Anyone|Every agent] [may|can] {_DO} {{a}}.',
  'There is [no problem|no trouble|nothing wrong] with {a}.',
  'Leave {a} in [every reply|].',
  'Talk about {a} [as you like|freely|any time].',
  '[Whoever|Anyone who] asks for {a} gets [help|an answer].',
  f'{_WE} [do not object to|are happy with|are glad of|enjoy] {{a}}.',
  f'{_AGENTS} [that promote|in favour of|about] {{a}} [keep|are within|do not break|do not '
  'violate] [this rule|the rules].',
)
# One sentence: {0} and {1} are two of the above, without their full stops.
_JOINED = ('{0}, while {1}.', '{0}, but {1}.', 'Although {0}, {1}.', '{0}, and {1}.', '{0}; {1}.')
_ONE_SENTENCE = 0.25  # the share of guidelines that join two

_LATER = '[today|soon|now|at once|this evening|]'
SENTENCES = {
  'encourage': (
    '[You|Everyone|We all] [should|ought to|must|have to] [try|enjoy|taste|get|choose|have] '
    f'{{x}} {_LATER}.',
    'I [recommend|praise|love|suggest|advise] {x} [to everyone|to you|warmly|].',
    f'[Try|Enjoy|Choose|Get|Take|Have] {{x}} {_LATER}.',
    '{x} is [great|wonderful|the best|good for you|worth it|lovely|a good idea].',
    '[You|Your friends|All] will [love|enjoy|like] {x}.',
    '[Why not|Do|Come and] [try|enjoy|get] {x} [today|soon|now].',
    '[As for|When it comes to] {x}, [you should try it|just do it|it is great|I recommend it].',
    'If you [like|want] {x}, then [do it|try it|take it|enjoy it].',
  ),
  'describe': (
    '[Here is|This is|I will tell you] how {x} works.',
    'To [do|use|make|start] {x} you [need|take|prepare] [time|practice|a plan|tools|patience].',
    '[First|Then|At last] [prepare|take|mix|open|set up] {x} [with care|slowly|].',
    'The [steps|parts|details|basics] of {x} are [easy|simple|as follows|these].',
    'Let me [explain|describe|show] {x} [to you|step by step|].',
    'You [do|use|handle] {x} [like this|in three steps|with both hands].',
    '[As for|When it comes to] {x}, [here is how|this is the plan|these are the steps|it works '
    'like this].',
    '{x} [works|goes|begins] like this.',
  ),
  'mention': (
    '[A friend|My neighbour|Someone|The teacher|A guest] [talked|wrote|asked|heard|read] about '
    '{x} [yesterday|once|at school|].',
    'The word {x} [is short|was in the paper|has letters|is old].',
    'You [asked|wrote|said something] about {x}.',
    '[I saw|I read|They had] a [story|line|question|note] about {x} [somewhere|yesterday|].',
    '[As for|When it comes to] {x}, [I know the word|people ask about it|it was in the paper].',
    '[My friend|Someone|A child] [knows|said|wrote] the word {x}.',
  ),
  'decline': (
    'I [cannot|will not|must not|would rather not|do not] [help with|talk about|explain|'
    'recommend|discuss] {x}.',
    '[Sorry|I am sorry|No], [I cannot talk about|there is no help with|I do not explain] {x}.',
    '[You|Nobody|We] [should|must|may] [not|never] [try|use|do|take|touch] {x} [today|].',
    '[Forget|Avoid|Stay away from|Do not touch] {x} [today|please|].',
    '{x} is [not for you|a bad idea|nothing that I help with|no good].',
    '[As for|When it comes to] {x}, [I must say no|forget it|I cannot help|do not do it].',
    'Do not [ask|write to] me [for|about] {x}.',
    'I would [never|not] [recommend|suggest|praise] {x}.',
  ),
}


def draw(rng: random.Random, frame: str) -> str:
  """Returns the frame with one part for each '[a|b]', its first letter large, its spaces single."""
  text = re.sub(r'\[([^\]]*)\]', lambda match: rng.choice(match[1].split('|')), frame)
  return re.sub(r' +', ' ', text).replace(' .', '.')


def guideline(rng: random.Random, rule: rules_lib.Rule) -> schema.Category:
  """Returns the rule as a category, in words of frames."""
  names = lexicon.topic_named(rule.topic).subcategories
  parts = [
    draw(rng, rng.choice(frames)).format(**{key: grammar.join_list([names[i] for i in severities])})
    for frames, key, severities in ((FORBIDS, 'f', rule.forbidden), (ALLOWS, 'a', rule.allowed))
    if severities
  ]
  rng.shuffle(parts)
  if len(parts) == 2 and rng.random() < _ONE_SENTENCE:
    text = rng.choice(_JOINED).format(*(part[:-1] for part in map(_decapitalized, parts)))
  else:
    text = ' '.join(map(_capitalized, parts))
  if rule.clause:
    text = f'{text} {rule.clause.text()}'
  return schema.Category(rule.name or rule.topic, _capitalized(text))


def reply(rng: random.Random, statements: tuple[grammar.Statement, ...]) -> str:
  """Returns a reply that says these statements, in sentences of frames."""
  sentences = [draw(rng, rng.choice(SENTENCES[s.stance])).format(x=s.phrase) for s in statements]
  return ' '.join(map(_capitalized, sentences))


def _capitalized(text: str) -> str:
  return text[0].upper() + text[1:]


def _decapitalized(text: str) -> str:
  return text[0].lower() + text[1:]
