"""The engine that stands behind the endpoints: what goes into a batch, and what it comes to."""

import dataclasses

import numpy as np
import pytest

from csrm_jax.safety import schema, templates
from csrm_jax.serve import engine as engine_lib
from tests.serve import serving


@pytest.mark.parametrize('order', templates.ORDERS)
def test_rows_hold_several_prompts(order):
  """Conversations under one policy, or policies for one conversation, stand in one row."""
  layout = dataclasses.replace(serving.SPEC.layout, order=order)
  # A window: it must count tokens, not places of the row.
  model = dataclasses.replace(serving.SPEC.model, sliding_window=40)
  spec = dataclasses.replace(serving.SPEC, layout=layout, model=model)
  weights = serving.params()
  engine = engine_lib.Engine(
    spec,
    weights,
    serving.TOKENIZER,
    engine_lib.Lengths((128,), (256,), 384, 256),
    prefix_bytes=1 << 20,
    wait_s=0.05,
    deadline_s=20,
  )
  talks = [(schema.Message('user', 'Pets?'), schema.Message('agent', f'{i} dogs.')) for i in '12']
  sets = [schema.SafetyConfig((schema.Category(name, f'No {name}.'),)) for name in ('dogs', 'cats')]
  rows = [schema.Example('', rules, talk) for talk in talks for rules in sets]
  encoded = [engine.encode(row.safety, row.conversation) for row in rows]
  engine.start()
  engine.wait_until_ready(120)
  got = engine.submit(encoded).result(60)
  engine.close()
  assert engine.stats.num_places == 256 * (2 if order == 'rules_first' else 1)
  want = spec.make_score_fn(weights, serving.TOKENIZER, 384)(rows)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.ptp(want) > 1e-3


def test_batches_suit_what_waits():
  """A batch is as large as pays, holds who waited longest, and mixes lengths."""

  def row(name, size):
    rules = engine_lib.RuleSet(np.zeros(1, np.int32), 0, 64, name.encode())
    return engine_lib.Row(rules, np.full(size, ord(name) + size), 64 if size <= 64 else 128, 0)

  engine = serving.make_engine(serving.params())  # rows of 64 and 128, 256 tokens at once
  engine._place_s = 1.0
  waiting = [row('a', 60), row('b', 20), row('a', 50), row('c', 9), row('b', 21)]
  # A batch that costs only what it holds has no empty places, ...
  assert engine._choose(64, waiting[:1]) == ((64, 64, 1), [[0]])
  # ... and one that costs the same in any case takes all: those of one policy share a row.
  engine._call_s = 1e6
  assert engine._choose(64, waiting)[1] == [[0], [1, 4], [2], [3]]
  assert engine._choose(64, [row('a', 100), *waiting])[1][0] == [0]
