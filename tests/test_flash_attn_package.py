"""flash-attn's padding and rotary embedding: signatures, padding by definition, rotation against float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import ringflash.flash_attn
import ringflash.flash_attn.flash_attn_interface
from ringflash import ArgumentError, flash_attn_with_kvcache
from ringflash.flash_attn.bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input
from ringflash.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def named(x: object) -> str:
    return str(x).removeprefix("torch.")


SIGNATURES = {
    unpad_input: "(hidden_states, attention_mask, unused_mask=None)",
    pad_input: "(hidden_states, indices, batch, seqlen)",
    index_first_axis: "(input, indices)",
    index_put_first_axis: "(values, indices, first_axis_dim)",
    apply_rotary_emb: "(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, "
    "max_seqlen=None)",
    apply_rotary_emb_qkv_: "(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, "
    "num_heads_q=None)",
    apply_rotary_emb_kv_: "(kv, cos, sin, interleaved=False, seqlen_offsets=0)",
    RotaryEmbedding: "(dim, base=10000.0, interleaved=False, scale_base=None, device=None, *, pos_idx_in_fp32=True)",
    RotaryEmbedding.forward: "(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None)",
    RotaryEmbedding._update_cos_sin_cache: "(self, seqlen, device=None, dtype=None)",
}
"""Those of flash-attn 2.8.3; `pos_idx_in_fp32` is of 2.7, and not positional, as it stood before `device` there."""


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda x: x.__qualname__)
def test_signatures_are_those_of_flash_attn(function: Callable) -> None:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[function]


def test_both_modules_have_all_seven_functions() -> None:
    interface = ringflash.flash_attn.flash_attn_interface
    assert len(interface.__all__) == 7
    assert set(ringflash.flash_attn.__all__) == {*interface.__all__, "__version__"}
    for name in interface.__all__:
        assert getattr(interface, name) is getattr(ringflash.flash_attn, name) is getattr(ringflash, name)
    assert apply_rotary_emb_func is apply_rotary_emb


# Padding


MASKS = st.integers(1, 4).flatmap(
    lambda seqlen: st.lists(st.lists(st.sampled_from([0, 0, 1, 2]), min_size=seqlen, max_size=seqlen), min_size=1)
)
"""0 padding, 1 used, 2 kept and unused."""


@given(marks=MASKS, bools=st.booleans(), trailing=st.sampled_from([(), (3,), (2, 5)]))
def test_unpadding_keeps_what_the_masks_mark_and_padding_undoes_it(
    marks: list[list[int]], bools: bool, trailing: tuple[int, ...]
) -> None:
    mark = torch.tensor(marks)
    used, unused = (mark == 1, mark == 2) if bools else ((mark == 1).int(), (mark == 2).int())
    x = torch.randn(*mark.shape, *trailing)
    packed, indices, cu_seqlens, longest, seqused = unpad_input(x, used, unused)
    rows = [[i for i, y in enumerate(row) if y] for row in marks]
    flat = [b * mark.shape[1] + i for b, row in enumerate(rows) for i in row]
    assert indices.tolist() == flat
    assert torch.equal(
        packed, torch.stack([x[b, i] for b, row in enumerate(rows) for i in row] or [x[0, 0]])[: len(flat)]
    )
    assert cu_seqlens.tolist() == [sum(map(len, rows[:b])) for b in range(len(rows) + 1)]
    assert (longest, type(longest)) == (max(map(len, rows)), int)
    assert seqused.tolist() == [row.count(1) for row in marks]
    assert (cu_seqlens.dtype, seqused.dtype, indices.dtype) == (torch.int32, torch.int32, torch.int64)
    padded = pad_input(packed, indices, *mark.shape)
    assert torch.equal(padded, x * (mark > 0).view(*mark.shape, *(1 for _ in trailing)))
    alone = unpad_input(x, used)
    assert [len(alone), *alone[2].diff().tolist()] == [5, *seqused.tolist()]


def test_gradients_of_padding() -> None:
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    torch.autograd.gradcheck(lambda x: unpad_input(x, mask)[0], x)
    packed, indices, *_ = unpad_input(x.detach(), mask)
    torch.autograd.gradcheck(lambda x: pad_input(x, indices, 2, 3), packed.requires_grad_())


def test_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"attention_mask has shape \(2, 4\); allowed is \(2, 3\)"):
        unpad_input(torch.randn(2, 3, 1), torch.ones(2, 4))
    with pytest.raises(ArgumentError, match=r"unused_mask has shape \(3, 2\); allowed is \(2, 3\)"):
        unpad_input(torch.randn(2, 3, 1), torch.ones(2, 3), torch.ones(3, 2))


# Rotary embedding


@dataclass(frozen=True)
class RotaryCase:
    """One problem without its tensors; `lengths` of packed sequences, or all alike of a batch."""

    lengths: tuple[int, ...] = (5, 5)
    packed: bool = False
    offsets: tuple[int, ...] | int = 0
    dims: tuple[int, int] = (8, 8)
    interleaved: bool = False
    dtype: torch.dtype = torch.float32
    tables_fp32: bool = False
    seed: int = 0


@st.composite
def rotary_cases(draw: st.DrawFn) -> RotaryCase:
    packed = draw(st.booleans())
    batch = draw(st.integers(1, 3))
    length = st.integers(0 if packed else 1, 6)
    lengths = tuple(draw(st.lists(length, min_size=batch, max_size=batch)))
    offset = st.integers(0, 7)
    rotated = draw(st.sampled_from([2, 6, 8]))
    return RotaryCase(
        lengths if packed else lengths[:1] * batch,
        packed,
        draw(st.one_of(offset, st.tuples(*[offset] * batch))),
        (draw(st.sampled_from([8, 11])), rotated),
        draw(st.booleans()),
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
        draw(st.integers(0, 2**20)),
    )


def problem(case: RotaryCase) -> tuple[Tensor, Tensor, Tensor]:
    """X with two heads, and tables of just as many rows as are needed."""
    random = torch.Generator().manual_seed(case.seed)
    starts = [case.offsets] * len(case.lengths) if isinstance(case.offsets, int) else case.offsets
    rows = max(max(case.lengths) + max(starts), 1)
    leading = (sum(case.lengths) + 2,) if case.packed else (len(case.lengths), case.lengths[0])  # 2 behind the last
    x = torch.randn(*leading, 2, case.dims[0], generator=random).to(case.dtype)
    angles = torch.randn(rows, case.dims[1] // 2, generator=random)
    dtype = torch.float32 if case.tables_fp32 else case.dtype
    return x, angles.cos().to(dtype), angles.sin().to(dtype)


def turned(case: RotaryCase, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By definition, token by token in float64: pair (a, b) becomes (a cos - b sin, a sin + b cos)."""
    half = case.dims[1] // 2
    pairs = [(2 * j, 2 * j + 1) if case.interleaved else (j, j + half) for j in range(half)]
    cos, sin, out = cos.double(), sin.double(), x.double().clone()
    starts = [case.offsets] * len(case.lengths) if isinstance(case.offsets, int) else case.offsets
    flat, token = (out if case.packed else out.flatten(0, 1)), 0
    for start, length in zip(starts, case.lengths, strict=True):
        for row in range(start, start + length):
            for j, (first, second) in enumerate(pairs):
                a, b = flat[token, :, first].clone(), flat[token, :, second].clone()
                flat[token, :, first] = a * cos[row, j] - b * sin[row, j]
                flat[token, :, second] = a * sin[row, j] + b * cos[row, j]
            token += 1
    return out


def arguments(case: RotaryCase) -> dict[str, object]:
    """What follows x, cos and sin."""
    offsets = case.offsets if isinstance(case.offsets, int) else torch.tensor(case.offsets, dtype=torch.int32)
    found: dict[str, object] = {"interleaved": case.interleaved, "seqlen_offsets": offsets}
    if case.packed:
        edges = torch.tensor([0, *case.lengths]).cumsum(0).int()
        found |= {"cu_seqlens": edges, "max_seqlen": max(case.lengths)}
    return found


@settings(max_examples=150)
@given(rotary_cases())
def test_rotation_is_as_exact_as_its_dtype_and_the_same_in_place(case: RotaryCase) -> None:
    x, cos, sin = problem(case)
    expected, before = turned(case, x, cos, sin), x.clone()
    found = apply_rotary_emb(x, cos, sin, **arguments(case))
    assert torch.equal(x, before)
    assert found.dtype == case.dtype
    # Two products and their sum in fp32, and one rounding.
    tolerance = torch.finfo(case.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    scale = x.abs().amax().double() * 2 + 1 if x.numel() else 1
    assert ((found.double() - expected).abs() <= tolerance * scale).all()
    assert apply_rotary_emb(x, cos, sin, inplace=True, **arguments(case)) is x
    assert torch.equal(x, found)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_the_rotation(interleaved: bool, packed: bool, inplace: bool) -> None:
    case = RotaryCase((2, 3) if packed else (2, 2), packed, (1, 0), (6, 4), interleaved, torch.float64)
    x, cos, sin = problem(case)

    def rotate(x: Tensor) -> Tensor:
        x = x * 1.0  # no leaf
        out = apply_rotary_emb(x, cos, sin, inplace=inplace, **arguments(case))
        return x if inplace else out

    torch.autograd.gradcheck(rotate, x.requires_grad_())


def test_rotation_is_that_of_transformers_llama() -> None:
    x, cos, sin = problem(RotaryCase())
    wide = (torch.cat([table, table], -1)[:5].unsqueeze(0) for table in (cos, sin))
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), *wide)
    torch.testing.assert_close(apply_rotary_emb(x, cos, sin), expected.transpose(1, 2))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_that_of_the_cache(interleaved: bool) -> None:
    x, cos, sin = problem(RotaryCase(offsets=3))
    cache = torch.zeros(2, 8, 2, 8)
    flash_attn_with_kvcache(
        x, cache, cache.clone(), x, x, cos, sin, torch.tensor([1, 3], dtype=torch.int32), rotary_interleaved=interleaved
    )
    found = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=torch.tensor([1, 3]))
    assert torch.equal(found[0], cache[0, 1:6])
    assert torch.equal(found[1], cache[1, 3:8])


@pytest.mark.parametrize("packed", [False, True])
def test_rotation_compiles_whole(packed: bool) -> None:
    case = RotaryCase((3, 2) if packed else (3, 3), packed, (1, 0))
    x, cos, sin = problem(case)

    def rotate(x: Tensor, inplace: bool) -> Tensor:
        return apply_rotary_emb(x + 1, cos, sin, inplace=inplace, **arguments(case)).sin()

    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    for inplace in (False, True):
        torch.testing.assert_close(compiled(x, inplace), rotate(x, inplace))


@pytest.mark.parametrize("form", ["stacked", "grouped", "kv"])
def test_packed_forms_turn_queries_and_keys_and_leave_values_with_their_gradients(form: str) -> None:
    random = torch.Generator().manual_seed(0)
    angles = torch.randn(2, 4, 3, generator=random, dtype=torch.float64)
    (cos, cos_k), (sin, sin_k) = angles.cos(), angles.sin()
    shape = {"stacked": (2, 3, 3, 2, 8), "grouped": (2, 3, 8, 8), "kv": (2, 3, 2, 2, 8)}[form]
    x = torch.randn(shape, generator=random, dtype=torch.float64)

    def turn(x: Tensor) -> Tensor:
        x = x.clone()
        if form == "kv":
            found = apply_rotary_emb_kv_(x, cos_k, sin_k, True, 1)
        else:
            found = apply_rotary_emb_qkv_(x, cos, sin, cos_k, sin_k, True, 1, num_heads_q=4)
        assert found is x
        return x

    found = turn(x)
    split = {"stacked": lambda x: x.unbind(2), "grouped": lambda x: x.split([4, 2, 2], 2), "kv": lambda x: x.unbind(2)}
    *before, value = split[form](x)
    *after, same = split[form](found)
    assert torch.equal(value, same)
    tables = [(cos_k, sin_k)] if form == "kv" else [(cos, sin), (cos_k, sin_k)]
    for old, new, table in zip(before, after, tables, strict=True):
        torch.testing.assert_close(new, apply_rotary_emb(old, *table, True, seqlen_offsets=1))
    torch.autograd.gradcheck(turn, x.requires_grad_())


# The module


def angles(seqlen: int, dim: int, base: float = 10000.0) -> Tensor:
    """Of frequencies rounded to fp32, in float64."""
    frequency = torch.tensor([base ** (-j / dim) for j in range(0, dim, 2)], dtype=torch.float64)
    return torch.arange(seqlen, dtype=torch.float64)[:, None] * frequency


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_module_turns_each_token_at_its_position(interleaved: bool) -> None:
    rotary, x = RotaryEmbedding(8, base=500.0, interleaved=interleaved), torch.randn(2, 6, 3, 4, 12)
    expected = [apply_rotary_emb(x[:, :, i].double(), *table(8), interleaved, seqlen_offsets=2) for i in (0, 1)]
    found = rotary(x.clone(), seqlen_offset=2)
    torch.testing.assert_close(found[:, :, :2].double(), torch.stack(expected, 2), rtol=0, atol=2e-6)
    assert torch.equal(found[:, :, 2], x[:, :, 2])
    q, kv = rotary(x[:, :, 0].clone(), x[:, :, 1:].clone(), seqlen_offset=torch.tensor([2, 2]))
    assert torch.equal(torch.cat([q[:, :, None], kv], 2), found)
    grouped = rotary(x.flatten(2, 3).clone(), seqlen_offset=2, num_heads_q=4)
    assert torch.equal(grouped, found.flatten(2, 3))


def table(seqlen: int, base: float = 500.0) -> tuple[Tensor, Tensor]:
    found = angles(seqlen, 8, base)
    return found.cos(), found.sin()


def test_tables_grow_when_more_positions_are_needed_and_only_then() -> None:
    rotary, x = RotaryEmbedding(8), torch.randn(1, 4, 3, 2, 8)
    rotary(x.clone())
    assert rotary._cos_cached.shape == (4, 4)
    kept = rotary._cos_cached
    rotary(x[:, :2].clone(), seqlen_offset=2)
    assert rotary._cos_cached is kept
    rotary(x[:, :1].clone(), seqlen_offset=9)
    assert rotary._cos_cached.shape == (10, 4)
    assert torch.equal(rotary._cos_cached[:4], kept)
    rotary(x.clone(), max_seqlen=20)
    assert rotary._cos_cached.shape == (20, 4)
    rotary(x.double())
    assert rotary._cos_cached.dtype == torch.float64
    assert not rotary.state_dict()


def test_tables_are_exact_at_far_positions_whatever_the_module_was_cast_to() -> None:
    far, expected = 100_000, angles(100_000, 8)
    for dtype, cast in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        rotary = RotaryEmbedding(8).to(cast)
        rotary._update_cos_sin_cache(far, device=torch.device("cpu"), dtype=dtype)
        # The frequencies are rounded to fp32: an error of half a unit, times the position.
        tolerance = torch.finfo(dtype).eps + far * 2.0**-24 * torch.tensor([1.0, 0.1, 0.01, 0.001])
        assert ((rotary._cos_cached.double() - expected.cos()).abs() <= tolerance).all()
        assert ((rotary._sin_cached.double() - expected.sin()).abs() <= tolerance).all()
    rounded = RotaryEmbedding(8, pos_idx_in_fp32=False).bfloat16()
    rounded._update_cos_sin_cache(600, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert torch.equal(rounded._cos_cached[512], rounded._cos_cached[513])  # bfloat16 has no 513


def test_tables_of_inference_serve_training_too() -> None:
    rotary, x = RotaryEmbedding(8), torch.randn(1, 4, 3, 2, 8)
    with torch.inference_mode():
        expected = rotary(x.clone())
        kept = rotary._cos_cached
        rotary(x.clone())
        assert rotary._cos_cached is kept
    leaf = x.clone().requires_grad_()
    found = rotary(leaf * 1.0)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * x)  # a rotation keeps lengths


def test_scores_under_xpos_decay_with_the_distance_alone() -> None:
    """The score of pair j is its scale to the power of distance / scale_base, rotated by the distance."""
    dim, scale_base, far = 8, 16.0, 12
    rotary = RotaryEmbedding(dim, scale_base=scale_base)
    x = torch.ones(1, far, 3, 1, dim, dtype=torch.float64)
    q, k, _ = rotary(x).squeeze(0).squeeze(2).unbind(1)
    scale = (torch.arange(0, dim, 2).double() + 0.4 * dim) / (1.4 * dim)
    place = torch.arange(far).double()
    distance = (place[:, None] - place)[..., None]
    expected = 2 * (scale ** (distance / scale_base) * (distance * angles(2, dim)[1]).cos()).sum(-1)
    torch.testing.assert_close(q @ k.T, expected, rtol=1e-6, atol=1e-6)
    q_alone, kv_alone = rotary(x[:, :, 0].clone() * 0 + 1, x[:, :, 1:].clone() * 0 + 1)
    torch.testing.assert_close(q_alone[0, :, 0] @ kv_alone[0, :, 0, 0].T, expected, rtol=1e-6, atol=1e-6)


X = torch.randn(2, 3, 2, 8)
COS = torch.ones(5, 4)
EDGES = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X[0]}, r"x has shape \(3, 2, 8\); allowed is \(batch, seqlen, nheads, headdim\)"),
        ({"cos": COS[:, :0], "sin": COS[:, :0]}, r"cos has shape \(5, 0\)"),
        ({"cos": torch.ones(5, 5), "sin": torch.ones(5, 5)}, "rotary_dim at most 8"),
        ({"sin": COS[:4]}, r"sin has shape \(4, 4\)"),
        ({"sin": COS.half()}, "sin is torch.float16 on cpu; allowed is torch.float32 or float32 on cpu"),
        ({"seqlen_offsets": 3}, "seqlen_offsets=3 for 3 tokens; allowed are the 5 rows"),
        ({"seqlen_offsets": -1}, "seqlen_offsets=-1"),
        ({"seqlen_offsets": torch.tensor([0, 3])}, "seqlen_offsets turn a token at row 5; allowed are the 5 rows"),
        ({"seqlen_offsets": torch.tensor([-1, 0])}, "seqlen_offsets turn a token at row -1"),
        ({"seqlen_offsets": torch.tensor([0])}, r"allowed is a number, or int \(2,\) on cpu"),
        ({"seqlen_offsets": torch.tensor([0.0, 0.0])}, r"allowed is a number, or int \(2,\) on cpu"),
        ({"cu_seqlens": EDGES}, r"x has shape \(2, 3, 2, 8\); allowed with cu_seqlens is \(total, nheads, headdim\)"),
        ({"x": X.flatten(0, 1), "cu_seqlens": EDGES}, "max_seqlen is None with cu_seqlens given"),
        ({"x": X.flatten(0, 1), "cu_seqlens": EDGES, "max_seqlen": 3}, "max_seqlen=3; the longest sequence has 4"),
        ({"x": X.flatten(0, 1), "cu_seqlens": EDGES, "max_seqlen": 6}, "seqlen_offsets=0 for 6 tokens"),
        ({"x": X.flatten(0, 1), "cu_seqlens": EDGES + 1, "max_seqlen": 4}, "it must start at 0"),
        ({"x": X.clone().requires_grad_(), "inplace": True}, "x is a leaf that requires a gradient"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_rotation_refuses_by_name(changed: dict, message: str) -> None:
    before = X.clone()
    with pytest.raises(ArgumentError, match=message):
        apply_rotary_emb(**{"x": X, "cos": COS, "sin": COS, "interleaved": True} | changed)
    assert torch.equal(X, before)


def test_packed_forms_and_the_module_refuse_by_name() -> None:
    for shape, heads in (((2, 3, 2, 2, 8), None), ((2, 3, 8, 8), None), ((2, 3, 7, 8), 4), ((2, 3, 4, 8), 4)):
        with pytest.raises(ArgumentError, match=rf"qkv has shape \({', '.join(map(str, shape))}\)"):
            apply_rotary_emb_qkv_(torch.zeros(shape), COS, COS, num_heads_q=heads)
    with pytest.raises(ArgumentError, match=r"kv has shape \(2, 3, 3, 2, 8\)"):
        apply_rotary_emb_kv_(torch.zeros(2, 3, 3, 2, 8), COS, COS)
    for apply, size in ((apply_rotary_emb_qkv_, 3), (apply_rotary_emb_kv_, 2)):
        with pytest.raises(ArgumentError, match="is a leaf that requires a gradient"):
            apply(torch.zeros(2, 3, size, 2, 8, requires_grad=True), COS, COS)
    with pytest.raises(ArgumentError, match="max_seqlen is None and seqlen_offset a tensor"):
        RotaryEmbedding(8)(torch.zeros(2, 3, 3, 2, 8), seqlen_offset=torch.tensor([0, 1]))
    with pytest.raises(ArgumentError, match="dim=7; allowed are positive even numbers"):
        RotaryEmbedding(7)


@pytest.mark.gpu
@settings(max_examples=40)
@given(rotary_cases())
def test_rotation_on_gpus_waits_for_nothing(case: RotaryCase) -> None:
    """And leaves tokens as they are that stand behind the tables."""
    on_cpu = problem(case)
    given = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments(case).items()}
    x, cos, sin = (x.cuda() for x in on_cpu)
    beyond = given["seqlen_offsets"] + len(cos) if isinstance(given["seqlen_offsets"], Tensor) else None
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = apply_rotary_emb(x, cos, sin, **given)
        same = x if beyond is None else apply_rotary_emb(x, cos, sin, **given | {"seqlen_offsets": beyond})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = apply_rotary_emb(*on_cpu, **arguments(case))
    torch.testing.assert_close(found.cpu(), expected)
    assert torch.equal(same, x)
