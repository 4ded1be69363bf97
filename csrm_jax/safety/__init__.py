"""Safety configurations, conversations and the prompt they become."""
