import dataclasses

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from csrm_jax.models import config, hf


@pytest.mark.parametrize(
  'form,last', [('causal_lm', 'lm_head'), ('sequence_classification', 'score')]
)
def test_every_parameter_has_its_slots(family_cfg, form, last, make_params):
  params = make_params(family_cfg)
  params['score'] = {'kernel': np.zeros((family_cfg.embed_dim, 1))}
  shapes = {
    name: leaf.shape
    for name, leaf in flatten_dict(params, sep='/').items()
    if name.split('/')[0] not in {'lm_head', 'score'} - {last}
  }
  slots = hf.slots(family_cfg, form)
  assert {s.entry.ours: s.whole for s in slots.values()} == shapes
  places = {(slot.entry.ours, slot.layer) for slot in slots.values()}
  assert len(places) == len(slots)  # no part of a parameter twice
  assert len(slots) == sum(
    shape[0] if name.startswith('layers/') else 1 for name, shape in shapes.items()
  )


def test_every_adapter_has_its_slots(family_cfg, make_params):
  cfg = dataclasses.replace(family_cfg, lora_rank=3)
  names = {name for name in flatten_dict(make_params(cfg), sep='/') if 'lora_' in name}
  slots = hf.lora_slots(cfg)
  assert {slot.entry.ours for slot in slots.values()} == names
  assert len(slots) == cfg.num_layers * 2 * len(config.LORA_TARGETS)
  for name, slot in slots.items():
    assert slot.shape['lora_B' in name] == 3


def test_there_and_back(family_cfg):
  rng = np.random.default_rng(0)
  cfg = dataclasses.replace(family_cfg, lora_rank=3)
  for slots in (hf.slots(cfg), hf.lora_slots(cfg)):
    wholes = {slot.entry.ours: slot.whole for slot in slots.values()}
    params = {ours: rng.normal(size=whole).astype(np.float32) for ours, whole in wholes.items()}
    tensors = hf.to_theirs(params, slots, 'params')
    for name, slot in slots.items():
      param, tensor = params[slot.entry.ours], tensors[name]
      assert tensor.read().shape == tensor.shape, name
      part = param if slot.layer is None else param[slot.layer]
      np.testing.assert_array_equal(hf.to_ours(tensor.read(), slot), part)
