"""One decoder for every model family; differences are data (ModelConfig)."""
