import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import csrm_jax
from csrm_jax.data import features
from csrm_jax.models import config, transformer
from csrm_jax.reward import plans, scoring
from csrm_jax.ruleworld import examples as ruleworld
from csrm_jax.safety import schema, templates
from csrm_jax.text import tokenizer as tokenizer_lib
from tests import small

PATH = pathlib.Path(csrm_jax.__file__).parent / 'ruleworld' / 'tokenizer.model'
TOKENIZER = tokenizer_lib.load_tokenizer(PATH)
VERBALIZERS = templates.resolve_verbalizers(TOKENIZER)
CFG = config.preset(
  'tiny',
  TOKENIZER.vocab_size,
  num_layers=1,
  embed_dim=32,
  num_heads=2,
  num_kv_heads=1,
  head_dim=16,
  mlp_dim=64,
  unroll=1,
)
ENCODER = features.Encoder(TOKENIZER, 256)
# A call for each prompt or two, in one shape.
ONE_EACH = plans.Costs(keys=1e9, program=1e9, call_tokens=1, longest_row=256)


@functools.cache
def _params():
  """Returns parameters with which everything in reach moves the score."""
  return jax.tree.map(lambda x: 1.5 * x, transformer.init_params(CFG, 0))


@functools.cache
def _examples(num=9):
  return [ruleworld.test_example(0, i, 'seen') for i in range(num)]


def _score_fn(params=None, **kwargs):
  settings = {'max_length': 256, 'costs': ONE_EACH} | kwargs
  return scoring.make_score_fn(
    CFG, _params() if params is None else params, TOKENIZER, VERBALIZERS, **settings
  )


@functools.cache
def _scores():
  return _score_fn()(_examples())


def _encode(example):
  return features.encode(example, ENCODER).prompts[0].tokens


@jax.jit
def _log_probs(params, tokens):
  """Returns log P [V] after the last of tokens [T]: no padding at all."""
  tokens = tokens[None]
  hidden = transformer.hidden(
    CFG, params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
  )
  return jax.nn.log_softmax(transformer.logits(CFG, params, hidden)[0, -1])


def test_score_is_the_log_ratio_of_the_verdict_words():
  """No temperature, no length, no renormalisation over the two words."""
  log_p = _log_probs(_params(), _encode(_examples()[0]))
  want = np.logaddexp.reduce(log_p[np.array(VERBALIZERS.safe)]) - np.logaddexp.reduce(
    log_p[np.array(VERBALIZERS.unsafe)]
  )
  np.testing.assert_allclose(_scores()[0], want, atol=1e-5)
  assert _scores().dtype == np.float32


def test_scores_differ_between_examples_and_rules():
  assert len(set(_scores().tolist())) == len(_scores())
  first = _examples()[0]
  other = dataclasses.replace(first, safety=_examples()[1].safety, label=None, violated=())
  assert abs(_score_fn()([other])[0] - _scores()[0]) > 1e-3


@pytest.mark.parametrize(
  'costs',
  [
    None,
    plans.Costs(keys=100, program=0, call_tokens=256),
    plans.Costs(keys=1e9, program=1e9, call_tokens=4096, longest_row=4096),
  ],
)
def test_rows_and_batches_do_not_change_a_score(costs):
  np.testing.assert_allclose(_score_fn(costs=costs)(_examples()), _scores(), atol=1e-5)


def test_order_and_neighbours_do_not_change_a_score():
  score_fn, order = _score_fn(), np.random.default_rng(0).permutation(9)
  np.testing.assert_allclose(score_fn([_examples()[i] for i in order]), _scores()[order], atol=1e-5)
  for i in (0, 4):
    np.testing.assert_allclose(score_fn(_examples()[i : i + 1]), _scores()[i : i + 1], atol=1e-5)
  np.testing.assert_allclose(
    score_fn([*_examples(), *_examples()[:3]])[-3:], _scores()[:3], atol=1e-5
  )


def test_the_bits_of_a_score_do_not_depend_on_what_was_asked_before(monkeypatch):
  plan, make_plan = [], plans.make_plan
  monkeypatch.setattr(plans, 'make_plan', lambda *args: plan.append(make_plan(*args)) or plan[-1])
  costs = plans.Costs(keys=1000, program=10**6, call_tokens=1024)
  first, later = _score_fn(costs=costs), _score_fn(costs=costs)
  later(_examples())
  np.testing.assert_array_equal(first(_examples()[:1]), later(_examples()[:1]))
  assert plan[-1] == plan[-2] != plan[0]


def test_no_examples_no_scores():
  assert _score_fn()([]).shape == (0,)


def test_order_of_the_template_reaches_the_score():
  layout = templates.Layout(order='conversation_first')
  other = _score_fn(layout=layout)(_examples()[:1])
  assert abs(other[0] - _scores()[0]) > 1e-3


def _under(safety, rows):
  return [
    dataclasses.replace(row, safety=safety, label=None, violated=(), probability=None)
    for row in rows
  ]


@pytest.mark.parametrize('order', templates.ORDERS)
@pytest.mark.parametrize(
  'model', [{}, {'sliding_window': 24}, {'sliding_window': 40, 'window_period': 2, 'num_layers': 2}]
)
def test_what_many_prompts_share_is_read_once(order, model, monkeypatch):
  """Rules of 30 and of 9 conversations, one conversation under 20 rule sets, and single ones."""
  rules = _rules('heists', 'cats', 'rumours', 'gambling', 'refunds')
  rows = [*_under(rules, _examples(30)), *_under(_rules('dogs'), _examples()), *_examples()]
  longest = max(_examples(30), key=lambda row: len(repr(row.conversation)))
  for i in range(20):
    rows += _under(_rules('cats', *('dogs', 'hats')[: i % 3], f'thing {i}'), [longest])
  rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
  cfg = dataclasses.replace(CFG, **model)
  params = jax.tree.map(lambda x: 1.5 * x, transformer.init_params(cfg, 0))
  settings = {'layout': templates.Layout(order=order), 'max_length': 256}
  make = functools.partial(scoring.make_score_fn, cfg, params, TOKENIZER, VERBALIZERS, **settings)
  shared, make_batch = [], plans.make_batch

  def counted(prompts, rows, shape, num_shared, **kwargs):
    shared.append(num_shared)
    return make_batch(prompts, rows, shape, num_shared, **kwargs)

  monkeypatch.setattr(plans, 'make_batch', counted)
  got = make(costs=plans.Costs(keys=1000, program=0, call_tokens=512, longest_row=256))(rows)
  assert any(shared) and not all(shared)
  shared.clear()
  np.testing.assert_allclose(got, make(costs=ONE_EACH)(rows), atol=1e-5)
  assert not any(shared)


def test_pools_are_put_together_and_what_they_share_is_kept(monkeypatch):
  monkeypatch.setattr(scoring, 'POOL', 20)
  rows = _under(_rules('heists', 'cats', 'rumours', 'gambling'), _examples(50))
  reads, make_prefix_reader = [], transformer.make_prefix_reader

  def counted(cfg):
    read = make_prefix_reader(cfg)
    return lambda *args: reads.append(0) or read(*args)

  monkeypatch.setattr(transformer, 'make_prefix_reader', counted)
  costs = plans.Costs(keys=1000, program=0, call_tokens=512, longest_row=256)
  done = []
  got = _score_fn(costs=costs)(rows, done.append)
  np.testing.assert_allclose(got, _score_fn()(rows), atol=1e-5)
  assert sum(done) == 50 and 1 <= len(reads) < 3


def _items():
  """Returns examples and pairs that fit into a row of 1536."""
  return [
    _examples()[1],
    ruleworld.strictness_pair(0, 1),
    _examples()[2],
    ruleworld.preference_pair(0, 0),
    _examples()[6],
  ]


def _atoms():
  return [features.encode(item, ENCODER) for item in _items()]


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_grads(loss_fn, params, batch):
  def total(params):
    total, weight, metrics = loss_fn(params, batch)
    return total, (weight, metrics)

  return jax.value_and_grad(total, has_aux=True)(params)


def _assert_close(got, want, tolerance=1e-5):
  """Asserts that trees agree, relative to the largest of each leaf."""

  def check(a, b):
    scale = max(float(np.abs(b).max()), 1.0)
    np.testing.assert_allclose(a, b, atol=tolerance * scale)

  jax.tree.map(check, got, want)


def test_packed_scores_equal_unpacked_scores():
  batch, left = features.pack_rows(_atoms(), features.BatchShape(1, 1536, 8))
  assert not left
  safe, unsafe = jax.jit(
    lambda params, batch: scoring.verdict_logprobs(CFG, params, batch, VERBALIZERS)
  )(_params(), batch)
  alone = [
    side
    for item in _items()
    for side in ((item.safer, item.other) if isinstance(item, schema.Pair) else (item,))
  ]
  want = _score_fn()(alone)
  np.testing.assert_allclose((safe - unsafe)[0, : len(want)], want, atol=1e-5)


def test_packed_loss_and_gradients_equal_unpacked():
  loss_fn = scoring.make_loss_fn(CFG, VERBALIZERS, gamma=0.7, margin=0.1)
  packed, left = features.pack_rows(_atoms(), features.BatchShape(1, 1536, 8))
  assert not left
  (got, got_aux), got_grads = _loss_and_grads(loss_fn, _params(), packed)
  assert got_aux[0] == 5  # atoms
  total, aux, grads = 0.0, None, None
  for atom in _atoms():
    alone, _ = features.pack_rows([atom], features.BatchShape(1, 1536, 8))  # compiled once
    (one, one_aux), one_grads = _loss_and_grads(loss_fn, _params(), alone)
    add = functools.partial(jax.tree.map, jnp.add)
    total += one
    aux = one_aux if aux is None else add(aux, one_aux)
    grads = one_grads if grads is None else add(grads, one_grads)
  np.testing.assert_allclose(got, total, rtol=1e-5)
  _assert_close(got_aux, aux)
  _assert_close(got_grads, grads)


def test_no_gradient_crosses_packed_prompts():
  batch, _ = features.pack_rows(_atoms()[:3], features.BatchShape(1, 1024, 5))
  ids, length = batch['segment_ids'][0], batch['tokens'].shape[1]
  # One row of the embedding for each place: its gradient is the place's.
  places = batch | {'tokens': np.arange(length, dtype=np.int32)[None]}
  table = _params()['embed']['embedding']
  cfg = dataclasses.replace(CFG, vocab_size=length, tie_embeddings=False)

  @jax.jit
  def gradients(inputs):
    def score(inputs, slot):
      params = _params() | {'embed': {'embedding': inputs}, 'lm_head': {'kernel': table[:length].T}}
      safe, unsafe = scoring.verdict_logprobs(cfg, params, places, VERBALIZERS)
      return (safe - unsafe)[0, slot]

    return jax.vmap(jax.grad(score), (None, 0))(inputs, jnp.arange(4))

  size = np.abs(gradients(table[batch['tokens'][0]])).sum(-1)  # [slot,place]
  for slot in range(4):
    assert np.all(size[slot][ids == slot + 1] > 0)
    assert np.all(size[slot][ids != slot + 1] == 0)


def test_nan_parameters_raise_and_name_the_example():
  params = jax.tree.map(lambda x: x, _params())
  params['final_norm'] = {'scale': params['final_norm']['scale'].at[3].set(jnp.nan)}
  with pytest.raises(ValueError, match='seen-0-2: its score is nan') as error:
    _score_fn(params)(_examples()[2:4])
  assert '\n' not in str(error.value)


def test_rules_too_long_raise_and_name_the_example():
  rules = schema.SafetyConfig(
    tuple(schema.Category(f'Rule {i}', 'Nothing that anybody could dislike.') for i in range(60))
  )
  long = dataclasses.replace(_examples()[0], id='lawyer', safety=rules, label=None, violated=())
  with pytest.raises(ValueError, match='rules_too_long: lawyer') as error:
    _score_fn()([_examples()[1], long])
  assert '\n' not in str(error.value)


def test_a_long_conversation_is_shortened_and_scored():
  talk = schema.Message('user', 'Tell me about heist. ' * 200)
  long = dataclasses.replace(_examples()[0], conversation=(talk, *_examples()[0].conversation))
  assert np.isfinite(_score_fn()([long])[0])


def _padded(num_before, num_behind=0):
  """Returns an example whose response says a thing between so many neutral sentences."""
  talk = _examples()[0].conversation
  text = 'I hope that helps. ' * num_before + talk[-1].content + ' I hope that helps.' * num_behind
  return dataclasses.replace(
    _examples()[0], conversation=(*talk[:-1], schema.Message('agent', text))
  )


def test_windows_give_the_worst_verdict_of_all_parts():
  example = _padded(60, 60)
  reading = features.read(example, ENCODER)
  assert len(reading.prompts) > 3
  judged = _score_fn().judge([_examples()[1], example, _examples()[2]])
  each = scoring.make_prompt_scorer(CFG, _params(), VERBALIZERS, ONE_EACH)([reading.prompts])
  assert np.ptp(each) > 1e-4
  np.testing.assert_allclose(judged.score[1], min(each), atol=1e-5)
  np.testing.assert_allclose(judged.score[[0, 2]], _scores()[1:3], atol=1e-5)
  assert judged.cut.tolist() == [False, True, False] and not judged.num_unread.any()


def test_every_verdict_says_what_was_not_read():
  example = _padded(60)
  marked = _score_fn(on_cut='mark')
  judged = marked.judge([example, _examples()[1]])
  # As in training: what is beyond the limit is not seen.
  np.testing.assert_allclose(judged.score[0], marked([_padded(60, 9)])[0], atol=1e-5)
  long, whole = scoring.verdicts(judged)
  assert long.cut and long.num_unread > 100 and 0.4 < long.unread < 1
  assert (whole.cut, whole.num_unread, whole.unread) == (False, 0, 0.0)
  assert long.unread == long.num_unread / judged.num_tokens[0]
  # The argument of a call comes before that of the function.
  assert marked.judge([example], on_cut='window').num_unread[0] == 0


def test_a_cut_may_be_an_error():
  example = dataclasses.replace(_padded(60), id='lawyer')
  with pytest.raises(ValueError, match=r'lawyer: the prompt has .* tokens, the limit is 256') as e:
    _score_fn(on_cut='error')([_examples()[1], example])
  assert '\n' not in str(e.value)
  with pytest.raises(ValueError, match="on_cut='cut' must be one of window, mark, error"):
    _score_fn(on_cut='cut')


def test_progress_counts_examples_and_not_their_parts():
  done = []
  _score_fn().judge([*_examples()[:3], _padded(60)], done.append)
  assert sum(done) == 4


def test_a_larger_tokenizer_is_refused():
  cfg = dataclasses.replace(CFG, vocab_size=100)
  with pytest.raises(ValueError, match='the tokenizer has 3584 ids'):
    scoring.make_score_fn(cfg, _params(), TOKENIZER, VERBALIZERS)


def _judged(scores):
  """Returns these scores, of prompts that were read whole."""
  scores = np.asarray(scores)
  tokens = np.full(len(scores), 10)
  return scoring.Judged(scores, tokens, 0 * tokens, tokens < 0, small.unmarked(tokens))


def test_verdicts_direction():
  scores = np.array([3.0, -3.0, 0.0, 0.2])
  got = scoring.verdicts(_judged(scores))
  assert [v.label for v in got] == ['safe', 'unsafe', 'unsafe', 'safe']
  p_unsafe = np.array([v.p_unsafe for v in got])
  np.testing.assert_allclose(p_unsafe, 1 / (1 + np.exp(scores)), rtol=1e-12)
  np.testing.assert_allclose([v.reward for v in got], 1 - p_unsafe, rtol=1e-12)
  np.testing.assert_array_equal([v.score for v in got], scores)
  # Without a temperature the log-odds of the reward are the score.
  np.testing.assert_allclose([np.log(v.reward / v.p_unsafe) for v in got], scores, atol=1e-12)


def test_verdicts_keep_the_tails_without_overflow():
  with np.errstate(all='raise', under='ignore'):
    safe, unsafe = scoring.verdicts(_judged([100.0, -1000.0]))
  assert safe.p_unsafe == pytest.approx(np.exp(-100.0), rel=1e-9)
  assert (unsafe.p_unsafe, unsafe.reward) == (1.0, 0.0)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_there_is_no_verdict_for_a_score_that_is_not_finite(bad):
  with pytest.raises(ValueError, match=r'score 1 of 3 is -?(nan|inf)'):
    scoring.verdicts(_judged([1.0, bad, 2.0]))


def test_progress_counts_every_example_once():
  done = []
  _score_fn()(_examples(), done.append)
  assert sum(done) == len(_examples()) and len(done) > 1


def _rules(*names):
  return schema.SafetyConfig(tuple(schema.Category(name, f'About {name}.') for name in names))


def test_per_category_keeps_the_worst_of_an_example():
  rows = [
    dataclasses.replace(example, safety=_rules(*names), label=None, violated=(), probability=None)
    for example, names in zip(_examples(), (('a', 'b', 'c'), ('d',), ('e', 'f')), strict=False)
  ]
  worth = dict(zip('abcdef', (2.0, -3.0, 0.5, 4.0, -1.0, -1.5), strict=True))
  asked = []

  def judge(examples, progress, on_cut):
    asked.extend(examples)
    progress(2)
    progress(len(examples) - 2)
    num_unread = np.array([3 * (e.safety.names == ('b',)) for e in examples])
    scores = np.float32([worth[e.safety.names[0]] for e in examples])
    outside = small.unmarked(num_unread)
    return scoring.Judged(scores, 9 + 0 * num_unread, num_unread, num_unread > 0, outside)

  done = []
  judged = scoring.per_category(scoring.ScoreFn(judge)).judge(rows, done.append)
  scores = judged.score
  # What one category's pass did not read was not read.
  assert judged.num_unread.tolist() == [3, 0, 0] and judged.num_tokens.tolist() == [9, 9, 9]
  assert judged.cut.tolist() == [True, False, False]
  np.testing.assert_array_equal(scores, np.float32([-3.0, 4.0, -1.5]))
  assert scores.dtype == np.float32 and sum(done) == len(rows)
  assert [e.safety.names for e in asked] == [(name,) for name in 'abcdef']
  assert asked[1].id == f'{rows[0].id} (b)'
  assert asked[1].conversation == rows[0].conversation


def test_per_category_equals_single_categories():
  score_fn = _score_fn()
  row = dataclasses.replace(
    _examples()[0], safety=_rules('heists', 'cats'), label=None, violated=()
  )
  each = score_fn(scoring.split_categories(row))
  assert abs(each[0] - each[1]) > 1e-4
  np.testing.assert_allclose(scoring.per_category(score_fn)([row]), [each.min()], atol=1e-5)


def test_per_category_of_nothing():
  assert scoring.per_category(_score_fn())([]).shape == (0,)
