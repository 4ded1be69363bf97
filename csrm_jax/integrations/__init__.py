"""Verdicts and rewards for other people's trainers and evaluations.

A judge (judges.local or judges.remote) reads conversations under rules; the modules beside it give
its verdicts the form that a framework calls: rewards (TRL, Tunix), openrlhf, guardrail
(any-guardrail) and inspect (inspect_ai).

judges.local computes in this process. Beside torch on one GPU, JAX must not take all memory: set
XLA_PYTHON_CLIENT_PREALLOCATE=false (or XLA_PYTHON_CLIENT_MEM_FRACTION=.3) before the first import,
or JAX_PLATFORMS=cpu. Processes that torchrun starts would each load the model: judges.remote asks
one server (configs/serve.py) instead, and never imports JAX.
"""
