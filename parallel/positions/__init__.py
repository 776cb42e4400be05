"""Which global positions there are, which of them see each other, and which rank holds them."""
