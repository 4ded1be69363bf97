"""Starting as one of several processes, and agreeing on what to run."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that is silent for so long is taken for dead, and all processes end.
HEARTBEAT_S = 30
# Collectives fail with one of these words when the other side is gone.
_GONE = r'[Gg]loo|UNAVAILABLE|heartbeat|[Cc]onnection (reset|closed|refused)'


def start(
  coordinator: str = '',
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout_s: int = 300,
) -> None:
  """Joins the other processes of this run; call it before any JAX computation.

  Without a coordinator (host:port of process 0), JAX asks the cluster: a TPU slice, Slurm, Open
  MPI or Kubernetes tells each process its place. If the others do not come in time, this prints
  one line and ends the process with exit code 2.
  """
  given = {
    '--coordinator': coordinator or None,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if coordinator and missing:
    raise ValueError(f'{missing[0]} is missing: --coordinator needs it')
  if len(missing) < len(given) and not coordinator:
    raise ValueError('--num_processes and --process_id need --coordinator')
  # CPUs need a library for collectives between processes; accelerators have their own.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  advice = (
    'all processes must run, with the same --coordinator and --num_processes '
    'and each its own --process_id, and reach that port'
  )
  where = coordinator or 'the cluster'
  late = f'no start with {where} in {timeout_s} s: {advice}'
  # A timer of our own: when the runtime's timeout passes, it aborts the process instead of
  # raising.
  watch = threading.Timer(timeout_s, _give_up, [late])
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(
      coordinator or None,
      num_processes,
      process_id,
      # Longer than the timer, so that the timer speaks first.
      initialization_timeout=timeout_s + 60,
      heartbeat_timeout_seconds=HEARTBEAT_S,
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().split('\n')[0][:200]
    raise ValueError(f'no start with {where}: {advice} ({reason})') from error
  finally:
    watch.cancel()


def _give_up(message: str) -> None:
  print(f'error: {message}', file=sys.stderr, flush=True)
  # Not sys.exit: the usual way out waits for all processes, and one of them is gone.
  os._exit(2)


def leave_if_alone(error: BaseException) -> None:
  """Ends this process with one line if the error means that another one is gone.

  It ends at once, with exit code 2. If the runtime notices first, by a missing heartbeat, it
  aborts the process with its own message.
  """
  text = ' '.join(str(error).split())
  # A collective may fail with a ValueError as well; other words of _GONE are
  # those of other faults there, such as a scorer that does not answer.
  words = _GONE if isinstance(error, jax.errors.JaxRuntimeError) else 'Gloo'
  if jax.process_count() > 1 and re.search(words, text):
    _give_up(
      f'another process is gone ({text[:160]}); start all of them again: they '
      'go on from the last checkpoint'
    )


def sync(name: str) -> None:
  """Waits until every process has come to the place of this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def check_same(values: Mapping[str, str]) -> None:
  """Checks that all processes hold the same values; if not, all raise a ValueError."""
  if jax.process_count() == 1:
    return
  for name, value in values.items():
    # Digests have one length on all processes, as process_allgather needs; the texts do not.
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(digest)
    others = np.flatnonzero((every != every[0]).any(axis=1))
    if others.size:
      raise ValueError(
        f'{name} differs between hosts: that of process {", ".join(map(str, others))} is not that '
        'of process 0; start all with the same command and the same version of the code'
      )
