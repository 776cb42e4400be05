"""What a call asks a GPU for, written down while it is asked, so that calls alike can go down a list.

A call over several ranks asks for some 20 to 50 launches, copies, waits and writes. What leads to them, tensors, tables
and look-ups, takes the host longer than the requests do, and is the same in every call of a form: requests differ in
addresses, which come from the call's tensors, from memory that it takes, or from whoever hands out something new each
time. So a `Recording` notes, while a call goes its way, each request as a function of addresses and where each address
comes from. `Recording.repeated` makes a list of it that memory and addresses are put into.

Whatever is asked for in a way that is not noted makes a recording void: operators of torch other than those that take
memory, look at it in another way, fill it with zeros, copy it or round it; and launches by Triton itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from operator import add, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflash.kernels.cuda_driver import Rectangle, memory_functions
from ringflash.kernels.gpu.direct_launch import listening
from ringflash.kernels.gpu.launcher import aligned
from ringflash.kernels.gpu.round_numbers import round_numbers
from ringflash.kernels.requests import Noting, of_thread
from ringflash.kernels.torch_private import OpOverload, TorchDispatchMode, to_copy

aten = torch.ops.aten

TAKING = {
    aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default,
    aten.new_empty_strided.default,
}  # fmt: skip
"""Operators that take memory."""

ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}
"""Those that fill it with zeros as well."""

LOOKING = {
    aten.alias.default, aten.as_strided.default, aten.detach.default, aten.expand.default, aten.permute.default,
    aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.squeeze.dim, aten.t.default, aten.transpose.int,
    aten.unbind.int, aten.unsqueeze.default, aten.view.default, aten.view.dtype,
}  # fmt: skip
"""Those whose results lie in memory of their arguments, as it is."""

COPYING = {to_copy, aten.clone.default, aten.contiguous.default, aten.to.dtype}
"""Those whose results are copies, or what they were given."""

TOGETHER = 512
"""Bytes at whose multiples pieces of memory begin that are taken together, as those that torch hands out."""

WITHIN = "tensors that lie in each other"
"""Why a call cannot be repeated in whose tensors an address does not say which of them is meant."""

Place = tuple[int, int]
"""Where an address comes from: which of a call's bases, and how many bytes behind it. The first base is 0."""


class Range(NamedTuple):
    """Addresses that come from somewhere.

    Attributes:
        first: address.
        last: one behind the last.
        source: "given", "taken" or "drawn".
        number: which of these.
    """

    first: int
    last: int
    source: str
    number: int


class Step(NamedTuple):
    """A request.

    Attributes:
        what: tells it from others.
        function: of addresses.
        sources: of these: source, number and bytes behind; source "" and number 0 for an address that stays.
        drawn: how many addresses it gives, which are new in each call.
        is_work: it is not for other ranks, and left out where something failed.
    """

    what: object
    function: Callable[[list[int]], Any]
    sources: tuple[tuple[str, int, int], ...]
    drawn: int
    is_work: bool


class Recording(TorchDispatchMode, Noting):
    """Writes down what is asked for within a `with` by this thread.

    Args:
        given: the call's tensors. Of those that begin at one address the first counts: calls are alike if the same
            ones do.
        stream: the current one.
    """

    def __init__(self, given: Sequence[Tensor], stream: int) -> None:
        super().__init__()
        self._stream = stream
        self.void: str | None = None
        """Why it cannot be repeated."""
        self.steps: list[Step] = []
        self._taken: list[Tensor] = []
        self._kept: list[Any] = []
        self._staying: list[tuple[int, int]] = []
        self._drawn = 0
        self._rounded: tuple[int, tuple[Tensor, Tensor]] | None = None
        """How many steps there were behind the last rounding, and of what to what it was."""
        self._like = {(x.shape, x.dtype): number for number, x in enumerate(given) if x.is_contiguous()}
        """Which of the call's tensors is like others."""
        self._ranges = [Range(*_ends(x), "given", number) for number, x in enumerate(given)]
        for x, y in combinations(self._ranges, 2):
            if x.first != y.first and max(x.first, y.first) < min(x.last, y.last):
                self.cannot(WITHIN)  # where one begins in another may be an address of either

    def __enter__(self) -> Recording:
        """Begin."""
        self._listening = listening()
        if not self._listening.__enter__():
            self.cannot("nobody tells of launches")
        of_thread.noting = self
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        """End."""
        super().__exit__(exc_type, exc_val, exc_tb)
        of_thread.noting = None
        self._listening.__exit__(None, None, None)

    # What is asked for

    def __torch_dispatch__(self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        """See `TorchDispatchMode`."""
        found = func(*args, **(kwargs or {}))
        if of_thread.noting is not self:
            return found
        if func in LOOKING or func is aten.promote_types.default or (args and found is args[0] and func in COPYING):
            return found
        if func in TAKING or func in ZEROS:
            self._take(found)
            if func in ZEROS:
                self._zero(found)
        elif func is aten.zero_.default:
            self._zero(args[0])
        elif func is aten.copy_.default:
            self._copy(args[0], args[1])
        elif func in COPYING:
            self._take(found)
            copied = self._copy if found.dtype == args[0].dtype else self._round
            copied(found, args[0])
        else:
            self.cannot(str(func))
        return found

    def _take(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self._ranges.append(Range(storage.data_ptr(), storage.data_ptr() + storage.nbytes(), "taken", len(self._taken)))
        self._taken.append(x)  # so that nothing else lies there before the end

    def _zero(self, x: Tensor) -> None:
        if not x.is_contiguous():
            self.cannot("zeros that lie apart")
            return
        if not self._source(x.data_ptr())[0]:
            self.cannot("zeros in memory that is not the call's")
        nbytes, stream = x.nbytes, self._stream
        self._note("zero", lambda at: memory_functions().zero(at[0], nbytes, stream), [x.data_ptr()], True)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        alike = target.dtype == source.dtype and target.shape == source.shape and target.device == source.device
        if not (alike and target.dim() and target[:1].is_contiguous() and source[:1].is_contiguous()):
            self.cannot("a copy of what lies apart within rows")
            return
        if not target.numel():
            return
        if not self._source(target.data_ptr())[0]:
            self.cannot("a copy to memory that is not the call's")
            return
        if not self._source(source.data_ptr())[0]:
            self._kept.append(source)
        width, rows, stream = target[0].nbytes, len(target), self._stream
        target_pitch, source_pitch = (x.stride(0) * x.element_size() for x in (target, source))
        if target_pitch == source_pitch == width or rows == 1:
            width, rows = width * rows, 1
        elif min(target_pitch, source_pitch) < width:  # as of one row for all, which the driver cannot copy so
            self.cannot("a copy of rows that lie in each other")
            return

        def copy(at: list[int]) -> None:
            memory = memory_functions()
            if rows == 1:
                memory.copy(at[0], at[1], width, stream)
            else:
                memory.copy_rows(Rectangle(at[0], target_pitch, at[1], source_pitch, width, rows), stream)

        self._note("copy", copy, [target.data_ptr(), source.data_ptr()], True)

    def _round(self, target: Tensor, source: Tensor) -> None:
        alike = target.shape == source.shape and target.device == source.device
        known = {target.dtype, source.dtype} <= {torch.float32, torch.bfloat16, torch.float16}
        if not (alike and known and target.is_contiguous() and source.is_contiguous() and aligned(target, source)):
            self.cannot("a conversion")
            return
        if target.numel():
            self._round_by_kernel(target, source)

    def _round_by_kernel(self, target: Tensor, source: Tensor) -> None:
        rounded = [(source, target)]
        if self._rounded is not None:
            steps, (x, y) = self._rounded
            if steps == len(self.steps) and (x.dtype, y.dtype) == (source.dtype, target.dtype):  # one launch for both
                rounded.insert(0, (x, y))
                self.steps.pop()
        before, void = len(self.steps), self.void
        round_numbers(rounded)
        if len(self.steps) == before:  # the first one of this thread, by Triton
            self.void = void
            round_numbers(rounded)
        self._rounded = (len(self.steps), (source, target)) if len(rounded) == 1 else None

    def ask(self, what: object, function: Callable[[list[int]], Any], addresses: Sequence[int]) -> None:
        """See `ringflash.kernels.requests.ask`."""
        self._note(what, function, addresses, False)
        function(list(addresses))

    def draw(self, what: object, function: Callable[[list[int]], list[int]], sizes: Sequence[int]) -> list[int]:
        """See `ringflash.kernels.requests.draw`."""
        found = function([])
        self.steps.append(Step(what, function, (), len(found), False))
        for address, size in zip(found, sizes, strict=True):
            last = address + size
            # What was drawn there before counts no more.
            self._ranges = [x for x in self._ranges if x.source != "drawn" or x.last <= address or last <= x.first]
            self._ranges.append(Range(address, last, "drawn", self._drawn))
            self._drawn += 1
        return found

    def launched(self, by: Any, arguments: Sequence[Any], addresses: Sequence[int], stream: int) -> None:
        """See `Noting`."""
        self._note(("launch", by), by.again(arguments, stream), addresses, True)
        kept = [x for x in arguments if isinstance(x, Tensor) and not self._source(x.data_ptr())[0]]
        self._kept += kept
        fixed = [address for source, _, address in self.steps[-1].sources if not source]
        if not kept and not all(any(first <= x < last for first, last in self._staying) for x in fixed):
            self.cannot("an address that nobody holds")

    def stays(self, address: int, nbytes: int) -> None:
        """See `ringflash.kernels.requests.stays`."""
        self._staying.append((address, address + nbytes))

    def cannot(self, why: str) -> None:
        """See `ringflash.kernels.requests.cannot_repeat`."""
        self.void = self.void or why

    def _note(
        self,
        what: object,
        function: Callable[[list[int]], Any],
        addresses: Sequence[int],
        is_work: bool,
    ) -> None:
        self.steps.append(Step(what, function, tuple([self._source(x) for x in addresses]), 0, is_work))

    def _source(self, address: int) -> tuple[str, int, int]:
        begins = [x for x in self._ranges if x.first == address]
        found = begins or [x for x in self._ranges if x.first <= address < x.last]
        if len({(x.source, x.first) for x in found}) > 1:
            self.cannot(WITHIN)
        return (found[0].source, found[0].number, address - found[0].first) if found else ("", 0, address)

    # What is made of it

    def form(self) -> tuple:
        """What is the same of calls that can be repeated by each other's list."""
        return tuple([(x.what, x.sources, x.drawn) for x in self.steps]), tuple([_size(x) for x in self._taken])

    def repeated(self, results: Sequence[Tensor]) -> Repeated | None:
        """The list; None where results are not whole pieces of memory that was taken."""
        taken = [x.data_ptr() for x in self._taken]
        numbers = [taken.index(x.data_ptr()) if x.data_ptr() in taken else -1 for x in results]
        for x, number in zip(results, numbers, strict=True):
            if number < 0 or not x.is_contiguous() or x.nbytes != _size(self._taken[number]):
                return None
        if len(set(numbers)) < len(numbers):
            return None
        given = sum(x.source == "given" for x in self._ranges)
        bases: dict[tuple[str, int], Place] = {("", 0): (0, 0)}
        bases |= {("given", number): (1 + number, 0) for number in range(given)}
        bases |= {("taken", number): (1 + given + i, 0) for i, number in enumerate(numbers)}
        last = 1 + given + len(numbers)
        size = 0
        for number, x in enumerate(self._taken):
            if number not in numbers:
                bases["taken", number] = last, size
                size += -(-_size(x) // TOGETHER) * TOGETHER
        bases |= {("drawn", number): (last + 1 + number, 0) for number in range(self._drawn)}
        steps, drawn = [], last + 1
        for step in self.steps:
            found = [(*bases[source, number], behind) for source, number, behind in step.sources]
            picked, offsets = (
                picking([base for base, *_ in found]),
                tuple([first + behind for _, first, behind in found]),
            )
            given_bases = slice(drawn, drawn + step.drawn) if step.drawn else None
            steps.append((step.function, picked, offsets, given_bases, step.is_work))
            drawn += step.drawn
        like = [(x.shape, x.dtype, self._like.get((x.shape, x.dtype))) for x in results]
        return Repeated(steps, like, size, self._drawn, self._kept)


def picking(places: Sequence[int]) -> Callable[[list[int]], Sequence[int]]:
    """A function that picks what is at some places of a list."""
    if len(places) > 1:
        return itemgetter(*places)
    first = places[0] if places else 0
    return itemgetter(slice(first, first + len(places)))


def _ends(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _size(x: Tensor) -> int:
    return x.untyped_storage().nbytes()


class Repeated:
    """Goes down the list of what a call asked for.

    Args:
        steps: function, which bases its addresses are behind, by how many bytes, which bases it gives, and whether it
            is work.
        results: shape and dtype of each, and which of the call's tensors is like it.
        size: bytes of the other memory that is taken.
        drawn: addresses that functions give.
        kept: tensors that are read, and are those of all calls.
    """

    def __init__(
        self,
        steps: list[
            tuple[Callable[[list[int]], Any], Callable[[list[int]], Sequence[int]], tuple[int, ...], slice | None, bool]
        ],
        results: list[tuple[torch.Size, torch.dtype, int | None]],
        size: int,
        drawn: int,
        kept: list[Any],
    ) -> None:
        self._steps, self._results, self._size, self._kept = steps, results, size, kept
        self._drawn = [0] * drawn

    def memory(self, given: Sequence[Tensor]) -> list[Tensor]:
        """All that a call takes, for results and then for everything else."""
        first = given[0]
        found = [
            first.new_empty(shape, dtype=dtype) if like is None else torch.empty_like(given[like])
            for shape, dtype, like in self._results
        ]
        return [*found, first.new_empty(self._size, dtype=torch.uint8)]

    def run(self, addresses: Sequence[int], memory: Sequence[Tensor]) -> Exception | None:
        """Ask for everything on the list.

        Args:
            addresses: of the call's tensors.
            memory: from `memory`; what is not results may be given back when this is over.

        Returns:
            What failed first; what other ranks wait for was asked for all the same.
        """
        bases = [0, *addresses, *map(Tensor.data_ptr, memory), *self._drawn]
        failure: Exception | None = None
        for function, picked, offsets, drawn, is_work in self._steps:
            if is_work and failure is not None:
                continue
            try:
                found = function(list(map(add, picked(bases), offsets)))
                if drawn is not None:
                    bases[drawn] = found
            except Exception as error:
                failure = failure or error
        return failure
