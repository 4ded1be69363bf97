"""How far labels are trusted: an out-of-fold ensemble votes, and a rule of WEIGHTS acts on it.

The ensemble are linear heads over the frozen last hidden states of a model, each taught by the
other folds' labels: a model that has seen a wrong label would agree with it. A margin is the log
odds, in nats, that a label (or the order of a pair) is right.

A row of `WEIGHTS` is (votes; knobs) -> Decision. Its knobs at 0 leave the data as they are.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special

from csrm_jax.core import journal as journal_lib
from csrm_jax.data import features, sources
from csrm_jax.models import transformer
from csrm_jax.reward import heads, model as reward_model, plans
from csrm_jax.safety.schema import LABELS, Example, Pair
from csrm_jax.train import losses

Item = Example | Pair
# Prompts that go through the model together, and are written down together.
_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Votes:
  """What is known of N items."""

  mean: np.ndarray  # float64 [N], of the ensemble's margins in nats
  std: np.ndarray  # [N], their spread
  own: np.ndarray  # [N], the margin by the model's own verdicts
  groups: Sequence[str]  # [N], the categories that the items are about


@dataclasses.dataclass(frozen=True)
class Decision:
  """What becomes of N items; None leaves that as it is."""

  keep: np.ndarray | None = None  # bool [N]
  flip: np.ndarray | None = None  # bool [N]: turns the label, or the order
  weight: np.ndarray | None = None  # [N], times the item's own
  soft: np.ndarray | None = None  # [N], the probability that the order of a pair is right
  strength: np.ndarray | None = None  # [N], of a pair, in nats


def _lowest(mean: np.ndarray, share: float) -> np.ndarray:
  """Returns which are among the lowest share, and doubted: below 0."""
  found = np.zeros(len(mean), bool)
  found[np.argsort(mean, kind='stable')[: int(share * len(mean) + 1e-9)]] = True
  return found & (mean < 0)


def flip(votes: Votes, *, share: float = 0.1) -> Decision:
  """Turns the labels that are trusted least: the lowest share, where the margin is negative.

  Source: Secrets of RLHF II (arXiv 2401.06080): the lowest 10 % of mean strength. That the
  models have not seen these labels is ours.
  """
  return Decision(flip=_lowest(votes.mean, share))


def drop(votes: Votes, *, share: float = 0.1) -> Decision:
  """Leaves the same items out.

  Source: as of `flip`.
  """
  return Decision(keep=~_lowest(votes.mean, share))


def smooth(votes: Votes, *, share: float = 0.3, smoothing: float = 0.1) -> Decision:
  """Softens the share of items whose margin is nearest to 0 to 1 − smoothing.

  A pair is then right with that probability (read by loss.pair=soft), and a label counts
  1 − 2·smoothing, which pulls a verdict of one half as much.

  Source: Secrets of RLHF II (arXiv 2401.06080): label smoothing for low strengths; the weight
  of labels is ours.
  """
  near = np.zeros(len(votes.mean), bool)
  near[np.argsort(np.abs(votes.mean), kind='stable')[: int(share * len(near) + 1e-9)]] = True
  return Decision(
    weight=np.where(near, 1 - 2 * smoothing, 1.0), soft=np.where(near, 1 - smoothing, 1.0)
  )


def margin(votes: Votes, *, scale: float = 1.0) -> Decision:
  """Gives pairs the strength scale·margin, at least 0.01 (0 were a tie): for loss.pair=margin.

  Source: Secrets of RLHF II (arXiv 2401.06080), adaptive margin: the ensemble's mean gap.
  """
  return Decision(strength=np.maximum(scale * votes.mean, 0.01) if scale else None)


def agree(votes: Votes, *, least: float = 0.0) -> Decision:
  """Keeps what both ensemble and model confirm, flips what both deny by more than `least` nats.

  Source: Skywork-Reward-V2 (arXiv 2507.01352), stage 2: pairs are kept where models agree with the
  label, others are flipped and taken up again. There one of the models is taught by people's
  labels alone: give such a model.
  """
  both = np.stack([votes.mean, votes.own])
  denied = (both < -least).all(0)
  return Decision(keep=(both > 0).all(0) | denied, flip=denied)


def balance(votes: Votes, *, power: float = 0.5, most: float = 5.0) -> Decision:
  """Gives rare categories weight: share^(−power), at most `most` times the commonest's, mean 1.

  Source: DR-IRL (arXiv 2503.18991) balances its categories; form and cap are our reading.
  """
  num = collections.Counter(votes.groups)
  weight = np.array([num[group] for group in votes.groups], np.float64) ** -power
  weight = np.minimum(weight, most * weight.min(initial=np.inf))
  return Decision(weight=weight / weight.mean() if power else None)


WEIGHTS: dict[str, Callable[..., Decision]] = {
  'flip': flip,
  'drop': drop,
  'smooth': smooth,
  'margin': margin,
  'agree': agree,
  'balance': balance,
}


def apply(items: Sequence[Item], decision: Decision) -> list[Item]:
  """Returns the items that are kept, changed as decided; others are themselves."""
  made = []
  for i, item in enumerate(items):
    if decision.keep is not None and not decision.keep[i]:
      continue
    if decision.flip is not None and decision.flip[i]:
      item = _turned(item)
    changes: dict[str, float] = {}
    if decision.weight is not None:
      changes['weight'] = item.weight * float(decision.weight[i])
    if isinstance(item, Pair) and not item.is_tie:
      if decision.soft is not None:
        changes['soft'] = min(item.soft, float(decision.soft[i]))
      if decision.strength is not None:
        changes['strength'] = float(decision.strength[i])
    # An item that stays as it is is written as it was read.
    changes = {name: value for name, value in changes.items() if value != getattr(item, name)}
    made.append(dataclasses.replace(item, **changes) if changes else item)
  return made


def rows(items: Sequence[Item], votes: Votes, decision: Decision) -> list[dict[str, Any]]:
  """Returns what was voted on each item and what becomes of it, for people to look at."""
  made = []
  for i, item in enumerate(items):
    row = {'id': item.id, 'margin': float(votes.mean[i]), 'spread': float(votes.std[i])}
    row |= {'own_margin': float(votes.own[i]), 'group': votes.groups[i]}
    for name, values in vars(decision).items():
      row |= {} if values is None else {name: values[i].item()}
    made.append(row)
  return made


def _turned(item: Item) -> Item:
  if isinstance(item, Pair):
    return dataclasses.replace(item, safer=item.other, other=item.safer)
  # Which rule a turned label means is unknown, and what was proposed went with the old one.
  label = LABELS[item.label == 'safe']
  return dataclasses.replace(item, label=label, violated=(), plus=None, minus=None)


# --- The ensemble ------------------------------------------------------------------------


def margins(
  x: np.ndarray,
  groups: Sequence[str],
  *,
  num_folds: int = 5,
  num_members: int = 3,
  decay: float = 0.1,
  seed: int = 0,
) -> np.ndarray:
  """Returns each member's margin of every item by heads that other folds taught, [M,N] in nats.

  Heads minimise mean(−log σ(x·w)) + decay/2·|w|²; a member sees a bootstrap of its folds' items.

  Args:
    x: float [N,D], the difference of the states of a pair; of a label ± the state.
    groups: [N]; items of one group are in one fold.
  """
  fold = np.array([int(sources.hash_unit(f'{seed}\n{g}') * num_folds) for g in groups], int)
  found = np.zeros((num_members, len(x)))
  rng = np.random.default_rng(seed)
  for m in range(num_members):
    for k in range(num_folds):
      rest = np.flatnonzero(fold != k)
      if not len(rest):
        raise ValueError(f'all {len(x)} rows are of one conversation; nothing else can judge them')
      taught = rng.choice(rest, len(rest)) if num_members > 1 else rest
      found[m, fold == k] = x[fold == k] @ _fit(x[taught], decay)
  return found


def _fit(x: np.ndarray, decay: float) -> np.ndarray:
  def loss(w):
    gap = x @ w
    slope = -scipy.special.expit(-gap) @ x / len(x) + decay * w
    return np.logaddexp(0, -gap).mean() + decay / 2 * (w @ w), slope

  return scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method='L-BFGS-B').x


def directions(items: Sequence[Item], states: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the x of `margins`: states [sides,D] of each item, standardised, with a bias."""
  flat = np.concatenate(states).astype(np.float64)
  mean, scale = flat.mean(0), flat.std(0) + 1e-6
  rows = []
  for item, own in zip(items, states, strict=True):
    # A constant is the same on both sides of a pair.
    z = np.pad((own - mean) / scale, ((0, 0), (0, 1)), constant_values=1.0)
    sign = 1.0 if isinstance(item, Pair) or item.label == 'safe' else -1.0
    rows.append(z[0] - z[1] if len(z) == 2 else sign * z[0])
  return np.array(rows)


def category(item: Item) -> str:
  """Returns what an item is about: the broken category, else the first of its rules."""
  example = item.other if isinstance(item, Pair) else item
  return (example.violated or example.safety.names)[0]


def judge(
  items: Sequence[Item], source: str, journal: journal_lib.Journal, progress: Any, **knobs: Any
) -> Votes:
  """Returns the votes on labelled items by heads over the model `source`; resumable.

  Knobs are those of `margins`.
  """
  if not items:
    raise ValueError('no labelled rows to weigh; give data that has some')
  found = _read_states(items, source, journal, progress)
  x = directions(items, [states for states, _ in found])
  each = margins(x, sources.conversation_keys(items), **knobs)
  own = [
    scores[0] - scores[1] if len(scores) == 2 else scores[0] * (1 if item.label == 'safe' else -1)
    for item, (_, scores) in zip(items, found, strict=True)
  ]
  return Votes(each.mean(0), each.std(0), np.array(own), list(map(category, items)))


def _read_states(items, source, journal, progress) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns (states [sides,D], scores [sides]) of each item, by the journal where it has them."""
  weights = reward_model.digest(source)
  sides = [(s,) if isinstance(s, Example) else (s.safer, s.other) for s in items]
  asked = [[[s.safety.to_dict(), s.conversation] for s in own] for own in sides]
  keys = [journal_lib.key([weights, own]) for own in asked]
  todo = [i for i, key in enumerate(keys) if key not in journal]
  progress(len(items) - len(todo), [])
  if todo:
    read = make_reader(source)
    for start in range(0, len(todo), _ROWS):
      piece = todo[start : start + _ROWS]
      states, scores = read([side for i in piece for side in sides[i]])
      at = 0
      for i in piece:
        own = slice(at, at + len(sides[i]))
        at = own.stop
        data = base64.b64encode(states[own].astype('<f4').tobytes()).decode()
        journal.put(keys[i], {'states': data, 'scores': scores[own].tolist()})
      progress(len(piece), [])
  found = []
  for key in keys:
    scores = np.array(journal[key]['scores'])
    states = np.frombuffer(base64.b64decode(journal[key]['states']), '<f4')
    found.append((states.reshape(len(scores), -1), scores))
  return found


def make_reader(source: str) -> Callable[[Sequence[Example]], tuple[np.ndarray, np.ndarray]]:
  """Returns examples -> (last hidden states, float32 [N,D], and scores [N] in nats) of a model.

  What is too long is shortened as in training.
  """
  spec, params, tokenizer = reward_model.load_parts(source)
  encoder = features.Encoder(tokenizer, spec.max_length, spec.layout)
  body, own, verbalizers = heads.body(params), params.get('head'), spec.verbalizers(tokenizer)

  @jax.jit
  def compute(body, own, tokens, lengths):
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    used = (places < lengths[:, None]).astype(jnp.int32)
    hidden = transformer.hidden(spec.model, body, tokens, places, used)
    last = hidden[jnp.arange(len(tokens)), lengths - 1][:, None]  # [B,1,D]: one slot a row

    def log_p():
      return losses.verdict_logprobs(transformer.logits(spec.model, body, last), verbalizers)

    safe, unsafe = heads.get(spec.head).apply(own, last, log_p).log_p
    return last[:, 0].astype(jnp.float32), (safe - unsafe)[:, 0]

  def read(examples):
    prompts = [features.require(features.encode(e, encoder)).prompts[0].tokens for e in examples]
    order = np.argsort([len(p) for p in prompts], kind='stable')
    states: list[Any] = [None] * len(prompts)
    scores = np.zeros(len(prompts))
    for chosen in _batches(order):
      rows = [prompts[i] for i in chosen]
      length = plans.round_up(max(map(len, rows)))
      tokens = np.stack([np.pad(p, (0, length - len(p))) for p in rows])
      hidden, score = compute(body, own, tokens, np.array([len(p) for p in rows]))
      for j, i in enumerate(chosen):
        states[i], scores[i] = np.asarray(hidden[j]), float(score[j])
    found = np.stack(states)
    if not (np.isfinite(found).all() and np.isfinite(scores).all()):
      raise ValueError(f'{source}: a hidden state is not a finite number; look at its weights')
    return found, scores

  return read


def _batches(order: np.ndarray) -> Iterator[list[int]]:
  # The last one is filled up: one program for each length.
  for start in range(0, len(order), _ROWS):
    chosen = order[start : start + _ROWS].tolist()
    yield chosen + chosen[-1:] * (_ROWS - len(chosen))
