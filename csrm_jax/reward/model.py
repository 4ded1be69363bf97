"""A trained reward model: what describes it, how it is loaded, and how it is asked.

rm = csrm_jax.load(workdir)
verdicts = rm.score(safety, conversations)

Public models that nobody trained for it can judge as well: an instruction-tuned model zero-shot,
a guard model in its own format.

judge = csrm_jax.load('org/name')
guard = csrm_jax.load('org/name', format='llama_guard_3')

Several together are one:

rm = csrm_jax.load('RUN1+RUN2+RUN3', combine='uwo')
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from csrm_jax.core import checkpoint, checks, files, mesh as mesh_lib, remote, tree
from csrm_jax.data import domain as domain_lib
from csrm_jax.evals.metrics import Calibration
from csrm_jax.models import config as model_config, hf, hf_config, lora, transformer
from csrm_jax.reward import backbone, exported, heads, monitor as monitors, scoring
from csrm_jax.safety import schema, templates
from csrm_jax.safety.templates import ORDERS, WORDS
from csrm_jax.text import tokenizer as tokenizer_lib

# What may differ between training and scoring.
_NUMERICS = ('dtype', 'param_dtype')


@dataclasses.dataclass(frozen=True)
class Spec:
  """All that a score depends on besides the parameters; it is stored with them."""

  model: model_config.ModelConfig
  layout: templates.Layout  # how prompts are laid out
  max_length: int  # tokens a prompt may have
  safe_words: tuple[str, ...]  # the words of the verdict "safe"
  unsafe_words: tuple[str, ...]
  template_hash: str  # names what the layout gave in the version that trained it
  tokenizer_digest: str  # sha256 of the tokenizer's file
  # The source (see models.hf) of the weights that the checkpoint's adapters
  # belong to, and their sha256; '' where the checkpoint holds all weights.
  base: str = ''
  base_digest: str = ''
  # What it was trained on; None where that is not known.
  domain: domain_lib.Domain | None = None
  head: str = heads.DEFAULT  # how a verdict is read, see heads.HEADS

  @classmethod
  def from_dict(cls, obj: Mapping[str, Any]) -> Spec:
    """Returns the spec that dataclasses.asdict gave; other fields than its own are a ValueError."""
    # Older versions did not store what they trained on, and had one head.
    obj = {'domain': None, 'head': heads.DEFAULT, **obj}
    checks.check_fields(
      cls,
      obj,
      'not the description of a reward model: {name} is {what}; give what the same version of '
      'csrm_jax trained with configs/rm.py',
    )
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in obj.items()}
    fields['model'] = model_config.ModelConfig.from_dict(obj['model'])
    fields['layout'] = templates.Layout.from_dict(obj['layout'])
    fields['domain'] = obj['domain'] and domain_lib.Domain.from_dict(obj['domain'])
    # One that this version does not know is an error now.
    heads.get(checks.check_text(fields['head'], 'head'))
    return cls(**fields)

  def verbalizers(self, tokenizer: tokenizer_lib.Tokenizer) -> templates.Verbalizers:
    """Returns the token ids of both verdicts; see resolve_verbalizers for what it raises."""
    return templates.resolve_verbalizers(tokenizer, self.safe_words, self.unsafe_words)

  def make_score_fn(
    self,
    params: Any,
    tokenizer: tokenizer_lib.Tokenizer,
    max_length: int | None = None,
    on_cut: str = 'window',
    allow_out_of_domain: bool = True,
  ) -> scoring.ScoreFn:
    """Returns a function: examples -> scores of these parameters, float32 [N] in nats.

    A prompt may have max_length tokens; by default it may have as many as in training. The rest is
    as in scoring.make_score_fn.
    """
    score_fn = scoring.make_score_fn(
      self.model,
      params,
      tokenizer,
      self.verbalizers(tokenizer),
      layout=self.layout,
      max_length=max_length or self.max_length,
      on_cut=on_cut,
      domain=self.domain,
      allow_out_of_domain=allow_out_of_domain,
      head=self.head,
    )
    guard = templates.GUARDS.get(self.layout.format)
    # Such a guard reads one guideline at a time, so that rules take one pass for each category.
    if guard and guard.per_category:
      return scoring.per_category(score_fn)
    return score_fn


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """A loaded reward model, ready to be asked."""

  spec: Spec
  score_fn: scoring.ScoreFn  # examples -> float32 [N], log P(safe) − log P(unsafe) in nats
  step: int | None = None  # the step of its checkpoint; None for a public model
  calibration: Calibration | None = None  # what its scores were changed by
  find_digest: Callable[[], str] = str  # what `digest` gives

  @functools.cached_property
  def digest(self) -> str:
    """What `digest` gives for its source; a public model's weights are all read for it, once."""
    return self.find_digest()

  def score(
    self,
    safety: schema.SafetyConfig,
    conversations: Sequence[Sequence[schema.Message]],
    on_cut: str | None = None,
    allow_out_of_domain: bool | None = None,
  ) -> list[scoring.Verdict]:
    """Returns one verdict for each conversation under these rules.

    Args:
      on_cut: What becomes of a conversation that is too long, as in `load`; None for what was
        given there.
      allow_out_of_domain: As in `load`, and None for what was given there.

    Raises:
      ValueError: A conversation does not end with the agent, the rules do not fit into the model's
        length, or rules or conversation are in words that are foreign to the model.
    """
    examples = [
      schema.Example(f'conversation {i}', safety, tuple(conversation), None)
      for i, conversation in enumerate(conversations)
    ]
    return scoring.verdicts(
      self.score_fn.judge(examples, on_cut=on_cut, allow_out_of_domain=allow_out_of_domain)
    )

  def monitor(
    self,
    safety: schema.SafetyConfig,
    alpha: float = 0.05,
    safe: Sequence[Sequence[schema.Message]] | None = None,
    unit: str = 'words',
    every: int = 4,
  ) -> monitors.Monitor:
    """Returns what watches replies that grow, or dialogues, under these rules; see `monitors`.

    Args:
      alpha: The share of safe streams that may be alarmed.
      safe: Conversations that are known to end safe, 1 / alpha of them or more: what it is
        calibrated on. Without them alarms are at P(unsafe) of one half, and it names no rate.
      unit: 'words' takes the text of one reply and judges it after `every` words; 'turns' takes
        messages and judges the agent's.
    """
    made = monitors.Monitor(self.score_fn, safety, monitors.Cuts(unit, every))
    return made if safe is None else made.calibrate(safe, alpha)


def load(
  source: str | pathlib.Path,
  max_length: int = 2048,
  format: str = 'csrm',
  on_cut: str = 'window',
  step: int | None = None,
  allow_out_of_domain: bool = False,
  calibrated: bool = True,
  combine: str = 'mean',
  **options: Any,
) -> RewardModel:
  """Returns the reward model of a work directory, or a public model as one.

  Its parameters lie on the mesh that jax.set_mesh has set, if any.

  Args:
    source: The work directory of a training run (gs://… too), a Hugging Face folder, the id of
      one on the hub ("org/name"), or a .gguf file. Or several, with + between them: their scores
      are combined, `spec` is that of the first, and each is calibrated for itself.
    max_length: The tokens that one pass may read. It may exceed that of training
      (`spec.max_length`), for rules longer than any seen there; how well the model reads them is
      another matter.
    on_cut: What becomes of a longer conversation. 'window' reads the response in parts that
      overlap, and gives the verdict on the worst; 'mark' leaves out the end of the response, as
      training does; 'error' raises a ValueError. Each verdict says what was not read.
    step: The step of the checkpoint that is read; None for the newest. No other one is taken where
      that is damaged.
    format: How a public model is asked, one of templates.FORMATS. 'csrm' asks an
      instruction-tuned model in our words, within its chat template.
    allow_out_of_domain: Whether rules and text are judged too that are in words foreign to what
      the model was trained on, which is an error otherwise. Such verdicts are marked, as those on
      longer prompts and more rules always are.
    calibrated: Whether its scores are changed by the calibration that training has fitted, if that
      helped on development rows; see `applied_calibration`.
    combine: What is made of several models' scores: one of reward.combiners.COMBINERS, as in
      'uwo:weight=0.1'.
    **options: Further arguments of `describe`.

  Raises:
    FileNotFoundError: There is no checkpoint or no tokenizer.
    ValueError: The checkpoint belongs to another template, tokenizer or backbone than is found
      here, or the public model cannot be used in this format.
  """
  names, saved = members(source), None
  if len(names) > 1:
    if step is not None:
      raise ValueError(f'step={step}: several models have no common step; leave it out')
    each = [
      load(name, max_length, format, on_cut, None, allow_out_of_domain, calibrated, **options)
      for name in names
    ]
    score_fn = scoring.combined([rm.score_fn for rm in each], combine)
    return RewardModel(
      each[0].spec,
      score_fn,
      find_digest=lambda: files.digest([combine, *(rm.digest for rm in each)]),
    )
  source = public_model(source) or source  # a public model is looked for once
  if not isinstance(source, hf.Source):
    saved = checkpoint.describe(_directory(source) / 'checkpoints', step)
    ended = calibration(source) if step is None else None
    if ended and (ended.step or 0) > saved.step:
      raise ValueError(
        f'{source}: training ended at step {ended.step}, and the newest checkpoint there is of '
        f'step {saved.step}; put the newer one back, or ask for step={saved.step}'
      )
    step = saved.step  # a run may save another one meanwhile
  spec, params, tokenizer = load_parts(source, format, step, **options)
  if saved and spec.domain is None:
    checks.note(
      f'{source}: nothing there says what it was trained on (an older version trained it), so that '
      'nothing checks whether it knows your rules and your text'
    )
  score_fn = spec.make_score_fn(params, tokenizer, max_length, on_cut, allow_out_of_domain)
  fitted = applied_calibration(source, step) if calibrated else None
  if fitted:
    name = source.name if isinstance(source, hf.Source) else source
    how = f'score / {fitted.temperature:.3g} {fitted.bias:+.3g}'
    checks.note(f'{name}: scores are calibrated, {how}; {fitted.reason}')
    score_fn = scoring.calibrated(score_fn, fitted)
  find_digest = (lambda: saved.digest) if saved else functools.partial(digest, source)
  return RewardModel(spec, score_fn, saved and saved.step, fitted, find_digest)


def calibration(source: str | pathlib.Path | hf.Source) -> Calibration | None:
  """Returns what training has fitted, in a work directory or an exported model, or None."""
  if len(members(source)) > 1:
    return None  # Each has its own.
  public = public_model(source)
  if public:
    saved, path = exported.read(public), public.name
    found = saved and saved.get('calibration')
  else:
    path = _directory(source) / 'calibration.json'
    found = files.read_json(path, dict) if path.is_file() else None
  try:
    return Calibration.from_dict(found) if found else None
  except (ValueError, TypeError) as error:
    raise ValueError(f'{path}: {error}; remove it, or put back what training wrote') from None


def applied_calibration(
  source: str | pathlib.Path | hf.Source, step: int | None = None
) -> Calibration | None:
  """Returns the calibration if it is to be applied and belongs to the step, or None."""
  found = calibration(source)
  belongs = found and (found.step is None or step is None or found.step == step)
  return found if belongs and found.applied else None


def members(source: str | pathlib.Path | hf.Source) -> list[Any]:
  """Returns the models that 'A+B+C' names, or the source alone."""
  if isinstance(source, hf.Source) or '+' not in str(source) or pathlib.Path(source).exists():
    return [source]
  names = str(source).split('+')
  if not all(names):
    raise ValueError(f'{source}: a name is empty; write several models as A+B+C')
  return names


def digest(source: str | pathlib.Path, combine: str = 'mean') -> str:
  """Returns the sha256 (hex) of what `load` reads: a run's newest checkpoint, or public weights.

  That of a checkpoint stands in it; for that of a public model all its weights are read.
  """
  if len(names := members(source)) > 1:
    return files.digest([combine, *map(digest, names)])
  if public := public_model(source):
    if exported.is_adapter(public.path):
      return lora.digest(public.path)
    return hf.digest(public)
  return checkpoint.describe(_directory(source) / 'checkpoints').digest


def load_parts(
  source: str | pathlib.Path, format: str = 'csrm', step: int | None = None, **options: Any
) -> tuple[Spec, Any, tokenizer_lib.Tokenizer]:
  """Returns the spec, parameters and tokenizer of what `load` loads, with its errors."""
  public = public_model(source)
  spec, tokenizer = describe(public or source, format, step=step, **options)
  if public:
    params = _public_params(public, spec, tokenizer)
  else:
    params = restore_params(source, spec, step)
  return spec, params, tokenizer


def public_model(source: str | pathlib.Path | hf.Source) -> hf.Source | None:
  """Returns the public model that a source names, or None for a run's work directory."""
  if isinstance(source, hf.Source):
    return source
  path = _directory(source)
  if path.suffix == '.gguf':
    return hf.Source(source)
  if path.exists():
    is_ours = any((path / name).exists() for name in ('checkpoints', 'manifest.json'))
    is_model = (path / hf_config.CONFIG_FILE).is_file() or exported.is_adapter(path)
    is_run = is_ours or not is_model
  else:
    # "org/name" is an id on the hub; anything else is a folder that is missing.
    name = str(source)
    is_run = name.count('/') != 1 or name[0] in './~'
  return None if is_run else hf.Source(source)


def describe(
  source: str | pathlib.Path | hf.Source,
  format: str = 'csrm',
  words: tuple[str, str] = WORDS,
  order: str = '',
  step: int | None = None,
  **overrides: Any,
) -> tuple[Spec, tokenizer_lib.Tokenizer]:
  """Returns the spec and tokenizer of what `load` loads, without reading weights.

  The source, the format and the errors are those of `load`.

  Args:
    words: The words for "safe" and "unsafe" that a public model is asked for with format 'csrm';
      some tokenizers know Yes and No better.
    order: The order in which a public model reads with format 'csrm', one of templates.ORDERS; ''
      is the first.
    **overrides: Fields of the model's config that say how it is computed: dtype and param_dtype,
      and those of models.config.RUN_TIME_FIELDS for a public model.
  """
  public = public_model(source)
  if public:
    return _describe_public(public, format, tuple(words), order, overrides)
  if (format, tuple(words), order) != ('csrm', WORDS, '') or set(overrides) - set(_NUMERICS):
    raise ValueError(
      f'{source}: a trained reward model knows its format, words and order; leave all settings but '
      f'{" and ".join(_NUMERICS)} as they are'
    )
  spec, tokenizer = _describe_run(_directory(source), step)
  return dataclasses.replace(spec, model=dataclasses.replace(spec.model, **overrides)), tokenizer


def _describe_run(
  directory: pathlib.Path, step: int | None
) -> tuple[Spec, tokenizer_lib.Tokenizer]:
  meta = checkpoint.describe(directory / 'checkpoints', step).meta
  try:
    spec = Spec.from_dict(meta)
  except ValueError as error:
    raise ValueError(f'{directory}: {error}') from None
  path = backbone.find_tokenizer(directory)
  if path is None:
    raise FileNotFoundError(
      f'{directory}: no tokenizer.model or tokenizer.json; '
      'give the work directory of a training run'
    )
  tokenizer = tokenizer_lib.load_tokenizer(path)
  template, version = (
    templates.template_hash(spec.layout),
    'use the csrm_jax version that trained it',
  )
  put_back = 'put back the tokenizer file that the training run wrote there'
  for what, saved, now, fix in (
    ('template', spec.template_hash, template, version),
    ('tokenizer', spec.tokenizer_digest, tokenizer.digest, put_back),
  ):
    if saved != now:
      raise ValueError(
        f'{directory}: the checkpoint was made with {what} {saved[:12]}, here it is {now[:12]}; '
        f'{fix}'
      )
  return spec, tokenizer


def restore_params(source: str | pathlib.Path, spec: Spec, step: int | None = None) -> Any:
  """Returns all parameters of a training run; adapters come together with their base.

  They are in spec.model.param_dtype, whatever they were trained in, and lie on the mesh that
  jax.set_mesh has set, if any. A base whose weights have changed since raises ValueError, as
  numbers do that are not finite.
  """
  directory = _directory(source) / 'checkpoints'
  described = checkpoint.describe(directory, step)
  trained = Spec.from_dict(described.meta).model
  mesh, shapes = jax.sharding.get_mesh(), transformer.shapes(trained)
  # A checkpoint of adapters does not hold their base: it is read from where it came.
  stored, base = lora.split(shapes) if spec.base else (shapes, {})
  own = heads.shapes(spec.head, trained)
  stored = {'params': stored | own}
  # Partial, because the optimizer's state is stored beside the parameters.
  with checkpoint.Checkpoints(directory) as saved:
    restored = saved.restore(
      described.step, stored if mesh.empty else mesh_lib.abstract(stored, mesh), partial=True
    )
  tree.check_finite(restored.state['params'], str(directory / str(described.step)))
  wanted = transformer.shapes(spec.model)
  wanted = (lora.split(wanted)[0] if spec.base else wanted) | own
  params = jax.tree.map(lambda x, to: x.astype(to.dtype), restored.state['params'], wanted)
  if not spec.base:
    return params
  return tree.merge(_base_params(spec, _shardings(base)), params)


def _base_params(spec: Spec, shardings: Any) -> Any:
  """Returns the weights that a spec's adapters belong to."""
  weights = hf.Source(spec.base)
  digest = hf.digest(weights) if spec.base_digest else ''
  if digest != spec.base_digest:
    raise ValueError(
      f'{spec.base}: the weights have digest {digest[:12]}, the adapters were trained on '
      f'{spec.base_digest[:12]}; give the weights they were trained on'
    )
  return hf.load_params(weights, spec.model, shardings)


def _shardings(shapes: Any) -> Any:
  """Returns the shardings of parameters on the mesh that is set, or None without one."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh_lib.shardings(shapes, mesh)


def _describe_public(
  source: hf.Source, format: str, words: tuple[str, str], order: str, overrides: Mapping[str, Any]
) -> tuple[Spec, tokenizer_lib.Tokenizer]:
  saved = exported.read(source)
  if saved is not None:
    if (format, words, order) != ('csrm', WORDS, ''):
      raise ValueError(
        f'{source.name}: an exported reward model knows its format, words and order; leave these '
        'settings as they are'
      )
    return _describe_exported(source, saved, overrides)
  if exported.is_adapter(source.path):
    raise ValueError(
      f'{source.name}: PEFT adapters that csrm_jax did not export; merge them into their model '
      '(merge_and_unload), and give that'
    )
  guard = templates.GUARDS.get(format)
  tokenizer = backbone.load_tokenizer(source)
  if guard:
    # A guard has words of its own; Layout refuses any others, so they are passed on to it.
    layout = templates.Layout(format, order or ORDERS[0], words=words)
    safe_words, unsafe_words = guard.safe_words, guard.unsafe_words
  else:
    prefix, suffix = backbone.chat_marks(source, tokenizer)
    layout = templates.Layout(format, order or ORDERS[0], words, prefix, suffix)
    safe_words, unsafe_words = templates.pair_spellings(tokenizer, words)
  templates.check_marks(tokenizer, layout)
  cfg = hf.load_config(source, **overrides)
  if hf_config.form(source.spec, source.where) == 'sequence_classification':
    raise ValueError(
      f'{source.name}: a sequence classifier that csrm_jax did not export, whose head nobody here '
      'can read; verdicts are words here, so give a model saved as ForCausalLM'
    )
  spec = Spec(
    model=cfg,
    layout=layout,
    max_length=cfg.context_length,
    safe_words=safe_words,
    unsafe_words=unsafe_words,
    template_hash=templates.template_hash(layout),
    tokenizer_digest=tokenizer.digest,
    domain=domain_lib.read(source.path),
  )
  # Words that this tokenizer cannot say are an error here, before any weights are read.
  spec.verbalizers(tokenizer)
  return spec, tokenizer


def _describe_exported(
  source: hf.Source, saved: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[Spec, tokenizer_lib.Tokenizer]:
  """Returns the spec and tokenizer of what configs/export.py wrote."""
  try:
    spec = Spec.from_dict(saved['spec'])
  except (ValueError, LookupError, TypeError) as error:
    raise ValueError(f'{source.where}: {error}') from None
  spec = dataclasses.replace(spec, domain=domain_lib.read(source.path))
  tokenizer = backbone.load_tokenizer(source)
  found = {'template': (spec.template_hash, templates.template_hash(spec.layout))}
  if not source.is_gguf:  # which holds the tokenizer in another form
    found['tokenizer'] = spec.tokenizer_digest, tokenizer.digest
  for what, (then, now) in found.items():
    if then != now:
      raise ValueError(
        f'{source.name}: it was exported with {what} {then[:12]}, here it is {now[:12]}; export it '
        'again with this version'
      )
  if exported.is_adapter(source.path):
    cfg = hf.load_config(spec.base, **lora.read_peft(source.path) | overrides)
    return dataclasses.replace(spec, model=cfg), tokenizer
  cfg = hf.load_config(source, **overrides)
  if hf_config.form(source.spec, source.where) == 'sequence_classification':
    # See _public_params: there is an output layer unless the classifier is the head.
    cfg = dataclasses.replace(cfg, tie_embeddings=spec.head == 'linear')
  return dataclasses.replace(spec, model=cfg, base='', base_digest=''), tokenizer


def _public_params(source: hf.Source, spec: Spec, tokenizer: tokenizer_lib.Tokenizer) -> Any:
  """Returns the parameters of a public model, on the mesh that is set, if any."""
  shardings = _shardings(transformer.shapes(spec.model))
  if exported.is_adapter(source.path):
    adapters = lora.load_peft(source.path, spec.model, shardings)
    return tree.merge(_base_params(spec, shardings), adapters)
  if hf_config.form(source.spec, source.where) == 'causal_lm':
    return hf.load_params(source, spec.model, shardings)
  tied = hf.load_config(source).tie_embeddings
  params = hf.load_params(source, dataclasses.replace(spec.model, tie_embeddings=tied), shardings)
  # The head is the difference of two rows of an output layer: here the row of "safe" is all of it
  # and every other is 0, so that the verdict's score is the classifier's.
  column = params.pop('score')['kernel']  # [D,1]
  if spec.head == 'linear':
    return params | {'head': {'kernel': column.astype(jnp.float32)}}
  (safe,) = spec.verbalizers(tokenizer).safe
  shape = len(column), spec.model.vocab_size
  place = None if shardings is None else shardings['lm_head']['kernel']
  kernel = jnp.zeros(shape, column.dtype, device=place).at[:, safe].set(column[:, 0])
  return params | {'lm_head': {'kernel': kernel}}


def _directory(source: str | pathlib.Path) -> pathlib.Path:
  return files.locate(remote.readable(source)).absolute()
