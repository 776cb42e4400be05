"""ring-flash-attn's functions: what flash-attn gives for the whole sequence, in the layouts of their owner."""

from __future__ import annotations

import gc
import importlib
import inspect
import pickle
import weakref
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from attention_cases import assert_transformations_are_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflash.ring_flash_attn
from ringflash import ArgumentError, RankMismatchError, flash_attn_func, flash_attn_varlen_func, shard
from ringflash.parallel import lookup
from ringflash.ring_flash_attn import (
    boundaries,
    llama3_flash_attn_prepare_cu_seqlens,
    llama3_flash_attn_varlen_func,
    ring_flash_attn_func,
    ring_flash_attn_varlen_func,
    zigzag_ring_flash_attn_func,
    zigzag_ring_flash_attn_varlen_func,
)

SHARED = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, group=None"
)
LLAMA3 = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice"
FAMILIES = {
    "ring_flash_attn": "",
    "zigzag_ring_flash_attn": "",
    "stripe_flash_attn": "",
    "ring_flash_attn_varlen": "cu_seqlens, max_seqlen, ",
    "zigzag_ring_flash_attn_varlen": "cu_seqlens, max_seqlen, ",
    "llama3_flash_attn_varlen": f"{LLAMA3}, ",
}
"""Module of each family of functions, which its functions' names begin with, and what they take behind the tensors."""
FORMS = {"func": "q, k, v", "kvpacked_func": "q, kv", "qkvpacked_func": "qkv"}
NAMES = [(family, form) for family in FAMILIES for form in FORMS]


def function_of(family: str, form: str) -> Callable:
    return getattr(ringflash.ring_flash_attn, f"{family}_{form}")


def signature(function: Callable) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


@pytest.mark.parametrize(("family", "form"), NAMES)
def test_signatures_are_those_of_ring_flash_attn(family: str, form: str) -> None:
    assert signature(function_of(family, form)) == f"{FORMS[form]}, {FAMILIES[family]}{SHARED}"


def test_all_21_names_stand_in_their_package_and_in_the_owners_modules() -> None:
    others = {
        "llama3_flash_attn_prepare_cu_seqlens": ("llama3_flash_attn_varlen", "cu_seqlens, causal, rank, world_size"),
        "substitute_hf_flash_attn": ("adapters.hf_adapter", "process_group, heads_k_stride"),
        "update_ring_flash_attn_params": ("adapters.hf_adapter", "cu_seqlens, process_group"),
    }
    names = [f"{family}_{form}" for family, form in NAMES] + list(others)
    assert sorted(names) == ringflash.ring_flash_attn.__all__
    assert len(names) == 21
    for family, form in NAMES:
        module = importlib.import_module(f"ringflash.ring_flash_attn.{family}")
        assert getattr(module, f"{family}_{form}") is function_of(family, form)
    for name, (module, arguments) in others.items():
        function = getattr(importlib.import_module(f"ringflash.ring_flash_attn.{module}"), name)
        assert function is getattr(ringflash.ring_flash_attn, name)
        assert signature(function) == arguments
    assert ringflash.ring_flash_attn.adapters.substitute_hf_flash_attn is function_of("substitute_hf", "flash_attn")


# The owner's layouts, written down from its documentation. `dim` is the tokens' dimension.


def contiguous(x: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    return x.chunk(ranks, dim=dim)[rank]


def zigzag(x: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    chunks = x.chunk(2 * ranks, dim=dim)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim=dim)


def stripe(x: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    return torch.stack(x.split(ranks, dim=dim), dim=dim).select(dim + 1, rank)


LAYOUTS = {
    "ring_flash_attn": contiguous,
    "zigzag_ring_flash_attn": zigzag,
    "stripe_flash_attn": stripe,
    "ring_flash_attn_varlen": contiguous,
    "zigzag_ring_flash_attn_varlen": zigzag,
    "llama3_flash_attn_varlen": contiguous,
}
DIVISIBLE = {"zigzag_ring_flash_attn": 2, "zigzag_ring_flash_attn_varlen": 2}
"""By which a length on one rank must be divisible."""


def on_this_rank(family: str, x: Tensor, lengths: list[int], dim: int) -> Tensor:
    """This rank's part of a whole tensor; each packed sequence's by itself, save for llama3."""
    layout, place = LAYOUTS[family], (dist.get_rank(), dist.get_world_size())
    if not lengths or family.startswith("llama3"):
        return layout(x, dim, *place)
    parts = x.split([*lengths, x.shape[dim] - sum(lengths)], dim=dim)
    parts = [layout(part, dim, *place) for part in parts[:-1] if part.shape[dim]]
    return torch.cat(parts, dim=dim)


def boundaries_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def behind_the_tensors(family: str, lengths: list[int], causal: bool) -> tuple:
    """Positional arguments between the tensors and dropout_p."""
    if not lengths:
        return ()
    cu_seqlens, ranks = boundaries_of(lengths), dist.get_world_size()
    if family.startswith("llama3"):
        prepared = llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, causal, dist.get_rank(), ranks)
        return *prepared[:4], 1, prepared[4]
    return cu_seqlens // ranks, max(lengths) // ranks


def leaves_of(form: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """What is passed in a form, as leaves."""
    packed = {"func": [q, k, v], "kvpacked_func": [q, torch.stack([k, v], -3)], "qkvpacked_func": None}[form]
    packed = [torch.stack([q, k, v], -3)] if packed is None else packed
    return [x.detach().clone().requires_grad_() for x in packed]


def separated(form: str, leaves: list[Tensor]) -> list[Tensor]:
    """Queries, keys and values again."""
    if form == "func":
        return leaves
    return [*leaves[:-1], *leaves[-1].unbind(-3)]


def both(family: str, form: str, lengths: list[int], sizes: dict, shared: dict) -> list[tuple[Tensor, Tensor]]:
    """Out, log-sum-exp and gradients of this rank's tokens, each beside flash-attn's on the whole sequence."""
    generator = torch.Generator().manual_seed(sizes["seed"])
    heads, key_heads, head_dim = sizes["heads"]
    batch = [] if lengths else [sizes["batch"]]
    tokens = sum(lengths) if lengths else sizes["tokens"]
    keys = tokens if lengths else sizes["keys"]
    q, k, v, dout = (
        torch.randn(*batch, n, count, head_dim, generator=generator)
        for n, count in ((tokens, heads), (keys, key_heads), (keys, key_heads), (tokens, heads))
    )
    dlse = torch.randn(*batch, heads, tokens, generator=generator)
    shared = {**shared, "alibi_slopes": torch.rand(heads, generator=generator) if shared["alibi_slopes"] else None}
    dim = len(batch)

    whole = leaves_of(form, q, k, v)
    torch.manual_seed(sizes["seed"])
    bounds = (*[boundaries_of(lengths)] * 2, *[max(lengths)] * 2) if lengths else ()
    one_device = flash_attn_varlen_func if lengths else flash_attn_func
    expected, expected_lse, _ = one_device(*separated(form, whole), *bounds, **shared, return_attn_probs=True)
    gradients = torch.autograd.grad([expected, expected_lse], whole, [dout, dlse])

    own = leaves_of(form, *(on_this_rank(family, x, lengths, dim) for x in (q, k, v)))
    torch.manual_seed(sizes["seed"])
    behind = behind_the_tensors(family, lengths, shared["causal"])
    out, lse, nothing = function_of(family, form)(*own, *behind, **shared, return_attn_probs=True)
    assert nothing is None
    douts = on_this_rank(family, dout, lengths, dim), on_this_rank(family, dlse, lengths, dim + 1)
    found = torch.autograd.grad([out, lse], own, douts)

    pairs = [(out.detach(), expected, dim), (lse.detach(), expected_lse, dim + 1)]
    pairs += [(mine, theirs, dim) for mine, theirs in zip(found, gradients, strict=True)]
    return [(mine, on_this_rank(family, theirs.detach(), lengths, of)) for mine, theirs, of in pairs]


@st.composite
def problems(draw: st.DrawFn, family: str, form: str) -> tuple[int, list[int], dict, dict]:
    """Number of ranks, lengths of packed sequences if the family has them, sizes, and arguments of all functions."""
    ranks, side = draw(st.integers(1, 3)), st.integers(-1, 6)
    unit = ranks * DIVISIBLE.get(family, 1)
    lengths = []
    if family.startswith("llama3"):
        lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
        lengths.append(1 + (-sum(lengths) - 1) % ranks)
    elif "varlen" in family:
        lengths = [unit * n for n in draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))]
        lengths.append(unit)
    same = draw(st.booleans()) or form == "qkvpacked_func"
    shared = {
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "softmax_scale": draw(st.sampled_from([None, 0.3])),
        "causal": draw(st.booleans()),
        "window_size": draw(st.just((-1, -1)) | st.tuples(side, side)),
        "alibi_slopes": draw(st.booleans()),
        "deterministic": draw(st.booleans()),
    }
    tokens = unit * draw(st.integers(1, 6))
    cross = family == "ring_flash_attn" and form != "qkvpacked_func"
    cross = cross and not shared["causal"] and shared["window_size"] == (-1, -1)
    sizes = {
        "batch": draw(st.integers(1, 2)),
        "tokens": tokens,
        "keys": unit * draw(st.integers(1, 6)) if cross else tokens,
        "heads": (2, 2 if same else 1, 8),
        "seed": draw(st.integers(0, 2**20)),
    }
    return ranks, lengths, sizes, shared


@pytest.mark.parametrize(("family", "form"), NAMES)
@settings(max_examples=12)
@given(data=st.data())
def test_in_its_owners_layout_each_function_gives_what_flash_attn_gives(pool, family, form, data) -> None:
    ranks, *problem = data.draw(problems(family, form))
    for pairs in pool(ranks).run(both, family, form, *problem):
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


# What llama3_flash_attn_prepare_cu_seqlens returns


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    ranks=st.integers(1, 4),
    causal=st.booleans(),
    kind=st.sampled_from([torch.int32, torch.int64]),
)
def test_prepared_boundaries_show_a_ranks_queries_what_they_see_of_the_slice_of_keys(lengths, ranks, causal, kind):
    lengths.append(1 + (-sum(lengths) - 1) % ranks)
    cu_seqlens, total = boundaries_of(lengths).to(kind), sum(lengths)
    q, k, v = torch.randn(3, total, 2, 8)
    whole = flash_attn_varlen_func(q, k, v, *[cu_seqlens.int()] * 2, *[max(lengths)] * 2, causal=causal)
    for rank in range(ranks):
        of_queries, of_keys, *longest, local = llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, causal, rank, ranks)
        assert of_queries.dtype == of_keys.dtype == kind
        assert longest == [int(of_queries.diff().max()), int(of_keys.diff().max())]
        assert len(k[local]) == of_keys[-1]
        bounds = of_queries.int(), of_keys.int(), *longest
        out = flash_attn_varlen_func(q.chunk(ranks)[rank], k[local], v[local], *bounds, causal=causal)
        torch.testing.assert_close(out, whole.chunk(ranks)[rank], rtol=1e-5, atol=1e-5)


def _of_another_process() -> None:
    q = torch.randn(4, 2, 8)
    prepared = llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 3, 8]), True, dist.get_rank(), 2)
    pickled = pickle.loads(pickle.dumps(prepared))
    first, second = (llama3_flash_attn_varlen_func(q, q, q, *x[:4], 1, x[4], causal=True) for x in (prepared, pickled))
    assert torch.equal(first, second)


def test_what_was_prepared_in_a_dataloaders_worker_serves_as_well(pool) -> None:
    pool(2).run(_of_another_process)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, "cu_seqlens ends at 7; allowed are multiples of world_size=2"),
        ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens=\(0,\)"),
        ({"cu_seqlens": torch.tensor([1, 8])}, r"cu_seqlens=\(1, 8\); it must start at 0"),
        ({"cu_seqlens": [0, 8]}, r"cu_seqlens=\[0, 8\]"),
        ({"rank": 2}, "rank=2, world_size=2"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_boundaries_that_cannot_be_prepared_are_refused_by_name(changed: dict, message: str) -> None:
    arguments = {"cu_seqlens": torch.tensor([0, 3, 8]), "causal": True, "rank": 0, "world_size": 2}
    with pytest.raises(ArgumentError, match=message):
        llama3_flash_attn_prepare_cu_seqlens(**arguments | changed)


# Layouts that are not the function's own


def _refused(function: Callable, arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        function(**arguments)


def _llama3(changed: dict, message: str) -> None:
    rank, x = dist.get_rank(), torch.ones(4, 2, 8)
    prepared = llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 3, 8]), True, rank, 2)
    arguments = {"q": x, "k": x, "v": x, "heads_k_stride": 1, "causal": True}
    arguments |= zip([*LLAMA3.split(", ")[:4], "local_k_slice"], prepared, strict=True)
    _refused(llama3_flash_attn_varlen_func, arguments | changed, message)


X, Y = torch.ones(1, 5, 2, 8), torch.ones(1, 7, 2, 8)
THREE = dict.fromkeys("qkv", X)
PACKED = dict.fromkeys("qkv", X[0]) | {"cu_seqlens": torch.tensor([0, 2, 5]), "max_seqlen": 3}


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (zigzag_ring_flash_attn_func, THREE, "q has 5 tokens; allowed is an even number"),
        (ring_flash_attn_func, {"q": X, "k": Y, "v": Y, "causal": True}, "q has 5 tokens and k 7"),
        (ring_flash_attn_func, {"q": X, "k": Y, "v": Y, "window_size": (3, 3)}, "q has 5 tokens and k 7"),
        (zigzag_ring_flash_attn_func, {"q": X, "k": Y, "v": Y}, "q has 5 tokens and k 7"),
        (ring_flash_attn_func, THREE | {"window_size": (-3, 0)}, "window_size"),
        (ring_flash_attn_varlen_func, PACKED | {"cu_seqlens": torch.tensor([0, 4, 10])}, "max_seqlen=3"),
        (
            ring_flash_attn_varlen_func,
            PACKED | {"cu_seqlens": torch.tensor([0, 4, 10]), "max_seqlen": 6},
            "cu_seqlens ends at 10, and this rank has 5 tokens of 2 ranks; .* divided by 2",
        ),
        (zigzag_ring_flash_attn_varlen_func, PACKED, r"cu_seqlens=\[0, 2, 5\].*; allowed are even numbers"),
        (ring_flash_attn_varlen_func, PACKED | {"cu_seqlens": torch.tensor([1, 5])}, "must start at 0"),
        (ring_flash_attn_varlen_func, PACKED | {"cu_seqlens": [0, 2, 5]}, r"cu_seqlens=\[0, 2, 5\]"),
        (ring_flash_attn_varlen_func, PACKED | {"q": X}, r"q has shape \(1, 5, 2, 8\)"),
        (ring_flash_attn_varlen_func, PACKED | {"k": Y[0], "v": Y[0]}, "q has 5 tokens and k 7"),
    ],
    ids=range(12),
)
def test_tokens_that_a_function_cannot_mean_are_refused(pool, function, arguments: dict, message: str) -> None:
    pool(2).run(_refused, function, arguments, message, timeout=15)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"causal": False}, "causal=False; local_k_slice was made for causal=True"),
        ({"local_k_slice": slice(0, 4)}, "which carries the boundaries of all ranks"),
        ({"q": torch.ones(8, 2, 8)}, "q has 8 tokens; cu_seqlens ends at 8, of which each of 2 ranks holds 4"),
        ({"k": torch.ones(3, 2, 8), "v": torch.ones(3, 2, 8)}, "k has 3 tokens; cu_seqlens ends at 8"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 2, 4])}, "cu_seqlens_q has 4 entries"),
        ({"heads_k_stride": 3}, "heads_k_stride=3; allowed are divisors of the 2 heads of k"),
        (
            {"local_k_slice": llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 8]), True, 3, 4)[4]},
            "local_k_slice was made for rank 3 of 4; this process is rank . of 2",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_was_prepared_for_something_else_is_refused(pool, changed: dict, message: str) -> None:
    pool(2).run(_llama3, changed, message, timeout=15)


def _sharded_otherwise() -> None:
    x = shard(torch.ones(1, 8, 2, 8), dim=1)
    _refused(ring_flash_attn_func, {"q": x, "k": x, "v": x}, "query was sharded with")


def test_tokens_that_ringflash_sharded_zigzag_are_refused_by_the_contiguous_function(pool) -> None:
    pool(2).run(_sharded_otherwise, timeout=15)


def _uneven(message: str) -> None:
    x = torch.ones(1, 10, 2, 8).chunk(3, dim=1)[dist.get_rank()]
    with pytest.raises(RankMismatchError, match=message):
        ring_flash_attn_func(x, x, x)


def test_pieces_of_different_lengths_are_an_error_on_every_rank(pool) -> None:
    pool(3).run(_uneven, "ranks disagree on seqlen .*12 on ranks 0, 1; 6 on rank 2", timeout=15)


# How often the host plans and waits


def _made(calls: list[Callable]) -> list[int]:
    """How many shardings each call makes."""
    made, make = [], lookup.Sharding
    with pytest.MonkeyPatch.context() as patch:
        for call in calls:
            made.append(0)

            def counted(*arguments: object, **settings: object) -> object:
                made[-1] += 1
                return make(*arguments, **settings)

            patch.setattr(lookup, "Sharding", counted)
            call()
    return made


def _repeated() -> None:
    lookup.shardings.clear()
    x = torch.randn(1, 8, 2, 8)
    prepared = llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 3, 16]), True, dist.get_rank(), 2)
    for call in (
        lambda: zigzag_ring_flash_attn_func(x, x, x),
        lambda: zigzag_ring_flash_attn_varlen_func(*[x[0]] * 3, torch.tensor([0, 2, 8]), 6, causal=True),
        lambda: llama3_flash_attn_varlen_func(*[x[0]] * 3, *prepared[:4], 1, prepared[4], causal=True),
    ):
        assert _made([call] * 3) == [1, 0, 0]


def test_equal_arguments_are_planned_once(pool) -> None:
    pool(2).run(_repeated)


class OnADevice(torch.Tensor):
    """A tensor that says it is on a device, and counts how often the host reads it."""

    reads = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    def detach(self) -> OnADevice:
        return self

    def cpu(self) -> Tensor:
        OnADevice.reads += 1
        return self.as_subclass(Tensor).clone()


def test_the_host_reads_boundaries_on_a_device_once_and_again_when_they_were_written() -> None:
    x = torch.tensor([0, 2, 5]).as_subclass(OnADevice)
    OnADevice.reads = 0
    first = boundaries.on_host(x)
    assert boundaries.on_host(x) is first
    assert OnADevice.reads == 1
    x.mul_(2)
    assert boundaries.on_host(x).tolist() == [0, 4, 10]
    assert OnADevice.reads == 2


def test_what_was_read_of_boundaries_goes_with_them() -> None:
    x = torch.tensor([0, 3]).as_subclass(OnADevice)
    read = weakref.ref(boundaries.on_host(x))
    gc.collect()
    assert read() is not None
    del x
    gc.collect()
    assert read() is None


# Compiled, transformed


def _compiled(way: str) -> None:
    torch.compiler.reset()
    shared = {"causal": True, "window_size": (6, 0), "return_attn_probs": True, "alibi_slopes": torch.rand(2)}
    leaves = [torch.randn(*(() if way != "batch" else (2,)), 8, 2, 8).requires_grad_() for _ in range(3)]
    function, bounds = zigzag_ring_flash_attn_func, ()
    if way == "varlen":
        function, bounds = zigzag_ring_flash_attn_varlen_func, (torch.tensor([0, 2, 8], dtype=torch.int32), 6)
    if way == "llama3":
        prepared = llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 3, 16]), True, dist.get_rank(), 2)
        function, bounds = llama3_flash_attn_varlen_func, (*prepared[:4], 1, prepared[4])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [call(*leaves, *bounds, **shared) for call in (function, compiled)]
    gradients = [torch.autograd.grad(out.sum(), leaves) for out, _, _ in results]
    for found, expected in zip((*results[1][:2], *gradients[1]), (*results[0][:2], *gradients[0]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["batch", "varlen", "llama3"])
def test_compiles_whole(pool, way: str) -> None:
    pool(2).run(_compiled, way, timeout=120)


def _transformed(way: str) -> None:
    calls = {
        "batch": lambda x: ring_flash_attn_func(x, x, x, causal=True),
        "varlen": lambda x: ring_flash_attn_varlen_func(*[x[0]] * 3, torch.tensor([0, 2, 6]), 4, causal=True),
    }
    assert_transformations_are_refused(calls[way], torch.randn(1, 6, 2, 8))


@pytest.mark.parametrize("way", ["batch", "varlen"])
def test_second_derivatives_forward_mode_and_vmap_are_refused(pool, way: str) -> None:
    pool(2).run(_transformed, way, timeout=15)
