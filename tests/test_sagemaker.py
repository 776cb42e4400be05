"""SageMaker's modules: any layout and packing against float64, masks, Hugging Face's Llama, and what they refuse."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_cases import Case, Rules, Tensors, assert_as_exact_as_torch, exact, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llama import VOCABULARY, assert_gradients_equal, gradients, llama, loss_sum, replaced
from torch import Tensor

import ringflash.sagemaker
from ringflash import ArgumentError, Sharding
from ringflash.functional import attention
from ringflash.parallel.positions.mask import Mask
from ringflash.sagemaker import masks
from ringflash.sagemaker.nn.attn import FlashGroupedQueryAttention, FlashSelfAttention
from ringflash.sagemaker.nn.huggingface.llama_flashattn import LlamaFlashAttention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = [" ".join(axes) for axes in itertools.permutations("bhsd")]


def named(x: object) -> str:
    return str(x).removeprefix("torch.")


# Against float64


def lay(x: Tensor, layout: str) -> Tensor:
    """(b, s, h, d) in the order of a layout, in memory too."""
    return x.permute(["bshd".index(axis) for axis in layout.split()]).contiguous()


def laid_back(x: Tensor, layout: str) -> Tensor:
    return x.permute([layout.split().index(axis) for axis in "bshd"])


def pack(parts: list[Tensor], packing: str, layout: str) -> tuple[Tensor, ...] | Tensor:
    """Tensors (b, s, h, d), as a module may be given them."""
    laid, heads = [lay(x, layout) for x in parts], layout.split().index("h")
    if packing == "tuple":
        return tuple(laid)
    return torch.cat(laid, heads) if packing == "side by side" else torch.stack(laid, heads)


@st.composite
def sagemaker_cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """What SageMaker's modules can be asked: causal or not, padding, dropout, biases of ALiBi."""
    length = st.sampled_from([1, 2, 7, 16, 33])
    lengths = draw(st.tuples(length, length) | length.map(lambda n: (n, n)))
    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2)]))
    dim, causal = draw(st.sampled_from([8, 16, 40])), draw(st.booleans())
    return Case(
        (lengths,) * draw(st.integers(1, 3)),
        Rules(right=0 if causal else None),
        (key_heads * group, key_heads),
        (dim, draw(st.sampled_from([dim, dim, 24]))),
        dtype,
        draw(st.sampled_from([0.1, 0.25, 0.7])),
        alibi="heads" if causal and group == 1 and draw(st.booleans()) else "",
        dropout=draw(st.sampled_from([0.0, 0.0, 0.5])),
        padding=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


MASK_FORMS = ("bool", "integers", "row", "row -inf", "row -10000", "square", "square -inf", "square min")


def mask_in_form(form: str, visible: Tensor, queries: int, causal: bool, dtype: torch.dtype) -> Tensor:
    """Keys that may be seen, (b, s), as models pass them."""
    if form in ("bool", "integers"):
        return visible if form == "bool" else visible.long()
    kind, *hidden = form.split()
    keys = visible.shape[1]
    seen = visible[:, None, None]
    if kind == "square":
        aligned = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        seen = seen & (aligned if causal else torch.ones(queries, keys, dtype=torch.bool))
    if not hidden:
        return seen
    number = torch.finfo(dtype).min if hidden[0] == "min" else float(hidden[0])
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, number)


def biases(slopes: Tensor, visible: Tensor | None, batch: int, keys: int) -> Tensor:
    """The mask that SageMaker's documentation makes for ALiBi, with padding as it means it."""
    mask = slopes[None, :, None, None] * torch.arange(1 - keys, 1, dtype=torch.float32)
    return mask if visible is None else mask.expand(batch, -1, -1, -1).masked_fill(~visible[:, None, None], -torch.inf)


def module_call(case: Case, problem: Tensors, packing: str, layout: str, form: str) -> Callable[..., Tensor]:
    """One of the modules, of flat tensors."""
    batch, (queries, keys) = len(case.lengths), case.lengths[0]
    causal = case.rules.right == 0
    visible = None if problem.padding is None else problem.padding.view(batch, keys)
    if case.alibi:
        mask = biases(problem.slopes, visible, batch, keys)
    else:
        mask = None if visible is None else mask_in_form(form, visible, queries, causal, case.dtype)
    arguments = {"attn_mask": mask, "causal": causal, "layout": layout}

    def call(*flat: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (batch, -1)) for x in flat)
        torch.manual_seed(case.seed)
        if case.heads[0] == case.heads[1]:
            module = FlashSelfAttention(case.dropout, case.scale, bool(case.alibi), bool(case.alibi))
            out = module(pack([q, k, v], packing, layout), **arguments)
        else:
            module = FlashGroupedQueryAttention(case.dropout, case.scale)
            out = module(lay(q, layout), pack([k, v], packing, layout), **arguments)
        assert out.dtype == case.dtype
        return laid_back(out, layout).flatten(0, 1)

    return call


def assert_exact(call: Callable[..., Tensor], case: Case, problem: Tensors) -> None:
    """Out and gradients, by the rule of attention_cases.py; the modules return no log-sum-exp."""
    problem = replace(problem, dlse=torch.zeros_like(problem.dlse))
    leaves = [x.clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    out = call(*leaves)
    found = torch.autograd.grad(out, leaves, problem.dout)
    assert_as_exact_as_torch((out.detach(), exact(case, problem)[1], *found), case, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=40)
@given(data=st.data())
def test_any_layout_packing_and_mask_is_as_exact_as_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(sagemaker_cases(dtype))
    problem = tensors(case)
    if case.dropout:
        torch.manual_seed(case.seed)
        problem = replace(problem, dropout_seed=torch.randint(2**62, (1,)))
    alike = case.dims[0] == case.dims[1] and (
        case.heads[0] != case.heads[1] or case.lengths[0][0] == case.lengths[0][1]
    )
    packing = data.draw(st.sampled_from(["tuple", "side by side", "stacked"] if alike else ["tuple"]))
    layout, form = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(MASK_FORMS))
    assert_exact(module_call(case, problem, packing, layout, form), case, problem)


@pytest.mark.parametrize("packing", ["tuple", "side by side", "stacked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_packing_gives_the_same(layout: str, packing: str) -> None:
    """All sizes differ, so that a layout that was taken for another one cannot pass."""
    parts = list(torch.randn(3, 2, 7, 4, 8))
    out = FlashSelfAttention()(pack(parts, packing, layout), causal=True, layout=layout)
    assert torch.equal(laid_back(out, layout), attention(*parts)[0])
    out = FlashGroupedQueryAttention()(lay(parts[0], layout), pack(parts[1:], packing, layout), layout=layout)
    assert torch.equal(laid_back(out, layout), attention(*parts, mask=Mask.bidirectional())[0])


# SageMaker's own calls


def test_the_documented_call_casts_and_keeps_the_dtype() -> None:
    q, k = torch.randn(2, 2, 4, 9, 16)  # fp32 behind a rotary embedding, as in GPT-NeoX
    v = torch.randn(2, 4, 9, 16, dtype=torch.bfloat16)
    attend = ringflash.sagemaker.nn.attn.FlashSelfAttention()
    out = attend((q, k, v), causal=True, cast_dtype=torch.bfloat16, layout="b h s d")
    expected, _ = attention(*(x.bfloat16().transpose(1, 2) for x in (q, k, v)))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.transpose(1, 2))
    with pytest.raises(ArgumentError, match=r"value is torch.bfloat16.*query torch.float32"):
        attend((q, k, v), causal=True, layout="b h s d")


def test_dropout_drops_while_training_only_and_by_torchs_seed() -> None:
    q, k, v = torch.randn(3, 1, 4, 40, 8)
    attend = FlashSelfAttention(attention_dropout_prob=0.5)
    whole = FlashSelfAttention()((q, k, v))
    assert torch.equal(attend.eval()((q, k, v)), whole)
    attend.train()
    torch.manual_seed(1)
    first, second = attend((q, k, v)), attend((q, k, v))
    torch.manual_seed(1)
    assert torch.equal(first, attend((q, k, v)))
    assert not torch.equal(first, second)
    ones = torch.ones_like(v)  # a row's sum of what is kept: 1 in the mean, in steps of 2 / 40
    kept = torch.stack([attend((0 * q, k, ones))[..., 0] for _ in range(50)])
    assert abs(kept.mean() - 1) < 0.02
    torch.testing.assert_close((kept * 20).round(), kept * 20)
    assert abs(kept.var() - 1 / 40) < 0.005


@pytest.mark.parametrize("alone", [True, False], ids=["prompt", "padded prompt"])
def test_sagemakers_example_of_a_layer_with_grouped_queries_runs(alone: bool) -> None:
    """Its LlamaAttention with FlashGroupedQueryAttention inside, which passes on the mask that the model makes."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")

    class Layer(modeling.LlamaAttention):
        def __init__(self, config: object, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.flash_attn = FlashGroupedQueryAttention(attention_dropout_prob=0.0)

        def forward(self, hidden_states, position_embeddings, attention_mask=None, **_):
            shape = (*hidden_states.shape[:2], -1, self.head_dim)
            query, key, value = (
                project(hidden_states).view(shape).transpose(1, 2)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            query, key = modeling.apply_rotary_pos_emb(query, key, *position_embeddings)
            out = self.flash_attn(query, (key, value), attn_mask=attention_mask, causal=True, layout="b h s d")
            return self.o_proj(out.transpose(1, 2).reshape(*shape[:2], -1)), None

    model = llama("sdpa")
    ids = torch.randint(VOCABULARY, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, 8:] = alone
    expected = model(ids, attention_mask=mask).logits
    for index, layer in enumerate(model.model.layers):
        weights = layer.self_attn.state_dict()
        layer.self_attn = Layer(model.config, index)
        layer.self_attn.load_state_dict(weights)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)


# Hugging Face's Llama


def test_parameters_have_the_names_and_shapes_of_transformers() -> None:
    model = llama()
    for own, theirs in zip(replaced(model).model.layers, model.model.layers, strict=True):
        assert [(name, x.shape) for name, x in own.self_attn.state_dict().items()] == [
            (name, x.shape) for name, x in theirs.self_attn.state_dict().items()
        ]
    assert [name for name, _ in replaced(model).named_parameters()] == [name for name, _ in model.named_parameters()]


PADDINGS = {"none": None, "all ones": ([0, 0], [23, 23]), "right": ([0, 0], [23, 9]), "left": ([0, 14], [23, 23])}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("use_cache", [None, False], ids=["default cache", "no cache"])
def test_logits_and_gradients_are_those_of_eager(padding: str, implementation: str, use_cache: bool | None) -> None:
    model = llama()
    ids, visible = torch.randint(VOCABULARY, (2, 23)), torch.ones(2, 23, dtype=torch.bool)
    arguments = {} if use_cache is None else {"use_cache": use_cache}
    if PADDINGS[padding] is not None:
        place = torch.arange(23)
        visible = (place >= torch.tensor(PADDINGS[padding][0])[:, None]) & (
            place < torch.tensor(PADDINGS[padding][1])[:, None]
        )
        arguments["attention_mask"] = visible.long()
        arguments["position_ids"] = (visible.cumsum(1) - 1).clamp(min=0)
    labels = torch.where(visible, torch.randint(VOCABULARY, (2, 23)), -100)
    results = []
    ours = replaced(model)
    ours.set_attn_implementation(implementation)
    for one in (model, ours):
        logits = one(ids, **arguments).logits
        loss_sum(logits, labels).backward()
        results.append((logits[visible], gradients(one)))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    assert_gradients_equal(results[1][1], results[0][1])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_are_said_by_a_sharding(implementation: str) -> None:
    model = llama()
    sharding = Sharding(cu_seqlens=[0, 5, 6, 23])
    ids, labels = torch.randint(VOCABULARY, (2, 1, 23))
    results = []
    for one, arguments in ((model, {}), (replaced(model), {"sharding": sharding})):
        one.set_attn_implementation("eager" if one is model else implementation)
        logits = one(ids, position_ids=sharding.position_ids, use_cache=False, **arguments).logits
        loss_sum(logits, labels).backward()
        results.append((logits, gradients(one)))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    assert_gradients_equal(results[1][1], results[0][1])
    with pytest.raises(ArgumentError, match=r"attn_mask \(1, 1, 23, 23\) says more than causal=True.*sharding"):
        replaced(model)(ids, position_ids=sharding.position_ids, use_cache=False)


@pytest.mark.parametrize("indices", [True, False], ids=["layer_idx", "found out"])
def test_it_generates_the_tokens_of_transformers_from_padded_prompts(indices: bool) -> None:
    model = llama("sdpa")
    ours = replaced(model)
    if indices:
        for index, layer in enumerate(ours.model.layers):
            layer.self_attn.layer_idx = index
    for seed in range(2):
        ids = torch.randint(1, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(seed))
        mask = (torch.arange(10) >= torch.tensor([0, 3, 9])[:, None]).long()
        arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(ours.generate(ids, **arguments), model.generate(ids, **arguments))


def test_a_cache_that_grows_by_several_tokens_gives_what_one_call_gives() -> None:
    transformers = pytest.importorskip("transformers")
    model = replaced(llama("sdpa"))
    ids = torch.randint(VOCABULARY, (2, 17))
    expected = model(ids, use_cache=False).logits
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        found = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 6), (6, 11), (11, 12), (12, 17))]
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=1e-5)


def test_the_configs_dropout_is_the_layers() -> None:
    model = replaced(llama(attention_dropout=0.5))
    ids = torch.randint(VOCABULARY, (1, 12))
    expected = model(ids).logits
    model.train()
    torch.manual_seed(5)
    dropped = model(ids).logits
    assert not torch.allclose(dropped, expected, atol=1e-3)
    torch.manual_seed(5)
    assert torch.equal(model(ids).logits, dropped)


def test_a_mask_is_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    read, times = masks._visible_keys, []
    monkeypatch.setattr(masks, "_visible_keys", lambda *x: times.append(x) or read(*x))
    model = replaced(llama("sdpa"))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    for calls in (1, 2):
        model(torch.randint(VOCABULARY, (2, 9)), attention_mask=mask)
        assert len(times) == calls


# torch's machinery


@pytest.mark.parametrize("packing", ["tuple", "side by side", "stacked"])
def test_compiles_whole(packing: str) -> None:
    torch.compiler.reset()
    attend = FlashSelfAttention(0.3)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False

    def run(qkv: tuple[Tensor, ...] | Tensor) -> Tensor:
        return attend(qkv, attn_mask=mask, causal=True, cast_dtype=torch.bfloat16, layout="b h s d")

    parts = [x.requires_grad_() for x in torch.randn(3, 2, 9, 4, 8)]
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        out = function(pack(parts, packing, "b h s d"))
        results.append([out, *torch.autograd.grad(out.float().sum(), parts)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_llama_compiles_whole_with_documents_and_padding() -> None:
    torch.compiler.reset()
    model = replaced(llama("sdpa"))
    ids, mask = torch.randint(VOCABULARY, (1, 23)), torch.ones(1, 1, 1, 23, dtype=torch.bool)
    mask[..., 20:] = False

    def run(ids: Tensor, position_ids: Tensor, sharding: Sharding) -> Tensor:
        arguments = {"position_ids": position_ids, "attention_mask": mask, "use_cache": False}
        return model(ids, sharding=sharding, **arguments).logits

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for edges in ([0, 5, 23], [0, 11, 12, 23]):
        sharding = Sharding(cu_seqlens=edges)
        expected = run(ids, sharding.position_ids, sharding)
        torch.testing.assert_close(compiled(ids, sharding.position_ids, sharding), expected)


def test_a_mask_whose_values_matter_is_read_outside_of_the_graph_or_refused() -> None:
    torch.compiler.reset()
    x, mask = torch.randn(1, 2, 5, 8), torch.zeros(1, 1, 1, 5)
    mask[..., 3] = -torch.inf

    def run(x: Tensor) -> Tensor:
        return FlashSelfAttention()((x, x, x), attn_mask=mask)

    assert torch.equal(torch.compile(run, backend="eager")(x), run(x))
    torch.compiler.reset()
    with pytest.raises(Exception, match="cannot look at what it holds"):
        torch.compile(run, backend="eager", fullgraph=True)(x)


def test_it_imports_without_transformers() -> None:
    code = (
        "import sys, ringflash.sagemaker as sagemaker\n"
        "sagemaker.nn.attn.FlashSelfAttention, sagemaker.nn.huggingface.llama_flashattn.LlamaFlashAttention\n"
        "assert not {name.split('.')[0] for name in sys.modules} & {'transformers', 'accelerate', 'flash_attn'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# Refusals

X = torch.randn(2, 4, 5, 8)


def said(argument: object) -> str:
    """Of a case: what is said in it; numbers of a tensor would differ between processes that share the tests."""
    return type(argument).__name__ if isinstance(argument, Tensor | dict) else str(argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_dropout_prob": 1.0}, "attention_dropout_prob=1.0"),
        ({"attention_dropout_prob": -0.1}, "attention_dropout_prob=-0.1"),
        ({"use_alibi": True}, "use_alibi=True with triton_flash_attention=False"),
        ({"group": "world"}, "group='world'"),
    ],
    ids=said,
)
def test_settings_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        FlashSelfAttention(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "b h s"}, r"layout='b h s'; allowed are b, h, s and d"),
        ({"layout": "b s (h d)"}, "layout="),
        ({"layout": None}, "layout=None"),
        ({"causal": None}, "causal=None"),
        ({"cast_dtype": "bfloat16"}, "cast_dtype='bfloat16'"),
        ({"cast_dtype": torch.int32}, r"query is torch.int32"),
        ({"sharding": 2}, "sharding=2"),
        ({"qkv": (X, X)}, "qkv has 2 tensors; allowed are 3"),
        ({"qkv": None}, "qkv is a NoneType"),
        ({"qkv": (X, X, None)}, r"qkv\[2\] is a NoneType"),
        ({"qkv": (X, X, X[0])}, r"qkv\[2\] has shape \(4, 5, 8\); allowed is \(b, h, s, d\)"),
        ({"qkv": X}, r"qkv has shape \(2, 4, 5, 8\).*3 \* h heads, or with a dimension of 3"),
        ({"qkv": torch.stack([X, X], 1)}, r"qkv has shape \(2, 2, 4, 5, 8\)"),
        ({"qkv": (X, X[:1], X[:1])}, "do not go together"),
    ],
    ids=said,
)
def test_arguments_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        FlashSelfAttention()(**{"qkv": (X, X, X), **arguments})


def test_grouped_queries_are_refused_by_name() -> None:
    attend = FlashGroupedQueryAttention()
    with pytest.raises(TypeError, match="layout"):
        attend(X, (X, X))
    with pytest.raises(ArgumentError, match="kv has 3 tensors"):
        attend(X, (X, X, X), layout="b h s d")
    with pytest.raises(ArgumentError, match="q is a tuple"):
        attend((X,), (X, X), layout="b h s d")
    with pytest.raises(ArgumentError, match="the first must be a multiple"):
        attend(X, (X[:, :3], X[:, :3]), layout="b h s d")


UPPER, SHIFTED = torch.ones(5, 5).triu().bool(), torch.ones(5, 5).tril(-1).bool()


@pytest.mark.parametrize(
    ("mask", "causal", "message"),
    [
        (True, True, "attn_mask is a bool"),
        (torch.ones(2, 4), True, r"attn_mask is torch.float32 \(2, 4\)"),
        (torch.ones(2, 5), True, r"attn_mask is torch.float32 \(2, 5\); allowed are \(2, 5\) bool or integers"),
        (torch.ones(3, 5).bool(), True, r"attn_mask is torch.bool \(3, 5\)"),
        (torch.ones(2, 1, 1, 5).long(), True, "attn_mask is torch.int64"),
        (torch.ones(2, 4, 1, 5).bool(), True, r"attn_mask is torch.bool \(2, 4, 1, 5\)"),
        (torch.ones(5, 5).bool(), True, r"attn_mask is torch.bool \(5, 5\)"),
        (torch.ones(2, 1, 5, 5).bool(), True, "says more than causal=True"),
        (torch.ones(1, 1, 5, 5).tril().bool(), False, "says more than causal=False"),
        (UPPER[None, None], True, "says more than causal=True"),
        (SHIFTED[None, None], True, "says more than causal=True"),
        (torch.full((2, 1, 1, 5), -0.5), True, "adds other numbers than 0"),
        (torch.full((2, 1, 1, 5), torch.nan), True, "adds other numbers than 0"),
        (torch.ones(2, 1, 1, 5), True, "adds other numbers than 0"),
    ],
    ids=said,
)
def test_masks_that_cannot_be_honoured_are_refused(mask: object, causal: bool, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        FlashSelfAttention()((X, X, X), attn_mask=mask, causal=causal)


RISING = torch.tensor([0.5, 0.3, 0.2, 0.1])[:, None, None] * torch.arange(5.0)


@pytest.mark.parametrize(
    ("mask", "causal", "message"),
    [
        (None, True, "attn_mask is a NoneType"),
        (RISING[None], False, "use_alibi=True with causal=False"),
        (RISING[None].bfloat16(), True, r"attn_mask is torch.bfloat16.*float32"),
        (RISING[None, :3], True, r"attn_mask is torch.float32 \(1, 3, 1, 5\)"),
        (RISING[None] ** 2, True, "does not rise evenly"),
        (
            RISING[None].masked_fill(torch.eye(4, 5).bool()[None, :, None], -torch.inf),
            True,
            "hides other keys from one head",
        ),
    ],
    ids=said,
)
def test_biases_that_are_not_alibi_are_refused(mask: Tensor | None, causal: bool, message: str) -> None:
    attend = FlashSelfAttention(triton_flash_attention=True, use_alibi=True)
    with pytest.raises(ArgumentError, match=message):
        attend((X, X, X), attn_mask=mask, causal=causal)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions=True"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, r"cu_seq_lens_q.*sharding"),
        ({"is_causal": False}, "is_causal"),
        ({"attention_mask": torch.ones(2, 1, 9, 9).bool()}, "says more than causal=True"),
    ],
    ids=said,
)
def test_a_llamas_arguments_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replaced(llama("sdpa"))(torch.randint(VOCABULARY, (2, 9)), **arguments)


def test_a_layer_needs_the_models_rotation() -> None:
    layer = LlamaFlashAttention(llama().config)
    with pytest.raises(ArgumentError, match="position_embeddings=None"):
        layer(torch.randn(1, 5, 48))


def test_caches_that_do_not_grow_or_are_not_empty_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    model = llama("sdpa")
    ids = torch.randint(VOCABULARY, (2, 9))
    with pytest.raises(ArgumentError, match="past_key_values is a StaticCache that gives 20 keys for 9 tokens"):
        replaced(model)(ids, past_key_values=transformers.StaticCache(model.config, max_cache_len=20))
    filled = model(ids).past_key_values
    with pytest.raises(ArgumentError, match="layer_idx=None, and past_key_values holds"):
        replaced(model)(ids[:, :1], past_key_values=filled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"model_type": "mistral"}, "model_type='mistral'"), ({"is_causal": False}, "is_causal=False")],
    ids=said,
)
def test_configs_of_other_attention_are_refused(settings: dict, message: str) -> None:
    config = SimpleNamespace(**{"hidden_size": 48, "num_attention_heads": 6, "model_type": "llama", **settings})
    with pytest.raises(ArgumentError, match=message):
        LlamaFlashAttention(config)
