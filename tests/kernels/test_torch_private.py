"""What ringflash relies on in each private name of torch: a torch that changes one is told here by name."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ringflash.kernels import torch_private


def test_an_overload_has_its_type() -> None:
    assert isinstance(torch.ops.aten.add.Tensor, torch_private.OpOverload)


def test_no_autocast_ends_autocast_and_gives_it_back() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with torch_private.no_autocast():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def doubled() -> list[str]:
    """Defines the operator ringflash_test::doubled, whose gradient's function calls it again; where it came by."""
    library, came_by = torch.library.Library("ringflash_test", "FRAGMENT"), []
    library.define("doubled(Tensor x) -> Tensor")

    def with_gradient(x: Tensor) -> Tensor:
        came_by.append("gradient")
        with torch_private.below_autograd():
            return torch.ops.ringflash_test.doubled(x)

    def compute(x: Tensor) -> Tensor:
        came_by.append("value")
        return x * 2

    library.impl("doubled", compute, "CompositeExplicitAutograd")
    library.impl("doubled", with_gradient, "Autograd")
    came_by.append(library)  # which unregisters what it has defined once it is gone
    return came_by


def test_below_autograd_an_operator_goes_to_its_value_at_once(doubled: list[str]) -> None:
    del doubled[1:]
    out = torch.ops.ringflash_test.doubled(torch.ones(2, requires_grad=True))
    assert doubled[1:] == ["gradient", "value"]
    assert out.tolist() == [2, 2]
    assert not out.requires_grad


class OfAnotherClass(Tensor):
    """As DTensor and tensors that stand for others while code is traced."""


def test_nobody_listens_but_modes_transformations_profilers_and_tensors_out_of_the_ordinary() -> None:
    tensors = torch.ones(1), torch.nn.Parameter(torch.ones(1)), None
    listens = torch_private.nobody_listens
    assert listens(tensors)
    assert not listens((*tensors, torch.ones(1).as_subclass(OfAnotherClass)))
    for listening in (FlopCounterMode(display=False), torch.device("cpu"), torch.profiler.profile(), FakeTensorMode()):
        with listening:
            assert not listens(tensors)
    for without in (torch.empty(1, device="meta"), torch._efficientzerotensor(1), torch._neg_view(torch.ones(1))):
        assert not listens((*tensors, without))
    heard = []
    torch.func.vmap(lambda x: heard.append(listens(())) or x)(torch.ones(2))
    assert heard == [False]
    assert listens(tensors)


def test_a_mode_of_dispatch_sees_every_operator_below_autograd_too() -> None:
    seen = []

    class Mode(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode(), torch_private.below_autograd():
        x.new_empty(3)
        x.to(torch.float64)
    assert seen == [torch.ops.aten.new_empty.default, torch.ops.aten.to.dtype]
    with Mode():
        x.to(torch.float64)
    assert seen[2:] == [torch_private.to_copy]


def test_a_module_has_hooks_of_any_kind_until_they_are_removed() -> None:
    module = torch.nn.Identity()
    assert not torch_private.has_hooks(module)
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
    ):
        hook = register(lambda *_: None)
        assert torch_private.has_hooks(module)
        hook.remove()
        assert not torch_private.has_hooks(module)


def test_hooks_of_a_tensors_gradient_are_called_by_autograd_grad_until_they_are_removed() -> None:
    weight = torch.ones(2, requires_grad=True)
    weight.register_post_accumulate_grad_hook(lambda _: None)
    assert not torch_private.has_gradient_hooks(weight)
    hook = weight.register_hook(lambda gradient: 3 * gradient)
    assert torch_private.has_gradient_hooks(weight)
    (found,) = torch.autograd.grad(weight.sum(), weight)
    assert found.tolist() == [3, 3]
    hook.remove()
    assert not torch_private.has_gradient_hooks(weight)


def test_any_requires_grad_looks_at_tensors_among_other_arguments() -> None:
    plain, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    assert torch_private.any_requires_grad(None, 3, "text", plain, leaf)
    assert not torch_private.any_requires_grad(None, 3, "text", 0.5, True, plain)


def test_a_function_that_is_never_compiled_runs_below_a_compiled_frame() -> None:
    compiling = []

    @torch_private.never_compiled
    def inner(x: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x + 1

    torch.compiler.reset()
    compiled = torch.compile(lambda x: inner(x * 2) * 3, backend="eager")
    assert compiled(torch.ones(1)).item() == 9
    assert compiling == [False]


def test_marking_a_function_as_never_compiled_imports_no_compiler() -> None:
    program = "import runpy, sys; never = runpy.run_path(sys.argv[1])['never_compiled']; never(print)"
    program += "; print('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", program, torch_private.__file__]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == "False"


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, name: str) -> Tensor:
        return x * 3

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        assert ctx.name == "name"
        return gradient * 3, None


def test_a_function_applied_unbound_has_the_gradient_of_one_applied() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    out = torch_private.apply_unbound(Tripled, x, "name")
    assert torch.equal(out, Tripled.apply(x, "name"))
    assert torch.autograd.grad(out.square(), x)[0].item() == 36


def test_transformations_of_torch_func_are_seen_at_work() -> None:
    seen = []

    def note(x: Tensor) -> Tensor:
        seen.append((torch_private.transforms_active(), torch_private.only_functionalized()))
        return x.sum()

    x = torch.ones(2, 3)
    for transformation in (torch.func.grad, torch.func.vmap, torch.func.functionalize):
        assert not torch_private.transforms_active()
        transformation(note)(x)
    torch.func.functionalize(torch.func.grad(note))(x)
    assert seen == [(True, False), (True, False), (True, True), (True, False)]


def test_tensors_that_stand_for_several_are_seen_through_other_transformations() -> None:
    seen = []

    def note(x: Tensor, y: Tensor) -> Tensor:
        seen.append((torch_private.mapped(x), torch_private.mapped(None, 3, y), torch_private.mapped(y, x)))
        return (x * y).sum()

    x, y = torch.ones(2, 3), torch.ones(3)
    assert not torch_private.mapped(x, y)
    torch.func.grad(note)(y, y)
    torch.func.vmap(note, (0, None))(x, y)
    torch.func.vmap(torch.func.grad(note), (0, None))(x, y)
    assert seen == [(False, False, False), (True, False, True), (True, False, True)]


CUDA = torch.device("cuda", 0)


def test_warming_up_is_asked_of_the_manager_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    asked = []

    def get_manager(index: int, create_if_none_exists: bool) -> object:
        asked.append((index, create_if_none_exists))
        return managers.pop()

    monkeypatch.setattr(trees, "get_manager", get_manager)
    managers = [SimpleNamespace(in_warmup=True), SimpleNamespace(in_warmup=False), None]
    assert [torch_private.warming_up(CUDA) for _ in range(3)] == [False, False, True]
    assert asked == [(0, False)] * 3
    assert not torch_private.warming_up(torch.device("cpu"))


def test_the_manager_of_cuda_graphs_answers_as_it_is_asked() -> None:
    """Without a replacement: no graphs, in this thread and in one that torch.compile has never run in."""
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    assert hasattr(trees.CUDAGraphTreeManager, "in_warmup")
    found = [torch_private.warming_up(CUDA)]
    thread = threading.Thread(target=lambda: found.append(torch_private.warming_up(CUDA)))
    thread.start()
    thread.join()
    assert found == [False, False]


def test_an_assertion_that_is_not_waited_for_says_its_text_also_in_compiled_code() -> None:
    def asserted(x: Tensor) -> Tensor:
        torch_private.assert_async((x > 0).all(), "x must be positive")
        return x + 1

    for function in (asserted, torch.compile(asserted, backend="aot_eager", fullgraph=True)):
        assert function(torch.ones(2)).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="x must be positive"):
            function(torch.zeros(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_cpu_operator_gives_the_log_sum_exp_and_takes_one_of_more_keys(causal: bool, masked: bool) -> None:
    if causal and masked:
        pytest.skip("one or the other")
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 3, 5, 16) for _ in range(4))
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else torch.rand(5, 5) < 0.3
    hidden[:, 0] = False
    scores = q @ k.mT * 0.5
    scores = scores.masked_fill(hidden, -torch.inf) if causal or masked else scores
    mask = torch.zeros(5, 5).masked_fill(hidden, -torch.inf) if masked else None
    settings = {"is_causal": causal, "attn_mask": mask, "scale": 0.5}
    out, lse = torch_private.cpu_attention(q, k, v, **settings)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ v)

    total = torch.logaddexp(lse, torch.randn_like(lse))  # as if there were other keys
    weights = torch.exp(scores - total[..., None])
    out = torch.randn_like(dout)
    dscores = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * 0.5
    found = torch_private.cpu_attention_backward(dout, q, k, v, out, total, dropout_p=0.0, **settings)
    expected = dscores @ k, dscores.mT @ q, weights.mT @ dout
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_rank(tmp_path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_group_is_found_by_its_name() -> None:
    for group in (dist.group.WORLD, dist.new_group([0])):
        assert torch_private.process_group(group.group_name) is group


@pytest.mark.usefixtures("one_rank")
def test_the_default_store_holds_what_is_put_there() -> None:
    store = torch_private.default_store()
    dist.PrefixStore("ringflash/test", store).set("key", "value")
    assert dist.PrefixStore("ringflash/test", torch_private.default_store()).get("key") == b"value"


@pytest.mark.usefixtures("one_rank")
def test_a_group_that_was_destroyed_is_known_while_its_object_lives() -> None:
    group = dist.new_group([0])
    assert not torch_private.is_destroyed(group)
    dist.destroy_process_group(group)
    assert torch_private.is_destroyed(group)


def test_without_transforms_a_tensor_outlives_the_transformation_that_made_it() -> None:
    kept = []

    def function(x: Tensor) -> Tensor:
        with torch_private.without_transforms():
            kept.append(torch.tensor([3, 4]))
        return x.sin().sum()

    torch.func.grad(function)(torch.ones(2))
    assert kept[0].tolist() == [3, 4]
    assert kept[0].numpy().tolist() == [3, 4]


def test_tree_leaves_are_what_containers_hold_however_deep() -> None:
    assert torch_private.tree_leaves([(1, [2]), {"x": (3,)}]) == [1, 2, 3]


def test_symmetric_memory_has_what_makes_and_what_joins_it() -> None:
    found = torch_private.symmetric_memory()
    assert callable(found.empty)
    assert list(inspect.signature(found.rendezvous).parameters) == ["tensor", "group"]


def test_tensors_have_one_storage_if_they_are_of_the_same_memory() -> None:
    with torch_private.FakeTensorMode():
        without = torch.empty(6), torch.empty(6)
    for one, other in ((torch.empty(6), torch.empty(6)), without):
        assert torch_private.storage_of(one) == torch_private.storage_of(one.view(2, 3)[1])
        assert torch_private.storage_of(one) != torch_private.storage_of(other)


def test_tensors_without_memory_have_shapes_gradients_and_autocast() -> None:
    with torch_private.FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(1 << 40, 8, requires_grad=True)
        found = torch.nn.functional.linear(x, torch.ones(4, 8))
        (dx,) = torch.autograd.grad(found.sum(), x)
    assert found.shape == (1 << 40, 4)
    assert found.dtype == torch.bfloat16
    assert dx.shape == x.shape


def test_operators_that_write_to_what_they_are_given_are_told_from_others_by_a_mode_that_is_given_them() -> None:
    changing = {}

    class Listening(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            changing[func.__name__] = torch_private.changes_tensors(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Listening():
        (x + 1).mul_(2)
    assert changing == {"add.Tensor": False, "mul_.Tensor": True}
