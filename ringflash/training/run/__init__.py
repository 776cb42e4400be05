"""A run: what it holds on each rank, its steps, how it is stopped, and what it shows and writes."""
