"""Scores conversations with a model, under rules of your own.

python -m csrm_jax.main --config=configs/eval.py --workdir=/tmp/scored \
  --config.checkpoint=/tmp/rm --config.safety=configs/safety/film_club.yaml \
  --config.conversations=conversations.jsonl

The model is a trained reward model, an instruction-tuned model as it is, or a
guard model: --config.checkpoint=org/name --config.format=llama_guard_3

All benchmarks on one model, and the reports of several side by side:

python -m csrm_jax.main --config=configs/eval.py:benchmarks \\
  --workdir=/tmp/full --config.checkpoint=/tmp/rm \\
  --config.benchmarks.data_dir=DATA
python -m csrm_jax.main --config=configs/eval.py:compare --workdir=/tmp/both \\
  --config.compare="('/tmp/full', '/tmp/no_cca')"

What best of n finds with a reward, as the reward sees it and in truth (RuleWorld's policy and
oracle); of several models A+B+C it is the combination's. `compare` takes these reports too.

python -m csrm_jax.main --config=configs/eval.py:search,checkpoint=/tmp/rm \\
  --workdir=/tmp/search

Against people's verdicts on real texts, rule by rule, and beside judges that read no rules
(checkpoint='' measures these alone); choose by the dev side, and look at the test side once:

python -m csrm_jax.main --workdir=/tmp/real \\
  --config=configs/eval.py:real,checkpoint=/tmp/rm,data_dir=DATA,side=dev
python -m csrm_jax.evals.judged RUN1 RUN2 RUN3  # the mean over seeds or folds

How often the verifier of refusals is right, by people's labels of XSTest's completions:

python -m csrm_jax.main --config=configs/eval.py:refusals --workdir=/tmp/refusals \\
  --config.data_dir=DATA/xstest
"""

import pathlib

import ml_collections

from csrm_jax import config as config_lib

common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))


def get_config(arg=None):
  """Returns the config; arg: benchmarks, search, real, compare, refusals, or nothing for a file.

  With `real` come checkpoint, data_dir, side and fold; with `search` checkpoint.
  """
  arg = config_lib.parse_arg(
    arg,
    benchmarks=False,
    compare=False,
    refusals=False,
    real=False,
    search=False,
    checkpoint='',
    data_dir='',
    side=('dev', 'test'),
    fold='',
  )
  if not arg.real and (arg.data_dir or arg.fold or arg.side != 'dev'):
    raise ValueError('data_dir, side and fold go with `real`: write configs/eval.py:real,…')
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
  runners = {'benchmark': arg.benchmarks, 'real': arg.real, 'search': arg.search}
  c.runner = next((name for name, is_it in runners.items() if is_it), 'evaluate')
  # The work directory of a training run; or a public model: a Hugging Face folder, a hub id
  # (org/name) or a .gguf file.
  c.checkpoint = arg.checkpoint
  # Of several, A+B+C: what is made of their scores (csrm_jax.reward.combiners): mean, worst,
  # uwo (weight=0.5) or robust (nominal=0.6), as in uwo:weight=0.1.
  c.combine = 'mean'
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
  if arg.real:
    c.data_dir = arg.data_dir  # has a folder for each set, see csrm_jax.data.catalogue
    c.names = ()  # the sets, see csrm_jax.runners.real; () for all that are there
    c.side = arg.side  # dev or test; training never sees either
    # The rules that training left out, as in configs/rm.py; '' is what the checkpoint says.
    c.fold = arg.fold
    c.max_rows = -1  # the texts asked of each rule; 0 for all, -1 for 40 (dev) or 100 (test)
    c.num_samples = 200  # draws of prompts for an interval
    c.with_words = True  # also fit the judges that read no rules
    c.dev = ''  # a work directory of the dev side, whose thresholds `F1 tuned` takes; '' for none
    return c
  # Whether the report shows mistakes with their rules and texts; False for private data.
  c.texts = True
  if arg.search:
    c.title = ''  # the report's title; '' names the model
    c.rules = ('film club', 'pet forum', 'savings bank')  # RuleWorld's rule sets; () for all
    c.num_prompts = 256  # of each; intervals are over prompts
    c.num_samples = 64  # of each prompt: the largest n
    c.seed = 0  # of prompts and samples; must be the same for all reports that are compared
    # Judges samples as they grow, after so many words: adds `early_stop` to what search finds, and
    # the false alarms and the recall of a calibrated monitor. 0 judges whole replies only.
    c.every = 0
    c.alpha = 0.05  # the share of safe replies that the monitor may alarm
    # Adds `multifurcation` to what search finds: beam search with each of these numbers of beams,
    # as (1, 4), guided by a model of next tokens that is fitted first. () for none.
    c.beams = ()
    c.multifurcation = ml_collections.ConfigDict(
      {
        'top_p': 0.8,  # beams go on with the policy's likeliest tokens that together have this
        # No reply stops within so many tokens. The source has 16; half of RuleWorld's are shorter.
        'min_length': 8,
        'num_samples': 2000,  # replies to training prompts, whose prefixes the model learns from
        'every': 4,  # a prefix is scored after so many tokens, and whole replies are
        'num_steps': 500,
        'batch_size': 32,  # replies in a step
        'lr': 3e-3,  # the peak of a warm-up and a cosine
        'lora_rank': 4,  # of the adapters on queries and values
      }
    )
    return c
  if arg.benchmarks:
    c.title = ''  # the report's title; '' names the model
    c.benchmarks = ml_collections.ConfigDict(
      {
        'ruleworld_examples': 1000,  # how many the two largest sets have; 0 for no RuleWorld
        # Whose unseen rules: dev, where every choice looks, or test; the manifest counts openings.
        'ruleworld_side': 'dev',
        'ruleworld_seed': 2000,  # must be the same for all reports that are compared
        'data_dir': '',  # has a folder for each public set; '' for no public sets
        'names': (),  # the names of the public sets to use; () for all
        'max_items': 0,  # how many items of each benchmark, evenly spread; 0 for all
      }
    )
    return c
  # Whether text is judged too that is in words foreign to what the model was trained on. Such rows
  # are marked, as are those with longer prompts or more rules than in training (out_of_domain).
  c.allow_out_of_domain = False
  # What is scored: a file, a folder or a hub id, in any form of csrm_jax.data.forms.
  c.conversations = ''
  # Also P(unsafe) under each rule alone, which says which one is violated; a pass for each rule.
  c.categories = False
  # The thresholds.json of configs/calibrate.py, by which rows are labelled; '' is P(unsafe) 0.5.
  c.thresholds = ''
  c.table = ''  # beside scored.jsonl: 'csv' or 'parquet' writes scored.csv or scored.parquet
  # The rules for all rows; '' where each row brings its own `safety`. The other two are as in
  # training: what values of the label mean, and the names of columns.
  c.safety = common.OWN['safety']
  c.labels = common.OWN['labels']
  c.columns = ml_collections.ConfigDict(common.OWN['columns'])
  return c
