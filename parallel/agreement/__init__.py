"""Ranks find out that they are about to do different things."""
