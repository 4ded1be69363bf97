"""What several run configs share: merging, backbones, shared sections.

The files beside this one load it by its path, so that a config works from any
folder: common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))
"""

import pathlib

import ml_collections

import csrm_jax
from csrm_jax.core import topology

# Weights and tokenizer that the package ships.
RULEWORLD = pathlib.Path(csrm_jax.__file__).parent / 'ruleworld'
TOKENIZER = str(RULEWORLD / 'tokenizer.model')

# Public instruction-tuned models -> their weights on the hub.
BACKBONES = {
  'smollm2_135m': 'HuggingFaceTB/SmolLM2-135M-Instruct',
  'llama3_8b': 'meta-llama/Llama-3.1-8B-Instruct',
  'llama3_70b': 'meta-llama/Llama-3.1-70B-Instruct',
  'mistral_7b': 'mistralai/Mistral-7B-Instruct-v0.1',
  'qwen3_1b7': 'Qwen/Qwen3-1.7B',
  'gemma2_9b': 'google/gemma-2-9b-it',
}

# Fields of a model that are no property of its weights.
OVERRIDES = {
  'dtype': 'float32',  # of activations; or bfloat16
  'param_dtype': 'float32',  # of parameters; or bfloat16
  'remat': 'none',  # recomputed in the backward pass: none, dots, full
  'unroll': 4,  # layers a step of the scan over depth; more suits CPUs
  'lora_rank': 0,  # of the adapters that are trained; 0 for none
  'lora_alpha': 16.0,  # over the rank: their scale
  'lora_targets': ('query', 'key', 'value', 'out', 'gate', 'up', 'down'),
}

# AdamW; lr, warmup_steps and weight_decay are the run's own.
OPTIM = {
  'lr': 1e-3,  # peak; warm-up, then cosine
  'warmup_steps': 20,  # updates
  'b1': 0.9,
  'b2': 0.95,
  'weight_decay': 0.0,  # decoupled; not on norm scales
  'clip_norm': 1.0,  # largest global gradient norm
  'end_lr_fraction': 0.1,  # last learning rate over the peak
  'num_microbatches': 1,  # gradient accumulation within an update
}

# Devices along each axis; -1 takes what is left. Of num_slices (or nodes),
# which a slow network connects, data is a multiple.
MESH = {'data': -1, 'fsdp': 1, 'tensor': 1, 'num_slices': 1}


def merge(base, *parts):
  """Returns a config: the base, in which the parts set keys one after another.

  Args:
    base: nested dict of all keys there are.
    *parts: dicts of dotted keys ('optim.lr'), as on the command line. A dict as
      value replaces a section; a function changes the value that is there.

  Raises:
    KeyError: a part sets a key that the base does not have.
  """
  config = ml_collections.ConfigDict(base)
  for part in parts:
    for key, value in part.items():
      *sections, last = key.split('.')
      section = config
      for name in sections:
        section = section[name]
      if last not in section:
        raise KeyError(f'no key {key} in the base of this config')
      if callable(value):
        value = value(section[last])
      if isinstance(value, dict):
        del section[last]
        value = ml_collections.ConfigDict(value)
      section[last] = value
  return config


def lora(model, rank):
  """Returns the part that gives a model section's adapters their rank."""
  alpha = 2.0 * rank or 16.0
  return {f'{model}.overrides.lora_rank': rank, f'{model}.overrides.lora_alpha': alpha}


def on_slice(model, mesh):
  """Returns the part for a slice of TPUs, or nodes of GPUs: mesh and precision."""
  return {
    **{f'mesh.{axis}': size for axis, size in topology.layout(mesh).items()},
    f'{model}.overrides.dtype': 'bfloat16',
    f'{model}.overrides.remat': 'full',
    f'{model}.overrides.unroll': 1,
  }
