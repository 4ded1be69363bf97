"""Heads: against loops in float64, stored with a model, and refused where none can hold them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from csrm_jax import config as config_lib
from csrm_jax.core import checkpoint, mesh as mesh_lib
from csrm_jax.data import features
from csrm_jax.models import transformer
from csrm_jax.reward import backbone, combiners, heads, model as reward_model, scoring
from csrm_jax.ruleworld import examples
from csrm_jax.train import losses, step as training
from tests import small

SPEC, SIZE = small.SPEC, 6
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(1, 4, SIZE))
WORDS = tuple(jnp.asarray(RNG.normal(size=(1, 4)) - 2, jnp.float32) for _ in range(2))
TEXTS = (
  *('verbalizer', 'linear', 'mlp', 'ordinal:levels=4,rating=-severity', 'ratings:names=a+b'),
  *('weighted:names=a+b', 'mixture:raters=3', 'members:num=3,combine=uwo,weight=0.25'),
)


def _softmax(x):
  return np.exp(x) / np.exp(x).sum()


def _loop(text, params, h):
  """Returns the scores [S] of hidden states [S,D], one slot after another, in float64."""
  name, p = text.partition(':')[0], jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  found = []
  for slot in h:
    if name == 'linear':
      found.append(slot @ p['kernel'][:, 0])
    elif name == 'mlp':
      inner = slot @ p['up']['kernel']
      found.append((inner / (1 + np.exp(-inner))) @ p['kernel'][:, 0])
    elif name == 'ordinal':
      level = _softmax(slot @ p['kernel'] + p['bias'])
      found.append(math.log(level[2] + level[3]) - math.log(level[0] + level[1]))
    elif name == 'weighted':
      share = _softmax(slot @ p['up']['kernel'])
      found.append(share @ (slot @ p['kernel'] + p['bias']) + p['up']['bias'][0])
    elif name == 'mixture':
      found.append(_softmax(slot @ p['up']['kernel']) @ (slot @ p['kernel']))
    else:
      each = slot @ p['kernel']
      found.append(each.mean() - 0.25 * each.var())
  return np.array(found)


def _apply(text, params, hidden):
  return heads.get(text).apply(params, jnp.asarray(hidden, jnp.float32), lambda: WORDS)


@pytest.mark.parametrize('text', TEXTS)
def test_scores_and_gradients_are_those_of_a_loop_in_float64(text):
  head = heads.get(text)
  params = head.init(SIZE, jax.random.key(1))
  params = jax.tree.map(lambda x: x + 0.1, params)  # biases start at 0
  out = _apply(text, params, HIDDEN)
  score = out.log_p[0] - out.log_p[1]
  if text.startswith(('verbalizer', 'ratings')):
    assert out.log_p is WORDS
    return
  np.testing.assert_allclose(score[0], _loop(text, params, HIDDEN[0]), rtol=1e-4, atol=1e-6)
  # The derivative along a direction of all parameters.
  leaves, tree = jax.tree.flatten(params)
  way = tree.unflatten([RNG.normal(size=x.shape) for x in leaves])

  def total(params):
    log_p = _apply(text, params, HIDDEN).log_p
    return (log_p[0] - log_p[1]).sum()

  slopes = jax.jit(jax.grad(total))(params)
  parts = zip(*map(jax.tree.leaves, (slopes, way)), strict=True)
  slope = sum(float((g * w).sum()) for g, w in parts)

  def moved(by):
    there = jax.tree.map(lambda x, w: np.float64(x) + by * w, params, way)
    return _loop(text, there, HIDDEN[0]).sum()

  ends = moved(1e-5), moved(-1e-5)
  np.testing.assert_allclose(slope, np.subtract(*ends) / 2e-5, rtol=1e-3, atol=1e-5)


def test_every_row_is_tested_here_and_named_in_the_config():
  assert {text.partition(':')[0] for text in TEXTS} == set(heads.HEADS)
  text = (config_lib.CONFIGS / 'rm.py').read_text()
  comment = text[text.index('# How a verdict is read') : text.index("'head': ")]
  said = ' '.join(comment.replace('#', ' ').split())
  for name, row in heads.HEADS.items():
    assert f' {name}' in said
    for knob, value in config_lib.knobs(row).items():
      assert f'{knob}={value}' in said


# The setting at which each is another one.
@pytest.mark.parametrize('text', ['mixture:raters=1', 'members:num=1,combine=mean'])
def test_one_rater_or_member_is_the_linear_head(text):
  one, other = (heads.get(t).init(SIZE, jax.random.key(0)) for t in (text, 'linear'))
  assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
  np.testing.assert_array_equal(
    _apply(text, one, HIDDEN).log_p[0], _apply('linear', one, HIDDEN).log_p[0]
  )


def test_two_levels_are_two_verdicts_of_which_a_pair_takes_the_mean_difference():
  params = heads.get('ordinal:levels=2').init(SIZE, jax.random.key(0))
  out = _apply('ordinal:levels=2', params, HIDDEN)
  score = out.log_p[0] - out.log_p[1]
  np.testing.assert_allclose(
    score, (HIDDEN @ np.asarray(params['kernel'] @ np.array([-1.0, 1.0]))), rtol=1e-4
  )
  safe = np.exp(np.asarray(out.log_p[0][0]))
  ordered = 1 / (1 + np.exp(-np.asarray(out.gap[0])))
  np.testing.assert_allclose(ordered[:3], 0.5 * (1 + safe[:3] - safe[1:]), rtol=1e-5)


def test_the_order_of_levels_and_raters_is_that_of_a_loop():
  params = heads.get('ordinal').init(SIZE, jax.random.key(2))
  p = [_softmax(h @ np.asarray(params['kernel'])) for h in HIDDEN[0, :2]]
  want = sum(p[0][i] * p[1][j] * ((i > j) + 0.5 * (i == j)) for i in range(4) for j in range(4))
  gap = float(_apply('ordinal', params, HIDDEN).gap[0, 0])
  assert 1 / (1 + math.exp(-gap)) == pytest.approx(want, rel=1e-5)
  params = heads.get('mixture:raters=3').init(SIZE, jax.random.key(2))
  each = HIDDEN[0, :2] @ np.asarray(params['kernel'])
  share = _softmax(HIDDEN[0, 0] @ np.asarray(params['up']['kernel']))
  out = _apply('mixture:raters=3', params, HIDDEN)
  want = sum(s / (1 + math.exp(b - a)) for s, a, b in zip(share, *each, strict=True))
  assert 1 / (1 + math.exp(-float(out.gap[0, 0]))) == pytest.approx(want, rel=1e-5)
  want = 0.5 * sum(s * math.log(s) for s in share)
  assert float(out.penalty[0, 0]) == pytest.approx(want, rel=1e-5)


def test_levels_cost_what_the_region_around_them_says():
  log_p = jnp.log(jnp.asarray([[[0.1, 0.2, 0.3, 0.4]] * 3]))
  ratings = jnp.asarray([[[0.0], [1.5], [9.0]]])

  def cost(text):
    return heads.get(text).cost(log_p, ratings)[0, :, 0]

  # A severity of 0 is the safest level, one of 1.5 lies between two; 9 is none.
  np.testing.assert_allclose(
    cost('ordinal:rating=-s'), [-math.log(0.4), -math.log(0.25), 0], rtol=1e-5
  )
  np.testing.assert_allclose(
    cost('ordinal:rating=s,spread=2'),
    [-math.log(0.1 + 0.5 * 0.2), -math.log(0.75 * 0.5 + 0.25 * 0.5), 0],
    rtol=1e-5,
  )


def _items():
  rated = dataclasses.replace(
    examples.training_example(0, 3), label=None, violated=(), ratings={'a': 2.0}
  )
  return [examples.training_example(0, 1), examples.preference_pair(0, 2), rated]


def _batch(head='verbalizer'):
  names = heads.get(head).ratings
  encoder = features.Encoder(small.TOKENIZER, 192, targets=names)
  atoms = [features.encode(item, encoder) for item in _items()]
  return features.pack_rows(atoms, features.BatchShape(2, 400, 5, num_targets=len(names)))[0]


def test_the_default_head_is_the_loss_and_gradient_that_there_was_bit_for_bit():
  params, batch = transformer.init_params(SPEC.model, 0), _batch()
  verbalizers = SPEC.verbalizers(small.TOKENIZER)

  def before(params, batch):
    rows = batch['tokens'], batch['positions'], batch['segment_ids']
    hidden = transformer.hidden(SPEC.model, params, *rows)
    at_verdict = jnp.take_along_axis(hidden, batch['verdict_index'][..., None], axis=1)
    logits = transformer.logits(SPEC.model, params, at_verdict)
    log_p = losses.verdict_logprobs(logits, verbalizers)
    return losses.reward_model_loss(*log_p, batch, 0.3, 0.1)[0]

  loss_fn = scoring.make_loss_fn(SPEC.model, verbalizers, 0.3, 0.1)
  now = jax.jit(jax.value_and_grad(lambda *args: loss_fn(*args)[0]))(params, batch)
  was = jax.jit(jax.value_and_grad(before))(params, batch)
  jax.tree.map(np.testing.assert_array_equal, now, was)


@pytest.mark.parametrize('text', ['ordinal:levels=4,rating=-a', TEXTS[-1]])
def test_a_head_learns_is_stored_and_scores_the_same_when_loaded(tmp_path, text):
  spec = dataclasses.replace(SPEC, head=text)
  params = transformer.init_params(spec.model, 0) | heads.init(text, spec.model, 0)
  mesh = mesh_lib.make_mesh()
  loss_fn = scoring.make_loss_fn(spec.model, spec.verbalizers(small.TOKENIZER), 0.3, 0.0, head=text)
  optim = {'lr': 1e-2, 'warmup_steps': 0, 'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.0}
  optim |= {'clip_norm': 1.0, 'end_lr_fraction': 1.0, 'num_microbatches': 1}
  step, state = training.make_step(loss_fn, params, mesh, 6, **optim)
  before, found = jax.tree.map(np.asarray, params), []
  for _ in range(6):
    state, metrics = step(state, _batch(text))
    found.append(training.mean_metrics([metrics]))
  assert found[-1]['train/loss'] < found[0]['train/loss']
  assert ('loss/ratings' in found[0]) == ('rating' in text)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, state.params)['head']
  assert jax.tree.reduce(max, moved) > 0
  backbone.save_tokenizer(str(small.TOKENIZER_FILE), tmp_path)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    saved.save(6, training.init_state(state.params, optax.sgd(1.0)), {}, dataclasses.asdict(spec))
  rm = reward_model.load(tmp_path, allow_out_of_domain=True)
  asked = [examples.test_example(0, i, 'seen') for i in range(3)]
  assert rm.spec.head == text
  want = spec.make_score_fn(state.params, small.TOKENIZER)(asked)
  np.testing.assert_array_equal(rm.score_fn(asked), want)


def test_members_are_trained_each_for_itself():
  text = 'members:num=3,combine=worst'
  params = transformer.init_params(SPEC.model, 0)
  verbalizers = SPEC.verbalizers(small.TOKENIZER)

  def total(head, own):
    loss_fn = scoring.make_loss_fn(SPEC.model, verbalizers, 0.3, 0.0, head=head)
    return float(jax.jit(lambda *args: loss_fn(*args)[0])(params | {'head': own}, _batch()))

  own = heads.init(text, SPEC.model, 0)['head']
  each = [total('linear', {'kernel': own['kernel'][:, i : i + 1]}) for i in range(3)]
  assert np.ptp(each) > 0 and total(text, own) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize(
  'text, said',
  [
    ('lineal', "head='lineal' must be one of verbalizer, linear"),
    ('ordinal:levels=3', 'levels=3 must be even'),
    ('ratings', "names='': name the ratings"),
    ('members:combine=worst,weight=1', 'weight=1.0: worst has none'),
    ('members:combine=best', "combine='best' must be one of mean, worst, uwo, robust"),
  ],
)
def test_a_head_that_is_unknown_is_one_line(text, said):
  assert said in small.error_of(heads.get, text)


@pytest.mark.parametrize('head', ['unheard', 5, ['linear'], None])
def test_a_stored_head_that_is_none_is_one_line(head):
  meta = dataclasses.asdict(SPEC) | {'head': head}
  assert 'head' in small.error_of(reward_model.Spec.from_dict, meta)


def test_work_directories_from_before_heads_are_read():
  meta = dataclasses.asdict(SPEC)
  del meta['head']
  assert reward_model.Spec.from_dict(meta) == SPEC


def test_a_head_lies_on_a_mesh():
  mesh = mesh_lib.make_mesh()
  for text in TEXTS:
    shapes = heads.shapes(text, SPEC.model)
    assert jax.tree.structure(mesh_lib.shardings(shapes, mesh)) == jax.tree.structure(shapes)


def test_combiners_are_loops_over_members():
  scores = RNG.normal(size=(3, 4))
  for text, want in {
    'mean': lambda s: sum(s) / 3,
    'worst': min,
    'uwo:weight=0.1': lambda s: sum(s) / 3 - 0.1 * sum((x - sum(s) / 3) ** 2 for x in s) / 3,
    'uwo:weight=0': lambda s: sum(s) / 3,
    'robust': lambda s: 0.6 * s[0] + 0.4 * min(s),
  }.items():
    found = combiners.choose(text)(scores)
    np.testing.assert_allclose(found, [want(list(s)) for s in scores.T])
    np.testing.assert_allclose(combiners.choose(text)(scores[:1]), scores[0], rtol=1e-15)
