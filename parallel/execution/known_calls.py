"""Calls like earlier ones of a group, which ask for the same again.

Where ranks' keys travel by copy engines nothing that a call asks for depends on what tensors hold, nor on what the
other ranks are at. So a few calls of a form find their way through program, kernels and transport, the last two of them
noted (`ringflash.kernels.gpu.recording`); where both asked for the same, later ones take their memory, agree with the
other ranks as any call does, and go down the list.

Ranks need not be at the same: what one asks for by its list others may find their way to, and what they tell each other
of the call is the same. Calls that are noted, and the first one by a list, wait for the other ranks as one that is new
to them does. All of these may load kernels, for which a host may have to wait for its GPU; and this may wait for a rank
that failed and does not come any more, which the host would not hear of. Behind a call to which all have come there is
nothing of that kind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from triton.runtime import driver

from ringflash.kernels.gpu.direct_launch import BY_TRITON, hooked
from ringflash.kernels.gpu.launcher import ALIGNMENT
from ringflash.kernels.gpu.recording import Recording, Repeated
from ringflash.kernels.kept import Kept, capturing
from ringflash.kernels.requests import of_thread
from ringflash.parallel.agreement.rounds import agreement
from ringflash.parallel.execution.call import NEEDS, Inputs, Settings, agreed, described, form_of
from ringflash.parallel.placement import Placement
from ringflash.parallel.transport.select import GroupTransport
from ringflash.parallel.transport.shelves import bytes_to_publish
from ringflash.parallel.transport.symmetric_memory import SymmetricMemory

UNNOTED = 2
"""Calls of a form that compile, and find their launches."""

TRIES = 6
"""Calls of a form that are noted at most."""

LARGEST = 64 << 20
"""Bytes of a call's queries in fp32 from which on GPUs take longer than the host finds its way, while it matters that
memory is given back within a call."""


FORMS = 256
"""Of a placement that are kept: lists of requests, and the tables that these read, which are the placement's."""


class Known:
    """What is known of a form of calls.

    Args:
        digest: see `Agreement.check`.
        form: see there.
        nbytes: that a rank publishes.
    """

    def __init__(self, digest: int, form: tuple, nbytes: int) -> None:
        self.digest, self.form, self.nbytes = digest, form, nbytes
        self.calls = 0
        self.noted: tuple | None = None
        """What the call before asked for, if it was noted."""
        self.repeated: Repeated | None = None
        """What calls ask for."""
        self.shelves = 0
        """Where keys lay then."""
        self.went = False
        """Whether a call went by it."""

    def note(self, recording: Recording, results: Sequence[Tensor], shelves: int) -> None:
        """A call was noted."""
        found = None if recording.void else recording.form()
        if found is not None and found == self.noted:
            self.repeated, self.shelves = recording.repeated(results), shelves
        if recording.void not in (None, BY_TRITON) or (found == self.noted is not None and self.repeated is None):
            self.calls = UNNOTED + TRIES
        self.noted = found

    def forget(self, for_good: bool = False) -> None:
        """Keys lie elsewhere since, or there is no memory for calls by a list."""
        self.calls = UNNOTED + TRIES if for_good else UNNOTED
        self.noted = self.repeated = None


class KnownCall(NamedTuple):
    """A call that may be like earlier ones.

    Attributes:
        known: what is known of its form.
        placement: of its sharding.
        index: which of the placement's masks it has.
        transport: between the GPUs.
        memory: that it goes by.
        tensors: all that it reads.
        stream: the current one.
    """

    known: Known
    placement: Placement
    index: int
    transport: GroupTransport
    memory: SymmetricMemory
    tensors: list[Tensor]
    stream: int

    def results(self, walk: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """What the call gives: by the list of calls like it, or in the way that `walk` finds it."""
        known, shelves = self.known, self.memory.shelves_so_far
        if known.repeated is not None and known.shelves != shelves:
            known.forget()
        if known.repeated is not None:
            try:
                memory = known.repeated.memory(self.tensors)
            except Exception:  # walks take it in pieces, and refuse the call where there are none either
                known.forget(for_good=True)
            else:
                return self._again(known.repeated, memory)
        known.calls += 1
        group: Any = self.placement.group  # there are several ranks
        if not UNNOTED < known.calls <= UNNOTED + TRIES or not agreement(group).by_page:
            return walk()
        with Recording(self.tensors, self.stream) as recording:
            results = walk()
        known.note(recording, results, self.memory.shelves_so_far)
        return results

    def _again(self, repeated: Repeated, memory: list[Tensor]) -> Sequence[Tensor]:
        known, device, placement = self.known, self.tensors[0].device, self.placement
        group: Any = placement.group  # there are several ranks
        describe = partial(described, placement, self.index, known.form)  # kept for some calls: it holds no tensors
        most = agreed(placement, known.digest, describe, device, known.nbytes, not known.went)
        known.went = True
        self.transport.open_again(self.memory, device, most)
        assert self.memory.shelves_so_far == known.shelves  # there was room for such a call before
        failure = repeated.run([x.data_ptr() for x in self.tensors], memory)
        agreement(group).close(failure, device)
        if failure is not None:
            raise failure
        return memory[:-1]


def known_call(
    which: str,
    memory: SymmetricMemory,
    inputs: Inputs,
    settings: Settings,
    where: tuple[Placement, int],
    first_head: int,
    of_rows: Sequence[Tensor | None],
) -> KnownCall | None:
    """What may be known of a call whose keys travel by copy engines; None where calls alike have to find their way.

    Args:
        which: "forward" or "backward".
        memory: by which its keys travel.
        inputs: of the call.
        settings: of the call.
        where: from `call.locate`, of several ranks.
        first_head: number of the first query head of the inputs among all of the call.
        of_rows: what the backward pass is given beside them.
    """
    (placement, index), (query, key, value) = where, inputs[:3]
    device, transport = query.device, placement.transport
    if 4 * query.numel() > LARGEST or of_thread.noting is not None or hooked() or capturing(device):
        return None
    if not (inputs.slopes is inputs.key_visible is inputs.blocks is None) or settings.needs & NEEDS["sinks"]:
        return None  # of these tables are made that depend on what they hold
    given = (*of_rows, query, key, value, inputs.seed, inputs.sinks)
    tensors = [x for x in given if x is not None]
    addresses = [x.data_ptr() for x in tensors]
    if any([x % ALIGNMENT for x in addresses]):
        return None
    # pyrefly: ignore[missing-attribute]  # stub: a GPU's driver has it
    stream = driver.active.get_current_stream(device.index)
    request, sizes, *numbers = settings
    call = (
        which, index, first_head, inputs.handle is None, request, (*sizes,), *numbers, threading.get_ident(), stream,
        (*map(addresses.index, addresses),), device,
        *[None if x is None else (x.shape, x.stride(), x.dtype) for x in given],
    )  # fmt: skip
    of_placement = transport.known_calls.get(placement)
    if of_placement is None:
        of_placement = transport.known_calls[placement] = Kept(FORMS)
    known = of_placement.get(call)
    if known is None:
        form = form_of(inputs, settings, (query.shape[0] - placement.rows[0], key.shape[0] - placement.rows[1]), which)
        found = Known(placement.call_digest(index, form), form, bytes_to_publish(inputs.keys()))
        known = of_placement.add(call, found)
    return KnownCall(known, placement, index, transport, memory, tensors, stream)
