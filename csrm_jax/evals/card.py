"""The model card of a run, in the form of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from csrm_jax.core.markdown import escape, is_number, table
from csrm_jax.evals.results import TEXTS, Result, title_of

NAME = 'model_card.md'
_METRICS = ('f1', 'auprc', 'smece', 'accuracy', 'consistency')


def text(
  title: str, results: Mapping[str, Result], about: Mapping[str, Any], said: Sequence[str]
) -> str:
  """Returns the card: intended use, data, limits and metrics; `said` are findings.sentences."""
  header = {
    'library_name': 'csrm_jax',
    'tags': ['safety', 'reward-model', 'jax'],
    'pipeline_tag': 'text-classification',
  }
  base = str(about.get('model', ''))
  if base and not base.startswith(('builtin:', '/', '.', '~')) and base.count('/') == 1:
    header['base_model'] = base.partition('@')[0]
  rows = []
  for name, result in results.items():
    for metric in _METRICS:
      found = (result.metrics or {}).get(metric)
      if found and is_number(found['value']):
        low, high = found['low'], found['high']
        within = f'{low:.3f} to {high:.3f}' if is_number(low) and is_number(high) else ''
        rows.append((escape(name), escape(title_of(metric)), f'{found["value"]:.3f}', within))
  facts = [(escape(key), escape(value)) for key, value in about.items()]
  parts = [f'# {escape(title)}', '## Intended use', TEXTS['use'], '## Model and data']
  parts += [table(('', ''), facts), '## Limits', TEXTS['limits']]
  if said:
    parts += ['## In short', '\n'.join(f'{i}. {escape(line)}' for i, line in enumerate(said, 1))]
  if rows:
    parts += ['## Metrics', table(('test', 'metric', 'value', '95% interval'), rows)]
  front = yaml.safe_dump(header, sort_keys=False)
  return f'---\n{front}---\n\n' + '\n\n'.join(parts) + '\n'
