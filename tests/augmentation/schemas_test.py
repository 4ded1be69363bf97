"""What is asked for is what is taken: schemas and parsers agree."""

import json

import pytest

from csrm_jax.augmentation import categories, requests, strictness
from csrm_jax.core import journal
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from tests.augmentation import builders

jsonschema = pytest.importorskip('jsonschema')

PETS = Category('Pets', 'No word about pets at all.')
CATS = Category('Cats', 'No word about cats at all.')
DOGS = Category('Dogs "and" wolves', 'No word about dogs at all.')
TALK = (Message('user', 'hi'), Message('agent', 'cats'))
EXAMPLE = Example('1', SafetyConfig((PETS,)), TALK, 'unsafe', ('Pets',))
PROPOSE = requests.ProposeCategories(EXAMPLE.safety, TALK)
LIST = requests.ListSubcategories(PETS, 3)
ADD = requests.AddSubcategory(PETS, ('Cats',), TALK)
PICK = requests.PickMostSevere(PETS, (CATS, DOGS))
WRITE = requests.WriteGuideline(PETS, (CATS,), (DOGS,))
INDUCE = requests.InduceRules((TALK,), (True,), (PETS,))
ALL = [PROPOSE, LIST, ADD, PICK, WRITE, INDUCE]


def rule(name='N', guideline='G' * requests.MIN_GUIDELINE_LENGTH):
  return {'name': name, 'guideline': guideline}


LONGEST = rule('N' * requests.MAX_NAME_LENGTH, 'Ü' * requests.MAX_GUIDELINE_LENGTH)


def is_allowed(request, document):
  validator = jsonschema.Draft202012Validator(requests.make_schema(request))
  return validator.is_valid(document)


@pytest.mark.parametrize('request_', ALL, ids=lambda r: type(r).__name__)
def test_schemas_are_schemas_that_strict_services_take(request_):
  bounded = requests.make_schema(request_)
  for schema in bounded, requests.without_lengths(bounded):
    jsonschema.Draft202012Validator.check_schema(schema)
  assert schema == requests.without_lengths(schema)
  assert 'Length' not in json.dumps(schema)

  def check(node):
    if isinstance(node, dict):
      if node.get('type') == 'object':
        assert node['additionalProperties'] is False
        assert node['required'] == list(node['properties'])
      node = list(node.values())
    if isinstance(node, list):
      for child in node:
        check(child)

  check(schema)
  # The words that go with it say the same.
  assert json.dumps(bounded) in requests.make_messages(request_)[0]['content']


@pytest.mark.parametrize(
  'request_, document',
  [
    (PROPOSE, {'plus': rule(), 'minus': rule()}),
    (PROPOSE, {'plus': None, 'minus': LONGEST}),
    (PROPOSE, {'plus': LONGEST, 'minus': None}),
    (PROPOSE, {'minus': None, 'plus': None}),
    (LIST, {'subcategories': [rule()]}),
    (LIST, {'subcategories': [rule('a'), LONGEST, rule('ü\n"{')]}),
    (ADD, {'subcategory': LONGEST}),
    (ADD, {'subcategory': rule('\u2028x')}),
    (PICK, {'most_severe': 'Cats'}),
    (PICK, {'most_severe': 'Dogs "and" wolves'}),
    (WRITE, {'guideline': 'Ü' * requests.MAX_REWRITE_LENGTH}),
    (WRITE, {'guideline': 'x\u0000\U0001f600'.ljust(15, '.')}),
    (INDUCE, {'rules': [rule('a'), LONGEST]}),
  ],
)
def test_what_a_schema_allows_is_parsed(request_, document):
  assert is_allowed(request_, document)
  for ascii_only in False, True:  # Characters may come escaped.
    requests.parse(request_, json.dumps(document, ensure_ascii=ascii_only))


@pytest.mark.parametrize(
  'request_, document',
  [
    (PROPOSE, {'plus': rule()}),
    (PROPOSE, {'plus': 'Cats', 'minus': None}),
    (PROPOSE, {'plus': rule() | {'why': 'so'}, 'minus': None}),
    (LIST, {'subcategories': []}),
    (LIST, {'subcategories': rule()}),
    (ADD, {'subcategory': None}),
    (PICK, {'most_severe': 'Birds'}),
    (PICK, {'most_severe': 0}),
    (WRITE, {'guideline': 'short'}),
    (WRITE, rule()),
    (INDUCE, {'rules': []}),
    (INDUCE, {'rules': [rule('a')] * 13}),
  ],
)
def test_what_is_not_parsed_no_schema_allows(request_, document):
  assert not is_allowed(request_, document)
  with pytest.raises(ValueError):
    requests.parse(request_, json.dumps(document))


def test_no_more_subcategories_than_asked_for():
  four = {'subcategories': [rule(name) for name in 'abcd']}
  assert not is_allowed(LIST, four)
  assert len(requests.parse(LIST, json.dumps(four))) == 4  # Where they come.
  many = requests.ListSubcategories(PETS, 99)
  most = requests.make_schema(many)['properties']['subcategories']['maxItems']
  assert most == requests.MAX_SUBCATEGORIES


def test_a_text_that_the_bound_ended_is_not_kept():
  """A server that keeps to a schema ends it anywhere, also within a word."""
  cut = {
    'plus': rule(guideline='G' * (requests.MAX_GUIDELINE_LENGTH + 1)),
    'minus': rule('N' * (requests.MAX_NAME_LENGTH + 1)),
  }
  assert is_allowed(PROPOSE, cut)
  checked = categories.check_text(EXAMPLE, requests.parse(PROPOSE, json.dumps(cut)))
  assert checked.drops == ('plus_guideline_too_long', 'minus_name_too_long')
  rewrite = {'guideline': 'G' * (requests.MAX_REWRITE_LENGTH + 1)}
  assert is_allowed(WRITE, rewrite)
  with pytest.raises(ValueError, match='guideline_too_long'):
    requests.parse(WRITE, json.dumps(rewrite))


def write(schema, number):
  """Returns a value that a schema allows, with new names for each number."""
  if 'enum' in schema:
    return schema['enum'][-1]
  if 'anyOf' in schema:
    return write(schema['anyOf'][0], number)
  if schema['type'] == 'array':
    return [write(schema['items'], f'{number}/{i}') for i in range(schema.get('maxItems', 3))]
  if schema['type'] == 'object':
    return {key: write(value, number) for key, value in schema['properties'].items()}
  return f'{number} '.ljust(schema.get('minLength', 15), 'x')


@pytest.mark.parametrize('mode', ['json_schema', 'bounded_json_schema'])
def test_a_server_that_keeps_to_schemas_is_always_understood(fault_server, tmp_path, mode):
  """All of Algorithm 1, and CCA, with no reply that does not parse."""
  pytest.importorskip('openai')
  kinds = set()

  def script(number, body):
    form = body['response_format']['json_schema']
    kinds.add(form['name'])
    assert ('maxLength' in json.dumps(form)) == (
      mode == 'bounded_json_schema' and form['name'] != 'PickMostSevere'
    )
    document = write(form['schema'], number)
    jsonschema.validate(document, form['schema'])
    return json.dumps(document)

  with fault_server(script) as server:
    asker = builders.endpoint(journal.Cache(tmp_path), server.url, json_mode=mode)
    outcome = strictness.run(
      PETS,
      [EXAMPLE] * 3,
      asker,
      lambda talks, rules: [False] * len(talks),
      builders.settings(num_subcategories=3, max_subcategories=4, threshold=0.1),
    )
    assert len(outcome.candidates) == 3
    (checked,) = categories.check_all([EXAMPLE], [categories.propose(EXAMPLE, asker)])
    assert asker.ask(INDUCE)
  assert checked.plus is not None
  assert kinds == {type(r).__name__ for r in ALL}
  assert 'unparsable' not in asker.usage()
