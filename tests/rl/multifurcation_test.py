"""The next-token model and its search: against loops, exhaustive search and greedy choices."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.models import sampling as sampling_lib, transformer
from csrm_jax.models.sampling import Sampling
from csrm_jax.rl import multifurcation, online
from csrm_jax.ruleworld import policy as world
from tests import small

TINY = small.model(vocab_size=7, num_layers=1)
PROMPTS = [(1, 2, 3, 4, 5), (6, 5, 4), (2, 2, 2, 6, 1, 3, 5)]
ASKED = [(3, 1), (5, 6, 2, 4), (1, 1, 4)]


@functools.cache
def _params(seed, cfg=TINY):
  params = transformer.init_params(cfg, seed)
  # Sharper than at first, so that neither choices nor values tie.
  return params | {'embed': {'embedding': 3 * params['embed']['embedding']}}


class _Policy:
  """What the search takes of a policy, asked with numbers of PROMPTS."""

  model, tokenizer = TINY, small.TOKENIZER

  def encode_all(self, prompts, length):
    return [PROMPTS[i] for i in prompts]


def _search(monkeypatch, sampling, beams, min_length=0, bias=0.0):
  monkeypatch.setattr(online, 'make_samples', lambda policy, prompts, done: done)
  bias = jnp.broadcast_to(jnp.asarray(bias, jnp.float32), (TINY.vocab_size,))
  head = {'scale': jnp.float32(0.5), 'bias': bias}
  made = multifurcation.Multifurcation(TINY, _params(1), head, ASKED.__getitem__)
  done, values = multifurcation.search(
    _Policy(), _params(0), made, range(3), sampling, beams, min_length
  )
  return [tuple(row[:n]) for row, n in zip(done.tokens.tolist(), done.lengths, strict=True)], values


@functools.cache
def _next(seed, tokens):
  """Returns what stands behind the tokens, [V], computed without a cache."""
  tokens = np.array(tokens)[None]
  # One length, so that one program does for all.
  padded = np.pad(tokens, ((0, 0), (0, 16 - tokens.shape[1])))
  rows = padded, np.arange(16)[None], (np.arange(16) < tokens.shape[1])[None].astype(np.int32)
  return np.asarray(small.logits(TINY, _params(seed), *rows))[0, tokens.shape[1] - 1]


def _nucleus(logits, top_p):
  """Returns the tokens, the likeliest first, that together reach top_p."""
  probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
  order = np.argsort(-probs)
  before = np.cumsum(probs[order]) - probs[order]
  return {t for t, p in zip(order.tolist(), before, strict=True) if p < top_p and probs[t] > 0}


def _loop(i, sampling, beams, min_length, bias):
  """Returns (reply, value) of beam search that reads each beam anew."""
  pool = [(0.0, (), False)]  # value, tokens, whether it is done
  for step in range(sampling.max_completion_length):
    found = [one for one in pool if one[2]]
    for _, tokens, _ in (one for one in pool if not one[2]):
      logits, values = _next(0, PROMPTS[i] + tokens), 0.5 * _next(1, ASKED[i] + tokens) + bias
      barred = ~np.isfinite(values)
      barred[list(sampling.stop_ids)] |= step < min_length
      for token in _nucleus(np.where(barred, -np.inf, logits), sampling.top_p):
        found.append((values[token], (*tokens, token), token in sampling.stop_ids))
    pool = sorted(found, key=lambda one: -one[0])[:beams]
  return pool[0][1], pool[0][0]


@pytest.mark.parametrize('beams, top_p, min_length', [(3, 0.8, 2), (4, 1.0, 3)])
def test_caches_follow_beams_and_what_was_not_learnt_is_never_chosen(
  monkeypatch, beams, top_p, min_length
):
  sampling = Sampling(6, top_p=top_p, stop_ids=(0,))
  bias = np.array([0, 0.3, -np.inf, 0.1, 0, -np.inf, -0.2], np.float32)
  replies, values = _search(monkeypatch, sampling, beams, min_length, bias)
  for i, (reply, value) in enumerate(zip(replies, values, strict=True)):
    want, best = _loop(i, sampling, beams, min_length, bias)
    assert reply == want and value == pytest.approx(best, abs=1e-4)
    assert not {2, 5} & set(reply) and 0 not in reply[:min_length]


def test_one_beam_is_greedy(monkeypatch):
  replies, _ = _search(monkeypatch, Sampling(5), 1)
  for i, reply in enumerate(replies):
    for n, token in enumerate(reply):
      assert token == _next(1, ASKED[i] + reply[:n]).argmax()
  # A small top_p leaves the policy's likeliest token alone.
  likeliest = sampling_lib.generate(TINY, _params(0), PROMPTS, Sampling(5, temperature=0))
  assert _search(monkeypatch, Sampling(5, top_p=1e-6), 1)[0] == list(
    map(tuple, likeliest.tokens.tolist())
  )


def test_beams_for_all_replies_are_exhaustive_search(monkeypatch):
  bias = np.array([0, 0, 0, -np.inf, -np.inf, -np.inf, -np.inf], np.float32)
  replies, values = _search(monkeypatch, Sampling(3, stop_ids=(0,)), 32, bias=bias)
  for i, (reply, value) in enumerate(zip(replies, values, strict=True)):
    every = [
      (*first, last)
      for n in range(3)
      for first in itertools.product((1, 2), repeat=n)
      for last in ((0,) if n < 2 else (0, 1, 2))
    ]
    of = {one: 0.5 * _next(1, ASKED[i] + one[:-1])[one[-1]] for one in every}
    assert reply == max(of, key=of.get) and value == pytest.approx(max(of.values()), abs=1e-4)


@pytest.mark.parametrize('beams', [1, 3])
def test_a_perfect_model_finds_what_exhaustive_search_finds(beams):
  vocab, length, rng = 4, 4, np.random.default_rng(beams)
  tables = [{}, {}]  # whole replies, token 0 stops -> reward

  def worth(table, tokens):
    """Returns the best reward of a reply that begins so."""
    if len(tokens) == length or tokens[-1:] == (0,):
      return table.setdefault(tokens, rng.uniform())
    return max(worth(table, (*tokens, t)) for t in range(vocab))

  best = [worth(table, ()) for table in tables]
  sampling = Sampling(length, stop_ids=(0,))
  advance = jax.jit(multifurcation.advance, static_argnums=(3, 4))
  state, logits = multifurcation.first(2, beams, length), jnp.zeros((2, beams, vocab))
  while state['active'].any():
    step = int(state['step'])
    values = np.zeros((2, beams, vocab), np.float32)
    for p, k in zip(*np.nonzero(np.asarray(state['active'])), strict=True):
      begun = tuple(np.asarray(state['tokens'])[p, k, :step].tolist())
      values[p, k] = [worth(tables[p], (*begun, t)) for t in range(vocab)]
    state, rows = advance(state, logits, values, sampling, 0)
    assert (np.asarray(rows).reshape(2, beams) // beams == [[0], [1]]).all()
  for p, table in enumerate(tables):
    k = int(state['value'][p].argmax())
    reply = tuple(state['tokens'][p, k, : state['lengths'][p, k]].tolist())
    assert reply == max(table, key=table.get) and table[reply] == best[p]
    assert bool(state['stopped'][p, k]) == (reply[-1] == 0)


def test_the_loss_is_over_what_was_observed():
  cfg = dataclasses.replace(TINY, lora_rank=2, lora_alpha=2.0, lora_targets=multifurcation.TARGETS)
  rng = np.random.default_rng(0)
  bias = rng.normal(size=7)
  params = transformer.init_params(cfg, 0) | {
    'head': {'scale': jnp.float32(0.7), 'bias': jnp.asarray(bias, jnp.float32)}
  }
  tokens = rng.integers(1, 7, (2, 8)).astype(np.int32)
  tokens[0, 6], tokens[1, 7] = 2, 3  # what is observed last
  reward = np.full((2, 5), np.nan, np.float32)
  reward[0, 1], reward[0, 3], reward[1, 4] = 0.9, 0.2, 0.5
  ones = np.ones_like(tokens)
  batch = {'tokens': tokens, 'positions': np.cumsum(ones, 1) - 1, 'segment_ids': ones}
  loss_fn = multifurcation.make_loss_fn(cfg)

  def total(params):
    total, weight, _ = loss_fn(params, batch | {'reward': reward})
    return total, weight

  (found, weight), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  body = {name: part for name, part in params.items() if name != 'head'}
  values = 0.7 * np.asarray(small.logits(cfg, body, *batch.values()), np.float64) + bias
  # Place c of a reply is token 3 + c of the row, which the state before it predicts.
  seen = [(n, c) for n in range(2) for c in range(5) if not np.isnan(reward[n, c])]
  errors = {(n, c): values[n, 2 + c, tokens[n, 3 + c]] - reward[n, c] for n, c in seen}
  assert found == pytest.approx(sum(e**2 for e in errors.values()), rel=1e-4) and weight == 3
  wanted = np.zeros(7)
  for (n, c), error in errors.items():
    wanted[tokens[n, 3 + c]] += 2 * error
  np.testing.assert_allclose(grads['head']['bias'], wanted, rtol=1e-3, atol=1e-5)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_it_learns_from_beginnings_of_samples():
  policy = online.Policy(small.SPEC.model, small.TOKENIZER, world.CHAT_MARKS)
  params = transformer.init_params(small.SPEC.model, 0)
  prompts = world.prompts(0, 2, 'film club', 'train')
  sampling = Sampling(10, top_k=12, stop_ids=(policy.tokenizer.eos_id,))
  samples, rows = online.rollout(policy, params, prompts, sampling, 4)
  asked = []

  def reward(examples):
    asked.extend(examples)
    return np.array([len(e.conversation[-1].content) % 7 / 7 for e in examples])

  rewards = multifurcation.observe(policy, samples, rows, reward, 4)
  texts = [(e.conversation[:-1], e.conversation[-1].content) for e in asked]
  assert len(set(texts)) == len(texts)
  mask = rows['completion_mask'] > 0
  for sample, own, ids, used in zip(samples, rewards, rows['tokens'], mask, strict=True):
    length, reply = sample.num_tokens, ids[-mask.shape[1] :]
    ends = {*range(4, length, 4), length}
    assert {i + 1 for i in np.flatnonzero(~np.isnan(own))} == ends and used.sum() == length
    assert own[length - 1] == pytest.approx(len(sample.text) % 7 / 7)
    for end in ends - {length}:
      text = policy.tokenizer.decode(reply[:end].tolist()).strip()
      assert own[end - 1] == pytest.approx(len(text) % 7 / 7)

  ask = multifurcation.asker(small.SPEC, small.TOKENIZER, policy, 10)
  text = small.TOKENIZER.decode(ask(prompts[0]))
  assert text.endswith('Agent:') and prompts[0].safety.categories[0].guideline in text

  settings = types.SimpleNamespace(num_steps=60, batch_size=8, lr=0.03, lora_rank=2)
  made, errors = multifurcation.fit(
    small.SPEC, params, ask, policy, samples, rows, rewards, settings, seed=0
  )
  assert errors['error'] < 0.5 * errors['error_of_mean']
  learnt = {int(t) for row, own in zip(rows['tokens'], rewards, strict=True)
            for t in row[-mask.shape[1] :][~np.isnan(own)]}  # fmt: skip
  assert set(np.flatnonzero(np.isfinite(made.head['bias'])).tolist()) == learnt
  best, values = multifurcation.search(policy, params, made, prompts, sampling, 2, 2)
  assert [one.prompt for one in best] == prompts and np.isfinite(values).all()
  assert all(one.num_tokens > 2 for one in best)


def test_what_it_cannot_judge_is_an_error():
  policy = online.Policy(small.SPEC.model, small.TOKENIZER, world.CHAT_MARKS)
  other = types.SimpleNamespace(digest='another')
  guard = dataclasses.replace(
    small.SPEC, layout=dataclasses.replace(small.SPEC.layout, format='llama_guard_3')
  )
  error_of = functools.partial(small.error_of, multifurcation.asker)
  assert 'different tokenizers' in error_of(small.SPEC, other, policy, 9)
  assert 'format csrm alone' in error_of(guard, small.TOKENIZER, policy, 9)
  most = small.SPEC.model.context_length
  ask = multifurcation.asker(small.SPEC, small.TOKENIZER, policy, most)
  (prompt,) = world.prompts(0, 1, 'film club', 'train')
  assert f'with a reply of {most}' in small.error_of(ask, prompt)
