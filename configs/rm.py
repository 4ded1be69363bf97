"""The main job: train a configurable safety reward model, evaluate, report.

python -m csrm_jax.main --config=configs/rm.py --workdir=/tmp/rm
python -m csrm_jax.main --config=configs/rm.py:ablation=no_cca --workdir=...
python -m csrm_jax.main --config=configs/rm.py:data=public,data_dir=DIR \
  --workdir=...
python -m csrm_jax.main --config=configs/rm.py:data=augmented,path=AUG \
  --workdir=...
python -m csrm_jax.main --config=configs/rm.py:model=smollm2_135m,lora=16,\
data=public,data_dir=DIR --workdir=...
python launch/sweep.py --config=configs/rm.py --seeds=0,1,2 --workdir=...
"""

import pathlib

import ml_collections

import csrm_jax
from csrm_jax import config as config_lib
from csrm_jax.core import topology

# Public instruction-tuned models -> their weights on the hub.
BACKBONES = {
  'smollm2_135m': 'HuggingFaceTB/SmolLM2-135M-Instruct',
  'llama3_8b': 'meta-llama/Llama-3.1-8B-Instruct',
  'llama3_70b': 'meta-llama/Llama-3.1-70B-Instruct',
  'mistral_7b': 'mistralai/Mistral-7B-Instruct-v0.1',
  'qwen3_1b7': 'Qwen/Qwen3-1.7B',
  'gemma2_9b': 'google/gemma-2-9b-it',
}
ABLATIONS = ('full', 'no_cca', 'no_sa', 'no_aug', 'rules_blind')


def get_config(arg=None):
  """Returns the config.

  arg: ablation=full|no_cca|no_sa|no_aug|rules_blind; data=ruleworld, public (a
  mixture of three sets in data_dir), or a source of csrm_jax.data.mixture with
  its path: jsonl, parquet, augmented (what configs/augment.py wrote),
  array_record, beavertails, wildguardmix, ...; model (tiny or a name of
  BACKBONES), init (its weights: a folder, a hub id or a .gguf file; by default
  the hub's), lora (rank of adapters; 0 trains all weights), mesh (a slice of
  TPUs: v5e-64, v5p-16, 2xv5e-256; or GPUs: h100-16), num_steps, smoke (a run of
  a minute that exercises everything).
  """
  arg = config_lib.parse_arg(
    arg,
    ablation=ABLATIONS,
    data='ruleworld',
    data_dir='',
    path='',
    model=('tiny', *BACKBONES),
    init='',
    lora=0,
    mesh='',
    num_steps=0,
    smoke=False,
  )
  package = pathlib.Path(csrm_jax.__file__).parent
  c = ml_collections.ConfigDict()
  c.runner = 'train_rm'
  c.title = 'Configurable safety reward model'  # of the report
  c.seed = 0  # of the data and, without model.init, of the weights
  c.num_steps = 500  # updates
  c.log_every = 20  # steps a line of metrics.jsonl sums up
  c.checkpoint_every = 100  # steps; a multiple of log_every
  # Steps of a profiler trace in workdir/profile, as in '10:13'; '' for none.
  c.profile_steps = ''
  # SentencePiece model (.model) or Hugging Face tokenizer.json; '' takes the
  # tokenizer, the chat template and the shape of model.init.
  c.tokenizer = str(package / 'ruleworld' / 'tokenizer.model')

  c.model = ml_collections.ConfigDict()
  c.model.preset = arg.model  # a name of models.config.PRESETS
  # Fields of the preset that are no property of the weights.
  c.model.overrides = ml_collections.ConfigDict(
    {
      'dtype': 'float32',  # of activations; or bfloat16
      'param_dtype': 'float32',  # of parameters; or bfloat16
      'remat': 'none',  # recomputed in the backward pass: none, dots, full
      'unroll': 4,  # layers a step of the scan over depth; more suits CPUs
      'lora_rank': arg.lora,  # of the adapters that are trained; 0 for none
      'lora_alpha': 2.0 * arg.lora or 16.0,  # over the rank: their scale
      'lora_targets': ('query', 'key', 'value', 'out', 'gate', 'up', 'down'),
    }
  )
  # Weights to start from: a folder with safetensors and config.json, a hub id
  # or a .gguf file; '' for random.
  c.model.init = str(package / 'ruleworld' / 'base')

  c.template = ml_collections.ConfigDict()
  c.template.order = 'rules_first'  # or 'conversation_first'
  c.template.words = ('safe', 'unsafe')  # that the question names
  # Verdict words; those of one token count.
  c.template.safe_words = ('safe', ' safe', 'Safe', ' Safe')
  c.template.unsafe_words = ('unsafe', ' unsafe', 'Unsafe', ' Unsafe')

  c.data = ml_collections.ConfigDict()
  c.data.batch_size = 16  # packed rows a step
  c.data.row_length = 384  # tokens a row; the two sides of a pair share one
  c.data.max_segments = 12  # prompts a row at most
  c.data.max_length = 256  # tokens a prompt may have before it is shortened
  # Configurable category augmentation (CCA) of examples.
  c.data.drop_prob = 0.5  # each category of the rules is dropped
  c.data.plus_prob = 0.5  # the proposed p+ (it fires) is added
  c.data.minus_prob = 0.5  # the proposed p- (it does not) is added
  # The two prompts of a pair count as examples too where their labels are
  # known. The paper does not say so; then SA alone teaches to read rules.
  c.data.label_pairs = False
  c.data.rules_blind = False  # hide the rules: what can be known without them
  # Named parts: source, path (for files), weight in the mixture of atoms.
  c.data.parts = _ruleworld_parts()

  c.loss = ml_collections.ConfigDict()
  # Weight of the pair loss. The paper has 0.1; a model this small and a run
  # this short do not learn the order of guidelines with that.
  c.loss.gamma = 0.3
  c.loss.margin = 0.0  # m, nats

  c.optim = ml_collections.ConfigDict()
  c.optim.lr = 1e-3  # peak; warm-up, then cosine
  c.optim.warmup_steps = 20
  c.optim.b1 = 0.9
  c.optim.b2 = 0.95
  c.optim.weight_decay = 0.01  # decoupled; not on norm scales
  c.optim.clip_norm = 1.0  # largest global gradient norm
  c.optim.end_lr_fraction = 0.1  # last learning rate over the peak
  c.optim.num_microbatches = 1  # gradient accumulation within a step

  # Devices along each axis; -1 takes what is left. Of num_slices (or nodes),
  # which a slow network connects, data is a multiple.
  c.mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1, 'num_slices': 1})

  c.eval = ml_collections.ConfigDict()
  c.eval.fraction = 0.2  # of each file part, held out by a hash of its text
  c.eval.max_examples = 0  # of each of them, a fixed sample; 0 for all
  c.eval.zero_shot = False  # also before training
  c.eval.ruleworld_examples = 2000  # a test set; 0 for none
  c.eval.ruleworld_seed = 2000  # of the test sets

  _set_data(c, arg)
  if arg.model != 'tiny':
    _set_backbone(c, arg)
  if arg.mesh:
    _set_slice(c, arg.mesh)
  _set_ablation(c, arg.ablation)
  if arg.smoke:
    c.num_steps, c.log_every, c.checkpoint_every = 20, 5, 10
    c.optim.warmup_steps = 5
    c.eval.ruleworld_examples = min(c.eval.ruleworld_examples, 60)
  if arg.num_steps:
    c.num_steps = arg.num_steps
  return c


def _part(source, weight, path=''):
  return {'source': source, 'path': path, 'weight': weight}


def _ruleworld_parts():
  return ml_collections.ConfigDict(
    {
      # Examples of four data sets with fixed taxonomies (CCA applies to them).
      'taxonomies': _part('ruleworld/taxonomies', 0.6),
      # The same conversation under a strict and a lenient guideline (SA).
      'strictness': _part('ruleworld/strictness', 0.3),
      # Two replies under the same rules.
      'preference': _part('ruleworld/preference', 0.1),
    }
  )


def _set_data(c, arg):
  if arg.data == 'ruleworld':
    return
  c.eval.ruleworld_examples = 0
  c.data.row_length, c.data.max_length = 1024, 512
  c.data.batch_size = 6
  c.model.overrides.unroll = 1  # long rows take minutes to compile unrolled
  if arg.data != 'public':
    c.title = f'Reward model of {arg.path or arg.data}'
    c.data.parts = ml_collections.ConfigDict({'file': _part(arg.data, 1.0, arg.path)})
    return
  folder = pathlib.Path(arg.data_dir)
  c.title = 'Reward model of public data'
  c.data.parts = ml_collections.ConfigDict(
    {
      'xstest_completions': _part('xstest_completions', 0.35, str(folder / 'xstest')),
      'moderation': _part(
        'moderation', 0.3, str(folder / 'moderation' / 'moderation-dev.jsonl.gz')
      ),
      'moderation_pairs': _part(
        'moderation_pairs', 0.1, str(folder / 'moderation' / 'moderation-dev.jsonl.gz')
      ),
      'hh': _part(
        'hh_rlhf', 0.25, str(folder / 'hh_rlhf' / 'harmless-base-test-first1500.jsonl.gz')
      ),
    }
  )


def _set_backbone(c, arg):
  """A public model, within its chat template, answers Yes or No: each is one
  token of every tokenizer, and so is a sequence classifier's one logit."""
  c.tokenizer = ''
  c.model.init = arg.init or BACKBONES[arg.model]
  c.template.words = ('Yes', 'No')
  c.template.safe_words, c.template.unsafe_words = ('Yes',), ('No',)
  c.model.overrides.unroll = 1
  c.model.overrides.remat = 'dots'
  c.optim.lr = 5e-4 if arg.lora else 1e-5
  c.loss.gamma = 0.1  # the paper's
  c.data.batch_size = 8
  c.data.row_length, c.data.max_length = 768, 384
  c.eval.zero_shot = True


def _set_slice(c, name):
  """The paper's batch and precision on a slice of TPUs, or nodes of GPUs."""
  c.mesh.update(topology.layout(name))
  c.model.overrides.dtype = 'bfloat16'
  c.model.overrides.remat = 'full'
  c.model.overrides.unroll = 1
  c.data.batch_size = 128  # rows; the paper's
  c.data.row_length, c.data.max_length = 2048, 2048


def _set_ablation(c, ablation):
  """The paper's ablations; 'no_aug' is its row -SA (neither SA nor CCA)."""
  if ablation in ('no_cca', 'no_aug'):
    c.data.drop_prob = c.data.plus_prob = c.data.minus_prob = 0.0
  if ablation in ('no_sa', 'no_aug') and 'strictness' in c.data.parts:
    c.data.parts.strictness.weight = 0.0
  if ablation == 'rules_blind':
    c.data.rules_blind = True


def sweep():
  """The ablations; launch/sweep.py adds the seeds."""
  return [{'name': name, 'arg': f'ablation={name}'} for name in ABLATIONS]
