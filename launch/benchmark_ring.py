"""Suite `ring`: attention over the GPUs of one host, beside torch's context parallelism, Ulysses, and one GPU.

Run under torchrun. 32 query and 8 key heads, head dimension 128, bf16, one sequence, TFLOP/s a GPU. "one GPU" attends
alone to as many pairs as each rank's share: what a ring that costs nothing would reach. "ringflash 2 x 2" is two ranks
that exchange heads in a ring of two, "ringflash Ulysses" all of them without a ring. RINGFLASH_TRANSPORT chooses the
transport. Calls are timed in a row, as those of a model's layers are, whose host is ahead of its GPU; what a call costs
the host is in docs/benchmarks/overhead.md.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringflash import Mask, Sharding
from ringflash.functional import attention
from ringflash.launch.benchmark_report import Report, Row, table_of_speeds
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.transport.select import transport_of

if TYPE_CHECKING:
    from ringflash.launch.benchmark import Options

HEADS, KEY_HEADS, DIM = 32, 8, 128
REPEATS = 20

AT_LEAST, MOST_IN_A_ROW = 0.15, 16
"""Seconds that calls in a row take together, and how many they are at most."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """What is attended.

    Attributes:
        name: in tables.
        tokens: of the sequence.
        partitions: of ours.
        mean: documents' mean length, log-normal; 0 for one document.
        window: keys before a query that it sees; 0 for all.
    """

    name: str
    tokens: int
    partitions: tuple[str, ...]
    mean: int = 0
    window: int = 0

    def documents(self, tokens: int, seed: int) -> list[int]:
        """Lengths that sum to so many tokens; the same on every rank."""
        generator, lengths = torch.Generator().manual_seed(seed), []
        while self.mean and sum(lengths) < tokens:
            drawn = torch.empty(1).log_normal_(math.log(self.mean) - 0.5, 1.0, generator=generator)
            lengths.append(min(max(64, int(drawn)), tokens - sum(lengths)))
        return lengths or [tokens]

    def pairs(self, lengths: list[int]) -> float:
        """Of queries and keys that see each other."""
        if self.window:
            seen = [(n, min(self.window, n - 1)) for n in lengths]
            return sum(n * (w + 1) - w * (w + 1) / 2 for n, w in seen)
        return sum(n * n / 2 for n in lengths)

    def sharding(self, lengths: list[int], **where: Any) -> Sharding:
        """Of such documents."""
        mask = Mask.sliding_window(self.window) if self.window else Mask.causal()
        edges = torch.tensor([0, *lengths]).cumsum(0).tolist() if len(lengths) > 1 else None
        # Nothing but attention is timed, so shares are to be level in attention alone.
        return Sharding(mask, seqlen=sum(lengths), cu_seqlens=edges, token_work=0, **where)


CASES = (
    Case("causal", 32768, ("zigzag", "contiguous")),
    Case("causal", 131072, ("zigzag", "contiguous")),
    Case("causal", 524288, ("zigzag",)),
    Case("documents, mean 8192", 131072, ("balanced", "contiguous"), mean=8192),
    Case("documents, mean 8192", 524288, ("balanced", "contiguous"), mean=8192),
    Case("documents, mean 2048", 131072, ("balanced", "contiguous"), mean=2048),
    Case("window 4096", 524288, ("contiguous",), window=4096),
)


def measure(options: Options) -> Iterator[Report]:
    """Rows on rank 0 after every case, nothing elsewhere."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rows, repeats = [], options.repeats or REPEATS
    for case in CASES:
        if options.cases not in case.name or (options.tokens and case.tokens not in options.tokens):
            continue
        rows += _of(case, repeats)
        if dist.get_rank() == 0:
            assert dist.group.WORLD is not None
            yield Report(rows, table_of_speeds(rows), {"transport": transport_of(dist.group.WORLD).why})
    dist.destroy_process_group()


def ways(ranks: int, partitions: tuple[str, ...]) -> dict[str, tuple[str, int | None]]:
    """Partition and `head_ranks` of what is timed of ringflash: as it chooses, a plan, heads, and heads in a plan."""
    hybrids = {f"{n} x {ranks // n}": (partitions[0], n) for n in range(2, ranks) if ranks % n == 0}
    chosen: dict[str, tuple[str, int | None]] = {x: (x, None) for x in partitions}
    return chosen | {"plan": (partitions[0], 1), "Ulysses": ("contiguous", ranks)} | hybrids


def _of(case: Case, repeats: int) -> list[Row]:
    lengths, ranks = case.documents(case.tokens, seed=0), dist.get_world_size()
    pairs = case.pairs(lengths) / ranks
    entries = [_alone(case)]
    for name, (partition, head_ranks) in ways(ranks, case.partitions).items():
        sharding = case.sharding(lengths, partition=partition, head_ranks=head_ranks)
        entries.append(Entry(f"ringflash {name}", _attending(sharding), sharding.tokens, pairs))
    whole = case.sharding(lengths, group=ONE_DEVICE)
    dense, even = whole.documents is None and not case.window, case.tokens % ranks == 0
    if even:
        share = case.tokens // ranks
        entries.append(Entry("Ulysses, our kernels", _ulysses(_attending(whole)), share, pairs))
        if dense:
            entries.append(Entry("Ulysses cuDNN", _ulysses(_cudnn), share, pairs))
    rows = measured(case, entries, repeats)
    if even and dense:
        with _context_parallel(case.tokens) as entry:
            rows += measured(case, [entry], repeats)
    return rows


@dataclass(frozen=True)
class Entry:
    """An implementation to measure.

    Attributes:
        name: in tables.
        attend: it.
        tokens: of this rank.
        pairs: of queries and keys for a rank, on the mean.
        leaves: query, key, value and gradient of out; drawn if None.
    """

    name: str
    attend: Attend
    tokens: int
    pairs: float
    leaves: list[Tensor] | None = None


def measured(case: Case, entries: list[Entry], repeats: int) -> list[Row]:
    """Rows of all entries. They take turns, in another order in every round, so that none has the cooler GPUs."""
    calls = [call for entry in entries for call in _calls(entry)]
    for _ in range(2):
        alone = [_slowest([_each(function, 1)]) for _, _, function, _ in calls]
    in_a_row = [min(MOST_IN_A_ROW, math.ceil(AT_LEAST * 1e3 / milliseconds)) for milliseconds in alone]
    times: list[list[float]] = [[] for _ in calls]
    for number in range(1 + repeats):
        for which in random.Random(number).sample(range(len(calls)), len(calls)):
            milliseconds = _each(calls[which][2], in_a_row[which])
            if number:
                times[which].append(milliseconds)
    rows = []
    for (name, direction, _, operations), found in zip(calls, times, strict=True):
        milliseconds = _slowest(found)
        rows.append(Row(name, case.name, case.tokens, direction, milliseconds, operations / milliseconds / 1e9))
        if dist.get_rank() == 0:
            print(rows[-1], flush=True)
    return rows


def _calls(entry: Entry) -> list[tuple[str, str, Callable[[], None], float]]:
    """Name, direction, the call, its operations on the mean of ranks."""
    *leaves, dout = entry.leaves or _share(entry.tokens)

    def forward() -> None:
        with torch.no_grad():
            entry.attend(*leaves)

    def forward_backward() -> None:
        torch.autograd.grad(entry.attend(*leaves), leaves, dout)

    operations = 4 * HEADS * DIM * entry.pairs
    return [
        (entry.name, "fwd", forward, operations),
        (entry.name, "fwd+bwd", forward_backward, 3.5 * operations),
    ]


def _attending(sharding: Sharding) -> Attend:
    return lambda query, key, value: attention(query, key, value, sharding=sharding)[0]


def _alone(case: Case) -> Entry:
    """As many pairs as a rank has; of documents all, as a part of them would be of other lengths."""
    ranks = dist.get_world_size()
    tokens = case.tokens
    if not case.mean:
        tokens = case.tokens // ranks if case.window else round(case.tokens / math.sqrt(ranks))
    lengths = case.documents(tokens, seed=0)
    sharding = case.sharding(lengths, group=ONE_DEVICE)
    return Entry("one GPU", _attending(sharding), tokens, case.pairs(lengths))


class _HeadsForTokens(torch.autograd.Function):
    """(s, H, D) of all heads to (S, H / P, D) of all tokens, or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter_heads: bool) -> Tensor:
        ctx.scatter_heads = scatter_heads
        return _exchange(x, scatter_heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]  # torch's `*grads`
        return _exchange(gradient, not ctx.scatter_heads), None


def _exchange(x: Tensor, scatter_heads: bool) -> Tensor:
    ranks = dist.get_world_size()
    if scatter_heads:
        parts = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        return received.flatten(0, 1)
    parts = x.contiguous().unflatten(0, (ranks, -1))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return received.transpose(0, 1).flatten(1, 2)


def _ulysses(attend: Attend) -> Attend:
    """All tokens of some heads on each rank; attention of one device."""

    def of_share(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (_HeadsForTokens.apply(x[0], True)[None] for x in (query, key, value))
        return _HeadsForTokens.apply(attend(q, k, v)[0], False)[None]

    return of_share


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@contextmanager
def _context_parallel(tokens: int) -> Generator[Entry]:
    """torch's, with its allgather, which is the faster of its two ways."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("sequence",))
    set_rotate_method("allgather")
    whole = [
        torch.randn(1, heads, tokens, DIM, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    with (
        sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * len(whole)),
    ):
        leaves = [x.clone().requires_grad_() for x in whole[:3]] + [whole[3].clone()]
        pairs = tokens**2 / 2 / dist.get_world_size()
        yield Entry("torch allgather", attend, tokens // dist.get_world_size(), pairs, leaves)


def _share(tokens: int) -> list[Tensor]:
    """This rank's query, key, value and gradient of out."""
    return [
        torch.randn(1, tokens, heads, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=index < 3)
        for index, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS, HEADS))
    ]


def _each(function: Callable[[], None], count: int) -> float:
    """Milliseconds on this rank of each of so many calls in a row, which all ranks begin together."""
    torch.cuda.synchronize()
    dist.barrier()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / count


def _slowest(milliseconds: list[float]) -> float:
    """Median of the slowest rank's."""
    slowest = torch.tensor(milliseconds, device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.median().item()
