import dataclasses

import jax
import jax.numpy as jnp
import pytest

from csrm_jax.core import tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _State:
  step: jax.Array
  params: dict


def _state():
  params = {'b': {'w': jnp.ones((2, 3))}, 'a': (jnp.zeros(4, jnp.bfloat16),)}
  return _State(step=jnp.int32(3), params=params)


def test_named_leaves_join_every_kind_of_key():
  assert list(tree.named_leaves(_state())) == ['step', 'params/a/0', 'params/b/w']


def test_named_leaves_refuse_ambiguous_names():
  with pytest.raises(ValueError, match="named 'a/b'"):
    tree.named_leaves({'a/b': 1, 'a': {'b': 2}})


def test_merge_keeps_the_leaves_of_both():
  a, b = {'x': {'y': 1}, 'z': 2}, {'x': {'w': 3}, 'v': {'u': 4}}
  merged = tree.merge(a, b)
  assert merged == {'x': {'y': 1, 'w': 3}, 'z': 2, 'v': {'u': 4}}
  assert a == {'x': {'y': 1}, 'z': 2}  # not changed
  for other in ({'x': {'y': 5}}, {'z': {'y': 5}}, {'x': 5}):
    with pytest.raises(ValueError, match='both trees have a leaf'):
      tree.merge(a, other)


def test_sizes_of_arrays_and_of_shapes():
  shapes = jax.eval_shape(_state)
  for t in (_state(), shapes):
    assert tree.num_params(t) == 1 + 6 + 4
