"""Writes a trained model in Hugging Face form, and checks what was written."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from csrm_jax.core import tree
from csrm_jax.models import hf, hf_config, lora, shards, transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.reward import backbone, model as reward_model
from csrm_jax.safety import schema, templates
from csrm_jax.text import tokenizer as tokenizer_lib

FORMS = ('causal_lm', 'sequence_classification', 'peft')
# The largest difference of an output from the trained model's that is let pass, as a fraction of
# the largest output. Merged adapters are rounded to the dtype of the kernels.
_TOLERANCE = {'float32': 1e-4, 'bfloat16': 5e-2}
_ROWS, _LENGTH = 2, 64  # the shape of the tokens for the check


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/model or workdir/adapter, reads it back, and compares outputs."""
  if config.form not in FORMS:
    raise ValueError(f'config.form is {config.form!r}: choose one of {", ".join(FORMS)}')
  if not config.checkpoint:
    raise ValueError('config.checkpoint is empty: give --config=configs/export.py:checkpoint=DIR')
  source = pathlib.Path(config.checkpoint).expanduser().absolute()
  spec, tokenizer = reward_model.describe(source)
  params = reward_model.restore_params(source, spec)
  folder = workdir / ('adapter' if config.form == 'peft' else 'model')
  _write(config, spec, tokenizer, params, folder)
  backbone.save_tokenizer(source, folder)
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
    shards.write_json(folder / 'tokenizer_config.json', settings)
  tokens = np.random.default_rng(config.seed).integers(
    tokenizer.vocab_size, size=(_ROWS, _LENGTH), dtype=np.int32
  )
  head = transformer.logits
  if config.form == 'sequence_classification':
    safe, unsafe = _verdict_tokens(spec, tokenizer)

    def head(*args):
      logits = transformer.logits(*args)
      return logits[..., safe] - logits[..., unsafe]

  outputs = _compute(spec.model, head, params, tokens)
  base = lora.split(params)[1] if config.form == 'peft' else {}
  del params  # so that the model is in memory once while it is read back
  again = _read_back(config.form, spec, folder, base, tokens)
  difference = float(np.abs(outputs - again).max())
  largest = float(np.abs(outputs).max())
  print(f'{config.form}: {folder}')
  print(
    f'largest difference of {outputs.size} outputs from those of the '
    f'trained model: {difference:.3g} (largest output {largest:.3g})'
  )
  if not difference <= _TOLERANCE[spec.model.param_dtype] * largest:
    raise ValueError(
      f'{folder}: what was written computes other outputs than the trained '
      'model; do not use it, and report this'
    )


def _write(
  config: ml_collections.ConfigDict,
  spec: reward_model.Spec,
  tokenizer: tokenizer_lib.Tokenizer,
  params: Any,
  folder: pathlib.Path,
) -> None:
  # How prompts must be written goes with the weights.
  metadata = {'csrm_jax': json.dumps(dataclasses.asdict(spec), sort_keys=True)}
  if config.form == 'peft':
    if not spec.base:
      raise ValueError(
        f'{config.checkpoint}: was trained without adapters (model.lora_rank '
        'is 0); choose another form'
      )
    lora.save_peft(folder, spec.model, lora.split(params)[0], spec.base, metadata)
    return
  cfg = dataclasses.replace(spec.model, lora_rank=0)
  if spec.model.lora_rank:
    params = lora.merge(spec.model, params)
  if config.form == 'sequence_classification':
    params = _classifier(spec, tokenizer, params)
  ids = {f'{name}_token_id': i for name, i in _special_ids(tokenizer).items()}
  hf.save(folder, cfg, params, metadata, extra=ids, max_shard_bytes=config.max_shard_bytes)


def _special_ids(tokenizer: tokenizer_lib.Tokenizer) -> dict[str, int | None]:
  return {'bos': tokenizer.bos_id, 'eos': tokenizer.eos_id, 'pad': tokenizer.pad_id}


def _classifier(
  spec: reward_model.Spec, tokenizer: tokenizer_lib.Tokenizer, params: Any
) -> dict[str, Any]:
  """Returns params with score/kernel [D, 1] in place of the output layer."""
  safe, unsafe = _verdict_tokens(spec, tokenizer)
  if spec.model.final_softcap:
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
  if spec.model.tie_embeddings:
    rows = params['embed']['embedding']  # [V, D]
  else:
    rows = params['lm_head']['kernel'].T
  # Subtracted in float32, so that the difference of bfloat16 rows is rounded once.
  wide = [rows[i].astype(jnp.float32) for i in (safe, unsafe)]
  kernel = (wide[0] - wide[1])[:, None].astype(rows.dtype)
  body = {name: part for name, part in params.items() if name != 'lm_head'}
  return body | {'score': {'kernel': kernel}}


def _verdict_tokens(spec: reward_model.Spec, tokenizer: tokenizer_lib.Tokenizer) -> tuple[int, int]:
  verbalizers = spec.verbalizers(tokenizer)
  for label in ('safe', 'unsafe'):
    ids = getattr(verbalizers, label)
    if len(ids) != 1:
      words = [tokenizer.decode([i]) for i in ids]
      raise ValueError(
        f'{len(ids)} tokens say "{label}" ({words}), but one logit is the '
        'score only if one token does; export with form=causal_lm, or train '
        f'with one of them as config.template.{label}_words'
      )
  return verbalizers.safe[0], verbalizers.unsafe[0]


def _read_back(
  form: str, spec: reward_model.Spec, folder: pathlib.Path, base: Any, tokens: np.ndarray
) -> np.ndarray:
  """Returns the outputs of the model in the folder, from what was written alone."""
  if form == 'peft':
    cfg = dataclasses.replace(spec.model, **lora.read_peft(folder))
    params = tree.merge(base, lora.load_peft(folder, cfg))
    return _compute(cfg, transformer.logits, params, tokens)
  source = hf.Source(folder)
  cfg, params = hf.load(source)
  assert hf_config.form(source.spec, source.where) == form
  if form == 'causal_lm':
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
