"""Makes the weights that RuleWorld ships: its base model and its policies.

Reward models start from the base model, which is trained from scratch. Alignment starts from a
policy, which is the base model taught to answer requests.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import ml_collections
import numpy as np

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.data import domain as domain_lib, features, pipeline
from csrm_jax.models import config as model_config, hf, transformer
from csrm_jax.ruleworld import corpus, lexicon
from csrm_jax.text import tokenizer as tokenizer_lib
from csrm_jax.train import loop as loop_lib, losses, step as training

# task -> a function (seed, index) -> a dialogue to learn from; None learns from the corpus.
_DIALOGUES = {
  'base': None,
  'read': None,
  'verdicts': None,
  'ordinary': None,
  'policy': corpus.dialogue,
  'structured': corpus.structured_dialogue,
}


@dataclasses.dataclass(frozen=True)
class Documents:
  """The documents that a model learns from, as a sequence: the corpus, or dialogues."""

  seed: int
  num_documents: int
  curriculum_length: int  # documents of the corpus until its lists have their full length
  dialogue: Callable[[int, int], tuple[corpus.Span, ...]] | None = None  # None: the corpus

  def __len__(self) -> int:
    return self.num_documents

  def __getitem__(self, index: int) -> tuple[corpus.Span, ...]:
    if self.dialogue:
      return self.dialogue(self.seed, index)
    return corpus.document(self.seed, index, min(index / self.curriculum_length, 1.0))

  def digest(self, num_documents: int = 1000) -> str:
    """Returns a sha256 (hex) over num_documents that are spread evenly over all."""
    content = hashlib.sha256()
    for i in range(num_documents):
      document = self[i * len(self) // num_documents]
      content.update(repr([(s.text, s.weight) for s in document]).encode())
    return content.hexdigest()


def encode_document(
  spans: tuple[corpus.Span, ...], tokenizer: tokenizer_lib.Tokenizer
) -> features.Atom:
  """Returns the document as one packing atom with per-token loss weights."""
  tokens = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  weights = [0.0] * len(tokens)
  for span in spans:
    encode = tokenizer.encode_control if span.control else tokenizer.encode
    ids = encode(span.text)
    tokens += ids
    weights += [span.weight] * len(ids)
  prompt = features.Prompt(np.array(tokens, np.int32), -1, '', np.array(weights, np.float32))
  return features.Atom((prompt,), 'example')


def make_loss_fn(cfg: model_config.ModelConfig):
  """Returns (params, batch) -> (total, weight, metrics): next-token loss."""

  def loss_fn(params: Any, batch: dict[str, jax.Array]):
    hidden = transformer.hidden(
      cfg, params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    logits = transformer.logits(cfg, params, hidden)
    return losses.lm_loss(logits, batch['tokens'], batch['segment_ids'], batch['loss_weight'])

  return loss_fn


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Trains, and writes weights and config to workdir/{task}."""
  began = time.monotonic()
  tokenizer = tokenizer_lib.load_tokenizer(config.tokenizer)
  model, data = config.model, config.data
  if model.weights:
    cfg, params = hf.load(model.weights, **model.overrides)
  else:
    cfg = model_config.preset(model.preset, tokenizer.vocab_size, **model.overrides)
    params = transformer.init_params(cfg, config.seed)
  documents = Documents(
    config.seed, data.num_documents, data.curriculum_length, _DIALOGUES[config.task]
  )
  atoms = (
    grain.MapDataset.source(documents)
    .map(functools.partial(encode_document, tokenizer=tokenizer))
    .repeat()
  )
  shape = features.BatchShape(data.batch_size, data.row_length, data.max_segments, tokenizer.pad_id)
  batches = pipeline.batches(atoms, shape, fingerprint=f'{tokenizer.digest}/{documents.digest()}')
  mesh = mesh_lib.make_mesh()
  step_fn, state = training.make_step(
    make_loss_fn(cfg), params, mesh, config.num_steps, **config.optim
  )
  state = loop_lib.train(
    loop_lib.Supervised(step_fn, batches, mesh),
    state,
    config,
    mesh=mesh,
    workdir=workdir,
    meta={'model': dataclasses.asdict(cfg)},
    inputs={f'weights {model.weights}': hf.digest(model.weights)} if model.weights else {},
    setup_s=time.monotonic() - began,
  )
  params = jax.tree.map(lambda x: x.astype(model.saved_dtype), state.params)
  # The metadata has no times or versions: the same run writes the same file, byte for byte.
  task = '' if config.task == 'base' else f':task={config.task}'
  hf.save(
    workdir / config.task,
    cfg,
    params,
    metadata={
      'made_by': f'python -m csrm_jax.main --config=configs/pretrain.py{task}',
      'seed': str(config.seed),
      'num_steps': str(config.num_steps),
      'data_digest': documents.digest(),
      'tokenizer_digest': tokenizer.digest,
    },
  )
  domain_lib.write(workdir / config.task, make_domain(documents, data.row_length))


def make_domain(documents: Documents, max_length: int) -> domain_lib.Domain:
  """Returns what the documents are about: the words that a model of RuleWorld knows."""
  num = 2000
  spread = [documents[i * len(documents) // num] for i in range(num)]
  # What a policy says is judged by models that have not learnt from it.
  spread += [corpus.dialogue(documents.seed, i) for i in range(num)]
  texts = [''.join(s.text for s in document if not s.control) for document in spread]
  known = domain_lib.words(' '.join(lexicon.WORDS))
  return domain_lib.of_texts('RuleWorld', texts, max_length, known, num_rules=corpus.MAX_RULES)
