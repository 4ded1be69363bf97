"""Optimizer, train step, training loop and losses."""
