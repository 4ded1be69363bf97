"""What several run configs share: merging, backbones, shared sections.

The files beside this one load it by its path, so that a config works from any folder.
"""

import ml_collections

from csrm_jax import config as config_lib
from csrm_jax.core import topology

# The weights and the tokenizer that the package ships, wherever it lies.
RULEWORLD = 'builtin:ruleworld'
TOKENIZER = f'{RULEWORLD}/tokenizer.model'

# Public instruction-tuned models -> their weights on the hub.
BACKBONES = {
  'smollm2_135m': 'HuggingFaceTB/SmolLM2-135M-Instruct',
  'llama3_8b': 'meta-llama/Llama-3.1-8B-Instruct',
  'llama3_70b': 'meta-llama/Llama-3.1-70B-Instruct',
  'mistral_7b': 'mistralai/Mistral-7B-Instruct-v0.1',
  'qwen3_1b7': 'Qwen/Qwen3-1.7B',
  'gemma2_9b': 'google/gemma-2-9b-it',
}

# Fields of a model that do not depend on its weights.
OVERRIDES = {
  'dtype': 'float32',  # the dtype of activations; bfloat16; or auto, what is faster here
  'param_dtype': 'float32',  # the dtype of parameters; or bfloat16
  'remat': 'none',  # what the backward pass recomputes to save memory: none, dots, full
  'attention': 'auto',  # kernel (an accelerator's flash attention), xla, or auto, what is there
  'unroll': 4,  # layers in one step of the scan over depth; more is faster on CPUs
  'lora_rank': 0,  # the rank of the adapters that are trained; 0 for no adapters
  'lora_alpha': 16.0,  # adapters are scaled by alpha / rank
  'lora_targets': ('query', 'key', 'value', 'out', 'gate', 'up', 'down'),  # kernels with adapters
}

# How rows of one's own files are read, whatever form they have (csrm_jax.data.forms).
OWN = {
  'safety': '',  # the rules of rows that bring none: a YAML, JSON or Markdown file
  # What the values of the label mean where they are not safe and unsafe, as in
  # "{'0': 'safe', '1': 'unsafe', '2': 'drop'}"; rows with 'drop' are left out.
  'labels': '',
  # The names that columns have there; '' for ours, or a usual one.
  'columns': {
    'id': '',  # names a row in results; by default file:row
    'safety': '',  # a row's own rules: an object, or the path of a file
    'conversation': '',  # a list of messages
    'prompt': '',  # what the user wrote, or a list of messages
    'response': '',  # the answer that is judged
    'label': '',  # whether it is safe
    'violated': '',  # names of the rules that it violates
    'weight': '',  # what the row counts in training
    # What else was rated, {name: number}; or columns of numbers, helpfulness+severity.
    'ratings': '',
    'strength': '',  # of a pair: how much safer the chosen one is; 0 is a tie
    'soft': '',  # of a pair: the probability that the order is right
  },
}

# Each run sets its own lr, warmup_steps and weight_decay.
OPTIM = {
  'optimizer': 'adamw',  # or muon, which moves the kernels of layers otherwise
  'lr': 1e-3,  # the peak, which a warm-up reaches and a cosine leaves
  'warmup_steps': 20,  # updates
  'b1': 0.9,  # decay of the first moment
  'b2': 0.95,  # decay of the second moment
  'weight_decay': 0.0,  # decoupled; norm scales have none
  'clip_norm': 1.0,  # the largest global gradient norm
  'end_lr_fraction': 0.1,  # the last learning rate, as a fraction of the peak
  'num_microbatches': 1,  # an update adds up the gradients of so many parts of its batch
}

# Devices along each axis; -1 takes those that are left. A slow network connects slices (or
# nodes), so that only the data axis may span them: it is a multiple of num_slices.
MESH = {'data': -1, 'fsdp': 1, 'tensor': 1, 'num_slices': 1}


def merge(base, *parts):
  """Returns the base as a config, in which the parts set keys one after another.

  The base is a nested dict with every key. A part is a dict of dotted keys ('optim.lr'), as on the
  command line. A dict as value replaces a section; a function changes the value that is there. A
  key that the base does not have is a KeyError.
  """
  config = ml_collections.ConfigDict(base)
  for part in parts:
    for key, value in part.items():
      section, last = config_lib.find(config, key)
      if last not in section:
        raise KeyError(f'no key {key} in the base of this config')
      if callable(value):
        value = value(section[last])
      if isinstance(value, dict):
        # A ConfigDict does not take another section's keys in place of its own.
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
