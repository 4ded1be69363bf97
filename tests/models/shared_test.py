"""Loss and gradients of rows in which prompts share tokens equal those of the prompts alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.core import tree
from csrm_jax.data import features
from csrm_jax.data.features import Atom, BatchShape, Prompt
from csrm_jax.models import lora, transformer
from csrm_jax.reward import scoring
from csrm_jax.safety.templates import Verbalizers

VERBALIZERS = Verbalizers((1,), (2, 3))


def make_atoms():
  """A pair behind a long prefix, four examples on two levels, one alone, one inside another."""
  rng = np.random.default_rng(0)

  def draw(num):
    return rng.integers(4, 40, num, dtype=np.int32)

  prefix, rules = draw(11), [draw(6), draw(5)]
  pair = [np.concatenate([prefix, draw(num)]) for num in (4, 7)]
  tree_of = [np.concatenate([prefix[:8], rule, draw(num)]) for rule in rules for num in (2, 9)]
  prompts = [*tree_of, draw(13), tree_of[3][:-4]]
  return [
    Atom(tuple(Prompt(x, -1, '') for x in pair), 'pair'),
    *(Atom((Prompt(x, i % 2, ''),), 'example') for i, x in enumerate(prompts)),
  ]


def make_rows(share):
  """Returns the packed atoms; without sharing, `ends` are those of the segments."""
  atoms = make_atoms()
  batch, left = features.pack_rows(atoms, BatchShape(2, 128, 9, share_prefix=share))
  assert not left
  ids = batch['segment_ids']
  if not share:
    last = ((ids[:, :, None] == ids[:, None]) * (1 + np.arange(128))).max(-1)
    batch['ends'] = np.where(ids > 0, last, 0).astype(np.int32)
  return batch


def check(cfg, params):
  loss_fn = scoring.make_loss_fn(cfg, VERBALIZERS, 0.5, 0.1)
  params = jax.tree.map(jnp.asarray, params)
  trained, frozen = lora.split(params) if cfg.lora_rank else (params, {})

  @jax.jit
  @jax.value_and_grad
  def compute(trained, batch):
    total, weight, _ = loss_fn(tree.merge(frozen, trained), batch)
    return total / weight

  shared, apart = make_rows(share=True), make_rows(share=False)
  assert (shared['segment_ids'] > 0).sum() < 0.7 * (apart['segment_ids'] > 0).sum()
  (loss, grads), (want, want_grads) = compute(trained, shared), compute(trained, apart)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  want_grads = tree.named_leaves(want_grads)
  errors, norms = {}, {}
  for name, grad in tree.named_leaves(grads).items():
    errors[name] = np.linalg.norm(grad - want_grads[name])
    norms[name] = np.linalg.norm(want_grads[name])
    # Some arrays' gradients are small sums of what cancels.
    assert errors[name] < 5e-6 * norms[name], name
  assert np.linalg.norm([*errors.values()]) < 1e-6 * np.linalg.norm([*norms.values()])


def test_every_family(family_cfg, make_params):
  check(family_cfg, make_params(family_cfg))


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_with_remat_and_adapters(remat, family_cfgs, make_params):
  cfg = dataclasses.replace(family_cfgs['mistral'], remat=remat, lora_rank=2)
  check(cfg, make_params(cfg))


def test_behind_a_prefix_that_all_rows_continue(family_cfgs, make_params):
  cfg = family_cfgs['gemma2']
  params = make_params(cfg)
  batch, _ = features.pack_rows(make_atoms()[:5], BatchShape(1, 80, 8, share_prefix=True))
  want = scoring.verdict_logprobs(cfg, params, batch, VERBALIZERS)
  # The first tokens of all prompts, read apart and padded.
  P = 8
  tokens = np.zeros((1, 10), np.int32)
  tokens[:, :P] = batch['tokens'][:, :P]
  prefix = transformer.make_prefix_reader(cfg)(
    params, tokens, (np.arange(10) < P)[None].astype(int)
  )
  rest = {name: batch[name][:, P:] for name in ('tokens', 'positions', 'segment_ids')}
  rest['ends'] = np.maximum(batch['ends'][:, P:] - P, 0)
  rest['verdict_index'] = np.maximum(batch['verdict_index'] - P, 0)
  got = scoring.verdict_logprobs(cfg, params, rest, VERBALIZERS, prefix)
  used = batch['verdict_index'] > 0
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one[used], other[used], rtol=1e-5)
