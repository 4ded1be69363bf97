"""The tables of results in README.md and docs/ are those of tests/results."""

import json
import re

import pytest

from csrm_jax.ruleworld.shortcuts import measure
from tests import readme_tables


def test_the_pages_have_the_numbers_of_the_files():
  pages = readme_tables.read_pages()
  assert readme_tables.written(pages) == pages, 'run python tests/readme_tables.py'


def test_every_table_of_results_has_a_file():
  missing = [
    header for page in readme_tables.read_pages().values() for header in readme_tables.missing(page)
  ]
  assert not missing, f'run python tests/readme_tables.py --new=NAME for {missing}'


def test_headlines_in_the_text_are_those_of_the_files():
  def row(name, title):
    return next(x for x in results[name]['table']['rows'] if x[0] == title)

  results, pages = readme_tables.read_results(), readme_tables.read_pages()
  readme = ' '.join(pages[readme_tables.README].split())
  answer = row('real', '21 statements about an answer, seen rules, AUROC')
  assert f'AUROC of {answer[1]["mean"]:.2f} ' in readme
  assert f'regression for each rule {answer[2]:.2f}.' in readme
  flip = row('real', 'balanced flip, unseen rules')[1]
  assert f'({flip["mean"]:.2f} ± {flip["half"]:.2f})' in readme
  rules = [row('alignment', name) for name in ('film club', 'pet forum')]
  best, sample = ([f'{r[i]:.2f}' for r in rules] for i in (5, 4))
  assert f'({" and ".join(best)} against {" and ".join(sample)})' in readme
  adds = row('claims', 'CCA, with SA')[2], row('claims', 'SA, with CCA')[7]
  for gain in adds:
    assert f'+ {gain["mean"]:.2f} ± {gain["half"]:.2f})' in readme
  reached, best = row('tiers', '**F1, model**')[3:], row('tiers', 'F1, best')[3:]
  shares = [f'{100 * r["mean"] / b:.0f} %' for r, b in zip(reached, best, strict=True)]
  assert 'New wordings reach {} of the best there, and both {}.'.format(*shares) in readme
  tiers = ('seen rules', 'new wordings', 'new topics', 'unseen rules')
  for _, f1, _, best, _ in (row('default', f'F1, {tier}') for tier in tiers):
    assert f'{100 * f1 / best:.0f} % ' in readme
  share = row('default', 'F1, new topics')[-1]
  front = pages[readme_tables.ROOT / 'docs' / 'index.md']
  assert f'{share:.0f} % of the best F1' in ' '.join(front.split())


@pytest.mark.parametrize('name', readme_tables.read_results())
def test_files_say_how_their_numbers_were_made(name):
  result = readme_tables.read_results()[name]
  assert all(result['made'][field] for field in readme_tables.MADE)
  assert any(result['table']['header']), 'a table is found by its header'
  text = (readme_tables.RESULTS / f'{name}.json').read_text('utf-8')
  assert text == readme_tables.dump(json.loads(text))
  rendered = readme_tables.render(result['table'])
  assert readme_tables.parse(rendered) == result['table']


def test_a_number_that_was_changed_by_hand_is_seen():
  table = '| run | F1 | gap |\n|---|---|---|\n| a | 0.950 | 1.2 |\n'
  assert readme_tables.missing(f'# T\n\n{table}\n') == ['| run | F1 | gap |']
  pages = readme_tables.read_pages()
  readme = pages[readme_tables.README]
  changed = re.sub(r'(?<=^\| F1, unseen rules \| )[\d.]+', '0.123', readme, flags=re.MULTILINE)
  assert changed != readme
  assert readme_tables.written(pages | {readme_tables.README: changed}) == pages
  with pytest.raises(
    ValueError, match=r'no page has a table with the header of tests/results/default\.json'
  ):
    readme_tables.written(
      {path: page.replace('95% interval | best', '95% | best') for path, page in pages.items()}
    )


def _write_run(workdir, seed, side, value, applied=True):
  """Writes what a run leaves, with this value for each metric; calibrated it is .3 lower."""
  splits = ('seen', 'new_topics', 'new_wordings', 'unseen')
  keys = [f'{split}/{metric}' for split in splits for metric in ('f1', 'auprc', 'smece')]
  keys += [key for key in readme_tables._ABLATION_KEYS.values() if 'loaded' not in key]
  smece = [{'smece': {'value': v, 'low': v, 'high': v}} for v in (value, value - 0.3)]
  suite = {'metrics': smece[0], 'calibrated': {'metrics': smece[1]}}
  files = {
    'report/summary': dict.fromkeys(keys, value),
    'report/metrics': {'suites': dict.fromkeys(splits, suite) | {'pairs': {}}},
    'calibration': {'applied': applied},
    'manifest': {
      'platform': 'Linux-x86_64',
      'num_cpus': 2,
      'python': '3.12',
      'packages': {'jax': '1'},
      'commit': 'abc',
    },
    'config': {
      'seed': seed,
      'eval': {'ruleworld_side': side},
      'model': {'overrides': {'dtype': 'float32'}},
    },
  }
  (workdir / 'report').mkdir(parents=True)
  for name, content in files.items():
    (workdir / f'{name}.json').write_text(json.dumps(content))


def test_tiers_are_of_one_side_and_the_seed_is_the_unit(tmp_path):
  shortcuts = measure(num_rows=60, num_samples=0)
  (tmp_path / 's.json').write_text(json.dumps(shortcuts))
  for seed, f1 in ((0, 0.5), (1, 0.7)):
    _write_run(tmp_path / str(seed), seed, 'dev', f1)
  made = readme_tables.take_tiers(tmp_path / 's.json', [tmp_path / '0', tmp_path / '1'])
  assert made['made']['seeds'] == [0, 1]
  rows = {row[0]: row[1:] for row in made['table']['rows']}
  # Student's t of one degree of freedom, 12.706, times .1.
  assert rows['**F1, model**'] == [{'mean': 0.6, 'half': 1.271}] * 4
  assert rows['**smECE, model as loaded**'][0]['mean'] == 0.3
  assert rows['F1, best'][3] == round(
    shortcuts['tiers']['both']['judges']['oracle']['f1']['value'], 3
  )
  rendered = readme_tables.render(made['table'])
  assert readme_tables.parse(rendered) == made['table']
  (tmp_path / 's.json').write_text(json.dumps(shortcuts | {'side': 'test'}))
  with pytest.raises(ValueError, match='several sides'):
    readme_tables.take_tiers(tmp_path / 's.json', [tmp_path / '0'])


def test_ablations_are_differences_of_runs_of_one_seed(tmp_path):
  for i, name in enumerate(('full', 'no_cca', 'no_sa', 'no_aug')):
    for seed in range(3):
      # The seeds lie far apart, the runs of a seed .1 each. One calibration did not help.
      workdir = tmp_path / f'{name}-seed{seed}'
      _write_run(workdir, seed, 'test', seed - 0.1 * i, applied=name != 'no_aug')
  made = readme_tables.take_ablations(tmp_path)
  rows = {row[0]: row[1:] for row in made['ablations']['table']['rows']}
  assert list(rows) == ['full', '−CCA: SA alone', 'CCA alone', '−SA: neither']
  assert rows['full'][0] == {
    'mean': 1.0,
    'half': 2.484,
  }  # Student's t of two degrees, 4.303, × 1/√3
  claims = {row[0]: row[1:] for row in made['claims']['table']['rows']}
  assert claims['CCA, with SA'] == [{'mean': 0.1, 'half': 0.0}] * len(readme_tables._ABLATION_KEYS)
  # What is not applied is not lower by .3.
  assert claims['SA, without CCA'][5] == {'mean': -0.1, 'half': 0.0}
  assert claims['both'][0] == {'mean': 0.3, 'half': 0.0}
  assert made['claims']['made']['seeds'] == [0, 1, 2]
  assert '--seeds=0,1,2 --split=test' in made['claims']['made']['command']
  for result in made.values():
    assert readme_tables.parse(readme_tables.render(result['table'])) == result['table']


@pytest.mark.parametrize(
  ('text', 'cell'),
  [
    ('0.950', (0.95, 3, '{}')),
    ('96.1%', (96.1, 1, '{}%')),
    ('−0.35 [−1.00, 0.46]', ([-0.35, -1.0, 0.46], 2, '{}')),
    ('2.5 % [0.0, 5.8]', ([2.5, 0.0, 5.8], 1, '{} %')),
    ('0.911–0.940', ([0.911, 0.94], 3, '{}')),
    ('0.622 ± 0.185', ({'mean': 0.622, 'half': 0.185}, 3, '{}')),
    ('1.43e16', ('1.43e16', None, '{}')),
    ('', (None, None, '{}')),
  ],
)
def test_cells_are_numbers_and_come_back(text, cell):
  assert readme_tables.parse_cell(text) == cell
  value, digits, form = cell
  assert readme_tables.cell_text(value, digits or 0, form) == text


def test_the_first_table_is_taken_from_a_run(tmp_path):
  summary = {
    'unseen/f1': 0.95,
    **{'unseen/f1_low': 0.9391, 'unseen/f1_high': 0.9609, 'unseen/f1_best': 0.96},
    **{'unseen/smece': 0.0333, 'unseen/smece_constants': 0.018, 'pairs/score_gap': 7.234},
  }
  manifest = {
    'num_cpus': 2,
    'platform': 'Linux-6.1-x86_64-with-glibc2.36',
    'python': '3.11.7',
    'packages': {'jax': '0.10.2'},
  }
  (tmp_path / 'report').mkdir()
  for name, content in (
    ('report/summary.json', summary),
    ('manifest.json', manifest),
    ('config.json', {'seed': 3}),
    ('calibration.json', {'applied': False}),
    ('report/metrics.json', {'suites': {}}),
  ):
    (tmp_path / name).write_text(json.dumps(content))
  taken = readme_tables.take_default(tmp_path)
  text = readme_tables.render(taken['table'])
  assert '| F1, unseen rules | 0.950 | 0.939–0.961 | 0.960 | 99.0% |' in text
  assert '| … of 0.97 or 0.03, unseen rules | 0.018 | | | |' in text
  assert '| mean score gap, nats | 7.23 | | | |' in text
  assert taken['made']['machine'] == '2 CPUs (Linux, x86_64), Python 3.11.7, JAX 0.10.2'
  assert taken['made']['seeds'] == [3] and taken['made']['commit']
