"""The server under load: against transformers behind FastAPI, beyond what it can do, in replicas.

python tests/benchmarks/serve_benchmark.py --model=FOLDER [--dtype=bfloat16] \\
  --python=peer=PATH  # of an interpreter that has torch, transformers, fastapi and uvicorn

16 clients keep their connections and send one conversation at a time, each under one of 5 policies
of 8 rules, over the loopback address. FOLDER is a Hugging Face folder of a small instruction-tuned
model, such as SmolLM2-135M-Instruct, or, without a peer, the work directory of a training run.

compare: both servers are up, and are loaded in turns, A B A B. The peer batches what waits, up to
  16; it gets prompts that are rendered already. Without --python there is no peer.
overload: ten times the requests that the server can answer arrive, at a steady rate. At the end it
  is told to stop: what it has read is answered.
replicas: one server on one core, then two on two behind a proxy that deals connections out.

A machine that others use makes requests a second and latencies worse than they are; CPU seconds
for each request hardly change.
"""

import asyncio
import collections
import contextlib
import http.client
import importlib.metadata
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pairs

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


def make_ruleworld(rng, num, num_rules=8):
  """Returns policies and requests in the words that the package's own models know."""
  from csrm_jax.ruleworld import examples

  rows = [examples.test_example(0, i, 'seen') for i in range(300)]
  rules = {rule.name: rule.to_dict() for row in rows for rule in row.safety.categories}
  policies = {
    f'policy{i}': {'categories': rng.sample(list(rules.values()), num_rules)} for i in range(5)
  }
  talks = [[message.to_dict() for message in row.conversation] for row in rows]
  return policies, [(rng.choice(list(policies)), rng.choice(talks)) for _ in range(num)]


# --- The peer: transformers, one padded batch at a time ---------------------------------


def serve_peer(port, folder, dtype, safe, unsafe):
  import fastapi
  import torch
  import transformers
  import uvicorn

  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side='left')
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype)
  ).eval()
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
    return {'torch': torch.__version__, 'transformers': transformers.__version__}

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


class Server:
  """A server's process and what it takes of the machine."""

  def __init__(self, name, command, port):
    self.name, self.port = name, port
    self.said = tempfile.TemporaryFile()  # noqa: SIM115
    self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.said, stderr=self.said)

  def wait_until_ready(self):
    start = time.monotonic()
    while self.process.poll() is None:
      with contextlib.suppress(OSError):
        status, value = ask(self.port, '/ready')
        if status == 200:
          print(f'{self.name}: ready after {time.monotonic() - start:.0f} s', flush=True)
          return value
      time.sleep(0.2)
    raise SystemExit(f'{self.name}: the server ended\n{self.words()}')

  def words(self):
    self.said.seek(0)
    return self.said.read().decode()

  def cpu_s(self):
    fields = pathlib.Path(f'/proc/{self.process.pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

  def memory_mb(self, name='VmRSS'):
    lines = pathlib.Path(f'/proc/{self.process.pid}/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

  def metric(self, name):
    lines = ask(self.port, '/metrics')[1].splitlines()
    return float(next(line for line in lines if line.startswith(f'{name} ')).split()[1])


def ask(port, path):
  """Returns (status, answer)."""
  link = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  try:
    link.request('GET', path)
    response = link.getresponse()
    text = response.read().decode()
    return response.status, json.loads(text) if text.startswith('{') else text
  finally:
    link.close()


def load(port, bodies, num_clients, pause_s=0.0):
  """Returns ([(status, seconds, score)] by request, seconds in all).

  Requests start as clients are free, or one each pause_s. A status of 0 is a connection that ended
  without an answer, -1 one that was refused.
  """
  found, left = [None] * len(bodies), iter(range(len(bodies)))
  begin = time.monotonic()

  async def client():
    link = None
    for i in left:
      await asyncio.sleep(max(0.0, begin + i * pause_s - time.monotonic()))
      start, value = time.monotonic(), b''
      try:
        link = link or await asyncio.open_connection('127.0.0.1', port)
        status, value = await post(*link, bodies[i].encode())
      except ConnectionRefusedError:
        status = -1
      except (OSError, asyncio.IncompleteReadError):
        status, link = 0, None
      score = json.loads(value)['verdicts'][0]['score'] if status == 200 else None
      found[i] = status, time.monotonic() - start, score
    if link:
      link[1].close()

  async def everyone():
    await asyncio.gather(*(client() for _ in range(num_clients)))

  asyncio.run(everyone())
  return found, time.monotonic() - begin


async def post(reader, writer, body):
  """Returns (status, body) of an answer. By hand: a client must not take the server's time."""
  head = f'POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n'
  writer.write(head.encode() + b'Content-Type: application/json\r\n\r\n' + body)
  lines = (await reader.readuntil(b'\r\n\r\n')).lower().split(b'\r\n')
  length = next(int(line[15:]) for line in lines if line.startswith(b'content-length:'))
  return int(lines[0].split()[1]), await reader.readexactly(length)


def measure(server, bodies, num_clients, **options):
  """Returns (numbers of a load, its outcomes)."""
  before, cpu = server.memory_mb(), server.cpu_s()
  found, seconds = load(server.port, bodies, num_clients, **options)
  times = sorted(t for status, t, _ in found if status == 200)
  numbers = {
    'requests_per_s': len(times) / seconds,
    'p50_s': times[len(times) // 2],
    'p99_s': times[min(len(times) - 1, int(len(times) * 0.99))],
    'cpu_s_per_request': (server.cpu_s() - cpu) / len(times),
    'memory_mb': [round(before), round(server.memory_mb())],
    'peak_mb': round(server.memory_mb('VmHWM')),
    'statuses': dict(collections.Counter(str(status) for status, _, _ in found)),
  }
  print(server.name, json.dumps(numbers), flush=True)
  return numbers, found


@contextlib.contextmanager
def running(*servers):
  try:
    yield
  finally:
    for server in servers:
      server.process.terminate()
    for server in servers:
      server.process.wait(120)


def make_ours(args, folder, *more, core=None):
  port = free_port()
  command = ['taskset', '-c', str(core)] if core is not None else []
  command += [sys.executable, '-m', 'csrm_jax.main']
  command += [f'--config=configs/serve.py:checkpoint={args.model},policies={folder},port={port}']
  if args.is_public:
    command += [f'--config.numerics.{name}={args.dtype}' for name in ('dtype', 'param_dtype')]
  command += ['--config.allow_out_of_domain=true', f'--config.deadline_s={args.deadline_s}']
  return Server('ours', [*command, *args.config, *more], port)


def make_peer(args, verbalizers):
  python = dict(text.split('=', 1) for text in args.python)['peer']
  settings = {'port': free_port(), 'folder': args.model, 'dtype': args.dtype}
  settings |= {'safe': list(verbalizers.safe), 'unsafe': list(verbalizers.unsafe)}
  command = [python, __file__, f'--serve_peer={json.dumps(settings)}']
  return Server('peer', command, settings['port'])


def ours_bodies(asks):
  return [json.dumps({'policy': name, 'messages': talk}) for name, talk in asks]


def compare(args, folder, policies, asks, warm):
  from csrm_jax.reward import model as reward_model
  from csrm_jax.safety import schema, templates

  spec, tokenizer = reward_model.describe(args.model)

  def prompt(name, talk):
    rules = schema.parse_safety(policies[name], name)
    segments = templates.render(rules, schema.parse_conversation(talk), spec.layout)
    return json.dumps({'prompt': templates.render_text(segments)})

  bodies = {'ours': ours_bodies, 'peer': lambda asks: [prompt(*one) for one in asks]}
  servers = [make_ours(args, folder)]
  if args.python:
    servers.append(make_peer(args, spec.verbalizers(tokenizer)))
  runs, scores = {server.name: [] for server in servers}, {}
  with running(*servers):
    versions = {server.name: server.wait_until_ready() for server in servers}
    for server in servers:
      load(server.port, bodies[server.name](warm), args.num_clients)
    for _ in range(args.pairs):
      for server in servers:
        numbers, found = measure(server, bodies[server.name](asks), args.num_clients)
        runs[server.name].append(numbers)
        scores[server.name] = [score for _, _, score in found]
    fill = servers[0].metric('csrm_batch_fill')
  versions['ours'] = {'jax': importlib.metadata.version('jax')}
  record = {'versions': versions, 'batch_fill': fill, 'sides': {}}
  numeric = [name for name, value in numbers.items() if isinstance(value, float)]
  for side, own in runs.items():
    record['sides'][side] = {name: pairs.spread([run[name] for run in own]) for name in numeric}
    record['sides'][side] |= {name: own[-1][name] for name in own[-1] if name not in numeric}
  if not args.python:
    return record
  gaps = [abs(a - b) for a, b in zip(*scores.values(), strict=True)]
  record['largest_difference'] = max(gaps)
  for name in ('requests_per_s', 'cpu_s_per_request'):
    ratios = [a[name] / b[name] for a, b in zip(runs['ours'], runs['peer'], strict=True)]
    ratios = ratios if name == 'requests_per_s' else [1 / ratio for ratio in ratios]
    record.setdefault('ratios', {})[name] = pairs.spread(ratios)
    print(f'{name}: ours is {record["ratios"][name]["median"]:.2f} times as good')
  return record


def overload(args, folder, policies, asks, warm):
  deadline_s = args.overload_deadline_s
  server = make_ours(args, folder, f'--config.deadline_s={deadline_s}')
  bodies = ours_bodies(asks)
  with running(server):
    server.wait_until_ready()
    load(server.port, ours_bodies(warm), args.num_clients)
    usual, _ = measure(server, bodies, args.num_clients)
    pause_s = 0.1 / usual['requests_per_s']
    # For four deadlines: the queue is full most of the time.
    num = int(4 * deadline_s / pause_s)
    many = [bodies[i % len(bodies)] for i in range(num)]
    numbers, found = measure(server, many, args.num_overload_clients, pause_s=pause_s)
    late = [t for status, t, _ in found if status == 200 and t > 2 * deadline_s]
    # Told to stop in the middle of the same load.
    timer = threading.Timer(num * pause_s / 2, server.process.send_signal, [signal.SIGTERM])
    timer.start()
    found, _ = load(server.port, many, args.num_overload_clients, pause_s)
    code = server.process.wait(120)
  stopped = dict(collections.Counter(str(status) for status, _, _ in found))
  record = {'usual': usual, 'overload': numbers, 'pause_s': pause_s, 'deadline_s': deadline_s}
  record |= {'num_later_than_twice_the_deadline': len(late), 'stopped': stopped, 'exit_code': code}
  # So uvicorn says that it gives up a request that it has read.
  record['gave_up'] = 'Cancel' in server.words()
  print(json.dumps(record))
  return record


@contextlib.contextmanager
def proxy(ports):
  """Yields the port of a proxy that gives each new connection to the next of these ports."""

  async def copy(reader, writer):
    with contextlib.suppress(OSError):
      while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

  turn = iter(range(1 << 30))

  async def serve(reader, writer):
    there = await asyncio.open_connection('127.0.0.1', ports[next(turn) % len(ports)])
    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

  loop = asyncio.new_event_loop()
  server = loop.run_until_complete(asyncio.start_server(serve, '127.0.0.1', 0))
  thread = threading.Thread(target=loop.run_forever, daemon=True)
  thread.start()
  try:
    yield server.sockets[0].getsockname()[1]
  finally:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def replicas(args, folder, policies, asks, warm):
  bodies, record = ours_bodies(asks), {}
  # What compiles for two cores is not what runs on one: XLA cuts the work by their number.
  for num in (1, 2):
    servers = [make_ours(args, folder, core=core) for core in range(num)]
    with running(*servers), proxy([server.port for server in servers]) as port:
      for server in servers:
        server.wait_until_ready()
        load(server.port, ours_bodies(warm), args.num_clients)
      cpu = sum(server.cpu_s() for server in servers)
      found, seconds = load(port, bodies, args.num_clients)
      cpu = sum(server.cpu_s() for server in servers) - cpu
      ended = {status for status, _, _ in found}
    record[f'{num} replicas'] = {
      'requests_per_s': len(bodies) / seconds,
      'cpu_s_per_request': cpu / len(bodies),
      # What each replica got of its core.
      'share_of_cores': cpu / seconds / num,
      'statuses': sorted(ended),
    }
    print(json.dumps(record), flush=True)
  return record


CASES = {'compare': compare, 'overload': overload, 'replicas': replicas}


def main():
  parser = pairs.parser(__doc__, pairs=2, cases='compare')
  parser.add_argument('--num_requests', type=int, default=2000)
  parser.add_argument('--num_clients', type=int, default=16)
  parser.add_argument('--deadline_s', type=float, default=600.0)
  parser.add_argument('--overload_deadline_s', type=float, default=10.0)
  parser.add_argument('--num_overload_clients', type=int, default=256)
  parser.add_argument('--serve_peer', default='', help='used by this script')
  parser.add_argument('config', nargs='*', help='after --, flags of our server: --config.KEY=VALUE')
  args = parser.parse_args()
  if args.serve_peer:
    serve_peer(**json.loads(args.serve_peer))
    return
  from csrm_jax.reward import model as reward_model

  args.is_public = reward_model.public_model(args.model) is not None
  rng = random.Random(0)
  num, num_warm = args.num_requests, 2 * args.num_clients
  if args.is_public:
    policies = make_policies(rng)
    asks = make_requests(rng, policies, num + num_warm)
  else:
    policies, asks = make_ruleworld(rng, num + num_warm)
  asks, warm = asks[:num], asks[num:]
  with tempfile.TemporaryDirectory() as folder:
    for name, rules in policies.items():
      (pathlib.Path(folder) / f'{name}.json').write_text(json.dumps(rules))
    for case in args.cases.split(','):
      record = CASES[case](args, folder, policies, asks, warm)
      if not args.no_json:
        pairs.write('serve', args, f'{case}, {pathlib.Path(args.model).name}', record)


if __name__ == '__main__':
  main()
