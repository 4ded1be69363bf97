"""Requests as clients send them, read strictly: what is not understood is an error, not a guess.

Each `read_*` function takes the object in a request's body and returns an `Ask`. Nothing in a
request is ever used as a path or a URL.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from csrm_jax.core import checks, files
from csrm_jax.core.checks import show
from csrm_jax.safety import schema
from csrm_jax.serve import policies as policies_lib
from csrm_jax.serve.policies import Policies, Policy

if TYPE_CHECKING:  # A client of the server needs no JAX.
  from csrm_jax.reward import monitor

Conversation = tuple[schema.Message, ...]


class RequestError(Exception):
  """A request that is refused, with its HTTP status and an error in OpenAI's form."""

  def __init__(self, status: int, message: str, code: str = 'invalid_request', **headers: str):
    super().__init__(message)
    self.status, self.code = status, code
    self.headers = {name.replace('_', '-'): value for name, value in headers.items()}


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may hold."""

  body_bytes: int
  conversations: int
  messages: int  # of one conversation
  rules: int  # of one policy that a request brings


@dataclasses.dataclass(frozen=True)
class Item:
  """A conversation and the rules that judge it."""

  policy: Policy
  conversation: Conversation


@dataclasses.dataclass(frozen=True)
class Ask:
  """What a request asks for."""

  items: tuple[Item, ...]
  each_rule: bool  # whether each rule is asked about alone, too
  shorten: bool = False  # whether a conversation that is too long is cut, and marked
  is_stream: bool = False  # whether items are one conversation as it comes about


# --- JSON ------------------------------------------------------------------------------


def load_json(body: bytes) -> dict[str, Any]:
  """Returns the object in a body: UTF-8, no repeated keys, finite numbers, moderate depth."""
  try:
    value = json.loads(
      body.decode(),
      object_pairs_hook=files.unique_keys('the body'),
      parse_constant=_refuse_constant,
      parse_float=_finite,
    )
  except UnicodeDecodeError as error:
    raise RequestError(
      400, f'the body is not UTF-8 (byte {error.start}); encode it as UTF-8'
    ) from None
  except json.JSONDecodeError as error:
    raise RequestError(
      400, f'the body is not JSON ({error.msg} at character {error.pos}); send one JSON object'
    ) from None
  except RecursionError:
    raise RequestError(400, 'the body is nested too deeply; flatten it') from None
  except ValueError as error:
    raise RequestError(400, str(error)) from None
  if not isinstance(value, dict):
    raise RequestError(400, f'the body is {show(value)}; send a JSON object')
  return value


def _refuse_constant(name: str) -> Any:
  raise ValueError(f'the body holds {name}, which is no JSON number; send finite numbers')


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(f'the body holds the number {text[:40]}, which is not finite')
  return value


def _check_keys(obj: Mapping[str, Any], known: Sequence[str], strict: bool = False) -> None:
  """Refuses near misses of known keys that are absent; with `strict` every unknown key."""
  absent = [key for key in known if key not in obj]
  for key in obj:
    if key in known:
      continue
    meant = checks.hint(key, absent)
    if meant or strict:
      known_are = f'; known are {", ".join(known)}'
      raise RequestError(400, f'unknown key {show(key)}{meant or known_are}')


def _flag(obj: Mapping[str, Any], key: str, default: bool) -> bool:
  value = obj.get(key, default)
  if not isinstance(value, bool):
    raise RequestError(400, f'"{key}" is {show(value)}; it must be true or false')
  return value


def _texts(value: Any, key: str) -> list[str]:
  """Returns the texts in a text or a list of them."""
  values = [value] if isinstance(value, str) else value
  if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
    raise RequestError(400, f'"{key}" is {show(value)}; it must be text or a list of texts')
  return values


# --- Rules and conversations -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads the bodies of all endpoints; each method raises RequestError."""

  policies: Policies
  limits: Limits

  def _policy(self, obj: Mapping[str, Any], fallback: Any = None) -> Policy:
    """Returns the policy that a request names or brings, or the one `fallback` names."""
    if obj.get('safety') is not None:
      if obj.get('policy') is not None:
        raise RequestError(400, 'the request has both "policy" and "safety"; send one of them')
      return self._inline(obj['safety'])
    name = obj.get('policy') if obj.get('policy') is not None else fallback
    return self._named('' if name is None else name)

  def _named(self, name: Any) -> Policy:
    if not isinstance(name, str):
      raise RequestError(400, f'"policy" is {show(name)}; it must be the name of a policy')
    try:
      return self.policies.get(name)
    except policies_lib.UnknownPolicyError as error:
      raise RequestError(404, str(error), 'unknown_policy') from None

  def _inline(self, obj: Any) -> Policy:
    if not isinstance(obj, Mapping):
      raise RequestError(
        400, f'"safety" is {show(obj)}; send rules as {{"categories": [...]}}, or name a "policy"'
      )
    rules = obj.get('categories')
    if isinstance(rules, list) and len(rules) > self.limits.rules:
      raise RequestError(
        413, f'"safety" has {len(rules)} categories; this server reads at most {self.limits.rules}'
      )
    return policies_lib.inline(_refused(schema.parse_safety, obj, 'safety'))

  def _conversation(self, obj: Any, where: str) -> Conversation:
    """Returns the messages in any of the forms that files are read in."""
    if isinstance(obj, Mapping):
      obj = self._messages_of(obj, where)
    elif isinstance(obj, str):
      obj = [{'role': 'agent', 'content': obj}]
    if not isinstance(obj, list):
      raise RequestError(400, f'{where} is {show(obj)}; send a list of messages')
    if len(obj) > self.limits.messages:
      raise RequestError(
        413, f'{where} has {len(obj)} messages; this server reads at most {self.limits.messages}'
      )
    found = _refused(schema.parse_conversation, obj, where=where)
    _refused(schema.check_conversation, found, where=where)
    return found

  def _messages_of(self, obj: Mapping[str, Any], where: str) -> Any:
    forms = [key for key in ('conversation', 'messages', 'conversations', 'response') if key in obj]
    if len(forms) != 1:
      raise RequestError(
        400,
        f'{where} has {" and ".join(forms) or "no messages"}; send "messages", "conversation", or '
        '"prompt" and "response"',
      )
    if forms != ['response']:
      return obj[forms[0]]
    prompt = obj.get('prompt', [])
    if isinstance(prompt, str):
      prompt = [{'role': 'user', 'content': prompt}]
    if not isinstance(prompt, list):
      raise RequestError(400, f'{where}: the prompt is {show(prompt)}; send text or messages')
    return [*prompt, {'role': 'agent', 'content': obj['response']}]

  def _count(self, items: Sequence[Any], what: str) -> None:
    if len(items) > self.limits.conversations:
      raise RequestError(
        413,
        f'the request has {len(items)} {what}; this server takes at most '
        f'{self.limits.conversations} at once',
      )

  # --- Endpoints -----------------------------------------------------------------------

  def read_score(self, body: Mapping[str, Any]) -> Ask:
    """Reads {"policy" or "safety", "conversations": [...]}; items may bring their own rules."""
    known = ('policy', 'safety', 'conversations', 'conversation', 'messages')
    known += ('prompt', 'response', 'each_rule', 'shorten', 'id', 'label')
    _check_keys(body, known, strict=True)
    many = body.get('conversations')
    # ShareGPT calls the messages of one conversation so.
    is_sharegpt = isinstance(many, list) and bool(many) and _is_message(many[0])
    if many is None or is_sharegpt:
      rows: Any = [{k: v for k, v in body.items() if k not in ('each_rule', 'shorten')}]
    elif isinstance(many, list):
      rows = many
    else:
      raise RequestError(400, f'"conversations" is {show(many)}; send a list of conversations')
    self._count(rows, 'conversations')
    default = None if rows is not many else self._default_of(body, rows)
    items = []
    for i, row in enumerate(rows):
      own = isinstance(row, Mapping) and any(row.get(k) is not None for k in ('policy', 'safety'))
      policy = self._policy(row) if own else default or self._policy(body)
      where = 'the conversation' if len(rows) == 1 else f'conversation {i + 1}'
      items.append(Item(policy, self._conversation(row, where)))
    return Ask(tuple(items), _flag(body, 'each_rule', False), _flag(body, 'shorten', False))

  def _default_of(self, body: Mapping[str, Any], rows: Sequence[Any]) -> Policy | None:
    named = any(body.get(key) is not None for key in ('policy', 'safety'))
    return self._policy(body) if named or not rows else None

  def read_moderation(self, body: Mapping[str, Any]) -> Ask:
    """Reads OpenAI's moderation request; each text is judged as an agent's reply.

    "input" is text, a list of texts, or content parts of one text. A list of messages, which
    OpenAI does not have, is one conversation.
    """
    _check_keys(body, ('input', 'model', 'policy', 'safety', 'each_rule', 'shorten'))
    value = body.get('input')
    policy = self._policy(body, fallback=body.get('model'))
    if isinstance(value, str):
      found = [value]
    elif isinstance(value, list) and value:
      if all(isinstance(item, str) for item in value):
        found = value
      elif all(_is_message(item) for item in value):
        found = [value]
      else:
        found = [[{'role': 'agent', 'content': value}]]
    else:
      raise RequestError(
        400, f'"input" is {show(value)}; send text, a list of texts or a list of content parts'
      )
    self._count(found, 'inputs')
    items = tuple(
      Item(policy, self._conversation(item, f'input {i + 1}')) for i, item in enumerate(found)
    )
    return Ask(items, _flag(body, 'each_rule', True), _flag(body, 'shorten', False))

  def read_chat(self, body: Mapping[str, Any]) -> Ask:
    """Reads a chat completion request, whose last message, the assistant's, is judged."""
    known = ('messages', 'model', 'policy', 'safety', 'each_rule', 'shorten', 'stream', 'n')
    _check_keys(body, known)
    if body.get('stream'):
      raise RequestError(400, 'a verdict is one word and is not streamed; send "stream": false')
    if body.get('n') not in (None, 1):
      raise RequestError(400, f'"n" is {show(body["n"])}; there is one verdict, send 1')
    policy = self._policy(body, fallback=body.get('model'))
    conversation = self._conversation(body.get('messages'), '"messages"')
    each_rule = _flag(body, 'each_rule', True)
    return Ask((Item(policy, conversation),), each_rule, _flag(body, 'shorten', False))

  def read_monitor(self, body: Mapping[str, Any], cuts: monitor.Cuts) -> Ask:
    """Reads {"messages": [...], "judged": 0, "over": false}: a stream, as far as it has come.

    "judged" is how many verdicts earlier answers gave. Where a reply grows, it is the last message.
    """
    known = ('policy', 'safety', 'messages', 'judged', 'over', 'shorten')
    _check_keys(body, known, strict=True)
    judged, over = body.get('judged', 0), _flag(body, 'over', False)
    if not isinstance(judged, int) or isinstance(judged, bool) or judged < 0:
      raise RequestError(400, f'"judged" is {show(judged)}; send the number of the last answer')
    policy = self._policy(body)
    conversation = self._conversation(body.get('messages'), '"messages"')
    found = cuts.prefixes(conversation, over or cuts.unit == 'turns')
    if judged > len(found):
      raise RequestError(
        400, f'"judged" is {judged}, and so far there are {len(found)} verdicts; send all messages'
      )
    found = found[judged:]
    self._count(found, 'verdicts')
    items = tuple(Item(policy, part) for part in found)
    return Ask(items, False, _flag(body, 'shorten', False), is_stream=True)

  def read_reward(self, body: Mapping[str, Any], query_policy: str | None = None) -> Ask:
    """Reads the reward requests of OpenRLHF and verl, and those of configs/rl.py.

    OpenRLHF: {"query": [...]}, beside it perhaps "prompts" and "labels". verl: "solution_str"
    with "extra_info" (its "prompt"). `query_policy` (of the URL) or "policy" chooses the rules;
    else labels do that name policies.
    """
    if 'samples' in body:
      return self._read_samples(body, query_policy)
    known = ('query', 'queries', 'prompts', 'labels', 'responses', 'policy', 'safety')
    known += ('solution_str', 'solution_strs', 'ground_truth', 'extra_info', 'data_source')
    _check_keys(body, (*known, 'prompt', 'shorten'))
    forms = ('query', 'queries', 'responses', 'solution_str', 'solution_strs')
    forms = [key for key in forms if key in body]
    if len(forms) != 1:
      raise RequestError(
        400,
        f'the request has {" and ".join(forms) or "no texts"}; send "query" (and "prompts"), '
        '"responses" with "prompts", or "solution_str"',
      )
    texts = _texts(body[forms[0]], forms[0])
    self._count(texts, 'texts')
    prompts = _aligned(_prompts(body), texts, 'prompts')
    labels = _aligned(body.get('labels'), texts, 'labels')
    named = query_policy is not None or body.get('policy') is not None
    named = named or body.get('safety') is not None
    items = []
    for i, (text, prompt, label) in enumerate(zip(texts, prompts, labels, strict=True)):
      policy = self._policy(body, query_policy) if named else self._label(label, i)
      if forms[0] in ('query', 'queries'):
        messages = split_query(text, prompt, f'{forms[0]} {i + 1}')
      else:
        messages = [*history(prompt, i), {'role': 'agent', 'content': without_end(text)}]
      items.append(Item(policy, self._conversation(messages, f'{forms[0]} {i + 1}')))
    return Ask(tuple(items), False, _flag(body, 'shorten', False))

  def _label(self, label: Any, i: int) -> Policy:
    if label in (None, ''):
      return self._named('')
    try:
      return self._named(label)
    except RequestError as error:
      # An answer of a data set, or the wrong name of a policy: nobody can tell.
      raise RequestError(
        error.status,
        f'label {i + 1}: {error}; if labels are no policies, send "policy", or name it in the URL: '
        '/get_reward?policy=NAME',
        error.code,
      ) from None

  def _read_samples(self, body: Mapping[str, Any], query_policy: str | None) -> Ask:
    _check_keys(body, ('samples', 'policy', 'safety'), strict=True)
    rows = body['samples']
    if not isinstance(rows, list):
      raise RequestError(400, f'"samples" is {show(rows)}; send a list')
    self._count(rows, 'samples')
    items = []
    for i, row in enumerate(rows):
      if not isinstance(row, Mapping):
        raise RequestError(400, f'sample {i + 1} is {show(row)}; send an object')
      policy = self._policy(body if query_policy or 'policy' in body else row, query_policy)
      items.append(Item(policy, self._conversation(row, f'sample {i + 1}')))
    return Ask(tuple(items), False)


def _refused(check: Callable[..., Any], *args: Any, where: str = '') -> Any:
  """Returns the check's value; its ValueError is the client's."""
  try:
    return check(*args)
  except ValueError as error:
    raise RequestError(400, f'{where}: {error}' if where else str(error)) from None


def _is_message(item: Any) -> bool:
  return isinstance(item, Mapping) and bool({'role', 'from'} & set(item))


# --- Texts of a chat template ----------------------------------------------------------

# Header and end of a turn, by template; what OpenRLHF sends still has them.
_TEMPLATES = tuple(
  re.compile(pattern, re.DOTALL)
  for pattern in (
    r'<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|(?=<\|im_start\|>)|\Z)',
    r'<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)(?:<\|eot_id\|>|\Z)',
    r'<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>\n?|\Z)',
    r'(?:\A|\n\n)(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)',
  )
)
_MISTRAL = re.compile(r'\[INST\](.*?)\[/INST\](.*?)(?:</s>|(?=\[INST\])|\Z)', re.DOTALL)
_END = re.compile(
  r'(?:\s*(?:<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>|<\|endoftext\|>|<end_of_turn>|</s>|<eos>'
  r'|<pad>|<\|pad\|>|<\|finetune_right_pad_id\|>))+\s*\Z'
)


def without_end(text: str) -> str:
  """Returns the text without end and padding tokens behind it."""
  # Not str.strip(token), which takes letters off the text.
  return _END.sub('', text)


def _turns(text: str) -> list[dict[str, str]]:
  """Returns the messages in a text of a known chat template; [] for other text."""
  for pattern in _TEMPLATES:
    found = pattern.findall(text)
    if found:
      return [{'role': role.lower(), 'content': content.strip()} for role, content in found]
  found = _MISTRAL.findall(text)
  return [
    {'role': role, 'content': content.strip()}
    for pair in found
    for role, content in zip(('user', 'agent'), pair, strict=True)
  ]


def history(prompt: Any, i: int) -> list[Any]:
  """Returns the messages of a prompt: text, perhaps of a chat template, or messages."""
  if prompt is None:
    return []
  if isinstance(prompt, list):
    return prompt
  if not isinstance(prompt, str):
    raise RequestError(400, f'prompt {i + 1} is {show(prompt)}; send text or messages')
  turns = _turns(prompt)
  # A template ends with the header of the turn that is to be written.
  if schema.role_of(turns[-1:]) == 'agent' and not turns[-1]['content']:
    turns.pop()
  return turns or [{'role': 'user', 'content': prompt}]


def split_query(text: str, prompt: Any, where: str) -> list[Any]:
  """Returns the messages of prompt and response in one text."""
  if prompt is None:
    turns = _turns(text)
    if schema.role_of(turns[-1:]) == 'agent':
      return [*turns[:-1], {'role': 'agent', 'content': without_end(turns[-1]['content'])}]
    # Without marks nobody can tell where the response begins: all of it is judged.
    return [{'role': 'agent', 'content': without_end(text)}]
  if not isinstance(prompt, str) or not text.startswith(prompt):
    raise RequestError(
      400, f'{where} does not begin with its prompt; send the text that the policy continued'
    )
  # What follows the prompt is judged whole: marks of turns that a policy writes end nothing.
  response = without_end(text[len(prompt) :])
  return [*history(prompt, 0), {'role': 'agent', 'content': response}]


def _prompts(body: Mapping[str, Any]) -> Any:
  for key in ('prompts', 'prompt'):
    if body.get(key) is not None:
      return body[key]
  info = body.get('extra_info')
  infos = info if isinstance(info, list) else [info]
  found = [item.get('prompt') if isinstance(item, Mapping) else None for item in infos]
  return found if isinstance(info, list) else found[0]


def _aligned(values: Any, texts: Sequence[str], what: str) -> list[Any]:
  """Returns one value for each text."""
  if values is None:
    return [None] * len(texts)
  # A list of messages is one prompt.
  if isinstance(values, str) or (isinstance(values, list) and values and _is_message(values[0])):
    values = [values]
  if not isinstance(values, list) or len(values) != len(texts):
    found = f'{len(values)}' if isinstance(values, list) else show(values)
    raise RequestError(400, f'"{what}" has {found} for {len(texts)} texts; send one for each')
  return values
