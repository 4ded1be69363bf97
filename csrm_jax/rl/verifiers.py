r"""AlphaAlign: is an output well formed, does it refuse, and what is it worth?

An output is <safety_reasoning>...</safety_reasoning><answer>...</answer>. The answer refuses an
unsafe request, for example with \boxed{Sorry, I cannot help.}

V_f (is the output well formed?) is `format_reward`. V_r (does the answer refuse?) is found in one
of three ways: by patterns, by patterns within \boxed{} only, or by a reward model that judges the
answer under rules which forbid to refuse (configs/safety/refusal.yaml).

`dual_reward` combines them. For a harmful prompt it is R_s = r_f V_f + r_a V_r. For a benign prompt
it is R_s = r_f V_f - r_a V_r, plus R_h = max(standardised helpfulness, 0) where the answer does not
refuse. Helpfulness is standardised among the samples of one prompt.

Source: AlphaAlign (arXiv 2507.14987).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from csrm_jax.reward import scoring
from csrm_jax.rl import rewards
from csrm_jax.safety import schema
from csrm_jax.safety.schema import RewardFn, Sample

# samples, whose text is the answer alone -> bool [N]
RefusalFn = Callable[[Sequence[Sample]], np.ndarray]

# How helpfulness counts: standardised within the prompt's group; raw (the ablation without
# standardisation); or not at all, so that R_s is the whole reward (AlphaAlign-Zero, the ablation
# without R_h).
HELPFULNESS = ('standardised', 'raw', 'none')

REASONING, ANSWER = 'safety_reasoning', 'answer'
_TAG = re.compile(rf'</?(?:{REASONING}|{ANSWER})>')
_TAGS = [f'<{REASONING}>', f'</{REASONING}>', f'<{ANSWER}>', f'</{ANSWER}>']
_BOXED = re.compile(r'\\boxed\s*\{')
# Models write typographic apostrophes too; the patterns have plain ones.
_QUOTES = str.maketrans({'\u2019': "'", '\u2018': "'", '\u02bc': "'"})
_SENTENCE = re.compile(r'(?<=[.!?])\s+|\n\s*')
_NUM_SENTENCES = 2
# How an answer declines, in lower case: directly, or by judging the request instead of answering
# it. The lookahead lets answers pass that help: "I cannot wait", "I cannot stress enough".
_DECLINES = re.compile(
  '|'.join(
    [
      r"\b(?:i|we)(?:'m| am)?(?: \w+)? (?:can't|cannot|can not|won't|will not|"
      r'(?:must |have to )?decline|refuse|not able|unable)\b'
      r'(?! (?:wait|stress|emphasi[sz]e|imagine|think|help but)\b)',
      r"\b(?:do not|don't|cannot|can't) (?:condone|promote|feel comfortable)\b",
      r'\b(?:sorry|apologi[sz]e|apologies)\b[^.!?]{0,20},? but\b',
      r"\b(?:not|never|isn't|don't think it's|don't think it is) (?:\w+ ){0,3}"
      r'(?:appropriate|ethical|acceptable)\b',
      r'\bi must clarify\b',
      r'\b(?:goes|go|is) against my\b',
      r'\bnot within my\b',
    ]
  )
)


@dataclasses.dataclass(frozen=True)
class Output:
  """The two parts of a well-formed output, without space around them."""

  reasoning: str
  answer: str


def parse(text: str) -> Output | None:
  """Returns the parts of an output, or None if it is not well formed.

  A well-formed output has each of the four tags once and in order, nothing but white space outside
  the two parts, and no empty part.
  """
  if _TAG.findall(text) != _TAGS:
    return None
  before, reasoning, between, answer, after = _TAG.split(text)
  parts = Output(reasoning.strip(), answer.strip())
  if before.strip() or between.strip() or after.strip():
    return None
  return parts if parts.reasoning and parts.answer else None


def format_reward(samples: Sequence[Sample]) -> np.ndarray:
  """Returns V_f: 1 where the output is well formed, else 0."""
  return np.array([parse(s.text) is not None for s in samples], np.float32)


def answer_of(text: str) -> str:
  """Returns the answer; for an output that is not well formed, what a reader would take for it.

  That is the text after the last <answer>, or else after the last </safety_reasoning>.
  """
  parts = parse(text)
  if parts is not None:
    return parts.answer
  tag = f'<{ANSWER}>' if f'<{ANSWER}>' in text else f'</{REASONING}>'
  return _TAG.sub(' ', text.rpartition(tag)[2]).strip()


def boxed(text: str) -> str | None:
  r"""Returns what the first \boxed{...} holds, or None; braces inside it are balanced."""
  span = _boxed_span(text)
  return text[span[1] : span[2]].strip() if span else None


def unboxed(text: str) -> str:
  r"""Returns the text as a reader sees it: the first \boxed{...} without its box."""
  span = _boxed_span(text)
  if span is None:
    return text
  start, inner, end = span
  return (text[:start] + text[inner:end] + text[end + 1 :]).strip()


def is_refusal(text: str) -> bool:
  r"""Returns V_r by patterns: whether an answer declines what was asked.

  Only the first sentences count: an answer that helps first and then says what it cannot do is no
  refusal, but one that declines and then does what was asked is one. The patterns are English and
  see words, not meaning; `refusals` measures how often they are right. \boxed{} is looked into.
  """
  text = _BOXED.sub(' ', text).translate(_QUOTES)
  start = ' '.join(_SENTENCE.split(text.strip())[:_NUM_SENTENCES]).casefold()
  return bool(_DECLINES.search(' '.join(start.split())))


def is_boxed_refusal(text: str) -> bool:
  r"""Returns whether the answer has a \boxed{} that holds a refusal."""
  held = boxed(text)
  return held is not None and is_refusal(held)


def by_text(is_refusal_fn: Callable[[str], bool]) -> RefusalFn:
  """Returns V_r of samples from a function of one answer's text."""

  def refuses(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([is_refusal_fn(s.text) for s in samples], bool)

  return refuses


def by_score(score_fn: scoring.ScoreFn, safety: schema.SafetyConfig) -> RefusalFn:
  """Returns V_r by a reward model: an answer that it calls unsafe under `safety` refuses.

  `safety` holds rules that refusals violate, and nothing else.
  """

  def refuses(samples: Sequence[Sample]) -> np.ndarray:
    examples = [
      dataclasses.replace(dataclasses.replace(s, text=unboxed(s.text)).example(), safety=safety)
      for s in samples
    ]
    verdicts = scoring.verdicts(score_fn(examples))
    return np.array([v.label == 'unsafe' for v in verdicts], bool)

  return refuses


REFUSALS: dict[str, RefusalFn] = {
  'patterns': by_text(is_refusal),
  'boxed': by_text(is_boxed_refusal),
}


def _boxed_span(text: str) -> tuple[int, int, int] | None:
  """Returns where the first box begins, where its content begins, and where that ends."""
  start = _BOXED.search(text)
  if start is None:
    return None
  depth = 1
  for place in range(start.end(), len(text)):
    depth += {'{': 1, '}': -1}.get(text[place], 0)
    if not depth:
      return start.start(), start.end(), place
  return None


def dual_reward(
  refusal_fn: RefusalFn,
  helpfulness_fn: RewardFn | None,
  helpfulness: str,
  format_weight: float,
  answer_weight: float,
) -> rewards.TotalFn:
  """Returns a function: samples -> (total, parts), as `rewards.combine` does.

  Parts are 'format' (V_f), 'refusal' (V_r), 'safety' (R_s), and 'helpfulness' (R_h; 0 for harmful
  prompts) unless it is left out. Refusal and helpfulness are judged by the answer alone, without
  its box for helpfulness. All samples of a prompt must be in one call.

  Args:
    refusal_fn: V_r.
    helpfulness_fn: Judges the answers to benign prompts; None with helpfulness='none'.
    helpfulness: One of HELPFULNESS.
    format_weight: r_f.
    answer_weight: r_a.
  """
  if helpfulness not in HELPFULNESS:
    raise ValueError(f'unknown helpfulness {helpfulness!r}; use one of {", ".join(HELPFULNESS)}')
  if (helpfulness == 'none') != (helpfulness_fn is None):
    raise ValueError(
      f'helpfulness is {helpfulness!r}, and '
      + ('there is no' if helpfulness_fn is None else 'there is a')
      + ' helpfulness reward; give one, or "none" without'
    )
  for name, weight in (('format', format_weight), ('answer', answer_weight)):
    if not (math.isfinite(weight) and weight > 0):
      raise ValueError(f'the {name} weight of AlphaAlign is {weight}; it must be above 0')

  def score(samples: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    benign = np.array([_is_benign(s) for s in samples], bool)
    answers = [dataclasses.replace(s, text=answer_of(s.text)) for s in samples]
    form = format_reward(samples)
    refuses = np.asarray(refusal_fn(answers))
    if refuses.shape != benign.shape or refuses.dtype != bool:
      raise ValueError(
        f'V_r gives {refuses.dtype} {list(refuses.shape)} for {len(samples)} '
        'samples; it must give one bool each'
      )
    refusal = refuses.astype(np.float32)
    safety = np.float32(format_weight) * form + np.float32(answer_weight) * np.where(
      benign, -refusal, refusal
    )
    parts = {'format': form, 'refusal': refusal, 'safety': safety}
    if helpfulness == 'none':
      return safety, parts
    chosen = np.flatnonzero(benign)
    asked = [dataclasses.replace(answers[i], text=unboxed(answers[i].text)) for i in chosen]
    help_ = rewards.check_rewards(helpfulness_fn(asked), asked, 'helpfulness')
    if helpfulness == 'standardised':
      help_ = np.maximum(standardise(help_, asked), 0)
    parts['helpfulness'] = np.zeros(len(samples), np.float32)
    parts['helpfulness'][chosen] = help_ * (1 - refusal[chosen])
    return safety + parts['helpfulness'], parts

  return score


def standardise(values: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
  """Returns (value - mean) / std within each prompt's samples, float32 [N].

  It is 0 where all values of a group are equal. A prompt with one sample is a ValueError.
  """
  values = np.asarray(values, np.float64)
  result = np.zeros(len(samples), np.float32)
  groups = collections.defaultdict(list)
  for row, sample in enumerate(samples):
    groups[sample.prompt.id].append(row)
  for name, rows in groups.items():
    if len(rows) == 1:
      raise ValueError(
        f'prompt {name} has one sample, and nothing to standardise its '
        'helpfulness with; set num_generations to 2 or more'
      )
    group = values[rows]
    if np.ptp(group) > 0:
      result[rows] = (group - group.mean()) / group.std()
  return result


def _is_benign(sample: Sample) -> bool:
  if not sample.prompt.label:
    raise ValueError(
      f'prompt {sample.prompt.id} has no label; AlphaAlign needs "harmful" '
      'or "benign" on every prompt'
    )
  return sample.prompt.label == 'benign'
