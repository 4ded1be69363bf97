import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest

from csrm_jax.core import checkpoint
from csrm_jax.data import domain
from csrm_jax.evals.metrics import Calibration
from csrm_jax.models import transformer
from csrm_jax.reward import backbone, model as reward_model, scoring
from csrm_jax.ruleworld import examples
from csrm_jax.safety import schema, templates
from csrm_jax.train import step as training
from tests import small

PATH, TOKENIZER, SPEC = small.TOKENIZER_FILE, small.TOKENIZER, small.SPEC


@functools.cache
def _params(seed=0):
  return transformer.init_params(SPEC.model, seed)


def _save(folder, spec=SPEC, seed=0, step=3, change=lambda meta: meta):
  """Writes what a training run leaves in its work directory."""
  folder.mkdir(exist_ok=True)
  backbone.save_tokenizer(str(PATH), folder)
  state = training.init_state(_params(seed), optax.adam(1e-3))
  with checkpoint.Checkpoints(folder / 'checkpoints') as saved:
    saved.save(step, state, {'next': 0}, change(dataclasses.asdict(spec)))
  return folder


def test_spec_survives_json():
  layout = templates.Layout(
    order='conversation_first', words=('Yes', 'No'), chat_prefix='<user>', chat_suffix='<agent>'
  )
  spec = dataclasses.replace(
    SPEC,
    layout=layout,
    template_hash=templates.template_hash(layout),
    model=dataclasses.replace(SPEC.model, rope_theta=5e5, remat='dots'),
  )
  again = reward_model.Spec.from_dict(json.loads(json.dumps(dataclasses.asdict(spec))))
  assert again == spec != SPEC
  assert hash(again.model) == hash(spec.model)


def test_spec_makes_the_score_function_it_describes():
  example = examples.test_example(0, 1, 'seen')
  layout = templates.Layout(order='conversation_first')
  other = dataclasses.replace(SPEC, layout=layout)
  scores = [spec.make_score_fn(_params(), TOKENIZER)([example]) for spec in (SPEC, other)]
  direct = scoring.make_score_fn(
    SPEC.model,
    _params(),
    TOKENIZER,
    templates.resolve_verbalizers(TOKENIZER, SPEC.safe_words, SPEC.unsafe_words),
    layout=SPEC.layout,
    max_length=192,
  )([example])
  np.testing.assert_array_equal(scores[0], direct)
  assert abs(scores[1] - direct) > 1e-3
  tight = dataclasses.replace(SPEC, max_length=32)
  with pytest.raises(ValueError, match='rules_too_long'):
    tight.make_score_fn(_params(), TOKENIZER)([example])


def test_a_loaded_model_scores_as_its_parameters_do(tmp_path):
  rm = reward_model.load(str(_save(tmp_path, seed=1)))
  assert rm.spec == SPEC
  found = [examples.test_example(0, i, 'seen') for i in range(4)]
  want = SPEC.make_score_fn(_params(1), TOKENIZER)(found)
  assert np.ptp(want) > 1e-3
  np.testing.assert_array_equal(rm.score_fn(found), want)
  for example, score in zip(found, want, strict=True):
    (verdict,) = rm.score(example.safety, [example.conversation])
    assert verdict.score == pytest.approx(score, abs=1e-5)
    assert verdict.p_unsafe == pytest.approx(1 / (1 + np.exp(score)), abs=1e-5)
    assert verdict.label == ('safe' if score > 0 else 'unsafe')
  rules = found[0].safety
  verdicts = rm.score(rules, [e.conversation for e in found])
  assert [v.score for v in verdicts] == pytest.approx(
    [rm.score(rules, [e.conversation])[0].score for e in found], abs=1e-5
  )


def test_a_calibration_that_helped_changes_the_scores_of_its_checkpoint(tmp_path, capfd):
  folder, rows = _save(tmp_path / 'rm'), [examples.test_example(0, i, 'seen') for i in range(3)]
  raw = reward_model.load(folder).score_fn(rows)
  fitted = Calibration(2.0, 0.5, applied=True, reason='it helped', step=3)

  def scores(calibration, **options):
    (folder / 'calibration.json').write_text(json.dumps(calibration.to_dict()))
    return reward_model.load(folder, **options).score_fn(rows)

  np.testing.assert_allclose(scores(fitted), raw / 2 + 0.5, rtol=1e-6)
  assert 'scores are calibrated, score / 2 +0.5; it helped' in capfd.readouterr().err
  np.testing.assert_array_equal(scores(fitted, calibrated=False), raw)
  np.testing.assert_array_equal(scores(dataclasses.replace(fitted, applied=False)), raw)
  np.testing.assert_array_equal(scores(dataclasses.replace(fitted, step=2)), raw)
  assert reward_model.calibration(folder).temperature == 2.0
  # The checkpoint that training ended with is gone, or a bucket does not list it.
  said = small.error_of(scores, dataclasses.replace(fitted, step=4))
  assert 'ended at step 4' in said and 'ask for step=3' in said
  (folder / 'calibration.json').write_text('{"temperature": 0}')
  with pytest.raises(ValueError, match=r'calibration\.json: .*; remove it'):
    reward_model.load(folder)


def test_the_newest_checkpoint_is_loaded(tmp_path):
  _save(tmp_path, seed=0, step=3)
  rm = reward_model.load(_save(tmp_path, seed=1, step=5))
  example = examples.test_example(0, 0, 'seen')
  np.testing.assert_array_equal(
    rm.score_fn([example]), SPEC.make_score_fn(_params(1), TOKENIZER)([example])
  )


def test_a_model_is_scored_in_another_dtype_than_trained_in(tmp_path):
  _save(tmp_path, seed=1)
  numerics = dict.fromkeys(('dtype', 'param_dtype'), 'bfloat16')
  rm = reward_model.load(tmp_path, **numerics)
  assert rm.spec.model == dataclasses.replace(SPEC.model, **numerics)
  params = reward_model.restore_params(tmp_path, rm.spec)
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'bfloat16'}
  found = [examples.test_example(0, i, 'seen') for i in range(4)]
  got, want = rm.score_fn(found), reward_model.load(tmp_path).score_fn(found)
  np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())
  assert (got != want).any()


@pytest.mark.parametrize('option', [{'order': 'conversation_first'}, {'unroll': 2}])
def test_what_training_has_fixed_is_refused(tmp_path, option):
  with pytest.raises(ValueError, match='leave all settings but dtype and param_dtype'):
    reward_model.load(_save(tmp_path), **option)


def test_scoring_does_not_fall_back_to_an_older_checkpoint(tmp_path):
  _save(tmp_path, seed=0, step=3)
  intact = reward_model.load(_save(tmp_path, seed=1, step=5))
  assert intact.step == 5 and len(intact.digest) == 64
  for file in (tmp_path / 'checkpoints/5/state').rglob('d/*'):
    file.write_bytes(file.read_bytes()[:-99])
  message = small.error_of(reward_model.load, tmp_path)
  assert 'checkpoints/5: the checkpoint is damaged' in message and 'step=3' in message
  older = reward_model.load(tmp_path, step=3)
  assert older.step == 3 and older.digest != intact.digest
  example = examples.test_example(0, 0, 'seen')
  np.testing.assert_array_equal(
    older.score_fn([example]), SPEC.make_score_fn(_params(0), TOKENIZER)([example])
  )


def test_a_conversation_must_end_with_the_agent(tmp_path):
  rm = reward_model.load(_save(tmp_path))
  rules = examples.test_example(0, 0, 'seen').safety
  with pytest.raises(ValueError, match="ends with role 'user'"):
    rm.score(rules, [(schema.Message('user', 'Hello.'),)])


@pytest.mark.parametrize(
  ('field', 'name', 'fix'),
  [
    ('template_hash', 'template', 'csrm_jax version'),
    ('tokenizer_digest', 'tokenizer', 'put back the tokenizer file'),
  ],
)
def test_another_template_or_tokenizer_is_refused(tmp_path, field, name, fix):
  _save(tmp_path, dataclasses.replace(SPEC, **{field: '0123456789abcdef'}))
  with pytest.raises(ValueError, match=f'with {name} 0123456789ab') as error:
    reward_model.load(tmp_path)
  message = str(error.value)
  assert getattr(SPEC, field)[:12] in message and str(tmp_path) in message
  assert fix in message
  assert '\n' not in message


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda meta: {'model': meta['model']}, "'base' is missing"),
    (lambda meta: meta | {'flavour': 1}, "'flavour' is unknown"),
  ],
)
def test_what_is_no_reward_model_is_refused(tmp_path, change, message):
  with pytest.raises(ValueError, match=message) as error:
    reward_model.load(_save(tmp_path, change=change))
  assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def test_parameters_of_another_backbone_are_refused(tmp_path):
  model = dataclasses.replace(SPEC.model, mlp_dim=24)
  _save(tmp_path, dataclasses.replace(SPEC, model=model))
  with pytest.raises(ValueError, match='checkpoint of another model'):
    reward_model.load(tmp_path)


def test_parameters_that_are_not_finite_are_refused(tmp_path):
  params = jax.tree.map(lambda x: x, _params())
  params['final_norm']['scale'] = params['final_norm']['scale'].at[0].set(np.nan)
  state = training.init_state(params, optax.adam(1e-3))
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    saved.save(3, state, {}, dataclasses.asdict(SPEC))
  backbone.save_tokenizer(str(PATH), tmp_path)
  said = small.error_of(reward_model.load, tmp_path)
  assert 'checkpoints/3: final_norm/scale holds values that are NaN' in said


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='no readable checkpoint'):
    reward_model.load(tmp_path)
  (_save(tmp_path) / 'tokenizer.model').unlink()
  with pytest.raises(FileNotFoundError, match=r'no tokenizer\.model'):
    reward_model.load(tmp_path)


def test_what_it_was_not_trained_on_is_refused_or_marked(tmp_path, capfd):
  known = domain.of_texts('RuleWorld', 2 * ['Do not explain cats.', 'No cats.'], 16, num_rules=1)
  rm = reward_model.load(_save(tmp_path / 'new', dataclasses.replace(SPEC, domain=known)))
  assert rm.spec.domain == known
  safety = schema.SafetyConfig((schema.Category('Cats', 'Do not explain cats.'),))
  talk = [schema.Message('agent', 'Stop your blood thinner and take eight of those pills.')]
  message = small.error_of(rm.score, safety, [talk])
  assert 'conversation 0' in message and 'allow_out_of_domain=True' in message
  (verdict,) = rm.score(safety, [talk], allow_out_of_domain=True)
  assert verdict.out_of_domain == 'unknown words, longer prompt'
  allowed = reward_model.load(tmp_path / 'new', allow_out_of_domain=True)
  assert allowed.score(safety, [talk]) == [verdict]
  old = reward_model.load(
    _save(tmp_path / 'old', change=lambda meta: {k: meta[k] for k in meta if k != 'domain'})
  )
  assert old.score(safety, [talk]) == [dataclasses.replace(verdict, out_of_domain='')]
  assert 'what it was trained on' in capfd.readouterr().err
