"""Host memory that is asked for ahead of the blocks that move, and given back."""

import contextlib
import gc
import mmap
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash.training.memory import host as host_module
from ringflash.training.memory import slabs as slabs_module
from ringflash.training.memory.blocks import BlockMemory
from ringflash.training.memory.host import HostMemory
from ringflash.training.memory.plan import KEEP, OFFLOAD, PAIRS
from ringflash.training.memory.slabs import Slabs, host_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PAGE, SLAB = 64, 256


def _until(holds):
    """Wait for what threads do."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def _ended():
    return not any(thread.name == "slabs" for thread in threading.enumerate())


class _Allocator:
    """Gives memory as the real one does, once it may, and sees what is there.

    Args:
        patch: puts it in the real one's place, and makes pages and slabs small.
        fails: raised in place of the slabs behind `number`.
        free: slabs that it gives in any case.
    """

    def __init__(self, patch, fails=None, number=0, free=0):
        self.may, self.began, self._fails, self._number, self._free = threading.Event(), 0, fails, number, free
        self.given = []
        self.may.set()
        patch.setattr(slabs_module, "host_memory", self)
        patch.setattr(slabs_module, "_threads", lambda: 2)
        patch.setattr(host_module, "PAGE", PAGE)
        patch.setattr(host_module, "SLAB", SLAB)

    def __call__(self, size, device, driver):
        self.began += 1
        number = self.began
        assert number <= self._free or self.may.wait(20)
        if self._fails is not None and number > self._number:
            raise self._fails
        slab = host_memory(size, device, driver)
        self.given.append(weakref.ref(slab.untyped_storage()))
        return slab


def _memory(policy, blocks, limit=1 << 20):
    memory = BlockMemory(blocks)
    memory.start(policy, CPU, limit)
    return memory


def _forward(memory, tokens=40, block=torch.sin, blocks=None):
    """A pass of blocks; the gradient that it has to give as well."""
    memory.begin()
    first = x = torch.linspace(-1, 1, 4 * tokens).view(1, tokens, 4).requires_grad_()
    for _ in memory.placements[:blocks]:
        x = memory.run(block, x)
    memory.end()
    return first, x.sum()


def test_blocks_find_their_memory_ready_once_the_first_has_told_what_they_take(monkeypatch):
    allocator, memory = _Allocator(monkeypatch), _memory(OFFLOAD, 8)
    pages, ran = -(-40 * 16 // PAGE), 0

    def block(x):
        nonlocal ran
        ran += 1
        if ran == 2:  # all is there by now, or comes without anybody's asking; from here on nothing is given
            _until(lambda: memory.host.taken >= 8 * pages * PAGE)
            _until(_ended)
            allocator.may.clear()
        return x.sin()

    first, total = _forward(memory, block=block)
    assert memory.host.used == 8 * pages * PAGE
    assert memory.host.taken - memory.host.used < SLAB
    assert allocator.began == len(allocator.given) == -(-8 * pages * PAGE // SLAB)
    total.backward()
    assert first.grad is not None


def test_blocks_wait_for_memory_that_is_not_ready_and_for_no_more_than_they_take(monkeypatch):
    allocator, memory = _Allocator(monkeypatch), _memory(OFFLOAD, 8)
    allocator.may.clear()
    done = threading.Event()

    def run():
        _forward(memory)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    _until(lambda: allocator.began)
    assert not done.wait(0.05)
    allocator.may.set()
    thread.join(20)
    assert done.is_set()
    expected, found = _forward(_memory(KEEP, 8)), _forward(memory)
    for _, total in (expected, found):
        total.backward()
    assert torch.equal(found[0].grad, expected[0].grad)


@given(
    st.sampled_from([OFFLOAD, PAIRS]),
    st.integers(1, 9),
    st.lists(st.integers(0, 60), min_size=1, max_size=3),
    st.integers(0, 60),
)
def test_what_is_asked_for_is_what_moves_and_never_more_than_the_limit(policy, blocks, tokens, limit):
    with pytest.MonkeyPatch.context() as patch:
        _Allocator(patch)
        memory, most = _memory(policy, blocks, limit * PAGE + 3), 0
        for count in tokens:
            _, total = _forward(memory, count)
            most = max(most, memory.host.used)
            _until(_ended)
            total.backward()
            assert memory.host.used == 0
        assert memory.host.taken <= limit * PAGE
        largest = -(-max(tokens) * 16 // PAGE) * PAGE
        whole = memory.host.limit - most >= largest  # nothing was refused
        assert most <= memory.host.taken < max(1, most + SLAB + (0 if whole else largest))


@pytest.mark.parametrize(
    "refusal", [RuntimeError("out of memory"), MemoryError(), OSError(12, "Cannot allocate memory")]
)
def test_where_the_system_refuses_blocks_stay_on_the_device(refusal, monkeypatch):
    _Allocator(monkeypatch, refusal, 3)
    memory = _memory(OFFLOAD, 8)
    first, total = _forward(memory)
    assert memory.host.taken == memory.host.limit == 3 * SLAB
    assert 0 < memory.host.used <= 3 * SLAB
    expected, whole = _forward(_memory(KEEP, 8))
    total.backward()
    whole.backward()
    assert torch.equal(first.grad, expected.grad)
    _until(_ended)


def test_whatever_else_goes_wrong_in_a_thread_is_raised_in_the_step(monkeypatch):
    _Allocator(monkeypatch, KeyError("a mistake"), 3)
    with pytest.raises(KeyError, match="a mistake"):
        _forward(_memory(OFFLOAD, 8))
    _until(_ended)


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_memory_that_nobody_wants_any_more_is_given_back_and_its_threads_end(error, monkeypatch):
    allocator, memory, ran = _Allocator(monkeypatch, free=6), _memory(OFFLOAD, 1000), 0
    allocator.may.clear()

    def block(x):
        nonlocal ran
        ran += 1
        if ran == 3:
            _until(lambda: allocator.began == 8)  # two threads are at a slab each
            if error is not None:
                raise error
        return x.sin()

    with pytest.raises(error) if error is not None else contextlib.nullcontext():
        _forward(memory, 10, block, blocks=4)
    del memory
    gc.collect()
    allocator.may.set()
    _until(_ended)
    assert allocator.began == 8
    assert all(slab() is None for slab in allocator.given)


def test_a_process_that_fails_ends_without_the_memory_that_it_still_expects():
    code = """
import time, torch
from ringflash.training.memory import slabs
slabs.host_memory = lambda size, *_: time.sleep(0.1) or torch.empty(size, dtype=torch.uint8)
held = slabs.Slabs(torch.device("cpu"), 1 << 20, 1)
held.expect(1 << 20)
held.take()
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 3


def test_slabs_that_are_taken_are_all_that_is_made_where_nobody_said_how_many(monkeypatch):
    allocator = _Allocator(monkeypatch)
    slabs = Slabs(CPU, 3 * SLAB + 10, SLAB)
    assert [len(slabs.take()) for _ in range(2)] == [SLAB] * 2
    _until(_ended)
    assert allocator.began == 2
    assert [len(slabs.take()) for _ in range(2)] == [SLAB, 10]
    assert slabs.take() is None
    assert slabs.made == slabs.limit == 3 * SLAB + 10


class _Driver:
    """Locks memory as CUDA's does, or refuses, and knows what is locked."""

    def __init__(self, patch, refuses=0):
        self.locked, self._refuses = {}, refuses
        for name in ("device", "synchronize"):
            patch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
        patch.setattr(torch.cuda, "cudart", lambda: self)

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        if not self._refuses:
            self.locked[address] = size
        return self._refuses

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.locked[address]


def test_memory_for_a_gpu_is_touched_and_locked_until_nothing_refers_to_it(monkeypatch):
    driver = _Driver(monkeypatch)
    before = _resident()
    slab = host_memory(1 << 24, GPU, threading.Lock())
    assert driver.locked == {slab.data_ptr(): 1 << 24}
    assert _resident() - before > 0.9 * (1 << 24)
    part = slab.split(1 << 20)[3]
    del slab
    assert driver.locked
    del part
    assert not driver.locked


def test_memory_that_the_driver_does_not_lock_is_asked_of_torch_instead(monkeypatch):
    driver, empty = _Driver(monkeypatch, refuses=801), torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, pin_memory: empty(size, dtype=dtype).fill_(pin_memory))
    with pytest.warns(UserWarning, match="does not lock"):
        slab = host_memory(1 << 20, GPU, threading.Lock())
    assert slab.all()
    assert not driver.locked


def test_memory_for_a_gpu_is_refused_before_the_system_has_none(monkeypatch):
    _Driver(monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(slabs_module, "_threads", lambda: 3)
    monkeypatch.setattr(slabs_module, "PATIENCE", 0.0)
    monkeypatch.setattr(slabs_module, "available_bytes", lambda: 6 * mmap.PAGESIZE - 1)
    with pytest.raises(MemoryError):
        host_memory(mmap.PAGESIZE, GPU, threading.Lock())
    monkeypatch.setattr(slabs_module, "PATIENCE", 20.0)
    found = iter([6 * mmap.PAGESIZE - 1, 6 * mmap.PAGESIZE])  # it comes while a thread waits
    monkeypatch.setattr(slabs_module, "available_bytes", lambda: next(found))
    assert len(host_memory(mmap.PAGESIZE, GPU, threading.Lock())) == mmap.PAGESIZE


@pytest.mark.gpu
def test_a_gpu_moves_tensors_to_locked_memory_and_back_and_the_memory_is_given_back():
    before, memory = _resident(), HostMemory(GPU, 3 * host_module.SLAB)
    memory.expect(3 * host_module.SLAB // host_module.PAGE)
    tensors = [torch.randn(host_module.SLAB // 4 - 7, device=GPU) for _ in range(3)]
    moved = [memory.move(x) for x in tensors]
    memory.let_go()
    assert all(page.is_pinned() for each in moved for page in each._pages)
    assert _resident() - before > 2.9 * host_module.SLAB
    assert all(torch.equal(each.get(), x) for each, x in zip(moved, tensors, strict=True))
    del memory, moved
    _until(_ended)
    assert _resident() - before < host_module.SLAB


def _resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE
