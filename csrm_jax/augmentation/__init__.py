"""Training data made from real conversations by changing the rules."""
