"""Times an update of a reward model against TRL's RewardTrainer, on the same pairs and weights.

python tests/benchmarks/rm_training_benchmark.py --model=DIR [--hh=FILE] [--dtype=bfloat16]

DIR is a Hugging Face folder of a small instruction-tuned model, such as SmolLM2-135M-Instruct. FILE
are pairs of Anthropic HH in its own form; without it, conversations are words of like lengths.
There are three kinds of work: two responses to one prompt (HH), one conversation under a lenient
and a strict guideline (strictness), and one conversation under eight rule sets (variants); each
with all weights trained and with adapters of rank 16. The peer takes the eight as four pairs, since
it knows no other loss. One run is one update: our packed rows, the peer's padded batch.
"""

import dataclasses
import itertools
import pathlib

import numpy as np
import pairs

from csrm_jax.data import features, pipeline, public
from csrm_jax.reward import model as reward_model
from csrm_jax.safety import augment, schema

RANK = 16
ROWS, SLOTS = 1, 32
LENGTHS = {'hh': 1024, 'strictness': 1024, 'variants': 1024}  # tokens in a row
NUM = 60  # the first row is filled from so many pairs


def make_ours(args):
  import jax

  from csrm_jax.core import mesh as mesh_lib
  from csrm_jax.models import hf, lora
  from csrm_jax.reward import scoring
  from csrm_jax.train import step as training

  training.keep_freed_memory()
  spec, tokenizer = reward_model.describe(args.model, words=('Yes', 'No'), dtype=args.dtype)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  optim = {'lr': 1e-5, 'warmup_steps': 0, 'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.0}
  optim |= {'clip_norm': 1.0, 'end_lr_fraction': 0.1}
  held = {}

  def start(rank):
    held.clear()  # the memory of the other kind of training
    cfg = dataclasses.replace(spec.model, remat=args.remat, unroll=args.unroll)
    cfg = dataclasses.replace(cfg, lora_rank=rank, lora_alpha=2.0 * rank or 16.0)
    params = hf.load_params(args.model, dataclasses.replace(cfg, lora_rank=0))
    trained, frozen = (lora.init(cfg, 0), params) if rank else (params, {})
    loss_fn = scoring.make_loss_fn(cfg, spec.verbalizers(tokenizer), 0.1, 0.0)
    step, state = training.make_step(loss_fn, trained, mesh, 1000, num_microbatches=1, **optim)
    held.update(rank=rank, step=step, state=state, frozen=frozen)

  def run(case):
    if held.get('rank') != case['rank']:
      start(case['rank'])
    batch = mesh_lib.to_global(case['batch'], mesh)
    held['state'], metrics = held['step'](held['state'], batch, held['frozen'])
    return float(jax.device_get(metrics['train/loss'])[0])

  return run


def make_trl(args):
  import datasets
  import peft
  import torch
  import transformers
  import trl

  torch.set_num_threads(pairs.num_threads())
  tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
  tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
  held = {}

  def start(rank):
    held.clear()
    # Weights in float32 and, for bfloat16, products under autocast: TRL's own mixed precision.
    # Its default of recomputing every layer is switched off, since memory suffices.
    config = trl.RewardConfig(
      output_dir='/tmp/trl',
      use_cpu=True,
      bf16=args.dtype == 'bfloat16',
      gradient_checkpointing=False,
      report_to='none',
      max_length=None,
      learning_rate=1e-5,
    )
    adapters = peft.LoraConfig(
      r=RANK,
      lora_alpha=2 * RANK,
      lora_dropout=0.0,
      target_modules='all-linear',
      task_type='SEQ_CLS',
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
      args.model, num_labels=1, dtype=torch.float32
    )
    trainer = trl.RewardTrainer(
      model,
      args=config,
      processing_class=tokenizer,
      train_dataset=datasets.Dataset.from_dict({'chosen_ids': [[1, 2]], 'rejected_ids': [[1, 3]]}),
      peft_config=adapters if rank else None,
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    held.update(rank=rank, trainer=trainer)

  def run(case):
    if held.get('rank') != case['rank']:
      start(case['rank'])
    trainer = held['trainer']
    examples = [{'chosen_ids': a.tolist(), 'rejected_ids': b.tolist()} for a, b in case['pairs']]
    loss = trainer.training_step(trainer.model, trainer.data_collator(examples))
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return float(loss)

  return run


def read(path, tokenizer):
  """Returns pairs of responses to one prompt, from the file or of random words."""
  if path:
    return list(pipeline.read_source('hh_rlhf', path))[:NUM]
  rng = np.random.default_rng(0)
  words = [tokenizer.decode([int(i)]) for i in range(1000, 4000)]
  words = [w for w in words if w.isascii() and w.strip().isalpha()]

  def text(num):
    return ''.join(rng.choice(words, int(num))).strip()

  def pair(i):
    # About the lengths of HH: three messages before the response.
    history, *said = np.clip(rng.lognormal((3.2, 3.6, 3.6), 0.8), 4, 200)
    talk = [schema.Message(role, text(history)) for role in ('user', 'agent', 'user')]
    sides = (
      schema.Example(
        f'{i}{side}', public.rules('harmlessness'), (*talk, schema.Message('agent', t))
      )
      for side, t in zip('ab', map(text, said), strict=True)
    )
    return schema.Pair(str(i), *sides, 'preference')

  return [pair(i) for i in range(NUM)]


def make_cases(args):
  """Returns {name: case}, and {name: what there is to do in it}."""
  spec, tokenizer = reward_model.describe(args.model, words=('Yes', 'No'))
  found = read(args.hh, tokenizer)
  orders = {
    order: dataclasses.replace(spec.layout, order=order)
    for order in ('rules_first', 'conversation_first')
  }

  def stricter(pair):
    example = pair.other
    rule = example.safety.categories[len(example.safety.categories) // 2]
    strict = schema.Category(rule.name, f'{rule.guideline} Merely mentioning it counts too.')
    return augment.strictness_pair(example, rule.name, strict, rule)

  def variants(pair):
    rng = np.random.default_rng(0)
    example = dataclasses.replace(pair.other, label='safe')
    return [augment.cca(example, rng, 0.5, 0, 0, shuffle=True) for _ in range(8)]

  kinds = {
    'hh': ('rules_first', found),
    'strictness': ('conversation_first', [stricter(pair) for pair in found]),
    'variants': ('conversation_first', [variants(pair) for pair in found]),
  }
  cases, work = {}, {}
  for (kind, (order, items)), rank in itertools.product(kinds.items(), (0, RANK)):
    length = LENGTHS[kind]
    encoder = features.Encoder(tokenizer, 512, orders[order], length, share_prefix=True)
    make = features.encode_group if kind == 'variants' else features.encode
    atoms = [atom for item in items if isinstance(atom := make(item, encoder), features.Atom)]
    shape = features.BatchShape(ROWS, length, SLOTS, tokenizer.pad_id, share_prefix=True)
    batch, left = features.pack_rows(atoms, shape)
    taken = [atom for i, atom in enumerate(atoms) if i not in set(left)]
    prompts = [[prompt.tokens for prompt in atom.prompts] for atom in taken]
    sides = [two for some in prompts for two in zip(some[::2], some[1::2], strict=True)]
    name = kind + (f' lora {rank}' if rank else '')
    cases[name] = {'rank': rank, 'batch': batch, 'pairs': sides}
    work[name] = {
      'pairs': len(sides),
      'judged': 2 * len(sides),
      'tokens_judged': sum(len(p) for two in sides for p in two),
      'tokens_read': int((batch['segment_ids'] > 0).sum()),
      'places': batch['tokens'].size,
      'peer_places': 2 * len(sides) * max(len(p) for two in sides for p in two),
    }
    print(name, work[name])
  return cases, work


if __name__ == '__main__':
  parser = pairs.parser(__doc__)
  parser.add_argument('--hh', default='', help='a JSONL file of Anthropic HH')
  parser.add_argument('--remat', default='dots')
  parser.add_argument('--unroll', type=int, default=1)
  args = parser.parse_args()
  cases, work = make_cases(args)
  args.hh = pathlib.Path(args.hh).name  # results say nothing of where things lie
  pairs.compare('rm_training', [make_ours, make_trl], cases, args, work)
