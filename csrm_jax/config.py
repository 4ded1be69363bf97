"""Run configs: their one-line argument, sweeps, differences and files.

A run config is an ml_collections ConfigDict that a file in configs/ builds in `get_config(arg)`.
The same file may define `sweep()`; see `expand_sweep`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import json
import operator
import os
import pathlib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from csrm_jax.core import checks, files

ConfigDict = ml_collections.ConfigDict

_HERE = pathlib.Path(__file__).parent
# The folder of config files: of a wheel, or at the top of the repository.
CONFIGS = next(
  (folder for folder in (_HERE / 'configs', _HERE.parent / 'configs') if folder.is_dir()),
  _HERE / 'configs',
)

# What other programs call a setting -> what it is called here.
SYNONYMS = {
  synonym: name
  for name, synonyms in {
    'optim.lr': 'learning_rate learning-rate peak_lr',
    'batch_size': 'per_device_train_batch_size train_batch_size global_batch_size bs',
    'epochs': 'num_epochs num_train_epochs n_epochs max_epochs',
    'num_steps': 'steps max_steps train_steps num_train_steps total_steps',
    'warmup_steps': 'warmup num_warmup_steps lr_warmup_steps warmup_ratio',
    'num_microbatches': 'gradient_accumulation_steps accumulation_steps grad_accum',
    'clip_norm': 'max_grad_norm grad_clip gradient_clipping gradient_clip_val',
    'b1': 'beta1 adam_beta1',
    'b2': 'beta2 adam_beta2',
    'max_length': 'max_seq_length max_seq_len seq_len sequence_length max_len',
    'log_every': 'logging_steps log_interval log_every_n_steps',
    'checkpoint_every': 'save_steps save_every save_interval',
    'lora_rank': 'lora_r rank',
    'init': 'model_name model_name_or_path pretrained base_model',
    'dtype': 'bf16 fp16 precision torch_dtype',
    'seed': 'random_seed rng_seed',
    'num_generations': 'group_size_rl n_samples rollout_n',
    'kl_coef': 'beta_kl kl_penalty init_kl_coef',
    'remat': 'gradient_checkpointing activation_checkpointing',
    'path': 'train_file data_path dataset dataset_name',
  }.items()
  for synonym in synonyms.split()
}

_TRUE = ('1', 'true', 'yes', 'on')
_FALSE = ('0', 'false', 'no', 'off')


def parse_arg(arg: str | None, **spec: Any) -> ConfigDict:
  """Returns the values of 'a=1,flag,b=x', with the defaults of `spec`.

  The text after the colon in --config=configs/rm.py:model=tiny,debug is such an argument.

  Args:
    arg: Comma-separated key=value parts; a key alone is true. Values cannot contain commas, but
      within braces.
    **spec: The default of each key, whose type the value takes. A type (seed=int) means None by
      default; a tuple lists the choices, and its first is the default. A dict is a section:
      its keys are given as SECTION.KEY.

  Raises:
    ValueError: A key is unknown or repeated, or its value has another type.
  """
  values, given = {}, {}
  sections = [name for name, default in spec.items() if isinstance(default, Mapping)]
  spec = flatten(spec)
  for key, default in spec.items():
    values[key] = default[0] if isinstance(default, tuple) else default
    if isinstance(default, type):
      values[key] = None
  for part in _parts(arg):
    key, equals, text = part.partition('=')
    if key not in spec:
      known = ', '.join(spec) or '(none)'
      raise ValueError(f'config argument {key!r} is unknown{_close(key, spec)}; known: {known}')
    if key in given:
      raise ValueError(f'config argument {key!r} is given twice')
    given[key] = _parse_value(key, text if equals else None, spec[key])
  values |= given
  for name in sections:
    prefix = f'{name}.'
    inner = {key: values.pop(key) for key in list(values) if key.startswith(prefix)}
    values[name] = {key.removeprefix(prefix): value for key, value in inner.items()}
  return ConfigDict(values)


def choose(what: str, table: Mapping[str, Callable[..., Any]], text: str) -> Callable[..., Any]:
  """Returns the function of a table that 'NAME' or 'NAME:KNOB=VALUE,…' names, its knobs bound.

  Knobs are the function's arguments by keyword; each has its default there.

  Raises:
    ValueError: The name, a knob or its type is unknown; the message lists those that there are.
  """
  name, _, arg = text.partition(':')
  checks.one_of(what, name, table)
  try:
    return functools.partial(table[name], **parse_arg(arg, **knobs(table[name])))
  except ValueError as error:
    raise ValueError(f'{what}={text!r}: {error}') from None


def knobs(function: Callable[..., Any]) -> dict[str, Any]:
  """Returns {name: default} of a function's arguments by keyword."""
  parameters = inspect.signature(function).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def split_arg(arg: str | None, names: Sequence[str]) -> tuple[str, str]:
  """Returns the parts of an argument that have these names, and the other parts."""
  own = [part for part in _parts(arg) if part.partition('=')[0] in names]
  return ','.join(own), ','.join(part for part in _parts(arg) if part not in own)


def _parts(arg: str | None) -> list[str]:
  parts = re.findall(r'(?:[^,{]|\{[^}]*\}|\{)+', arg or '')
  return [part.strip() for part in parts if part.strip()]


def _parse_value(key: str, text: str | None, default: Any) -> Any:
  if isinstance(default, tuple):
    choices = {str(choice): choice for choice in default}
    if text not in choices:
      raise ValueError(f'config argument {key}={text}: choose one of {", ".join(choices)}')
    return choices[text]
  kind = default if isinstance(default, type) else type(default)
  if kind is bool:
    if text is None or text.lower() in _TRUE:
      return True
    if text.lower() in _FALSE:
      return False
  elif text is None:
    raise ValueError(f'config argument {key!r} needs a value: {key}=...')
  elif default is None:
    return text
  else:
    with contextlib.suppress(ValueError):
      return kind(text)
  raise ValueError(f'config argument {key}={text}: {text!r} is not of type {kind.__name__}')


def _close(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
  matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
  return f' (did you mean {" or ".join(matches)}?)' if matches else ''


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """Returns {'optim.lr': value, …}; an empty section stays as the value {}."""
  plain = config.to_dict() if isinstance(config, ConfigDict) else config
  flat = {}
  for key, value in plain.items():
    if isinstance(value, Mapping) and value:
      flat |= {f'{key}.{k}': v for k, v in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def find_key(config: ConfigDict, key: str) -> list[str]:
  """Returns the keys of the config, three at most, that are called so elsewhere."""
  last = key.rpartition('.')[2]
  names = {last, SYNONYMS.get(last.lower(), last)}
  # A right name in the wrong section counts, too.
  return [name for name in flatten(config) if {name, name.rpartition('.')[2]} & names][:3]


def check_key(config: ConfigDict, key: str) -> None:
  """Checks that a dotted key names a value of the config; the error suggests others."""
  known = flatten(config)
  if key in known:
    return
  if any(name.startswith(f'{key}.') for name in known):
    raise ValueError(f'config key {key!r} is a section: set a key inside it')
  same = find_key(config, key)
  hint = f' (did you mean {" or ".join(same)}?)' if same else ''
  raise ValueError(f'config key {key!r} does not exist{hint or _close(key, known)}')


def find(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
  """Returns the section that a dotted key names a value of, and the value's name in it."""
  *sections, last = key.split('.')
  return functools.reduce(operator.getitem, sections, config), last


def set_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
  """Sets dotted keys of the config in place; a wrong key or type is a ValueError."""
  for key, value in overrides.items():
    check_key(config, key)
    section, last = find(config, key)
    try:
      section[last] = value
    except TypeError as error:
      raise ValueError(f'config key {key}={value!r}: {error}') from None


def find_file(name: str | os.PathLike) -> pathlib.Path:
  """Returns the config file of that name: a path, or 'rm' or configs/rm.py for one of CONFIGS."""
  path = pathlib.Path(name)
  if path.is_file() or path.is_absolute():
    return path
  own = CONFIGS / f'{path.name.removesuffix(".py")}.py'
  is_ours = str(path) == path.stem or str(path.parent) == 'configs'
  return own if is_ours and own.is_file() else path


def load_module(path: str | os.PathLike) -> types.ModuleType:
  """Returns the module of a config file, see `find_file`."""
  path = find_file(path)
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f'config file {path} does not exist')
  spec = importlib.util.spec_from_file_location('_csrm_jax_config', path)
  if spec is None:
    raise ValueError(f'config file {path}: its name must end in .py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def to_json(config: ConfigDict) -> str:
  """Returns the resolved config as indented JSON with sorted keys."""
  plain = config.to_dict()
  for key, value in flatten(plain).items():
    try:
      json.dumps(value)
    except TypeError:
      raise ValueError(
        f'config key {key!r} holds a {type(value).__name__}: use numbers, '
        'strings, booleans, None and tuples of them'
      ) from None
  return json.dumps(plain, indent=2, sort_keys=True) + '\n'


def from_json(text: str) -> ConfigDict:
  """Returns the ConfigDict of to_json's text; lists become tuples."""

  def tuples(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value

  return ConfigDict(tuples(json.loads(text)))


def digest(config: ConfigDict) -> str:
  """Returns the sha256 (hex) of the resolved config."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()


def _portable(text: str) -> str:
  """Returns a JSON value with files of the package named as such: older versions gave paths."""
  text = re.sub(r'"[^"]*/csrm_jax/(ruleworld/[^"]+)"', r'"builtin:\1"', text)
  return re.sub(r'"[^"]*/(configs/safety/refusal\.yaml)"', r'"builtin:\1"', text)


def _flat_json(config: ConfigDict) -> dict[str, str]:
  """Returns {dotted key: JSON}, so that a tuple equals the list that a file gives back."""
  return {key: _portable(json.dumps(v)) for key, v in flatten(json.loads(to_json(config))).items()}


def _defaults(source: str) -> dict[str, str]:
  """Returns {dotted key: JSON} of what a config file, PATH or PATH:ARGUMENT, sets.

  Without the keys to which the argument gives another value than the file alone.
  """
  path, _, arg = source.partition(':')
  get_config = load_module(path).get_config
  try:
    alone = _flat_json(get_config())
  except (TypeError, ValueError):
    return {}  # Somebody's own file that needs an argument.
  given = _flat_json(get_config(arg)) if arg else alone
  return {key: value for key, value in given.items() if alone.get(key, value) == value}


def diff_config(old: ConfigDict, new: ConfigDict, source: str = '') -> list[str]:
  """Returns one 'key: old -> new' for each difference, sorted; [] if equal.

  `source` is the config file of `new`, PATH or PATH:ARGUMENT. A key that `old` lacks, as the config
  of an older version may, had the default that it has there.
  """
  before, after = _flat_json(old), _flat_json(new)
  if source and after.keys() - before.keys():
    before = {key: v for key, v in _defaults(source).items() if key in after} | before
  return [
    f'{key}: {before.get(key, "(absent)")} -> {after.get(key, "(absent)")}'
    for key in sorted(before | after)
    if before.get(key) != after.get(key)
  ]


def check_no_secrets(config: ConfigDict) -> None:
  """Checks that no value looks like a password or a token: config.json would hold it."""
  for key, value in flatten(config).items():
    for text in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(text, str):
        checks.no_secret(f'config.{key}', text)


# Says how to go on, not what is run.
_MAY_DIFFER = ('accept_changes:',)


def make_workdir(path: pathlib.Path) -> None:
  """Makes the directory; raises ValueError where it cannot be made or written."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    reason = '' if os.access(path, os.W_OK) else 'it is read-only'
  except OSError as error:
    # mkdir says of a file, and of a link that leads nowhere or to itself, that it exists.
    kinds = {'it is a file': path.is_file(), 'it is a link that leads nowhere': path.is_symlink()}
    reason = next((kind for kind, found in kinds.items() if found), error.strerror or str(error))
  if reason:
    raise ValueError(f'--workdir={path} cannot be used ({reason}): give a directory to write to')


def prepare_workdir(
  workdir: str | os.PathLike, config: ConfigDict, is_first: bool = True, source: str = ''
) -> pathlib.Path:
  """Makes the work directory, writes config.json into it, and returns its path.

  A directory with only config.json and manifest.json may be used with another config: its run
  stopped at bad input. Of several processes of one run only the first changes what is there: what
  it writes would look to the others like what a killed run has left. `source` is that of
  `diff_config`.

  Raises:
    ValueError: A run with another config is there; the message shows the difference.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  path = workdir / 'config.json'
  if is_first and workdir.is_dir():
    # Without a config the folders in it may be anybody's.
    files.remove_partial(workdir, deep=path.exists())
  if path.exists() and _has_results(workdir):
    try:
      old = from_json(files.read_text(path))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
      raise ValueError(f'{path} is not a config ({error}): use another --workdir') from None
    differ = diff_config(old, config, source)
    if lines := [line for line in differ if not line.startswith(_MAY_DIFFER)]:
      raise ValueError(
        f'{path} is of a run with another config: {"; ".join(lines)} '
        '(give the same config to resume it, or another --workdir)'
      )
  kept = any(
    (workdir / name).exists() for name in ('manifest.json', 'metrics.jsonl', 'checkpoints')
  )
  if is_first and kept and not path.exists() and _has_results(workdir):
    manifest = workdir / 'manifest.json'
    made_of = files.read_json(manifest, dict) if manifest.exists() else {}
    if made_of.get('config_digest') != digest(config):
      raise ValueError(
        f'{path} is gone, and nothing says that the run there had this config; put it back to '
        'resume the run, or use another --workdir'
      )
  if is_first:
    files.write(path, to_json(config))
  return workdir


def _has_results(workdir: pathlib.Path) -> bool:
  ours = ('config.json', 'manifest.json', 'lease.json')
  return any(path.name not in ours for path in workdir.iterdir())


def discard_workdir(workdir: pathlib.Path) -> None:
  """Removes a work directory's own files if its run left no results."""
  if not workdir.is_dir() or _has_results(workdir):
    return
  for path in workdir.iterdir():
    path.unlink()
  with contextlib.suppress(OSError):  # It may be a mount point, for example.
    workdir.rmdir()


@dataclasses.dataclass(frozen=True)
class SweepRun:
  """One run of a sweep."""

  name: str  # the name of its work directory
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # dotted keys
  arg: str = ''  # follows the colon in --config


def expand_sweep(sweep_fn: Callable[[], Sequence[Mapping[str, Any]]]) -> tuple[SweepRun, ...]:
  """Returns the checked runs of a config file's `sweep()`.

  `sweep()` returns [{'name': 'no_cca', 'arg': 'ablation=no_cca'}, {'name': 'lr', 'overrides':
  {'optim.lr': 1e-4}}, …].
  """
  fields = {field.name for field in dataclasses.fields(SweepRun)}
  runs = []
  for number, item in enumerate(sweep_fn()):
    if not isinstance(item, Mapping) or not {'name'} <= set(item) <= fields:
      raise ValueError(
        f'sweep() item {number} must be a dict with a name and, if needed, '
        f'overrides and arg: got {item!r}'
      )
    run = SweepRun(**item)
    # A letter or digit is required, so that no name is "." or "..".
    if not re.fullmatch(r'[\w.=+-]*\w[\w.=+-]*', run.name):
      raise ValueError(
        f'sweep() name {run.name!r} cannot be a folder: use letters, digits and _ . = + -'
      )
    if run.name in [other.name for other in runs]:
      raise ValueError(f'sweep() has two runs named {run.name!r}')
    runs.append(run)
  if not runs:
    raise ValueError('sweep() gives no runs')
  return tuple(runs)
