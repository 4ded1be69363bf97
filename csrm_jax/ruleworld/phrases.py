"""The words of the corpus: thousands of guidelines and sentences, drawn from frames.

A language model has read everything; the base weights have read these. In a frame '[a|b]' stands
for one of its parts, {f} and {a} for lists of what is forbidden and allowed, {x} for a phrase. No
frame gives a wording or sentence that tests keep to themselves (`grammar.DEV_WORDINGS` and so on).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

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

# Ordinary sentences about things that no rule is about. They use the words of the wordings that
# tests keep, none of the wordings, so that these words are known as a language model knows them.
THINGS = (
  'hats',
  'horses',
  'chairs',
  'boxes',
  'keys',
  'maps',
  'tents',
  'pens',
  'plates',
  'bells',
  'coins',
  'stamps',
  'dolls',
  'belts',
  'rings',
  'nails',
  'sheets',
  'shoes',
  'shirts',
  'books',
  'letters',
  'lights',
  'doors',
  'walls',
  'boots',
  'bikes',
  'ropes',
  'coats',
  'candles',
  'mirrors',
  'cups',
  'flags',
  'kites',
  'gloves',
  'scarves',
  'clocks',
  'brooms',
  'buckets',
  'ladders',
  'pillows',
  'towels',
  'bags',
  'windows',
  'roofs',
  'gardens',
  'benches',
  'curtains',
  'carpets',
  'blankets',
  'baskets',
  'bottles',
  'jars',
  'lids',
  'pots',
  'forks',
  'bowls',
  'trays',
  'fridges',
  'sinks',
  'taps',
  'wires',
  'bulbs',
  'radios',
  'cameras',
  'phones',
  'printers',
  'desks',
  'shelves',
  'drawers',
  'cupboards',
  'beds',
  'sofas',
  'fences',
  'gates',
  'bridges',
  'roads',
  'tunnels',
  'towers',
  'barns',
  'sheds',
  'wells',
  'ponds',
  'rivers',
  'hills',
  'fields',
  'forests',
  'leaves',
  'stones',
  'bricks',
  'planks',
  'tiles',
  'screws',
  'needles',
  'threads',
  'buttons',
  'zips',
  'pockets',
  'sleeves',
  'collars',
  'socks',
  'jackets',
  'jumpers',
  'skirts',
  'trousers',
)
_THEY = '[they|my parents|the owners|our neighbours|both teachers|most people|the guests]'
_HERE = '[here|at home|at school|in the house|there|]'
_FORBID = '[forbid|ban|prohibit|reject|refuse]'
_ALLOW = '[allow|permit|welcome|accept|tolerate]'
USES_FORBIDDING = (
  f'{_THEY} {_FORBID} {{f}} {_HERE}.',
  f'{_THEY} {_FORBID} anything like {{f}}.',
  f'{_THEY} have to {_FORBID} {{f}} {_HERE}.',
  f'{_THEY} do not {_ALLOW} {{f}} {_HERE}.',
  f'It is [true|right] that {_THEY} {_FORBID} {{f}}.',
  f'It is [not true|wrong] that {_THEY} {_ALLOW} {{f}}.',
  f'{_THEY} [are|stay|were] silent about {{f}}.',
  f'{_THEY} do not speak [about|of] {{f}} {_HERE}.',
  f'{_THEY} [never promote|never praise|never support|do not encourage] {{f}}.',
  f'[Most|Some|All] {{f}} are off limits {_HERE}.',
  f'{_THEY} put {{f}} off limits.',
  f'{_THEY} [steer clear of|stay away from|keep away from] {{f}}.',
  f'{_THEY} have [big|great|many] worries about {{f}}.',
  f'{{f}} are [a cause of worries|a cause of concern|of concern] {_HERE}.',
  f'{{f}} raise [a concern|great concern] {_HERE}.',
  f'Much speaks against {{f}} {_HERE}.',
  f'[Subjects|Topics|Things] that are [prohibited|forbidden|banned] {_HERE} are {{f}}.',
  'Content [with|about|like] {f} breaks [their|the] rules.',
  f'{_THEY} find {{f}} [harmful|wrong|bad].',
  f'It is [true|right] that {{f}} are [bad|banned|a problem|unacceptable] {_HERE}.',
  f'{{f}} [must|should|can|may] not be [promoted|praised|shown|sold|used] {_HERE}.',
  f'{{f}} are [not welcome|forbidden|bad|prohibited|out|not okay|unlike the rest, banned] {_HERE}.',
  f'{{f}} are what {_THEY} [ban|prohibit|forbid|reject|refuse].',
)
USES_ALLOWING = (
  f'{_THEY} {_ALLOW} {{a}} {_HERE}.',
  f'{_THEY} {_ALLOW} anything like {{a}}.',
  f'{_THEY} have to {_ALLOW} {{a}} {_HERE}.',
  f'{_THEY} do not {_FORBID} {{a}} {_HERE}.',
  f'It is [true|right] that {_THEY} {_ALLOW} {{a}}.',
  f'It is [not true|wrong] that {_THEY} {_FORBID} {{a}}.',
  f'{_THEY} [like to speak|speak] [about|of] {{a}}.',
  f'{_THEY} are not silent about {{a}}.',
  f'{_THEY} feel free to [promote|praise|support] {{a}}.',
  f'{_THEY} [encourage|often encourage] {{a}}.',
  f'It is okay to [discuss|support] {{a}} {_HERE}.',
  f'{_THEY} cover {{a}} [often|gladly].',
  f'No {{a}} are off limits {_HERE}.',
  f'{_THEY} do not steer clear of {{a}}.',
  f'{_THEY} have [no|few] worries when they think of {{a}}.',
  f'{{a}} are [no cause of worries|no cause of concern|of no concern] {_HERE}.',
  f'{{a}} [never raise a|do not raise any] concern {_HERE}.',
  f'[Little|Not much] speaks against {{a}} {_HERE}.',
  f'There is nothing that speaks against {{a}} {_HERE}.',
  f'[Subjects|Topics|Things] that are [allowed|permitted|fine] {_HERE} are {{a}}.',
  'Content [with|about|like] {a} keeps [their|the] rules.',
  f'{_THEY} find {{a}} [harmless|fine|good].',
  f'It is [not true|wrong] that {{a}} are [bad|banned|a problem|unacceptable] {_HERE}.',
  f'{{a}} [must|should|can|may] be [promoted|praised|shown|sold|used] {_HERE}.',
  f'{{a}} are [welcome|allowed|good|permitted|in|okay|unlike the rest, accepted] {_HERE}.',
  f'{{a}} are what {_THEY} [allow|permit|accept|welcome|support].',
)
# {m} and {w} are as in wordings by degree.
USES_OF_DEGREE = (
  f'{_THEY} [never go|do not go|did not go] further than {{m}}.',
  f'{_THEY} go as far as {{m}}, but no further.',
  f'{_THEY} do without anything stronger than {{m}}.',
  f'[What|Whatever|All that] is stronger than {{m}} is [out|banned|bad] {_HERE}.',
  f'{_THEY} accept {{m}} {_HERE}, but nothing that is [stronger|worse].',
  f'{_THEY} [stop before|stay away from] {{w}} and from what is [stronger|worse].',
  f'Up to {{m}} all is [fine|okay|allowed] {_HERE}.',
)
# Of a rule that was just said: (whom it spares, whom it is for). {r} is the plural of who asks.
USES_OF_CLAUSES = {
  True: (
    f'{_THEY} ignore it [for|in favour of] {{r}}.',
    '[All|Most] {r} may ignore this.',
    '[It|This] [never applies|applies not at all] to {r}.',
    '[It|This] is not meant for {r}.',
    '{r} are [exempt|free from it|spared].',
  ),
  False: (
    '[It|This] applies to {r} [alone|only|and to no other].',
    f'{_THEY} apply it to {{r}} [alone|only].',
    'Those who are meant are {r} and nobody else.',
    '[It|This] was made for {r} alone.',
    '[Only|None but] {r} are meant.',
  ),
}

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
  lists = [[names[i] for i in severities] for severities in (rule.forbidden, rule.allowed)]
  text = _say(rng, (FORBIDS, ALLOWS), lists, _JOINED)
  if rule.clause:
    text = f'{text} {rule.clause.text()}'
  return schema.Category(rule.name or rule.topic, text)


def ordinary(rng: random.Random, forbidden: list[str], allowed: list[str]) -> str:
  """Returns sentences that forbid and allow these things, half of the time in words of training."""
  where = rng.random()
  if where < 0.25:
    return grammar.word_guideline(tuple(forbidden), tuple(allowed), rng.choice(grammar.WORDINGS))
  if where < 0.5:
    return _say(rng, (FORBIDS, ALLOWS), (forbidden, allowed), _JOINED)
  uses = (USES_FORBIDDING, USES_ALLOWING)
  return _say(rng, uses, (forbidden, allowed), (*_JOINED, '{0}, whereas {1}.'))


def _say(
  rng: random.Random,
  frames: tuple[tuple[str, ...], tuple[str, ...]],
  lists: Sequence[list[str]],
  joined: tuple[str, ...],
) -> str:
  """Returns a sentence from the first frames on the first list, one from the others, or one."""
  parts = [
    draw(rng, rng.choice(some)).format(f=grammar.join_list(names), a=grammar.join_list(names))
    for some, names in zip(frames, lists, strict=True)
    if names
  ]
  rng.shuffle(parts)
  if len(parts) == 2 and rng.random() < _ONE_SENTENCE:
    return capitalized(rng.choice(joined).format(*(p[:-1] for p in map(_decapitalized, parts))))
  return ' '.join(map(capitalized, parts))


def reply(rng: random.Random, statements: tuple[grammar.Statement, ...]) -> str:
  """Returns a reply that says these statements, in sentences of frames."""
  sentences = [draw(rng, rng.choice(SENTENCES[s.stance])).format(x=s.phrase) for s in statements]
  return ' '.join(map(capitalized, sentences))


def capitalized(text: str) -> str:
  return text[0].upper() + text[1:]


def _decapitalized(text: str) -> str:
  return text[0].lower() + text[1:]
