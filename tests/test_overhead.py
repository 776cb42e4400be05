"""What a repeated call must not do again, counted rather than timed."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
import triton
from copy_engines import one_of_ranks
from stand_in import Launched, stand_in
from torch import Tensor

import ringflash
from ringflash import DistributedFlashAttention, Mask, Sharding, flash_attn_func
from ringflash.functional import attention
from ringflash.kernels import hopper
from ringflash.kernels.triton import attend as portable
from ringflash.parallel.execution.known_calls import UNNOTED
from ringflash.parallel.mesh import ONE_DEVICE

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

ONCE = {
    # checks
    "check_tensors", "_check_numbers", "check_name", "check_operands", "check_modifiers", "_checked_boundaries",
    # masks, plans, programs
    "spec", "from_spec", "__and__", "key_intervals", "position_bounds", "local_program", "rank_program", "rows_apart",
    # launches: tiles, what is prepared once, Triton's search for the program, checks of descriptors
    "forward_tiles", "key_gradient_tiles", "value_gradient_tiles", "query_gradient_tiles", "__init__:PreparedForward",
    "__init__:PreparedBackward", "__init__:PreparedQueryGradient", "__init__:PreparedKeyGradient",
    "__init__:PreparedNarrowForward", "__init__:PreparedNarrowBackward", "narrow_tiles", "box_descriptor",
    "__init__:Launcher", "described", "descriptor",
    "list_descriptor", "part_descriptors", "description_of", "addressable", "supports", "runs_on", "width_of",
    "run:JITFunction", "run:GluonJITFunction", "__post_init__:TensorDescriptor",
    "_longest_first", "_key_tile_rows",
}  # fmt: skip
"""Functions that a call of a form seen before does not come to."""


@contextmanager
def calls_counted():
    """Names of the Python functions that are called, methods also as "name:Class"."""
    found = Counter()

    def note(frame, event: str, _: object) -> None:
        if event == "call":
            name = frame.f_code.co_name
            own = frame.f_locals.get("self")
            found.update([name, f"{name}:{type(own).__name__}"])
            found["ringflash"] += "ringflash" in frame.f_globals.get("__name__", "")

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def tensors(tokens: int = 256) -> list[Tensor]:
    return [torch.empty(1, tokens, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


WITH_SINKS = Mask.sliding_window(9, 0, 2)
CALLS: dict[str, Callable[..., Tensor]] = {
    "attention": lambda q, k, v: attention(q, k, v, group=ONE_DEVICE)[0],
    "a new mask": lambda q, k, v: attention(q, k, v, mask=Mask.sliding_window(9, 0), group=ONE_DEVICE)[0],
    "a mask with sink tokens": lambda q, k, v: attention(q, k, v, mask=WITH_SINKS, group=ONE_DEVICE)[0],
    "softcap": lambda q, k, v: attention(q, k, v, softcap=20.0, group=ONE_DEVICE)[0],
    "flash_attn": lambda q, k, v: flash_attn_func(q, k, v, causal=True, window_size=(9, 0)),
    "module": DistributedFlashAttention(Mask.causal() & Mask.documents([0, 50, 256]), group=ONE_DEVICE),
}

NARROW = ("a new mask", "flash_attn")
"""Those of which Hopper kernels have all keys of a few rows at once, and find delta beside the gradient of query."""


@pytest.mark.parametrize("kernels", [portable, hopper])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_a_known_form_works_nothing_out_again(kernels: ModuleType, name: str) -> None:
    def both_ways() -> None:
        out = CALLS[name](*tensors())
        out.backward(torch.empty_like(out))

    with stand_in(kernels) as driver:
        with calls_counted() as first:
            both_ways()
        launches, driver.launches = len(driver.launches), []
        with calls_counted() as second:
            both_ways()
    narrow = kernels is hopper and name in NARROW
    run = "run:GluonJITFunction" if narrow else "run:JITFunction"
    assert first.keys() >= {"check_operands", "__init__:Launcher", run}  # or ONCE names what is no more
    assert not ONCE & second.keys()
    # Hopper kernels find delta in the pass that sets gradients to zero, too; not yet with modifiers.
    assert launches == len(driver.launches) == (3 if kernels is hopper and name != "softcap" else 4)
    assert second["ringflash"] < 158


def test_a_repeated_call_of_four_ranks_asks_the_driver_and_python_for_little() -> None:
    """Of the rank that takes most runs of rows; all that it publishes, takes, pushes and adds."""
    sharding = Sharding(Mask.causal(), seqlen=4096, rank=0, ranks=4, head_ranks=1)
    shapes = (sharding.tokens, 8, 64), (sharding.tokens, 2, 64), (sharding.tokens, 2, 64)
    leaves = [torch.zeros(1, *shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    with one_of_ranks(sharding) as (asked, driver), torch.autograd.set_multithreading_enabled(False):
        for _ in range(UNNOTED + 2):  # the last two are noted
            out, _ = attention(*leaves, sharding=sharding)
            out.backward(torch.ones_like(out))
        asked.clear()
        driver.launches = []
        with calls_counted() as forward:
            out, _ = attention(*leaves, sharding=sharding)
        # 5 runs of rows of three owners, and its own
        assert Counter(kind for kind, *_ in asked) == {"numbers": 4, "copy": 5, "event": 4}
        assert len(driver.launches) == 1 + 2
        asked.clear()
        driver.launches = []
        with calls_counted() as backward:
            out.backward(torch.ones_like(out))
        of_kinds = {"numbers": 8, "copy": 5 + 2 * 5, "event": 8, "zero": 1}
        assert Counter(kind for kind, *_ in asked) == of_kinds
        # Keys to be taken, delta, each stage's rows and gradients, peers' parts, and what is rounded.
        assert len(driver.launches) == 1 + 1 + 2 * 2 + 1 + 2
        assert all(isinstance(x, Launched) for x in driver.launches)
    assert not ONCE & (forward | backward).keys()
    assert forward["ringflash"] < 215
    assert backward["ringflash"] < 418


def test_functions_that_are_watched_exist() -> None:
    names = {name.split(":")[0] for name in ONCE}
    defined = {
        name
        for module in list(sys.modules.values())
        if module.__name__.startswith(("ringflash", "triton"))
        for x in vars(module).values()
        for name in (getattr(x, "__name__", ""), *(vars(x) if isinstance(x, type) else ()))
    }
    assert names <= defined


def test_a_mask_that_travels_leaves_its_hash_behind() -> None:
    """Python hashes None by its address."""
    mask, same = (Mask.causal() & Mask.documents([0, 4, 9]) for _ in range(2))
    assert hash(mask) == hash(same)
    assert mask == same
    travelled = pickle.loads(pickle.dumps(mask))
    assert "_hash" in vars(mask)
    assert "_hash" not in vars(travelled)
    assert {mask: 1}[travelled] == 1


def test_another_form_is_checked_again() -> None:
    with stand_in():
        for shape in ((1, 16, 2, 64), (1, 16, 2, 64), (1, 32, 2, 64)):
            query = torch.empty(shape, dtype=torch.bfloat16)
            attention(query, query, query, group=ONE_DEVICE)
        with pytest.raises(ringflash.ArgumentError, match=r"key is torch\.float16"):
            attention(query, query.half(), query, group=ONE_DEVICE)
        with pytest.raises(ringflash.ArgumentError, match="its last dimension must be contiguous"):
            attention(query, query.transpose(2, 3).contiguous().transpose(2, 3), query, group=ONE_DEVICE)
        for _ in range(2):
            with pytest.raises(ringflash.ArgumentError, match=r"softcap=-1"):
                attention(query, query, query, softcap=-1.0, group=ONE_DEVICE)
            with pytest.raises(ringflash.ArgumentError, match=r"partition=\[\]"):
                attention(query, query, query, partition=[], group=ONE_DEVICE)
