"""What a run says about people's own data before it trains."""

import ml_collections
import pytest

from csrm_jax import config as config_lib
from csrm_jax.core import checks
from csrm_jax.data import sources
from csrm_jax.ruleworld import examples
from csrm_jax.runners import train_rm
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from csrm_jax.text import tokenizer as tokenizer_lib

RM = config_lib.load_module('configs/rm.py')


def foreign(num):
  rules = SafetyConfig((Category('Funds', 'Never recommend securities to customers.'),))
  talk = Message('user', 'Which fund should I buy?'), Message('agent', 'Buy the red one.')
  return [Example(f'{i}', rules, talk, 'unsafe') for i in range(num)]


def test_a_model_that_does_not_know_the_words_is_named_before_training(capsys):
  checks.note.cache_clear()
  tokenizer = tokenizer_lib.load_tokenizer(RM.common.TOKENIZER)
  own = [examples.training_example(0, i) for i in range(50)]
  train_rm._say_unknown_words({'own': own}, tokenizer)
  assert capsys.readouterr().err == ''
  train_rm._say_unknown_words({'file': foreign(50)}, tokenizer)
  said = capsys.readouterr().err
  assert "words of 'file' are unknown" in said and 'model=smollm2_135m' in said


def config(**fields):
  made = ml_collections.ConfigDict(RM.get_config('data=auto,path=x'))
  made.update(fields)
  return made


def test_epochs_give_the_steps_and_too_many_passes_are_named(capsys):
  checks.note.cache_clear()
  parts = {'file': foreign(40)}
  found = train_rm._count_epochs(config(epochs=3.0), parts, rate=16.0)
  assert (found.num_steps, found.optim.warmup_steps) == (8, 0)  # 3 * 40 / 16, rounded up
  assert 'times' not in capsys.readouterr().err
  found = train_rm._count_epochs(config(), parts, rate=16.0)
  assert found.num_steps == 500
  assert "500 steps pass the 40 rows of 'file' 200 times" in capsys.readouterr().err
  generated = {'file': sources.Generated(examples.training_example, 0)}
  with pytest.raises(ValueError, match='give num_steps'):
    train_rm._count_epochs(config(epochs=1.0), generated, rate=16.0)
  assert sources.num_shared(foreign(3), foreign(1)) == 3
