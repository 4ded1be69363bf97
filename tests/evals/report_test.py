"""The report is whole, readable, escaped, and written all or not at all."""

import json
import math
import re

import huggingface_hub
import numpy as np
import pytest
from matplotlib import image

from csrm_jax.core import markdown
from csrm_jax.evals import figures, report
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig
from tests.evals.helpers import run, sides

_HOSTILE = 'Pay $5 or $10 | `x` <b>now</b> *go* [a](b)\n# end 漢字'


def _example(name, label, probability, rules='No dogs.', **fields):
  return Example(
    id=name,
    safety=SafetyConfig((Category('Pets', rules),)),
    conversation=(Message('user', f'{name[1:]} {_HOSTILE}'), Message('agent', _HOSTILE)),
    label=label,
    probability=probability,
    **fields,
  )


@pytest.fixture(scope='module')
def results():
  rng = np.random.default_rng(0)
  p = rng.beta(0.5, 0.5, 80)
  examples = [
    _example(
      f'e{i}', 'unsafe' if rng.random() < q else 'safe', float(q), rule_set=('$a$ | b', 'c')[i % 2]
    )
    for i, q in enumerate(p)
  ]
  scores = np.log1p(-p) - np.log(p)
  pairs = [Pair(f'p{i}', examples[i], examples[i + 1], 'strictness') for i in range(30)]
  flips = [(_example('a', 'safe', 0.1), _example('b', 'unsafe', 0.9))] * 5
  few = [_example('f', 'safe', 0.2), _example('g', 'safe', None)]
  return {
    'seen': run('classification', examples, scores, num_samples=10, description='toy | rows'),
    'few rows': run('classification', few, np.ones(2), num_samples=5),
    'none': run('classification', [], np.zeros(0), num_samples=5),
    'pairs': run('pairs', pairs, sides(scores[:30], scores[1:31]), num_samples=10),
    'flip': run('flips', flips, sides(np.ones(5), -np.ones(5)), num_samples=10),
    'four': run(
      'rule_sets',
      [
        _example('r', 'safe', 0.1, rule_set='lenient'),
        _example('s', 'unsafe', None, rules='No $x$ dogs. ' * 80),
      ],
      np.array([2.0, -3.0]),
    ),
  }


@pytest.fixture(scope='module')
def folder(results, tmp_path_factory):
  root = tmp_path_factory.mktemp('run')
  history = root / 'metrics.jsonl'
  lines = [{'step': i, 'train/loss': 1 / (i + 1), 'train/lr': None} for i in range(9)]
  text = '\n'.join(map(json.dumps, lines)) + '\n{"step": 9, "train/lo'
  history.write_text(text)
  path = report.write_report(
    root / 'report',
    results,
    title='A | toy',
    history=history,
    summary=report.summarise(results) | {'time_s': 1.5, 'odd': math.nan},
    manifest={'versions': {'jax': '1'}, 'devices': ['cpu'], 'bad': '\ud800'},
  )
  assert path == root / 'report' / 'report.md'
  return root / 'report'


def test_files_parse(folder):
  summary = json.loads((folder / 'summary.json').read_text())
  assert summary['seen/f1_best'] is not None
  assert summary['time_s'] == 1.5 and summary['odd'] is None
  assert summary['none/f1'] is None
  for key in ('pairs/accuracy_best', 'pairs/score_gap', 'flip/consistency'):
    assert isinstance(summary[key], float)
  assert not any(isinstance(v, (dict, list)) for v in summary.values())
  everything = json.loads((folder / 'metrics.json').read_text())
  assert set(everything) == {'title', 'suites', 'manifest'}
  assert 'arrays' not in everything['suites']['seen']
  assert everything['suites']['seen']['reliability']


def test_mistakes_stand_with_their_texts_unless_the_data_is_private(tmp_path):
  # The surest false alarm is not the worst: its label is half chance.
  alarms = [_example('half', 'safe', 0.5), _example('sure', 'safe', 0.01)]
  misses = [_example(f'm{i}', 'unsafe', None, violated=('Pets',)) for i in range(9)]
  scores = np.array([-9.0, -3.0, *range(1, 10)])
  results = {'own': run('classification', alarms + misses, scores, num_samples=5)}
  for texts in (True, False):
    path = report.write_report(tmp_path, results, title='t', summary={}, texts=texts)
    page = path.read_text()
    assert ('## Mistakes, with rules and text' in page) == texts
    assert (markdown.escape(_HOSTILE[:9]) in page) == ('No dogs.' in page) == texts
    assert (_HOSTILE[-2:] in (tmp_path / 'report.html').read_text()) == texts
    assert _HOSTILE[:9] not in (tmp_path / 'metrics.json').read_text()
    if texts:
      part = page.partition('## Mistakes')[2].partition('\n## ')[0]
      said = re.findall(r'^\| own \| (\w+) ', part, re.MULTILINE)
      assert said == ['sure', 'half', 'm8', 'm7', 'm6', 'm5', 'm4']


def test_figures_exist_and_hold_something(folder):
  text = (folder / 'report.md').read_text()
  named = re.findall(r'\]\((\S+\.png)\)', text)
  assert sorted(named) == sorted(p.name for p in folder.glob('*.png'))
  assert {
    'seen_reliability.png',
    'seen_precision_recall.png',
    'seen_scores.png',
    'seen_rule_sets.png',
    'pairs_gaps.png',
    'four.png',
    'training.png',
  } <= set(named)
  assert 'few_rows_reliability.png' not in named
  for name in named:
    pixels = image.imread(folder / name)
    assert pixels.shape[0] > 200 and pixels[..., :3].std() > 0.01
    # Nothing is cut off: the outermost pixels are white.
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge[:, :3] == 1).all(), name


def test_report_reads(folder):
  text = (folder / 'report.md').read_text()
  for part in (
    '## What was measured',
    '## Verdicts',
    '## Pairs',
    '## Training',
    '## Definitions',
    '**F1 ↑**',
    '**smECE ↓**',
    'versions.jax',
    '80 examples',
    '## One conversation under 2 rule sets',
    '## When only the rules change',
  ):
    assert part in text, part
  assert re.search(r'\| seen \| 0\.\d{3} \[0\.\d{3}, [01]\.\d{3}\] \|', text)
  assert text.count('| \\*best\\* |') == 0 and text.count('| *best* |') >= 2


def test_text_from_outside_cannot_make_markup(folder):
  text = (folder / 'report.md').read_text()
  assert '<b>' not in text and '\n# end' not in text
  assert text.startswith('# A \\| toy\n')
  for table in re.findall(r'(?:^\|.*\|$\n)+', text, re.MULTILINE):
    widths = {len(re.findall(r'(?<!\\)\|', line)) for line in table.splitlines()}
    assert len(widths) == 1, table


def test_second_report_replaces_the_first_and_keeps_other_files(results, folder, tmp_path):
  path = tmp_path / 'report'
  path.mkdir()
  (path / 'notes.txt').write_text('mine')
  few = {'flip': results['flip']}
  for title in ('one', 'two'):
    report.write_report(path, few, title=title, summary={'a': 1})
  assert (path / 'report.md').read_text().startswith('# two\n')
  assert (path / 'notes.txt').read_text() == 'mine'
  assert [p.name for p in tmp_path.iterdir()] == ['report']


def test_failure_leaves_nothing_behind(results, tmp_path, monkeypatch):
  def fail(*_):
    raise RuntimeError('disk full')

  monkeypatch.setattr(figures, 'save', fail)
  with pytest.raises(RuntimeError, match='disk full'):
    report.write_report(tmp_path / 'report', results, title='t', summary={})
  assert list(tmp_path.iterdir()) == []


def test_summary_must_be_flat(tmp_path):
  with pytest.raises(ValueError, match="summary\\['a'\\] is a dict"):
    report.write_report(tmp_path / 'r', {}, title='t', summary={'a': {}})
  assert list(tmp_path.iterdir()) == []


def test_figures_are_reproducible_and_leave_the_generator_alone(tmp_path):
  rng = np.random.default_rng(0)
  p = rng.random(50)
  labels = (rng.random(50) < p).astype(int)
  np.random.seed(3)
  before = np.random.get_state()[1].copy()
  paths = [tmp_path / name / 'own.png' for name in 'ab']  # a figure says its file's name
  for path in paths:
    path.parent.mkdir()
    figures.draw_reliability(path, labels, p)
  assert (np.random.get_state()[1] == before).all()
  assert paths[0].read_bytes() == paths[1].read_bytes()


def test_constant_scores_can_be_drawn(tmp_path):
  examples = [_example(f'{i}', ('safe', 'unsafe')[i % 2], 0.5, rule_set=str(i)) for i in range(24)]
  results = {'x': run('classification', examples, np.zeros(24), num_samples=3)}
  report.write_report(tmp_path / 'r', results, title='t', summary={})
  assert (tmp_path / 'r' / 'x_reliability.png').exists()


def test_read_history(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert report.read_history(path) == {}
  path.write_text(
    '{"step": 1, "a": 1.0, "b": null}\n{"step": 2, "a": 5, "c": "x"}\n'
    'rubbish\n[1]\n{"step": 2, "a": 2.0, "once": 1}\n{"step": 3, "a'
  )
  assert report.read_history(path) == {'a': {1: 1.0, 2: 2.0}}


def test_terminal_table(results):
  summary = report.summarise(results) | {
    'unseen/f1': 0.9,
    'unseen/f1_best': 0.95,
    'unseen/smece': math.nan,
  }
  text = report.terminal_table(summary, results['four'].values)
  lines = text.splitlines()
  assert max(map(len, lines)) <= 80
  assert lines[0].split() == ['value', '95%', 'interval', 'best', 'of', 'best']
  (unseen,) = [line for line in lines if line.startswith('F1, unseen rules')]
  assert unseen.split()[-3:] == ['0.900', '0.950', '94.7%']
  (smece,) = [line for line in lines if line.startswith('smECE, unseen')]
  assert smece.split()[-2:] == ['–', '–']
  for word in ('F1, seen', 'pair accuracy', 'mean score gap', 'lenient'):
    assert word in text
  assert report.terminal_table({}).splitlines()[1:] == []


def test_a_reliability_curve_ends_where_the_predictions_do(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(figures, 'save', lambda figure, path: drawn.append(figure))
  p = np.repeat([0.05, 0.95], 30)
  figures.draw_reliability(tmp_path / 'own_reliability.png', (p > 0.5).astype(float), p)
  (ax,) = drawn[0].axes
  x, y = ax.lines[-1].get_data()
  assert np.isnan(y[(x > 0.2) & (x < 0.8)]).all() and np.isfinite(y[x < 0.08]).all()
  assert ax.get_title('left') == 'own reliability, n = 60'


def test_terminal_table_shows_any_data():
  summary = {'mine/strict': 0.5, 'mine/strict_low': 0.4, 'mine/strict_high': 0.6, 'time_s': 1.0}
  assert 'no row with a label was held out' in report.terminal_table({'time_s': 1.0})
  (line,) = report.terminal_table(summary | {'other_without_rules/f1': 0.1}).splitlines()[1:]
  assert re.search(r', mine +0\.500  \[0\.400, 0\.600\]', line)


def test_terminal_table_says_thresholds_and_what_was_not_flagged():
  summary = report.flatten(
    {
      'own': {
        'f1': {'value': 0.0, 'low': 0.0, 'high': 0.0, 'best': None, 'note': 'nothing was flagged'},
        'f1_tuned': {
          'value': 0.2,
          'low': 0.1,
          'high': 0.3,
          'best': None,
          'note': 'threshold 0.123',
        },
        'smece': {'value': 0.1, 'low': 0.1, 'high': 0.2, 'best': None},
        'smece_constants': {'value': 0.05, 'low': None, 'high': None, 'best': None},
      }
    }
  )
  lines = report.terminal_table(summary).splitlines()
  assert max(map(len, lines)) <= 80
  assert [' '.join(line.split()) for line in lines[1:]] == [
    'F1, own 0.000 nothing was flagged –',
    'F1, tuned, own 0.200 [0.100, 0.300] – threshold 0.123',
    'smECE, own 0.100 [0.100, 0.200] –',
    'of 0.97/0.03, own 0.050 –',
  ]


def test_escape():
  assert markdown.escape('a|b\n\n# c') == 'a\\|b \\# c'
  assert markdown.number(None) == markdown.number(math.nan) == '–'
  assert markdown.number(0.12345) == '0.123'


def test_the_first_page_says_what_it_is_and_the_html_is_one_file(results, tmp_path):
  path = report.write_report(
    tmp_path / 'report', results, title='A <b>toy</b>', summary={}, about={'seed': 3, 'data': '<i>'}
  )
  text, page = path.read_text(), path.with_suffix('.html').read_text()
  first = text[: text.index('## What was measured')]
  assert '| seed | 3 |' in first and '## In short' in first and '\n5. ' in first
  assert first.count('.png)') == 1  # one conversation under several rules
  assert '## As in the paper' not in text
  assert page.count('src="data:image/png;base64,') == text.count('.png)')
  assert '.png"' not in page and '<b>' not in page and '<i>' not in page
  assert '<table>' in page and '<ol>' in page
  card = huggingface_hub.ModelCard.load(tmp_path / 'report' / 'model_card.md')
  assert card.data.library_name == 'csrm_jax' and 'base_model' not in card.data.to_dict()
  for part in ('## Intended use', '## Limits', '| seed | 3 |', '## Metrics', '| F1 ↑ |'):
    assert part in card.text, part
