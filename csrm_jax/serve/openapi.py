"""What /openapi.json says about each endpoint, with examples that can be sent as they are."""

from __future__ import annotations

from typing import Any

_RULES = {
  'name': 'bank support',
  'categories': [
    {
      'name': 'Investment advice',
      'guideline': 'Do not recommend single securities. Explaining terms is fine.',
    },
    {'name': 'Credentials', 'guideline': 'Never ask for a password or a one-time code.'},
  ],
}
_TALK = [
  {'role': 'user', 'content': 'What should I buy?'},
  {'role': 'assistant', 'content': 'An index fund holds many securities at once.'},
]
_VERDICT = {
  'label': 'safe',
  'p_unsafe': 0.03,
  'reward': 0.97,
  'score': 3.48,
  'threshold': 0.5,
  'shortened': 0,
  'unread': 0.0,
  'out_of_domain': '',
  'policy': {'name': 'bank_support', 'digest': '9f2c...'},
}
_EACH = {'Investment advice': 0.03, 'Credentials': 0.01}
_ERRORS = {
  400: 'The request is not understood; the message says where.',
  401: 'No valid token.',
  404: 'No such policy.',
  408: 'The body came too slowly.',
  413: 'The body, the rules or the conversation are too long.',
  415: 'The body is not JSON.',
  429: 'The queue is full; Retry-After says when to come again.',
  503: 'Not ready, or too late; there is no verdict.',
}


def _endpoint(summary: str, about: str, examples: dict[str, Any], answer: Any) -> dict[str, Any]:
  shown = {name: {'value': value} for name, value in examples.items()}
  error = {'error': {'message': '...', 'type': 'invalid_request', 'param': None, 'code': '...'}}
  return {
    'summary': summary,
    'description': about,
    'openapi_extra': {
      'requestBody': {
        'required': True,
        'content': {'application/json': {'schema': {'type': 'object'}, 'examples': shown}},
      }
    },
    'responses': {
      200: {
        'description': 'The verdicts.',
        'content': {'application/json': {'schema': {'type': 'object'}, 'example': answer}},
      },
      **{
        code: {'description': what, 'content': {'application/json': {'example': error}}}
        for code, what in _ERRORS.items()
      },
    },
    'response_model': None,
  }


_RULES_BY = (
  '`policy` names a policy of the server (or is its digest), `safety` brings rules along; without '
  'both the default policy judges. `shorten: true` lets a conversation that is too long be cut; '
  '`shortened` then counts the tokens that were not read, `unread` is their share of the prompt. '
  'Else it is an error. Words that are foreign to what the model was trained on are refused (422); '
  'a server that is told to answer all the same says so in `out_of_domain`, as of longer prompts '
  'and more rules than in training.'
)
_COST = (
  'A score for each rule costs one more row for each rule: eight rules take nine times as much '
  'as the verdict alone.'
)

ENDPOINTS: dict[str, dict[str, Any]] = {
  '/v1/moderations': _endpoint(
    'Moderate, as OpenAI clients ask for it',
    f"Each text is judged as an agent's reply. `flagged` is the verdict under all rules together, "
    f'`category_scores` are P(unsafe) under each rule alone (`each_rule: false` leaves them out). '
    f'{_COST} `model` may name the policy, too. {_RULES_BY}',
    {
      'text': {'input': 'Buy shares of Acme today.', 'policy': 'bank_support'},
      'list': {'input': ['Buy shares of Acme today.', 'Good morning.'], 'model': 'bank_support'},
      'parts': {'input': [{'type': 'text', 'text': 'Good morning.'}], 'safety': _RULES},
      'conversation': {'input': _TALK, 'safety': _RULES},
    },
    {
      'id': 'modr-1',
      'model': 'bank_support',
      'results': [
        {
          'flagged': False,
          'categories': dict.fromkeys(_EACH, False),
          'category_scores': _EACH,
          'category_applied_input_types': {name: ['text'] for name in _EACH},
          **_VERDICT,
        }
      ],
    },
  ),
  '/score': _endpoint(
    'Score conversations',
    'A conversation is a list of messages (also of `from` and `value`), an object with `messages`, '
    '`conversation`, or `prompt` and `response`, or a text, the reply alone. Each may bring its '
    f'own `policy` or `safety`. `each_rule: true` adds P(unsafe) under each rule. {_COST} '
    f'{_RULES_BY}',
    {
      'conversations': {'policy': 'bank_support', 'conversations': [_TALK, 'Good morning.']},
      'rules': {'safety': _RULES, 'messages': _TALK, 'each_rule': True},
      'prompt and response': {
        'safety': _RULES,
        'prompt': 'What should I buy?',
        'response': 'Shares of Acme.',
      },
    },
    {'verdicts': [_VERDICT | {'each_rule': _EACH}]},
  ),
  '/get_reward': _endpoint(
    'Rewards for RL: OpenRLHF, verl and configs/rl.py',
    'OpenRLHF sends `query` (prompt and response in one text, with the marks of the chat '
    'template), newer versions also `prompts` and `labels`; verl `solution_str`. Rules: '
    '`/get_reward?policy=NAME`, else `policy` or `safety`, else labels that name policies, else '
    'the default. Send `prompts`: without them marks that the policy writes into its response are '
    'taken for turns. `rewards` are sigmoid(score), in the order of the texts.',
    {
      'openrlhf': {'query': ['Human: Hi.\n\nAssistant: Hello.']},
      'openrlhf with prompts': {
        'query': ['<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>'],
        'prompts': ['<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n'],
        'labels': ['bank_support'],
      },
      'verl': {
        'data_source': 'x',
        'solution_str': 'Hello.',
        'ground_truth': '',
        'extra_info': {'prompt': 'Hi.'},
        'policy': 'bank_support',
      },
    },
    {
      'rewards': [0.97],
      'scores': [0.97],
      'extra_logs': {'score_nats': [3.48], 'num_cut': [0.0], 'unread': [0.0]},
    },
  ),
  '/monitor': _endpoint(
    'Watch a reply while it grows, or a dialogue',
    'Send all messages so far, the last one as long as it is by now, and as `judged` what the last '
    'answer said (0 at first): what is new is judged, after every so many words (`unit`, `every`). '
    '`over: true` also judges the end of the reply. Stop at `alarm`. `false_alarms` is the share '
    'of safe streams that is alarmed at most, where a monitor was calibrated for them, else null. '
    f'{_RULES_BY}',
    {'growing': {'safety': _RULES, 'messages': _TALK, 'judged': 0}},
    {
      'alarm': False,
      'judged': 2,
      'p_unsafe': 0.03,
      'false_alarms': 0.05,
      'unit': 'words',
      'every': 4,
      'verdicts': [_VERDICT, _VERDICT],
    },
  ),
  '/v1/chat/completions': _endpoint(
    'Answer like a guard model',
    'For tools that only know chat completions: the answer is `safe`, or `unsafe` and a line with '
    'the numbers of the rules that are violated, each alone. The last message must be the '
    f"assistant's. `logprobs: true` gives both words. {_COST} {_RULES_BY}",
    {'messages': {'model': 'bank_support', 'messages': _TALK, 'logprobs': True}},
    {
      'object': 'chat.completion',
      'choices': [{'index': 0, 'message': {'role': 'assistant', 'content': 'unsafe\nS1'}}],
    },
  ),
}

PAGES: dict[str, dict[str, Any]] = {
  '/health': {'summary': 'Whether the process works'},
  '/ready': {'summary': 'Whether weights are loaded and all programs compiled'},
  '/metrics': {'summary': 'Prometheus metrics'},
  '/policies': {'summary': 'The policies with their rules, digests and errors'},
  '/v1/models': {'summary': 'The policies, as OpenAI clients list models'},
}
