"""The contract of ringflash.kernels.decode in Triton.

Read in the order the data takes: cache_access (where rows lie, rotary embedding), append_cache, launch_sizes (by chip),
attend_cache, merge_parts (of the keys) and counters (by which the last part is known).
"""

from ringflash.kernels.triton.decode.append_cache import append
from ringflash.kernels.triton.decode.attend_cache import attend, missing

__all__ = ["append", "attend", "missing"]
