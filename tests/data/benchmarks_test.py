"""Public benchmarks in their published columns, tiny ones of our own making."""

import csv
import json
import lzma

import pytest

from csrm_jax.data import catalogue, public, tables
from csrm_jax.data.public import MODERATION_RULES, XSTEST_RULES

BEAVERTAILS = public.rules('beavertails')


def _lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def _csv(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  return path


def _beavertails(safe, *violated, response='Fine.'):
  return {
    'prompt': 'Hi.',
    'response': response,
    'is_safe': safe,
    'category': {n: n in violated for n in BEAVERTAILS.names},
  }


def test_beavertails(tmp_path):
  rows = [
    _beavertails(True),
    _beavertails(False, 'self_harm', 'animal_abuse'),
    _beavertails(False),
    _beavertails(True, 'self_harm'),
    _beavertails(True, response=' '),
  ]
  path = _lines(tmp_path / 'a.jsonl', rows)
  found = catalogue.SETS['beavertails'].read(path)
  assert [e.label for e in found] == ['safe', 'unsafe', 'unsafe']
  assert found[1].violated == ('animal_abuse', 'self_harm')
  assert found[2].violated == ()
  assert found.drops == {'labels_disagree': 1, 'empty_response': 1}
  packed = tmp_path / 'a.jsonl.xz'
  packed.write_bytes(lzma.compress(path.read_bytes()))
  assert catalogue.SETS['beavertails'].read(packed) == found
  rows[0]['category'].pop('self_harm')
  with pytest.raises(ValueError, match=r'b\.jsonl:1: category'):
    catalogue.SETS['beavertails'].read(_lines(tmp_path / 'b.jsonl', rows))
  packed.write_bytes(packed.read_bytes()[:-9])
  with pytest.raises(ValueError, match='not a complete xz file'):
    catalogue.SETS['beavertails'].read(packed)


def test_wildguard(tmp_path):
  def row(response, label):
    return {
      'prompt': 'Hi.',
      'response': response,
      'adversarial': True,
      'response_harm_label': label,
    }

  path = _lines(
    tmp_path / 'a.jsonl',
    [
      row('x', 'harmful'),
      row('y', 'unharmful'),
      row(None, None),
      row('z', None),
      row('', 'harmful'),
    ],
  )
  found = public.read_wildguard(path, with_categories=False)
  assert [e.label for e in found] == ['unsafe', 'safe']
  assert found.drops == {'prompt_only': 1, 'no_label': 1, 'empty_response': 1}
  path = _lines(tmp_path / 'b.jsonl', [row('x', 'bad')])
  with pytest.raises(ValueError, match="unknown response_harm_label 'bad'"):
    public.read_wildguard(path, with_categories=False)


def _pku(better, safer, safe=(True, False), severity=(0, 2), texts=('good', 'bad')):
  row = {'prompt': 'Hi.', 'better_response_id': better, 'safer_response_id': safer}
  for i in (0, 1):
    row |= {
      f'response_{i}': texts[i],
      f'is_response_{i}_safe': safe[i],
      f'response_{i}_severity_level': severity[i],
    }
  return row


def test_pku_keeps_what_was_preferred_for_safety(tmp_path):
  path = _lines(
    tmp_path / 'a.jsonl',
    [
      _pku(0, 0),
      _pku(1, 1, (False, True), (1, 0), ('bad', 'good')),
      _pku(0, 0, (False, False), (1, 3)),  # both unsafe, one less so
      _pku(1, 0),  # the unsafe one was preferred
      _pku(0, 0, (True, True), (0, 0)),  # nothing to do with safety
      _pku(0, 0, (False, False), (2, 2)),
      _pku(0, 0, (False, True), (2, 0)),  # labels contradict the order
      _pku(0, 0, texts=('same', 'same')),
    ],
  )
  found = public.read_pku_pairs(path)
  assert [p.safer.conversation[-1].content for p in found] == ['good', 'good', 'good']
  assert [(p.safer.label, p.other.label) for p in found] == [('safe', 'unsafe')] * 2 + [
    ('unsafe', 'unsafe')
  ]
  assert found.drops == {'preferred_not_safer': 1, 'same_safety': 3, 'identical_pair': 1}
  path = _lines(tmp_path / 'b.jsonl', [_pku(0, 2)])
  with pytest.raises(ValueError, match='unknown safer_response_id 2'):
    public.read_pku_pairs(path)


def test_dynabench(tmp_path):
  def row(transcript, label='PASS', policy='1. No dogs.\n2) No jam.\n\n'):
    return {'policy': policy, 'transcript': transcript, 'label': label}

  path = _lines(
    tmp_path / 'a.jsonl',
    [
      row(
        'User: Hi, Agent: is a word.\nAgent: Yes.\nmore\nUser: And?\nAgent: Woof.\nUser: Bye.',
        'FAIL',
      ),
      row('Agent: a', policy=['No dogs.', '- No jam.']),
      row('no turns at all'),
      row('User: Hi.'),
      row('Agent: a', policy=None),
    ],
  )
  found = public.read_dynabench(path)
  first = found[0]
  assert first.label == 'unsafe'
  assert [(m.role, m.content) for m in first.conversation] == [
    ('user', 'Hi, Agent: is a word.'),
    ('agent', 'Yes.\nmore'),
    ('user', 'And?'),
    ('agent', 'Woof.'),
  ]
  assert [c.guideline for c in first.safety.categories] == ['No dogs.', 'No jam.']
  assert found[1].safety.categories == first.safety.categories
  assert found.drops == {'no_turns': 1, 'no_agent_turn': 1, 'no_policy': 1}


def test_reward_bench_2_and_or_bench(tmp_path):
  rows = [
    {'id': '7', 'prompt': 'Hi.', 'chosen': ['a'], 'rejected': ['b', 'c', 'd'], 'subset': 'Safety'},
    {'id': 'tied:3', 'prompt': 'Hi.', 'chosen': ['a', 'b'], 'rejected': ['c'], 'subset': 'Ties'},
  ]
  found = public.read_reward_bench_2(_lines(tmp_path / 'a.jsonl', rows))
  assert [(c.id, len(c.responses), c.num_correct) for c in found] == [
    ('reward_bench_2/7', 4, 1),
    ('tied:3', 3, 2),
  ]
  with pytest.raises(ValueError, match=r'b\.jsonl:1: .*at least one'):
    public.read_reward_bench_2(_lines(tmp_path / 'b.jsonl', [rows[0] | {'rejected': []}]))
  path = _csv(tmp_path / 'or-bench-toxic.csv', [{'prompt': 'Do it.', 'category': 'harmful'}])
  (example,) = public.read_or_bench(path)
  assert example.conversation[-1].content == 'Sure. Do it.'
  assert example.label == 'unsafe' and example.violated


def test_parquet_and_json(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  rows = [{'a': 1, 'b': 'x'}, {'a': 2, 'b': None}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
  assert [r for _, r in tables.read_table(tmp_path / 'a.parquet', 'ab')] == rows
  (tmp_path / 'a.json').write_text(json.dumps(rows))
  assert [r for _, r in tables.read_table(tmp_path / 'a.json', 'ab')] == rows
  with pytest.raises(ValueError, match="missing column 'c'"):
    list(tables.read_table(tmp_path / 'a.json', 'abc'))


def test_what_is_missing_says_how_to_get_it(tmp_path):
  found = catalogue.load_benchmarks(tmp_path)
  assert all(b.is_skipped and str(tmp_path) in b.command for b in found)
  assert {b.command.split(str(tmp_path) + '/')[1].split('/')[0].split()[0] for b in found} == set(
    catalogue.BENCHMARKS
  )
  (only,) = catalogue.load_benchmarks(tmp_path, ['dynabench'])
  assert only.name == 'dynabench'
  with pytest.raises(ValueError, match="unknown benchmark 'nope'"):
    catalogue.load_benchmarks(tmp_path, ['nope'])


def _xstest(tmp_path):
  folder = tmp_path / 'xstest'
  kinds = ('homonyms', 'contrast_homonyms')
  labels = '1_full_compliance', '2_full_refusal', '3_partial_refusal'
  prompts = [
    {
      'id': i,
      'prompt': f'Prompt {i}?',
      'type': kinds[i % 2],
      'label': ('safe', 'unsafe')[i % 2],
      'focus': '',
      'note': '',
    }
    for i in range(20)
  ]
  _csv(folder / 'xstest_prompts.csv', prompts)
  for model in ('a', 'b'):
    _csv(
      folder / 'done' / f'xstest_v2_completions_{model}.csv',
      [
        {
          'id': f'v2-{p["id"]}',
          'type': p['type'],
          'prompt': p['prompt'],
          'completion': f'Answer {model} {p["id"]}',
          'final_label': labels[p['id'] % 3],
        }
        for p in prompts
      ],
    )


def test_xstest_rule_sets_have_the_labels_of_people(tmp_path):
  _xstest(tmp_path)
  found = {b.name: b for b in catalogue.load_benchmarks(tmp_path, ['xstest'])}
  sure = found['xstest']
  assert sum(e.label == 'unsafe' for e in sure.items) == 10
  assert set(sure.tags['type']) == {'homonyms', 'contrast_homonyms'}
  rules = found['xstest_rules']
  rows = [*rules.items, *rules.validation]
  assert len(rows) == 2 * 20 * 3
  for example in rows:
    _, prompt, rule = example.id.split('/')
    number = int(prompt.removeprefix('v2-'))
    harmful, said = number % 2 == 1, number % 3
    expected = {'harmful': harmful and said == 0, 'refusal': not harmful and said == 1}
    expected['both'] = expected['harmful'] or expected['refusal']
    assert (example.label == 'unsafe') == expected[rule], example.id
  completions = found['xstest_completions']
  for example, tag in zip(completions.items, completions.tags['human label'], strict=True):
    assert (example.label == 'unsafe') == (tag == 'harmful request, full compliance')
  assert all(e.label == 'unsafe' for e in found['xstest_attacks'].items)


def test_prompts_are_wholly_tested_or_wholly_validation(tmp_path):
  _xstest(tmp_path)
  for b in catalogue.load_benchmarks(tmp_path, ['xstest']):
    if b.validation:
      tested, held = ({e.id.split('/')[1] for e in rows} for rows in (b.items, b.validation))
      assert tested and held and not tested & held, b.name
      assert len(b.groups) == len(b.items)


def test_every_public_rule_has_other_wordings():
  wanted = {*XSTEST_RULES.values(), *(MODERATION_RULES[k] for k in ('H', 'V', 'HR', 'SH'))}
  found = public.wordings(XSTEST_RULES | MODERATION_RULES)
  assert set(found) == wanted
  for category, words in found.items():
    assert len(words) == 2
    assert {w.name for w in words} == {category.name}
    assert len({category.guideline, *(w.guideline for w in words)}) == 3
