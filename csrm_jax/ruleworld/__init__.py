"""RuleWorld: generated rules and conversations whose right verdicts are known."""
