"""A reward model that says at once what every next token is worth, and the search that asks it.

M reads rules, request and the beginning of a reply, and predicts the reward of the reply with each
token of the vocabulary behind it, where a reward model would be asked once for each. It is the
reward model with adapters, whose logits have a scale and a bias of their own. The scale is ours: it
begins at 0, so that M begins with the mean reward, and not with logits of words.

Axes: P prompts, K beams of each, N samples, T tokens of a row, C tokens of the longest reply, V
vocab.

Source: Saffron-1 (arXiv 2506.06444), the multifurcation reward model, and its public code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.core import progress, tree
from csrm_jax.data import features
from csrm_jax.models import lora, sampling as sampling_lib, transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.models.sampling import Completions, Sampling
from csrm_jax.reward import heads, model as reward_model
from csrm_jax.rl import online
from csrm_jax.safety import schema, templates
from csrm_jax.safety.schema import Prompt, Sample
from csrm_jax.text.tokenizer import Tokenizer
from csrm_jax.train import step as training

# The products that have adapters, as in the source.
TARGETS = ('query', 'value')


@dataclasses.dataclass(frozen=True)
class Multifurcation:
  """M, as `fit` makes it."""

  model: ModelConfig
  params: Any  # of the decoder, adapters merged
  head: dict[str, jax.Array]  # scale [] and bias [V]; -inf for a token that was never learnt
  ask: Callable[[Prompt], list[int]]  # the ids that a reply to the prompt continues


# --- What it learns ----------------------------------------------------------------------


def asker(
  spec: reward_model.Spec, tokenizer: Tokenizer, policy: online.Policy, length: int
) -> Callable[[Prompt], list[int]]:
  """Returns a function: prompt -> the ids of the reward model's prompt up to the reply.

  A prompt that leaves no room for a reply of `length` tokens is a ValueError.
  """
  if spec.layout.format != 'csrm':
    raise ValueError(
      f'format={spec.layout.format!r}: next tokens can be judged in the format csrm alone'
    )
  if tokenizer.digest != policy.tokenizer.digest:
    raise ValueError(
      'the reward model and the policy have different tokenizers, so that one cannot judge the '
      "other's next token; train a reward model with the policy's"
    )
  # Whatever the order that verdicts are read in: the rules must stand before what they judge.
  layout = dataclasses.replace(spec.layout, order=templates.ORDERS[0])

  def ask(prompt: Prompt) -> list[int]:
    conversation = *prompt.messages, schema.Message('agent', '')
    segments = templates.render(prompt.safety, conversation, layout)
    place = [segment.kind for segment in segments].index('response')
    reply = dataclasses.replace(segments[place], text=segments[place].text.rstrip())
    parts = features.encode_segments((*segments[:place], reply), tokenizer, 2**30)
    ids = [token for part in features.require(parts).tokens for token in part]
    if len(ids) + length > spec.model.context_length:
      raise ValueError(
        f'prompt {prompt.id}: with its rules it has {len(ids)} tokens, which with a reply of '
        f"{length} are more than the reward model's context_length={spec.model.context_length}"
      )
    return ids

  return ask


def observe(
  policy: online.Policy,
  samples: Sequence[Sample],
  rows: Mapping[str, np.ndarray],
  reward_fn: Callable[[Sequence[schema.Example]], np.ndarray],
  every: int,
) -> np.ndarray:
  """Returns the reward of each sample up to some of its tokens, float32 [N,C]; NaN elsewhere.

  These are each `every`-th token and the last one. rows are those of the rollout.
  """
  mask = rows['completion_mask'] > 0
  tokens = rows['tokens'][:, -mask.shape[1] :]
  asked: dict[tuple[str, str], schema.Example] = {}  # equal beginnings are judged once
  places = []
  for i, sample in enumerate(samples):
    length = int(mask[i].sum())
    for end in (*range(every, length, every), length):
      text = policy.tokenizer.decode(tokens[i, :end].tolist()).strip()
      text = sample.text if end == length else text
      example = dataclasses.replace(sample, text=text).example()
      key = sample.prompt.id, text
      asked.setdefault(key, dataclasses.replace(example, id=f'{sample.id}/{end}'))
      places.append((i, end - 1, key))
  rewards = dict(zip(asked, reward_fn(list(asked.values())).tolist(), strict=True))
  found = np.full(mask.shape, np.nan, np.float32)
  for i, place, key in places:
    found[i, place] = rewards[key]
  return found


def predict(cfg: ModelConfig, params: Any, head: Any, hidden: jax.Array) -> jax.Array:
  """Returns what M says of each next token, float32 [...,V], given hidden states [...,D]."""
  return head['scale'] * transformer.logits(cfg, params, hidden) + head['bias']


def make_loss_fn(cfg: ModelConfig) -> training.LossFn:
  """Returns (params, batch) -> Σ (M(prefix)[token] − reward)² over what was observed.

  Other tokens and prefixes have no part in it. The batch has `reward`, see observe, and
  online.READ.
  """

  def loss_fn(params, batch):
    body, reward = heads.body(params), batch['reward']
    hidden = transformer.hidden(cfg, body, *(batch[name] for name in online.READ[:3]))
    start = batch['tokens'].shape[1] - reward.shape[1]
    values = predict(cfg, body, params['head'], hidden[:, start - 1 : -1])
    found = jnp.take_along_axis(values, batch['tokens'][:, start:, None], axis=-1)[..., 0]
    known = ~jnp.isnan(reward)
    # The NaN is put away before the difference: its gradient would be NaN, too.
    error = jnp.where(known, found - jnp.where(known, reward, 0.0), 0.0)
    total, weight = jnp.square(error).sum(), known.sum().astype(jnp.float32)
    return total, weight, {'multifurcation/error': (total, weight)}

  return loss_fn


def fit(
  spec: reward_model.Spec,
  params: Any,
  ask: Callable[[Prompt], list[int]],
  policy: online.Policy,
  samples: Sequence[Sample],
  rows: Mapping[str, np.ndarray],
  rewards: np.ndarray,
  settings: Any,
  seed: int,
) -> tuple[Multifurcation, dict[str, float]]:
  """Returns M, learnt from samples of the policy and the rewards of `observe`, and its errors.

  spec and params are the reward model's. settings has num_steps, batch_size, lr and
  lora_rank. The errors are mean squares: of M in the last tenth of the steps, and of the mean.
  """
  base = heads.body(params)
  base = lora.merge(spec.model, base) if spec.model.lora_rank else base
  fields = {'lora_rank': settings.lora_rank, 'lora_alpha': float(settings.lora_rank)}
  plain = dataclasses.replace(spec.model, lora_rank=0)
  cfg = dataclasses.replace(plain, **fields, lora_targets=TARGETS)
  lengths = rows['completion_mask'].sum(1).astype(np.int32)
  done = Completions(
    rows['tokens'][:, -rewards.shape[1] :], lengths, rows['rollout_logprobs'], lengths > 0
  )
  asked = [ask(sample.prompt) for sample in samples]
  read = online.make_rows(dataclasses.replace(policy, model=plain), asked, done)
  width = read['completion_mask'].shape[1]
  data = {name: read[name] for name in online.READ} | {'reward': rewards[:, :width]}
  optimizer = training.make_optimizer(
    settings.num_steps,
    lr=settings.lr,
    warmup_steps=settings.num_steps // 10,
    b1=0.9,
    b2=0.999,
    weight_decay=0.0,
    clip_norm=1.0,
    end_lr_fraction=0.0,
  )
  bias = jnp.full(cfg.vocab_size, np.nanmean(rewards), jnp.float32)
  trained = lora.init(cfg, seed) | {'head': {'scale': jnp.zeros(()), 'bias': bias}}
  step = training.make_train_step(make_loss_fn(cfg), optimizer)
  state, steps, size = training.init_state(trained, optimizer), [], settings.batch_size
  with progress.bar(settings.num_steps, 'fit', 'step') as bar:
    for i in range(settings.num_steps):
      chosen = online.shuffled(i * size, size, len(samples), (seed,))
      state, metrics = step(state, {name: x[chosen] for name, x in data.items()}, base)
      steps.append(metrics)
      bar.update()
  if not training.mean_metrics(steps)['train/finite']:
    raise ValueError(f'lr={settings.lr}: the multifurcation model is not finite; lower it')
  seen = np.zeros(cfg.vocab_size, bool)
  seen[done.tokens[~np.isnan(rewards)]] = True
  head = state.params['head']
  made = Multifurcation(
    plain,
    lora.merge(cfg, tree.merge(base, heads.body(state.params))),
    head | {'bias': jnp.where(seen, head['bias'], -jnp.inf)},
    ask,
  )
  last = training.mean_metrics(steps[-max(len(steps) // 10, 1) :])
  errors = {'error': last['multifurcation/error'], 'error_of_mean': float(np.nanvar(rewards))}
  return made, errors


# --- The search --------------------------------------------------------------------------


def search(
  policy: online.Policy,
  params: Any,
  made: Multifurcation,
  prompts: Sequence[Prompt],
  sampling: Sampling,
  beams: int,
  min_length: int,
) -> tuple[list[Sample], np.ndarray]:
  """Returns the reply to each prompt that beam search finds, and what M gives it, float32 [P].

  A beam goes on with the tokens that `sampling` may draw from the policy and M has learnt; of all
  beams' tokens those `beams` are kept that M values most. A reply that has stopped keeps the value
  of its stop token, and its place while that is among the best. No reply stops within its first
  min_length tokens.

  Two things are ours. In the source a reply that has stopped keeps its place whatever its value,
  so that poor ones may crowd out good ones; and what M has not learnt gets -1,024 there, after
  top_p, so that it may be chosen where top_p leaves nothing else.
  """
  if beams < 1:
    raise ValueError(f'beams={beams} must be at least 1')
  if not sampling.temperature:
    raise ValueError('temperature=0 leaves one token to choose from; give one above 0')
  sides = (
    (policy.model, policy.encode_all(prompts, sampling.max_completion_length)),
    (made.model, [made.ask(prompt) for prompt in prompts]),
  )
  batches = [
    sampling_lib.pad_prompts(
      [tuple(ids) for ids in asked for _ in range(beams)], len(asked) * beams, 0, cfg
    )
    for cfg, asked in sides
  ]
  run = _compiled(policy.model, made.model, sampling, beams, min_length)
  weights = [(x, transformer.unstack(x)) for x in (online.decoder_params(params), made.params)]
  found = jax.device_get(run(weights, made.head, batches))
  done = Completions(found['tokens'], found['lengths'], np.zeros(0), found['stopped'])
  return online.make_samples(policy, prompts, done), found['value']


@functools.lru_cache(maxsize=16)
def _compiled(cfg, model, sampling, beams, min_length):
  models = cfg, model

  def choose(state, caches, last, weights, head):
    """Returns (state, caches) with a token more, given both models' last hidden states [R,D]."""
    logits = transformer.logits(cfg, weights[0][1], last[0])
    values = predict(model, weights[1][1], head, last[1])
    logits, values = (x.reshape(*state['value'].shape, -1) for x in (logits, values))
    state, rows = advance(state, logits, values, sampling, min_length)
    return state, [transformer.take_rows(cache, rows) for cache in caches]

  def run(weights, head, batches):
    last, positions, caches = zip(
      *(
        sampling_lib.read_prompts(one, whole, batch)
        for one, (whole, _), batch in zip(models, weights, batches, strict=True)
      ),
      strict=True,
    )
    C = sampling.max_completion_length
    caches = [transformer.resize(x, x['positions'].shape[1] + C - 1) for x in caches]
    state = first(len(positions[0]) // beams, beams, C)
    state, caches = choose(state, caches, last, weights, head)

    def body(carry):
      state, caches = carry
      token, last, grown = state['token'].reshape(-1, 1), [], []
      for one, (_, apart), cache, start in zip(models, weights, caches, positions, strict=True):
        # All beams of a prompt are at one place, so that positions need not follow them.
        place = (start + state['step'])[:, None]
        hidden, cache = transformer.extend(one, apart, token, place, cache)
        last.append(hidden[:, -1])
        grown.append(cache)
      return choose(state, grown, last, weights, head)

    state, _ = jax.lax.while_loop(lambda carry: carry[0]['active'].any(), body, (state, caches))
    best, of = state['value'].argmax(1), jnp.arange(len(state['value']))
    return {name: state[name][of, best] for name in ('tokens', 'lengths', 'stopped', 'value')}

  return jax.jit(run)


def first(num_prompts: int, beams: int, length: int) -> dict[str, jax.Array]:
  """Returns the state of beams that have no token yet.

  It holds tokens int32 [P,K,C]; lengths and token (the last) int32 [P,K]; value float32 [P,K], -inf
  where there is no beam; stopped and active bool [P,K]; and step int32 [].
  """
  shape = num_prompts, beams
  # All beams of a prompt begin alike: one of them is enough.
  one = jnp.broadcast_to(jnp.arange(beams) == 0, shape)
  return {
    'tokens': jnp.zeros((*shape, length), jnp.int32),
    'lengths': jnp.zeros(shape, jnp.int32),
    'token': jnp.zeros(shape, jnp.int32),
    'value': jnp.where(one, 0.0, -jnp.inf),
    'stopped': jnp.zeros(shape, bool),
    'active': one,
    'step': jnp.int32(0),
  }


def advance(
  state: dict[str, jax.Array],
  logits: jax.Array,
  values: jax.Array,
  sampling: Sampling,
  min_length: int,
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Returns (state, rows): the best beams with a token more, and which row [P·K] each continues.

  logits are the policy's and values M's, float32 [P,K,V].
  """
  P, K, V = values.shape
  stops = jnp.isin(jnp.arange(V), jnp.asarray(sampling.stop_ids, jnp.int32))
  known = (values > -jnp.inf) & ~(stops & (state['step'] < min_length))
  logits = jnp.where(known, logits, -jnp.inf)
  likely = sampling_lib.candidates(logits.reshape(P * K, V), sampling).reshape(P, K, V) > 0
  active = state['active']
  values = jnp.where(likely & active[..., None], values, -jnp.inf)
  # A reply that has stopped is its own only candidate.
  values = values.at[..., 0].set(jnp.where(active, values[..., 0], state['value']))
  value, place = jax.lax.top_k(values.reshape(P, K * V), K)
  beam, token = place // V, place % V
  old = {
    name: jnp.take_along_axis(state[name], beam, axis=1)
    for name in ('lengths', 'stopped', 'active')
  }
  grows = old['active'] & (value > -jnp.inf)
  tokens = jnp.take_along_axis(state['tokens'], beam[..., None], axis=1)
  here = grows[..., None] & (jnp.arange(tokens.shape[-1]) == state['step'])
  stopped = old['stopped'] | (grows & stops[token])
  step = state['step'] + 1
  rows = (jnp.arange(P)[:, None] * K + beam).reshape(-1)
  return {
    'tokens': jnp.where(here, token[..., None], tokens),
    'lengths': old['lengths'] + grows,
    'token': token,
    'value': value,
    'stopped': stopped,
    'active': grows & ~stopped & (step < tokens.shape[-1]),
    'step': step,
  }, rows
