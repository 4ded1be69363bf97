"""Times forward + backward of the decoder against a plain jnp peer.

python tests/benchmarks/transformer_benchmark.py [--rows=24] [--length=256]

The peer is the same Llama written the obvious way: three-dimensional
activations, one [T,T] score matrix a head, a Python loop over the layers. Both
compute the next-token loss, take turns, and report their fastest step.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.models import config, transformer
from csrm_jax.train import losses, step as training


def peer_logits(cfg, params, tokens, positions, segment_ids):
  """Returns logits [B,T,V], the plain way."""

  def norm(x, scale):
    square = jnp.mean(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(square + cfg.norm_eps) * scale

  half = cfg.head_dim // 2
  frequency = cfg.rope_theta ** (-jnp.arange(half) / half)
  angle = positions[..., None, None] * frequency

  def rope(x):
    a, b = x[..., :half], x[..., half:]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  length, group = tokens.shape[1], cfg.num_heads // cfg.num_kv_heads
  mask = (segment_ids[:, :, None] == segment_ids[:, None]) & jnp.tril(
    jnp.ones((length, length), bool)
  )
  x = params['embed']['embedding'][tokens]
  for i in range(cfg.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
    heads = {k: v['kernel'] for k, v in layer['attention'].items()}
    h = norm(x, layer['attention_norm']['scale'])
    q = rope(jnp.einsum('BTD,DNH->BTNH', h, heads['query']))
    k = rope(jnp.einsum('BTD,DKH->BTKH', h, heads['key']))
    v = jnp.einsum('BTD,DKH->BTKH', h, heads['value'])
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    scores = jnp.einsum('BTNH,BSNH->BNTS', q, k) * cfg.head_dim**-0.5
    probs = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30))
    out = jnp.einsum('BNTS,BSNH->BTNH', probs, v)
    x = x + jnp.einsum('BTNH,NHD->BTD', out, heads['out'])
    h = norm(x, layer['mlp_norm']['scale'])
    gate, up, down = (layer['mlp'][n]['kernel'] for n in ('gate', 'up', 'down'))
    x = x + (jax.nn.silu(h @ gate) * (h @ up)) @ down
  x = norm(x, params['final_norm']['scale'])
  return x @ params['embed']['embedding'].T


def our_logits(cfg, params, *batch):
  return transformer.logits(cfg, params, transformer.hidden(cfg, params, *batch))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rows', type=int, default=24)
  parser.add_argument('--length', type=int, default=256)
  parser.add_argument('--vocab_size', type=int, default=2048)
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument(
    '--keep_freed_memory',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='as training runs do',
  )
  args = parser.parse_args()
  if args.keep_freed_memory:
    training.keep_freed_memory()
  cfg = config.preset('tiny', args.vocab_size)
  params = transformer.init_params(cfg, 0)
  shape = (args.rows, args.length)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, args.vocab_size, shape, np.int32)
  positions = np.tile(np.arange(args.length, dtype=np.int32), (args.rows, 1))
  segment_ids = np.ones(shape, np.int32)

  steps, best = {}, {}
  for name, logits in (('ours', our_logits), ('peer', peer_logits)):

    def loss(params, logits=logits):
      out = logits(cfg, params, tokens, positions, segment_ids)
      return losses.lm_loss(out, tokens, segment_ids)[0] / tokens.size

    steps[name] = jax.jit(jax.value_and_grad(loss))
    value, grads = jax.block_until_ready(steps[name](params))
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    print(f'{name}: loss {value:.4f}, gradient norm {norm:.4f}')
    best[name] = float('inf')
  for _ in range(args.repeats):
    for name, step in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step(params))
      best[name] = min(best[name], time.perf_counter() - start)
  for name, seconds in best.items():
    rate = tokens.size / seconds
    print(f'{name}: {seconds * 1e3:.0f} ms, {rate:.0f} tokens/s')
  print(f'peer / ours: {best["peer"] / best["ours"]:.2f}')


if __name__ == '__main__':
  main()
