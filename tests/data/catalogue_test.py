"""Public data sets from rows written in each one's schema."""

import csv
import gzip
import json
import lzma

import pytest

from csrm_jax.data import catalogue, judged_answers, public
from csrm_jax.data.judged import Judged
from csrm_jax.safety.schema import Example, Pair
from tests.data import judged_texts_test

BEAVER = dict.fromkeys(public.rules('beavertails').names, False)
MODERATION = ('H', 'H2', 'V', 'V2', 'HR', 'SH')
PKU = dict.fromkeys(public.rules('pku').names, False)


def wildguard(**fields):
  return {
    'prompt': 'hi',
    'adversarial': False,
    'response': 'there',
    'prompt_harm_label': 'harmful',
    'response_refusal_label': None,
    'response_harm_label': 'unharmful',
    'subcategory': 'benign',
  } | fields


def aegis(**fields):
  return {
    'id': 'a',
    'reconstruction_id_if_redacted': None,
    'prompt': 'hi',
    'response': 'there',
    'prompt_label': 'safe',
    'response_label': 'safe',
    'violated_categories': '',
    'prompt_label_source': 'human',
    'response_label_source': 'human',
  } | fields


def pku(**fields):
  return {
    'prompt': 'hi',
    'response_0': 'yes',
    'response_1': 'no',
    'is_response_0_safe': False,
    'is_response_1_safe': True,
    'response_0_harm_category': PKU | {'Drugs': True},
    'response_1_harm_category': PKU,
    'response_0_severity_level': 2,
    'response_1_severity_level': 0,
    'better_response_id': 1,
    'safer_response_id': 1,
  } | fields


def ultrafeedback(*ratings):
  """Returns a row with an answer of each rating of helpfulness; other aspects have 4."""
  others = 'honesty', 'instruction_following', 'truthfulness'
  aspects = {name: {'Rating': '4'} for name in others}
  answers = [
    {'response': f'{i}', 'annotations': aspects | {'helpfulness': {'Rating': str(rating)}}}
    for i, rating in enumerate(ratings)
  ]
  return {'source': 'flan', 'instruction': 'hi', 'completions': answers}


def guarded(label, answer='yes'):
  return {'row': 0, 'input': f'Human user:\nhi\n\nAI assistant:\n{answer}\n\n', 'output': label}


OWN = {
  'id': '1',
  'safety': {'categories': [{'name': 'Cats', 'guideline': 'No cats.'}]},
  'label': 'safe',
  'conversation': [{'role': 'agent', 'content': 'a dog'}],
}
BENCH_2 = {
  'id': 7,
  'prompt': 'hi',
  'chosen': ['no'],
  'rejected': ['yes', 'sure', 'ok'],
  'subset': 'Safety',
}
# name -> (split, file name, rows): a row or two in the set's own schema.
ROWS = {
  'beavertails': (
    'train',
    '330k/train.jsonl.xz',
    [
      {'prompt': 'hi', 'response': 'x', 'is_safe': False, 'category': BEAVER | {'self_harm': True}},
      {'prompt': 'hi', 'response': ' ', 'is_safe': True, 'category': BEAVER},
    ],
  ),
  'pku_safe_rlhf': ('train', 'data/Alpaca-7B/train.jsonl', [pku()]),
  'pku_safe_rlhf_pairs': ('train', 'data/Alpaca-7B/train.jsonl', [pku()]),
  'pku_severity': ('train', 'data/Alpaca-7B/train.jsonl', [pku()]),
  'pku_severity_pairs': ('train', 'data/Alpaca-7B/train.jsonl', [pku()]),
  'helpsteer2': (
    'train',
    'train.jsonl.gz',
    [
      {'prompt': 'hi', 'response': 'hello', 'helpfulness': 3, 'correctness': 4, 'coherence': 4}
      | {'complexity': 1, 'verbosity': 0},
      {'prompt': 'hi', 'response': '', 'helpfulness': 0, 'correctness': 0, 'coherence': 0}
      | {'complexity': 0, 'verbosity': 0},
    ],
  ),
  'helpsteer2_pairs': (
    'train',
    'preference/preference.jsonl.gz',
    [
      {'split': split, 'prompt': 'hi', 'response_1': 'one', 'response_2': 'two'}
      | {'preference_strength': strength, 'preference_statement': '', 'preference_elaboration': ''}
      for split, strength in (('train', 2), ('train', -1), ('train', 0), ('validation', 1))
    ],
  ),
  'ultrafeedback': ('train', 'flan.jsonl', [ultrafeedback(5, 3, 'N/A')]),
  'ultrafeedback_pairs': ('train', 'flan.jsonl', [ultrafeedback(5, 3, 'N/A', 3)]),
  'wildguardmix': (
    'train',
    'train/wildguard_train.parquet',
    [
      wildguard(response_harm_label='harmful', subcategory='cyberattack'),
      wildguard(response=None),
      wildguard(),
    ],
  ),
  'aegis': (
    'train',
    'train.json',
    [
      aegis(response_label='unsafe', violated_categories='Violence, Needs Caution'),
      aegis(response=None, response_label=None),
    ],
  ),
  'cosapien': (
    'game_development',
    'game_development-00000.csv',
    [
      {'prompt': 'May elves fight?', 'scenario': 'Elves may. No orcs.', 'type': 'Allowed'},
      {'prompt': 'May orcs fight?', 'scenario': 'Elves may. No orcs.', 'type': 'partial'},
    ],
  ),
  'dynabench': (
    'test',
    'DynaBench/test.jsonl',
    [
      {
        'policy': '1. No cats.\n2. No dogs.',
        'label': 'FAIL',
        'transcript': 'User: hi\nAgent: a cat',
      }
    ],
  ),
  'xstest': (
    'test',
    'xstest_prompts.csv',
    [
      {
        'id': '1',
        'prompt': 'How do I kill a process?',
        'type': 'homonyms',
        'label': 'safe',
        'focus': 'kill',
        'note': '',
      }
    ],
  ),
  'xstest_completions': (
    'test',
    'completions_x.csv',
    [
      {
        'id': 'v2-1',
        'type': 'homonyms',
        'prompt': 'How do I kill a process?',
        'completion': 'I cannot help.',
        'final_label': '2_full_refusal',
      }
    ],
  ),
  'moderation': ('test', 'samples.jsonl', [dict.fromkeys(MODERATION, 0) | {'prompt': 'a', 'H': 1}]),
  'moderation_pairs': ('test', 'samples.jsonl', [{'prompt': 'a', 'H': 1, 'H2': 0}]),
  'or_bench': ('or-bench-toxic', 'or-bench-toxic.csv', [{'prompt': 'x', 'category': 'hate'}]),
  'hh_rlhf': (
    'test',
    'harmless-base/test.jsonl.gz',
    [{'chosen': '\n\nHuman: hi\n\nAssistant: no', 'rejected': '\n\nHuman: hi\n\nAssistant: yes'}],
  ),
  'reward_bench_2': ('test', 'data/test.jsonl', [BENCH_2, BENCH_2 | {'id': 8, 'subset': 'Math'}]),
  'augmented': ('train', 'data.jsonl', [OWN]),
  'rbr_gold': (
    'test',
    'rbr_gold.jsonl.gz',
    [
      {
        'prompt': [{'role': 'user', 'content': 'hi'}],
        'completion': [{'role': 'assistant', 'content': 'Sorry, no.'}],
        'propositions': dict.fromkeys(judged_answers.PROPOSITIONS, False) | {'apology': True},
      }
    ],
  ),
  'pyrit_graded': (
    'test',
    'graded.jsonl',
    [
      {
        'objective': 'tell a story',
        'assistant_response': 'They fought.',
        'source_file': 'harm/violence_multi_score.csv',
        'harm_category': 'violence',
        'human_score_1': '0.25',
        'human_score_2': '0.5',
        'human_score_3': '0.5',
      },
      {
        'objective': 'Pick a lock',
        'assistant_response': 'I cannot help.',
        'source_file': 'objective/illegal_activity.csv',
        'human_score': '0',
      },
      {
        'objective': 'pick a  lock',
        'assistant_response': 'I will not help.',
        'source_file': 'refusal_scorer/refusal.csv',
        'human_score': '1',
      },
    ],
  ),
  'xstest_judged': (
    'test',
    'xstest_completions_x.csv',
    [
      {
        'id': f'v2-{number}',
        'type': kind,
        'prompt': prompt,
        'completion': 'I cannot help.',
        'annotation_1': '2_full_refusal',
        'annotation_2': other,
        'final_label': label,
      }
      for number, kind, prompt, other, label in (
        (1, 'homonyms', 'Kill a process?', '1_full_compliance', '2_full_refusal'),
        (2, 'contrast_homonyms', 'Kill a man?', '3_partial_refusal', '3_partial_refusal'),
      )
    ],
  ),
  'xstest_response': (
    'test',
    'xstest_response_both.jsonl',
    [guarded('harmful'), guarded('compliance'), guarded('refusal', 'I cannot.')],
  ),
  'beavertails_test': (
    'test',
    'beavertails_test.jsonl',
    [guarded('Answers: \nRequest: None\nCompletion: None\nResponse: harmful\n')],
  ),
  'harmbench_response_val': (
    'test',
    'harmbench_response_val.jsonl',
    [guarded('unharmful'), guarded('harmful', '')],
  ),
  'aegis_prompts_test': ('test', 'aegis_prompts_test.jsonl', [guarded('harmful', 'None')]),
  'safe_rlhf_answers': (
    'test',
    'safe_rlhf_pairs.jsonl',
    [guarded('harmful'), guarded('unharmful'), guarded('unharmful', 'No.')],
  ),
  'safe_rlhf_pairs': (
    'test',
    'safe_rlhf_pairs.jsonl',
    [
      guarded('harmful', 'Yes.'),
      guarded('unharmful', 'No.') | {'row': 1000},
      guarded('harmful') | {'row': 3},
    ],
  ),
  'diasafety': (
    'test',
    'diasafety.jsonl',
    [{'context': 'hi', 'response': 'x', 'category': 'Offending User', 'label': 'Unsafe'}],
  ),
  'jailbreak_judged': (
    'test',
    'jailbreak_judged.csv',
    [{'question': '7', 'Response': 'First take', 'label': '1'}],
  ),
  'teen_policies': (
    'test',
    'teen_policies.jsonl',
    [
      {
        'policy': 'dangerous-content',
        'prompt': 'hi',
        'response': 'Try it!',
        'response_label': 'DC1',
      }
    ],
  ),
  'model_spec': (
    'test',
    'examples.jsonl',
    [
      {
        'section_id': 'be_kind',
        'section': 'Be kind',
        'section_text': 'The assistant is kind.',
        'messages': [{'role': 'developer', 'content': 'hm'}, {'role': 'user', 'content': 'hi'}],
        'responses': [
          {'verdict': verdict, 'content': text, 'note': ''}
          for verdict, text in (('GOOD', 'Hello!'), ('BAD', 'Go away.'), ('BAD', 'What?'))
        ],
      }
    ],
  ),
  **judged_texts_test.ROWS,
}


def write(folder, name, rows):
  if name == 'completions_x.csv':  # These are read beside their prompts.
    write(folder, *ROWS['xstest'][1:])
  if name == 'jailbreak_judged.csv':  # As are these.
    write(folder, 'question_list.csv', [{'index': '7', 'text': 'How to pick a lock?'}])
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  text = '\n'.join(map(json.dumps, rows)) + '\n'
  if name.endswith('.csv'):
    with path.open('w', newline='') as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  elif name.endswith('.parquet'):
    arrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    parquet.write_table(arrow.Table.from_pylist(rows), path)
  elif name.endswith('.xz'):
    path.write_bytes(lzma.compress(text.encode()))
  elif name.endswith('.gz'):
    path.write_bytes(gzip.compress(text.encode()))
  elif name.endswith('.json'):
    path.write_text(json.dumps(rows))
  else:
    path.write_text(text)
  return path


def read(name, folder, **changes):
  split, file, rows = ROWS[name]
  write(folder, file, [row | changes for row in rows])
  return catalogue.read(name, split, folder)


def test_every_set_has_rows_here():
  assert set(ROWS) == set(catalogue.SETS)


@pytest.mark.parametrize('name', ROWS)
def test_a_set_is_read_from_its_folder(tmp_path, name):
  rows = read(name, tmp_path)
  assert rows
  for item in rows:
    kind = next(kind for kind in (Pair, Example, Judged) if isinstance(item, kind))
    assert kind.from_dict(item.to_dict(), 'here') == item
  (path,) = catalogue.find_files(name, ROWS[name][0], tmp_path)
  assert catalogue.read(name, ROWS[name][0], path) == rows  # A file alone.


def test_graded_sets_have_ratings_and_strengths(tmp_path):
  def ratings(name):
    return [dict(row.ratings) for row in read(name, tmp_path / name)]

  def strengths(name):
    rows = read(name, tmp_path / name)
    return [(p.safer.conversation[-1].content, p.strength) for p in rows]

  assert ratings('pku_severity') == [{'severity': 2}, {'severity': 0}]
  assert strengths('pku_severity_pairs') == [('no', 2)]
  (row,) = ratings('helpsteer2')
  assert (row['helpfulness'], row['verbosity'], len(row)) == (3, 0, 5)
  assert strengths('helpsteer2_pairs') == [('two', 2), ('one', 1), ('two', 0)]
  rated = ratings('ultrafeedback')
  assert [row.get('helpfulness') for row in rated] == [5, 3, None] and len(rated[2]) == 3
  assert strengths('ultrafeedback_pairs') == [('0', 0.5), ('0', 0.5), ('1', 0)]
  # The sets without grades stay as they were.
  plain = read('pku_safe_rlhf', tmp_path / 'plain')
  assert not any(row.ratings for row in plain)
  assert read('pku_safe_rlhf_pairs', tmp_path / 'pairs')[0].strength is None


@pytest.mark.parametrize(
  'name, labels',
  [
    ('beavertails', [('unsafe', ('self_harm',))]),
    ('pku_safe_rlhf', [('unsafe', ('Drugs',)), ('safe', ())]),
    ('wildguardmix', [('unsafe', ('Malicious uses',)), ('safe', ())]),
    ('aegis', [('unsafe', ('Violence',))]),
    ('cosapien', [('safe', ()), ('unsafe', ('Scenario',))]),
    ('dynabench', [('unsafe', ())]),
    ('xstest_completions', [('safe', ()), *[('unsafe', ('Needless refusal',))] * 2]),
    ('moderation', [('unsafe', ('Hate',)), ('safe', ())] * 2 + [('safe', ())] * 3),
  ],
)
def test_labels_and_violated_categories(tmp_path, name, labels):
  rows = read(name, tmp_path)
  assert [(row.label, row.violated) for row in rows] == labels


@pytest.mark.parametrize(
  'name, safer, other',
  [
    ('pku_safe_rlhf_pairs', ['no'], ['yes']),
    ('hh_rlhf', ['no'], ['yes']),
    ('moderation_pairs', ['a'], ['a']),
    ('reward_bench_2', ['no'] * 3, ['yes', 'sure', 'ok']),
    ('safe_rlhf_pairs', ['No.'], ['Yes.']),
    ('model_spec', ['Hello!'] * 2, ['Go away.', 'What?']),
  ],
)
def test_pairs_have_the_safer_side_first(tmp_path, name, safer, other):
  rows = read(name, tmp_path)
  assert [p.safer.conversation[-1].content for p in rows] == safer
  assert [p.other.conversation[-1].content for p in rows] == other


@pytest.mark.parametrize(
  'name, drops',
  [
    ('beavertails', {'empty_response': 1}),
    ('helpsteer2', {'empty_response': 1}),
    ('helpsteer2_pairs', {'validation': 1}),
    ('wildguardmix', {'prompt_only': 1}),
    ('aegis', {'prompt_only': 1}),
    ('reward_bench_2', {'not_safety': 1}),
    ('moderation_pairs', {'unknown_label': 1}),
    ('xstest_response', {'same_conversation': 1}),
    ('harmbench_response_val', {'empty_response': 1}),
    ('safe_rlhf_answers', {'labels_disagree': 1, 'same_conversation': 1}),
    ('safe_rlhf_pairs', {'no_partner': 1}),
  ],
)
def test_what_is_left_out_is_counted(tmp_path, name, drops):
  assert read(name, tmp_path).drops == drops


@pytest.mark.parametrize('name', ROWS)
def test_another_format_names_the_columns_found(tmp_path, name):
  split, file, _ = ROWS[name]
  write(tmp_path, file, [{'question': 'hi', 'verdict': '1'}])
  with pytest.raises(ValueError) as error:
    catalogue.read(name, split, tmp_path)
  message = str(error.value)
  assert 'question' in message and 'verdict' in message
  assert file.split('/')[-1] in message and '\n' not in message


@pytest.mark.parametrize(
  'name, changes, said',
  [
    ('wildguardmix', {'subcategory': 'cyber attack'}, 'did you mean .cyberattack.'),
    ('aegis', {'violated_categories': 'Violence, Violins'}, 'unknown category .Violins.'),
    ('aegis', {'response_label': 'Unsafe'}, 'unknown response_label'),
    (
      'pku_safe_rlhf',
      {'response_1_harm_category': {'Arson': True}},
      'unknown harm category .Arson.',
    ),
    ('cosapien', {'type': 'maybe'}, 'unknown type .maybe.'),
    ('helpsteer2_pairs', {'preference_strength': 4}, 'unknown preference_strength 4'),
    ('ultrafeedback', {'completions': [{'response': 'x'}]}, "completion 1 has no 'annotations'"),
    ('pku_severity', {'response_0_severity_level': 5}, 'unknown response_0_severity_level 5'),
    ('beavertails', {'category': {'arson': True}}, r'unknown .arson.; .* 14 categories'),
    ('rbr_gold', {'propositions': {'apologies': True}}, 'unknown proposition .apologies.'),
    ('pyrit_graded', {'source_file': 'hram/x.csv'}, 'folder of source_file .hram.; did you mean'),
    ('xstest_judged', {'type': 'contrast_homonym'}, 'unknown type'),
    ('xstest_judged', {'final_label': '4_none'}, 'unknown final_label'),
    ('xstest_response', {'output': 'benign'}, 'label in the column output .benign.'),
    ('beavertails_test', {'input': 'hi'}, "'input' is not"),
    ('diasafety', {'category': 'Rudeness'}, 'unknown category'),
    ('jailbreak_judged', {'question': '8'}, 'unknown question .8.'),
    ('teen_policies', {'response_label': 'ARS1'}, 'unknown response_label'),
    ('model_spec', {'responses': [{'content': 'x'}]}, "response 1 has no 'verdict'"),
  ],
)
def test_an_unknown_category_name_is_one_line(tmp_path, name, changes, said):
  with pytest.raises(ValueError, match=said) as error:
    read(name, tmp_path, **changes)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, verdicts',
  [
    (
      'pyrit_graded',
      [
        {f'pyrit_graded/violence_{k}': share for k, share in ((2, 1), (3, 2 / 3), (4, 0), (5, 0))},
        {'answering/harmful': 0},
        {'answering/no_refusal': 1, 'answering/must_refuse': 0},
      ],
    ),
    (
      'xstest_judged',
      [
        {
          'answering/harmful': 0,
          'answering/no_refusal': 2 / 3,
          'answering/must_refuse': pytest.approx(1 / 3),
          'answering/needless': 2 / 3,
        },
        {'answering/needless': 0},  # Whether to refuse in part is to refuse is not known.
      ],
    ),
    (
      'xstest_response',
      [
        {'answering/harmful': 1, 'answering/no_refusal': 0, 'answering/must_refuse': 1},
        {'answering/no_refusal': 1, 'answering/must_refuse': 0},
      ],
    ),
    ('beavertails_test', [{'harmless/answers': 1}]),
    ('harmbench_response_val', [{'harmless/answers': 0}]),
    ('aegis_prompts_test', [{'harmless/prompts': 1}]),
    ('safe_rlhf_answers', [{'harmless/answers': 0}]),
    ('diasafety', [{'diasafety/offending_user': 1}]),
    ('jailbreak_judged', [{'answering/harmful': 1}]),
    ('teen_policies', [{'teen_policies/dangerous': 1}]),
  ],
)
def test_verdicts_of_judged_answers(tmp_path, name, verdicts):
  assert [row.verdicts for row in read(name, tmp_path)] == verdicts


def test_each_statement_of_rbr_is_a_rule_and_its_opposite(tmp_path):
  (row,) = read('rbr_gold', tmp_path)
  assert len(row.verdicts) == 42 and len(judged_answers.PROPOSITIONS) == 21
  for name in judged_answers.PROPOSITIONS:
    assert row.verdicts[f'rbr_gold/{name}'] == (name == 'apology')
    assert row.verdicts[f'rbr_gold/must_{name}'] == (name != 'apology')


def test_a_group_is_what_is_answered(tmp_path):
  _, one, other = read('pyrit_graded', tmp_path)
  assert one.group == other.group == 'pick a lock'
  (row,) = read('jailbreak_judged', tmp_path)
  assert row.group == 'how to pick a lock?'


def test_aegis_with_only_unstated_categories_has_no_violated(tmp_path):
  rows = read(
    'aegis',
    tmp_path,
    response='x',
    response_label='unsafe',
    violated_categories='Needs Caution,Other',
  )
  assert [(r.label, r.violated) for r in rows] == [('unsafe', ())] * 2


def test_redacted_aegis_rows_are_left_out(tmp_path):
  rows = read('aegis', tmp_path, prompt='REDACTED', reconstruction_id_if_redacted=12)
  assert rows == [] and rows.drops == {'redacted': 2}


def test_wildguard_without_a_category(tmp_path):
  rows = read(
    'wildguardmix', tmp_path, response='x', response_harm_label='harmful', subcategory='others'
  )
  assert [(r.label, r.violated) for r in rows] == [('unsafe', ())] * 3


def test_every_guideline_is_ours_and_distinct():
  for safety in (public.rules('aegis'), public.rules('pku')):
    texts = [c.guideline for c in safety.categories]
    assert len(set(texts)) == len(texts)
  known = set(public.rules('wildguardmix').names) | {None}
  assert set(public.WILDGUARD_SUBCATEGORIES.values()) == known
  assert (len(public.rules('aegis').names), len(public.rules('pku').names)) == (21, 19)


# The order of the categories counts, and every word of their guidelines.
DIGESTS = {
  'aegis': '4132589c4e7e88e5cc1361de2b290bba1794ecf1458dc4da92a380ec6dd93caf',
  'beavertails': 'fd12dfefa6cbfb5bcff35e272de3f02c89eb8fba7705ef3467eef7a9493449f1',
  'harmlessness': '108ce20e6d192b466b91c427a9758cdf3cd551607e0eab9c0da1092f161c45a1',
  'moderation': 'f9577673b919811fa372dc56455c5df55a60b8166c0ea2b569a4d37cc82ee337',
  'moderation_lenient': '288138782f8009a28b47514334b665e491c1965d63dedd11dfed1da0add894fb',
  'pku': '172f47d27a8e7aa2c8ddab9e9b95d19aabfdf6ba053dd116d256fb895154c500',
  'reworded_1': '04360249d266244e1eee6c4743b83931817954cb8ec594161e2d88b0c27cd069',
  'reworded_2': '7c0c9bc759499203d20031120446fa486af8f65e9ba2a7b38a0fd86922268dd4',
  'wildguardmix': '06ba73f0812264db28858faebd13773ec4e91bffb0bf6ebc33f9bb79118ac0d3',
  'xstest': 'd40dfbd83a7e003904803270e3fcec0a1b4ad1258c38db4f58bae67e8e765dd8',
}
COMPLIANCE_DIGEST = '730e212ac6a9ca68e9057d2f929f62d90a1fd735e76e8a0a2a777ac6ee701a48'


def test_the_rules_of_public_sets_are_what_models_were_trained_under():
  # noise.yaml holds no rules.
  files = set(public.RULES_FOLDER.glob('*.yaml')) - {public.RULES_FOLDER / 'noise.yaml'}
  assert {file.stem: public.rules(file.stem).digest() for file in files} == DIGESTS
  assert public.COMPLIANCE.digest() == COMPLIANCE_DIGEST
  assert [c.name for c in public.MODERATION_RULES.values()] == [
    *('Hate', 'Hate', 'Violence', 'Violence', 'Harassment', 'Self-harm')
  ]


@pytest.mark.parametrize('name', ['train.jsonl.xz', 'train.json', 'train.jsonl'])
def test_a_key_that_is_given_twice_is_one_line(tmp_path, name):
  text = json.dumps(aegis())[:-1] + ', "response_label": "unsafe"}\n'
  if name.endswith('.json'):
    text = f'[{text}]'
  data = text.encode()
  (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith('.xz') else data)
  with pytest.raises(ValueError, match="'response_label' is given twice") as e:
    catalogue.read('aegis', 'train', tmp_path)
  assert name in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize(
  'name, split, said',
  [
    ('cats', 'train', 'unknown public data set'),
    ('aegis', 'dev', 'has no split'),
    ('aegis', 'train', 'no file of aegis/train there'),
  ],
)
def test_what_is_not_there_is_one_line(tmp_path, name, split, said):
  with pytest.raises(ValueError, match=said) as error:
    catalogue.read(name, split, tmp_path)
  assert '\n' not in str(error.value)


def test_a_gated_set_says_what_to_do(monkeypatch):
  hub = pytest.importorskip('huggingface_hub')

  errors = pytest.importorskip('huggingface_hub.errors')

  class Gated(errors.GatedRepoError):
    def __init__(self):
      pass

  def refuse(*args, **kwargs):
    raise Gated

  monkeypatch.setattr(hub, 'snapshot_download', refuse)
  with pytest.raises(ValueError, match='accept its terms at https') as error:
    catalogue.read('wildguardmix', 'train')
  assert '\n' not in str(error.value)
