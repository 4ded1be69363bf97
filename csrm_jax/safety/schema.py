"""Safety configurations, conversations, examples and samples, checked on entry.

A safety configuration is a file (YAML, or JSON of the same form):

  name: bank_support            # optional
  categories:
  - name: Credentials
    guideline: The agent never asks for a password or a one-time code ...

An example is one line of a JSONL file. `label` is "safe", "unsafe" or null. `safety` is an
object as in a configuration file, or the path of such a file. `label` and all keys after it are
optional:

  {"id": "1", "safety": {"categories": [{"name": ..., "guideline": ...}]},
   "conversation": [{"role": "user", "content": "..."},
                    {"role": "agent", "content": "..."}],
   "label": "unsafe", "violated": ["Credentials"],
   "plus": {"name": ..., "guideline": ...}, "minus": null,
   "probability": 0.9, "source": "...", "rule_set": "...",
   "weight": 2, "ratings": {"helpfulness": 3.5}}

A pair is {"id", "kind", "safer": example, "other": example}, and optionally "weight", "strength"
(how much safer: 0 is a tie) and "soft" (the probability that the order is right).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.core import checks, files
from csrm_jax.core.checks import show

LABELS = ('safe', 'unsafe')
ROLES = ('system', 'user', 'agent', 'tool')
# What others call the roles.
ROLE_WORDS = {
  **{role: role for role in ROLES},
  **dict.fromkeys(('human', 'prompter'), 'user'),
  **dict.fromkeys(('assistant', 'gpt', 'chatgpt', 'model', 'bot', 'ai'), 'agent'),
  **dict.fromkeys(('function_call',), 'agent'),
  **dict.fromkeys(('function', 'observation', 'tool_response', 'ipython'), 'tool'),
  'developer': 'system',
}
PAIR_KINDS = ('strictness', 'preference')
PROMPT_LABELS = ('', 'harmful', 'benign')
REQUIRED_COLUMNS = ('id', 'safety', 'conversation')
EXAMPLE_COLUMNS = (
  *REQUIRED_COLUMNS,
  *('label', 'violated', 'plus', 'minus', 'probability', 'source', 'rule_set'),
  *('weight', 'ratings'),
)
PAIR_COLUMNS = ('id', 'kind', 'safer', 'other')
# What a pair may have beside; and what an example may have of the same sort.
PAIR_SIDE = ('weight', 'strength', 'soft')
SIDE_COLUMNS = ('weight', 'ratings', 'strength', 'soft')


# --- Rules -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Category:
  """One rule: a name, and a text that says what is allowed and forbidden."""

  name: str
  guideline: str

  def __post_init__(self):
    checks.check_text(self.name, 'category name')
    checks.check_text(self.guideline, f'guideline of category {show(self.name)}')

  def to_dict(self) -> dict[str, str]:
    """Returns the form that `parse_category` reads."""
    return {'name': self.name, 'guideline': self.guideline}


@dataclasses.dataclass(frozen=True)
class SafetyConfig:
  """An ordered list of categories with distinct names; prompts show them in order."""

  categories: tuple[Category, ...]
  name: str = ''

  def __post_init__(self):
    # Frozen, but a list is accepted: a tuple can be hashed and cannot change.
    object.__setattr__(self, 'categories', tuple(self.categories))
    checks.check_text(self.name, 'configuration name', empty_ok=True)
    if not self.categories:
      raise ValueError(
        'the category list is empty; a safety configuration needs at least one category'
      )
    for category in self.categories:
      if not isinstance(category, Category):
        raise ValueError(f'{show(category)} stands among the categories; build a Category')
    second = _find_duplicate(self.categories)
    if second is not None:
      raise ValueError(
        f'the category name {show(self.categories[second].name)} is used twice (case and spaces do'
        ' not count); rename one or merge their guidelines'
      )

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(category.name for category in self.categories)

  def digest(self) -> str:
    """Returns the sha256 (hex) of the ordered categories, without `name`."""
    return files.digest([[c.name, c.guideline] for c in self.categories], separators=(',', ':'))

  def to_dict(self) -> dict[str, Any]:
    """Returns the form that `parse_safety` reads."""
    out: dict[str, Any] = {'name': self.name} if self.name else {}
    return out | {'categories': [c.to_dict() for c in self.categories]}


def load_safety(path: str | os.PathLike) -> SafetyConfig:
  """Returns the safety configuration in a .yaml, .yml, .json or .md file.

  Files that people write for other purposes are read too: see `parse_safety`; in Markdown each
  heading is a rule. What is not used is named on stderr.

  Raises:
    ValueError: One line with the file, the line where it is known, the value and the fix.
  """
  where, path = os.fspath(path), files.locate(path)
  suffix = path.suffix.lower()
  if suffix == '.json':
    return parse_safety(files.read_json(path), where)
  if suffix in ('.md', '.markdown'):
    obj, lines = _parse_markdown(files.read_text(path), where)
    safety = parse_safety(obj, where, lines)
    checks.note(f'{where}: {len(lines)} rules: {", ".join(safety.names)}')
    return safety
  if suffix not in ('.yaml', '.yml'):
    raise ValueError(
      f'{where}: a safety configuration is a .yaml, .yml, .json or .md file; rename it'
    )
  obj, lines = files.load_yaml(files.read_text(path), where, _LISTS)
  return parse_safety(obj, where, lines)


# What others call the list of rules, a rule's name, and its text; the first that is there counts.
_LISTS = ('categories', 'rules', 'policies', 'guidelines', 'policy')
_NAMES = ('name', 'title', 'category', 'heading', 'id')
_TEXTS = ('guideline', 'guidelines', 'description', 'definition', 'text', 'rule', 'policy')
# These say something about a file of rules, and are no rules.
_ABOUT = (
  *('name', 'title', 'version', 'id', 'date', 'updated', 'owner', 'author', 'authors', 'metadata'),
  *('language', 'locale', 'description', 'status', 'schema', 'schema_version'),
)
_BULLET = re.compile(r'^\s*(?:[-*+>]|\d+[.)])\s+')
_HEADING = re.compile(r'^(#{1,6})\s+(?:\d+(?:\.\d+)*[.)]?\s+)?(.*?)\s*#*\s*$')


def parse_safety(obj: Any, where: str, lines: Sequence[int] = ()) -> SafetyConfig:
  """Returns the safety configuration in an object that was read from a file.

  Besides {"categories": [{"name", "guideline"}]} it may be a list or a mapping of guidelines, or
  have other words for these keys ("rules", "title", "description"). Keys that are not used, such as
  ids, severities and examples, are named on stderr. Errors begin with `where`, and with the line of
  the category where `lines` has it.
  """
  key, items = _find_rules(obj)
  if key is None:
    found = 'nothing' if not obj else show(obj)
    if obj and isinstance(obj, Mapping):
      found = ', '.join(map(str, obj))[:200]
    raise ValueError(
      f'{where}: no key "categories" (found: {found}); list the rules under "categories", each with'
      ' "name" and "guideline"'
    )
  # YAML reads a key without entries as null; the error is then that of an empty list.
  items = items or []
  if isinstance(items, Mapping):
    named = list(items.items())
  elif isinstance(items, (list, tuple)):
    named = [(None, item) for item in items]
  else:
    raise ValueError(
      f'{where}: "{key}" is {show(items)}; write a list of entries with "name" and "guideline"'
    )
  if len(lines) != len(named):
    lines = ()
  places = [f'{where}:{line}' for line in lines] or [where] * len(named)
  place, unused = where, {}
  try:
    categories = []
    for i, (name, item) in enumerate(named):
      place = places[i]
      categories.append(_parse_rule(name, item, i + 1, unused))
    second = _find_duplicate(categories)
    # SafetyConfig checks this too, but cannot name the line.
    place = where if second is None else places[second]
    about = obj if isinstance(obj, Mapping) and key else {}
    safety = SafetyConfig(tuple(categories), about.get('name', about.get('title', '')))
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from None
  unused |= dict.fromkeys(k for k in about if k not in (key, 'name', 'title'))
  if unused:
    checks.note(f'{where}: not used: {", ".join(map(str, unused))}')
  return safety


def _find_rules(obj: Any) -> tuple[str | None, Any]:
  """Returns (key, entries); the key is '' where the object itself has the entries."""
  if isinstance(obj, (list, tuple)):
    return '', obj
  if not isinstance(obj, Mapping):
    return None, None
  for key in _LISTS:
    if key in obj:
      return key, obj[key]
  rules = {name: text for name, text in obj.items() if str(name).lower() not in _ABOUT}
  if rules and all(isinstance(text, str) or _text_key(text) for text in rules.values()):
    return '', rules
  return None, None


def _text_key(item: Any) -> str | None:
  return next((k for k in _TEXTS if k in item), None) if isinstance(item, Mapping) else None


def _parse_rule(name: Any, item: Any, number: int, unused: dict[str, None]) -> Category:
  """Returns the category in an entry of a list, or of a mapping that names it."""
  what = f'category {number}'
  if not isinstance(item, Mapping):
    if not isinstance(item, (str, list)):
      raise ValueError(f'{what} is {show(item)}; write an object with "name" and "guideline"')
    name, text = f'Rule {number}' if name is None else name, item
  else:
    keys = [k for k in _TEXTS if k in item]
    if len(keys) > 1 and keys[:2] == ['guideline', 'guidelines']:
      raise ValueError(f"{what} has both 'guideline' and 'guidelines'; keep one")
    if not keys:
      raise ValueError(f'{what} has no "guideline" (found: {", ".join(map(str, item))}); add it')
    named = [k for k in _NAMES if k in item]
    if name is None and not named:
      raise ValueError(f'{what} has no "name"; add it')
    text, used = item[keys[0]], [keys[0]]
    if name is None:
      name = item[named[0]]
      used.append(named[0])
    unused |= dict.fromkeys(k for k in item if k not in used)
  try:
    return Category(name, _join_texts(text))
  except ValueError as error:
    raise ValueError(f'{what}: {error}') from None


def _join_texts(value: Any) -> Any:
  """Returns a list or a mapping of texts as one; anything else as it is."""
  if isinstance(value, Mapping):
    value = [f'{name}: {_join_texts(text)}' for name, text in value.items()]
  if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
    return ' '.join(text.strip() for text in value)
  return value


def _parse_markdown(text: str, where: str) -> tuple[Any, list[int]]:
  """Returns (an object for parse_safety, the lines of its categories) of headings with text."""
  blocks, fenced = [], False  # [level, title, line, lines of text]
  for number, line in enumerate(text.splitlines(), start=1):
    fenced ^= line.lstrip().startswith('```')
    heading = None if fenced else _HEADING.match(line)
    if heading:
      blocks.append((len(heading[1]), heading[2].replace('**', ''), number, []))
    elif blocks:
      blocks[-1][3].append(_BULLET.sub('', line).replace('**', '').strip())
  if not blocks:
    raise ValueError(f'{where}: no headings; write each rule as "## Name" with its text below')
  levels = [level for level, *_ in blocks]
  # Rules are the headings of the first level that has several; those below are parts of rules.
  level = next((n for n in sorted(set(levels)) if levels.count(n) > 1), max(levels))
  rules, lines, unused = [], [], {}
  title = next((name for n, name, *_ in blocks if n < level), '')
  for n, name, line, body in blocks:
    words = ' '.join(' '.join(body).split())
    if n < level:
      unused |= {f'the text below {name!r}': None} if words else {}
    elif n == level:
      rules.append({'name': name, 'guideline': words})
      lines.append(line)
    elif rules:
      more = f'{name}: {words}' if words else f'{name}.'
      rules[-1]['guideline'] = f'{rules[-1]["guideline"]} {more}'.strip()
  if unused:
    checks.note(f'{where}: not used: {", ".join(unused)}')
  return {'name': title, 'categories': rules}, lines


def parse_category(obj: Any, what: str) -> Category:
  """Returns the category in {"name": text, "guideline": text}; errors start with `what`."""
  if not isinstance(obj, Mapping):
    raise ValueError(f'{what} is {show(obj)}; write an object with "name" and "guideline"')
  for key in ('name', 'guideline'):
    if key not in obj:
      raise ValueError(f'{what} has no "{key}"; add it')
  for key in obj:
    if key not in ('name', 'guideline'):
      raise ValueError(
        f'{what} has the unknown key {show(key)}; only "name" and "guideline" are read'
      )
  try:
    return Category(obj['name'], obj['guideline'])
  except ValueError as error:
    raise ValueError(f'{what}: {error}') from None


def _find_duplicate(categories: Sequence[Category]) -> int | None:
  """Returns the index of the first category whose name is taken already."""
  seen = set()
  for i, category in enumerate(categories):
    # The prompt collapses white space, so names that differ only there would look alike. Names that
    # differ only in case would confuse a reader.
    key = ' '.join(category.name.split()).casefold()
    if key in seen:
      return i
    seen.add(key)
  return None


# --- Conversations ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
  """One turn of a conversation; role is one of ROLES. 'tool' gives what a tool returned."""

  role: str
  content: str

  def __post_init__(self):
    checks.lookup(self.role, ROLES, 'role')
    checks.check_text(self.content, 'message content', empty_ok=True)

  def to_dict(self) -> dict[str, str]:
    return {'role': self.role, 'content': self.content}


def check_conversation(conversation: Sequence[Message]) -> None:
  """Checks that the conversation ends with an agent message to judge."""
  if not conversation:
    raise ValueError(
      'the conversation is empty; it needs at least the agent message that is judged'
    )
  if conversation[-1].role != 'agent':
    raise ValueError(
      f'the conversation ends with role {show(conversation[-1].role)}; end it with the agent'
      ' message that is judged'
    )


def parse_conversation(obj: Any) -> tuple[Message, ...]:
  """Returns the messages in [{"role": ..., "content": ...}, ...].

  The words of chat APIs are understood: role "assistant", content in parts of text, tool calls,
  which become text of the agent's; and "from" and "value" instead of "role" and "content".
  """
  if not isinstance(obj, (list, tuple)):
    raise ValueError(
      f'"conversation" is {show(obj)}; write a list of messages with "role" and "content"'
    )
  messages = []
  for i, item in enumerate(obj):
    try:
      messages.append(Message(role_of([item]), _content(item)))
    except ValueError as error:
      raise ValueError(f'message {i + 1}: {error}') from None
  return tuple(messages)


def role_of(conversation: Any) -> Any:
  """Returns the role of the first message, in our words where they are known."""
  item = conversation[0] if conversation else None
  role = item.get('role', item.get('from')) if isinstance(item, Mapping) else None
  return ROLE_WORDS.get(role.lower(), role) if isinstance(role, str) else role


def _content(item: Any) -> Any:
  """Returns a message's text; what cannot be read as text is an error."""
  keys = set(item) if isinstance(item, Mapping) else set()
  if not keys & {'role', 'from'} or not keys & {'content', 'value', 'tool_calls', 'refusal'}:
    raise ValueError(f'it is {show(item)}; write an object with "role" and "content"')
  content = item.get('content', item.get('value'))
  if isinstance(content, (list, tuple)):
    content = '\n'.join(_part(part) for part in content)
  if content is None and item.get('refusal'):
    content = item['refusal']
  calls = item.get('tool_calls')
  if not calls:
    return content
  if not isinstance(calls, (list, tuple)):
    raise ValueError(f'"tool_calls" is {show(calls)}; write a list')
  if content is not None and not isinstance(content, str):
    return content  # `Message` says what is wrong.
  texts = [_call(call) for call in calls]
  return '\n'.join(texts if content in (None, '') else [content, *texts])


def _part(part: Any) -> str:
  if isinstance(part, str):
    return part
  kind = part.get('type') if isinstance(part, Mapping) else None
  text = part.get('text') if kind in ('text', 'input_text', 'output_text') else None
  if not isinstance(text, str):
    raise ValueError(
      f'a part of its content is of type {show(kind)}, which has no place here; write in text what'
      ' it shows, or remove the row'
    )
  return text


def _call(call: Any) -> str:
  call = call.get('function', call) if isinstance(call, Mapping) else call
  if not isinstance(call, Mapping) or not isinstance(call.get('name'), str):
    raise ValueError(f'a tool call is {show(call)}; write an object with "name" and "arguments"')
  arguments = call.get('arguments', '')
  if not isinstance(arguments, str):
    arguments = json.dumps(arguments, ensure_ascii=False)
  return f'[calls {call["name"]}({arguments})]'


# --- Examples and pairs ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
  """One judged response: rules, a conversation, and what is known about them."""

  id: str
  safety: SafetyConfig
  conversation: tuple[Message, ...]  # ends with the agent message that is judged
  label: str | None = None  # 'safe', 'unsafe', or None if nobody labelled it
  # The categories under which it was labelled unsafe; empty if none or if they are unknown.
  violated: tuple[str, ...] = ()
  plus: Category | None = None  # outside `safety`; it would make the response unsafe
  minus: Category | None = None  # outside `safety`; it would not change the label
  probability: float | None = None  # the true P(unsafe), where it is known
  source: str = ''  # the data set that it comes from
  rule_set: str = ''  # the group of rules under which reports show it
  weight: float = 1.0  # what it counts in training
  # (name, number) of what else people said of it, sorted; given as a mapping. Those that depend on
  # the rules hold for these rules.
  ratings: tuple[tuple[str, float], ...] = ()

  def __post_init__(self):
    object.__setattr__(self, 'ratings', _parse_ratings(self.ratings))
    check_amount(self.weight, 'weight')
    object.__setattr__(self, 'conversation', tuple(self.conversation))
    object.__setattr__(self, 'violated', tuple(self.violated))
    check_conversation(self.conversation)
    if self.label is not None and self.label not in LABELS:
      raise ValueError(f'unknown label {show(self.label)}; use "safe", "unsafe" or null')
    names = self.safety.names
    for name in self.violated:
      if name not in names:
        raise ValueError(
          f'violated category {show(name)} is not in the safety configuration'
          f'{checks.hint(name, names)}; name one of its categories'
        )
    if self.violated and self.label == 'safe':
      raise ValueError(
        f'the label is "safe" but "violated" names {show(self.violated[0])}; empty "violated" or'
        ' correct the label'
      )
    p = self.probability
    is_number = isinstance(p, (int, float)) and not isinstance(p, bool)
    if p is not None and not (is_number and 0 <= p <= 1):
      raise ValueError(f'probability is {show(p)}; it is P(unsafe), a number from 0 to 1')

  @staticmethod
  def from_dict(
    obj: Any,
    where: str,
    *,
    safety: SafetyConfig | None = None,
    root: str | os.PathLike = '.',
    required: Sequence[str] = REQUIRED_COLUMNS,
  ) -> Example:
    """Returns the example in one JSONL row.

    Unknown columns are ignored, except near misspellings of known ones.

    Args:
      safety: The rules for a row without its own.
      root: The folder that a path in the row's `safety` is relative to.
      required: Columns that must be there; add 'label' for training.

    Raises:
      ValueError: One line with `where`, the value and the fix.
    """
    if safety is not None:
      required = [column for column in required if column != 'safety']
    checks.check_columns(obj, where, EXAMPLE_COLUMNS, required)
    try:
      return Example(
        id=_parse_id(obj.get('id', where)),
        safety=_parse_rules(obj.get('safety'), safety, root),
        conversation=parse_conversation(obj.get('conversation')),
        label=obj.get('label'),
        violated=_parse_names(obj.get('violated')),
        plus=_parse_optional_category(obj.get('plus'), 'plus'),
        minus=_parse_optional_category(obj.get('minus'), 'minus'),
        probability=obj.get('probability'),
        source=_parse_word(obj.get('source'), 'source'),
        rule_set=_parse_word(obj.get('rule_set'), 'rule_set'),
        **{k: obj[k] for k in ('weight', 'ratings') if obj.get(k) is not None},
      )
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None

  def to_dict(self) -> dict[str, Any]:
    """Returns the JSONL row that `from_dict` reads."""
    row = dict(vars(self), ratings=dict(self.ratings))
    # What is not there is not written: rows of data that has none stay as they were.
    row = {k: v for k, v in row.items() if (k, v) not in (('weight', 1), ('ratings', {}))}
    return row | {
      'safety': self.safety.to_dict(),
      'conversation': [message.to_dict() for message in self.conversation],
      'violated': list(self.violated),
      'plus': self.plus and self.plus.to_dict(),
      'minus': self.minus and self.minus.to_dict(),
    }


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two examples of which `safer` should score higher.

  In a 'strictness' pair one conversation stands under two rule sets, and `safer` has the more
  lenient one. In a 'preference' pair the rules are the same, and `safer` has the safer response.
  """

  id: str
  safer: Example
  other: Example
  kind: str
  weight: float = 1.0  # what it counts in training
  # How much safer: 0 for a tie, else in the annotators' steps (1 to 3) or in nats; None if unknown.
  strength: float | None = None
  soft: float = 1.0  # the probability that the order is right

  def __post_init__(self):
    if self.kind not in PAIR_KINDS:
      raise ValueError(f'unknown pair kind {show(self.kind)}; use "strictness" or "preference"')
    check_amount(self.weight, 'weight')
    check_amount(0.0 if self.strength is None else self.strength, 'strength')
    check_amount(self.soft, 'soft', 1.0)

  @property
  def is_tie(self) -> bool:
    """Whether neither side is safer."""
    return self.strength == 0

  @staticmethod
  def from_dict(
    obj: Any, where: str, *, safety: SafetyConfig | None = None, root: str | os.PathLike = '.'
  ) -> Pair:
    """Returns the pair in one JSONL row; see `Example.from_dict`."""
    checks.check_columns(obj, where, (*PAIR_COLUMNS, *PAIR_SIDE), PAIR_COLUMNS)
    sides = {
      side: Example.from_dict(
        obj[side], f'{where}: {side}', safety=safety, root=root, required=('safety', 'conversation')
      )
      for side in ('safer', 'other')
    }
    try:
      known = {name: obj[name] for name in PAIR_SIDE if obj.get(name) is not None}
      return Pair(id=_parse_id(obj['id']), kind=obj['kind'], **sides, **known)
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None

  def to_dict(self) -> dict[str, Any]:
    """Returns the JSONL row that `from_dict` reads."""
    sides = {'safer': self.safer.to_dict(), 'other': self.other.to_dict()}
    known = {name: getattr(self, name) for name in PAIR_SIDE}
    absent = (('weight', 1), ('strength', None), ('soft', 1))
    return {'id': self.id, 'kind': self.kind, **sides} | dict(
      item for item in known.items() if item not in absent
    )


def _parse_rules(obj: Any, default: SafetyConfig | None, root: str | os.PathLike) -> SafetyConfig:
  if isinstance(obj, str):
    # Data of others must not make a reader open other files.
    if os.path.isabs(obj) or '..' in pathlib.PurePath(obj).parts:
      raise ValueError(
        f'safety: {show(obj)} leads out of the folder of the data; put the rules there, write them '
        'into the row, or give rules for all rows with the setting "safety"'
      )
    path = pathlib.Path(root) / obj
    try:
      return _load_cached(os.fspath(path), path.stat().st_mtime_ns)
    except OSError as error:
      raise ValueError(
        f'safety: {path} cannot be read ({error.strerror}); check the path'
      ) from None
  if obj is None and default is not None:
    return default
  return parse_safety(obj, 'safety')


@functools.lru_cache(maxsize=256)
def _load_cached(path: str, mtime_ns: int) -> SafetyConfig:
  # Many rows name one file. The key holds its time stamp, so that an edited file is read again.
  del mtime_ns
  return load_safety(path)


def _parse_id(value: Any) -> str:
  # A bool is an int in Python, but no id.
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  return checks.check_text(value, '"id"')


def check_amount(value: Any, what: str, most: float = math.inf) -> None:
  """Checks that a number is finite, and from 0 to `most`."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not (is_number and math.isfinite(value) and 0 <= value <= most):
    upto = '' if most == math.inf else f' up to {most:g}'
    raise ValueError(f'{what} is {show(value)}; give a number from 0{upto}')


def _parse_ratings(value: Any) -> tuple[tuple[str, float], ...]:
  items = value.items() if isinstance(value, Mapping) else value
  if not isinstance(value, (Mapping, tuple)):
    raise ValueError(f'"ratings" is {show(value)}; write an object of names and numbers')
  for name, number in items:
    checks.check_text(name, 'name of a rating')
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number):
      raise ValueError(f'rating {show(name)} is {show(number)}; give a finite number')
  return tuple(sorted((name, float(number)) for name, number in items))


def _parse_optional_category(value: Any, what: str) -> Category | None:
  return None if value is None else parse_category(value, f'"{what}"')


def _parse_word(value: Any, what: str) -> str:
  return '' if value is None else checks.check_text(value, f'"{what}"', empty_ok=True)


def _parse_names(value: Any) -> tuple[str, ...]:
  if not isinstance(value, (list, tuple, type(None))):
    raise ValueError(f'"violated" is {show(value)}; write a list of category names')
  return tuple(value or ())


# --- Prompts and samples ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt for a policy, and the rules under which its answer is judged."""

  id: str
  messages: tuple[Message, ...]  # up to the user's last turn
  safety: SafetyConfig  # the rules of the reward; the policy does not read them
  label: str = ''  # 'harmful' or 'benign' where it is known (AlphaAlign)

  def __post_init__(self):
    if self.label not in PROMPT_LABELS:
      known = ', '.join(map(repr, PROMPT_LABELS))
      raise ValueError(f'prompt {self.id}: label {self.label!r} must be one of {known}')


@dataclasses.dataclass(frozen=True)
class Sample:
  """One completion of a prompt."""

  prompt: Prompt
  index: int  # its place among the samples of the prompt
  text: str  # without the stop token
  num_tokens: int  # the stop token included
  stopped: bool  # False if the length limit cut it off

  @property
  def id(self) -> str:
    return f'{self.prompt.id}#{self.index}'

  def example(self) -> Example:
    """Returns the example that the reward model judges."""
    reply = Message('agent', self.text)
    return Example(self.id, self.prompt.safety, self.prompt.messages + (reply,))


# samples -> float32 [N]; all rewards are finite.
RewardFn = Callable[[Sequence[Sample]], np.ndarray]
