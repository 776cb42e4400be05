"""Every private name of torch that ringflash uses, and why no public one does: one file's work for a new torch.

tests/kernels/test_torch_private.py shows for each name what it is relied on for. The file imports nothing of ringflash,
so that everything may import it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch._subclasses
import torch.utils._python_dispatch
import torch.utils._pytree
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

OpOverload = torch._ops.OpOverload
"""The type of torch.ops.<namespace>.<name>.default, for annotations; torch names it nowhere else."""

# Dispatch and autograd

no_autocast: Callable[[], AbstractContextManager] = torch._C._DisableAutocast
"""Ends autocast of every device within a `with`.

torch.autocast(device_type, enabled=False) does so for one device, at several microseconds a call.
"""

below_autograd: Callable[[], AbstractContextManager] = torch._C._AutoDispatchBelowAutograd
"""Calls operators within a `with` as if none of them had a gradient: by which a gradient's own operator goes on.

torch.no_grad() lets each call pass through the Autograd key again, and so through the function that calls.
"""

any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
"""Whether one of the arguments is a tensor that requires a gradient. In Python it would be a loop over 20 of them."""

never_compiled: Callable[[Callable], Callable] = torch._disable_dynamo
"""A function that torch.compile leaves alone. Unlike torch.compiler.disable, it does not import torch._dynamo."""


def apply_unbound(function: type[torch.autograd.Function], *inputs: object) -> Any:
    """`function.apply` outside of torch.func.

    `torch.autograd.Function.apply` binds the names of `forward`'s arguments first, for 10 us, which only torch.func
    has need of. The method of its base class is what it calls thereafter.
    """
    return super(torch.autograd.Function, function).apply(*inputs)  # pyrefly: ignore[missing-attribute]  # stub lacks it


TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode
"""Is given every operator within a `with`, to run it or something else; documented, under a private module only."""

to_copy: OpOverload = torch.ops.aten._to_copy.default
"""What `Tensor.to` calls below autograd where its result is a copy: a mode of dispatch hears no public name of it."""


def changes_tensors(operator: Any) -> bool:
    """Whether one of torch's operators writes to a tensor that it is given."""
    return operator._schema.is_mutable


FakeTensorMode = torch._subclasses.FakeTensorMode
"""Makes tensors without memory of all that operators give within a `with`; real tensors come in as such.

Those of the meta device are public, but have no autocast, and libraries look at their values as if they had some.
"""


def storage_of(x: Tensor) -> int:
    """What tells the memory of a tensor from that of others, also where it stands for memory that is not there.

    `data_ptr()` is 0 for all tensors of the latter kind, and a storage is another object each time it is asked for.
    """
    return x.untyped_storage()._cdata


_PLAIN = frozenset([Tensor, torch.nn.Parameter, type(None)])


def nobody_listens(tensors: tuple) -> bool:
    """Whether a call of an operator is its functions' alone, so that these may as well be called by themselves.

    The dispatcher takes 20 arguments apart and puts them together again, each time that an operator calls another, for
    5 to 10 us. It need not where nothing looks at operators: no mode of dispatch (torch.compile's tracing, selective
    checkpoints) or of functions (a default device), no transformation of torch.func, no profiler, and no tensor of
    another class, or whose memory does not hold what it stands for: on the meta device there is none, zeros that a
    gradient gives may have none, and a negative may be what lies there with its sign changed. The dispatcher has other
    functions for the first, and makes ordinary tensors of the others. No public name asks for any of these.

    Args:
        tensors: the operator's arguments that are tensors, or None.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or transforms_active()
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    ):
        return False
    for x in tensors:  # noqa: SIM110 - a generator would be a call for each
        if x is not None and (x.is_meta or x._is_zerotensor() or x.is_neg()):
            return False
    return True


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether something is to happen when a module is called, or in its backward pass. No public name asks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether something is to happen to a tensor's gradient, as `register_hook` has it. No public name asks.

    It happens in torch.autograd.grad, too, to what that finds, be it a part of the gradient.
    """
    return bool(x._backward_hooks)


# torch.func


transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transformation of torch.func (grad, vjp, jvp, vmap, functionalize) is at work. No public name asks."""

without_transforms: Callable[[], AbstractContextManager] = torch._C._DisableFuncTorch
"""Within a `with`, tensors are made as if no transformation were at work, and may be kept beyond it.

What is made under torch.func.grad or vmap otherwise stands for one pass of that transformation, and is dead behind it.
"""


def only_functionalized() -> bool:
    """Whether the innermost transformation of those that are active is functionalization, as torch.compile uses it."""
    innermost = torch._C._functorch.peek_interpreter_stack().key()
    return innermost == torch._C._functorch.TransformType.Functionalize


def mapped(*arguments: object) -> bool:
    """Whether one of the arguments is a tensor that stands for several under torch.vmap.

    Such a tensor shows the shape of one of those that it stands for, so its public face does not tell.
    """
    if not transforms_active():
        return False
    functorch = torch._C._functorch
    for x in arguments:
        while isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x):
            if functorch.is_batchedtensor(x):
                return True
            x = functorch.get_unwrapped(x)
    return False


# CUDA graphs, kernels


def warming_up(device: torch.device) -> bool:
    """Whether torch.compile may be warming up for CUDA graphs (mode="reduce-overhead") in this thread."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or device.type != "cuda":
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
    except AssertionError:  # a thread that has nothing to do with compiled code
        return False
    return manager is not None and manager.in_warmup


assert_async: Callable[[Tensor, str], None] = torch._assert_async
"""Ends the process, with this text on standard error, if a bool on a GPU is false, which the host does not wait for.

torch._check and assert read it.
"""

cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What scaled_dot_product_attention runs on CPUs, with the log-sum-exp, which the public function keeps to itself."""

cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""Its gradient, from a log-sum-exp over more keys than those at hand."""


# torch.distributed


def process_group(name: str) -> ProcessGroup:
    """The group of a `group_name`: operators take no objects, and torch's own collectives find theirs so as well."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # pyrefly: ignore[bad-argument-type]  # stub: NewType


def is_destroyed(group: ProcessGroup) -> bool:
    """Whether destroy_process_group has ended a group whose object is still there; no public name asks."""
    return group not in torch.distributed.distributed_c10d._world.pg_map


def default_store() -> Store:
    """The store that init_process_group made or was given; it has no other name where torchrun made it."""
    return torch.distributed.distributed_c10d._get_default_store()


def symmetric_memory() -> Any:
    """Tensors that lie in memory which the ranks of a host can read of each other: `empty` and `rendezvous`.

    torch.distributed has them under a private name only. Imported when it is asked for: it registers operators.
    """
    import torch.distributed._symmetric_memory

    return torch.distributed._symmetric_memory


# Containers

tree_leaves: Callable[[Any], list[Any]] = torch.utils._pytree.tree_leaves
"""What lists, tuples and dicts hold, however deep; torch has no public walk of them."""
