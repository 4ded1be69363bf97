"""Speed on an accelerator, of every part, beside PyTorch and transformers on the same shapes.

python tests/benchmarks/accelerator_benchmark.py [--seconds=100] [--cases=train] [--model=DIR]

The model is SmolLM2-135M's shape with random weights, in bfloat16 with float32 masters. It needs no
network. The cases: what the chip can do (a matrix product, a copy); attention by each of its ways,
with its error against float32; training steps of the reward model; scoring of prompts that begin
alike; rollouts; one RL step, which needs --model, a folder with a tokenizer (weights may be
missing there: random ones are written). A case that fails prints its error and the next one runs;
none begins after --seconds. Each side runs in a process of its own. Numbers go to --out as JSON,
after each case. --smoke runs everything on a CPU, on a model of two layers.

A share of the peak counts 6 FLOPs per parameter and token outside the embedding (4 with adapters,
2 in scoring) and causal attention's, over the rate of the matrix product above.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time
import types

import numpy as np

VOCAB, LAYERS, EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP = 49_152, 30, 576, 9, 3, 64, 1536
RANK = 16
CASES = ('ceilings', 'attention', 'train', 'scoring', 'rollouts', 'rl')
ROOT = pathlib.Path(__file__).parents[2]
# (name, rank of adapters, tokens in a row, rows, attention, remat), the most wanted first.
TRAIN = (
  ('full', 0, 1024, 16, 'auto', 'dots'),
  ('full', 0, 1024, 64, 'auto', 'dots'),
  ('lora', RANK, 1024, 64, 'auto', 'dots'),
  ('full', 0, 1024, 16, 'xla', 'dots'),
  ('full', 0, 1024, 16, 'auto', 'none'),
  ('full', 0, 2048, 16, 'auto', 'dots'),
  ('lora', RANK, 1024, 64, 'auto', 'none'),
  ('lora', RANK, 2048, 16, 'auto', 'dots'),
)
# On an H200 a train step compiled for 90 s as XLA tries every way of each product, and for 3 s so.
XLA_FLAGS = '--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false'
PROMPT = 320  # tokens of a prompt in training; the two sides of a pair share half of them


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cases', default=','.join(CASES))
  parser.add_argument('--sides', default='ours,torch')
  parser.add_argument('--seconds', type=float, default=100, help='for all cases of all sides')
  parser.add_argument('--model', default='', help='a Hugging Face folder, for the case rl')
  parser.add_argument('--out', default='', help='a JSON file')
  parser.add_argument('--smoke', action='store_true', help='tiny sizes, on any machine')
  parser.add_argument('--side', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if unknown := set(args.cases.split(',')) - set(CASES):
    parser.error(f'--cases: {sorted(unknown)[0]!r} is none of {",".join(CASES)}')
  if args.side:
    _run_side(args)
    sys.stdout.flush()
    os._exit(0)  # without compilations that are left
  found, sides, end = [], args.sides.split(','), time.monotonic() + args.seconds
  for i, side in enumerate(sides):
    # Our side compiles, and has more cases: it may take two thirds of what is left.
    left = max(end - time.monotonic(), 1.0)
    share = left if i + 1 == len(sides) else left * 2 / 3
    argv = [sys.executable, __file__, f'--side={side}', f'--seconds={share}']
    argv += [f'--cases={args.cases}', f'--model={args.model}', *['--smoke'] * args.smoke]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    env = {'XLA_FLAGS': XLA_FLAGS, **os.environ, 'PYTHONPATH': path, 'PYTHONUNBUFFERED': '1'}
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env)
    # A case that hangs must not keep the machine.
    watch = threading.Timer(share + 60, child.kill)
    watch.start()
    for line in child.stdout:
      if not line.startswith('{'):
        print(line, end='', flush=True)
        continue
      found.append({'side': side, **json.loads(line)})
      _print(found[-1])
      if args.out:
        about = {'commit': _commit(), 'date': time.strftime('%Y-%m-%d'), 'argv': sys.argv[1:]}
        pathlib.Path(args.out).write_text(json.dumps({**about, 'results': found}, indent=1) + '\n')
    watch.cancel()
    if child.wait():
      print(f'{side}: ended with status {child.returncode}', flush=True)


def _print(result):
  texts = [
    f'{name} {value:,.3g}'
    if isinstance(value, float) and abs(value) < 1e3
    else f'{name} {value:,.0f}'
    for name, value in result.items()
    if isinstance(value, (int, float))
  ]
  texts += [str(result[name]) for name in ('error', 'device') if name in result]
  print(f'{result["side"]:5} {result["case"]:34} ' + ', '.join(texts), flush=True)


def _commit():
  # A copy of the tree without its history may be told what it is.
  if commit := os.environ.get('CSRM_COMMIT'):
    return commit
  try:
    run = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
  except OSError:
    return ''
  return run.stdout.strip()


class _Run:
  """What a side's cases share: their end, the sizes, and how a result is said."""

  def __init__(self, args):
    self.smoke, self.model = args.smoke, args.model
    self.end = time.monotonic() + args.seconds
    self.peak = 0.0  # FLOP/s of a matrix product

  def size(self, full, smoke):
    return smoke if self.smoke else full

  def do(self, case, fn):
    """Runs a case that returns its numbers; says them or its error."""
    if time.monotonic() > self.end:
      print(f'{case}: left out, the time is over', flush=True)
      return
    start = time.perf_counter()
    try:
      numbers = fn()
    except Exception as error:  # the next case may work
      lines = str(error).strip().splitlines() or ['']
      numbers = {'error': f'{type(error).__name__}: {lines[0][:300]}'}
    took = {'took_s': time.perf_counter() - start}
    print(json.dumps({'case': case, **numbers, **took}), flush=True)

  def share(self, flops_per_s):
    return {'peak_share': flops_per_s / self.peak} if self.peak else {}


def _seconds(run, least=1.0, most=50, fewest=3):
  """Returns the median seconds of a call that returns when its work is done."""
  times, start = [], time.perf_counter()
  while len(times) < fewest or (time.perf_counter() - start < least and len(times) < most):
    begin = time.perf_counter()
    run()
    times.append(time.perf_counter() - begin)
  return statistics.median(times)


def _num_params(layers):
  """Returns the parameters of the products, without the embedding."""
  heads = 2 * EMBED * HEADS * HEAD_DIM + 2 * EMBED * KV_HEADS * HEAD_DIM
  return layers * (heads + 3 * EMBED * MLP)


def _flops(layers, tokens, length, passes):
  """Returns the FLOPs of `passes` times a forward pass over rows of one length."""
  attention = 2 * length * HEADS * HEAD_DIM * layers  # causal: half of all pairs
  return passes * tokens * (2 * _num_params(layers) + attention)


def _prompts(rng, num, shared, low, high):
  """Returns prompts of random tokens that begin alike."""
  first = rng.integers(3, VOCAB, shared)
  lengths = np.clip(rng.lognormal(np.log((low + high) / 3), 0.6, num), low, high).astype(int)
  return [np.concatenate([first, rng.integers(3, VOCAB, n)]).astype(np.int32) for n in lengths]


def _scoring_cases(run):
  """Returns {name: (prompts, how many first tokens all share)}."""
  rng, num = np.random.default_rng(0), run.size(1, 32)
  return {
    '200 responses, one rule set': (_prompts(rng, 200 // num, 320, 30, 500), 320),
    '32 rule sets, one conversation': (_prompts(rng, run.size(32, 4), 300, 100, 700), 300),
    '2000 prompts': (_prompts(rng, 2000 // num, 1, 60, 700), 0),
  }


def _rollout_cases(run):
  rng, rows = np.random.default_rng(0), run.size(256, 8)
  some = [rng.integers(3, VOCAB, n).tolist() for n in rng.integers(32, 49, rows)]
  return {
    f'{rows} prompts': some,
    f'{rows // 8} prompts x 8': [p for p in some[::8] for _ in range(8)],
  }


def _run_side(args):
  run = _Run(args)
  wanted = args.cases.split(',')
  cases = _OURS if args.side == 'ours' else _TORCH
  if args.smoke:
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  run.do('start', lambda: _start(run, args.side))
  for name, case in cases.items():
    if name in wanted:
      try:
        case(run)
      except Exception as error:
        print(f'{args.side} {name}: {type(error).__name__}: {str(error)[:300]}', flush=True)


def _start(run, side):
  names = (
    ('jax', 'jaxlib', 'flax', 'numpy') if side == 'ours' else ('torch', 'transformers', 'peft')
  )
  versions = {}
  for name in names:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = 'none'
  if side == 'ours':
    import jax

    device = jax.devices()[0].device_kind
  else:
    import torch

    run.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    device = torch.cuda.get_device_name() if run.device == 'cuda' else 'cpu'
  return {'device': f'{device}, {versions}', 'versions': versions}


# --- csrm_jax --------------------------------------------------------------------------


def _our_cfg(run, **fields):
  from csrm_jax.models import config as model_config

  fields = {'dtype': 'bfloat16', 'num_layers': run.size(LAYERS, 2)} | fields
  return model_config.preset('smollm2_135m', VOCAB, **fields)


def _our_ceilings(run):
  import jax
  import jax.numpy as jnp

  size = run.size(8192, 512)

  def product():
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(a, b).block_until_ready()

    def ten():
      for _ in range(10):
        c = multiply(a, b)
      c.block_until_ready()

    run.peak = 2 * size**3 / (_seconds(ten, 0.3) / 10)
    return {'tflop_per_s': run.peak / 1e12}

  def copy():
    x = jax.random.normal(jax.random.key(0), (run.size(2**29, 2**20),), jnp.float32)
    negate = jax.jit(lambda x: -x)
    negate(x).block_until_ready()
    return {'tb_per_s': 2 * x.nbytes / _seconds(lambda: negate(x).block_until_ready(), 0.3) / 1e12}

  run.do(f'product {size}, bfloat16', product)
  run.do('copy', copy)


def _our_attention(run):
  """One layer's attention with its gradient, packed rows of pairs; errors against float32."""
  import jax
  import jax.numpy as jnp

  from csrm_jax.models import attention

  B, T = run.size((16, 1024), (2, 128))
  batch, _ = _our_batch(B, T)
  ids, ends = (jnp.asarray(batch[name]) for name in ('segment_ids', 'ends'))
  mask = attention.make_shared_mask(ends, jnp.asarray(batch['positions']))
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = [(B, T, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
  q, k, v, g = (jax.random.normal(key, s, jnp.float32) for key, s in zip(keys, shapes, strict=True))
  q *= HEAD_DIM**-0.5
  g *= (ids > 0)[..., None, None]

  def causal(q, k, v, ids, mask):
    """cuDNN told that the mask is causal, so that it may skip half of the blocks."""
    out = jax.nn.dot_product_attention(
      q, k, v, scale=1.0, implementation='cudnn', mask=mask[:, None], is_causal=True
    )
    return jnp.where((ids > 0)[..., None, None], out, 0)

  def plain(q, k, v, ids, mask):
    """One causal prompt a row, no mask: the wrong answer, and what a mask costs."""
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation='cudnn', is_causal=True)

  def xla(q, k, v, ids, mask):
    return attention.attend(q, k, v, mask)

  def run_of(fn):
    def both(q, k, v):
      out, back = jax.vjp(lambda *x: fn(*x, ids, mask), q, k, v)
      return out, *back(g.astype(q.dtype))

    return jax.jit(both)

  want = run_of(xla)(*(x[:2].astype(jnp.float32) for x in (q, k, v))) if B == 2 else None
  low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  if want is None:
    with jax.default_matmul_precision('highest'):
      want = run_of(xla)(*(x.astype(jnp.float32) for x in low))
  kernel = attention.make_cudnn()
  ways = {'kernel': kernel, 'xla': xla, 'kernel told causal': causal, 'kernel without mask': plain}

  def measure(fn):
    both = run_of(fn)
    found = jax.block_until_ready(both(*low))
    seconds = _seconds(lambda: jax.block_until_ready(both(*low)), 0.3)
    errors = [
      float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
      for a, b in zip(found, want, strict=True)
    ]
    flops = 3 * 2 * B * T * T * HEADS * HEAD_DIM  # causal, forward and backward
    return {
      'ms': 1e3 * seconds,
      'tflop_per_s': flops / seconds / 1e12,
      'error': None,
      'out_error': errors[0],
      'gradient_error': max(errors[1:]),
    }

  for name, fn in ways.items():
    if name != 'xla' and run.smoke:
      continue  # CPUs have no cuDNN
    run.do(f'attention {B}x{T}, {name}', lambda fn=fn: _without_none(measure(fn)))


def _without_none(numbers):
  return {name: value for name, value in numbers.items() if value is not None}


def _our_batch(rows, length):
  """Returns (a packed batch of pairs whose sides begin alike, how many tokens it judges)."""
  from csrm_jax.data import features

  rng = np.random.default_rng(0)
  shape = features.BatchShape(rows, length, 32, 0, share_prefix=True)
  size = min(PROMPT, length // 2)

  def atom(i):
    head = rng.integers(3, VOCAB, size // 2)
    sides = [
      np.concatenate([head, rng.integers(3, VOCAB, size // 2 - int(cut))]).astype(np.int32)
      for cut in rng.integers(0, size // 4, 2)
    ]
    prompts = [features.Prompt(side, label, str(i)) for label, side in enumerate(sides)]
    return features.Atom(tuple(prompts), 'pair')

  # A few rows are packed, and repeated: packing is not what is timed.
  few = min(rows, 4)
  shape = dataclasses.replace(shape, batch_size=few)
  atoms = [atom(i) for i in range(2 * few * length // size)]
  batch, left = features.pack_rows(atoms, shape)
  judged = sum(a.length for a in atoms) - sum(atoms[i].length for i in left)
  batch = {name: np.concatenate([x] * -(-rows // few))[:rows] for name, x in batch.items()}
  return batch, judged * rows // few


def _our_train(run):
  import jax

  from csrm_jax.core import mesh as mesh_lib
  from csrm_jax.models import lora, transformer
  from csrm_jax.reward import scoring
  from csrm_jax.safety.templates import Verbalizers
  from csrm_jax.train import step as training

  optim = {'lr': 1e-5, 'warmup_steps': 0, 'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.0}
  optim |= {'clip_norm': 1.0, 'end_lr_fraction': 0.1}
  mesh, verbalizers = mesh_lib.make_mesh(devices=jax.devices()[:1]), Verbalizers((5,), (7,))
  params = transformer.init_params(_our_cfg(run), 0)
  todo = TRAIN if not run.smoke else [(n, r, 128, 2, *rest) for n, r, _, _, *rest in TRAIN[2:5]]

  def prepare(rank, length, rows, attention, remat):
    cfg = _our_cfg(run, lora_rank=rank, attention=attention, remat=remat)
    trained = lora.init(cfg, 0) if rank else params
    loss_fn = scoring.make_loss_fn(cfg, verbalizers, 0.1, 0.0)
    with jax.set_mesh(mesh):
      step, state = training.make_step(
        loss_fn,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained),
        mesh,
        1000,
        num_microbatches=1,
        **optim,
      )
      base = mesh_lib.abstract(params, mesh) if rank else {}
      batch, judged = _our_batch(rows, length)
      start = time.perf_counter()
      shapes = mesh_lib.abstract_batch(batch, mesh)
      compiled = step.lower(state, shapes, base).compile()
    return compiled, state, batch, judged, time.perf_counter() - start

  def measure(made, rank, length, rows):
    compiled, shapes, batch, judged, compile_s = made.result()
    with jax.set_mesh(mesh):
      batch = mesh_lib.to_global(batch, mesh)

      def put(tree):
        # A copy: the step donates its state.
        return jax.device_put(
          jax.tree.map(lambda x: x.copy(), tree), mesh_lib.shardings(tree, mesh)
        )

      zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
      start = lora.init(_our_cfg(run, lora_rank=rank), 0) if rank else params
      held, base = [dataclasses.replace(zeros, params=put(start))], put(params) if rank else {}

      def steps():
        for _ in range(2):
          held[0], metrics = compiled(held[0], batch, base)
        return float(metrics['train/loss'][0])

      loss = steps()
      seconds = _seconds(steps, run.size(1.0, 0.1)) / 2
    layers, tokens = run.size(LAYERS, 2), rows * length
    memory = compiled.memory_analysis()
    flops = _flops(layers, tokens, length, 2 if rank else 3)
    return {
      'ms': 1e3 * seconds,
      'tokens_per_s': tokens / seconds,
      'judged_tokens_per_s': judged / seconds,
      **run.share(flops / seconds),
      'temporary_gib': memory.temp_size_in_bytes / 2**30,
      'compile_s': compile_s,
      'loss': loss,
    }

  # Each compiler takes a core. What is not ready after half of the time is left out.
  pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))
  made = [pool.submit(prepare, *rest) for _, *rest in todo]
  concurrent.futures.wait(made, timeout=max(run.end - time.monotonic(), 1) / 2)
  pool.shutdown(wait=False, cancel_futures=True)
  for job, (name, rank, length, rows, attention, remat) in zip(made, todo, strict=True):
    case = f'train {name} {rows}x{length} {attention} {remat}'
    if job.done() and not job.cancelled():
      run.do(case, lambda job=job, r=rank, n=length, b=rows: measure(job, r, n, b))
    else:
      print(f'{case}: left out, its compilation was not ready', flush=True)


def _our_scoring(run):
  from csrm_jax.models import transformer
  from csrm_jax.reward import plans, scoring
  from csrm_jax.safety.templates import Verbalizers

  cfg = _our_cfg(run, param_dtype='bfloat16')
  params = transformer.init_params(cfg, 0)
  seen = set()
  whole = plans.Part.calls

  def calls(part):
    for rows, shape in whole(part):
      seen.add(shape)
      yield rows, shape

  plans.Part.calls = calls

  def measure(prompts):
    seen.clear()
    score = scoring.make_prompt_scorer(cfg, params, Verbalizers((5,), (7,)))
    pools = [prompts[i : i + scoring.POOL] for i in range(0, len(prompts), scoring.POOL)]
    start = time.perf_counter()
    found = score(pools)
    first = time.perf_counter() - start
    seconds = _seconds(lambda: score(pools), run.size(1.0, 0.0), 5, run.size(3, 1))
    tokens = sum(map(len, prompts))
    return {
      'prompts_per_s': len(prompts) / seconds,
      'judged_tokens_per_s': tokens / seconds,
      **run.share(2 * _num_params(cfg.num_layers) * tokens / seconds),
      'first_s': first,
      'shapes': len(seen),
      'finite': bool(np.isfinite(found).all()),
    }

  for name, (prompts, _) in _scoring_cases(run).items():
    run.do(f'scoring {name}', lambda prompts=prompts: measure(prompts))
  plans.Part.calls = whole


def _our_rollouts(run):
  from csrm_jax.models import sampling, transformer

  cfg = _our_cfg(run, param_dtype='bfloat16')
  params = transformer.init_params(cfg, 0)
  settings = sampling.Sampling(run.size(128, 8))

  def measure(prompts):
    def draw(seed=0):
      return sampling.generate(cfg, params, prompts, settings, seed=seed, batch_size=len(prompts))

    start = time.perf_counter()
    draw(1)
    first = time.perf_counter() - start
    tokens = len(prompts) * settings.max_completion_length
    return {'tokens_per_s': tokens / _seconds(draw, 1.0, 5), 'first_s': first}

  for name, prompts in _rollout_cases(run).items():
    run.do(f'rollouts {name}', lambda prompts=prompts: measure(prompts))


def _our_rl(run):
  if not run.model:
    print('rl: give --model=DIR, a folder with a tokenizer', flush=True)
    return
  import rl_step_benchmark

  from csrm_jax.models import hf, hf_config, transformer

  folder = pathlib.Path(run.model)
  if not list(folder.glob('*.safetensors')):
    cfg = hf_config.from_hf(json.loads((folder / 'config.json').read_text()), run.model)
    hf.save(folder, cfg, transformer.init_params(cfg, 0))
  rl_step_benchmark.NUM_PROMPTS, rl_step_benchmark.NUM_SAMPLES = run.size((8, 16), (2, 2))
  rl_step_benchmark.NUM_TOKENS = run.size(64, 8)

  def measure():
    args = types.SimpleNamespace(model=run.model, dtype='bfloat16', kl=0.02)
    step = rl_step_benchmark.make_ours(args)
    start = time.perf_counter()
    step(None)
    first, parts = time.perf_counter() - start, []
    seconds = _seconds(lambda: parts.append(step(None)), 1.0, 5)
    return {'ms': 1e3 * seconds, 'first_s': first} | {k: float(v) for k, v in parts[-1].items()}

  rows = rl_step_benchmark.NUM_PROMPTS * rl_step_benchmark.NUM_SAMPLES
  run.do(f'rl step {rows}x{rl_step_benchmark.NUM_TOKENS}', measure)


# --- PyTorch and transformers ----------------------------------------------------------


def _torch_model(run, dtype):
  import torch
  import transformers

  config = transformers.LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=EMBED,
    intermediate_size=MLP,
    num_hidden_layers=run.size(LAYERS, 2),
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    attn_implementation='sdpa',
  )
  torch.manual_seed(0)
  return transformers.LlamaForCausalLM(config).to(run.device, dtype)


def _torch_sync(run):
  import torch

  if run.device == 'cuda':
    torch.cuda.synchronize()


def _torch_train(run):
  """One causal prompt a row, no padding and no mask: what suits it best."""
  import torch

  def measure(rank, length, rows):
    model = _torch_model(run, torch.float32)
    if rank:
      import peft

      adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules='all-linear')
      model = peft.get_peft_model(model, adapters)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=run.device == 'cuda')
    tokens = torch.randint(3, VOCAB, (rows, length), device=run.device)
    labels = torch.randint(0, 2, (rows,), device=run.device)
    base = model.get_base_model() if rank else model
    if run.device == 'cuda':
      torch.cuda.reset_peak_memory_stats()

    def step():
      with torch.autocast(run.device, torch.bfloat16):
        last = base.model(tokens, use_cache=False).last_hidden_state[:, -1]
        logits = base.lm_head(last).float()
      loss = torch.nn.functional.cross_entropy(logits[:, [5, 7]], labels)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(trained, 1.0)
      optimizer.step()
      optimizer.zero_grad()
      _torch_sync(run)

    step()
    seconds = _seconds(step, run.size(1.0, 0.1))
    layers, places = run.size(LAYERS, 2), rows * length
    flops = _flops(layers, places, length, 2 if rank else 3)
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.device == 'cuda' else 0
    return {
      'ms': 1e3 * seconds,
      'tokens_per_s': places / seconds,
      'tflop_per_s': flops / seconds / 1e12,
      'peak_gib': peak,
    }

  sizes = run.size(((0, 1024, 16), (0, 1024, 64), (RANK, 1024, 64), (0, 2048, 16)), ((0, 128, 2),))
  for rank, length, rows in sizes:
    name = f'train {"lora" if rank else "full"} {rows}x{length}'
    run.do(name, lambda r=rank, n=length, b=rows: measure(r, n, b))


def _torch_scoring(run):
  import torch
  import transformers

  model = _torch_model(run, torch.bfloat16).eval()
  rows = run.size(64, 4)

  def read(prompts, cache, before):
    longest, kwargs = max(map(len, prompts)), {}
    tokens = torch.zeros((len(prompts), longest - before), dtype=torch.int64)
    mask = torch.zeros((len(prompts), longest), dtype=torch.int64)
    mask[:, :before] = 1
    for i, prompt in enumerate(prompts):
      tokens[i, : len(prompt) - before] = torch.from_numpy(prompt[before:].astype(np.int64))
      mask[i, before : len(prompt)] = 1
    if cache is not None:
      layers = [
        (k.expand(len(prompts), -1, -1, -1), v.expand(len(prompts), -1, -1, -1)) for k, v in cache
      ]
      kwargs['past_key_values'] = transformers.DynamicCache(layers)
    out = model.model(
      tokens.to(run.device), attention_mask=mask.to(run.device), use_cache=bool(kwargs), **kwargs
    )
    at = torch.tensor([len(p) - before - 1 for p in prompts], device=run.device)
    last = out.last_hidden_state[torch.arange(len(prompts), device=run.device), at]
    logits = model.lm_head(last).float()
    return logits[:, 5] - logits[:, 7]

  def measure(prompts, shared):
    prompts = sorted(prompts, key=len)
    tokens = sum(map(len, prompts))

    def score():
      with torch.inference_mode():
        cache, found = None, []
        if shared:
          first = torch.from_numpy(prompts[0][:shared].astype(np.int64))[None].to(run.device)
          out = model.model(first, use_cache=True)
          cache = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        for start in range(0, len(prompts), rows):
          found.append(read(prompts[start : start + rows], cache, shared))
        return torch.cat(found).cpu()

    score()
    seconds = _seconds(score, run.size(1.0, 0.0), 5, run.size(3, 1))
    return {'prompts_per_s': len(prompts) / seconds, 'judged_tokens_per_s': tokens / seconds}

  for name, (prompts, shared) in _scoring_cases(run).items():
    run.do(f'scoring {name}', lambda p=prompts, s=shared: measure(p, s))


def _torch_rollouts(run):
  import torch

  model = _torch_model(run, torch.bfloat16).eval()
  model.generation_config.eos_token_id = None  # nothing ends one early
  num = run.size(128, 8)

  def measure(prompts):
    length = max(map(len, prompts))
    tokens = torch.zeros((len(prompts), length), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
      tokens[i, length - len(prompt) :] = torch.tensor(prompt)
      mask[i, length - len(prompt) :] = 1
    tokens, mask = tokens.to(run.device), mask.to(run.device)

    def draw():
      with torch.inference_mode():
        choice = {'do_sample': True, 'top_k': 0, 'temperature': 1.0, 'top_p': 1.0}
        model.generate(tokens, attention_mask=mask, max_new_tokens=num, pad_token_id=0, **choice)
      _torch_sync(run)

    draw()
    return {'tokens_per_s': len(prompts) * num / _seconds(draw, 0.0, 3)}

  for name, prompts in _rollout_cases(run).items():
    run.do(f'rollouts {name}', lambda prompts=prompts: measure(prompts))


_OURS = {
  'ceilings': _our_ceilings,
  'attention': _our_attention,
  'train': _our_train,
  'scoring': _our_scoring,
  'rollouts': _our_rollouts,
  'rl': _our_rl,
}
_TORCH = {'train': _torch_train, 'scoring': _torch_scoring, 'rollouts': _torch_rollouts}

if __name__ == '__main__':
  main()
