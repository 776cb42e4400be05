"""How long a plan takes: the time of its launches, and what of its transfers they do not hide. Pure arithmetic.

All ranks go through the stages together. A stage takes a rank as long as its launch; the next one begins when that is
done and its keys are there. They leave their sender when that begins its own stage, or where launches hold every
processor, when its launch ends; or own keys at once, where a transport can. In the backward pass gradient parts travel
behind each stage and are added when there is no more room for others, and the first half of the own keys is worked on
last.

Legend: R ranks, N stages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ringflash.parallel.planning.heads import head_groups
from ringflash.parallel.planning.loads import Loads
from ringflash.parallel.planning.machine import Link, Machine
from ringflash.parallel.planning.outline import Outline
from ringflash.parallel.planning.program import AHEAD, LEAST_SPLIT

TILE = 128
"""Queries of a tile of the forward pass, keys of one of the backward pass."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer's attention.

    Attributes:
        heads: of queries.
        key_heads: of keys and values.
        head_dim: of a head.
        element: bytes of a number.
        groups: of heads that are worked on one after another, see `heads.head_groups`.
    """

    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    element: int = 2
    groups: int = 1

    def in_groups(self, rows: int, exchanging: int = 1) -> Shape:
        """The same where the rank with the most queries has so many."""
        return replace(self, groups=head_groups(rows, self.heads, self.key_heads, self.head_dim, exchanging))

    def among(self, ranks: int) -> Shape:
        """One rank's part of the heads, where so many exchange them; a key head is on each that has queries of it."""
        return replace(self, heads=-(-self.heads // ranks), key_heads=-(-self.key_heads // ranks))

    @property
    def key_bytes(self) -> int:
        """Of a position's key and value."""
        return 2 * self.key_heads * self.head_dim * self.element

    @property
    def gradient_bytes(self) -> int:
        """Of their gradients in fp32."""
        return 2 * self.key_heads * self.head_dim * 4

    @property
    def row_bytes(self) -> int:
        """Of a query's fp32 result, read and written."""
        return 2 * self.heads * self.head_dim * 4


@dataclass(frozen=True)
class Pass:
    """Predicted times of a pass in seconds.

    Attributes:
        compute: (N, R) of a rank's launch in a stage; 0 where it has none.
        wait: (N, R) that it waits behind the stage for keys, or gradients, to come or leave.
        rest: (R,) of the rest of the layer, behind which a rank begins.
        total: until the last rank is done.
    """

    compute: np.ndarray
    wait: np.ndarray
    rest: np.ndarray
    total: float


@dataclass(frozen=True)
class Prediction:
    """What a plan costs.

    Attributes:
        forward: its forward pass.
        backward: its backward pass.
        memory: bytes beside a rank's own keys, at most on any rank.
        moved: keys that arrive at ranks in a pass, all of them together.
    """

    forward: Pass
    backward: Pass
    memory: int
    moved: int

    @property
    def total(self) -> float:
        """Seconds of both passes."""
        return self.forward.total + self.backward.total

    @property
    def attention(self) -> float:
        """Seconds of both passes without the rest of the layer, of the rank that it takes longest."""
        return sum(float((x.compute + x.wait).sum(0).max()) for x in (self.forward, self.backward))


def predict(
    outline: Outline,
    loads: Loads,
    machine: Machine,
    shape: Shape,
    hosts: int = 1,
    token_work: int = 0,
    tokens: np.ndarray | None = None,
) -> Prediction:
    """What a plan costs.

    Args:
        outline: of the plan.
        loads: of its mask and partitions.
        machine: that it runs on.
        shape: of the attention.
        hosts: how many hosts the ranks lie on, equally many on each, in order.
        token_work: what the rest of a layer costs a token, in pairs: ranks with more tokens begin later, as shares
            that are level in time and not in pairs have it.
        tokens: (R,) that each rank has in the rest of a layer; as many as queries if None.
    """
    model = _Model(outline, loads, machine, shape, hosts, token_work, loads.queries if tokens is None else tokens)
    return Prediction(model.forward(), model.backward(), model.memory, int(model.carried.sum()))


class _Moves(NamedTuple):
    """Transfers of one stage, an array each: who receives and sends, seconds, and as in `Link`, for own keys alone."""

    receiver: np.ndarray
    sender: np.ndarray
    seconds: np.ndarray
    hidden: np.ndarray
    ahead: np.ndarray


class _Model:
    def __init__(
        self,
        outline: Outline,
        loads: Loads,
        machine: Machine,
        shape: Shape,
        hosts: int,
        token_work: int,
        tokens: np.ndarray,
    ) -> None:
        self.outline, self.loads, self.machine, self.shape = outline, loads, machine, shape
        self.token_work, self.tokens = token_work, tokens
        self.ranks = len(loads.queries)
        self.host = np.arange(self.ranks) // (self.ranks // hosts)
        self.carried = outline.carried(loads.keys)
        self._rates = machine.rates(shape.head_dim)

    def _by_stage(self, values: np.ndarray) -> np.ndarray:
        """(N, R) sums of (R, R) values by stage and rank."""
        place = self.outline.stage * self.ranks + np.arange(self.ranks)[:, None]
        sums = np.bincount(place.ravel(), values.ravel(), minlength=self.outline.stages * self.ranks)
        return sums.reshape(self.outline.stages, self.ranks)

    # Launches

    @cached_property
    def _work(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N, R) pairs, keys and, of those queries that see any, about how many."""
        pairs, keys = self._by_stage(self.loads.pairs), self._by_stage(self.loads.keys)
        queries = np.minimum(self.loads.queries, np.ceil(pairs / np.maximum(1, keys)) + TILE)
        # Where documents lie side by side, a key's queries are few, all keys' all.
        queries[self._own] = self.loads.queries
        return pairs, keys, np.where(pairs > 0, queries, 0)

    @cached_property
    def _own(self) -> tuple[np.ndarray, np.ndarray]:
        """Where in (N, R) ranks attend to their own keys, behind which results are carried on."""
        return np.diagonal(self.outline.stage), np.arange(self.ranks)

    def _put_together(self) -> np.ndarray:
        """(N, R) seconds in which own keys and those that came are laid side by side for one launch."""
        keys, foreign = self._by_stage(self.loads.keys), self._by_stage(self._foreign)
        both = np.where((foreign > 0) & (keys > foreign), keys, 0)
        return both * (2 * self.shape.key_bytes / self.machine.memory)

    def _launch(
        self, pairs: np.ndarray, tiles: np.ndarray, rate: float, operations: int, merged: np.ndarray
    ) -> np.ndarray:
        """Seconds of launches: the last tiles leave processors idle, and fp32 rows of a carry are read and written."""
        shape, machine = self.shape, self.machine
        rounds = tiles / machine.processors
        idle = np.ceil(rounds) / np.maximum(rounds, 1e-9)
        rate *= machine.sharded if self._foreign.any() else 1
        busy = pairs * (operations * shape.heads * shape.head_dim / rate) * np.where(tiles > 0, idle, 1)
        return np.where(pairs > 0, busy + merged * (shape.row_bytes / machine.memory) + machine.launch, 0.0)

    def forward(self) -> Pass:
        """The forward pass."""
        pairs, _, queries = self._work
        merged = np.where(pairs > 0, self.loads.queries, 0)  # a launch carries all rows on, also those that see nothing
        merged[self._own] = 0
        compute = self._launch(pairs, np.ceil(queries / TILE) * self.shape.heads, self._rates[0], 4, merged)
        return self._walk(compute + self._put_together(), gradients=False)

    def backward(self) -> Pass:
        """The backward pass."""
        pairs, keys, queries = self._work
        merged = queries.copy()
        merged[self._own] = 0
        tiles = np.ceil(keys / TILE) * self.shape.key_heads
        compute = self._launch(pairs, tiles, self._rates[1], 10, merged)
        return self._walk(compute + self._put_together(), gradients=True)

    # Transfers

    @cached_property
    def _moves(self) -> list[_Moves]:
        """By stage the keys that arrive for it."""
        rank, owner = np.ogrid[: self.ranks, : self.ranks]
        ahead = np.where(self.host[rank] != self.host[owner], self._link(1).ahead, self._link(0).ahead)
        of_bytes = np.where(ahead, self._foreign, self.carried) * self.shape.key_bytes
        sources = np.where(ahead, owner, self.outline.source)
        rank, owner = np.nonzero(of_bytes)
        source = sources[rank, owner]
        return self._timed(self.outline.stage[rank, owner], rank, source, of_bytes[rank, owner], source == owner)

    @cached_property
    def _returns(self) -> list[_Moves]:
        """By stage the gradient parts that leave behind it."""
        foreign = self._foreign * self.shape.gradient_bytes
        rank, owner = np.nonzero(foreign)
        stage = self.outline.stage[rank, owner]
        return self._timed(stage, owner, rank, foreign[rank, owner], np.zeros(len(rank), dtype=bool))

    def _timed(
        self, stage: np.ndarray, receiver: np.ndarray, sender: np.ndarray, sizes: np.ndarray, own: np.ndarray
    ) -> list[_Moves]:
        """Transfers by stage, each with the time of all that its two ends move over the same kind of link.

        A rank's link carries so much at a time each way, whoever is at its other end.
        """
        outside = (self.host[receiver] != self.host[sender]).astype(np.int64)
        seconds = np.zeros(len(sizes))
        for end in (receiver, sender):
            place = (stage * 2 + outside) * self.ranks + end
            total = np.bincount(place, sizes, minlength=self.outline.stages * 2 * self.ranks)
            seconds = np.maximum(seconds, np.where(outside, *(self._link(x).time(total[place]) for x in (1, 0))))
        links = self._link(0), self._link(1)
        hidden = np.where(outside, links[1].hidden, links[0].hidden)
        ahead = own & np.where(outside, links[1].ahead, links[0].ahead)
        order = np.argsort(stage, kind="stable")
        edges = np.searchsorted(stage[order], np.arange(self.outline.stages + 1))
        columns = (receiver, sender, seconds, hidden, ahead)
        return [_Moves(*(x[order[first:last]] for x in columns)) for first, last in pairwise(edges)]

    def _link(self, outside: int) -> Link:
        return self.machine.outside if outside else self.machine.inside

    def _arrive(self, begun: np.ndarray, done: np.ndarray, moves: _Moves) -> np.ndarray:
        """(R,) when all that ranks receive and send is over; 0 where that is nothing.

        Args:
            begun: (R,) when their launch begins; before it, all is posted.
            done: (R,) when it ends.
            moves: what travels meanwhile.
        """
        receiver, sender, seconds, hidden, ahead = moves
        if not receiver.size:
            return np.zeros(self.ranks)
        posted, sent = (begun[end] + (1 - hidden) * (done - begun)[end] for end in (receiver, sender))
        stop = np.maximum(posted, np.where(ahead, 0, sent)) + seconds
        over = np.zeros(self.ranks)
        np.maximum.at(over, receiver, stop)
        np.maximum.at(over, sender, np.where(ahead, 0, stop))
        return over

    def _walk(self, compute: np.ndarray, gradients: bool) -> Pass:
        """Go through the stages: launches, keys for the next stage, and gradient parts of the one before."""
        stages, rest, coming = self.outline.stages, self._rest(gradients), deque[tuple[np.ndarray, np.ndarray]]()
        now = rest
        wait = np.zeros_like(compute)
        late = np.where(self._splits_own, compute[0] / 2, 0) if gradients else np.zeros(self.ranks)
        for stage in range(stages):
            done = now + compute[stage] - (late if stage == 0 else 0)
            ready = done
            if stage + 1 < stages:
                ready = np.maximum(ready, self._arrive(now, done, self._moves[stage + 1]))
            if gradients:
                if len(coming) >= self._ahead:
                    over, adding = coming.popleft()
                    ready = np.maximum(ready, over) + adding
                # Parts leave behind the launch and travel beside the next one, or beside the last half of own keys.
                last = np.where(self._last == stage, late, 0)
                following = last + compute[stage + 1] if stage + 1 < stages else last
                coming.append((self._arrive(done, done + following, self._returns[stage]), self._added[stage]))
                done, ready = done + last, ready + last
            wait[stage] = ready - done
            now = ready
        if gradients:
            finished = now
            for over, adding in coming:
                finished = np.maximum(finished, over) + adding
            wait[-1] += finished - now
            now = finished
        return Pass(compute, wait, rest, float(now.max()))

    def _rest(self, gradients: bool) -> np.ndarray:
        """(R,) seconds of the rest of the layer: a third of it forward, two thirds backward."""
        pairs = self.tokens * self.token_work * (2 if gradients else 1) / 3
        return pairs * (14 * self.shape.heads * self.shape.head_dim / self.machine.forward)

    @cached_property
    def _last(self) -> np.ndarray:
        """(R,) the last stage in which a rank attends to keys or gets gradient parts of its own."""
        used = np.where(self.loads.keys > 0, self.outline.stage, 0)
        return np.maximum(used.max(1), used.max(0))

    @cached_property
    def _splits_own(self) -> np.ndarray:
        """(R,) whether the backward pass works on half of the own keys last, see `Program.backward_stages`."""
        alone = np.diagonal(self.outline.stage) == 0
        return alone & (self._last > 0) & (np.diagonal(self.loads.keys) >= LEAST_SPLIT)

    @cached_property
    def _foreign(self) -> np.ndarray:
        """(R, R) keys by (rank, owner) but for ranks' own."""
        return self.loads.keys * (1 - np.eye(self.ranks, dtype=np.int64))

    @cached_property
    def _reduced(self) -> np.ndarray:
        """(N, R) own keys whose gradient parts come to a rank."""
        place = self.outline.stage * self.ranks + np.arange(self.ranks)
        sums = np.bincount(place.ravel(), self._foreign.ravel(), minlength=self.outline.stages * self.ranks)
        return sums.reshape(self.outline.stages, self.ranks)

    @cached_property
    def _added(self) -> np.ndarray:
        """(N, R) seconds in which such parts are added up: two are read and one is written."""
        return self._reduced * (3 * self.shape.gradient_bytes / self.machine.memory)

    # Memory

    @cached_property
    def _room(self) -> np.ndarray:
        """(R,) own keys whose gradient parts come in a stage, or in a piece of one, at most."""
        return np.minimum(self._reduced.max(0), self.outline.piece or np.inf)

    @cached_property
    def _leaving(self) -> np.ndarray:
        """(N, R) keys whose gradient parts leave a rank behind a stage, or a piece of one."""
        return np.minimum(self._by_stage(self._foreign), self.outline.piece or np.inf)

    @cached_property
    def _slots(self) -> np.ndarray:
        """(R,) how often there is room for gradient parts that come, see `Program.reduced_ahead`.

        A rank is taken to have as many keys as queries.
        """
        parts = ((self._reduced > 0) | (self._leaving > 0)).sum(0)
        size = np.maximum(1, np.maximum(self._room, self._leaving.max(0)))
        most = np.minimum(2 * self.loads.queries, self.outline.piece or AHEAD) // size
        return np.maximum(1, np.minimum(parts, most)).astype(np.int64)

    @cached_property
    def _ahead(self) -> int:
        """The same of the rank that has it least often."""
        return int(self._slots[self._reduced.any(0)].min(initial=self.outline.stages))

    @cached_property
    def memory(self) -> int:
        """Bytes of two buffers for keys, of own ones beside others, and of gradient parts that leave and that come."""
        arriving = self._by_stage(self.carried)
        keys, foreign = self._by_stage(self.loads.keys), self._by_stage(self._foreign)
        of_keys = 2 * arriving.max(0) + np.where((foreign > 0) & (keys > foreign), keys, 0).max(0)
        of_parts = np.maximum(2, self._slots) * self._leaving.max(0) + self._slots * self._room
        nbytes = of_keys * self.shape.key_bytes + of_parts * self.shape.gradient_bytes
        return int(nbytes.max()) // self.shape.groups
