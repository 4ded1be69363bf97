"""The reward model: prompts to verdict scores, and how it is loaded."""
