"""Scores conversations with a model, under rules of your own.

python -m csrm_jax.main --config=configs/eval.py --workdir=/tmp/scored \
  --config.checkpoint=/tmp/rm --config.safety=configs/safety/hospital.yaml \
  --config.conversations=conversations.jsonl

The model is a trained reward model, an instruction-tuned model as it is, or a
guard model: --config.checkpoint=org/name --config.format=llama_guard_3

All benchmarks on one model, and the reports of several side by side:

python -m csrm_jax.main --config=configs/eval.py:benchmarks \\
  --workdir=/tmp/full --config.checkpoint=/tmp/rm \\
  --config.benchmarks.data_dir=DATA
python -m csrm_jax.main --config=configs/eval.py:compare --workdir=/tmp/both \\
  --config.compare="('/tmp/full', '/tmp/no_cca')"

How often the verifier of refusals is right, by people's labels of XSTest's completions:

python -m csrm_jax.main --config=configs/eval.py:refusals --workdir=/tmp/refusals \\
  --config.data_dir=DATA/xstest
"""

import pathlib

import ml_collections

from csrm_jax import config as config_lib

common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))


def get_config(arg=None):
  """Returns the config; arg: benchmarks, compare, refusals, or nothing for a file."""
  arg = config_lib.parse_arg(arg, benchmarks=False, compare=False, refusals=False)
  c = ml_collections.ConfigDict()
  if arg.compare:
    c.runner = 'compare'
    c.title = ''  # the report's title
    # Work directories of configs/eval.py:benchmarks, or of configs/rl.py; '*' matches any text.
    c.compare = ()
    # What the others are compared with: a folder's name; for policies the name that the report
    # gives them, such as 'reinforce_pp, full'. '' takes the first.
    c.reference = ''
    c.num_samples = 1000  # draws of the paired bootstrap, which reward models are compared by
    return c
  if arg.refusals:
    c.runner = 'refusals'
    c.data_dir = ''  # the folder of XSTest, with its *completions*.csv
    # A reward model or a public model that is measured beside the patterns; '' for none.
    c.checkpoint = ''
    # The rules it judges under, which must forbid to refuse: configs/safety/refusal.yaml.
    c.safety = ''
    c.words = ('safe', 'unsafe')  # what a public model says for "safe" and "unsafe"
    return c
  c.runner = 'benchmark' if arg.benchmarks else 'evaluate'
  # The work directory of a training run; or a public model: a Hugging Face folder, a hub id
  # (org/name) or a .gguf file.
  c.checkpoint = ''
  # The next three are for public models only: a trained one has them with its weights.
  # How prompts are written: csrm, llama_guard_3, llama_guard_3_user (judges the last user
  # message), shield_gemma, shield_gemma_user.
  c.format = 'csrm'
  # The words for "safe" and "unsafe" with format='csrm'; use ('Yes', 'No') where the tokenizer
  # splits these: a verdict is read off one token.
  c.words = ('safe', 'unsafe')
  # What comes first with format='csrm': rules_first or conversation_first; '' is rules_first.
  c.order = ''
  c.numerics = ml_collections.ConfigDict(
    {
      # The dtype of activations, float32 or bfloat16; '' is a trained model's own, else float32.
      'dtype': '',
      'param_dtype': '',  # the dtype of parameters; '' keeps what is stored
    }
  )
  # The most tokens that one pass reads, rules always among them. More than in training is possible,
  # and long rules need it.
  c.max_length = 2048
  # What becomes of longer conversations: 'window' reads the response in parts and takes the worst
  # verdict; 'mark' leaves out its end; 'error' stops. Each verdict says what was not read.
  c.on_cut = 'window'
  if arg.benchmarks:
    c.title = ''  # the report's title; '' names the model
    c.benchmarks = ml_collections.ConfigDict(
      {
        'ruleworld_examples': 1000,  # how many the two largest sets have; 0 for no RuleWorld
        'ruleworld_seed': 2000,  # must be the same for all reports that are compared
        'data_dir': '',  # has a folder for each public set; '' for no public sets
        'names': (),  # the names of the public sets to use; () for all
        'max_items': 0,  # how many items of each benchmark, evenly spread; 0 for all
      }
    )
    return c
  # What is scored: a file, a folder or a hub id, in any form of csrm_jax.data.forms.
  c.conversations = ''
  # Also P(unsafe) under each rule alone, which says which one is violated; a pass for each rule.
  c.categories = False
  c.table = ''  # beside scored.jsonl: 'csv' or 'parquet' writes scored.csv or scored.parquet
  # The rules for all rows; '' where each row brings its own `safety`. The other two are as in
  # training: what values of the label mean, and the names of columns.
  c.safety = common.OWN['safety']
  c.labels = common.OWN['labels']
  c.columns = ml_collections.ConfigDict(common.OWN['columns'])
  return c
