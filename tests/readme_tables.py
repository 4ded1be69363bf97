"""Writes the tables of results in README.md and docs/ from tests/results/*.json.

python tests/readme_tables.py              # writes the tables into the pages
python tests/readme_tables.py --new=NAME   # makes tests/results/NAME.json of a table without one
python tests/readme_tables.py --default=/tmp/rm  # takes the first table from that work directory
python tests/readme_tables.py --tiers shortcuts.json RUN…  # and that of tiers, from runs over seeds
python tests/readme_tables.py --ablations=SWEEP  # and those of ablations, from a sweep's folder

A file holds one table, found in the pages by its header, and how its numbers were made: command,
seeds, commit, machine. To change a number change the file, and write. A cell is a number, [value,
low, high], [low, high], {mean, half} or text; `digits` and `forms` (such as "{}%") are those of the
columns, or of the rows where these differ.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from csrm_jax.evals import bootstrap
from csrm_jax.ruleworld.shortcuts import TIERS

ROOT = pathlib.Path(__file__).parents[1]
README, RESULTS = ROOT / 'README.md', ROOT / 'tests' / 'results'
PAGES = (README, *sorted((ROOT / 'docs').rglob('*.md')))
# What is to be known of how a table's numbers were made; 'unknown' is said as such.
MADE = ('command', 'seeds', 'commit', 'machine', 'source')
_TABLE = re.compile(r'(?:^\|.*\|\n)+', re.MULTILINE)
_NUMBER = r'[-−]?\d+(?:\.\d+)?'
_FORMS = ('{}', '{}%', '{} %')


def render(table: dict[str, Any]) -> str:
  """Returns the table in Markdown."""
  lines = [table['header'], None]
  for i, row in enumerate(table['rows']):
    by_row = table.get('by_row', False)
    places = [i if by_row else j for j in range(len(row))]
    lines.append(
      [
        cell_text(c, table['digits'][k], table['forms'][k])
        for c, k in zip(row, places, strict=True)
      ]
    )
  rule = '|' + '---|' * len(table['header'])
  text = [rule if line is None else f'| {" | ".join(line)} |' for line in lines]
  return '\n'.join(line.replace('|  |', '| |').replace('|  |', '| |') for line in text) + '\n'


def cell_text(cell: Any, digits: int, form: str = '{}') -> str:
  """Returns a cell as a page shows it."""
  if cell is None or isinstance(cell, str):
    return cell or ''

  def text(x):
    return f'{x:.{digits}f}'.replace('-', '−')

  if isinstance(cell, dict):
    return f'{text(cell["mean"])} ± {text(cell["half"])}'
  if isinstance(cell, list):
    *value, low, high = map(text, cell)
    return f'{form.format(value[0])} [{low}, {high}]' if value else f'{low}–{high}'
  return form.format(text(cell))


def parse_cell(text: str) -> Any:
  """Returns the cell, its digits and its form; text without a number of ours stays text."""
  for form in _FORMS:
    value = re.escape(form).replace(r'\{\}', f'({_NUMBER})')
    for pattern in (value, rf'{value} \[({_NUMBER}), ({_NUMBER})\]'):
      if match := re.fullmatch(pattern, text):
        numbers = [_parse(x) for x in match.groups()]
        return numbers if len(numbers) > 1 else numbers[0], _digits(match[1]), form
  if match := re.fullmatch(rf'({_NUMBER}) ± ({_NUMBER})', text):
    return {'mean': _parse(match[1]), 'half': _parse(match[2])}, _digits(match[1]), '{}'
  if match := re.fullmatch(rf'({_NUMBER})–({_NUMBER})', text):
    return [_parse(match[1]), _parse(match[2])], _digits(match[1]), '{}'
  return text or None, None, '{}'


def _parse(text: str) -> float:
  return float(text.replace('−', '-')) if '.' in text else int(text.replace('−', '-'))


def _digits(text: str) -> int:
  return len(text.partition('.')[2])


def read_pages() -> dict[pathlib.Path, str]:
  """Returns {path: text} of README.md and the pages of docs/."""
  return {path: path.read_text('utf-8') for path in PAGES}


def read_tables(page: str) -> dict[str, str]:
  """Returns {header line: table} of a page."""
  tables = [match[0] for match in _TABLE.finditer(page)]
  return {table.partition('\n')[0]: table for table in tables}


def holds_results(table: str) -> bool:
  """Returns whether most rows of a table have a number of ours."""
  rows = [_cells(line)[1:] for line in table.splitlines()[2:]]
  return sum(any(re.match(_NUMBER, cell) for cell in row) for row in rows) > len(rows) / 2


def _cells(line: str) -> list[str]:
  return [cell.strip() for cell in line.strip()[1:-1].split('|')]


def parse(table: str) -> dict[str, Any]:
  """Returns the table that `render` gives back."""
  header, _, *lines = map(_cells, table.splitlines())
  parsed = [[parse_cell(cell) for cell in line] for line in lines]
  columns = list(zip(*parsed, strict=True))
  by_row = not _agree(columns) and _agree(parsed)
  shared = [_commonest(part) for part in (parsed if by_row else columns)]
  rows = []
  for i, (row, texts) in enumerate(zip(parsed, lines, strict=True)):
    fits = [how == shared[i if by_row else j] for j, (_, *how) in enumerate(row)]
    # What is written otherwise than the rest stays text.
    rows.append([c if fit else x or None for (c, *_), fit, x in zip(row, fits, texts, strict=True)])
  digits, forms = zip(*shared, strict=True)
  return {
    'header': header,
    'by_row': by_row,
    'digits': [x or 0 for x in digits],
    'forms': list(forms),
    'rows': rows,
  }


def _agree(parts: Sequence[Sequence[tuple]]) -> bool:
  return all(len({tuple(how) for _, *how in part if how[0] is not None}) < 2 for part in parts)


def _commonest(part: Sequence[tuple]) -> list:
  found = [tuple(how) for _, *how in part if how[0] is not None]
  return list(max(found, key=found.count)) if found else [None, '{}']


def read_results() -> dict[str, dict[str, Any]]:
  """Returns {name: what tests/results/NAME.json holds}."""
  return {path.stem: json.loads(path.read_text('utf-8')) for path in sorted(RESULTS.glob('*.json'))}


def header_of(table: dict[str, Any]) -> str:
  """Returns the header line by which a table is found."""
  return render(table).partition('\n')[0]


def written(pages: dict[pathlib.Path, str]) -> dict[pathlib.Path, str]:
  """Returns the pages with all tables as the files have them; a table none has is a ValueError."""
  pages = dict(pages)
  for name, result in read_results().items():
    table = render(result['table'])
    header = table.partition('\n')[0]
    there = {path: read_tables(page).get(header) for path, page in pages.items()}
    if not any(there.values()):
      raise ValueError(f'no page has a table with the header of tests/results/{name}.json')
    for path, old in there.items():
      if old:
        pages[path] = pages[path].replace(old, table)
  return pages


def missing(page: str) -> list[str]:
  """Returns the headers of a page's tables of results that no file of tests/results makes."""
  known = {header_of(result['table']) for result in read_results().values()}
  tables = read_tables(page).items()
  return [header for header, table in tables if header not in known and holds_results(table)]


def dump(result: dict[str, Any]) -> str:
  """Returns the JSON of a file, a row of the table on each line."""
  text, rows = json.dumps(result, indent=2, ensure_ascii=False), result['table']['rows']
  shown = ',\n'.join('      ' + json.dumps(row, ensure_ascii=False) for row in rows)
  start = text.index('"rows": [') + len('"rows": [')
  # The rows are the last field of the table.
  end = text.index('\n    ]\n  }', start)
  return text[:start] + '\n' + shown + text[end:] + '\n'


# Rows of the first table -> the key of a run's summary.
_DEFAULT = {
  'F1, seen rules': 'seen/f1',
  'F1, new topics': 'new_topics/f1',
  'F1, new wordings': 'new_wordings/f1',
  'F1, unseen rules': 'unseen/f1',
  'AUPRC, seen rules': 'seen/auprc',
  'AUPRC, unseen rules': 'unseen/auprc',
  'smECE, seen rules': 'seen/smece',
  'smECE, unseen rules': 'unseen/smece',
  '… as loaded, seen rules': 'seen/smece_loaded',
  '… as loaded, unseen rules': 'unseen/smece_loaded',
  '… of 0.97 or 0.03, seen rules': 'seen/smece_constants',
  '… of 0.97 or 0.03, unseen rules': 'unseen/smece_constants',
  'pair accuracy, unseen rules': 'pairs/accuracy',
  'mean score gap, nats': 'pairs/score_gap',
  'flip consistency, unseen rules': 'flip/consistency',
}
_SHARES = ('f1', 'auprc', 'accuracy')


def _read_run(workdir: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Returns (summary, manifest, config) of a run of configs/rm.py.

  The summary has also `smece_loaded` of each suite of verdicts: with the calibration that
  `csrm_jax.load` applies, which is fitted on other rows.
  """
  summary, manifest, config, metrics, calibration = (
    json.loads((workdir / f'{name}.json').read_text('utf-8'))
    for name in ('report/summary', 'manifest', 'config', 'report/metrics', 'calibration')
  )
  for name, suite in metrics['suites'].items():
    if calibrated := suite.get('calibrated'):
      found = (calibrated if calibration['applied'] else suite)['metrics']['smece']
      for end, part in (('', 'value'), ('_low', 'low'), ('_high', 'high')):
        summary[f'{name}/smece_loaded{end}'] = found[part]
  return summary, manifest, config


def take_default(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what default.json holds of a run of the default job."""
  summary, manifest, config = _read_run(workdir)
  rows = []
  for title, key in _DEFAULT.items():
    value, low, high, best = (summary.get(f'{key}{end}') for end in ('', '_low', '_high', '_best'))
    share = best and key.rpartition('/')[2] in _SHARES and round(100 * value / best, 1)
    numbers = [value, None if low is None else [low, high], best]
    if key.endswith('score_gap'):
      rows.append([title, *(cell_text(cell, 2) for cell in numbers), None])
    else:
      rows.append([title, *(_rounded(cell) for cell in numbers), share or None])
  commit = subprocess.run(
    ['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True
  )
  return {
    'made': {
      'command': 'python -m csrm_jax.main --config=configs/rm.py --workdir=/tmp/rm',
      'seeds': [config['seed']],
      'commit': commit.stdout.strip() or 'unknown',
      'machine': _machine(manifest),
      'source': 'report/summary.json of the run',
    },
    'table': {
      'header': ['', 'value', '95% interval', 'best', 'of best'],
      'by_row': False,
      'digits': [0, 3, 3, 3, 1],
      'forms': ['{}', '{}', '{}', '{}', '{}%'],
      'rows': rows,
    },
  }


# Rows of the table of tiers: (title, the judge of --shortcuts, or '' for the model, metric).
_TIER_ROWS = (
  ('F1, all unsafe', 'all unsafe', 'f1'),
  ('F1, topic name and usual severity', 'topic name, usual severity', 'f1'),
  ('F1, bag of words', 'bag of words, rules and reply', 'f1'),
  ('**F1, model**', '', 'f1'),
  ('F1, best', 'oracle', 'f1'),
  ('AUPRC, rules hidden', 'rules hidden, n-grams', 'auprc'),
  ('AUPRC, bag of words', 'bag of words, rules and reply', 'auprc'),
  ('**AUPRC, model**', '', 'auprc'),
  ('AUPRC, best', 'oracle', 'auprc'),
  ('smECE, two constants', 'two constants, letter', 'smece'),
  ('**smECE, model**', '', 'smece'),
  ('**smECE, model as loaded**', '', 'smece_loaded'),
)


def take_tiers(shortcuts: pathlib.Path, workdirs: Sequence[pathlib.Path]) -> dict[str, Any]:
  """Returns what tiers.json holds: shortcuts beside runs of several seeds, mean ± half of 95 %."""
  found = json.loads(shortcuts.read_text('utf-8'))
  summaries, manifests, configs = zip(*map(_read_run, workdirs), strict=True)
  sides = {found['side'], *(config['eval']['ruleworld_side'] for config in configs)}
  if len(sides) != 1:
    raise ValueError(f'shortcuts and runs are of several sides: {sorted(sides)}')
  rows = []
  for title, judge, metric in _TIER_ROWS:
    row = [title]
    for tier, name in TIERS.items():
      if judge:
        row.append(round(found['tiers'][tier]['judges'][judge][metric]['value'], 3))
      else:
        row.append(_over_seeds([summary[f'{name}/{metric}'] for summary in summaries]))
    rows.append(row)
  first = f'python -m csrm_jax.ruleworld --shortcuts --side={found["side"]}; '
  return {
    'made': _made_of_runs(manifests, configs, first),
    'table': _seeds_table(['', *TIERS], rows),
  }


# Rows of the tables of ablations: (what the run has of CCA and SA, the run of the sweep).
_ABLATIONS = {
  'full': 'full',
  '−CCA: SA alone': 'no_cca',
  'CCA alone': 'no_sa',
  '−SA: neither': 'no_aug',
  'rules hidden': 'rules_blind',
}
_ABLATION_KEYS = {
  'F1, seen': 'seen/f1',
  'F1, unseen': 'unseen/f1',
  'AUPRC, unseen': 'unseen/auprc',
  'F1, by degree': 'degree/f1',
  'smECE, unseen': 'unseen/smece',
  '… as loaded': 'unseen/smece_loaded',
  'pairs, unseen': 'pairs/accuracy',
  'flips': 'flip/consistency',
}


def take_ablations(sweep: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns what ablations.json and claims.json hold of a folder of launch/sweep.py.

  Claims are differences of runs of the same seeds, mean ± half of the 95% interval.
  """
  runs = {
    name: {run[2]['seed']: run for run in map(_read_run, sorted(sweep.glob(f'{name}-seed*')))}
    for name in _ABLATIONS.values()
  }
  summaries = {name: {seed: of[seed][0] for seed in sorted(of)} for name, of in runs.items()}

  def differences(a: str, b: str) -> list[Any]:
    seeds = sorted(summaries[a].keys() & summaries[b].keys())
    return [
      _over_seeds([summaries[a][s][key] - summaries[b][s][key] for s in seeds])
      for key in _ABLATION_KEYS.values()
    ]

  full = [runs['full'][seed] for seed in summaries['full']]
  made = _made_of_runs([run[1] for run in full], [run[2] for run in full])
  rows = [
    [
      title,
      *(_over_seeds([s[key] for s in summaries[name].values()]) for key in _ABLATION_KEYS.values()),
    ]
    for title, name in _ABLATIONS.items()
    if summaries[name]
  ]
  claims = [
    ['CCA, with SA', *differences('full', 'no_cca')],
    ['CCA, without SA', *differences('no_sa', 'no_aug')],
    ['SA, with CCA', *differences('full', 'no_sa')],
    ['SA, without CCA', *differences('no_cca', 'no_aug')],
    ['both', *differences('full', 'no_aug')],
  ]
  return {
    'ablations': {'made': made, 'table': _seeds_table(['run', *_ABLATION_KEYS], rows)},
    'claims': {'made': made, 'table': _seeds_table(['what adds', *_ABLATION_KEYS], claims)},
  }


def _seeds_table(header: list[str], rows: list[list[Any]]) -> dict[str, Any]:
  num = len(header)
  return {
    'header': header,
    'by_row': False,
    'digits': [0, *[3] * (num - 1)],
    'forms': ['{}'] * num,
    'rows': rows,
  }


def _made_of_runs(
  manifests: Sequence[dict[str, Any]], configs: Sequence[dict[str, Any]], first: str = ''
) -> dict[str, Any]:
  """Returns how numbers of a sweep were made: of runs that differ in their seeds."""
  seeds = [config['seed'] for config in configs]
  side, dtype = (configs[0]['eval']['ruleworld_side'], configs[0]['model']['overrides']['dtype'])
  return {
    'command': f'{first}python launch/sweep.py --config=configs/rm.py'
    f' --seeds={",".join(map(str, seeds))} --split={side}'
    f' --config.model.overrides.dtype={dtype}',
    'seeds': seeds,
    'commit': ', '.join(sorted({manifest.get('commit') or 'unknown' for manifest in manifests})),
    'machine': _machine(manifests[0]),
    'source': 'report/summary.json of the runs',
  }


def _over_seeds(values: Sequence[float]) -> Any:
  """Returns mean ± half of the 95% t-interval over seeds; of one seed its value."""
  if len(values) == 1:
    return round(values[0], 3)
  mean, half = bootstrap.mean_and_interval(values)
  return {'mean': round(mean, 3), 'half': round(half, 3)}


def _machine(manifest: dict[str, Any]) -> str:
  system = manifest['platform'].split('-')[0]
  processor = re.search(r'x86_64|aarch64|arm64|$', manifest['platform'])
  return (
    f'{manifest["num_cpus"]} CPUs ({system}, {processor[0]}), Python'
    f' {manifest["python"]}, JAX {manifest["packages"]["jax"]}'
  )


def _rounded(cell: Any) -> Any:
  if cell is None:
    return None
  return [round(x, 3) for x in cell] if isinstance(cell, list) else round(cell, 3)


def main() -> int:
  """Returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--new', metavar='NAME', default='', help='of a table without a file')
  parser.add_argument('--default', metavar='WORKDIR', default='', help='of the default job')
  parser.add_argument(
    '--tiers', metavar='PATH', nargs='+', default=(), help='--shortcuts and runs over seeds'
  )
  parser.add_argument('--ablations', metavar='DIR', default='', help='of launch/sweep.py')
  args = parser.parse_args()
  pages = read_pages()
  if args.ablations:
    for name, result in take_ablations(pathlib.Path(args.ablations)).items():
      (RESULTS / f'{name}.json').write_text(dump(result), 'utf-8')
  if args.tiers:
    shortcuts, *workdirs = map(pathlib.Path, args.tiers)
    (RESULTS / 'tiers.json').write_text(dump(take_tiers(shortcuts, workdirs)), 'utf-8')
  if args.default:
    result = take_default(pathlib.Path(args.default))
    (RESULTS / 'default.json').write_text(dump(result), 'utf-8')
  if not args.new:
    for path, text in written(pages).items():
      path.write_text(text, 'utf-8')
    return 0
  found = [(page, header) for page in pages.values() for header in missing(page)]
  if not found:
    print('every table of results has its file', file=sys.stderr)
    return 2
  page, header = found[0]
  made = dict.fromkeys(MADE, '')
  table = parse(read_tables(page)[header])
  (RESULTS / f'{args.new}.json').write_text(dump({'made': made, 'table': table}), 'utf-8')
  print(f'{RESULTS / args.new}.json: {header}; say there how its numbers were made')
  return 0


if __name__ == '__main__':
  sys.exit(main())
