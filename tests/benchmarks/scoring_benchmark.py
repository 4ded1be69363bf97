"""Times scoring against transformers, on the same weights and token ids.

python tests/benchmarks/scoring_benchmark.py --model=DIR [--dtype=bfloat16] [--full]

DIR is a Hugging Face folder of a small instruction-tuned model, such as SmolLM2-135M-Instruct.
There are three kinds of work: one rule set for many responses (rules first), many rule sets for
one conversation (conversation first), and a mixture of both. Rules are those in the repository, or
half of their categories; conversations are random words of the lengths that chats have.

The peers run batches sorted by length, `transformers` without more, `cached` with what the prompts
of a group share read once and its cache expanded to the batch. Both compute the verdict's logits
only. Scores of all sides are compared.
"""

import pathlib

import numpy as np
import pairs

from csrm_jax.data import features
from csrm_jax.reward import model as reward_model
from csrm_jax.safety import schema, templates

RULES = pathlib.Path(__file__).parents[2] / 'csrm_jax' / 'data' / 'rules'
SAFETY = pathlib.Path(__file__).parents[2] / 'configs' / 'safety'
PEER_BATCH = 8  # rows; the fastest of 4, 8, 16 and 32 on one core


def make_ours(args):

  import jax

  from csrm_jax.models import hf
  from csrm_jax.reward import scoring

  spec, tokenizer = reward_model.describe(args.model, dtype=args.dtype, param_dtype=args.dtype)
  params = hf.load_params(args.model, spec.model)
  score = scoring.make_prompt_scorer(spec.model, params, spec.verbalizers(tokenizer))
  return lambda case: np.asarray(jax.block_until_ready(score([case['prompts']])))


def make_transformers(args):
  return _make_peer(args, cached=False)


def make_cached(args):
  return _make_peer(args, cached=True)


def _make_peer(args, cached):
  """Returns a function: case -> scores of transformers."""
  import torch
  import transformers

  torch.set_num_threads(pairs.num_threads())
  dtype = getattr(torch, args.dtype)
  model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
  spec, tokenizer = reward_model.describe(args.model)
  verbalizers = spec.verbalizers(tokenizer)
  safe, unsafe = (torch.tensor(ids) for ids in (verbalizers.safe, verbalizers.unsafe))

  def read(prompts, prefix):
    """Returns scores of prompts, which continue `prefix` = (cache, its length) if there is one."""
    cache, before = prefix or (None, 0)
    lengths = [len(p) - before for p in prompts]
    tokens = torch.zeros((len(prompts), max(lengths)), dtype=torch.int64)
    mask = torch.zeros((len(prompts), before + max(lengths)), dtype=torch.int64)
    mask[:, :before] = 1
    for i, prompt in enumerate(prompts):
      tokens[i, : lengths[i]] = torch.from_numpy(prompt[before:].astype(np.int64))
      mask[i, before : before + lengths[i]] = 1
    if cache is not None:
      cache = [
        (k.expand(len(prompts), -1, -1, -1), v.expand(len(prompts), -1, -1, -1)) for k, v in cache
      ]
      cache = transformers.DynamicCache(cache)
    out = model.model(tokens, attention_mask=mask, cache=cache, use_cache=bool(cache))
    last = out.last_hidden_state[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
    logits = model.lm_head(last).float()
    return torch.logsumexp(logits[:, safe], -1) - torch.logsumexp(logits[:, unsafe], -1)

  def read_prefix(tokens):
    out = model.model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=True)
    return [(layer.keys, layer.values) for layer in out.past_key_values.layers], len(tokens)

  def run(case):
    prompts, scores = case['prompts'], np.zeros(len(case['prompts']))
    groups = case['groups'] if cached else [range(len(prompts))]
    with torch.inference_mode():
      for group in groups:
        group, prefix = sorted(group, key=lambda i: -len(prompts[i])), None
        shared = _num_common([prompts[i] for i in group]) if cached and len(group) > 1 else 0
        if shared:
          prefix = read_prefix(prompts[group[0]][:shared])
        for start in range(0, len(group), PEER_BATCH):
          part = group[start : start + PEER_BATCH]
          scores[part] = read([prompts[i] for i in part], prefix).numpy()
    return scores

  return run


def _num_common(prompts):
  size = min(map(len, prompts)) - 1
  heads = np.array([p[:size] for p in prompts])
  same = (heads == heads[0]).all(axis=0)
  return int(size if same.all() else same.argmin())


def make_cases(model, full):
  """Returns {name: {'prompts': token ids, 'groups': indices of prompts with a long prefix}}."""
  spec, tokenizer = reward_model.describe(model)
  rng = np.random.default_rng(0)
  files = sorted([*RULES.glob('*.yaml'), *SAFETY.glob('*.yaml')])
  whole = [schema.load_safety(path) for path in files]
  words = [tokenizer.decode([int(i)]) for i in range(1000, 4000)]
  words = [w for w in words if w.isascii() and w.strip().isalpha()]

  def rule_set(i):
    """Returns rule set i: a whole one, or half of the categories of one."""
    rules = whole[i % len(whole)]
    if i < len(whole):
      return rules
    names = list(rules.categories)
    kept = sorted(rng.permutation(len(names))[: (len(names) + 1) // 2])
    return schema.SafetyConfig(tuple(names[k] for k in kept))

  def text(num):
    return ''.join(rng.choice(words, num)).strip()

  def conversation():
    """Returns a question and an answer, about 30 and 150 words, as chats have them."""
    asked, said = np.clip(rng.lognormal((3.4, 4.8), (0.5, 0.7)), 5, 500).astype(int)
    return schema.Message('user', text(asked)), schema.Message('agent', text(said))

  def encode(items, order):
    layout = templates.Layout(
      **{k: getattr(spec.layout, k) for k in ('format', 'words', 'chat_prefix', 'chat_suffix')},
      order=order,
    )
    encoder = features.Encoder(tokenizer, 4096, layout)
    return [
      features.require(features.encode(schema.Example(str(i), *item), encoder)).prompts[0].tokens
      for i, item in enumerate(items)
    ]

  num_responses, num_rule_sets, num_mixed = (200, 32, 96) if full else (60, 32, 24)
  one_rule_set = [(whole[2], conversation()) for _ in range(num_responses)]
  talk = conversation()
  rule_sets = [(rule_set(i), talk) for i in range(num_rule_sets)]
  # Rule sets of very different popularity.
  chosen = np.minimum(rng.geometric(0.2, num_mixed), len(whole)) - 1
  mixed = [(whole[i], conversation()) for i in chosen]
  groups = [np.flatnonzero(chosen == i).tolist() for i in np.unique(chosen)]
  return {
    'one_rule_set': {
      'prompts': encode(one_rule_set, 'rules_first'),
      'groups': [list(range(num_responses))],
    },
    'rule_sets': {
      'prompts': encode(rule_sets, 'conversation_first'),
      'groups': [list(range(num_rule_sets))],
    },
    'mixed': {'prompts': encode(mixed, 'rules_first'), 'groups': groups},
  }


def _work(case):
  """Returns how many tokens there are, and how many if each group's prefix is read once."""
  prompts = case['prompts']
  total = sum(map(len, prompts))
  saved = sum(
    (len(group) - 1) * _num_common([prompts[i] for i in group])
    for group in case['groups']
    if len(group) > 1
  )
  return {'prompts': len(prompts), 'tokens': total, 'tokens_shared': total - saved}


def main():
  parser = pairs.parser(__doc__)
  parser.add_argument('--full', action='store_true', help="the issue's sizes: 200, 32, 96 prompts")
  args = parser.parse_args()
  if not args.model:
    parser.error('--model: give the folder of a model')
  cases = make_cases(args.model, args.full)
  work = {name: _work(case) for name, case in cases.items()}
  for name, numbers in work.items():
    print(name, numbers)
  results = pairs.compare('scoring', [make_ours, make_transformers, make_cached], cases, args, work)
  for name, found in results.items():
    first, *others = found.items()
    for side, scores in others:
      print(f'{name}: {side} and {first[0]} differ by up to {np.abs(scores - first[1]).max():.2g}')


if __name__ == '__main__':
  main()
