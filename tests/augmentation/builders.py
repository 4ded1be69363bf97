"""What configs/augment.py describes, with changes."""

import dataclasses
import pathlib

from csrm_jax import config as config_lib
from csrm_jax.augmentation import proposers, strictness

CONFIG = config_lib.load_module(pathlib.Path(__file__).parents[2] / 'configs' / 'augment.py')


def settings(**changes):
  """Returns the numbers of Algorithm 1 where a language model proposes."""
  section = CONFIG.get_config('proposer=endpoint').strictness
  names = [field.name for field in dataclasses.fields(strictness.Settings)]
  return strictness.Settings(**{name: section[name] for name in names} | changes)


def oracle(seed=0, **changes):
  return proposers.Oracle(seed, **dict(CONFIG.get_config().oracle) | changes)


def endpoint(cache, url='http://x/v1', **changes):
  section = dict(CONFIG.get_config().endpoint) | {'base_url': url, 'model': 'm'}
  return proposers.Endpoint(cache, **section | changes)


def local_model(cache, init, seed=0, **changes):
  section = dict(CONFIG.get_config().model) | {'init': init}
  return proposers.LocalModel(cache, seed, **section | changes)
