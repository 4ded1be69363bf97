"""What travels with exported weights, so that others ask for verdicts as they were trained.

The field `csrm_jax` of config.json (of a .gguf file's metadata, or the file csrm_jax.json beside
adapters) has the layout, the verdict words and their tokens, calibration, threshold and default
rules. The prompt itself goes as chat template; see safety.jinja.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from csrm_jax.core import files
from csrm_jax.data import features
from csrm_jax.evals.metrics import Calibration
from csrm_jax.models import hf, lora
from csrm_jax.safety import jinja, schema, templates
from csrm_jax.text import chat, tokenizer as tokenizer_lib

KEY = 'csrm_jax'
FILE = 'csrm_jax.json'
TEMPLATE_FILE = 'chat_template.jinja'


class Export(NamedTuple):
  """What an exported model is asked with."""

  spec: Mapping[str, Any]  # reward.model.Spec as a dict
  tokenizer: tokenizer_lib.Tokenizer
  layout: templates.Layout
  verbalizers: templates.Verbalizers
  threshold: float  # P(unsafe), after calibration, from which on a response is flagged
  calibration: Calibration | None
  rules: schema.SafetyConfig | None  # judge where a caller gives none

  def fields(self) -> dict[str, Any]:
    """Returns what stands under KEY."""
    tokens = {
      label: {
        'words': list(self.spec[f'{label}_words']),
        'token_ids': list(getattr(self.verbalizers, label)),
      }
      for label in schema.LABELS
    }
    return {
      'spec': self.spec,
      'verdict': tokens,
      'threshold': self.threshold,
      'calibration': self.calibration and self.calibration.to_dict(),
      'safety': self.rules and self.rules.to_dict(),
    }

  def classifier_fields(self) -> dict[str, Any]:
    """Returns the fields of config.json by which vLLM makes a classifier of a causal model.

    With one token for each label the class is "safe" and its probability the reward. Else each
    token is a class, and P(safe) the sum of the first ones.

    Source: vllm/model_executor/models/adapters.py.
    """
    safe, unsafe = self.verbalizers.safe, self.verbalizers.unsafe
    if len(safe) == len(unsafe) == 1:
      ids, method, labels = (*unsafe, *safe), 'from_2_way_softmax', ['safe']
    else:
      ids, method = (*safe, *unsafe), 'no_post_processing'
      labels = [f'{name} {i}' for name, n in (('safe', safe), ('unsafe', unsafe)) for i in n]
    return {
      'classifier_from_token': [self.tokenizer.piece(i) for i in ids],
      'method': method,
      'id2label': {str(i): label for i, label in enumerate(labels)},
      'label2id': {label: i for i, label in enumerate(labels)},
    }

  def chat_template(self, tokenizer_file: pathlib.Path, for_llama_cpp: bool = False) -> str:
    """Returns the chat template, whose tokens are those of the encoder; see safety.jinja.

    Raises:
      ValueError: The tokenizer reads a rendered prompt otherwise than it was trained on.
    """
    # Some tokenizers open plain text with a space, which the layout has and text must not.
    openings = ('', ' ') if self.tokenizer.opens_with_space else ('',)
    talk = schema.parse_conversation(_MESSAGES)
    segments = templates.render(_RULES, talk, self.layout)
    want = features.encode_prompt(segments, self.tokenizer, 1_000_000)[0].tolist()
    for opening in openings:
      template = jinja.chat_template(
        self.layout, self.tokenizer, self.rules, opening, for_llama_cpp
      )
      if tokenizer_file.suffix != '.json':
        return template
      text = chat.render(template, _MESSAGES, safety=_RULES.to_dict())
      if tokenizer_lib.parse_all(tokenizer_file, text) == want:
        return template
    raise ValueError(
      f'{tokenizer_file}: other programs would read the prompt as other tokens than the model was '
      'trained on; use the exported weights with csrm_jax only'
    )


_RULES = schema.SafetyConfig((schema.Category('A b', 'No c.'), schema.Category('D', 'E, 12.')))
_MESSAGES = (
  {'role': 'user', 'content': 'Hi!\n\n  there'},
  {'role': 'assistant', 'content': 'Well:\n- "yes" (12)\n'},
)


def read(source: hf.Source) -> dict[str, Any] | None:
  """Returns what stands under KEY in an exported folder or file; None for other models."""
  if is_adapter(source.path):
    path = source.path / FILE
    return files.read_json(path) if path.is_file() else None
  return source.spec.get(KEY)


def is_adapter(path: pathlib.Path) -> bool:
  """Returns whether a folder holds adapters in PEFT's form."""
  return (path / lora.CONFIG_FILE).is_file()


# --- The model card --------------------------------------------------------------------

_CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [safety, reward-model, guardrail, csrm_jax]
@license@---

# A safety reward model that reads the rules

It takes safety rules in natural language and a conversation, and says whether the last reply
complies: `score` = log P(safe) - log P(unsafe) in nats, `reward` = sigmoid(score), and a reply is
flagged where P(unsafe) = 1 - reward is at least @threshold@. The rules are part of every prompt,
and the chat template writes it as in training.

```python
rules = {"categories": [{"name": "Investment advice",
                         "guideline": "Do not recommend single securities."}]}
messages = [{"role": "user", "content": "What should I buy?"},
            {"role": "assistant", "content": "Shares of Acme."}]
```

@default@

## csrm_jax

```python
import csrm_jax
from csrm_jax.safety import schema
rm = csrm_jax.load("@name@")
print(rm.score(schema.parse_safety(rules, "rules"), [schema.parse_conversation(messages)]))
```
@usage@
## Limits

Prompts of more than @max_length@ tokens were not trained on. csrm_jax reads a longer response in
parts, and its verdicts say in `unread` what share of a prompt was not read; elsewhere nothing says
so: leave truncation off. Text that holds a control token of the tokenizer is refused by the
template (csrm_jax reads it as plain text). No verdict replaces a person's where much depends on
it.@calibration@
"""
_SCORE = """\
ids = tokenizer.apply_chat_template(messages, safety=rules, return_tensors="pt", return_dict=True)
log_p = model(**ids).logits[0, -1].log_softmax(-1)
score = log_p[@safe@].logsumexp(0) - log_p[@unsafe@].logsumexp(0)
"""
_TRANSFORMERS = {
  'causal_lm': """
## transformers

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("@name@")
model = AutoModelForCausalLM.from_pretrained("@name@")
"""
  + _SCORE
  + """```

## vLLM

```
vllm serve @name@ --runner pooling --hf-overrides '{"architectures": ["@classifier@"]}'
curl localhost:8000/classify -H 'Content-Type: application/json' -d '{"messages": [...],
  "chat_template_kwargs": {"safety": {"categories": [...]}}}'
```

@vllm@ As a chat model it answers `@word@` or the other word: send `"max_tokens": 1`.

## llama.cpp

Export with `form=gguf`, and send `"chat_template_kwargs": {"safety": ...}` to llama-server.
""",
  'sequence_classification': """
## transformers, TRL and vLLM

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("@name@")
model = AutoModelForSequenceClassification.from_pretrained("@name@")
ids = tokenizer.apply_chat_template(messages, safety=rules, return_tensors="pt", return_dict=True)
score = model(**ids).logits[0, 0]  # nats; above 0 is safe
```

TRL takes it as a reward model wherever prompts are rendered by this template, with the rules that
stand in it as defaults: export with `--config.safety=RULES`. `vllm serve @name@ --runner pooling`
gives sigmoid(score), the reward, at `/classify`.
""",
  'peft': """
## PEFT

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("@name@")
model = AutoPeftModelForCausalLM.from_pretrained("@name@")
"""
  + _SCORE
  + """```
""",
  'gguf': """
## llama.cpp

```
llama-server -m model.gguf --jinja --skip-chat-parsing --no-prefill-assistant
curl localhost:8080/v1/chat/completions -d '{"messages": [...], "max_tokens": 1, "logprobs": true,
  "top_logprobs": 20, "chat_template_kwargs": {"safety": {"categories": [...]}}}'
```

The template refuses what is no prompt of ours, but for a chat without rules that ends with a user,
which llama.cpp renders when it starts: its prompt is empty, and no answer to it is a verdict. The
first token is the verdict: P(safe) is what @words@ have of the probability of all of these.
""",
}
_TRL = """
## Reward of a trainer (TRL, Tunix; OpenRLHF and others are beside)

```python
from csrm_jax.integrations import judges, rewards
# or judges.remote(URL), of a server; a policy may write what the model has never seen
judge = judges.local("@name@", rules, allow_out_of_domain=True)
reward = rewards.make(judge)
GRPOTrainer(model=..., reward_funcs=reward, ...)
```
"""


def card(export: Export, form: str, name: str, architecture: str = '') -> str:
  """Returns README.md of an exported model: what it is, and how each program asks it."""
  verbalizers = export.verbalizers
  base = export.spec['base']
  license_ = f'license: other\nbase_model: {base}\n' if base else 'license: apache-2.0\n'
  is_single = len(verbalizers.safe) == len(verbalizers.unsafe) == 1
  fitted = export.calibration
  ids = (*verbalizers.safe, *verbalizers.unsafe)
  text = _CARD.replace('@usage@', _TRANSFORMERS[form] + _TRL)
  values = {
    'license': license_,
    'threshold': f'{export.threshold:g}',
    'default': (
      f'Without rules {len(export.rules.categories)} default rules judge: '
      f'{", ".join(export.rules.names)}.'
      if export.rules
      else 'There are no default rules: a prompt without rules is an error.'
    ),
    'name': name,
    'safe': list(verbalizers.safe),
    'unsafe': list(verbalizers.unsafe),
    'word': export.layout.words[0],
    'words': ', '.join(f'`{export.tokenizer.piece(i)}`' for i in verbalizers.safe)
    + ' out of '
    + ', '.join(f'`{export.tokenizer.piece(i)}`' for i in ids),
    'classifier': architecture.replace('CausalLM', 'SequenceClassification'),
    'vllm': 'The probability is the reward.'
    if is_single
    else f'P(safe) is the sum of the first {len(verbalizers.safe)} probabilities.',
    'max_length': export.spec['max_length'],
    'calibration': f' Calibrated scores are score / {fitted.temperature:.4g} + {fitted.bias:.4g}.'
    if fitted and fitted.applied
    else '',
  }
  for key, value in values.items():
    text = text.replace(f'@{key}@', str(value))
  return text
