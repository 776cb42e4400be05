"""`attention` on one device: any mask, shape, dtype and feature against float64, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_cases import (
    HEAD_DIMS,
    Case,
    Rules,
    Tensors,
    assert_as_exact_as_torch,
    cases,
    layouts,
    solve,
    tensors,
    wide_heads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringflash import ArgumentError, Mask, UnsupportedError
from ringflash.functional import attention
from ringflash.kernels.cpu import blockwise
from ringflash.kernels.modifiers import philox
from ringflash.parallel.execution import operators
from ringflash.parallel.execution.call import Inputs, Request, Settings, locate, prepare, table_of
from ringflash.parallel.mesh import ONE_DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def named(x: object) -> str:
    return str(x).removeprefix("torch.")


def attend(case: Case, problem: Tensors, dense: bool, kernel: str = "auto"):
    """`attention` as a function of query, key, value and sinks in flat form; a dense case as a batch."""

    mask = case.rules.mask()

    def call(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = len(case.lengths) if dense else 1
        query_edges, key_edges = case.edges()
        out, lse = attention(
            *(x.unflatten(0, (batch, x.shape[0] // batch)) for x in (query, key, value)),
            mask=mask,
            cu_seqlens=None if dense else key_edges,
            query_cu_seqlens=None if dense else query_edges,
            seqlen=case.queries // batch,
            key_seqlen=case.keys // batch,
            group=ONE_DEVICE,
            scale=case.scale,
            softcap=case.softcap,
            alibi_slopes=problem.slopes,
            dropout=case.dropout,
            dropout_seed=problem.dropout_seed,
            key_padding_mask=None if problem.padding is None else problem.padding.unflatten(0, (batch, -1)),
            sinks=sinks,
            kernel=kernel,
        )
        assert out.dtype == query.dtype
        assert lse.dtype == torch.float32
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    return call


def check(case: Case, dense: bool, kernel: str = "auto") -> None:
    problem = tensors(case)
    assert_as_exact_as_torch(solve(attend(case, problem, dense, kernel), problem), case, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=60)
@given(st.data())
def test_any_features_of_a_batch_are_as_exact_as_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    check(data.draw(cases(dtype, dense=True)), dense=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=60)
@given(st.data())
def test_any_features_of_packed_documents_are_as_exact_as_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    check(data.draw(cases(dtype, dense=False)), dense=False)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@settings(max_examples=8)
@given(st.data())
def test_any_head_dimension_and_any_of_the_values_is_as_exact_as_torch(dim: int, data: st.DataObject) -> None:
    dense = data.draw(st.booleans())
    case = data.draw(cases(data.draw(st.sampled_from(DTYPES)), dense=dense))
    check(data.draw(wide_heads(case, [dim])), dense)


@settings(max_examples=30)
@given(st.data())
def test_the_reference_has_every_feature(data: st.DataObject) -> None:
    dense = data.draw(st.booleans())
    check(data.draw(cases(torch.float32, dense=dense)), dense=dense, kernel="reference")


EVERY_FEATURE = {"softcap": 2.0, "alibi": "documents", "dropout": 0.4, "padding": True, "sinks": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("dense", [True, False], ids=["batch", "packed"])
def test_all_features_at_once(dense: bool, dtype: torch.dtype) -> None:
    lengths = ((40, 52),) * 3 if dense else ((40, 52), (0, 3), (5, 0), (1, 70), (33, 33))
    check(Case(lengths, Rules(left=30, right=4, sink=2, chunk=48), dtype=dtype, **EVERY_FEATURE), dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("right", [None, 0])
def test_small_random_blocks_with_all_features_at_once(right: int | None, dtype: torch.dtype) -> None:
    """Blocks that are no whole ones of any kernel's."""
    shown = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.15
    rules = Rules(right=right, layout=tuple(map(tuple, shown.tolist())), blocks=(3, 3))
    check(Case(((70, 70), (0, 3), (50, 70), (70, 1)), rules, dtype=dtype, **EVERY_FEATURE), dense=False)


@pytest.mark.parametrize("kernel", ["blockwise", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=20)
@given(st.data())
def test_any_layout_of_blocks_is_as_exact_as_torch(dtype: torch.dtype, kernel: str, data: st.DataObject) -> None:
    dense = data.draw(st.booleans())
    case = data.draw(cases(dtype, dense=dense))
    check(replace(case, rules=replace(case.rules, **data.draw(layouts()))), dense, kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("boundaries", ["cpu", "cuda"])
@pytest.mark.parametrize("right", [None, 0])
def test_small_random_blocks_on_a_gpu(right: int | None, boundaries: str) -> None:
    shown = torch.rand(53, 53, generator=torch.Generator().manual_seed(0)) < 0.1
    rules = Rules(right=right, layout=tuple(map(tuple, shown.tolist())), blocks=(16, 16))
    case = Case(((700, 700), (0, 3), (130, 130)), rules, dims=(64, 64), dtype=torch.bfloat16)
    problem, edges = tensors(case), [torch.tensor(x, device=boundaries) for x in case.edges()]

    def call(*operands: Tensor | None) -> tuple[Tensor, Tensor]:
        moved = (x[None].cuda() for x in operands[:3])
        out, lse = attention(
            *moved,
            mask=rules.mask(),
            cu_seqlens=edges[1],
            query_cu_seqlens=edges[0],
            seqlen=case.queries,
            key_seqlen=case.keys,
            group=ONE_DEVICE,
            scale=case.scale,
        )
        return out[0].cpu(), lse[0].cpu()

    assert_as_exact_as_torch(solve(call, problem), case, problem)


def test_the_blocks_of_a_document_whose_length_the_host_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of cu_seqlens on a GPU must be the rows of the way over the host."""
    monkeypatch.setattr(Inputs, "on_device", lambda inputs: True)
    mask = Mask.causal() & Mask.blocks(torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.5, 8)
    request = Request(mask.spec(), Mask().spec(), "zigzag", "1", "", "").text()
    settings = Settings(request, (1, 40, 40), 1.0, 0.0, 0.0, "auto", False, 0)
    edges = torch.tensor([0, 13, 13, 37, 40])
    inputs = Inputs(*[torch.empty(40, 1, 8)] * 3, None, edges, None, None, None, None, None, None)
    (stage,) = prepare(inputs, settings, table_of(inputs, settings), "forward", locate(inputs, settings)).program.stages
    pairs = sum(launch.intervals.visible().int() for launch in stage.launches)
    assert pairs[0].tolist() == [[(mask & Mask.documents(edges)).sees(q, k) for k in range(40)] for q in range(40)]
    for sizes in ((1, 41, 40), (1, 40, 41)):
        with pytest.raises(ArgumentError, match=r"layout reaches over 40 .* has 41"):
            table_of(inputs, settings._replace(sizes=sizes))


def test_one_interval_for_each_query_takes_one_launch_whatever_a_layout_shows_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = []
    for name in ("attend", "attend_backward"):
        kernel = getattr(blockwise, name)
        monkeypatch.setattr(blockwise, name, lambda *x, f=kernel, **y: launches.append(f.__name__) or f(*x, **y))
    stripes = torch.eye(4).roll(1, 0).tril().bool()
    for mask, count in (
        (Mask.sliding_window(9, sink=2), 1),
        (Mask.blocks(torch.ones(4, 4).tril().bool(), 8) & Mask.causal(), 1),
        (Mask.blocks(torch.ones(4, 4).tril().triu(-1).bool() | stripes.roll(2, 0).tril(), 8), 1),
        (Mask.sliding_window(9, sink=2) & Mask.blocks(torch.ones(4, 4).tril().bool(), 8), 2),
    ):
        launches.clear()
        x = torch.randn(2, 32, 2, 8, requires_grad=True)
        attention(x, x, x, mask=mask, group=ONE_DEVICE)[0].sum().backward()
        assert launches == ["attend"] * count + ["attend_backward"] * count


def test_rows_that_see_no_key_give_nothing_and_take_nothing() -> None:
    query, key = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (5, 2))
    out, lse = attention(query, key, key, group=ONE_DEVICE)
    assert not out[:, :3].any()
    assert lse[..., :3].isneginf().all()
    assert lse[..., 3:].isfinite().all()
    gradient = torch.autograd.grad(out.sum(), query)[0]
    assert not gradient[:, :3].any()
    assert gradient[:, 4].any()


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_no_queries_and_no_keys(queries: int, keys: int) -> None:
    query, key = (torch.randn(2, n, 2, 8, requires_grad=True) for n in (queries, keys))
    out, lse = attention(query, key, key, seqlen=queries, key_seqlen=keys, group=ONE_DEVICE)
    assert out.shape == (2, queries, 2, 8)
    assert not out.any()
    assert lse.isneginf().all()
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (query, key)))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
def test_any_layout_with_a_contiguous_last_dimension(order: tuple[int, ...]) -> None:
    inverse = torch.tensor(order).argsort().tolist()
    plain = [torch.randn(2, 11, 4, 8) for _ in range(3)]
    laid_out = [x.permute(order).contiguous().permute(inverse) for x in plain]
    assert torch.equal(attention(*laid_out, group=ONE_DEVICE)[0], attention(*plain, group=ONE_DEVICE)[0])


def test_slopes_get_no_gradient_and_say_so_and_sinks_get_one() -> None:
    x, sinks = torch.randn(1, 6, 2, 8, requires_grad=True), torch.zeros(2, requires_grad=True)
    slopes = torch.rand(2, requires_grad=True)
    arguments = {"sinks": sinks, "group": ONE_DEVICE}
    with pytest.raises(ArgumentError, match="alibi_slopes requires a gradient; there is none by slopes"):
        attention(x, x, x, alibi_slopes=slopes, **arguments)
    with torch.no_grad():
        attention(x, x, x, alibi_slopes=slopes, **arguments)
    attention(x, x, x, alibi_slopes=slopes.detach(), **arguments)[0].sum().backward()
    assert sinks.grad.any()
    assert x.grad.any()


# Dropout


def philox_by_definition(key: tuple[int, int], counter: list[int]) -> list[int]:
    """Philox-4x32-10 in Python's integers, after Salmon et al., figure 2."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b % 2**32, (a >> 32) ^ c[3] ^ k1, a % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), [0] * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 2, [2**32 - 1] * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_by_definition_gives_the_known_answers_of_random123(key, counter, words) -> None:
    assert " ".join(f"{x:08x}" for x in philox_by_definition(key, counter)) == words


@given(st.integers(0, 2**62), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3))
def test_philox_is_philox(seed: int, counter: list[int]) -> None:
    found = philox(torch.tensor([seed]), *(torch.tensor([x]) for x in counter))
    words = philox_by_definition((seed % 2**32, seed >> 32), [*(x % 2**32 for x in counter), 0])
    assert found.item() == words[0]


def test_dropout_repeats_with_its_seed_and_not_without() -> None:
    x = torch.randn(1, 40, 2, 8)

    def drop(seed: int | None = None) -> Tensor:
        given = None if seed is None else torch.tensor([seed])
        return attention(x, x, x, dropout=0.5, dropout_seed=given, group=ONE_DEVICE)[0]

    torch.manual_seed(1)
    first, second = drop(), drop()
    torch.manual_seed(1)
    assert torch.equal(drop(), first)
    assert not torch.equal(first, second)
    assert torch.equal(drop(7), drop(7))
    assert not torch.equal(drop(7), drop(8))


def test_dropout_keeps_its_share_and_the_mean() -> None:
    """With all scores equal and values of one, out is the number of kept pairs over the number expected."""
    x, ones = torch.zeros(1, 400, 4, 8), torch.ones(1, 400, 4, 8)
    out = attention(x, x, ones, mask=Mask.bidirectional(), dropout=0.3, group=ONE_DEVICE)[0]
    kept = out[..., 0] * 0.7
    assert kept.mean().item() == pytest.approx(0.7, abs=0.003)  # 640,000 pairs: the deviation is 0.0006
    assert kept.std().item() == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.1)


def test_a_sink_of_no_weight_is_as_good_as_none() -> None:
    """Also in a row without keys, whose log-sum-exp is -inf like the sink."""
    leaves = [torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3)]
    sinks = torch.tensor([-torch.inf, 0.5], requires_grad=True)
    arguments = {"cu_seqlens": [0, 0, 4], "query_cu_seqlens": [0, 1, 4], "group": ONE_DEVICE}
    expected, lse = attention(*leaves, **arguments)
    out, lse_with_sinks = attention(*leaves, sinks=sinks, **arguments)
    assert torch.equal(out[:, :, 0], expected[:, :, 0])
    assert torch.equal(lse_with_sinks[:, 0], lse[:, 0])
    assert lse[0, 0, 0] == -torch.inf
    (out.sum() + lse_with_sinks[:, :, 1:].sum()).backward()
    assert all(x.grad.isfinite().all() for x in (*leaves, sinks))
    assert sinks.grad[0] == 0


# torch's transformations


def test_autocast_sets_the_dtype() -> None:
    x = torch.randn(1, 9, 2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(x, x, x, group=ONE_DEVICE)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, attention(*[x.bfloat16()] * 3, group=ONE_DEVICE)[0])
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


FUSED = Case(((9, 9), (3, 7)), dtype=torch.bfloat16, sinks=True)
IN_PRODUCTS = replace(FUSED, dims=(16, 8), softcap=2.0, alibi="documents", dropout=0.4, padding=True)


@pytest.mark.parametrize("case", [FUSED, IN_PRODUCTS], ids=["fused", "products"])
def test_autocast_rounds_nothing_of_what_has_its_dtype(case: Case) -> None:
    """Sums are kept in fp32 by products of torch, which autocast would take in 16 bits."""
    problem = tensors(case)
    expected = solve(attend(case, problem, dense=False), problem)
    with torch.autocast("cpu", torch.bfloat16):
        found = solve(attend(case, problem, dense=False), problem)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(1, 5, 2, 8, requires_grad=True)
    out, _ = attention(x, x, x, group=ONE_DEVICE)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative"):
        gradient.sum().backward()


def test_vmap_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"vmap.*batch dimension"):
        torch.vmap(lambda x: attention(x, x, x, group=ONE_DEVICE)[0])(torch.randn(3, 1, 5, 2, 8))


def test_forward_mode_is_refused() -> None:
    x = torch.randn(1, 5, 2, 8)
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda x: attention(x, x, x, group=ONE_DEVICE)[0], (x,), (x,))


@pytest.mark.parametrize("features", [{}, EVERY_FEATURE], ids=["plain", "every feature"])
def test_compiles_whole_with_boundaries_and_features(features: dict) -> None:
    blocks = {"layout": ((True, False, True), (False, True, True), (True, True, True)), "blocks": (7, 9)}
    case = Case(((20, 25), (0, 4), (7, 7)), Rules(left=9, right=0, **(blocks if features else {})), **features)
    problem = tensors(case)
    eager = solve(attend(case, problem, dense=False), problem)
    compiled = torch.compile(attend(case, problem, dense=False), fullgraph=True, backend="aot_eager")
    for found, right in zip(solve(compiled, problem), eager, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


CHANGING: dict[str, Callable[[int], dict]] = {
    "mask": lambda cut: {"mask": Mask.sliding_window(cut) & Mask.documents([0, cut, 60])},
    "list": lambda cut: {"cu_seqlens": [0, cut, 60]},
    "spans": lambda cut: {"mask": Mask.causal([(3, cut), (cut, cut + 9)])},
    "shared prefix": lambda cut: {"mask": Mask.shared_prefix([cut], [[9, 51 - cut]])},
    "mask and list": lambda cut: {"mask": Mask.documents([0, cut, 60]), "cu_seqlens": [0, cut + 5, 60]},
}


@pytest.mark.parametrize("inside", [False, True], ids=["an argument", "made in compiled code"])
@pytest.mark.parametrize("name", CHANGING)
def test_compiles_whole_with_numbers_that_change_from_call_to_call(name: str, inside: bool) -> None:
    """torch takes a number that it sees change for unknown, which must not show in the text of a mask."""
    x = torch.randn(1, 60, 2, 16)
    torch.compiler.reset()

    def call(x: Tensor, given: object) -> Tensor:
        return attention(x, x, x, **(CHANGING[name](given) if inside else given), group=ONE_DEVICE)[0]

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for cut in (7, 20, 33):
        given = cut if inside else CHANGING[name](cut)
        torch.testing.assert_close(compiled(x, given), call(x, given), rtol=0, atol=0)


@pytest.mark.parametrize("cu_seqlens", [[0, 40, 20, 60], [1, 60], [0]], ids=str)
def test_compiled_code_names_a_bad_list(cu_seqlens: list[int]) -> None:
    x = torch.randn(1, 60, 2, 16)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: attention(x, x, x, cu_seqlens=cu_seqlens, group=ONE_DEVICE), fullgraph=True, backend="eager"
    )
    with pytest.raises(ArgumentError, match=r"cu_seqlens=\("):
        compiled(x)


@pytest.mark.parametrize("features", [{}, EVERY_FEATURE], ids=["plain", "every feature"])
def test_opcheck_of_the_operator(features: dict) -> None:
    case = Case(((6, 8), (3, 3)), Rules(left=9, right=0), **features)
    problem = tensors(case)
    calls = []

    def record(*args: object) -> tuple[Tensor, ...]:
        calls.append(args)
        return operator(*args)

    operator = torch.ops.ringflash.attention.default
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "nobody_listens", lambda _: False)  # so that the operator is called
        patch.setattr(torch.ops.ringflash, "attention", SimpleNamespace(default=record))
        solve(attend(case, problem, dense=False), problem)
    (arguments,) = calls
    leaves = [x.detach().clone().requires_grad_() for x in arguments[:3]]
    torch.library.opcheck(operator, (*leaves, *arguments[3:]))


def test_on_the_meta_device_there_are_shapes_alone() -> None:
    query = torch.empty(1, 6, 4, 8, device="meta", requires_grad=True)
    key = torch.empty(1, 6, 2, 8, device="meta", requires_grad=True)
    out, lse = attention(query, key, key)
    assert (out.shape, lse.shape, out.device.type) == ((1, 6, 4, 8), (1, 4, 6), "meta")
    out.sum().backward()
    assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)


def test_a_gradient_of_zeros_without_memory_comes_to_kernels_as_one_with_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, backward = [], operators.backward

    def noted(dout: Tensor, *others: object) -> tuple[Tensor, ...]:
        given.append(dout.data_ptr())
        return backward(dout, *others)

    monkeypatch.setattr(operators, "backward", noted)
    query = torch.randn(1, 6, 4, 8, requires_grad=True)
    attention(query, query, query)[0].sgn().sum().backward()  # torch gives a sign's gradient as such zeros
    assert given[0]
    assert not query.grad.any()


# Refusals

GOOD = Case(((6, 6),) * 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"softcap": -1.0}, r"softcap=-1.0"),
        ({"softcap": float("nan")}, r"softcap=nan; allowed are 0 for none, and positive numbers"),
        ({"softcap": float("inf")}, r"softcap=inf"),
        ({"mask": "causal"}, r"mask='causal'; allowed are ringflash\.Mask"),
        ({"seqlen": torch.tensor(6)}, r"seqlen=6; allowed are integers"),
        ({"sinks": torch.ones(4).long()}, r"sinks is torch\.int64 on cpu; allowed are floats on cpu"),
        ({"sinks": torch.ones(4, device="meta")}, r"sinks is torch\.float32 on meta"),
        ({"sinks": [1.0] * 4}, r"sinks is a list; allowed are a tensor and None"),
        ({"key_padding_mask": torch.ones(2, 6, device="meta").bool()}, r"key_padding_mask is .* on meta"),
        ({"seqlen": 6.0}, r"seqlen=6\.0; allowed are integers from 0, or None"),
        ({"key_seqlen": -6}, r"key_seqlen=-6"),
        ({"dropout": 1.0}, r"dropout=1.0; allowed is 0 <= dropout < 1"),
        ({"scale": 0.0}, r"scale=0.0"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes is torch.float32 \(3,\)"),
        ({"alibi_slopes": torch.ones(4).double()}, r"alibi_slopes is torch.float64"),
        ({"alibi_slopes": torch.ones(4, device="meta")}, r"alibi_slopes is .* on meta"),
        ({"dropout_seed": torch.tensor([1])}, r"dropout_seed is given, but dropout is 0"),
        ({"dropout": 0.1, "dropout_seed": torch.tensor(1)}, r"dropout_seed is torch.int64 \(\)"),
        ({"key_padding_mask": torch.ones(2, 6)}, r"key_padding_mask is torch.float32"),
        ({"key_padding_mask": torch.ones(2, 5).bool()}, r"key_padding_mask is torch.bool \(2, 5\)"),
        ({"sinks": torch.ones(2)}, r"sinks has shape \(2,\); allowed is \(4,\)"),
        ({"query_cu_seqlens": [0, 12]}, r"query_cu_seqlens is given without cu_seqlens"),
        ({"cu_seqlens": [0, 14]}, r"cu_seqlens ends at 14, behind the last of 12 tokens"),
        ({"cu_seqlens": [0, 4.5, 12]}, r"cu_seqlens=\[0, 4\.5, 12\]; allowed are integers"),
        ({"cu_seqlens": torch.tensor([0, 4.5, 12])}, r"cu_seqlens is torch\.float32 \(3,\); allowed is int32 or int64"),
        (
            {"cu_seqlens": [0, 4.5, 12], "query_cu_seqlens": torch.tensor([0, 4, 12])},
            r"^cu_seqlens=\[0, 4\.5, 12\]; allowed are integers",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 4, 12]), "query_cu_seqlens": [0, 4.5, 12]},
            r"^query_cu_seqlens=\[0, 4\.5, 12\]; allowed are integers",
        ),
        ({"cu_seqlens": torch.tensor([[0, 12]])}, r"cu_seqlens is torch\.int64 \(1, 2\)"),
        ({"cu_seqlens": [[0, 12]]}, r"cu_seqlens=\[\[0, 12\]\]; allowed are integers"),
        ({"cu_seqlens": [0, 9, 5, 12]}, r"cu_seqlens=\(0, 9, 5, 12\)"),
        ({"kernel": "fast"}, r"kernel='fast'"),
        ({"partition": "snake"}, r"partition='snake'"),
        ({"mask": Mask.blocks([[True]], 5)}, r"blocks: layout reaches over 5 queries, a document or sequence has 6"),
        ({"mask": Mask.blocks([[True]], (6, 5))}, r"blocks: layout reaches over 5 keys"),
        ({"query": torch.ones(2, 6, 4)}, r"query has shape \(2, 6, 4\)"),
        ({"query": torch.ones(0, 6, 4, 16)}, r"query has shape \(0, 6, 4, 16\); the batch"),
        ({"query": torch.ones(2, 6, 3, 16)}, r"query has 3 heads, key 2"),
        ({"query": torch.ones(2, 6, 0, 16)}, r"query has shape \(2, 6, 0, 16\).* at least one head"),
        ({x: torch.ones(2, 6, 2, 0) for x in ("query", "key")}, r"query has shape \(2, 6, 2, 0\)"),
        ({"key": torch.ones(2, 6, 2, 16).half()}, r"key is torch.float16 .*, query torch.float32"),
        ({"value": torch.ones(2, 5, 2, 16)}, r"value \(2, 5, 2, 16\)"),
        ({"query": torch.ones(2, 6, 16, 4).mT}, r"query has strides"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refuses_by_name(changed: dict, message: str) -> None:
    problem = tensors(GOOD)
    query, key, value = (x.unflatten(0, (2, 6)) for x in (problem.query, problem.key, problem.value))
    with pytest.raises(ArgumentError, match=message):
        attention(**{"query": query, "key": key, "value": value, "group": ONE_DEVICE} | changed)


def test_every_dtype_of_boundaries() -> None:
    case = replace(GOOD, alibi="documents")
    problem = tensors(case)
    flat = [x[None] for x in (problem.query, problem.key, problem.value)]
    edges = [0, 6, 12]
    expected = attention(*flat, cu_seqlens=edges, alibi_slopes=problem.slopes, group=ONE_DEVICE)[0]
    for dtype in (torch.int32, torch.int64):
        given = torch.tensor(edges, dtype=dtype)
        found = attention(*flat, cu_seqlens=given, alibi_slopes=problem.slopes, group=ONE_DEVICE)[0]
        assert torch.equal(found, expected)


def test_boundaries_in_a_numpy_array_serve_every_layer() -> None:
    problem = tensors(GOOD)
    flat = [x[None] for x in (problem.query, problem.key, problem.value)]
    edges = np.array([0, 6, 12])
    expected = attention(*flat, cu_seqlens=[0, 6, 12], group=ONE_DEVICE)[0]
    for _ in range(2):
        assert torch.equal(attention(*flat, cu_seqlens=edges, group=ONE_DEVICE)[0], expected)
    edges[1] = 5
    expected = attention(*flat, cu_seqlens=[0, 5, 12], group=ONE_DEVICE)[0]
    assert torch.equal(attention(*flat, cu_seqlens=edges, group=ONE_DEVICE)[0], expected)
