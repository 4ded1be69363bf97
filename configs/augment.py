"""Makes training data from conversations by changing their rules.

python -m csrm_jax.main --config=configs/augment.py --workdir=/tmp/aug
python -m csrm_jax.main --workdir=/tmp/aug \
  --config=configs/augment.py:proposer=endpoint,data=xstest_completions,\
path=FOLDER \
  --config.endpoint.base_url=http://localhost:8000/v1 \
  --config.endpoint.model=NAME
python -m csrm_jax.main --workdir=/tmp/aug \
  --config=configs/augment.py:proposer=model,init=FOLDER,data=auto,path=FILE
python -m csrm_jax.main --workdir=/tmp/clean \
  --config=configs/augment.py:weigh=drop,model=/tmp/rm,data=auto,path=FILE
python -m csrm_jax.main --workdir=/tmp/rules --config=configs/augment.py:induce
python -m csrm_jax.main --workdir=/tmp/failures --config=configs/augment.py:attack=/tmp/rm
python -m csrm_jax.main --workdir=/tmp/rm \
  --config=configs/rm.py:data=augmented,path=/tmp/aug
"""

import pathlib

import ml_collections

from csrm_jax import config as config_lib

common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))


def get_config(arg=None):
  """Returns the config.

  arg: proposer=oracle|endpoint|model, data (ruleworld or a data set that is read from files), path
  (where that set's file or folder is), safety, labels and columns.NAME (see common.OWN), judge (see
  below), init (the weights that proposer=model loads), weigh (a rule of `weights` alone) with the
  model that it stands on, attack (a reward model whose failures are looked for), induce (rules from
  labels alone), smoke (a run of a few seconds).
  """
  arg = config_lib.parse_arg(
    arg,
    proposer=('oracle', 'endpoint', 'model'),
    data='ruleworld',
    path='',
    **common.OWN,
    judge='',
    init='',
    weigh='',
    model='',
    attack='',
    induce=False,
    smoke=False,
  )
  is_oracle = arg.proposer == 'oracle'
  c = ml_collections.ConfigDict()
  c.runner = 'augment'
  c.seed = 0  # decides RuleWorld's examples, the pools and all random draws

  c.source = ml_collections.ConfigDict()
  # ruleworld, auto (files of your own in any form), array_record, or a set of
  # csrm_jax.data.catalogue: xstest_completions, moderation, beavertails, pku_safe_rlhf, ...
  c.source.name = arg.data
  c.source.path = arg.path  # a file or folder; '' loads a public set from the hub
  # See common.OWN.
  c.source.own = ml_collections.ConfigDict({key: arg[key] for key in common.OWN})
  # 0 takes all examples. Fewer are drawn at random from files: their first rows may all have
  # one label.
  c.source.num_examples = 20_000 if arg.data == 'ruleworld' else 0
  # The source's licence, which the data card names; '' takes the one the catalogue knows, if any.
  c.source.licence = ''
  # Proposes, and writes ArrayRecord files, on Apache Beam (extra [beam]). It runs in this process
  # unless the options name another runner: ('--runner=DataflowRunner', '--project=...').
  c.beam = ml_collections.ConfigDict({'enabled': False, 'options': ()})
  # A defect that is planted in RuleWorld's examples, to see what `weights` finds: as data.defect of
  # configs/rm.py; '' for none.
  c.source.defect = ''
  c.array_record = False  # also write ArrayRecord files (extra [tfds])

  # Who writes the rules: RuleWorld's exact oracle, or a language model behind an endpoint or in
  # this process.
  c.proposer = arg.proposer
  c.oracle = ml_collections.ConfigDict()
  # The share of rewrites that do not follow their lists, as a language model's often do not.
  c.oracle.disobey = 0.0
  c.oracle.slip = 'subset'  # how they err: 'subset' takes any other list, 'one' is one item off
  c.endpoint = ml_collections.ConfigDict()
  c.endpoint.base_url = 'http://localhost:8000/v1'  # an OpenAI-compatible server
  c.endpoint.model = ''  # the name by which the endpoint knows the model
  c.endpoint.key_variable = 'OPENAI_API_KEY'  # the environment variable with the key, if any
  # The form that replies must have: json_schema; bounded_json_schema, which also limits lengths
  # (for small models, on servers that enforce it); json_object; or text, which asks for no form.
  c.endpoint.json_mode = 'json_schema'
  c.endpoint.temperature = 0.7  # the sampling temperature
  c.endpoint.max_tokens = 800  # the most tokens a reply may have
  c.endpoint.timeout_s = 60.0  # how long the endpoint may stay silent
  c.endpoint.num_tries = 5  # how often a request is sent that fails on the way
  c.endpoint.num_unparsable = 3  # unreadable replies after which a request is dropped
  c.endpoint.backoff_s = 1.0  # the wait before the second try; it doubles with each further one
  c.endpoint.concurrency = 8  # how many requests run at once
  c.endpoint.price_in = 0.0  # the price of a million prompt tokens, to count the cost
  c.endpoint.price_out = 0.0  # the price of a million reply tokens
  c.model = ml_collections.ConfigDict()
  c.model.init = arg.init  # a Hugging Face folder, a hub id or a .gguf file
  c.model.dtype = 'float32'  # the dtype of weights and activations; or bfloat16
  c.model.temperature = 0.7  # the sampling temperature
  c.model.top_p = 1.0  # draws from the likeliest tokens that together have this probability
  c.model.max_tokens = 800  # the most tokens a reply may have
  c.model.num_unparsable = 3  # unreadable replies after which a request is dropped
  c.model.concurrency = 8  # how many requests form a batch
  c.cache = ''  # the folder that keeps replies; '' puts it into the work directory

  # The classifier that checks what was written: 'ruleworld' follows the rules to the letter,
  # 'annotator' is RuleWorld's noisy one; or a reward model (a work directory or a public model);
  # '' for no checks.
  c.judge = arg.judge or ('ruleworld' if is_oracle else '')
  # Whether a reward model may judge text in words that are foreign to what it was trained on.
  c.judge_allow_out_of_domain = False
  c.judge_format = 'csrm'  # how a public model is asked: csrm, llama_guard_3, shield_gemma

  # Which labels are trusted, before anything is made of them: heads over the frozen model, each
  # taught by other rows, vote on every label and order, and a rule acts on the votes.
  c.weights = ml_collections.ConfigDict()
  # '' for none, or NAME or NAME:KNOB=VALUE,… of csrm_jax.augmentation.weights: flip (share=0.1),
  # drop (share=0.1), smooth (share=0.3, smoothing=0.1), margin (scale=1), agree (least=0),
  # balance (power=0.5, most=5).
  c.weights.rule = arg.weigh
  c.weights.model = arg.model  # what they stand on: a work directory, or a Hugging Face folder
  c.weights.num_folds = 5  # rows of one conversation are in one fold
  c.weights.num_members = 3  # heads for each fold; their spread stands in votes.jsonl
  c.weights.decay = 0.1  # L2 penalty of heads on standardised states

  # Where a reward model is wrong: of many samples of each prompt the one that it finds safest, and
  # the one that it finds least safe, where the judge above contradicts it. Nothing else is made.
  c.failures = ml_collections.ConfigDict()
  c.failures.model = arg.attack  # the reward model that is attacked; '' for none
  c.failures.rl = 'reward=oracle'  # policy and prompts, as an argument of configs/rl.py
  c.failures.num_prompts = 0  # how many of its training prompts; 0 for all
  c.failures.num_samples = 32  # of each prompt

  # Rules from labels alone, each the bit of an alarm: proposed, tested by the judge above, revised
  # where they are wrong; the best are written as rules.json. Nothing else is made.
  c.induce = ml_collections.ConfigDict()
  c.induce.enabled = arg.induce  # whether rules are proposed from alarms, and nothing else is done
  c.induce.rules = 'film club'  # RuleWorld's hidden rules, of csrm_jax.ruleworld.policy.RULE_SETS
  c.induce.false_alarms = 0.0  # the share of RuleWorld's safe conversations that alarm all the same
  c.induce.num_rounds = 5  # proposals
  # How many conversations a proposal sees: those that the rules are wrong about first; 0 for all.
  c.induce.num_shown = 0 if is_oracle else 24
  c.induce.eval_fraction = 0.25  # held out, by conversation, to measure agreement on

  # Configurable category augmentation (CCA): proposes the categories p+ and p-.
  c.categories = ml_collections.ConfigDict({'enabled': not arg.weigh})
  c.strictness = ml_collections.ConfigDict()  # strictness augmentation (SA), Algorithm 1
  c.strictness.enabled = bool(c.judge) and not arg.weigh  # it cannot do without a judge
  c.strictness.num_subcategories = 3 if is_oracle else 6  # how many are asked for at first
  c.strictness.max_subcategories = 15  # the most, with those added for conversations
  c.strictness.pool_size = 200  # violating conversations for each category
  c.strictness.alpha = 0.05  # the error of the one-sided Clopper–Pearson bound
  c.strictness.threshold = 0.95  # the bound must exceed this
  # The least number of conversations that only the strict side catches. The paper asks for none
  # (0), but then two guidelines that mean the same pass.
  c.strictness.min_extra = 1
  c.strictness.max_pairs = 0  # how many pairs are written, drawn at random; 0 for all

  if arg.smoke:
    c.source.num_examples = 400
    c.strictness.max_pairs = 100
  return c
