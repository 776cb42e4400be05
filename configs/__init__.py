"""Hydra configuration of the training recipe: `config.yaml`, one folder per group, and the types in `schema.py`."""
