import pathlib

import jax
import numpy as np
import pytest
import safetensors

import csrm_jax
from csrm_jax import config as config_lib
from csrm_jax.data import features
from csrm_jax.models import config, hf, transformer
from csrm_jax.ruleworld import corpus
from csrm_jax.runners import pretrain
from csrm_jax.safety import templates
from csrm_jax.text import tokenizer as tokenizer_lib
from csrm_jax.train import losses

FOLDER = pathlib.Path(csrm_jax.__file__).parent / 'ruleworld'
TOKENIZER = tokenizer_lib.load_tokenizer(FOLDER / 'tokenizer.model')
ANSWERS = (('yes', 'no'), ('S2',), ('lotteries', 'unsaid', 'yes'))


def _document(answers):
  """Returns questions that only the answers of have a weight."""
  spans = [corpus.Span(templates.RULES, control=True)]
  for answer in answers:
    spans += [
      corpus.Span('Is whisky allowed?'),
      corpus.Span(templates.ANSWER, control=True),
      corpus.Span(f' {answer}', weight=1.0),
      corpus.Span('\n'),
    ]
  return tuple(spans)


def _packed():
  """Returns a batch of two rows that hold all documents."""
  atoms = [pretrain.encode_document(_document(answers), TOKENIZER) for answers in ANSWERS]
  batch, left = features.pack_rows(atoms, features.BatchShape(2, 64, 4))
  assert not left
  assert batch['segment_ids'].max() > 1  # something is packed
  return batch


def _loss(logits, batch):
  return losses.lm_loss(logits, batch['tokens'], batch['segment_ids'], batch['loss_weight'])


def test_weights_sit_on_the_answers_and_on_nothing_else():
  batch = _packed()
  assert set(np.unique(batch['loss_weight'])) == {0, 1}
  found = []
  for row, segments in enumerate(batch['segment_ids']):
    for segment in range(1, segments.max() + 1):
      chosen = (segments == segment) & (batch['loss_weight'][row] > 0)
      found.append(TOKENIZER.decode(batch['tokens'][row][chosen]))
  want = [''.join(f' {a}' for a in answers) for answers in ANSWERS]
  assert sorted(found) == sorted(want)


def test_only_the_place_before_an_answer_has_a_gradient():
  """One place too early or too late would teach the question, or the end."""
  batch = _packed()
  logits = (
    np.random.default_rng(0)
    .standard_normal((*batch['tokens'].shape, TOKENIZER.vocab_size))
    .astype(np.float32)
  )
  grads = jax.grad(lambda x: _loss(x, batch)[0])(logits)
  predicts = np.abs(grads).sum(-1) > 0  # [B,T]
  want = np.zeros_like(predicts)
  want[:, :-1] = batch['loss_weight'][:, 1:] > 0
  np.testing.assert_array_equal(predicts, want)
  answer = TOKENIZER.encode_control(templates.ANSWER)
  before = batch['tokens'][predicts]
  assert np.isin(answer, before).all()
  # Whatever follows the question is predicted as what stands there.
  for row, place in np.argwhere(predicts):
    sign = np.sign(grads[row, place])
    assert np.flatnonzero(sign < 0) == [batch['tokens'][row, place + 1]]


def test_perfect_answers_have_no_loss_and_shifted_ones_do():
  batch = _packed()
  num_answers = batch['loss_weight'].sum()
  target = np.roll(batch['tokens'], -1, axis=1)
  sure = 100 * np.eye(TOKENIZER.vocab_size, dtype=np.float32)
  # Sure of the answers, and at a loss everywhere else.
  sure_here = np.roll(batch['loss_weight'], -1, axis=1)[..., None]
  total, weight, metrics = _loss(sure[target] * sure_here, batch)
  assert total == pytest.approx(0, abs=1e-4) and weight == num_answers
  assert metrics['lm/accuracy'] == (num_answers, num_answers)
  for shift in (-1, 1):
    shifted = _loss(sure[np.roll(target, shift, axis=1)], batch)
    assert shifted[0] > 50 * num_answers
    assert shifted[2]['lm/accuracy'][0] == 0


def test_documents_keep_their_text_and_weights():
  documents = pretrain.Documents(0, 1000, 500)
  for i in range(0, 1000, 100):
    spans = documents[i]
    (prompt,) = pretrain.encode_document(spans, TOKENIZER).prompts
    assert prompt.tokens[0] == TOKENIZER.bos_id
    assert len(prompt.tokens) == len(prompt.loss_weight)
    ids, weights = [], []
    for span in spans:
      encode = TOKENIZER.encode_control if span.control else TOKENIZER.encode
      ids += encode(span.text)
      weights += [span.weight] * len(encode(span.text))
    np.testing.assert_array_equal(prompt.tokens[1:], ids)
    np.testing.assert_allclose(prompt.loss_weight[1:], weights)
    plain = ''.join(span.text for span in spans if not span.control)
    assert TOKENIZER.decode(prompt.tokens) == plain


def test_a_tokenizer_without_bos_has_none_in_front():
  class Tokenizer:
    bos_id = None
    encode, encode_control = TOKENIZER.encode, TOKENIZER.encode_control

  spans = _document(('yes',))
  (prompt,) = pretrain.encode_document(spans, Tokenizer()).prompts
  (with_bos,) = pretrain.encode_document(spans, TOKENIZER).prompts
  np.testing.assert_array_equal(prompt.tokens, with_bos.tokens[1:])
  np.testing.assert_array_equal(prompt.loss_weight, with_bos.loss_weight[1:])


def test_verdicts_are_taught_after_the_curriculum_alone():
  verdict = templates.resolve_verbalizers(TOKENIZER)
  documents = pretrain.Documents(0, 2000, 1000)
  found = []
  for i in range(0, 2000, 20):
    (prompt,) = pretrain.encode_document(documents[i], TOKENIZER).prompts
    taught = prompt.tokens[prompt.loss_weight > 0]
    found.append(np.isin(taught, verdict.safe + verdict.unsafe).any())
  assert not any(found[:50]) and any(found[50:])


def test_the_curriculum_grows_and_the_digest_sees_everything():
  documents = pretrain.Documents(3, 100, 50)
  assert documents[10] == corpus.document(3, 10, 0.2)
  assert documents[99] == corpus.document(3, 99, 1.0)
  digest = documents.digest(20)
  assert digest == pretrain.Documents(3, 100, 50).digest(20)
  assert len(digest) == 64
  others = {
    pretrain.Documents(*fields).digest(20) for fields in ((4, 100, 50), (3, 100, 10), (3, 300, 50))
  }
  assert len(others | {digest}) == 4


def test_the_shipped_weights_belong_to_this_corpus_and_tokenizer():
  path = FOLDER / 'base' / 'model.safetensors'
  with safetensors.safe_open(path, 'numpy') as file:
    metadata = file.metadata()
  # The numbers of configs/pretrain.py:task=ordinary.
  assert metadata['made_by'].endswith('pretrain.py:task=ordinary')
  documents = pretrain.Documents(int(metadata['seed']), 2_000_000, 1)
  assert metadata['data_digest'] == documents.digest()
  assert metadata['tokenizer_digest'] == TOKENIZER.digest


def test_loss_fn_equals_the_model_and_lm_loss():
  cfg = config.preset(
    'tiny',
    TOKENIZER.vocab_size,
    num_layers=1,
    embed_dim=16,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=16,
    unroll=1,
  )
  params, batch = transformer.init_params(cfg, 0), _packed()
  total, weight, _ = jax.jit(pretrain.make_loss_fn(cfg))(params, batch)
  assert weight == batch['loss_weight'].sum()
  alone = 0.0
  for answers in ANSWERS:
    atom = pretrain.encode_document(_document(answers), TOKENIZER)
    one, _ = features.pack_rows([atom], features.BatchShape(2, 64, 4))
    alone += jax.jit(pretrain.make_loss_fn(cfg))(params, one)[0]
  np.testing.assert_allclose(total, alone, rtol=1e-5)


def test_the_policy_goes_on_from_the_base_model(tmp_path):
  config = config_lib.load_module('configs/pretrain.py').get_config('task=policy,num_steps=1')
  config.log_every = config.checkpoint_every = 1
  config.data.batch_size, config.data.row_length = 1, 128
  config.model.overrides.unroll = 1  # Compiles faster.
  config.optim.lr, config.optim.warmup_steps = 1e-4, 0
  pretrain.run(config, tmp_path)
  with safetensors.safe_open(tmp_path / 'policy' / 'model.safetensors', 'numpy') as file:
    stored = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    assert file.metadata()['made_by'].endswith('pretrain.py:task=policy')
  assert stored == {'float16'}
  _, after = hf.load(tmp_path / 'policy')
  _, before = hf.load(FOLDER / 'base')
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, before)
  assert {str(x.dtype) for x in jax.tree.leaves(after)} == {'float32'}
  assert 0 < max(jax.tree.leaves(change)) < 2e-3
