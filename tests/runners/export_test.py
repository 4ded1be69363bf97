"""Exports of runs whose checkpoints were never trained: random weights do."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import csrm_jax
from csrm_jax import config as config_lib
from csrm_jax.core import checkpoint
from csrm_jax.data import features
from csrm_jax.models import hf, lora, transformer
from csrm_jax.reward import backbone, exported, heads, model as reward_model
from csrm_jax.ruleworld import examples as examples_lib
from csrm_jax.runners import export
from csrm_jax.safety import schema, templates
from csrm_jax.text import chat, tokenizer as tokenizer_lib
from tests import small

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = pathlib.Path(csrm_jax.__file__).parent / ('ruleworld/tokenizer.model')
CFG = small.model(vocab_size=tokenizer_lib.load_tokenizer(TOKENIZER).vocab_size)
LORA = dataclasses.replace(CFG, lora_rank=3, lora_targets=('query', 'down'))


def _random_params(cfg):
  rng = np.random.default_rng(5)
  return jax.tree.map(
    lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), transformer.shapes(cfg)
  )


@pytest.fixture
def make_run(tmp_path):
  """(cfg, **fields of Spec) -> work directory of a run with random weights."""

  def make(cfg=CFG, **fields):
    workdir = tmp_path / 'run'
    workdir.mkdir()
    tokenizer = tokenizer_lib.load_tokenizer(TOKENIZER)
    backbone.save_tokenizer(TOKENIZER, workdir)
    params = _random_params(cfg)
    if cfg.lora_rank:
      adapters, base = lora.split(params)
      hf.save(tmp_path / 'base', dataclasses.replace(cfg, lora_rank=0), base)
      fields |= {'base': str(tmp_path / 'base'), 'base_digest': hf.digest(tmp_path / 'base')}
      params = adapters
    if 'head' in fields:
      params |= heads.init(fields['head'], cfg, seed=5)
    layout = templates.Layout()
    spec = reward_model.Spec(
      **{
        'model': cfg,
        'layout': layout,
        'max_length': 256,
        'safe_words': (' safe',),
        'unsafe_words': (' unsafe',),
        'template_hash': templates.template_hash(layout),
        'tokenizer_digest': tokenizer.digest,
        **fields,
      }
    )
    with checkpoint.Checkpoints(workdir / 'checkpoints') as saved:
      saved.save(1, {'params': params}, {}, dataclasses.asdict(spec))
    return workdir

  return make


def _export(run, tmp_path, form, **fields):
  c = config_lib.load_module(ROOT / 'configs/export.py').get_config(f'checkpoint={run},form={form}')
  c.update(fields)
  export.run(c, tmp_path / 'out')
  return tmp_path / 'out' / ('adapter' if form == 'peft' else 'model')


def _prompts(run, num=6):
  spec, tokenizer = reward_model.describe(run)
  encoder = features.Encoder(tokenizer, spec.max_length, spec.layout)
  rows = [examples_lib.training_example(3, i) for i in range(num)]
  tokens = [features.require(features.encode(row, encoder)).prompts[0].tokens for row in rows]
  return rows, tokens


def _padded(prompts, pad):
  length = max(map(len, prompts))
  return np.stack([np.pad(p, (0, length - len(p)), constant_values=pad) for p in prompts]).astype(
    np.int64
  )


@pytest.mark.parametrize('cfg', [CFG, dataclasses.replace(CFG, tie_embeddings=False), LORA])
def test_classifier_of_transformers_gives_our_scores(cfg, make_run, tmp_path, capsys):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  run = make_run(cfg)
  folder = _export(run, tmp_path, 'sequence_classification')
  print(capsys.readouterr().out)
  rows, prompts = _prompts(run)
  model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info.values()), info
  assert model.config.num_labels == 1
  tokens = _padded(prompts, model.config.pad_token_id)
  with torch.no_grad():
    theirs = (
      model(torch.tensor(tokens), attention_mask=torch.tensor(tokens != model.config.pad_token_id))
      .logits[:, 0]
      .numpy()
    )
  ours = csrm_jax.load(run).score_fn(rows)
  difference = np.abs(theirs - ours).max()
  print(f'classifier: {difference:.2e} of {np.abs(ours).max():.2f}')
  assert difference < 1e-4 < np.abs(ours).max()


def test_whole_model_with_merged_adapters(make_run, tmp_path, capsys):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  run = make_run(LORA)
  folder = _export(run, tmp_path, 'causal_lm', max_shard_bytes=100_000)
  out = capsys.readouterr().out
  assert 'largest difference of' in out and 'causal_lm: ' in out
  assert len(list(folder.glob('model-*.safetensors'))) > 1
  with safetensors.safe_open(next(folder.glob('*.safetensors')), 'numpy') as file:
    metadata = json.loads(file.metadata()['csrm_jax'])
  assert reward_model.Spec.from_dict(metadata).model == LORA
  rows, prompts = _prompts(run)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  spec, tokenizer = reward_model.describe(run)
  (safe,), (unsafe,) = dataclasses.astuple(spec.verbalizers(tokenizer))
  scores = []
  for prompt in prompts:
    with torch.no_grad():
      logits = model(torch.tensor(prompt[None]).long()).logits[0, -1].numpy()
    scores.append(logits[safe] - logits[unsafe])
  ours = csrm_jax.load(run).score_fn(rows)
  difference = np.abs(np.array(scores) - ours).max()
  print(f'merged: {difference:.2e} of {np.abs(ours).max():.2f}')
  assert difference < 1e-4


def test_transformers_encodes_prompts_alike(make_run, tmp_path):
  transformers = pytest.importorskip('transformers')
  run = make_run()
  folder = _export(run, tmp_path, 'causal_lm')
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 2)
  for row, tokens in zip(*_prompts(run), strict=True):
    text = templates.render_text(templates.render(row.safety, row.conversation, templates.Layout()))
    assert theirs(text).input_ids == tokens.tolist()
    messages = [message.to_dict() for message in row.conversation]
    ids = theirs.apply_chat_template(messages, safety=row.safety.to_dict(), return_dict=True)
    assert ids['input_ids'] == tokens.tolist()


def test_adapter(make_run, tmp_path, capsys):
  run = make_run(LORA)
  folder = _export(run, tmp_path, 'peft')
  assert 'those of the trained model: 0 (' in capsys.readouterr().out
  spec = json.loads((folder / 'adapter_config.json').read_text())
  assert spec['base_model_name_or_path'] == str(tmp_path / 'base')
  assert spec['target_modules'] == ['q_proj', 'down_proj']
  assert (folder / 'tokenizer.model').is_file()


def test_bfloat16_weights_stay_so(make_run, tmp_path, capsys):
  cfg = dataclasses.replace(CFG, param_dtype='bfloat16')
  folder = _export(make_run(cfg), tmp_path, 'causal_lm')
  assert 'those of the trained model: 0 (' in capsys.readouterr().out
  assert hf.load_config(folder).param_dtype == 'bfloat16'


@pytest.mark.parametrize(
  'form,cfg,fields,message',
  [
    ('peft', CFG, {}, 'was trained without adapters'),
    ('sequence_classification', CFG, {'safe_words': (' safe', ' yes')}, r'2 tokens say "safe"'),
    (
      'sequence_classification',
      dataclasses.replace(CFG, final_softcap=9.0),
      {},
      'final_softcap=9.0 is not linear',
    ),
    ('onnx', CFG, {}, "config.form is 'onnx': choose one of causal_lm"),
  ],
)
def test_what_has_no_such_form(form, cfg, fields, message, make_run, tmp_path):
  run = make_run(cfg, **fields)
  c = config_lib.load_module(ROOT / 'configs/export.py').get_config(f'checkpoint={run}')
  c.form = form
  with pytest.raises(ValueError, match=message):
    export.run(c, tmp_path / 'out')
  assert not list(tmp_path.glob('out/*/model*'))


@pytest.mark.parametrize('cfg', [CFG, LORA])
def test_a_linear_head_is_exported_as_the_classifier_that_it_is(cfg, make_run, tmp_path):
  run = make_run(cfg, head='linear', safe_words=(' safe', ' yes'))
  rows, _ = _prompts(run, 4)
  want = csrm_jax.load(run).score_fn(rows)
  assert np.ptp(want) > 1e-3
  assert 'form=sequence_classification' in small.error_of(_export, run, tmp_path, 'causal_lm')
  folder = _export(run, tmp_path, 'sequence_classification')
  np.testing.assert_allclose(csrm_jax.load(folder).score_fn(rows), want, atol=1e-4)


def test_a_head_that_no_form_holds_is_refused(make_run, tmp_path):
  run = make_run(head='members:num=3')
  for form in export.FORMS:
    said = small.error_of(_export, run, tmp_path, form)
    assert "cannot hold the head 'members:num=3'" in said and 'work directory' in said


def test_a_wrong_export_is_refused(make_run, tmp_path, monkeypatch):
  run = make_run()
  save = hf.save

  def spoil(folder, cfg, params, *args, **kwargs):
    scale = {'scale': 1.5 * jnp.asarray(params['final_norm']['scale'])}
    save(folder, cfg, params | {'final_norm': scale}, *args, **kwargs)

  monkeypatch.setattr(hf, 'save', spoil)
  with pytest.raises(ValueError, match='computes other outputs than'):
    _export(run, tmp_path, 'causal_lm')


def test_no_checkpoint(tmp_path):
  with pytest.raises(ValueError, match=r'config\.checkpoint is empty'):
    _export('', tmp_path, 'causal_lm')
  with pytest.raises(FileNotFoundError, match='no readable checkpoint'):
    _export(tmp_path / 'nowhere', tmp_path, 'causal_lm')


@pytest.mark.parametrize('form', export.FORMS)
def test_what_was_written_is_read_back(form, make_run, tmp_path):
  run = make_run(LORA)
  folder = _export(run, tmp_path, form)
  if form == 'gguf':
    folder /= 'model.gguf'
  rows, _ = _prompts(run, 4)
  rm = csrm_jax.load(folder)
  np.testing.assert_allclose(rm.score_fn(rows), csrm_jax.load(run).score_fn(rows), atol=1e-4)
  assert len(rm.digest) == 64 and rm.digest == reward_model.digest(folder)
  assert (rm.spec.max_length, rm.spec.safe_words) == (256, (' safe',))
  assert 'knows its format' in small.error_of(csrm_jax.load, folder, words=('Yes', 'No'))


def test_bfloat16_of_a_float32_run(make_run, tmp_path):
  run = make_run()
  folder = _export(run, tmp_path, 'causal_lm', dtype='bfloat16')
  assert hf.load_config(folder).param_dtype == 'bfloat16'
  rows, _ = _prompts(run, 4)
  ours = csrm_jax.load(run).score_fn(rows)
  assert np.abs(csrm_jax.load(folder, dtype='float32').score_fn(rows) - ours).max() < 0.1


def test_config_card_and_license(make_run, tmp_path):
  run = make_run()
  fitted = {'temperature': 2.0, 'bias': 0.5, 'applied': True}
  (run / 'calibration.json').write_text(json.dumps(fitted))
  folder = _export(
    run, tmp_path, 'causal_lm', threshold=0.4, safety=str(ROOT / 'configs/safety/hospital.yaml')
  )
  spec = json.loads((folder / 'config.json').read_text())
  saved = spec['csrm_jax']
  assert saved['threshold'] == 0.4 and saved['spec']['layout']['order'] == 'rules_first'
  assert fitted.items() <= saved['calibration'].items()
  (safe,), (unsafe,) = (saved['verdict'][label]['token_ids'] for label in ('safe', 'unsafe'))
  # vLLM reads the two from the names of their tokens, "safe" last.
  assert (spec['method'], spec['id2label']) == ('from_2_way_softmax', {'0': 'safe'})
  _, tokenizer = reward_model.describe(run)
  assert spec['classifier_from_token'] == [tokenizer.piece(unsafe), tokenizer.piece(safe)]
  rows, _ = _prompts(run, 2)
  scores = [csrm_jax.load(at).score_fn(rows) for at in (run, folder)]
  np.testing.assert_allclose(*scores, atol=1e-4)
  raw = csrm_jax.load(folder, calibrated=False).score_fn(rows)
  np.testing.assert_allclose(scores[0], raw / 2 + 0.5, atol=1e-4)
  card = (folder / 'README.md').read_text()
  assert 'Calibrated scores are score / 2 + 0.5.' in card
  assert 'default rules judge: ' in card and f'log_p[[{safe}]]' in card and '@' not in card
  assert (folder / 'LICENSE').read_text() == (ROOT / 'LICENSE').read_text()
  # The default rules stand in the template.
  template = (folder / 'chat_template.jinja').read_text()
  talk = (schema.Message('agent', 'Hello.'),)
  rules = schema.load_safety(ROOT / 'configs/safety/hospital.yaml')
  want = templates.render_text(templates.render(rules, talk, templates.Layout()))
  assert chat.render(template, [talk[0].to_dict()]) == f'<s>{want}'


def test_upload(make_run, tmp_path, monkeypatch, capsys):
  hub = pytest.importorskip('huggingface_hub')
  calls = []

  class Api:
    def create_repo(self, name, private, exist_ok):
      calls.append((name, private))

    def upload_folder(self, repo_id, folder_path, commit_message):
      calls.append(sorted(path.name for path in folder_path.iterdir()))
      if len(calls) > 2:
        raise OSError('401: not logged in')

  monkeypatch.setattr(hub, 'HfApi', Api)
  run = make_run()
  _export(run, tmp_path, 'causal_lm', hub='me/rm')
  assert calls[0] == ('me/rm', True)
  assert {'README.md', 'LICENSE', 'config.json', 'model.safetensors'} <= set(calls[1])
  assert 'https://huggingface.co/me/rm' in capsys.readouterr().out
  with pytest.raises(ValueError, match='401: not logged in'):
    _export(run, tmp_path, 'causal_lm', hub='me/rm')


@pytest.mark.real
def test_a_folder_of_a_chat_backbone(make_run, tmp_path, monkeypatch):
  """What transformers finds in the folder alone writes and reads our prompt."""
  source = os.environ.get('CSRM_SMOLLM2_DIR')
  transformers = pytest.importorskip('transformers')
  if not source:
    pytest.skip('no SmolLM2; set CSRM_SMOLLM2_DIR (tests/fetch_smollm2.py)')
  tokenizer = backbone.load_tokenizer(source)
  prefix, suffix = backbone.chat_marks(source, tokenizer)
  layout = templates.Layout(chat_prefix=prefix, chat_suffix=suffix)
  safe, unsafe = templates.pair_spellings(tokenizer)
  monkeypatch.setitem(globals(), 'TOKENIZER', pathlib.Path(source) / 'tokenizer.json')
  run = make_run(
    dataclasses.replace(CFG, vocab_size=tokenizer.vocab_size),
    layout=layout,
    template_hash=templates.template_hash(layout),
    tokenizer_digest=tokenizer.digest,
    safe_words=safe,
    unsafe_words=unsafe,
    max_length=512,  # nothing is cut, which only our encoder would do
  )
  folder = _export(run, tmp_path, 'causal_lm')
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  for row, tokens in zip(*_prompts(run), strict=True):
    messages = [message.to_dict() for message in row.conversation]
    ids = theirs.apply_chat_template(messages, safety=row.safety.to_dict(), return_dict=True)
    assert ids['input_ids'] == tokens.tolist()
  rows, _ = _prompts(run, 3)
  ours = csrm_jax.load(run, allow_out_of_domain=True).score_fn(rows)
  again = csrm_jax.load(folder, allow_out_of_domain=True).score_fn(rows)
  np.testing.assert_allclose(again, ours, atol=1e-4)


def test_several_tokens_for_a_label_are_classes_of_vllm():
  tokenizer = small.TOKENIZER
  verbalizers = templates.Verbalizers((20, 21), (22,))
  found = exported.Export({}, tokenizer, templates.Layout(), verbalizers, 0.5, None, None)
  fields = found.classifier_fields()
  assert fields['method'] == 'no_post_processing'
  assert fields['classifier_from_token'] == [tokenizer.piece(i) for i in (20, 21, 22)]
  assert fields['id2label'] == {'0': 'safe 20', '1': 'safe 21', '2': 'unsafe 22'}
