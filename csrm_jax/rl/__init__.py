"""Alignment: rewards, verifiers, rollouts, advantages and objectives, online and offline."""
