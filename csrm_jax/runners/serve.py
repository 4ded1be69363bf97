"""Serves a reward model over HTTP until it is told to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections

from csrm_jax.core import checks, mesh as mesh_lib
from csrm_jax.evals import thresholds
from csrm_jax.reward import model as reward_model, monitor

_LOCAL = ('127.0.0.1', 'localhost', '::1')


def run(config: ml_collections.ConfigDict) -> None:
  """Serves config.checkpoint; SIGTERM or Ctrl-C answers what was accepted, and ends."""
  make_server(config).run()


def make_server(config: ml_collections.ConfigDict):
  """Returns a uvicorn server of config.checkpoint that has not started."""
  try:
    import uvicorn

    from csrm_jax.serve import app as app_lib, http
  except ImportError as error:
    raise ImportError(
      f'serving needs the package {error.name}; {checks.install("serve")}'
    ) from None
  if not config.checkpoint:
    raise ValueError('config.checkpoint is empty: give --config=configs/serve.py:checkpoint=DIR')
  token = os.environ.get(config.token_env, '') if config.token_env else ''
  if config.host not in _LOCAL and not token:
    raise ValueError(
      f'config.host is {config.host!r}, which others can reach: set the environment variable '
      f'{config.token_env or "that config.token_env names"} to a token that clients must send'
    )
  logging.getLogger('csrm_jax').setLevel(logging.INFO)
  engine, policies = _load(config)
  limits = config.limits
  settings = app_lib.Settings(
    limits=app_lib.wire.Limits(
      limits.body_bytes, limits.conversations, limits.messages, limits.rules
    ),
    threshold=config.threshold,
    thresholds=_thresholds(config),
    **_monitor(config),
    token=token,
    allowed_hosts=tuple(config.allowed_hosts),
    body_timeout_s=limits.body_timeout_s,
    reload_s=config.reload_s,
    audit_log=config.audit_log,
  )
  app = app_lib.make_app(engine, policies, settings)
  options = uvicorn.Config(
    app,
    host=config.host,
    port=config.port,
    http=http.protocol(limits.body_timeout_s),
    access_log=False,
    log_level='warning',
    limit_concurrency=limits.connections,
    timeout_keep_alive=limits.keep_alive_s,
    server_header=False,
    proxy_headers=False,
  )

  class Server(uvicorn.Server):
    """Stops as asked, with exit code 0: what was accepted has been answered by then."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
      before = {
        number: signal.signal(number, self.handle_exit)
        for number in (signal.SIGTERM, signal.SIGINT)
      }
      try:
        yield
      finally:
        for number, handler in before.items():
          signal.signal(number, handler)

    def handle_exit(self, sig, frame) -> None:
      app.state.server.is_draining = True
      super().handle_exit(sig, frame)

  print(f'serving {config.checkpoint} on http://{config.host}:{config.port}, once /ready says so')
  return Server(options)


def _thresholds(config: ml_collections.ConfigDict) -> Mapping[str, thresholds.Threshold]:
  """Returns the thresholds of config.thresholds by their rules' digest."""
  return _fitted(config, config.thresholds).by_rules if config.thresholds else {}


def _monitor(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the settings of config.monitor."""
  if not config.monitor:
    return {}
  found = _fitted(config, config.monitor, of_streams=True)
  try:
    cuts = monitor.Cuts(**found.stream)
  except (ValueError, TypeError) as error:
    raise ValueError(f'{config.monitor}: {error}; fit it again with configs/calibrate.py') from None
  return {'cuts': cuts, 'alarms': found.by_rules}


def _fitted(config, path: str, of_streams: bool = False) -> thresholds.Thresholds:
  fitted = reward_model.applied_calibration(config.checkpoint)
  weights = reward_model.digest(config.checkpoint, config.combine)
  return thresholds.load(path, weights, fitted, of_streams)


def _load_parts(config: ml_collections.ConfigDict, name: str):
  """Returns the spec, parameters and tokenizer of one model."""
  options = {}
  source = reward_model.public_model(name) or name
  if source is not name:
    numerics = {name: value for name, value in config.numerics.items() if value}
    options = {'format': config.format, 'words': tuple(config.words), **numerics}
  return reward_model.load_parts(source, **options)


def _load(config: ml_collections.ConfigDict):
  """Returns the engine, not started, and the policies, checked by it."""
  from csrm_jax.serve import engine as engine_lib
  from csrm_jax.serve.policies import Policies

  names = reward_model.members(config.checkpoint)
  mesh = mesh_lib.make_mesh(**config.mesh)
  # One device needs no mesh, and computes as a file is scored.
  with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
    (spec, params, tokenizer), *others = (_load_parts(config, name) for name in names)
  for name, (other, _, _) in zip(names[1:], others, strict=True):
    if dataclasses.replace(other, domain=spec.domain) != spec:
      raise ValueError(
        f'{name}: another shape, template or tokenizer than {names[0]}; a server combines models'
        ' of one recipe'
      )
  batching = config.batching
  engine = engine_lib.Engine(
    spec,
    params,
    tokenizer,
    engine_lib.Lengths(
      tuple(batching.rules_lengths),
      tuple(batching.row_lengths),
      config.max_length,
      batching.call_tokens,
    ),
    prefix_bytes=batching.prefix_bytes,
    wait_s=batching.wait_s,
    deadline_s=config.deadline_s,
    allow_out_of_domain=config.allow_out_of_domain,
    calibration=reward_model.applied_calibration(names[0]),
    others=[
      (own, reward_model.applied_calibration(name))
      for name, (_, own, _) in zip(names[1:], others, strict=True)
    ],
    combine=config.combine,
  )
  return engine, Policies(config.policies, config.default_policy, engine.check)
