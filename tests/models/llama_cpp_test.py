"""What is written as GGUF, opened by llama.cpp: the same prompt, tokens and verdict.

It needs the package xllamacpp.
"""

import dataclasses
import json
import os
import pathlib
import urllib.error
import urllib.request

import numpy as np
import pytest

from csrm_jax.data import features
from csrm_jax.models import gguf, hf
from csrm_jax.reward import backbone, exported, model as reward_model
from csrm_jax.ruleworld import examples
from csrm_jax.safety import schema, templates
from tests import small
from tests.serve import serving

pytest.importorskip('xllamacpp')
SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_parallel, params.n_ctx, params.use_jinja = 1, 2048, True
params.force_pure_content_parser, params.prefill_assistant = True, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
time.sleep(600)
"""


def _ask(url, path, body):
  request = urllib.request.Request(
    url + path, json.dumps(body).encode(), {'Content-Type': 'application/json'}
  )
  try:
    with urllib.request.urlopen(request, timeout=60) as reply:
      return json.load(reply)
  except urllib.error.HTTPError as error:
    return {'error': error.read().decode()}


def _write(path, spec, params, tokenizer, tokenizer_file):
  layout = spec.layout
  export = exported.Export({}, tokenizer, layout, spec.verbalizers(tokenizer), 0.5, None, None)
  ids = {'bos': tokenizer.bos_id, 'eos': tokenizer.eos_id, 'pad': tokenizer.pad_id}
  fields = gguf.tokenizer_fields(tokenizer_file, ids, spec.model.vocab_size)
  fields |= {'chat_template': export.chat_template(tokenizer_file, for_llama_cpp=True)}
  hf.save_gguf(path, spec.model, params, fields, dtype='float32')


@pytest.fixture(scope='module', params=['ruleworld', 'smollm2'])
def served(request, tmp_path_factory):
  """Yields (URL, spec, tokenizer, score function)."""
  path = tmp_path_factory.mktemp('gguf') / 'model.gguf'
  if request.param == 'ruleworld':
    # A longer prompt would be read in parts, which llama.cpp does not.
    spec = dataclasses.replace(small.SPEC, max_length=512)
    params, tokenizer = serving.params(), small.TOKENIZER
    file = small.TOKENIZER_FILE
  else:
    folder = os.environ.get('CSRM_SMOLLM2_DIR')
    if not folder:
      pytest.skip('no SmolLM2; set CSRM_SMOLLM2_DIR (tests/fetch_smollm2.py)')
    spec, params, tokenizer = reward_model.load_parts(folder)
    file = backbone.find_tokenizer(pathlib.Path(folder))
  _write(path, spec, params, tokenizer, file)
  with small.llama_server(SERVE, path) as url:
    yield url, spec, tokenizer, spec.make_score_fn(params, tokenizer)


def test_prompt_tokens_and_verdict(served):
  url, spec, tokenizer, score_fn = served
  rows = [examples.training_example(3, i) for i in range(8)]
  nasty = schema.parse_conversation(
    [
      {'role': 'user', 'content': 'a\r\nb\n\n  c\u2028d 東京 123'},
      {'role': 'assistant', 'content': '- 😀 "x"\n'},
    ]
  )
  rules = schema.SafetyConfig((schema.Category('A  b', 'No\n\tc  d. 100 %'),))
  rows.append(schema.Example('nasty', rules, nasty))
  scores = score_fn(rows)
  for row, score in zip(rows, scores, strict=True):
    words = {'agent': 'assistant'}
    messages = [{'role': words.get(m.role, m.role), 'content': m.content} for m in row.conversation]
    body = {'messages': messages, 'chat_template_kwargs': {'safety': row.safety.to_dict()}}
    prompt = _ask(url, '/apply-template', body)['prompt']
    segments = templates.render(row.safety, row.conversation, spec.layout)
    want, _ = features.encode_prompt(segments, tokenizer, 10_000)
    got = _ask(url, '/tokenize', {'content': prompt, 'add_special': True, 'parse_special': True})
    assert got['tokens'] == want.tolist(), prompt
    body = {'prompt': want.tolist(), 'n_predict': 1, 'n_probs': spec.model.vocab_size}
    found = _ask(url, '/completion', body | {'temperature': 1.0})['completion_probabilities'][0]
    log_p = {item['id']: item['logprob'] for item in found['top_logprobs']}
    words = spec.verbalizers(tokenizer)
    theirs = np.logaddexp.reduce([log_p[i] for i in words.safe]) - np.logaddexp.reduce(
      [log_p[i] for i in words.unsafe]
    )
    assert abs(theirs - score) < 0.02


def test_what_is_no_prompt_is_refused(served):
  url, _, tokenizer, _ = served
  talk = [{'role': 'assistant', 'content': f'a {tokenizer.piece(tokenizer.eos_id)} b'}]
  rules = {'categories': [{'name': 'A', 'guideline': 'B.'}]}
  for body in (
    {'messages': talk, 'chat_template_kwargs': {'safety': rules}},
    {'messages': [{'role': 'assistant', 'content': 'Hi.'}]},
    {'messages': [{'role': 'user', 'content': 'x'}], 'chat_template_kwargs': {'safety': rules}},
  ):
    assert 'error' in _ask(url, '/apply-template', body)
