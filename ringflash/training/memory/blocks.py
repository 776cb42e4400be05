"""Blocks that run once, or twice with what their placement keeps in between.

A block that is recomputed leaves its input, and attention's out and log-sum-exp, on the device or in host memory. All
else is computed again when the first of it is wanted; query, key and value are then handed to attention's backward
pass, and attention itself, with its communication, gives what it gave the first time. torch's `checkpoint` does the
recomputing, in which `ringflash.recomputed` stands in for attention. A block that gives its parts as functions of rows
is computed again by those in place of that, see `by_rows`.

What moved to the host comes back one block ahead: when the gradient of a block's output is there, the block before it
is asked for.

In pairs, the second of two blocks does not keep its input: that is the output of the first, which is run again for it,
from its own input and attention's results. At long context that costs little, and a quarter less is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ringflash.kernels.torch_private import storage_of
from ringflash.recomputed import Region, within
from ringflash.training.memory.at_once import OnceBlock
from ringflash.training.memory.available import share_of_host
from ringflash.training.memory.by_rows import Parts, RowBlock
from ringflash.training.memory.first_step import FirstStep
from ringflash.training.memory.host import Handle, HostMemory, Kept, Moved, pages_of, store, twice
from ringflash.training.memory.plan import AUTO, KEEP, OFFLOAD, PAIRS, RECOMPUTE, placed, said
from ringflash.training.memory.rounds import RoundBlock


class BlockMemory:
    """Runs the blocks of one model, each as its placement says; without `start` each is kept whole.

    Attributes:
        placements: of each block, in the order in which they run.
        pairs: of two recomputed blocks that follow each other, the second does not keep its input.
        host: memory of the host; None where nothing moves.
        decision: what was decided, to be shown; None for nothing.
    """

    def __init__(self, blocks: int) -> None:
        self.placements = [KEEP] * blocks
        self.pairs = False
        self.host: HostMemory | None = None
        self.decision: str | None = None
        self._first_step: FirstStep | None = None
        self._queries = 0
        self._running = 0
        self._took: dict[int, tuple[int, int]] = {}
        self._before: _Block | RowBlock | None = None
        self._result: tuple[Tensor, int] | None = None

    def start(self, policy: str, device: torch.device, host_bytes: int | None = None) -> None:
        """Have a policy from now on.

        Args:
            policy: one that `plan` names.
            device: where the blocks run.
            host_bytes: of host memory, how many may be used at most; None: this process' part of most of it.
        """
        self.host = self._first_step = None
        if policy == AUTO and device.type != "cuda":
            policy = KEEP  # there is no other memory to move to
        if policy in (AUTO, OFFLOAD, PAIRS):
            self.host = HostMemory(device, share_of_host() if host_bytes is None else host_bytes)
        if policy == AUTO:
            self._first_step = FirstStep(device, len(self.placements), 0 if self.host is None else self.host.limit)
        self.pairs = policy == PAIRS
        self.placements = [{AUTO: RECOMPUTE, PAIRS: OFFLOAD}.get(policy, policy)] * len(self.placements)
        self.decision = None if policy == AUTO else said(self.placements, self.pairs)

    def begin_step(self) -> None:
        """An optimizer step begins."""
        if self._first_step is not None:
            self._first_step.begin()

    def end_step(self) -> None:
        """An optimizer step has ended; a collective of all ranks after the first one."""
        if self._first_step is not None:
            measured, self._first_step = self._first_step.end(), None
            self.placements = placed(len(self.placements), measured)
            if OFFLOAD not in self.placements:
                self.host = None
            self.decision = said(self.placements, self.pairs, measured, self._queries)

    def _see(self, parts: Parts) -> None:
        """A block works in rounds, which is said once."""
        if parts.rounds and not self._queries:
            self._queries = parts.rows[0].stop
            if self._first_step is None:
                self.decision = said(self.placements, self.pairs, queries=self._queries)

    def begin(self) -> None:
        """A forward pass begins; the first block comes next."""
        self._running, self._before, self._result = 0, None, None
        self._took.clear()
        if self.host is not None:
            self.host.let_go()  # of a pass that failed

    def end(self) -> None:
        """The last block has run: what moves to the host leaves the device."""
        if self.host is not None:
            self.host.let_go()
        self._before = self._result = None

    def run(
        self,
        function: Callable[..., Any],
        *inputs: Any,
        module: Callable[..., Any] | None = None,
        parts: Parts | None = None,
    ) -> Any:
        """What a block gives.

        Args:
            function: the block.
            inputs: of it. The first is the stream of tokens (B, T, C).
            module: the same with the module's hooks, by which weights are there, where these are outside of the
                function; it ends up here again.
            parts: the same by rows, where it can work so; then the stream is the only input. It does unless it is kept
                whole.
        """
        if not torch.is_grad_enabled():
            return function(*inputs) if parts is None else _row_block(parts).without_graph(parts, *inputs)
        number, self._running = self._running, self._running + 1
        placement, first = self.placements[number % len(self.placements)], self._first_step
        if first is not None:
            placement = first.placement(number)
        if self.host is not None:
            self.host.let_go()
        before, result_before = self._before, self._result
        self._before = self._result = None
        if placement == KEEP:
            result = function(*inputs)
        else:
            paired = self.pairs and result_before is not None and _same(*result_before, inputs)
            source = before.output if paired and before is not None and before.keeps_input else None
            place = self.host if placement == OFFLOAD else None, first, module or function
            if parts is None:
                self._before = block = _Block(*place)
                if self.pairs or first is not None:  # it may be the first of a pair
                    block.keep_random_numbers()
                result = block.run(source, function, *inputs)
            else:
                self._before = block = _row_block(parts)(*place, parts)
                result = block.run(source, *inputs)
                self._see(parts)
            if first is not None:
                self.pairs = first.pairs
            self._look_ahead(number, block)
        stream = next((x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)), None)
        if stream is not None and stream.requires_grad:
            if before is not None:
                stream.register_hook(lambda _: before.fetch())
            self._result = stream.detach(), stream._version
        return result

    def _look_ahead(self, number: int, block: _Block | RowBlock) -> None:
        """A block has run: have memory for what the rest of the pass is to move, if that is what the same ones took."""
        if self.host is None:
            return
        self._took[number] = block.kept, block.pages
        alike = 2 if self.pairs else 1
        rest = range(number + 1, len(self.placements))
        takes = [self._took.get(number - (number - later) % alike, (0, 0)) for later in rest]  # nothing where unknown
        if self._first_step is None:
            placements = self.placements[number + 1 :]
        else:
            placements = self._first_step.placements([kept for kept, _ in takes])
        pages = (pages for (_, pages), place in zip(takes, placements, strict=True) if place == OFFLOAD)
        self.host.expect(sum(pages))


def _row_block(parts: Parts) -> type[RowBlock]:
    return RoundBlock if parts.rounds else OnceBlock


class _Block(Region):
    """One block of one forward pass, which is recomputed in the backward pass.

    Args:
        host: to which what is kept moves; None to keep it on the device.
        first_step: told what the block takes; None once that is known.
        module: the block as somebody calls it from outside.

    Attributes:
        kept: bytes that it keeps, on the device or moved.
        pages: of the host that this takes where it moves, as far as there was room.
    """

    def __init__(self, host: HostMemory | None, first_step: FirstStep | None, module: Callable[..., Any]) -> None:
        self._host, self._first_step, self._module = host, first_step, module
        self.kept = self.pages = self._moved = self._spared = 0
        self._first = True
        self._stream: Tensor | None = None
        self._input: Handle | None = None
        self._source: Callable[[], Tensor] | None = None
        self._others: tuple[Any, ...] = ()
        self._random: tuple[Tensor, Tensor | None] | None = None
        self._attended: list[_Attended] = []
        self._calls = 0

    @property
    def keeps_input(self) -> bool:
        """Whether it does, so that it may be run again for its output."""
        return self._input is not None

    def run(self, source: Callable[[], Tensor] | None, function: Callable[..., Any], *inputs: Any) -> Any:
        """What the block gives; the graph of it holds what is kept.

        Args:
            source: gives the first input in the backward pass; None to keep it.
            function: the block.
            inputs: of it.
        """
        if inputs and isinstance(inputs[0], Tensor):
            self._stream, self._others = inputs[0], inputs[1:]
            self._source = source
            if source is None:
                self._input = self._store(inputs[0])
            needs, stream, inputs = inputs[0].requires_grad, self._stream_of, (inputs[0].new_empty(0), *inputs[1:])

            def again(_: Tensor, *others: Any) -> Any:  # the first tells torch of which device random numbers are kept
                return function(stream(needs), *others)
        else:
            again = function

        contexts = within(self), _Again(self)
        result = checkpoint(again, *inputs, use_reentrant=False, context_fn=lambda: contexts)
        self._first = False
        if self._first_step is not None:
            self._first_step.ran(self.kept, self._moved > 0)
        return result

    def keep_random_numbers(self) -> None:
        """For `output` to draw the same ones."""
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def begin_again(self) -> None:
        """The block is about to be computed again."""
        self._calls, self._allocated = 0, _allocated()

    def end_again(self) -> None:
        """It has been."""
        if self._first_step is not None:
            self._first_step.ran_again(_allocated() - self._allocated + self._spared)

    def spared(self, size: int) -> None:
        """See Region."""
        self._spared += size if self._first else 0

    def output(self) -> Tensor:
        """The output once more, without a graph; everything stays as it is kept."""
        if self._input is None:
            raise twice()
        x = self._input.get()
        with torch.no_grad(), within(_Seen(self._attended)), _drawing(self._random, x.device):
            found = self._module(x, *self._others)
        return found[0] if isinstance(found, tuple) else found

    def fetch(self) -> None:
        """Begin to bring back what moved."""
        for handle in (self._input, *(handle for call in self._attended for handle in (call.out, call.lse))):
            if handle is not None:
                handle.fetch()

    def attention(self, operator: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """See Region."""
        self._calls += 1
        if self._first:
            return self._attend(operator, arguments)
        call = self._attended[self._calls - 1]
        if call.out is None or call.lse is None:
            raise twice()
        call.inputs = [x.detach() for x in arguments[:3]]
        out, lse = call.out.get().requires_grad_(call.needs_gradient), call.lse.get()
        call.out = call.lse = None
        return _reached(out), lse

    def _attend(self, operator: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Attention as always, but for what autograd holds of it."""
        tokens, device = len(arguments[0]), arguments[0].device  # autograd holds `pack` as well: it must hold no query
        places = {_place(x): position for position, x in enumerate(arguments[:3])}
        stored: dict[tuple, Handle] = {}
        call = _Attended()

        def pack(x: Tensor) -> Any:
            place = _place(x)
            if place in places:
                call.wanted += 1
                return places[place]
            # Neither small, nor on the CPU, nor of shape alone.
            large = x.numel() >= tokens and x.device == device and x.untyped_storage().nbytes() >= x.nbytes
            if large and place not in stored:
                stored[place] = self._store(x)
            return stored.get(place, x)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, int):
                return call.input(packed)
            return packed.get() if isinstance(packed, Kept | Moved) else packed

        with saved_tensors_hooks(pack, unpack):
            out, lse, _ = operator(*arguments)
        # Outputs that no gradient is asked of are not saved; they are wanted all the same.
        call.out, call.lse = (stored.get(_place(x)) or self._store(x) for x in (out, lse))
        call.needs_gradient = out.requires_grad
        self._attended.append(call)
        return _reached(out), lse

    def _stream_of(self, needs_gradient: bool) -> Tensor:
        """The block's input: as it is, and when it is computed again, as it was kept."""
        if self._first:
            found, self._stream = self._stream, None
            assert found is not None
            return found
        if self._source is not None:
            found, self._source = self._source(), None
        elif self._input is not None:
            found, self._input = self._input.get(), None
        else:
            raise twice()
        return found.requires_grad_(needs_gradient)

    def _store(self, x: Tensor) -> Handle:
        handle = store(x, self._host)
        self.kept += x.nbytes
        self.pages += pages_of(x) if self._host is None or isinstance(handle, Moved) else 0
        self._moved += x.nbytes if isinstance(handle, Moved) else 0
        return handle


class _Seen(Region):
    """A block that is run for its output alone.

    Args:
        attended: what its attention gave.
    """

    def __init__(self, attended: list[_Attended]) -> None:
        self._attended = iter(attended)

    def attention(self, operator: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """See Region."""
        call = next(self._attended)
        if call.out is None or call.lse is None:
            raise twice()
        return call.out.get(), call.lse.get()

    def spared(self, size: int) -> None:
        """See Region."""


class _Attended:
    """What a block keeps of a call of attention.

    Attributes:
        out: until the block is computed again; autograd holds it until attention's backward pass.
        lse: likewise.
        needs_gradient: whether out does.
        inputs: query, key and value as they are computed again.
        wanted: how many of them autograd is still to ask for.
    """

    def __init__(self) -> None:
        self.out: Handle | None = None
        self.lse: Handle | None = None
        self.needs_gradient = False
        self.inputs: list[Tensor] = []
        self.wanted = 0

    def input(self, position: int) -> Tensor:
        """Query, key or value; they are there, as out's gradient comes by way of `_reached`."""
        found = self.inputs[position]
        self.wanted -= 1
        if not self.wanted:
            self.inputs = []
        return found


class _Again:
    """Entered around a block that is computed again."""

    def __init__(self, block: _Block) -> None:
        self._block = block

    def __enter__(self) -> None:
        self._block.begin_again()
        self._within = within(self._block)
        self._within.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._within.__exit__(*error)
        self._block.end_again()


class _Reached(torch.autograd.Function):
    """A tensor as it is; its gradient comes only once the block has been computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        _ = ctx.saved_tensors
        return dx


def _reached(x: Tensor) -> Tensor:
    return _Reached.apply(x) if x.requires_grad else x


@contextmanager
def _drawing(states: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Generator[None]:
    """Draw from generators in these states, of the CPU and of the device, and leave them as they were."""
    assert states is not None  # of a block whose output is asked for
    of_cpu, of_device = states
    with torch.random.fork_rng([] if of_device is None else [device], device_type="cuda"):
        torch.set_rng_state(of_cpu)
        if of_device is not None:
            torch.cuda.set_rng_state(of_device, device)
        yield


def _place(x: Tensor) -> tuple:
    """Where a tensor's values are: autograd hands on other objects for the same."""
    return storage_of(x), x.storage_offset(), tuple(x.shape), x.stride(), x.dtype


def _same(result: Tensor, version: int, inputs: Sequence[Any]) -> bool:
    """Whether the first of a block's inputs is what the block before it gave, whatever hooks made of the object."""
    found = inputs[0] if inputs else None
    return isinstance(found, Tensor) and _place(result) == _place(found) and found._version == version


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
