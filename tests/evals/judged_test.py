"""The suite `real`: judges whose numbers are known, on texts that are made up."""

import json

import numpy as np
import pytest

from csrm_jax.data import judged
from csrm_jax.data.judged import Judged, Rule
from csrm_jax.data.sources import Rows
from csrm_jax.evals import bootstrap, judged as suite, metrics, questions, words
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig
from tests import small

NAMES = ('red', 'green', 'blue', 'loud', 'louder', 'secret')
RATES = (0.3, 0.5, 0.2, 0.4, 0.6, 0.3)


def make_rule(name, **fields):
  words = [Category(f'{name} {i}', f'Nothing {name} is said, wording {i}.') for i in range(4)]
  return Rule(f'made/{name}', tuple(words[:2]), tuple(words[2:]), **fields)


RULES = {
  f'made/{name}': make_rule(
    name,
    unseen={'secret': 'always', 'blue': '0', 'green': '0'}.get(name, ''),
    stricter=('made/louder',) if name == 'loud' else (),
  )
  for name in NAMES
}


def make_items(num=300, seed=0):
  rng = np.random.default_rng(seed)
  items = Rows()
  for i in range(num):
    broken = dict(zip(NAMES, rng.random(len(NAMES)) < RATES, strict=True))
    broken['louder'] |= broken['loud']  # what is loud is louder than allowed
    said = ' '.join(name for name in NAMES if broken[name]) or 'nothing'
    talk = (Message('user', f'question {i // 2}'), Message('agent', f'{said} {i}'))
    verdicts = {f'made/{name}': float(broken[name]) for name in NAMES}
    items.append(Judged(f't{i}', talk, verdicts, f'question {i // 2}', 'made'))
  return items


def make_pairs(num=200):
  safety = SafetyConfig((Category('Red', 'Nothing red is said.'),), 'made/red')
  pairs = []
  for i in range(num):
    sides = [
      Example(
        f'{i}/{kind}',
        safety,
        (Message('user', f'pair {i}'), Message('agent', text)),
        rule_set='made/red',
      )
      for kind, text in (('safer', 'calm words'), ('other', 'red words'))
    ]
    pairs.append(Pair(f'p{i}', *sides, 'preference'))
  return pairs


ITEMS = make_items()


def run(score, items=ITEMS, **fields):
  options = {
    'side': 'test',
    'num_samples': 0,
    'max_rows': 0,
    'known': lambda _: RULES,
    'with_words': False,
  }
  return suite.evaluate_judged(score, {'made': items}, **(options | fields))


def truth(examples):
  """The scores of a judge that is right and sure."""
  return np.array([-4.0 if e.label == 'unsafe' else 4.0 for e in examples])


def of_rule(examples):
  """The scores of a judge that knows the rule and not the text."""
  order = {f'made/{name}': i for i, name in enumerate(NAMES)}
  return np.array([float(order.get(e.rule_set, 0)) for e in examples])


def value(out, split, judge, metric, name='made'):
  return out['sets'][name]['numbers'][split][judge][metric]['value']


def test_a_perfect_judge_is_perfect_and_words_nearly_so():
  out = run(truth, with_words=True)
  for split in ('seen', 'unseen', 'seen, held words'):
    assert value(out, split, 'model', 'auroc') == 1
    assert value(out, split, 'model', 'auprc') == 1
    assert value(out, split, 'model', 'f1') == 1
    assert value(out, split, 'model', 'brier') < 0.001
  for split in ('seen', 'mixed'):
    assert value(out, split, 'model', 'flip') == 1
  assert value(out, 'levels', 'model', 'monotone') == 1
  assert value(out, 'seen', 'tfidf', 'auroc') > 0.95
  # Words of a rule that nobody trained on say nothing, so nothing is said.
  assert 'tfidf' not in out['sets']['made']['numbers']['unseen']


def test_a_judge_that_knows_the_rule_only_has_half_of_the_flips_and_of_auroc():
  out = run(of_rule, with_words=True)
  for judge in ('model', 'text_blind'):
    for split in ('seen', 'mixed'):
      assert value(out, split, judge, 'flip') == 0.5
    assert value(out, 'seen', judge, 'auroc') == 0.5
  # Without the balance it would have more, since rules differ in their rate.
  assert value(out, 'seen', 'rule_blind', 'flip') == 0.5


def test_the_base_rate_is_calibrated_and_ranks_nothing():
  out = run(lambda examples: np.zeros(len(examples)), with_words=True)
  assert value(out, 'seen', 'base_rate', 'auroc') == 0.5
  assert value(out, 'seen', 'base_rate', 'smece_pooled') < 0.05
  assert value(out, 'seen', 'model', 'smece_pooled') == pytest.approx(
    abs(0.5 - out['sets']['made']['counts']['seen']['unsafe']), abs=0.01
  )


def test_flips_of_one_direction_are_left_out():
  asked = questions.ask('made', ITEMS, RULES)
  flips = suite.flips_of(asked)
  wins = flips.wins(np.zeros(len(asked)))
  both = (np.bincount(flips.column).reshape(-1, 2) > 0).all(1)[flips.kinds == 0]
  # "loud" lies within "louder": no text breaks the first and keeps the second.
  assert 0 < both.sum() < len(both)
  assert suite.balanced_flip(wins, flips.column, flips.sets) == 0.5


def test_intervals_over_prompts_are_wider_than_over_rows():
  asked = questions.ask('made', ITEMS, RULES)
  labels = metrics.labels_of([q.example for q in asked])
  groups = np.unique([q.group for q in asked], return_inverse=True)[1]
  # What is guessed of a prompt is the same for all of its rows.
  p = np.random.default_rng(0).random(groups.max() + 1)[groups]
  by_row, by_group = (
    np.ptp(bootstrap.interval(metrics.brier, (labels, p), units)) for units in (None, groups)
  )
  assert by_group > 1.3 * by_row


def test_questions_are_the_same_each_time_and_capped_by_text():
  first, again = (
    questions.ask('made', items, RULES, max_rows=20) for items in (ITEMS, ITEMS[::-1])
  )
  assert [q.example for q in first] == [q.example for q in again]
  assert len(first) == 20 * len(RULES)
  assert len({q.text for q in first}) == 20  # all rules are asked of the same texts
  held = np.mean([q.is_held for q in first])
  assert 0.3 < held < 0.7
  # Rules within each other are asked in words of one kind.
  kinds = {(q.text, q.rules[0]): q.is_held for q in first}
  assert all(kinds[t, 'made/loud'] == kinds[t, 'made/louder'] for t in {q.text for q in first})


def test_sides_share_no_prompt_and_folds_only_move_rules():
  sides = {s: questions.on_side(ITEMS, RULES, s) for s in judged.SIDES}
  assert sum(map(len, sides.values())) == len(ITEMS)
  groups = [{item.group for item in items} for items in sides.values()]
  assert not set.intersection(*groups[:2]) and not set.intersection(*groups[1:])
  assert questions.num_shared(questions.ask('made', sides['test'], RULES), sides['train']) == 0
  repeated = questions.ask('made', sides['train'][:10], RULES)
  assert questions.num_shared(repeated, sides['train']) == 10
  plain, fold = (run(truth, fold=fold) for fold in ('', '0'))
  assert plain['questions'] == fold['questions']
  assert (
    plain['sets']['made']['counts']['seen']['rules'],
    fold['sets']['made']['counts']['seen']['rules'],
  ) == (5, 3)
  others = run(truth, trained=())['sets']['made']
  assert 'seen' not in others['counts'] and others['counts']['unseen']['rules'] == len(RULES)
  # Texts of sets that no run trains on are all for tests.
  never = {key: rule for key, rule in RULES.items() if rule.unseen == 'always'}
  items = [
    Judged(i.id, i.conversation, dict.fromkeys(never, 1.0), i.group, i.source) for i in ITEMS
  ]
  assert not questions.on_side(items, never, 'train')
  assert len(questions.on_side(items, never, 'test')) > 0.8 * len(items)


def test_unions_are_unsafe_where_one_rule_is_broken():
  asked = questions.ask('made', ITEMS, RULES, num_unions=30, union_texts=3)
  unions = [q for q in asked if q.part == questions.UNION]
  assert len(unions) == 30 * 3
  by_id = {f'made/{item.id}': item for item in ITEMS}
  for q in unions:
    assert len(q.example.safety.categories) == len(q.rules) in questions.UNION_SIZES
    broken = any(by_id[q.text].verdicts[key] for key in q.rules)
    assert (q.example.label == 'unsafe') == broken
  p = np.array([float(q.example.label == 'unsafe') for q in asked])
  own = suite.own_or(asked, p)
  rows = [i for i, q in enumerate(asked) if q.part == questions.UNION]
  assert np.array_equal(own[rows], p[rows])


def test_rules_of_few_texts_are_not_ranked_but_counted():
  items = [
    Judged(
      i.id,
      i.conversation,
      {'made/red': i.verdicts['made/red'], 'made/loud': float(n == 3)},
      i.group,
      'made',
    )
    for n, i in enumerate(ITEMS)
  ]
  asked = questions.ask('made', items, RULES)
  assert suite.counts(asked)['seen']['rules_too_rare'] == 1
  found = suite.measure(asked, np.full(len(asked), 0.25))
  assert found['seen']['auroc']['value'] == 0.5


def test_pairs_are_counted_by_side():
  pairs = make_pairs()
  out = run(
    lambda examples: np.array([float('calm' in e.conversation[-1].content) for e in examples]),
    pairs,
    with_words=True,
  )
  assert value(out, 'pairs', 'model', 'accuracy') == 1
  assert value(out, 'pairs', 'tfidf', 'accuracy') == 1
  assert (
    value(run(lambda examples: np.zeros(len(examples)), pairs), 'pairs', 'model', 'accuracy') == 0
  )


def test_a_report_is_written_and_several_are_averaged(tmp_path, capsys):
  rng = np.random.default_rng(0)
  calls = []

  def score(examples):
    calls.append(len(examples))
    return truth(examples) + rng.normal(0, 5, len(examples))

  for seed in range(3):
    out = run(
      score,
      [*ITEMS, *make_pairs()],
      out_dir=tmp_path / str(seed),
      num_samples=4,
      with_words=not seed,
    )
    assert (
      json.loads((tmp_path / str(seed) / 'real.json').read_text())['side'] == out['side'] == 'test'
    )
  assert len(calls) == 6  # a run asks its questions, then caught violations with words around them
  rows = [json.loads(line) for line in (tmp_path / '0' / 'scores.jsonl').read_text().splitlines()]
  assert len(rows) == out['num_questions'] == calls[0]
  assert not any('question' in row['id'] or 'conversation' in row for row in rows)
  text = (tmp_path / '0' / 'real.md').read_text()
  assert '**seen, held words**' in text and '| tfidf |' in text
  cell = out['sets']['made']['numbers']['seen']['model']['auroc']
  assert cell['low'] < cell['value'] < cell['high']
  suite.main([str(tmp_path / str(seed)) for seed in range(3)])
  assert 'balanced flip, seen rules' in capsys.readouterr().out
  runs = [json.loads((tmp_path / str(seed) / 'real.json').read_text()) for seed in range(3)]
  both = suite.aggregate(runs)['sets']['made']['numbers']['seen']['model']['auroc']
  values = [value(run_, 'seen', 'model', 'auroc') for run_ in runs]
  assert both['value'] == pytest.approx(np.mean(values))
  assert both['low'] < min(values) and max(values) < both['high']
  runs[1]['questions'] = 'others'
  assert 'differ' in small.error_of(suite.aggregate, runs)


def test_bad_input_is_one_line():
  assert 'no rule of the set' in small.error_of(
    questions.ask, 'made', [Judged('a', ITEMS[0].conversation, {'made/x': 1.0}, 'g', 'made')], RULES
  )
  assert 'finite' in small.error_of(run, lambda examples: np.full(len(examples), np.nan))
  assert 'side' in small.error_of(run, truth, side='train')
  assert 'no judged texts' in small.error_of(run, truth, items=[])


def test_judges_of_words_are_fitted_on_training_texts_only():
  train = questions.on_side(ITEMS, RULES, 'train')
  seen = {key for key, rule in RULES.items() if rule.is_seen('0')}
  asked = questions.ask('made', questions.on_side(ITEMS, RULES, 'test'), RULES, seen=seen)
  found = words.judge(asked, train, seen)
  assert set(found) == set(words.JUDGES)
  known = np.array([q.is_seen for q in asked])
  assert np.isnan(found['tfidf'][~known]).all() and not np.isnan(found['tfidf'][known]).any()
  for q, p in zip(asked, found['text_blind'], strict=True):
    if q.rules == ('made/red',):
      assert p == pytest.approx(np.mean([item.verdicts['made/red'] for item in train]))
