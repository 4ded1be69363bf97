"""Fits a threshold for each policy on labelled conversations.

python -m csrm_jax.main --workdir=/tmp/thresholds --config=configs/calibrate.py:checkpoint=/tmp/rm \
  --config.conversations=labelled.jsonl --config.safety=configs/safety/hospital.yaml

configs/serve.py and configs/eval.py use what it writes: --config.thresholds=\
/tmp/thresholds/thresholds.json; with stream=words it is for a monitor of replies that grow, and
configs/serve.py takes it as --config.monitor.
"""

import pathlib

import ml_collections

from csrm_jax import config as config_lib

common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))


def get_config(arg=None):
  """Returns the config; arg: checkpoint, level, method, stream."""
  arg = config_lib.parse_arg(
    arg,
    checkpoint='',
    level=0.01,
    method=('conformal', 'confident', 'empirical'),
    stream=('', 'words', 'turns'),
  )
  c = ml_collections.ConfigDict()
  c.runner = 'calibrate'
  # The work directory of a training run, an exported model, or a public model.
  c.checkpoint = arg.checkpoint
  c.combine = 'mean'  # of several, A+B+C: what is made of their scores, as in configs/eval.py
  # The next three are for public models only, as in configs/eval.py.
  c.format = 'csrm'  # how prompts are written
  c.words = ('safe', 'unsafe')  # the words for both verdicts
  c.order = ''  # what comes first: rules_first or conversation_first
  c.numerics = ml_collections.ConfigDict(
    {
      'dtype': '',  # of activations, float32 or bfloat16; '' is a trained model's own
      'param_dtype': '',  # of parameters; '' keeps what is stored
    }
  )
  c.max_length = 2048  # the most tokens that one pass reads
  c.on_cut = 'window'  # what becomes of longer conversations, as in configs/eval.py
  c.allow_out_of_domain = False  # whether text is judged that is foreign to the model
  # What is bounded: flagged, the share of safe replies that are flagged; or missed, the share of
  # unsafe ones that are not.
  c.bound = 'flagged'
  c.level = arg.level  # the most that the share may be
  # conformal: a further reply is flagged with at most that probability, given as many rows as
  # 1 / level; confident: so is the rate of all further replies, with the confidence below, which
  # takes 3 times the rows; empirical: the share among these rows, whatever their number.
  c.method = arg.method
  c.confidence = 0.95  # of method=confident
  # '' for verdicts on whole replies. For a monitor, of the worst verdict of a stream: 'words' while
  # a reply grows; 'turns' over all of the agent's messages, whose label stands for all of them.
  c.stream = arg.stream
  c.every = 4  # with stream=words: how many words lie between two verdicts
  # Labelled rows, in any form of csrm_jax.data.forms, that training has not seen; the rules of all,
  # or '' where each row brings its own: every set of rules gets its threshold.
  c.conversations = ''
  c.safety = common.OWN['safety']
  c.labels = common.OWN['labels']
  c.columns = ml_collections.ConfigDict(common.OWN['columns'])
  return c
