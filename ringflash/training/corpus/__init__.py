"""From text to packed batches of tokens, and the n-gram models that count the same text."""
