"""Launches by CUDA's driver itself, which are handed what Triton's own launches hand it."""

from __future__ import annotations

import ctypes
import inspect
import re
import struct
import threading
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import triton
from stand_in import Launched, stand_in
from test_triton_launch import ROWS, call, plain, with_everything
from triton.backends.nvidia.driver import CudaLauncher

from ringflash.kernels import hopper
from ringflash.kernels.gpu import direct_launch, launcher
from ringflash.kernels.gpu.add_rows import BLOCK, add_rows
from ringflash.kernels.gpu.direct_launch import NUMBERS, DirectLaunch, Parameters, flat
from ringflash.kernels.gpu.lay_rows import lay_rows
from ringflash.kernels.gpu.round_numbers import round_numbers
from ringflash.kernels.intervals import causal_intervals
from ringflash.kernels.key_blocks import KeyBlocks
from ringflash.kernels.sums import Part
from ringflash.kernels.sums import add_rows as add_rows_by_torch
from ringflash.kernels.triton import attend as portable

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)


def with_blocks() -> dict:
    """Of which some pairs are to be hidden."""
    places = torch.arange(ROWS, dtype=torch.int32) // 8
    blocks = KeyBlocks(places, places, (8, 8), torch.ones(2, ROWS // 8, ROWS // 8, dtype=torch.bool))
    return plain(64) | {"intervals": causal_intervals(ROWS, ROWS).with_blocks(blocks)}


FORMS = {
    "D64": plain(64),
    "everything": with_everything(),
    "hopper D64": plain(64) | {"kernels": hopper},
    "hopper D128, carried": plain(128) | {"kernels": hopper, "carried": True, "deterministic": True},
    "hopper D192/128": plain(192) | {"kernels": hopper},
    "hopper D256": plain(256) | {"kernels": hopper},
    "hopper D512": plain(512) | {"kernels": hopper},
    "hopper D512, carried": plain(512) | {"kernels": hopper, "carried": True},
    "hopper, everything": with_everything() | {"kernels": hopper},
    "blocks": with_blocks(),
    "hopper, blocks": with_blocks() | {"kernels": hopper},
    "hopper, narrow": plain(64) | {"kernels": hopper, "intervals": replace(causal_intervals(ROWS, ROWS), band=ROWS)},
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, DirectLaunch]]:
    """Compiled kernels, and how they are launched directly."""
    found = []

    def make(compiled: object, *rest: object) -> DirectLaunch | None:
        direct = direct_launch.direct_launch(compiled, *rest)
        found.append((compiled, direct))
        return direct

    monkeypatch.setattr(launcher, "direct_launch", make)
    return found


def sizes(of: Parameters) -> list[int]:
    """Bytes of each parameter."""
    found = dict.fromkeys([place for place, _ in of.pointers], 8) | dict.fromkeys([place for place, *_ in of.maps], 128)
    found |= {place: len(value) for place, value in of.numbers}
    assert found.keys() == set(range(of.count))
    return [found[place] for place in range(of.count)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_parameters_are_those_that_the_compiled_kernel_has(made: list, form: dict) -> None:
    with stand_in():
        call(**form)
    assert len(made) >= 4
    for compiled, direct in made:
        assert direct is not None
        entry = re.search(r"\.entry[^)]*\)", compiled.asm["ptx"])[0]
        bits = {"b": 8, "u": 8, "s": 8, "f": 8}
        parameters = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.([busf])(\d+)[^\n,\[]*(?:\[(\d+)\])?", entry)
        assert [int(n) // bits[kind] * int(count or 1) for kind, n, count in parameters] == sizes(direct._of)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_direct_launch_is_given_the_arguments_of_its_own_call(
    made: list, monkeypatch: pytest.MonkeyPatch, form: dict
) -> None:
    given, launch = [], DirectLaunch.__call__

    def noted(direct: DirectLaunch, stream: int, arguments: list) -> bool:
        done = launch(direct, stream, arguments)
        assert done
        given.append((direct, list(arguments), _shown(driver.launches[-1], direct._of)))
        return done

    with stand_in():  # lists of blocks are made once for a mask, whichever test comes first
        call(**form)
    made.clear()
    monkeypatch.setattr(DirectLaunch, "__call__", noted)
    with stand_in() as driver:
        call(**form)
        by_triton = {x[4]: x for x in driver.launches}
        for _ in range(2):
            call(**form)
    assert len(given) == 2 * len(made)
    for direct, arguments, (launched, values, maps) in given:
        own = by_triton[launched.function]
        assert (launched.grid, launched.stream, launched.function) == (own[:3], *own[3:5])
        of, by_triton_flat = direct._of, flat(own[9:])
        assert [values[place] for place, _ in of.pointers] == [arguments[index].data_ptr() for _, index in of.pointers]
        assert all(isinstance(by_triton_flat[index], torch.Tensor) for _, index in of.pointers)
        for place, index, x in of.maps:
            described = by_triton_flat[index]
            assert maps[values[place]] == (arguments[index].data_ptr(), x)
            assert x.shape == tuple(reversed(described.shape))
            assert x.strides == tuple(n * described.base.itemsize for n in reversed(described.strides[:-1]))
            assert len(x.block) == len(described.block_shape)
        assert [values[place] for place, _ in of.numbers] == [value for _, value in of.numbers]


@pytest.mark.parametrize("kernels", [portable, hopper], ids=["triton", "hopper"])
def test_blocks_of_keys_from_any_row_on_are_where_compiled_kernels_take_them_to_be(
    monkeypatch: pytest.MonkeyPatch, kernels: ModuleType
) -> None:
    """Of one form, so that the kernels compiled for the first ones launch with the others."""
    addresses, launch = [], DirectLaunch.__call__

    def noted(direct: DirectLaunch, stream: int, arguments: list) -> bool:
        addresses.extend(arguments[index].data_ptr() for _, index in direct._of.pointers)
        return launch(direct, stream, arguments)

    monkeypatch.setattr(DirectLaunch, "__call__", noted)
    places = torch.arange(ROWS + 4, dtype=torch.int32) // 8
    blocks = KeyBlocks(places[:ROWS], places, (1, 1), torch.ones(2, 9, 9, dtype=torch.bool))
    with stand_in():
        for first in range(4):
            intervals = causal_intervals(ROWS, ROWS).with_blocks(blocks.of_keys(first, first + ROWS))
            call(**plain(64) | {"intervals": intervals, "kernels": kernels})
    assert addresses
    assert not any(address % launcher.ALIGNMENT for address in addresses)


def _shown(launched: Launched, of: Parameters) -> tuple[Launched, dict, dict]:
    """A launch, its parameters by place (of tensor maps their address), and those maps."""
    places = (ctypes.c_uint64 * of.count).from_address(launched.parameters)
    values: dict[int, object] = {place: places[place] for place, *_ in of.maps}
    values |= {place: ctypes.c_uint64.from_address(places[place]).value for place, _ in of.pointers}
    values |= {place: ctypes.string_at(places[place], len(value)) for place, value in of.numbers}
    assert all(places[place] % 64 == 0 for place, *_ in of.maps)
    return launched, values, launched.maps


def test_numbers_lie_as_triton_names_their_types() -> None:
    for kind, value in (("i32", -7), ("i64", -(2**40)), ("u32", 2**31), ("u64", 2**63), ("fp32", 0.5), ("fp64", 0.1)):
        of = direct_launch.parameters([kind], [value], ())
        assert of.numbers[0] == (0, struct.pack(NUMBERS[kind], value))
    assert direct_launch.parameters(["fp16"], [0.5], ()) is None  # Triton rounds it


def test_what_tritons_launchers_hold_is_known() -> None:
    """Or launches are left to them, which is slower: `KNOWN` and `PLAIN` are to say what a new one is."""
    held = set(re.findall(r"self\.(\w+)\s*=", inspect.getsource(CudaLauncher.__init__)))
    assert direct_launch.PLAIN.keys() - {"gsan_enabled"} <= held <= direct_launch.KNOWN


@pytest.mark.parametrize("changed", [{"launch_pdl": True}, {"num_ctas": 2}, {"something_new": 0}])
def test_launches_out_of_the_ordinary_are_left_to_triton(monkeypatch: pytest.MonkeyPatch, changed: dict) -> None:
    monkeypatch.setattr(direct_launch, "PLAIN", direct_launch.PLAIN | {})
    with stand_in() as driver:
        make = driver.launcher_cls

        def changed_launcher(*of: object) -> object:
            found = make(*of)
            vars(found).update(changed)
            return found

        driver.launcher_cls = changed_launcher
        for _ in range(2):
            call(**plain(64))
        assert not any(isinstance(x, Launched) for x in driver.launches)


def test_hooks_of_profilers_hear_of_every_launch() -> None:
    hook = triton.knobs.runtime.launch_enter_hook
    with stand_in() as driver:
        call(**plain(64))
        hook.add(print)
        try:
            driver.launches = []
            call(**plain(64))
            assert not any(isinstance(x, Launched) for x in driver.launches)
        finally:
            hook.remove(print)
        driver.launches = []
        call(**plain(64))
        assert all(isinstance(x, Launched) for x in driver.launches)


@pytest.mark.parametrize("kernels", [portable, hopper], ids=["triton", "hopper"])
def test_each_thread_has_parameters_of_its_own_and_launches_by_triton_first(kernels: ModuleType) -> None:
    query = torch.empty(ROWS, 2, 64, dtype=torch.bfloat16)

    def attend() -> None:
        kernels.attend(query, query, query, causal_intervals(ROWS, ROWS), scale=1.0)

    with stand_in() as driver:
        for _ in range(2):
            attend()
        for _ in range(2):
            thread = threading.Thread(target=lambda: (attend(), attend()))
            thread.start()
            thread.join()
    by_driver = [isinstance(x, Launched) for x in driver.launches]
    assert by_driver == [False, True, False, True, False, True]
    assert len({x.parameters for x in driver.launches if isinstance(x, Launched)}) > 1


# Rows that are added to sums


def parts_of(device: str) -> tuple[list[torch.Tensor], list[Part]]:
    generator = torch.Generator().manual_seed(0)
    shapes = (3 * BLOCK // 64, 2, 64), (3 * BLOCK // 64, 2, 32)
    sums = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    scattered = torch.tensor([4, 5, 100], device=device)
    rows = [slice(0, 0), *4 * [slice(3, 90)], *2 * [slice(80, 181)], scattered, *5 * [slice(0, 192)]]
    found = []
    for x in rows:
        for which in range(2):
            added = torch.randn(len(sums[which][x]), *shapes[which][1:], generator=generator).to(device)
            found.append(Part(which, x, added.data_ptr(), lambda added=added: added))
    return sums, [*found, found[3]]


@pytest.mark.gpu
def test_rows_are_added_to_sums_as_torch_adds_them_bit_for_bit() -> None:
    for _ in range(3):
        sums, parts = parts_of("cuda")
        expected = [x.clone() for x in sums]
        add_rows_by_torch(expected, parts)
        add_rows(sums, parts)
        assert all(torch.equal(a, b) for a, b in zip(sums, expected, strict=True))


def test_the_same_rows_of_keys_and_values_from_up_to_four_ranks_are_one_launch() -> None:
    for direct in (False, True):
        sums, parts = parts_of("cpu")
        with stand_in() as driver:
            for _ in range(1 + direct):
                driver.launches = []
                add_rows(sums, parts)
            assert len(driver.launches) == 1 + 1 + 2 + 1
            assert all(isinstance(x, Launched) == direct for x in driver.launches)


# Rows that are laid beside each other, and numbers that are rounded


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "dims"), [(512, (128, 128)), (77, (64, 192)), (1, (8, 16))])
def test_rows_lie_beside_each_other(rows: int, dims: tuple[int, int]) -> None:
    for _ in range(3):
        first, second = (torch.randn(rows, 2, dim, device="cuda").bfloat16() for dim in dims)
        expected = torch.cat([x.flatten(1).view(torch.uint8) for x in (first, second)], 1)
        target = torch.zeros(expected.numel() + 16, dtype=torch.uint8, device="cuda")
        lay_rows(first, second, target[:-16])
        assert torch.equal(target[:-16].view_as(expected), expected)
        assert not target[-16:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_rounds_them_bit_for_bit(dtype: torch.dtype) -> None:
    out_of_the_ordinary = [0.0, -0.0, float("inf"), 1e-40, 3.3e38, 1.00390625, 65519.9, 65520.0]
    for _ in range(3):
        numbers = 1e3 * torch.randn(9001, device="cuda"), torch.tensor(out_of_the_ordinary, device="cuda")
        for some in (numbers, numbers[:1], numbers[1:]):
            rounded = [(x, torch.empty_like(x, dtype=dtype)) for x in some]
            round_numbers(rounded)
            assert all(torch.equal(y.view(torch.int16), x.to(dtype).view(torch.int16)) for x, y in rounded)
