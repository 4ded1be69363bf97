"""One server on a mesh of several devices gives the scores of one."""

import pytest

from tests import small

SCRIPT = """
import sys
import jax
import numpy as np
from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import transformer
from csrm_jax.safety import schema
from csrm_jax.serve import engine as engine_lib
from tests.serve import serving

data, fsdp, tensor = map(int, sys.argv[1:])
weights = serving.params()
talks = [(schema.Message('user', 'Pets?'), schema.Message('agent', f'Dogs bark {i}.'))
         for i in range(21)]
sets = [schema.SafetyConfig((schema.Category(name, f'No {name}.'),)) for name in ('dogs', 'cats')]
rows = [schema.Example(f'{i}', sets[i % 2], talk) for i, talk in enumerate(talks)]
want = serving.SPEC.make_score_fn(weights, serving.TOKENIZER, 128)(rows)
mesh = mesh_lib.make_mesh(data, fsdp, tensor)
shardings = mesh_lib.shardings(transformer.shapes(serving.SPEC.model), mesh)
placed = jax.tree.map(jax.device_put, weights, shardings)
engine = engine_lib.Engine(
  serving.SPEC, placed, serving.TOKENIZER, engine_lib.Lengths((64,), (64,), 128, 128),
  prefix_bytes=1 << 20, wait_s=0.05, deadline_s=20)
engine.start()
engine.wait_until_ready(120)
compiled = engine_lib.num_compilations()
got = engine.submit([engine.encode(row.safety, row.conversation) for row in rows]).result(60)
assert engine_lib.num_compilations() == compiled
engine.close()
np.testing.assert_allclose(got, want, atol=1e-5)
print('rows', engine.stats.num_rows, 'of', engine.stats.num_places, 'spread', np.ptp(want) > 1e-3)
"""


@pytest.mark.parametrize('mesh', [(4, 1, 1), (1, 2, 2)])
def test_scores_on_a_mesh_are_those_of_one_device(mesh):
  out = small.run_on_devices(4, SCRIPT, *mesh)
  assert 'rows 21 of ' in out and 'spread True' in out
