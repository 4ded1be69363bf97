"""Writes a trained model in Hugging Face form, and checks what was written."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from csrm_jax.core import checks, files, tree
from csrm_jax.data import domain
from csrm_jax.models import gguf, hf, hf_config, lora, shards, transformer
from csrm_jax.models.config import DTYPES, ModelConfig
from csrm_jax.reward import backbone, exported, heads, model as reward_model
from csrm_jax.safety import schema, templates
from csrm_jax.text import tokenizer as tokenizer_lib

FORMS = ('causal_lm', 'sequence_classification', 'peft', 'gguf')
# The largest difference of an output from the trained model's that is let pass, as a fraction of
# the largest output. Merged adapters are rounded to the dtype of the kernels.
_TOLERANCE = {'float32': 1e-4, 'float16': 1e-2, 'bfloat16': 5e-2}
_ROWS, _LENGTH = 2, 64  # the shape of the tokens for the check


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/model or workdir/adapter, reads it back, and compares outputs."""
  if config.form not in FORMS:
    raise ValueError(f'config.form is {config.form!r}: choose one of {", ".join(FORMS)}')
  if not config.checkpoint:
    raise ValueError('config.checkpoint is empty: give --config=configs/export.py:checkpoint=DIR')
  dtypes = tuple(gguf.WRITTEN) if config.form == 'gguf' else DTYPES
  if config.dtype and config.dtype not in dtypes:
    raise ValueError(f"config.dtype={config.dtype!r} must be '' or one of {', '.join(dtypes)}")
  if config.dtype and config.form == 'peft':
    raise ValueError(f'config.dtype={config.dtype!r}: adapters stay float32; leave it empty')
  source = pathlib.Path(config.checkpoint).expanduser().absolute()
  spec, tokenizer = reward_model.describe(source)
  if spec.head != 'verbalizer' and (spec.head, config.form) != (
    'linear',
    'sequence_classification',
  ):
    way = 'form=sequence_classification' if spec.head == 'linear' else 'the work directory'
    raise ValueError(
      f'{config.checkpoint}: other programs cannot hold the head {spec.head!r} in form='
      f'{config.form}; use {way}'
    )
  export = _describe(config, source, spec, tokenizer)
  params = reward_model.restore_params(source, spec)
  folder = workdir / ('adapter' if config.form == 'peft' else 'model')
  if config.form == 'gguf':
    _write_gguf(config, export, spec, params, source, folder / 'model.gguf')
  else:
    _write(config, export, spec, params, folder)
    _write_tokenizer(source, export, folder)
  tokens = np.random.default_rng(config.seed).integers(
    tokenizer.vocab_size, size=(_ROWS, _LENGTH), dtype=np.int32
  )
  head, body = transformer.logits, heads.body(params)
  if spec.head == 'linear':
    column = params['head']['kernel']

    def head(cfg, params, hidden):
      return (hidden @ column)[..., 0]

  elif config.form == 'sequence_classification':
    safe, unsafe = _verdict_tokens(export)

    def head(*args):
      logits = transformer.logits(*args)
      return logits[..., safe] - logits[..., unsafe]

  outputs = _compute(spec.model, head, body, tokens)
  base = lora.split(params)[1] if config.form == 'peft' else {}
  del params, body  # so that the model is in memory once while it is read back
  again = _read_back(config.form, spec, folder, base, tokens)
  difference = float(np.abs(outputs - again).max())
  largest = float(np.abs(outputs).max())
  print(f'{config.form}: {folder}')
  print(
    f'largest difference of {outputs.size} outputs from those of the '
    f'trained model: {difference:.3g} (largest output {largest:.3g})'
  )
  if not difference <= _TOLERANCE[config.dtype or spec.model.param_dtype] * largest:
    raise ValueError(
      f'{folder}: what was written computes other outputs than the trained '
      'model; do not use it, and report this'
    )
  architecture = ''
  if config.form in hf_config.FORMS:
    architecture = hf_config.read(folder)['architectures'][0]
  name = config.hub or folder.name
  files.write(folder / 'README.md', exported.card(export, config.form, name, architecture))
  if not spec.base and (license_ := _license()):
    files.write(folder / 'LICENSE', license_)
  if config.hub:
    _push(folder, config.hub, config.hub_private)


def _describe(
  config: ml_collections.ConfigDict,
  source: pathlib.Path,
  spec: reward_model.Spec,
  tokenizer: tokenizer_lib.Tokenizer,
) -> exported.Export:
  """Returns what travels with the weights."""
  if not 0 < config.threshold < 1:
    raise ValueError(f'config.threshold is {config.threshold}; it is a P(unsafe) between 0 and 1')
  return exported.Export(
    # What it was trained on is a file of its own.
    spec=dataclasses.asdict(dataclasses.replace(spec, domain=None)),
    tokenizer=tokenizer,
    layout=spec.layout,
    verbalizers=spec.verbalizers(tokenizer),
    threshold=config.threshold,
    calibration=reward_model.calibration(source),
    rules=schema.load_safety(config.safety) if config.safety else None,
  )


def _write(
  config: ml_collections.ConfigDict,
  export: exported.Export,
  spec: reward_model.Spec,
  params: Any,
  folder: pathlib.Path,
) -> None:
  # How prompts must be written goes with the weights.
  metadata = {'csrm_jax': json.dumps(export.spec, sort_keys=True)}
  domain.write(folder, spec.domain)
  if config.form == 'peft':
    if not spec.base:
      raise ValueError(
        f'{config.checkpoint}: was trained without adapters (model.lora_rank '
        'is 0); choose another form'
      )
    lora.save_peft(folder, spec.model, lora.split(params)[0], spec.base, metadata)
    shards.write_json(folder / exported.FILE, export.fields())
    return
  cfg = dataclasses.replace(spec.model, lora_rank=0)
  if spec.model.lora_rank:
    params = lora.merge(spec.model, params)
  extra = {f'{name}_token_id': i for name, i in _special_ids(export.tokenizer).items()}
  extra |= {exported.KEY: export.fields()}
  if config.form == 'sequence_classification':
    params = _classifier(spec, export, params)
  else:
    extra |= export.classifier_fields()
  if config.dtype:
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
  hf.save(folder, cfg, params, metadata, extra=extra, max_shard_bytes=config.max_shard_bytes)


def _write_gguf(
  config: ml_collections.ConfigDict,
  export: exported.Export,
  spec: reward_model.Spec,
  params: Any,
  source: pathlib.Path,
  path: pathlib.Path,
) -> None:
  cfg = dataclasses.replace(spec.model, lora_rank=0)
  if spec.model.lora_rank:
    params = lora.merge(spec.model, params)
  file = backbone.find_tokenizer(source)
  ids = _special_ids(export.tokenizer)
  tokenizer = gguf.tokenizer_fields(file, ids, cfg.vocab_size)
  tokenizer |= {'chat_template': export.chat_template(file, for_llama_cpp=True)}
  options = {'dtype': config.dtype or cfg.param_dtype, 'description': export.fields()}
  hf.save_gguf(path, cfg, params, tokenizer, **options)


def _write_tokenizer(source: pathlib.Path, export: exported.Export, folder: pathlib.Path) -> None:
  """Writes the tokenizer, with the chat template of our prompt in place of its own."""
  backbone.save_tokenizer(source, folder)
  tokenizer, path = export.tokenizer, folder / 'tokenizer_config.json'
  settings = {}
  if isinstance(tokenizer, tokenizer_lib.SentencePieceTokenizer):
    # A .model file says nothing about how transformers should use it.
    ids = _special_ids(tokenizer)
    settings = {
      'tokenizer_class': 'LlamaTokenizer',
      'legacy': False,
      'add_bos_token': tokenizer.bos_id is not None,
      'add_eos_token': False,
      'add_prefix_space': tokenizer.opens_with_space,
      **{f'{name}_token': tokenizer.piece(i) for name, i in ids.items() if i is not None},
    }
  elif path.is_file():
    settings = {k: v for k, v in files.read_json(path).items() if k != 'chat_template'}
  shards.write_json(path, settings)
  template = export.chat_template(backbone.find_tokenizer(folder))
  files.write(folder / exported.TEMPLATE_FILE, template)


def _license() -> str | None:
  """Returns the text of this package's license, which holds for weights that it trained alone."""
  path = pathlib.Path(__file__).parents[2] / 'LICENSE'
  if path.is_file():
    return path.read_text(encoding='utf-8')
  return importlib.metadata.distribution('csrm_jax').read_text('licenses/LICENSE')


def _push(folder: pathlib.Path, name: str, private: bool) -> None:
  """Uploads the folder to the hub, as its user is logged in there."""
  api = checks.require('huggingface_hub', 'config.hub').HfApi()
  try:
    api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message='Export of csrm_jax')
  except Exception as error:  # Whatever the network or the hub says.
    raise ValueError(
      f'config.hub={name!r}: cannot be uploaded ({checks.reason(error)}); {folder} is complete, so '
      f'log in (hf auth login) and give the same command again, or upload it by hand'
    ) from None
  print(f'uploaded: https://huggingface.co/{name}')


def _special_ids(tokenizer: tokenizer_lib.Tokenizer) -> dict[str, int | None]:
  return {'bos': tokenizer.bos_id, 'eos': tokenizer.eos_id, 'pad': tokenizer.pad_id}


def _classifier(spec: reward_model.Spec, export: exported.Export, params: Any) -> dict[str, Any]:
  """Returns params with score/kernel [D, 1] in place of the output layer."""
  tokenizer, is_linear = export.tokenizer, spec.head == 'linear'
  if spec.model.final_softcap and not is_linear:
    raise ValueError(
      f'final_softcap={spec.model.final_softcap} is not linear, so that no '
      'one logit is the score; export with form=causal_lm'
    )
  # Every prompt of a layout ends with the same token, so that one example tells it.
  rules = schema.SafetyConfig((schema.Category('A', 'B.'),))
  segments = templates.render(rules, (schema.Message('agent', 'C'),), spec.layout)
  if tokenizer.encode_control(segments[-1].text)[-1] == tokenizer.pad_id:
    raise ValueError(
      f'the prompt ends with the padding token {tokenizer.pad_id}, which '
      'readers of a sequence classifier skip; export with form=causal_lm'
    )
  body = {name: part for name, part in params.items() if name not in ('lm_head', 'head')}
  if is_linear:
    kernel = params['head']['kernel'].astype(params['embed']['embedding'].dtype)
    return body | {'score': {'kernel': kernel}}
  safe, unsafe = _verdict_tokens(export)
  if spec.model.tie_embeddings:
    rows = params['embed']['embedding']  # [V, D]
  else:
    rows = params['lm_head']['kernel'].T
  # Subtracted in float32, so that the difference of bfloat16 rows is rounded once.
  wide = [rows[i].astype(jnp.float32) for i in (safe, unsafe)]
  kernel = (wide[0] - wide[1])[:, None].astype(rows.dtype)
  return body | {'score': {'kernel': kernel}}


def _verdict_tokens(export: exported.Export) -> tuple[int, int]:
  for label in schema.LABELS:
    ids = getattr(export.verbalizers, label)
    if len(ids) != 1:
      words = [export.tokenizer.decode([i]) for i in ids]
      raise ValueError(
        f'{len(ids)} tokens say "{label}" ({words}), but one logit is the '
        'score only if one token does; export with form=causal_lm, or train '
        f'with one of them as config.template.{label}_words'
      )
  return export.verbalizers.safe[0], export.verbalizers.unsafe[0]


def _read_back(
  form: str, spec: reward_model.Spec, folder: pathlib.Path, base: Any, tokens: np.ndarray
) -> np.ndarray:
  """Returns the outputs of the model in the folder, from what was written alone."""
  if form == 'peft':
    cfg = dataclasses.replace(spec.model, **lora.read_peft(folder))
    params = tree.merge(base, lora.load_peft(folder, cfg))
    return _compute(cfg, transformer.logits, params, tokens)
  source = hf.Source(folder / 'model.gguf' if form == 'gguf' else folder)
  cfg, params = hf.load(source)
  if form != 'sequence_classification':
    return _compute(cfg, transformer.logits, params, tokens)
  kernel = params.pop('score')['kernel']
  # The folder has no output layer, and a model with tied embeddings needs none.
  cfg = dataclasses.replace(cfg, tie_embeddings=True)
  return _compute(cfg, lambda cfg, params, hidden: (hidden @ kernel)[..., 0], params, tokens)


def _compute(
  cfg: ModelConfig, head: Callable[..., jax.Array], params: Any, tokens: np.ndarray
) -> np.ndarray:
  """Returns the head's outputs for tokens [B,T], computed in float32."""
  cfg = dataclasses.replace(cfg, dtype='float32', remat='none')
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

  @jax.jit
  def forward(params, tokens):
    hidden = transformer.hidden(cfg, params, tokens, positions, jnp.ones_like(tokens))
    return head(cfg, params, hidden)

  return np.asarray(forward(params, tokens), np.float32)
