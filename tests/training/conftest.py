"""What workers of the tests of training have imported before they are forked."""

from __future__ import annotations

from pool import PRELOAD

# Seconds for each worker, unless they are there when they are forked.
PRELOAD += ["ringflash.transformers", "peft", "datasets", "deepspeed", "ringflash.training.run.loop"]
