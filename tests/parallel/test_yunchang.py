"""yunchang's functions: what flash-attn gives for the whole sequence, in the layouts of their owner."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringflash import ArgumentError, RankMismatchError, flash_attn_func
from ringflash.yunchang import (
    EXTRACT_FUNC_DICT,
    AsyncLongContextAttention,
    LongContextAttention,
    LongContextAttentionQKVPacked,
    set_seq_parallel_pg,
)
from ringflash.yunchang.kernels import AttnType

DEGREES = ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2))
"""Of ulysses and of the ring."""


def layout_of(name: str, x: Tensor, rank: int, ulysses: int, ring: int, ulysses_low: bool) -> Tensor:
    """A rank's tokens, written down from yunchang's documentation."""
    ranks = ulysses * ring
    if name == "basic":
        return x.chunk(ranks, dim=1)[rank]
    if name == "strip":
        dealt = torch.cat([x[:, r::ring] for r in range(ring)], dim=1)
        return dealt.chunk(ranks, dim=1)[rank]
    of_ring, of_ulysses = (rank // ulysses, rank % ulysses) if ulysses_low else (rank % ring, rank // ring)
    chunks = x.chunk(2 * ring, dim=1)
    return torch.cat([chunks[of_ring], chunks[2 * ring - 1 - of_ring]], dim=1).chunk(ulysses, dim=1)[of_ulysses]


def _both(degrees: tuple[int, int], layout: str, ulysses_low: bool, packed: bool, sizes: dict, rules: dict) -> list:
    """This rank's queries, out and gradients, each beside those of one device in the owner's layout."""
    rank, world = dist.get_rank(), dist.get_world_size()
    set_seq_parallel_pg(*degrees, rank, world, ulysses_low)
    ranks = degrees[0] * degrees[1]
    random = torch.Generator().manual_seed(sizes["seed"] + rank // ranks)  # other data for each group of ranks
    q, k, v, dout = torch.randn(4, 1, sizes["tokens"], 2, 8, generator=random)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*whole, **rules)
    expected = out.detach(), *torch.autograd.grad(out, whole, dout)

    def local(x: Tensor) -> Tensor:
        return layout_of(layout, x, rank % ranks, *degrees, ulysses_low)

    extracted = EXTRACT_FUNC_DICT[layout](q, rank, world_size=world, rd=degrees[1], ud=degrees[0])
    own = [local(x).clone().requires_grad_() for x in (q, k, v)]
    if packed:
        out = LongContextAttentionQKVPacked(ring_impl_type=layout)(torch.stack(own, 2), **rules)
    else:
        out = LongContextAttention(ring_impl_type=layout, attn_type=AttnType.FA)(*own, **rules)
    found = extracted, out.detach(), *torch.autograd.grad(out, own, local(dout))
    return list(zip(found, map(local, (q, *expected)), strict=True))


def _assert_equal(ranks: list[list]) -> None:
    for pairs in ranks:
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("degrees", DEGREES, ids=lambda x: "x".join(map(str, x)))
@pytest.mark.parametrize("layout", ["basic", "zigzag", "strip"])
@pytest.mark.parametrize("ulysses_low", [True, False])
@settings(max_examples=3)
@given(
    packed=st.booleans(),
    size=st.integers(1, 4),
    seed=st.integers(0, 2**20),
    causal=st.booleans(),
    window=st.sampled_from([(-1, -1), (5, 5)]),
    softcap=st.sampled_from([0.0, 0.7]),
)
def test_in_its_owners_layout_it_gives_what_flash_attn_gives(
    pool, degrees, layout, ulysses_low, packed, size, seed, causal, window, softcap
) -> None:
    sizes = {"tokens": size * 2 * degrees[0] * degrees[1], "seed": seed}
    rules = {"causal": causal, "window_size": window, "softcap": softcap}
    _assert_equal(pool(degrees[0] * degrees[1]).run(_both, degrees, layout, ulysses_low, packed, sizes, rules))


def test_ranks_that_share_other_sequences_are_apart(pool) -> None:
    sizes = {"tokens": 16, "seed": 0}
    _assert_equal(pool(4).run(_both, (2, 1), "zigzag", True, False, sizes, {"causal": True}))


def _cross() -> None:
    rank = dist.get_rank()
    set_seq_parallel_pg(2, 1, rank, 2)
    q, k = torch.randn(1, 8, 2, 8, generator=torch.manual_seed(0)), torch.randn(1, 12, 2, 8)
    out = LongContextAttention()(q.chunk(2, 1)[rank], *[k.chunk(2, 1)[rank]] * 2)
    torch.testing.assert_close(out, flash_attn_func(q, k, k).chunk(2, 1)[rank], rtol=1e-5, atol=2e-5)


def test_keys_may_be_more_than_queries(pool) -> None:
    pool(2).run(_cross)


def test_the_asynchronous_module_is_the_same() -> None:
    assert AsyncLongContextAttention is LongContextAttention


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ring_impl_type": "stripe"}, "ring_impl_type='stripe'; allowed are basic, zigzag, strip"),
        ({"scatter_idx": 1, "gather_idx": 2}, r"scatter_idx and gather_idx are \(1, 2\)"),
        ({"attn_type": "fa"}, "attn_type='fa'"),
        ({"attn_processor": torch.nn.Identity()}, "attn_processor=Identity"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_it_does_not_do_is_refused_by_name(changed: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LongContextAttention(**changed)


def test_kernels_that_do_not_attend_exactly_have_no_name() -> None:
    assert AttnType.from_string("fa3") is AttnType.FA3
    with pytest.raises(ValueError, match="sage_fp8"):
        AttnType.from_string("sage_fp8")


@pytest.mark.parametrize(("degrees", "world"), [((2, 2), 6), ((0, 2), 6), ((-1, -2), 6)])
def test_degrees_that_do_not_divide_the_ranks_are_refused(degrees: tuple[int, int], world: int) -> None:
    with pytest.raises(ArgumentError, match=f"sp_ulysses_degree={degrees[0]}, sp_ring_degree={degrees[1]}"):
        set_seq_parallel_pg(*degrees, 0, world)


def test_lengths_that_a_layout_cannot_cut_are_refused() -> None:
    for layout, tokens, allowed in (("zigzag", 10, 4), ("strip", 5, 2), ("basic", 5, 2), ("basic", 0, 2)):
        with pytest.raises(ArgumentError, match=f"{tokens} tokens in layout '{layout}' .* multiples of {allowed}"):
            EXTRACT_FUNC_DICT[layout](torch.ones(1, tokens), 0, world_size=2, rd=2, ud=1)


def _not_called_first() -> str:
    set_seq_parallel_pg(1, 1, dist.get_rank(), 2)  # one rank each; then the group of both
    from ringflash.yunchang.globals import sequence_ranks

    sequence_ranks.group = None
    x = torch.ones(1, 4, 2, 8)
    with pytest.raises((ArgumentError, RankMismatchError)) as raised:
        LongContextAttention()(x, x, x)
    return str(raised.value)


def test_degrees_that_were_not_given_for_these_ranks_are_refused(pool) -> None:
    for said in pool(2).run(_not_called_first, timeout=15):
        assert "2 ranks, ring degree 1, ulysses degree 1: call set_seq_parallel_pg first" in said
