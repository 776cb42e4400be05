"""flash_attn_with_kvcache: its signature, its rules against float64, what it leaves in the cache, what it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from decode_cases import CacheCase, assert_as_exact_as_torch, cache_cases, call, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflash
from ringflash import ArgumentError, UnsupportedError, flash_attn_func, flash_attn_with_kvcache
from ringflash.kernels.cpu import decode
from ringflash.kernels.overrun import raise_if_overrun

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def named(x: object) -> str:
    return str(x).removeprefix("torch.")


def test_the_signature_is_flash_attns() -> None:
    signature = inspect.signature(flash_attn_with_kvcache)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False)"
    )
    assert "flash_attn_with_kvcache" in ringflash.__all__


# Against float64


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=60)
@given(data=st.data())
def test_any_combination_of_arguments_is_as_exact_as_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cache_cases(dtype))
    problem = tensors(case)
    assert_as_exact_as_torch(call(flash_attn_with_kvcache, case, problem), case, problem)


@pytest.mark.parametrize("page", [None, 256])
def test_a_cache_of_several_blocks(page: int | None) -> None:
    case = CacheCase(queries=3, rows=3 * decode.BLOCK, page=page, window=(700, -1), leftpad=True, seed=3)
    problem = tensors(case)
    assert_as_exact_as_torch(call(flash_attn_with_kvcache, case, problem), case, problem)


def test_token_by_token_gives_what_one_causal_call_gives() -> None:
    q, k, v = torch.randn(3, 2, 20, 4, 16).unbind(0)
    k, v = k[:, :, :2], v[:, :, :2]
    k_cache, v_cache = torch.full((2, 2, 24, 2, 16), torch.nan).unbind(0)
    seqlens = torch.zeros(2, dtype=torch.int32)
    outs = []
    for step in ([0, 7], *([i, i + 1] for i in range(7, 20))):
        new = slice(*step)
        outs.append(
            flash_attn_with_kvcache(
                q[:, new], k_cache, v_cache, k[:, new], v[:, new], cache_seqlens=seqlens, causal=True
            )
        )
        seqlens += step[1] - step[0]
    torch.testing.assert_close(torch.cat(outs, 1), flash_attn_func(q, k, v, causal=True))
    assert torch.equal(k_cache[:, :20], k)
    assert k_cache[:, 20:].isnan().all()


def test_rotary_turns_queries_alike_only_where_their_places_do_not_matter() -> None:
    """flash-attn's rule: without causal or window all queries are turned as the first new token is."""
    case = CacheCase(batch=1, queries=3, appended=3, rotary=16, seqlens="int", seed=1)
    problem = tensors(case)
    same = replace(problem, q=problem.q[:, :1].expand_as(problem.q))
    out = call(flash_attn_with_kvcache, case, same)[0]
    assert torch.equal(out[:, 0], out[:, 2])
    wide = call(flash_attn_with_kvcache, replace(case, window=(100, -1)), same)[0]
    assert torch.equal(wide[:, 0], out[:, 0])
    assert (wide[:, 2] - out[:, 2]).abs().max() > 1e-3


def test_rows_without_keys_give_zero_and_minus_infinity() -> None:
    cache = torch.full((2, 8, 2, 16), torch.nan)
    seqlens = torch.tensor([0, 2], dtype=torch.int32)
    cache[1, :2] = 1.0
    q = torch.randn(2, 3, 4, 16)
    out, lse = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=seqlens, causal=True, return_softmax_lse=True)
    assert out[0].eq(0).all()
    assert lse[0].isneginf().all()
    assert out[1, 0].eq(0).all()
    assert lse[1, :, 0].isneginf().all()
    torch.testing.assert_close(out[1, 1:], torch.ones_like(out[1, 1:]))


def test_no_queries_still_append() -> None:
    cache, new = torch.zeros(1, 8, 2, 16), torch.ones(1, 3, 2, 16)
    out = flash_attn_with_kvcache(new[:, :0], cache, cache.clone(), new, new, cache_seqlens=2)
    assert out.shape == (1, 0, 2, 16)
    assert cache[0, :, 0, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_views_with_a_contiguous_last_dimension_are_written_through() -> None:
    both = torch.zeros(2, 2, 8, 3, 32)
    k_cache, v_cache = both[:, 0, :, :, :16], both[:, 1, :, :, 16:]
    q, k, v = torch.randn(3, 2, 3, 16, 2).mT.unbind(0)
    q, k, v = (x[:, None] for x in (q[:, 0], k[:, 0], v[:, 0]))  # last dimension not contiguous
    q, k, v = (x.expand(2, 1, 2, 16)[:, :, [0, 1, 1]] for x in (q, k, v))
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4)
    assert torch.equal(both[:, 0, 4, :, :16], k[:, 0])
    assert both[:, 0, :, :, 16:].eq(0).all()
    expected = flash_attn_with_kvcache(q.contiguous(), k_cache.contiguous(), v_cache.contiguous(), cache_seqlens=5)
    torch.testing.assert_close(out, expected)


# Framework


FEATURES = {
    "causal": True,
    "window_size": (9, 0),
    "softcap": 5.0,
    "alibi_slopes": torch.tensor([0.1, 0.2]),
    "cache_seqlens": torch.tensor([3, 5], dtype=torch.int32),
    "rotary_cos": torch.randn(16, 4),
    "rotary_sin": torch.randn(16, 4),
}


@pytest.mark.parametrize("pages", [False, True], ids=["contiguous", "paged"])
def test_compiles_whole(pages: bool) -> None:
    where = {"block_table": torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)} if pages else {}
    shape = (4, 8, 2, 16) if pages else (2, 16, 2, 16)
    x, caches = torch.randn(2, 2, 2, 16), torch.randn(2, *shape)

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q + 1, k_cache, v_cache, q, q, **FEATURES, **where).sin()

    eager, compiled = caches.clone(), caches.clone()
    expected = step(x, *eager)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x, *compiled)
    torch.testing.assert_close(found, expected)
    assert torch.equal(compiled, eager)


def test_opcheck_of_the_operators() -> None:
    x, cache = torch.randn(2, 3, 2, 16), torch.randn(2, 16, 2, 16)
    lengths, tables = FEATURES["cache_seqlens"], (FEATURES["rotary_cos"], FEATURES["rotary_sin"], True)
    torch.library.opcheck(
        torch.ops.ringflash.append_to_cache, (x, x, cache, cache.clone(), lengths, 0, None, None, *tables)
    )
    torch.library.opcheck(
        torch.ops.ringflash.attend_to_cache,
        (x, cache, cache.clone(), lengths, 0, None, None, *tables, None, None, 3, 0.25, 7, 0, 0.0, 2),
    )


X = torch.randn(2, 3, 4, 16)
CACHE = torch.randn(2, 10, 4, 16)
TWO = torch.tensor([4, 5], dtype=torch.int32)
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
NEW = {"k": X, "v": X, "cache_seqlens": TWO}
TABLE = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)


def test_gradients_are_refused_and_not_lost() -> None:
    q = X.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="flash_attn_with_kvcache has no backward"):
        flash_attn_with_kvcache(q, CACHE, CACHE)
    with pytest.raises(UnsupportedError, match="flash_attn_with_kvcache has no backward"):
        flash_attn_with_kvcache(X, CACHE, CACHE, alibi_slopes=SLOPES.clone().requires_grad_())
    with torch.no_grad():
        assert not flash_attn_with_kvcache(q, CACHE, CACHE).requires_grad


def test_forward_mode_derivatives_are_refused_and_not_zero() -> None:
    with pytest.raises(UnsupportedError, match="flash_attn_with_kvcache has no forward-mode derivative"):
        torch.func.jvp(lambda q: flash_attn_with_kvcache(q, CACHE, CACHE), (X,), (X,))
    with pytest.raises(UnsupportedError, match="flash_attn_with_kvcache has no forward-mode derivative"):
        torch.func.jvp(lambda slopes: flash_attn_with_kvcache(X, CACHE, CACHE, alibi_slopes=slopes), *[(SLOPES,)] * 2)


def test_vmap_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda x: flash_attn_with_kvcache(x, CACHE, CACHE))(torch.randn(3, *X.shape))
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda lengths: flash_attn_with_kvcache(X, CACHE, CACHE, cache_seqlens=lengths))(TWO.expand(3, 2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": X[0]}, r"q has shape \(3, 4, 16\)"),
        ({"q": X.half()}, "k_cache is torch.float32 on cpu, q torch.float16"),
        ({"q": X.long(), "k_cache": CACHE.long(), "v_cache": CACHE.long()}, "q is torch.int64"),
        (
            {name: x.to(torch.float8_e4m3fn) for name, x in (("q", X), ("k_cache", CACHE), ("v_cache", CACHE))},
            "q is torch.float8_e4m3fn; allowed are torch.float16",
        ),
        ({"q": X[:, :, :3]}, "heads of q are a multiple"),
        ({"k_cache": CACHE[..., :8]}, "do not go together"),
        ({"v_cache": CACHE[:, :9]}, "do not go together"),
        ({"k_cache": CACHE.transpose(2, 3).contiguous().transpose(2, 3)}, "k_cache has strides"),
        ({"k_cache": CACHE[:1], "v_cache": CACHE[:1]}, "k_cache has 1 entries for 2 sequences"),
        ({"k": X}, "v is None"),
        ({"k": X, "v": X}, "cache_seqlens is None with k given"),
        ({**NEW, "k": X[:1]}, r"k is \(1, 3, 4, 16\)"),
        ({**NEW, "cache_seqlens": TWO + 3}, "cache_seqlens from 7 to 8 and 3 new tokens; allowed are the 10 rows"),
        ({"cache_seqlens": 11}, "cache_seqlens from 11 to 11"),
        ({"cache_seqlens": -1}, "cache_seqlens from -1"),
        ({"cache_seqlens": TWO.long()}, r"cache_seqlens is torch.int64 \(2,\); allowed is a number, or int32 \(2,\)"),
        ({"cache_seqlens": [4, 5]}, r"cache_seqlens is \[4, 5\]"),
        ({"cache_seqlens": TWO.to("meta")}, "cache_seqlens is on meta, q on cpu"),
        ({"cache_batch_idx": TWO}, "cache_batch_idx from 4 to 5; allowed is 0 to 1"),
        ({"cache_batch_idx": TWO[:1]}, "cache_batch_idx is torch.int32"),
        ({"cache_leftpad": TWO[:1]}, "cache_leftpad is torch.int32"),
        ({"block_table": TABLE, "cache_batch_idx": TWO}, "cache_batch_idx is given with block_table"),
        ({"block_table": TABLE[0]}, r"block_table is torch.int32 \(2,\); allowed is int32 \(2, pages\)"),
        ({"block_table": TABLE, "k_cache": CACHE[:0], "v_cache": CACHE[:0]}, r"k_cache has shape \(0, 10, 4, 16\)"),
        (
            {**NEW, "cache_seqlens": 0, **dict.fromkeys("kv", torch.ones(2, 11, 4, 16))},
            "k has 11 new tokens; allowed are the 10 rows",
        ),
        ({"block_table": TABLE + 1}, "block_table names pages that are not there; allowed is 0 to 1"),
        ({**NEW, "rotary_cos": X[0, 0]}, "rotary_sin is None"),
        ({"rotary_cos": X[0, 0], "rotary_sin": X[0, 0]}, "rotary_cos is given without k"),
        ({**NEW, "rotary_cos": X[0, 0], "rotary_sin": X[0, 0]}, r"rotary_cos has shape \(4, 16\).*at least 10"),
        (
            {**NEW, **dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(10, 8).half())},
            "rotary_cos is torch.float16",
        ),
        (
            {
                **NEW,
                **dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(10, 8)),
                "causal": True,
                "q": torch.ones(2, 6, 4, 16),
            },
            "rotary_cos has 10 rows; 6 queries behind 5 tokens are turned at rows up to 10",
        ),
        ({"cache_leftpad": TWO - 9}, r"cache_leftpad=\[-., -.\]; allowed are 0 and more"),
        ({**NEW, "cache_batch_idx": torch.zeros_like(TWO)}, r"cache_batch_idx=\[0, 0\] names an entry twice"),
        ({**NEW, "k_cache": CACHE[:1].expand(2, -1, -1, -1)}, r"k_cache is expanded, strides \(0, "),
        ({"softmax_scale": 0.0}, "softmax_scale=0.0"),
        ({"window_size": (-2, 0)}, r"window_size=\(-2, 0\)"),
        ({"window_size": (1.5, 0)}, r"window_size=\(1\.5, 0\); allowed are integers"),
        ({"softcap": float("inf")}, r"softcap=inf"),
        ({"num_splits": 3.5}, r"num_splits=3\.5"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes is torch.float32 \(3,\)"),
        ({"num_splits": 129}, "num_splits=129; allowed are 0 to choose, and 1 to 128"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refuses_by_name_before_anything_is_written(changed: dict, message: str) -> None:
    before = CACHE.clone()
    with pytest.raises(ArgumentError, match=message):
        flash_attn_with_kvcache(**{"q": X, "k_cache": CACHE, "v_cache": CACHE} | changed)
    assert torch.equal(CACHE, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """Neither the dtype, which is the cache's, nor sums, which products of torch keep in fp32."""
    case = CacheCase(2, 2, 1, 40, None, (4, 2), rotary=16, causal=True, dtype=dtype)
    expected, given = (tensors(case) for _ in range(2))
    expected = call(flash_attn_with_kvcache, case, expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(flash_attn_with_kvcache, case, given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# On GPUs


def on_gpu(case: CacheCase) -> None:
    problem = tensors(case).to("cuda")
    assert_as_exact_as_torch(call(flash_attn_with_kvcache, case, problem), case, problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=15)
@given(data=st.data())
def test_any_combination_of_arguments_on_gpus(dtype: torch.dtype, data: st.DataObject) -> None:
    on_gpu(data.draw(cache_cases(dtype, most_rows=400)))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [None, 16, 48, 256])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, 64), (torch.float16, 128), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 512)],
    ids=named,
)
def test_long_caches_on_gpus(dtype: torch.dtype, dim: int, page: int | None) -> None:
    case = CacheCase(3, 1, 1, 5000, page, (8, 2), (dim, dim), dtype, rotary=dim, causal=True, seed=1)
    on_gpu(case)
    on_gpu(replace(case, queries=70, appended=70, window=(300, 0), splits=5))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 2, 31, 128])
def test_splits_repeat_bit_for_bit_on_gpus(splits: int) -> None:
    case = CacheCase(2, 2, None, 3000, None, (8, 2), (128, 128), torch.bfloat16, splits=splits)
    problem = tensors(case).to("cuda")
    first = call(flash_attn_with_kvcache, case, problem)
    for _ in range(20):
        for x, y in zip(call(flash_attn_with_kvcache, case, problem)[:2], first[:2], strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_graphs_of_one_stream_run_at_once_on_others_beside_calls() -> None:
    """Programs count each other to know who merges: not those of another graph or call that runs at the same time."""
    torch.manual_seed(0)
    q = torch.randn(1, 1, 32, 128, device="cuda", dtype=torch.bfloat16)
    k_cache, v_cache = torch.randn(2, 1, 6000, 8, 128, device="cuda", dtype=torch.bfloat16).unbind(0)

    def attend(length: int, splits: int) -> tuple[Tensor, Tensor]:
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=length, num_splits=splits, return_softmax_lse=True
        )  # fmt: skip

    runs = [partial(attend, *x) for x in ((6000, 9), (4000, 16), (5000, 31), (3000, 128))]
    expected = [run() for run in runs]
    streams, graphs, found = [torch.cuda.Stream() for _ in runs], [], []
    for run in runs[:3]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[0]):
            found.append(run())
        graphs.append(graph)
    found.append([torch.empty_like(x) for x in expected[3]])
    torch.cuda.synchronize()
    for _ in range(200):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[3]):
            for x, y in zip(found[3], runs[3](), strict=True):
                x.copy_(y)
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
def test_steps_on_gpus_never_wait_and_a_graph_replays_them() -> None:
    """A graph of one step decodes token after token, as lengths on the device grow."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 8, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    k, v = k[:, :, :2], v[:, :, :2]
    k_cache, v_cache = torch.zeros(2, 2, 512, 2, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    seqlens = torch.zeros(2, device="cuda", dtype=torch.int32)
    token = [x[:, :1].clone() for x in (q, k, v)]

    def step() -> Tensor:
        return flash_attn_with_kvcache(token[0], k_cache, v_cache, *token[1:], cache_seqlens=seqlens, causal=True)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    outs = []
    for i in range(40):
        for x, y in zip(token, (q, k, v), strict=True):
            x.copy_(y[:, i : i + 1])
        graph.replay()
        outs.append(out.clone())
        seqlens += 1
    expected = flash_attn_func(q.float(), k.float(), v.float(), causal=True)
    torch.testing.assert_close(torch.cat(outs, 1).float(), expected, rtol=2e-2, atol=2e-2)


BEYOND = (
    (None, [509, 3], "rows that k_cache does not have"),
    (None, [3, -1], "or are negative"),
    (16, [509, 3], "pages that block_table does not name"),
    (16, [3, 47], "pages that block_table does not name"),  # behind its third page come fillers
)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 20], ids=["triton", "torch-operators"])
@pytest.mark.parametrize(("page", "lengths", "message"), BEYOND, ids=str)
def test_lengths_beyond_a_cache_on_gpus_are_raised_by_the_next_call(
    page: int | None, lengths: list[int], message: str, dim: int
) -> None:
    """In a call and in a graph that is replayed; nothing waits."""
    q, k, v = torch.randn(3, 2, 5, 2, dim, device="cuda", dtype=torch.bfloat16).unbind(0)
    where = {}
    if page is not None:
        table = torch.arange(64, device="cuda", dtype=torch.int32).view(2, 32)
        table[1, 3:] = -1
        where["block_table"] = table
    shape = (64, 16) if page else (2, 512)
    k_cache, v_cache = torch.zeros(2, *shape, 2, dim, device="cuda", dtype=torch.bfloat16).unbind(0)
    seqlens = torch.tensor([0, 8], device="cuda", dtype=torch.int32)
    beyond = torch.tensor(lengths, device="cuda", dtype=torch.int32)

    def append() -> None:
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True, **where)

    def attend() -> None:
        held = (seqlens + 5).where(seqlens >= 0, seqlens)
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=held, **where)

    def check(run: Callable[[], None]) -> None:
        before = seqlens.clone()
        seqlens.copy_(beyond)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seqlens.copy_(before)
        torch.cuda.synchronize()
        written = k_cache.clone()
        with pytest.raises(
            ArgumentError, match=f"in an earlier call of flash_attn_with_kvcache on cuda:0, .*{message}"
        ):
            append()
        assert torch.equal(k_cache, written)
        append()
        torch.cuda.synchronize()
        append()

    for step in (append, attend):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        check(step)
        check(graph.replay)
    first = k_cache.view(2, 512, 2, dim)[0].abs().sum((1, 2))
    fits = range(lengths[0], min(lengths[0] + 5, 512))
    assert first.nonzero().flatten().tolist() == sorted({*range(5), *fits})


@pytest.mark.gpu
def test_whoever_replays_a_graph_alone_may_ask_for_lengths_beyond_the_cache() -> None:
    cache, values = torch.zeros(2, 1, 64, 2, 64, device="cuda").unbind(0)
    seqlens = torch.zeros(1, device="cuda", dtype=torch.int32)
    token = torch.randn(1, 1, 2, 64, device="cuda")

    def step() -> None:
        flash_attn_with_kvcache(token, cache, values, token, token, cache_seqlens=seqlens)
        seqlens.add_(1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(63):
        graph.replay()
    torch.cuda.synchronize()
    raise_if_overrun("cuda")
    graph.replay()
    torch.cuda.synchronize()
    with pytest.raises(ArgumentError, match=r"in an earlier call .* rows that k_cache does not have"):
        raise_if_overrun("cuda")
    raise_if_overrun("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("splits", [1, 20])
def test_a_device_that_is_not_the_current_one(splits: int) -> None:
    case = CacheCase(2, 2, 2, 3000, None, (8, 2), (128, 128), torch.bfloat16, splits=splits)
    problem = tensors(case)
    with torch.cuda.device(0):
        given = problem.to("cuda:1")
        given.q.to("cuda:0")  # from here on the two devices reach each other's memory where they can
        assert_as_exact_as_torch(call(flash_attn_with_kvcache, case, given), case, given)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_on_gpus() -> None:
    rows = 2**31 // (8 * 128) + 4096
    cache = torch.zeros(1, rows, 8, 128, device="cuda", dtype=torch.bfloat16)
    cache[0, -1] = 1.0
    q = torch.ones(1, 1, 32, 128, device="cuda", dtype=torch.bfloat16)
    out = flash_attn_with_kvcache(q, cache, cache, softmax_scale=1.0)
    torch.testing.assert_close(out, torch.ones_like(out))
