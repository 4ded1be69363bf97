"""Evaluation: metrics, suites, figures and the report."""
