"""Loss and gradients of one device equal those of eight, on every layout."""

import textwrap

import pytest

from tests import small

FEW = ('2,2,2',)
ALL = ('8,1,1', '1,8,1', *FEW, '1,1,2', '1,4,2', '4,1,2')

_SCRIPT = textwrap.dedent("""
  import dataclasses, sys
  import jax, numpy as np
  from csrm_jax.reward import scoring
  from csrm_jax.core import mesh as m, tree
  from csrm_jax.models import config as model_config, transformer
  from csrm_jax.safety.templates import Verbalizers

  B, T, S = 8, 16, 2
  rng = np.random.default_rng(0)
  segment_ids = np.where(np.arange(T) < 9, 1, 2) * (np.arange(T) < 15)
  batch = {
      'tokens': rng.integers(1, 64, (B, T)),
      'positions': np.where(np.arange(T) < 9, np.arange(T), np.arange(T) - 9),
      'segment_ids': segment_ids, 'verdict_index': np.array([8, 14]),
      'label': rng.integers(0, 2, (B, S)),
      'label_weight': np.ones((B, S), np.float32),
      'pair_weight': np.array([1.0, 0.0], np.float32)}
  batch = {k: np.broadcast_to(v, (B, *np.shape(v)[-1:])) for k, v in
           batch.items()}
  # In half of the rows the second prompt continues the first one's first four tokens.
  ends = np.where(segment_ids == 1, 9, 15) * (segment_ids > 0)
  batch['ends'] = np.where(np.arange(B)[:, None] % 2 * (np.arange(T) < 4), 15, ends)
  batch['positions'] = batch['positions'] + 4 * np.outer(np.arange(B) % 2, segment_ids == 2)
  batch = {k: v.astype(v.dtype if v.dtype == np.float32 else np.int32)
           for k, v in batch.items()}

  def compute(cfg, sizes):
    devices = jax.devices()[:int(np.prod(sizes))]
    mesh = m.make_mesh(*sizes, devices=devices)
    loss_fn = scoring.make_loss_fn(cfg, Verbalizers((1,), (2,)), 0.3, 0.0)

    def fn(params, batch):
      total, weight, _ = loss_fn(params, batch)
      return total / weight

    with jax.set_mesh(mesh):
      params = transformer.init_params(cfg, 0)
      params = jax.device_put(params, m.shardings(params, mesh))
      step = jax.jit(jax.value_and_grad(fn))
      text = step.lower(params, m.to_global(batch, mesh)).as_text()
      # The program is told how to lie: it is not left to the compiler.
      assert ('sharding_constraint' in text) == (len(devices) > 1)
      loss, grads = step(params, m.to_global(batch, mesh))
    return float(loss), {k: np.asarray(v) for k, v in
                         tree.named_leaves(grads).items()}

  base = dict(num_layers=2, embed_dim=16, mlp_dim=32, head_dim=8, unroll=1)
  cfg = model_config.preset(
      'tiny', 64, remat='full', tie_embeddings=sys.argv[1] == 'tied',
      sliding_window=5, window_period=2, post_norms=True,
      attention_softcap=20.0, **base)
  loss, grads = compute(cfg, (1, 1, 1))
  assert np.isfinite(loss) and loss > 0.1, loss
  for layout in sys.argv[2:]:
    other, others = compute(cfg, [int(n) for n in layout.split(',')])
    np.testing.assert_allclose(other, loss, rtol=1e-5, err_msg=layout)
    for name, grad in grads.items():
      np.testing.assert_allclose(
          others[name], grad, rtol=1e-3, atol=1e-4 * np.abs(grad).max(),
          err_msg=f'{layout} {name}')
""")


@pytest.mark.parametrize(
  ('head', 'layouts'), [('untied', FEW), pytest.param('tied', ALL, marks=pytest.mark.slow)]
)
def test_every_layout_has_the_loss_and_gradients_of_one_device(head, layouts):
  small.run_on_devices(8, _SCRIPT, head, *layouts)
