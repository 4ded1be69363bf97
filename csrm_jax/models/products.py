"""Dense products with gradients of their own: fast bfloat16 on CPU, frozen kernels with adapters.

Axes: R rows, r the rank of an adapter. x [R,*in], kernel [*in,*out], a [*in,r], b [r,*out].
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from csrm_jax.core import mesh as mesh_lib

# With so many rows or more, folding an adapter into its kernel costs less than reading both.
MIN_FOLDED_ROWS = 256
_ROWS = (((0,), (0,)), ((), ()))

# bfloat16 is taken where it multiplies so much faster: less is lost around the products.
MIN_GAIN = 1.3


def auto_dtype() -> str:
  """Returns the dtype that models compute in fastest here: 'bfloat16' or 'float32'."""
  if mesh_lib.platform() != 'cpu':
    return 'bfloat16'
  # Several processes must run the same program, whatever each of them would measure.
  return 'bfloat16' if jax.process_count() == 1 and bfloat16_gain() >= MIN_GAIN else 'float32'


@functools.cache
def bfloat16_gain() -> float:
  """Returns how many times as fast as float32 this CPU and this XLA multiply in bfloat16."""
  # Measured, not looked up: it depends on the CPU's units and on the kernels that XLA has for them.
  multiply = jax.jit(lambda x: x @ x)
  seconds = []
  for dtype in (jnp.float32, jnp.bfloat16):
    x, times = jnp.ones((768, 768), dtype), []
    jax.block_until_ready(multiply(x))
    for _ in range(8):
      # Other processes take no part in CPU seconds, and the shortest of several is steady.
      start = time.process_time()
      jax.block_until_ready(multiply(x))
      times.append(time.process_time() - start)
    seconds.append(min(times))
  return seconds[0] / seconds[1]


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns x·kernel [R,*out]; both have the same dtype."""
  if x.dtype == jnp.bfloat16 and mesh_lib.platform() == 'cpu' and mesh_lib.current() is None:
    return _turned(x, kernel)
  return jnp.tensordot(x, kernel, x.ndim - 1)


@jax.custom_vjp
def _turned(x, kernel):
  """Returns x·kernel; x is transposed in memory for the kernel's gradient."""
  return jnp.tensordot(x, kernel, x.ndim - 1)


def _turned_fwd(x, kernel):
  # The product itself, not _turned: rematerialisation keeps only what it sees as a product.
  return jnp.tensordot(x, kernel, x.ndim - 1), (x, kernel)


def _turned_bwd(saved, dy):
  x, kernel = saved
  rows = len(x)
  # XLA's fast bfloat16 product on CPU (from 0.12 on) wants the left operand contracted on its last
  # axis; x.T·dy takes twice as long. A transpose alone would only rename the axes, so that the
  # reshape to one axis decides how the bytes lie.
  turned = jax.lax.optimization_barrier(x.reshape(rows, -1).T.reshape(-1)).reshape(-1, rows)
  grad = (turned @ dy.reshape(rows, -1)).reshape(kernel.shape)
  return _input_grad(kernel, dy), grad


_turned.defvjp(_turned_fwd, _turned_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def adapted(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """Returns x·(kernel + scale·a·b) in x's dtype; the kernel is frozen and has no gradient.

  Source: Hu et al. 2021, LoRA, eq. 3.
  """
  return _adapted_fwd(x, kernel, a, b, scale)[0]


def _adapted_fwd(x, kernel, a, b, scale):
  if _folds(x):
    kernel = kernel + scale * _low_rank(a.reshape(-1, len(b)), b).reshape(kernel.shape)
    return jnp.tensordot(x, kernel, x.ndim - 1), (x, kernel, a, b)
  kernel, a, b = (w.astype(x.dtype) for w in (kernel, a, b))
  y = jnp.tensordot(x, kernel, x.ndim - 1)
  low = scale * jnp.tensordot(x, a, x.ndim - 1)
  return y + _low_rank(low, b).reshape(y.shape), (x, kernel, a, b)


def _adapted_bwd(scale, saved, dy):
  x, kernel, a, b = saved
  down = scale * _input_grad(b, dy)  # [R,r]
  dx = _input_grad(kernel, dy)
  if not _folds(x):
    dx += _input_grad(a, down)
  low = scale * jnp.tensordot(x, a, x.ndim - 1)
  # The narrow operand first: x.T·down would transpose x, which is wide.
  grad_a = jnp.moveaxis(jax.lax.dot_general(down, x, _ROWS), 0, -1)
  grad_b = jax.lax.dot_general(low, dy, _ROWS)
  return dx, None, grad_a.astype(jnp.float32), grad_b.astype(jnp.float32)


adapted.defvjp(_adapted_fwd, _adapted_bwd)


def _folds(x):
  # In bfloat16 a kernel would round small adapters away.
  return x.dtype == jnp.float32 and len(x) >= MIN_FOLDED_ROWS


def _low_rank(left, right):
  """Returns left·right, which costs little: rematerialisation computes it again."""
  # It keeps the products that have no batch, so this one has a batch of one.
  return jnp.einsum('zIr,zrO->zIO', left[None], right.reshape(1, len(right), -1))[0]


def _input_grad(kernel, dy):
  """Returns the gradient of x·kernel for x: dy [R,*out] against the kernel's last axes."""
  out = dy.ndim - 1
  axes = tuple(range(1, dy.ndim)), tuple(range(kernel.ndim - out, kernel.ndim))
  return jax.lax.dot_general(dy, kernel, (axes, ((), ())))
