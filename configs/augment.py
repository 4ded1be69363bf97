"""Makes training data from conversations by changing their rules.

python -m csrm_jax.main --config=configs/augment.py --workdir=/tmp/aug
python -m csrm_jax.main --workdir=/tmp/aug \
  --config=configs/augment.py:proposer=endpoint,data=xstest_completions,\
path=FOLDER \
  --config.endpoint.base_url=http://localhost:8000/v1 \
  --config.endpoint.model=NAME
python -m csrm_jax.main --workdir=/tmp/aug \
  --config=configs/augment.py:proposer=model,init=FOLDER,data=jsonl,path=FILE
python -m csrm_jax.main --workdir=/tmp/rm \
  --config=configs/rm.py:data=augmented,path=/tmp/aug
"""

import ml_collections

from csrm_jax import config as config_lib


def get_config(arg=None):
  """Returns the config.

  arg: proposer=oracle|endpoint|model, data (ruleworld, or a data set that comes
  from files), path (of its file or folder), judge (see below), init (weights of
  the proposer 'model'), smoke (seconds).
  """
  arg = config_lib.parse_arg(
    arg,
    proposer=('oracle', 'endpoint', 'model'),
    data='ruleworld',
    path='',
    judge='',
    init='',
    smoke=False,
  )
  is_oracle = arg.proposer == 'oracle'
  c = ml_collections.ConfigDict()
  c.runner = 'augment'
  c.seed = 0  # of RuleWorld, of pools and of what is drawn at random

  c.source = ml_collections.ConfigDict()
  # ruleworld, or a source of csrm_jax.data.catalogue: jsonl, parquet,
  # array_record, xstest_completions, moderation, or a set of the catalogue:
  # beavertails, pku_safe_rlhf, wildguardmix, aegis, dynabench, ...
  c.source.name = arg.data
  c.source.path = arg.path  # file or folder; '': public sets from the hub
  # 0: all; else so many, drawn at random where they come from files
  c.source.num_examples = 6000 if arg.data == 'ruleworld' else 0
  c.source.licence = ''  # of the source, for the data card; '': if it is known
  # Propose, and write ArrayRecord files, on Apache Beam (extra [beam]): in
  # this process, or where options say that are like
  # ('--runner=DataflowRunner', '--project=...').
  c.beam = ml_collections.ConfigDict({'enabled': False, 'options': ()})
  c.array_record = False  # also write ArrayRecord files (extra [tfds])

  # Who writes: the exact oracle of RuleWorld, or a language model behind an
  # endpoint or in this process.
  c.proposer = arg.proposer
  c.oracle = ml_collections.ConfigDict()
  c.oracle.disobey = 0.0  # share of rewrites that do not heed their lists
  c.oracle.slip = 'subset'  # how: 'subset' any other list, 'one' one item off
  c.endpoint = ml_collections.ConfigDict()
  c.endpoint.base_url = 'http://localhost:8000/v1'  # OpenAI-compatible
  c.endpoint.model = ''  # the name that the endpoint knows
  c.endpoint.key_variable = 'OPENAI_API_KEY'  # that holds the key, if any
  # What is asked of the form of replies: json_schema; bounded_json_schema, with
  # lengths, for small models on servers that keep to it; json_object; or text,
  # for nothing.
  c.endpoint.json_mode = 'json_schema'
  c.endpoint.temperature = 0.7
  c.endpoint.max_tokens = 800  # a reply may have
  c.endpoint.timeout_s = 60.0  # without a sign of the endpoint
  c.endpoint.num_tries = 5  # of a request that fails on the way
  c.endpoint.num_unparsable = 3  # replies that are none, before it is dropped
  c.endpoint.backoff_s = 1.0  # before the second try; then doubles
  c.endpoint.concurrency = 8  # requests at once
  c.endpoint.price_in = 0.0  # of a million prompt tokens, for the cost count
  c.endpoint.price_out = 0.0  # of a million reply tokens
  c.model = ml_collections.ConfigDict()
  c.model.init = arg.init  # a Hugging Face folder, a hub id or a .gguf file
  c.model.dtype = 'float32'  # of weights and activations; or bfloat16
  c.model.temperature = 0.7
  c.model.top_p = 1.0  # the likeliest tokens that reach it are drawn
  c.model.max_tokens = 800  # a reply may have
  c.model.num_unparsable = 3  # replies that are none, before it is dropped
  c.model.concurrency = 8  # requests a batch
  c.cache = ''  # folder of replies; '': in the work directory

  # The classifier: 'ruleworld' (to the letter), 'annotator' (RuleWorld's noisy
  # one), a reward model (work directory, or public model), or '' for none.
  c.judge = arg.judge or ('ruleworld' if is_oracle else '')
  c.judge_format = 'csrm'  # of a public one: or llama_guard_3, shield_gemma

  c.categories = ml_collections.ConfigDict({'enabled': True})  # CCA
  c.strictness = ml_collections.ConfigDict()  # SA, Algorithm 1
  c.strictness.enabled = bool(c.judge)
  c.strictness.num_subcategories = 3 if is_oracle else 6  # asked for at first
  c.strictness.max_subcategories = 15  # with those that conversations ask for
  c.strictness.pool_size = 200  # violating conversations a category
  c.strictness.alpha = 0.05  # of the one-sided Clopper–Pearson bound
  c.strictness.threshold = 0.95  # that the bound must exceed
  # Conversations that only the strict side catches, at least. The paper asks
  # for none (0), but then two guidelines that mean the same pass.
  c.strictness.min_extra = 1
  c.strictness.max_pairs = 0  # written, drawn at random; 0: all

  if arg.smoke:
    c.source.num_examples = 200
    c.strictness.max_pairs = 100
  return c
