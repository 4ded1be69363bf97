import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from csrm_jax.models import sampling as sampling_lib
from csrm_jax.models.sampling import Sampling


@functools.partial(jax.jit, static_argnums=2)
def _choose(logits, uniform, sampling):
  return sampling_lib.choose_tokens(logits, uniform, sampling)


def _frequencies(logits, sampling, num=20_000):
  """Returns how often each token is chosen for evenly spread numbers."""
  uniform = (np.arange(num, dtype=np.float32) + 0.5) / num
  chosen = _choose(jnp.tile(logits, (num, 1)), uniform, sampling)
  return np.bincount(chosen, minlength=len(logits)) / num


@pytest.mark.parametrize('size', [11, 300])
@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_tokens_follow_the_distribution(size, temperature):
  logits = np.random.default_rng(0).normal(size=size).astype(np.float32) * 2
  got = _frequencies(logits, Sampling(temperature=temperature))
  want = special.softmax(np.asarray(logits / temperature, np.float64), axis=-1)
  # Evenly spread numbers leave an error of 1 / num, not of chance.
  assert np.abs(got - want).max() < 2e-4


@pytest.mark.parametrize('top_k', [1, 3, 50])
def test_top_k(top_k):
  logits = np.random.default_rng(1).normal(size=40).astype(np.float32)
  want = special.softmax(np.asarray(logits, np.float64), axis=-1)
  want[np.argsort(-logits)[top_k:]] = 0
  got = _frequencies(logits, Sampling(top_k=top_k))
  assert np.abs(got - want / want.sum()).max() < 2e-4


@pytest.mark.parametrize('top_k', [0, 6])
@pytest.mark.parametrize('top_p', [1e-6, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, top_k):
  logits = 2 * np.random.default_rng(2).normal(size=40).astype(np.float32)
  want = special.softmax(np.asarray(logits, np.float64), axis=-1)
  order = np.argsort(-logits)
  want[order[top_k or 40 :]] = 0
  want /= want.sum()
  num = 1 + np.flatnonzero(np.cumsum(want[order]) >= top_p)[0]
  want[order[num:]] = 0
  got = _frequencies(logits, Sampling(top_k=top_k, top_p=top_p))
  assert np.abs(got - want / want.sum()).max() < 2e-4


def test_ties_at_the_edge_are_kept():
  logits = np.array([0.0, 2.0, 1.0, 1.0, -1.0], np.float32)
  assert np.flatnonzero(_frequencies(logits, Sampling(top_k=2))).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
  'sampling', [Sampling(), Sampling(top_k=5), Sampling(top_p=0.9), Sampling(temperature=0.0)]
)
@pytest.mark.parametrize('size', [40, 256, 700])
def test_a_token_without_probability_is_never_chosen(sampling, size):
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(64, size)).astype(np.float32)
  # Impossible at both ends and in most places between.
  logits[:, rng.random(size) < 0.9] = -np.inf
  logits[:, [0, -1]] = -np.inf
  logits[:, size // 2] = 1.0
  for uniform in (0.0, 0.5, 1 - 2.0**-24):
    chosen = _choose(logits, np.full(64, uniform, np.float32), sampling)
    assert np.all(np.isfinite(logits[np.arange(64), chosen])), uniform


def test_greedy_takes_the_first_of_equals():
  logits = jnp.asarray([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
  chosen = _choose(logits, jnp.zeros(2), Sampling(temperature=0.0))
  assert chosen.tolist() == [1, 0]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'max_completion_length': 0}, 'max_completion_length=0 must be at least'),
    ({'temperature': -1.0}, 'temperature=-1.0 must be'),
    ({'temperature': float('nan')}, 'temperature=nan must be'),
    ({'top_k': -1}, 'top_k=-1'),
    ({'top_p': 0.0}, r'top_p=0.0 must lie in \(0, 1\]'),
    ({'temperature': 0.0, 'top_k': 3}, 'do nothing at temperature=0'),
  ],
)
def test_bad_sampling(fields, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**fields)
