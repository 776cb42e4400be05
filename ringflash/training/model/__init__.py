"""A Llama-style decoder whose attention spans the ranks that share a sequence, and its loss."""
