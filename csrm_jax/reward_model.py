"""A trained reward model: what describes it, and how it is loaded and asked.

rm = csrm_jax.load(workdir)
verdicts = rm.score(safety, conversations)
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from csrm_jax import scoring
from csrm_jax.core import checkpoint
from csrm_jax.models import config as model_config
from csrm_jax.models import transformer
from csrm_jax.safety import schema, templates
from csrm_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Spec:
  """All that a score depends on besides the parameters; stored with them.

  Attributes:
    model: the decoder's shape.
    layout: of the prompts.
    max_length: tokens a prompt may have.
    safe_words: verdict words of "safe".
    unsafe_words: verdict words of "unsafe".
    template_hash: of what the layout gave in the version that trained it.
    tokenizer_digest: sha256 of the tokenizer's file.
  """
  model: model_config.ModelConfig
  layout: templates.Layout
  max_length: int
  safe_words: tuple[str, ...]
  unsafe_words: tuple[str, ...]
  template_hash: str
  tokenizer_digest: str

  def to_dict(self) -> dict[str, Any]:
    """Returns JSON values; see from_dict."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, obj: Mapping[str, Any]) -> Spec:
    """Returns the spec that to_dict wrote.

    Raises:
      ValueError: it was not written by this version, or not by a spec.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    for name in sorted(known ^ set(obj)):
      raise ValueError(
          f'not the description of a reward model: {name!r} is '
          f'{"missing" if name in known else "unknown"}; give what the same '
          'version of csrm_jax trained with configs/rm.py')
    fields = {k: tuple(v) if isinstance(v, list) else v
              for k, v in obj.items()}
    fields['model'] = model_config.ModelConfig.from_dict(obj['model'])
    fields['layout'] = templates.Layout.from_dict(obj['layout'])
    return cls(**fields)

  def verbalizers(self, tokenizer: tokenizer_lib.Tokenizer
                  ) -> templates.Verbalizers:
    """Returns the verdict tokens. Raises ValueError as its resolver does."""
    return templates.resolve_verbalizers(tokenizer, self.safe_words,
                                         self.unsafe_words)

  def make_score_fn(self, params: Any, tokenizer: tokenizer_lib.Tokenizer,
                    max_length: int | None = None) -> scoring.ScoreFn:
    """Returns examples -> scores (nats) of these parameters.

    Args:
      params: of the model.
      tokenizer: that of tokenizer_digest.
      max_length: tokens a prompt may have; None: as in training.
    """
    return scoring.make_score_fn(
        self.model, params, tokenizer, self.verbalizers(tokenizer),
        layout=self.layout, max_length=max_length or self.max_length)


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """A loaded reward model.

  Attributes:
    spec: what it is.
    score_fn: examples -> float32 [N], log P(safe) − log P(unsafe) in nats.
  """
  spec: Spec
  score_fn: scoring.ScoreFn

  def score(self, safety: schema.SafetyConfig,
            conversations: Sequence[Sequence[schema.Message]]
            ) -> list[scoring.Verdict]:
    """Returns one verdict for each conversation under these rules.

    Raises:
      ValueError: a conversation that does not end with the agent, or rules
        that do not fit into the model's length.
    """
    examples = [
        schema.Example(f'conversation {i}', safety, tuple(conversation), None)
        for i, conversation in enumerate(conversations)]
    return scoring.verdicts(self.score_fn(examples))


def load(directory: str | pathlib.Path, max_length: int = 2048) -> RewardModel:
  """Returns the reward model of a work directory, ready to score.

  Args:
    directory: of a training run.
    max_length: tokens a prompt may have before its history and response are
      shortened. It may be more than in training (`spec.max_length`), for rules
      that are longer than any there; how well they are read is another matter.

  Raises:
    FileNotFoundError: no checkpoint or no tokenizer there.
    ValueError: the checkpoint belongs to another template, tokenizer or
      backbone than it says.
  """
  directory = pathlib.Path(directory).expanduser().absolute()
  meta = checkpoint.read_meta(directory / 'checkpoints')
  try:
    spec = Spec.from_dict(meta)
  except ValueError as error:
    raise ValueError(f'{directory}: {error}') from None
  tokenizer = tokenizer_lib.load_tokenizer(_tokenizer_path(directory))
  _check(directory, 'template', spec.template_hash,
         templates.template_hash(spec.layout))
  _check(directory, 'tokenizer', spec.tokenizer_digest, tokenizer.digest)
  shapes = jax.eval_shape(
      lambda: {'params': transformer.init_params(spec.model, 0)})
  with checkpoint.Checkpoints(directory / 'checkpoints') as saved:
    restored = saved.restore_latest(shapes, partial=True)
  if restored is None:
    raise FileNotFoundError(f'{directory}: no intact checkpoint there')
  return RewardModel(spec, spec.make_score_fn(
      restored.state['params'], tokenizer, max_length))


def save_tokenizer(path: str, directory: pathlib.Path) -> None:
  """Copies the tokenizer beside the checkpoints, where `load` looks."""
  shutil.copyfile(path, directory / f'tokenizer{pathlib.Path(path).suffix}')


def _tokenizer_path(directory: pathlib.Path) -> pathlib.Path:
  for suffix in ('.model', '.json'):
    path = directory / f'tokenizer{suffix}'
    if path.is_file():
      return path
  raise FileNotFoundError(
      f'{directory}: no tokenizer.model or tokenizer.json; give the work '
      'directory of a training run')


def _check(directory: pathlib.Path, what: str, saved: str, now: str) -> None:
  if saved != now:
    raise ValueError(
        f'{directory}: the checkpoint was made with {what} {saved[:12]}, here '
        f'it is {now[:12]}; use the csrm_jax version that trained it')
