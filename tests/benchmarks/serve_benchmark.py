"""The server under load, against transformers behind FastAPI that batches up to 16.

python tests/benchmarks/serve_benchmark.py --checkpoint=FOLDER --num_requests=200 \\
  --peer_python=/path/to/python   # which has torch, transformers, fastapi and uvicorn

16 clients keep their connections and send one conversation at a time, each under one of 5 policies
of 8 rules, over the loopback address. Both servers run alone, one after the other; the peer gets
prompts that are already rendered. Printed are requests per second, latencies, errors and memory.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
_WORDS = (
  'the a one some garden river letter morning market kitchen story bread music window train '
  'friend road paper colour winter question answer reads writes walks brings keeps finds asks '
  'tells slowly today often never under behind with about and but so'
)
WORDS = _WORDS.split()


def text(rng, num_words):
  return ' '.join(rng.choices(WORDS, k=num_words)).capitalize() + '.'


def make_policies(rng, num=5, num_rules=8):
  return {
    f'policy{i}': {
      'categories': [
        {'name': f'{text(rng, 2)[:-1]} {i}.{j}', 'guideline': text(rng, 25)}
        for j in range(num_rules)
      ]
    }
    for i in range(num)
  }


def make_requests(rng, policies, num):
  return [
    (
      rng.choice(list(policies)),
      [{'role': 'user', 'content': text(rng, 12)}, {'role': 'agent', 'content': text(rng, 24)}],
    )
    for _ in range(num)
  ]


# --- The peer: transformers, one padded batch at a time ---------------------------------


def serve_peer(port, folder, safe, unsafe):
  import asyncio

  import fastapi
  import torch
  import transformers
  import uvicorn

  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side='left')
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  app, queue = fastapi.FastAPI(), asyncio.Queue()

  def compute(prompts):
    batch = tokenizer(prompts, return_tensors='pt', padding=True, add_special_tokens=False)
    with torch.inference_mode():
      logits = model(**batch, logits_to_keep=1).logits[:, -1].float()
    logps = logits.log_softmax(-1)
    scores = logps[:, safe].logsumexp(-1) - logps[:, unsafe].logsumexp(-1)
    return scores.tolist()

  async def work():
    loop = asyncio.get_running_loop()
    while True:
      items = [await queue.get()]
      await asyncio.sleep(0.002)
      while len(items) < 16 and not queue.empty():
        items.append(queue.get_nowait())
      scores = await loop.run_in_executor(None, compute, [prompt for prompt, _ in items])
      for (_, future), score in zip(items, scores, strict=True):
        future.set_result(score)

  @app.on_event('startup')
  async def start():
    app.state.work = asyncio.create_task(work())

  @app.get('/ready')
  async def ready():
    return {}

  @app.post('/score')
  async def score(body: dict):
    future = asyncio.get_running_loop().create_future()
    await queue.put((body['prompt'], future))
    return {'verdicts': [{'score': await future}]}

  uvicorn.run(app, port=port, log_level='error', access_log=False)


# --- The load ---------------------------------------------------------------------------


def free_port():
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return server.getsockname()[1]


def memory_mb(pid):
  for line in pathlib.Path(f'/proc/{pid}/status').read_text().splitlines():
    if line.startswith('VmRSS'):
      return int(line.split()[1]) / 1024
  return float('nan')


def wait_until_ready(process, port, timeout_s=900):
  start = time.monotonic()
  while time.monotonic() - start < timeout_s:
    if process.poll() is not None:
      raise SystemExit('the server ended')
    link = http.client.HTTPConnection('127.0.0.1', port, timeout=10)
    try:
      link.request('GET', '/ready')
      if link.getresponse().status == 200:
        return time.monotonic() - start
    except OSError:
      pass
    finally:
      link.close()
    time.sleep(0.2)
  raise SystemExit('the server is not ready')


def load(port, bodies, num_clients):
  """Returns ([(status, seconds, score)] by request, seconds in all)."""
  found, local = [None] * len(bodies), threading.local()

  def ask(i):
    if not hasattr(local, 'link'):
      local.link = http.client.HTTPConnection('127.0.0.1', port, timeout=300)
    start = time.monotonic()
    local.link.request('POST', '/score', bodies[i], {'Content-Type': 'application/json'})
    response = local.link.getresponse()
    value = json.loads(response.read())
    score = value['verdicts'][0]['score'] if response.status == 200 else None
    found[i] = response.status, time.monotonic() - start, score

  start = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
    list(pool.map(ask, range(len(bodies))))
  return found, time.monotonic() - start


def report(name, found, seconds, before, after):
  times = sorted(t for status, t, _ in found if status == 200)
  counts = {s: sum(status == s for status, _, _ in found) for s in {f[0] for f in found}}
  p50, p99 = times[len(times) // 2], times[min(len(times) - 1, int(len(times) * 0.99))]
  rate = len(times) / seconds
  print(
    f'{name}: {rate:.2f} requests/s, p50 {p50:.3f} s, p99 {p99:.3f} s, status {counts}, '
    f'memory {before:.0f} to {after:.0f} MB',
    flush=True,
  )
  return rate


def run(name, command, bodies, warm, num_clients, env):
  process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
  try:
    port = int(env['PORT'])
    print(f'{name}: ready after {wait_until_ready(process, port):.1f} s', flush=True)
    load(port, warm, num_clients)
    before = memory_mb(process.pid)
    found, seconds = load(port, bodies, num_clients)
    return report(name, found, seconds, before, memory_mb(process.pid)), found
  finally:
    process.terminate()
    process.wait(60)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--checkpoint', default='')
  parser.add_argument('--num_requests', type=int, default=200)
  parser.add_argument('--num_peer_requests', type=int, default=0, help='as many by default')
  parser.add_argument('--num_clients', type=int, default=16)
  parser.add_argument('--peer_python', default='', help='without it, only our server runs')
  parser.add_argument('--serve_peer', default='', help='used by this script')
  parser.add_argument('config', nargs='*', help='more flags of our server, --config.KEY=VALUE')
  args, more = parser.parse_known_args()
  if args.serve_peer:
    serve_peer(**json.loads(args.serve_peer))
    return
  rng = random.Random(0)
  policies = make_policies(rng)
  asks = make_requests(rng, policies, args.num_requests)
  warm = make_requests(rng, policies, 2 * args.num_clients)
  with tempfile.TemporaryDirectory() as folder:
    for name, rules in policies.items():
      (pathlib.Path(folder) / f'{name}.json').write_text(json.dumps(rules))
    env = os.environ | {'PORT': str(free_port())}
    command = [sys.executable, '-m', 'csrm_jax.main']
    arg = f'checkpoint={args.checkpoint},policies={folder},port={env["PORT"]}'
    command += [f'--config=configs/serve.py:{arg}', '--config.deadline_s=300', *more]
    ours, found = run(
      'csrm_jax',
      command,
      *(
        [json.dumps({'policy': name, 'messages': talk}) for name, talk in part]
        for part in (asks, warm)
      ),
      args.num_clients,
      env,
    )
  if not args.peer_python:
    return
  from csrm_jax.reward import model as reward_model
  from csrm_jax.safety import schema, templates

  spec, tokenizer = reward_model.describe(args.checkpoint)
  verbalizers = spec.verbalizers(tokenizer)

  def prompt(name, talk):
    rules = schema.parse_safety(policies[name], name)
    segments = templates.render(rules, schema.parse_conversation(talk), spec.layout)
    return json.dumps({'prompt': templates.render_text(segments)})

  num = args.num_peer_requests or args.num_requests
  env['PORT'] = str(free_port())
  settings = {'port': int(env['PORT']), 'folder': args.checkpoint}
  settings |= {'safe': list(verbalizers.safe), 'unsafe': list(verbalizers.unsafe)}
  command = [args.peer_python, __file__, f'--serve_peer={json.dumps(settings)}']
  bodies = [prompt(*ask) for ask in asks[:num]]
  peer, theirs = run(
    'transformers', command, bodies, [prompt(*ask) for ask in warm[:4]], args.num_clients, env
  )
  gaps = [abs(a[2] - b[2]) for a, b in zip(found, theirs, strict=False)]
  print(f'{ours / peer:.2f} times as many requests; largest difference of scores {max(gaps):.2g}')


if __name__ == '__main__':
  main()
