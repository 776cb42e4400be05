"""What workers of the tests of training have imported before they are forked."""

from __future__ import annotations

from pool import PRELOAD

# Seconds for each worker, unless they are there when they are forked. DeepSpeed has to come later: it chooses between
# GPU and CPU as it is imported.
PRELOAD += ["ringflash.transformers", "peft", "datasets", "ringflash.training.run.loop"]
