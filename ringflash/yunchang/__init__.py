"""yunchang's LongContextAttention on this ring, by its own names and layouts of tokens.

    set_seq_parallel_pg(sp_ulysses_degree, sp_ring_degree, rank, world_size)
    attend = LongContextAttention(ring_impl_type="zigzag")
    extract = EXTRACT_FUNC_DICT["zigzag"]
    q, k, v = (extract(x, rank, world_size, rd=sp_ring_degree, ud=sp_ulysses_degree) for x in (q, k, v))
    out = attend(q, k, v, causal=True)

There it exchanges heads among some ranks and passes keys round a ring of others. Here all of these ranks are one ring,
and the two degrees only say which tokens a rank holds: heads need not divide by anything.
"""

from ringflash.yunchang.extract_local import EXTRACT_FUNC_DICT
from ringflash.yunchang.globals import set_seq_parallel_pg
from ringflash.yunchang.hybrid import LongContextAttention, LongContextAttentionQKVPacked

AsyncLongContextAttention = LongContextAttention
"""Transfers go on while kernels attend in either; this one has a backward pass as well."""

__all__ = [
    "EXTRACT_FUNC_DICT",
    "AsyncLongContextAttention",
    "LongContextAttention",
    "LongContextAttentionQKVPacked",
    "set_seq_parallel_pg",
]
