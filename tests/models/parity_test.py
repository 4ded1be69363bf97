"""The decoder against transformers, for every family.

The tiny models are random and have no default where a family allows another
value; their weights pass through save_pretrained and hf.load.
"""

import os

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.models import hf, sampling
from tests import small

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

SHAPE = {
  'vocab_size': 97,
  'hidden_size': 32,
  'intermediate_size': 56,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 16,
  'max_position_embeddings': 128,
  'initializer_range': 0.2,
  'rms_norm_eps': 3e-3,
  'bos_token_id': 1,
  'eos_token_id': None,
  'pad_token_id': 0,
}
ROPE = {'rope_type': 'default', 'rope_theta': 321.0}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 321.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
FAMILIES = {
  'llama': ('LlamaForCausalLM', {'rope_parameters': LLAMA3}),
  # SmolLM2 is a Llama without scaling; it ties its embeddings.
  'smollm2': ('LlamaForCausalLM', {'rope_parameters': ROPE}),
  'mistral': ('MistralForCausalLM', {'rope_parameters': ROPE, 'sliding_window': 5}),
  'qwen3': ('Qwen3ForCausalLM', {'rope_parameters': ROPE}),
  'gemma2': (
    'Gemma2ForCausalLM',
    {
      'rope_parameters': ROPE,
      'sliding_window': 5,
      'attn_logit_softcapping': 2.0,
      'final_logit_softcapping': 3.0,
      'query_pre_attn_scalar': 23,
    },
  ),
}
SAFE = (3, 41)  # ids of a verdict's words
TOKENS = np.random.default_rng(0).integers(2, 97, (2, 24))


@pytest.fixture(
  scope='module',
  params=[(name, tie) for name in FAMILIES for tie in (True, False)],
  ids=lambda p: f'{p[0]}-{"tied" if p[1] else "untied"}',
)
def model(request, tmp_path_factory):
  """Returns (a transformers model, the folder that it is saved in)."""
  name, tie = request.param
  cls, fields = FAMILIES[name]
  cls = getattr(transformers, cls)
  torch.manual_seed(0)
  theirs = cls(
    cls.config_class(**SHAPE, **fields, tie_word_embeddings=tie, attn_implementation='eager')
  ).eval()
  with torch.no_grad():
    for key, param in theirs.named_parameters():
      if 'norm' in key:  # which would all start as 1
        param.add_(0.3 * torch.randn_like(param))
  folder = tmp_path_factory.mktemp(name)
  theirs.save_pretrained(folder)
  return theirs, folder


def _batch(tokens):
  positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (2, 1))
  return tokens.astype(np.int32), positions, np.ones_like(positions)


def _largest_gap(got, want):
  gap = float(np.abs(np.asarray(got) - np.asarray(want)).max())
  print(f'largest difference {gap:.1e}')
  return gap


def test_logits(model):
  theirs, folder = model
  cfg, params = hf.load(folder)
  with torch.no_grad():
    want = theirs(torch.tensor(TOKENS)).logits.numpy()
  assert np.ptp(want) > 1
  assert _largest_gap(small.logits(cfg, params, *_batch(TOKENS)), want) < 1e-4


def test_packed_texts(model):
  """Two texts in one row; windows must not count tokens of a neighbour."""
  theirs, folder = model
  cfg, params = hf.load(folder)
  lengths = 14, 10
  tokens = np.concatenate([TOKENS[i, :n] for i, n in enumerate(lengths)])
  positions = np.concatenate([np.arange(n) for n in lengths])
  segment_ids = np.repeat([1, 2], lengths)
  batch = [np.tile(x, (2, 1)).astype(np.int32) for x in (tokens, positions, segment_ids)]
  got = small.logits(cfg, params, *batch)[0]
  with torch.no_grad():
    want = np.concatenate(
      [theirs(torch.tensor(TOKENS[i : i + 1, :n])).logits[0].numpy() for i, n in enumerate(lengths)]
    )
  assert _largest_gap(got, want) < 1e-4


def test_gradient_of_a_verdict(model, tmp_path):
  """Of -log of the probability of some ids at the last token of each row."""
  theirs, folder = model
  cfg, params = hf.load(folder)
  theirs.zero_grad()
  last = theirs(torch.tensor(TOKENS)).logits[:, -1].log_softmax(-1)
  (-last[:, list(SAFE)].logsumexp(-1).sum()).backward()

  def loss(params):
    last = small.logits(cfg, params, *_batch(TOKENS))[:, -1]
    log_p = jax.nn.log_softmax(last)[:, jnp.asarray(SAFE)]
    return -jax.nn.logsumexp(log_p, axis=-1).sum()

  got = jax.jit(jax.grad(loss))(params)
  # Their gradients take the way of weights to get our names and axes.
  gradients = type(theirs)(theirs.config)
  with torch.no_grad():
    for mine, source in zip(gradients.parameters(), theirs.parameters(), strict=True):
      mine.copy_(source.grad)
  gradients.save_pretrained(tmp_path)
  _, want = hf.load(tmp_path)
  worst = 0.0
  got = flax.traverse_util.flatten_dict(got, sep='/')
  for name, leaf in flax.traverse_util.flatten_dict(want, sep='/').items():
    leaf = np.asarray(leaf)
    # Each layer by itself, so that a large one does not hide a small one.
    axes = tuple(range(name.startswith('layers/'), leaf.ndim))
    scale = np.abs(leaf).max(axis=axes)
    assert scale.min() > 0, name
    gap = (np.abs(leaf - got[name]).max(axis=axes) / scale).max()
    assert gap < 1e-3, (name, gap)
    worst = max(worst, float(gap))
  print(f'largest relative difference {worst:.1e}')


def test_greedy_continuation(model):
  theirs, folder = model
  cfg, params = hf.load(folder)
  prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :3].tolist()]
  out = sampling.generate(
    cfg, params, prompts, sampling.Sampling(max_completion_length=12, temperature=0.0)
  )
  for prompt, ids in zip(prompts, out.tokens.tolist(), strict=True):
    assert ids == _continue(theirs, prompt, 12)


def _continue(model, prompt, num):
  """Returns the likeliest num tokens that follow, according to transformers."""
  prompt = torch.tensor([prompt])
  out = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=num,
    min_new_tokens=num,
    do_sample=False,
    pad_token_id=0,
  )
  return out[0, prompt.shape[1] :].tolist()


QUESTIONS = (
  'Why is the sky blue?',
  'Write a haiku about rain.',
  'What is 17 plus 25?',
  'Name three prime numbers.',
  'Translate "good morning" into French.',
  'How do I boil an egg?',
  'Who wrote Hamlet?',
  'What does HTTP stand for?',
  'Give me a synonym for "quick".',
  'Explain gravity to a child.',
)


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_continues_ten_prompts_as_transformers_does():
  folder = os.environ.get('CSRM_SMOLLM2_DIR')
  if not folder:
    pytest.skip('needs $CSRM_SMOLLM2_DIR; run tests/fetch_smollm2.py DIR and set it to DIR')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  prompts = [
    tokenizer.encode(f'<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n')
    for question in QUESTIONS
  ]
  stop = theirs.generation_config.eos_token_id
  stop = tokenizer.eos_token_id if stop is None else stop
  cfg, params = hf.load(folder)
  out = sampling.generate(
    cfg,
    params,
    prompts,
    sampling.Sampling(max_completion_length=24, temperature=0.0, stop_ids=(stop,)),
  )
  for i, prompt in enumerate(prompts):
    with torch.no_grad():
      want = theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        do_sample=False,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pad_token_id=0,
        eos_token_id=stop,
      )[0, len(prompt) :].tolist()
    assert out.tokens[i, : out.lengths[i]].tolist() == want, QUESTIONS[i]
