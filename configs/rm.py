"""The main job: train a configurable safety reward model, evaluate, report.

python -m csrm_jax.main --config=configs/rm.py --workdir=/tmp/rm
python -m csrm_jax.main --config=configs/rm.py:ablation=no_cca --workdir=...
python -m csrm_jax.main --config=configs/rm.py:data=public,data_dir=DIR \
  --workdir=...
python -m csrm_jax.main --config=configs/rm.py:data=augmented,path=AUG \
  --workdir=...
python -m csrm_jax.main --config=configs/rm.py:model=smollm2_135m,lora=16,\
data=public,data_dir=DIR --workdir=...
python -m csrm_jax.main --config=configs/rm.py:recipe=real,data_dir=DIR --workdir=...
python -m csrm_jax.main --config=configs/rm.py:model=llama3_8b,mesh=v5e-64,\
path=AUG --workdir=gs://...
python launch/sweep.py --config=configs/rm.py --seeds=0,1,2 --workdir=...

A run is BASE, which the parts that `get_config` names change in their order; --config.KEY=VALUE
comes last.
"""

import pathlib

from csrm_jax import config as config_lib

common = config_lib.load_module(pathlib.Path(__file__).with_name('common.py'))
BACKBONES = common.BACKBONES


def get_config(arg=None):
  """Returns the config.

  arg: recipe=real (SmolLM2-135M learns from texts that people judged under many rules, the sets of
  REAL in data_dir; real_nc has the sets too that may not be used commercially);
  ablation=full|no_cca|no_sa|no_aug|rules_blind, or a row of the paper (ROWS); data=ruleworld,
  public (a mixture of three sets in data_dir), paper (the paper's mixture, from the hub; the
  default of a backbone on a slice), auto (files of your own in any form, with path, safety=RULES,
  columns.label=NAME and so on, labels={...}: see common.OWN), or a source of
  csrm_jax.data.catalogue with its path: augmented (what configs/augment.py wrote), array_record,
  beavertails, wildguardmix, ...; model (tiny or a name of BACKBONES), init (its weights: a folder,
  a hub id or a .gguf file; by default the hub's), lora (the rank of adapters; 0 trains all
  weights), mesh (a slice of TPUs: v5e-64, v5p-16, 2xv5e-256; or GPUs: h100-16), num_steps, epochs,
  smoke (a run of a minute that exercises everything).
  """
  arg = config_lib.parse_arg(
    arg,
    recipe=('', 'real', 'real_nc'),
    ablation=(*ABLATIONS, *ROWS),
    data='',
    data_dir='',
    path='',
    **common.OWN,
    model=('tiny', *BACKBONES),
    init='',
    lora=0,
    mesh='',
    num_steps=0,
    epochs=0.0,
    smoke=False,
  )
  if arg.recipe:
    arg.model = 'smollm2_135m' if arg.model == 'tiny' else arg.model
    arg.lora = arg.lora or 16
  ablation = ABLATIONS[ROWS.get(arg.ablation, arg.ablation)]
  is_public = arg.model != 'tiny'
  source = arg.data or ('paper' if is_public and arg.mesh else 'ruleworld')
  data = data_part(source, arg.path, pathlib.Path(arg.data_dir))
  return common.merge(
    BASE,
    {'model.preset': arg.model} | common.lora('model', arg.lora),
    data,
    backbone_part(arg) if is_public else {},
    SLICE | common.on_slice('model', arg.mesh) if arg.mesh else {},
    PAPER if source == 'paper' else {},
    real_part(arg.recipe, pathlib.Path(arg.data_dir)) if arg.recipe else {},
    ablation,
    SMOKE if arg.smoke else {},
    {'num_steps': arg.num_steps} if arg.num_steps else {},
    {'epochs': arg.epochs},
    {f'data.own.{key}': arg[key] for key in ('safety', 'labels')},
    {f'data.own.columns.{key}': name for key, name in arg.columns.items()},
  )


def _part(source, weight, path=''):
  return {'source': source, 'path': str(path), 'weight': weight}


BASE = {
  'runner': 'train_rm',
  'title': 'Configurable safety reward model',  # the report's title
  'seed': 0,  # decides the data and, without model.init, the weights
  'num_steps': 120,  # updates
  'epochs': 0.0,  # passes over the data of files; above 0 these decide, and not num_steps
  # Where metrics go beside metrics.jsonl, which is always there: tensorboard, wandb, trackio,
  # mlflow.
  'loggers': ('jsonl', 'tensorboard'),
  'log_every': 20,  # steps that one line of metrics.jsonl sums up
  'checkpoint_every': 60,  # steps; a multiple of log_every
  # The steps of a profiler trace in workdir/profile, such as '10:13'; '' for no trace.
  'profile_steps': '',
  # Whether a run goes on although its data or weights have changed since its checkpoint.
  'accept_changes': False,
  # A SentencePiece model (.model) or a Hugging Face tokenizer.json; '' takes the tokenizer, the
  # chat template and the shape of model.init.
  'tokenizer': common.TOKENIZER,
  'model': {
    'preset': 'tiny',  # a name of models.config.PRESETS
    'overrides': common.OVERRIDES,
    # The weights to start from: a folder with safetensors and config.json, a hub id or a .gguf
    # file; '' for random ones.
    'init': f'{common.RULEWORLD}/base',
    # How a verdict is read (csrm_jax.reward.heads), NAME or NAME:KNOB=VALUE,…: verbalizer; linear;
    # mlp; ordinal (levels=4, rating=, spread=1.0); ratings (names=A+B) and weighted (names=A+B),
    # regressions on these ratings; mixture (raters=4, entropy=0.5); members (num=5, combine=uwo,
    # weight=-1.0).
    'head': 'verbalizer',
  },
  'template': {
    'order': 'rules_first',  # what a prompt begins with; or 'conversation_first'
    'words': ('safe', 'unsafe'),  # the words that the question names as answers
    # The words that count as a verdict; only those that are one token do.
    'safe_words': ('safe', ' safe', 'Safe', ' Safe'),
    # Likewise.
    'unsafe_words': ('unsafe', ' unsafe', 'Unsafe', ' Unsafe'),
  },
  'data': {
    'batch_size': 8,  # packed rows in a step
    'row_length': 512,  # tokens in a row; the two sides of a pair share one
    'max_segments': 12,  # the most prompts in a row
    # Whether the first tokens that prompts of a row have in common are read once: the two sides of
    # a pair, prompts under the same rules. Scores and gradients stay the same.
    'share_prefix': True,
    'max_length': 384,  # the most tokens in a prompt; longer ones are shortened
    # Configurable category augmentation (CCA), drawn anew for each example.
    'drop_prob': 0.5,  # the probability that a category of the rules is dropped
    'plus_prob': 0.5,  # the probability that p+, a category the response violates, is added
    'minus_prob': 0.5,  # the probability that p-, a category it does not violate, is added
    # How many examples are drawn together, so that they share what a prompt begins with: with
    # conversation_first one conversation under so many draws of rules, with rules_first one draw of
    # rules and so many conversations of the part. Pairs are not grouped.
    'group_size': 1,
    # Whether sets that are for tests only may be trained on (csrm_jax.data.catalogue names them).
    'allow_tests': False,
    # How examples are drawn from texts that were judged under many rules (csrm_jax.data.draws).
    'judged': {
      # The sides that are trained on: train, dev, test; () holds eval.fraction out.
      'sides': (),
      # The rules that are left out, beside those that always are: '0', '1', '2', or '' for none.
      'fold': '',
      'unsafe': 0.4,  # the share of unsafe examples of each rule
      'pairs': 0.1,  # the share of strictness pairs, where rules contain each other
      # Whose rate of unsafe texts the score keeps, whatever the share above: 'rule', each rule's
      # own, or 'none'.
      'prior': 'rule',
      'noise': 0.15,  # the share of texts with words around them that mean nothing
    },
    # Whether the two prompts of a pair count as examples too where their labels are known. The
    # paper does not say so; with this, SA alone teaches the model to read rules.
    'label_pairs': False,
    # Kinds of pairs (strictness, preference) that are read but have no loss: steps, tokens and
    # labelled examples stay those of a run that learns from them.
    'muted_pairs': (),
    # A defect that is planted in RuleWorld's training data, never in its tests, to see what repairs
    # it (csrm_jax.ruleworld.defects), NAME or NAME:KNOB=VALUE,…: '' for none; flip (p=0.25), filler
    # (p=0.9), hole (p=0.03), tail (ratio=20.0), raters (num=3, shift=4.0), scale (sd=1.0).
    'defect': '',
    'noise': 0.0,  # the share of examples with words around the response that mean nothing
    # The share of examples in whose place stands a tie: the same with such words and without; for
    # loss.pair=soft.
    'neutral_pairs': 0.0,
    'rules_blind': False,  # hides the rules, to show what can be known without them
    'own': common.OWN,
    # Named parts, each with a source, a path (for files), and a weight in the mixture of atoms.
    'parts': {
      # Examples of four data sets with fixed taxonomies (CCA applies to them).
      'taxonomies': _part('ruleworld/taxonomies', 0.6),
      # The same conversation under a strict and a lenient guideline (SA).
      'strictness': _part('ruleworld/strictness', 0.3),
      # Two replies under the same rules.
      'preference': _part('ruleworld/preference', 0.1),
    },
  },
  'loss': {
    # The weight of the pair loss. The paper has 0.1; a model this small and a run this short do
    # not learn the order of guidelines with that.
    'gamma': 0.3,
    'margin': 0.0,  # m, in nats
    # What a pair costs (csrm_jax.train.losses), NAME or NAME:KNOB=VALUE,…: bt; by its strength
    # margin (step=1.0) or scaled; by how sure its order is soft (smoothing=0.0, tie=1.0); by
    # another model's gap dynamic (weight=0.5, slope=0.5).
    'pair': 'bt',
    'ratings': 1.0,  # the weight of what a head's ratings cost
    'label': 'nll',  # what a label costs: nll, smooth (smoothing=0.1) or brier
  },
  'optim': common.OPTIM | {'lr': 3e-4, 'warmup_steps': 20, 'weight_decay': 0.01},
  'mesh': common.MESH,
  'eval': {
    # A file of your own, in any form, whose rows are tested; '' holds rows of the data out.
    'path': '',
    'fraction': 0.2,  # the share of each file part that a hash of the text holds out
    # Steps between measurements of the loss on validation rows (a quarter of what is held out, and
    # of RuleWorld its own); a multiple of checkpoint_every; 0 for none.
    'every': 0,
    'keep_best': True,  # whether the step with the lowest such loss is what the run ends with
    'patience': 0,  # measurements in a row without a lower loss that end the run; 0 for none
    'max_examples': 0,  # how many of each held-out part, a fixed sample; 0 for all
    # Whether the report shows mistakes with their rules and texts; False for private data.
    'texts': True,
    # The suite `real`, see configs/eval.py:real.
    'real': {
      'data_dir': '',  # has a folder for each set; '' leaves the suite out
      'side': 'dev',  # dev or test
      'max_rows': -1,  # the texts asked of each rule; 0 for all, -1 for 40 (dev) or 100 (test)
      'num_samples': 200,  # draws of prompts for an interval; 0 for none
      'with_words': True,  # also fits judges that count words, which takes minutes
    },
    'zero_shot': False,  # also evaluates before training
    'ruleworld_examples': 1000,  # the size of RuleWorld's largest test sets; 0 for none
    # Whose unseen rules are tested: dev, where every choice looks, or test, which is for the end;
    # the run's manifest counts how often it was opened.
    'ruleworld_side': 'dev',
    # Decides the test sets. It is not the run's seed, so that runs with other seeds are tested on
    # the same sets.
    'ruleworld_seed': 2000,
  },
}


def data_part(source, path, folder):
  """Returns the part for a source of data; BASE already has RuleWorld's."""
  if source == 'ruleworld':
    return {}
  moderation = folder / 'moderation' / 'moderation-dev.jsonl.gz'
  harmless = folder / 'hh_rlhf' / 'harmless-base-test-first1500.jsonl.gz'
  mixtures = {
    'public': {
      'xstest_completions': _part('xstest_completions', 0.35, folder / 'xstest'),
      'moderation': _part('moderation', 0.3, moderation),
      'moderation_pairs': _part('moderation_pairs', 0.1, moderation),
      'hh': _part('hh_rlhf', 0.25, harmless),
    },
    # The weights are the paper's numbers of examples and pairs, in thousands.
    'paper': {
      'beavertails': _part('beavertails', 330.0),
      'wildguardmix': _part('wildguardmix', 38.0),
      'aegis': _part('aegis', 15.0),
      'safe_rlhf': _part('pku_safe_rlhf_pairs', 83.0),
    },
  }
  parts = mixtures.get(source, {'file': _part(source, 1.0, path)})
  if source == 'paper' and path:
    # Creative Safety Categories (260), and the strictness pairs of BeaverTails (185) and
    # WildGuardMix (13): configs/augment.py makes them from those sets.
    parts['augmented'] = _part('augmented', 458.0, path)
  titles = {'public': 'of public data', 'paper': "of the paper's mixture"}
  return {
    'title': f'Reward model {titles.get(source, f"of {path or source}")}',
    'num_steps': 500,
    'checkpoint_every': 100,
    'optim.lr': 1e-3,
    'eval.ruleworld_examples': 0,
    'data.row_length': 1024,
    'data.max_length': 512,
    'data.max_segments': 24,
    'data.batch_size': 6,
    'data.parts': parts,
    'model.overrides.unroll': 1,  # long rows take minutes to compile unrolled
  }


def backbone_part(arg):
  """Returns the part for a public model, which answers Yes or No within its chat template."""
  return {
    'tokenizer': '',
    'model.init': arg.init or BACKBONES[arg.model],
    # Each is one token of every tokenizer, which export as a sequence classifier needs too.
    'template.words': ('Yes', 'No'),
    'template.safe_words': ('Yes',),
    'template.unsafe_words': ('No',),
    'model.overrides.unroll': 1,
    'model.overrides.remat': 'dots',
    'model.overrides.dtype': 'auto',
    # A slice runs the paper's rate; a laptop's few steps need a higher one.
    'optim.lr': 5e-4 if arg.lora else 5e-7 if arg.mesh else 1e-5,
    'loss.gamma': 0.1,  # the paper's
    'data.batch_size': 8,
    'data.row_length': 768,
    'data.max_length': 384,
    'data.max_segments': 24,
    'eval.zero_shot': True,
  }


# A slice of TPUs, or nodes of GPUs: the paper's batch, in rows.
SLICE = {
  'data.batch_size': 128,
  'data.row_length': 2048,
  'data.max_length': 2048,
  'data.max_segments': 48,
}

# One epoch of the paper's mixture.
PAPER = {
  # 924 thousand examples and pairs; a row of 2,048 tokens holds about five, and more where they
  # share tokens.
  'num_steps': 1450,
  'optim.warmup_steps': 45,  # 3 % of the run; the paper names none
  'eval.fraction': 0.02,
  'eval.max_examples': 2000,
}

# Sets of judged texts -> (folder, weight in the mixture of groups). All may be used commercially.
REAL = {
  'rbr_gold': ('rbr_gold', 14.0),
  'pyrit_graded': ('pyrit_graded', 8.0),
  'xstest_response': ('guard_benchmarks', 5.0),
  'harmbench_response_val': ('guard_benchmarks', 2.0),
  'aegis_prompts_test': ('guard_benchmarks', 1.0),
  'diasafety': ('diasafety', 12.0),
  'jailbreak_judged': ('jailbreak_judged', 6.0),
  'moderation_judged': ('moderation', 8.0),
  'hatecheck': ('hatecheck', 8.0),
  'hatemoji': ('hatemoji', 8.0),
  'edos': ('edos', 12.0),
  'toxigen_human': ('toxigen_human', 10.0),
  'context_toxicity': ('context_toxicity', 2.0),
  'hazard_prompts': ('hazard_prompts', 4.0),
  'hh_rlhf': ('hh_rlhf/harmless-base-test-first1500.jsonl.gz', 4.0),
}
# These may not.
REAL_NC = {
  'xstest_judged': ('xstest', 5.0),
  'beavertails_test': ('guard_benchmarks', 5.0),
  'safe_rlhf_answers': ('guard_benchmarks', 4.0),
  'safe_rlhf_pairs': ('guard_benchmarks', 4.0),
}


def real_part(recipe, folder):
  """Returns the part of a recipe for judged texts."""
  sets = REAL | (REAL_NC if recipe == 'real_nc' else {})
  return {
    'title': 'Reward model of judged texts',
    'num_steps': 1200,
    'log_every': 20,
    'checkpoint_every': 200,
    'data.parts': {name: _part(name, w, folder / sub) for name, (sub, w) in sets.items()},
    'data.judged.sides': ('train',),
    # After 240 steps the loss was .58 with 3e-3, .67 with 1e-3, and .75 with 1e-3 and rules first.
    'template.order': 'conversation_first',
    'optim.lr': 2e-3,
    'data.group_size': 4,
    'data.batch_size': 16,
    'data.row_length': 1024,
    'data.max_length': 768,
    'data.max_segments': 48,
    'optim.warmup_steps': 40,
    'loss.gamma': 0.3,
    'eval.zero_shot': False,
    'eval.ruleworld_examples': 0,
    'eval.real.data_dir': str(folder),
  }


# The paper's ablations; ROWS has its names for them.
_NO_CCA = {'data.drop_prob': 0.0, 'data.plus_prob': 0.0, 'data.minus_prob': 0.0}
# Its pairs are read and have no loss, so that every run sees as many labelled examples.
_NO_SA = {'data.muted_pairs': ('strictness',)}
ABLATIONS = {
  'full': {},
  'no_cca': _NO_CCA,
  'no_sa': _NO_SA,
  'no_aug': _NO_CCA | _NO_SA,
  'rules_blind': {'data.rules_blind': True},
}
# A row of the paper -> the ablation that is this row. Its "−CCA" still has SA, alone; its "−SA" has
# neither SA nor CCA, so that it is what either alone is to be compared with.
ROWS = {'minus_cca': 'no_cca', 'minus_sa': 'no_aug', 'sa_alone': 'no_cca', 'cca_alone': 'no_sa'}

SMOKE = {
  'num_steps': 20,
  'log_every': 5,
  'checkpoint_every': 10,
  'optim.warmup_steps': 5,
  'eval.ruleworld_examples': lambda num: min(num, 60),
}


def sweep():
  """The ablations; launch/sweep.py adds the seeds."""
  return [{'name': name, 'arg': f'ablation={name}'} for name in ABLATIONS]
