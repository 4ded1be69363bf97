"""The reward function that OpenRLHF loads from a file.

CSRM_JAX_SOURCE=DIR CSRM_JAX_RULES=rules.yaml python -m openrlhf.cli.train_ppo_ray \\
  --remote_rm_url $(python -c "import csrm_jax.integrations.openrlhf as m; print(m.__file__)") ...

CSRM_JAX_SOURCE is a work directory, an exported folder, or the URL of a server (configs/serve.py);
a server may be given to --remote_rm_url itself, too, as URL/get_reward?policy=NAME. CSRM_JAX_RULES
are rules, or a policy of the server; CSRM_JAX_KEY_VARIABLE names the variable of its token. Labels
of the data set are not read.

OpenRLHF catches the exceptions of a reward, writes a line to its log and goes on without that
sample's reward. What cannot be scored therefore raises what it does not catch, and ends the run.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from csrm_jax.core import checks
from csrm_jax.integrations import judges, rewards


class NoRewardError(BaseException):
  """A sample cannot be scored. No Exception: OpenRLHF would catch it."""


@functools.cache
def _judge() -> judges.Judge:
  source = os.environ.get('CSRM_JAX_SOURCE', '')
  rules = os.environ.get('CSRM_JAX_RULES') or None
  if not source:
    raise ValueError('CSRM_JAX_SOURCE is empty: set it to a work directory or the URL of a server')
  if source.startswith(('http://', 'https://')):
    key = os.environ.get('CSRM_JAX_KEY_VARIABLE', '')
    return judges.remote(source, rules, key_variable=key)
  return judges.local(source, rules)


def reward_func(
  queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **kwargs: Any
) -> dict[str, Any]:
  """Returns "rewards" and "scores", torch float [N] in [0, 1], and "extra_logs".

  Raises:
    NoRewardError: A sample has no reward.
  """
  del labels, kwargs
  try:
    talks = [rewards.split(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    verdicts = _judge()(talks)
  except Exception as error:
    raise NoRewardError(f'no reward, so this run ends: {checks.reason(error)}') from error
  import torch

  found = torch.tensor([verdict.reward for verdict in verdicts])
  logs = {
    'score_nats': torch.tensor([verdict.score for verdict in verdicts]),
    'unread': torch.tensor([verdict.unread for verdict in verdicts]),
  }
  return {'rewards': found, 'scores': found, 'extra_logs': logs}
