"""Tests of public sets of texts that people judged in many ways, and of their rules."""

import collections
import json
import os
import pathlib

import pytest

from csrm_jax.data import catalogue, judged, judged_texts
from csrm_jax.data.judged import Judged
from tests.small import error_of


def hatecheck(functionality, target='', label='', **fields):
  return {
    'functionality': functionality,
    'case_id': '1',
    'test_case': 'Some words.',
    'label_gold': label or ('hateful' if functionality.endswith('_h') else 'non-hateful'),
    'target_ident': target,
    'templ_id': '3',
    'ref_templ_id': '',
    'case_templ': 'Some words.',
  } | fields


def build(number, text, other, label=0, kind='none', target="['none']"):
  return {
    'entry_id': str(number),
    'text': text,
    'type': kind,
    'target': target,
    'label_gold': str(label),
    'matched_text': other,
  }


def edos(label='sexist', category='2. derogation', vector='2.1 descriptive attacks'):
  return {
    'rewire_id': 'a-1',
    'text': 'Some words.',
    'label_sexist': label,
    'label_category': category,
    'label_vector': vector,
  }


def toxigen(score, *groups):
  return {'id': 4, 'text': 'Some words.', 'toxicity_score': score, 'target_groups': list(groups)}


CONTEXT = {
  'text': 'No.',
  'parent_text': 'Is it?',
  'tox_codes_oc': '[0. 0. 0.]',
  'tox_codes_ic': '[1.  0.5 1. ]',
}
COSA = {'test spec': 'Violence', 'prompt': 'May elves fight?', 'situation': '1'}
KINDS = {'comment': 'Words.', 'violence': '0.25', 'directed_vs_generalized': '0.2'} | dict.fromkeys(
  ('gender', 'race', 'national_origin', 'disability', 'religion', 'sexual_orientation'), '0'
)
# name -> (split, file name, rows): a row or two in the set's own schema.
ROWS = {
  'moderation_judged': ('test', 'samples.jsonl', [{'prompt': 'a', 'H': 1, 'H2': 0}]),
  'hatecheck': ('test', 'hatecheck.csv', [hatecheck('derog_impl_h', 'women')]),
  'hatemoji': ('test', 'hatemojibuild.csv', [build(1, 'a', 'b'), build(2, 'b', 'a')]),
  'edos': ('test', 'edos.csv', [edos()]),
  'toxigen_human': ('test', 'toxigen_human.jsonl', [toxigen(3.3333333333, 'black')]),
  'ethos': ('test', 'ethos_multilabel.csv', [KINDS]),
  'context_toxicity': ('test', 'cat_small.csv', [CONTEXT]),
  'hazard_prompts': (
    'test',
    'strongreject.csv',
    [{'category': 'Violence', 'source': 'custom', 'forbidden_prompt': 'May elves fight?'}],
  ),
  'cosa': ('test', 'cosalign_prompts_by_rule_set.csv', [COSA]),
}
JUDGED = [name for name in ROWS if name != 'cosa']


def read(name, folder, *rows):
  """Returns the rows of a file of JSON lines, which stands for any format."""
  path = folder / 'rows.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return catalogue.SETS[name].read(path)


def verdicts(name, folder, row):
  (item,) = read(name, folder, row)
  return {key.removeprefix(f'{name}/'): share for key, share in item.verdicts.items()}


# --- Rules -------------------------------------------------------------------------------


@pytest.mark.parametrize('name', JUDGED)
def test_rules_have_many_wordings(name):
  for key, rule in judged.rules(name).items():
    texts = [c.guideline for c in rule.wordings]
    held = [c.guideline for c in rule.held]
    assert len(set(texts)) >= 5 and len(set(held)) >= 2, key
    assert len({*texts, *held}) == len(texts) + len(held), key
    assert not any('{' in c.name + c.guideline for c in (*rule.wordings, *rule.held)), key
    assert all(len(text.split()) <= 60 for text in texts), key


# What rules are about that no run reads: a word that gives them away.
_LEFT_OUT = (
  *('disab', 'handicap', 'impair', 'harass', 'bully', 'stereotyp', 'copyright', 'defam'),
  *('self-harm', 'suicid', 'self-injur', 'malware', 'hack'),
)


def test_no_run_reads_a_rule_that_is_left_out_under_another_name():
  unseen = collections.defaultdict(set)
  for name in JUDGED:
    for key, rule in judged.rules(name).items():
      unseen[key.partition('/')[2]].add(rule.unseen)
      if rule.unseen != 'always':
        text = ' '.join(f'{c.name} {c.guideline}' for c in rule.wordings).casefold()
        assert not [word for word in _LEFT_OUT if word in text], key
  assert all(len(found) == 1 for found in unseen.values())
  assert {'always', '0', '1', '2'} <= set.union(*unseen.values())


def test_patterns_are_filled(tmp_path, monkeypatch):
  monkeypatch.setattr(judged, 'FOLDER', tmp_path)
  (tmp_path / 'groups.yaml').write_text('elves: {unseen: 1, names: [elves], held: [elf folk]}')
  wording = "{name: 'On {name}', guideline: '{What} are safe from {name}.'}"
  path = tmp_path / 'woods.yaml'
  path.write_text(f"""
all: {{wordings: [&w {wording}], held: []}}
no_{{key}}: {{each: [elves], within: all, wordings: [*w], held: [*w]}}
on_{{key}}: {{each: {{a: {{names: [[orcs, orc men]], held: [x]}}}}, wordings: [*w], held: [*w]}}
""")
  judged.rules.cache_clear()
  found = judged.rules('woods')
  judged.rules.cache_clear()
  assert list(found) == ['woods/all', 'woods/no_elves', 'woods/on_a']
  rule = found['woods/no_elves']
  assert rule.unseen == '1' and rule.stricter == ('woods/all',)
  assert [c.guideline for c in rule.wordings + rule.held] == [
    'Elves are safe from elves.',
    'Elf folk are safe from elf folk.',
  ]
  (orcs,) = found['woods/on_a'].wordings
  assert (orcs.name, orcs.guideline) == ('On orcs', 'Orc men are safe from orcs.')
  path.write_text(path.read_text().replace('[elves]', '[dwarfs]'))
  assert 'unknown group in no_{key}' in error_of(judged.rules, 'woods')
  judged.rules.cache_clear()


# --- Readers -----------------------------------------------------------------------------


def test_what_a_functionality_says(tmp_path):
  def judge(*args, **fields):
    return verdicts('hatecheck', tmp_path, hatecheck(*args, **fields))

  hate = judge('derog_impl_h', 'women')
  assert hate['hate'] and hate['group_women'] and hate['mention_women']
  assert not hate['group_gay'] and not hate['mention_gay'] and not hate['threats']
  quote = judge('counter_quote_nh', 'women', case_templ='[IDENTITY_SLUR]')
  assert quote['hate_even_quoted'] and quote['slurs'] and quote['mention_women']
  assert not quote['hate_unless_countered'] and not quote['group_women']
  assert 'slurs_unless_reclaimed' not in quote and 'threats' not in quote
  proud = judge('slur_reclaimed_nh', 'gay people')
  assert proud['slurs'] and not proud['slurs_unless_reclaimed']
  homonym = judge('slur_homonym_nh', 'gay people', case_templ='[SLUR]')
  assert not homonym['slurs'] and 'mention_gay' not in homonym
  person = judge('target_indiv_nh')
  assert person['abuse_of_anyone'] and not person['hate_insults_allowed']
  assert judge('threat_dir_h', 'women')['threats'] and judge('profanity_nh')['profanity']


def test_cases_of_one_template_are_one_group(tmp_path):
  rows = [
    hatecheck('derog_impl_h', 'women'),
    hatecheck('spell_leet_h', 'women', case_id='2', templ_id='8', ref_templ_id='3.0'),
    hatecheck('derog_impl_h', 'women', case_id='3', templ_id='8'),
  ]
  groups = [item.group for item in read('hatecheck', tmp_path, *rows)]
  assert groups[0] == groups[1] != groups[2]


def test_texts_and_what_they_were_made_from_are_one_group(tmp_path):
  rows = [build(1, 'm', 'c'), build(2, 'c', 'm'), build(3, 'a', 'c'), build(4, 'x', 'y')]
  groups = [item.group for item in read('hatemoji', tmp_path, *rows)]
  assert groups[0] == groups[1] == groups[2] != groups[3]


def test_targets_say_which_groups_are_meant(tmp_path):
  def judge(target):
    return verdicts('hatemoji', tmp_path, build(1, 'a', 'b', 1, 'animosity', target))

  both = judge("['blawom', 'mus']")
  hit = {key for key, share in both.items() if share and key.startswith('group_')}
  assert hit == {'group_black', 'group_women', 'group_muslims'}
  assert 'group_middle_east' not in both and both['group_gay'] == 0  # they may be Arabs
  assert both['type_animosity'] and not both['type_threat']
  # Nobody knows who is meant.
  assert not any(key.startswith('group_') for key in judge("['martians']"))
  assert not any(verdicts('hatemoji', tmp_path, build(1, 'a', 'b')).values())


def test_sexism_breaks_its_vector_and_what_contains_it(tmp_path):
  broken = {key for key, share in verdicts('edos', tmp_path, edos()).items() if share}
  assert broken == {'sexist', 'category_derogation', 'vector_descriptive_attacks'}
  assert not any(verdicts('edos', tmp_path, edos('not sexist', 'none', 'none')).values())


def test_scores_are_degrees_and_protect_groups_from_three_on(tmp_path):
  def judge(*args):
    return verdicts('toxigen_human', tmp_path, toxigen(*args))

  mild = judge(2.5, 'chinese')
  assert [mild[f'level_{i}'] for i in (2, 3, 4)] == [1, 0, 0]
  assert not {'group_chinese', 'group_asian'} & set(mild) and mild['group_women'] == 0
  strong = judge(3.0, 'chinese')
  assert strong['group_chinese'] and 'group_asian' not in strong and not strong['group_women']
  assert judge(1.5, 'chinese')['group_chinese'] == 0


def test_shares_are_those_of_people(tmp_path):
  assert verdicts('ethos', tmp_path, {'comment': 'a', 'isHate': 0.75}) == {'hate': 0.75}
  kinds = verdicts('ethos', tmp_path, KINDS)
  assert (kinds['violence'], kinds['directed'], kinds['generalised']) == (0.25, 0.2, 0.8)


def test_a_comment_is_judged_with_its_context_and_without(tmp_path):
  inside, alone = read('context_toxicity', tmp_path, CONTEXT)
  assert [m.content for m in inside.conversation] == ['Is it?', 'No.']
  assert alone.conversation[0].content in judged_texts.TURNS
  assert inside.verdicts == {'context_toxicity/toxic': 2.5 / 3} and inside.group == alone.group
  rows = read('context_toxicity', tmp_path, CONTEXT | {'tox_codes_oc': '[0.5]'})
  assert len(rows) == 1 and rows.drops == {'as_many_say_yes_as_no': 1}


def test_labels_that_are_left_out_are_unknown(tmp_path):
  (item,) = read('moderation_judged', tmp_path, {'prompt': 'a', 'H2': 1}, {'prompt': 'b'})
  assert set(item.verdicts) == {'moderation_judged/H2', 'moderation_judged/H_unless_H2'}


def test_a_prompt_breaks_the_rule_of_its_own_hazard(tmp_path):
  row = {'prompt_text': 'May I?', 'hazard': 'vcr'}
  (item,) = read('hazard_prompts', tmp_path, row)
  assert item.conversation[-1].content == 'Sure. May I?'
  assert [key for key, share in item.verdicts.items() if share] == [
    'hazard_prompts/hazard_violence'
  ]
  assert 'hazard_prompts/hazard_self_harm' not in item.verdicts
  row = {'Behavior': 'Do.', 'SemanticCategory': 'illegal', 'ContextString': 'Here.'}
  (item,) = read('hazard_prompts', tmp_path, row)
  assert [m.content for m in item.conversation] == ['Here.\n\nDo.', 'Sure. Do.']
  assert not any(item.verdicts.values())


def test_what_cosa_allows_is_a_rule_of_each_row(tmp_path):
  spec = 'Violence.Illegal_Drug.Related_Activities_and_Substance_Abuse'
  rows = [COSA | {'test spec': spec}, COSA | {'test spec': 'safe', 'situation': 3}]
  some, none = read('cosa', tmp_path, *rows)
  assert 'violence; illegal drugs' in some.safety.categories[0].guideline
  assert (some.label, none.label) == ('safe', 'unsafe')


@pytest.mark.parametrize(
  'name, row, message',
  [
    ('hatecheck', hatecheck('derog_x_h'), 'unknown functionality'),
    ('hatecheck', hatecheck('derog_impl_h', label='non-hateful'), 'correct one of them'),
    ('hatecheck', hatecheck('derog_impl_h', 'elves'), 'unknown target_ident'),
    ('hatemoji', build(1, 'a', 'b', 1), 'correct one'),
    ('hatemoji', {'text': 'a'}, 'tells what the file is'),
    ('edos', edos(category='3. animosity'), 'is not in label_category 3'),
    ('edos', edos('not sexist'), 'not sexist'),
    ('toxigen_human', toxigen(6), 'from 1 to 5'),
    ('toxigen_human', toxigen(2, 'elves'), 'unknown target group'),
    ('ethos', {'comment': 'a', 'isHate': 2}, 'from 0 to 1'),
    ('context_toxicity', CONTEXT | {'tox_codes_ic': '[0.7]'}, 'a number for each person'),
    ('moderation_judged', {'prompt': 'a', 'V': 'yes'}, 'must be 0 or 1'),
    ('hazard_prompts', {'prompt_text': 'a', 'hazard': 'x'}, 'unknown hazard'),
    ('cosa', COSA | {'test spec': 'Violence.Elves'}, 'unknown category'),
  ],
)
def test_unknown_labels_are_one_line(tmp_path, name, row, message):
  found = error_of(read, name, tmp_path, row)
  assert message in found and 'rows.jsonl:1: ' in found and '\n' not in found


# --- The real files, where they are at hand ----------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize('name', JUDGED)
def test_real_texts(name):
  default = pathlib.Path(__file__).parents[2].parent / 'shared' / 'data'
  public_set = catalogue.SETS[name]
  folder = pathlib.Path(os.environ.get('CSRM_DATA_DIR', default)) / (public_set.folder or name)
  if not folder.is_dir():
    pytest.skip(f'no {folder}; set CSRM_DATA_DIR to the folder of data sets')
  rows, rules = catalogue.read(name, 'test', folder), judged.rules(name)
  assert all(isinstance(row, Judged) for row in rows)
  said, sides = collections.defaultdict(set), collections.defaultdict(set)
  for row in rows:
    sides[' '.join(row.conversation[-1].content.casefold().split())].add(row.side)
    for key, share in row.verdicts.items():
      assert 0 <= share <= 1
      said[key].add(share >= 0.5)
      # What breaks a rule breaks the stricter ones, too.
      for strict in rules[key].stricter:
        assert share <= row.verdicts.get(strict, share), (row.id, key, strict)
  assert set(said) == set(rules) and all(len(found) == 2 for found in said.values())
  assert {row.side for row in rows} == set(judged.SIDES)
  # A few texts are in both files of a set; context gives a comment another meaning.
  num_torn = sum(len(found) > 1 for found in sides.values())
  assert num_torn <= len(rows) / 1000 or name == 'context_toxicity'
