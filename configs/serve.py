"""Serves a reward model over HTTP: moderation, rewards and scores under rules of your own.

python -m csrm_jax.main --config=configs/serve.py:checkpoint=/tmp/rm

Policies are the .yaml files of a folder; an edited file takes effect at once. http://127.0.0.1:8000
is a page to try rules on, /docs lists the endpoints. SIGTERM answers what was accepted, and ends.
"""

import pathlib

import ml_collections

from csrm_jax import config as config_lib

common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))


def get_config(arg=None):
  """Returns the config; arg: checkpoint, policies, port."""
  arg = config_lib.parse_arg(arg, checkpoint='', policies='builtin:configs/safety', port=8000)
  c = ml_collections.ConfigDict()
  c.runner = 'serve'
  # The work directory of a training run; or a public model: a Hugging Face folder, a hub id
  # (org/name) or a .gguf file.
  c.checkpoint = arg.checkpoint
  c.combine = 'mean'  # of several, A+B+C of one shape: how their scores are, as in configs/eval.py
  # The next three are for public models only, as in configs/eval.py.
  c.format = 'csrm'
  c.words = ('safe', 'unsafe')  # what the model says for "safe" and "unsafe"
  c.numerics = ml_collections.ConfigDict(
    {
      'dtype': '',  # of activations: float32 or bfloat16; '' is the model's own, else float32
      'param_dtype': '',  # of parameters; '' keeps what is stored
    }
  )
  # Whether requests are judged too that are in words foreign to what the model was trained on;
  # answers have "out_of_domain".
  c.allow_out_of_domain = False

  c.policies = (
    arg.policies
  )  # a folder of rule sets (YAML or JSON), named as their files; '' for none
  c.default_policy = ''  # judges requests that name none; '' for the only one, or none
  c.reload_s = 2.0  # how often the folder is looked at
  c.threshold = 0.5  # P(unsafe) from which on a response is flagged
  # The thresholds.json of configs/calibrate.py: policies that stand there unedited have their own.
  c.thresholds = ''
  # The same with stream=words or turns: /monitor judges replies that grow, or dialogues, by it. ''
  # alarms at P(unsafe) 0.5, every 4 words, and promises no rate of false alarms.
  c.monitor = ''

  # Anything but 127.0.0.1 needs a token, which clients send as "Authorization: Bearer TOKEN".
  c.host = '127.0.0.1'
  c.port = arg.port  # 0 takes a free one
  c.token_env = 'CSRM_JAX_TOKEN'  # the environment variable that holds it
  c.allowed_hosts = ()  # names of this machine beside localhost that requests without token may use
  # A JSON line for each verdict: time, policy digest, label, latency, sha256 of the text, but no
  # text; '' for none.
  c.audit_log = ''

  c.max_length = 2048  # tokens of rules and conversation together
  # Requests that would wait longer are refused (429); accepted ones end within twice as long.
  c.deadline_s = 10.0
  # Devices along each axis, as in configs/rm.py: rows go to data and fsdp, weights are cut over
  # fsdp and tensor. By default every device of this process has all weights.
  c.mesh = ml_collections.ConfigDict(common.MESH)
  c.batching = ml_collections.ConfigDict(
    {
      # Tokens of rules, and of what follows them: each is padded to the next length. There is a
      # program for every pair, compiled before the server is ready.
      'rules_lengths': (128, 256, 384, 512, 1024),
      # Likewise; a row holds as many conversations under the same rules as fit.
      'row_lengths': (64, 96, 128, 256, 512, 1024),
      'call_tokens': 0,  # about how many go through the model at once; 0: 1024 on CPUs, else 16384
      'wait_s': 0.002,  # how long a batch waits for more while the device is idle
      'prefix_bytes': 1_000_000_000,  # device memory for rules that have been read
    }
  )
  c.limits = ml_collections.ConfigDict(
    {
      'body_bytes': 1_000_000,  # of a request
      'body_timeout_s': 10.0,  # for a request to arrive
      'conversations': 256,  # in one request
      'messages': 256,  # in one conversation
      'rules': 64,  # that a request brings along
      'connections': 1024,  # at once; more are refused (503)
      'keep_alive_s': 30,  # before an idle connection is closed
    }
  )
  return c
