"""The operators, and the walk over one rank's program."""
