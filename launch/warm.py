"""Compiles the kernels of a job ahead of it, so that its ranks find them in Triton's cache.

    python launch/warm.py head_dims=128 heads=32/8                    # bfloat16, one GPU and rings of any size
    python launch/warm.py head_dims=64,192/128 heads=16/4,8 dtypes=bfloat16,float32 processes=16
    python launch/warm.py head_dims=128 heads=32/8 dropout=0.1 alibi=true

Every option is also taken as --key value. Any mask, window, documents and length launch the same kernels; only
windows of about 128 tokens or less (window=127), documents as short as that (window=their longest - 1), layouts of
blocks (blocks=128, tokens of one), sink tokens, learned sinks, softcap, ALiBi slopes, dropout and key padding have
their own. Run it on a GPU of the kind that the job will have, with the same torch, triton and ringflash, and the same
cache: TRITON_CACHE_DIR, or else ~/.triton/cache.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.gpu.add_rows import MOST
from ringflash.kernels.gpu.lay_rows import lay_rows
from ringflash.kernels.gpu.round_numbers import round_numbers
from ringflash.kernels.intervals import KeyIntervals, causal_intervals
from ringflash.kernels.key_blocks import BlockPlaces, unit_of
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.select import select
from ringflash.kernels.sums import Part as SumPart
from ringflash.kernels.whole_backward import whole_backward
from ringflash.launch.doctor import usable_cores
from ringflash.launch.flags import as_flags

ROWS = 1024
"""Query and key rows of a launch; so many or more launch the same kernels."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Form:
    """What a model asks of attention, as far as it makes another kernel.

    Attributes:
        dtype: of query, key and value.
        head_dims: of query and key, and of value.
        heads: of query, and of key and value.
        window: tokens in front of a query that it sees, where they are few; 0 for any mask.
        blocks: tokens of a block of the mask's layout, into multiples of which ranks and documents divide the sequence;
            0 for none.
        sink_tokens: whether the mask has them; not beside blocks.
        sinks: whether learned sinks join the softmax, of the dtype of query.
        softcap: as in `attention`; and so are the others.
        alibi: whether there are slopes.
        dropout: probability.
        padding: whether keys are padding.
        deterministic: whether gradients repeat bit for bit.
    """

    dtype: torch.dtype
    head_dims: tuple[int, int]
    heads: tuple[int, int]
    window: int = 0
    blocks: int = 0
    sink_tokens: bool = False
    sinks: bool = False
    softcap: float = 0.0
    alibi: bool = False
    dropout: float = 0.0
    padding: bool = False
    deterministic: bool = False

    @property
    def modified(self) -> bool:
        """Whether something is done to scores and weights, see `ringflash.kernels.modifiers`."""
        return bool(self.softcap or self.alibi or self.dropout or self.padding)

    def __str__(self) -> str:
        dims, heads = ("/".join(map(str, dict.fromkeys(x))) for x in (self.head_dims, self.heads))
        return f"{str(self.dtype).removeprefix('torch.')}, head dimension {dims}, {heads} heads"


@dataclass(frozen=True)
class Part:
    """One launch of a form, forward or backward, in some stage of a ring.

    Attributes:
        form: see there.
        backward: which pass.
        carried: whether it goes on with the result of an earlier stage.
        kept_exact: whether its result, and so the gradient of keys, stays in float32 for a later stage or another rank.
        whole: whether it is all that a call does, as on one GPU.
    """

    form: Form
    backward: bool
    carried: bool
    kept_exact: bool
    whole: bool = False

    def __str__(self) -> str:
        stage = {(False, False): "alone", (False, True): "first", (True, True): "between", (True, False): "last"}
        name = "on one GPU" if self.whole else stage[self.carried, self.kept_exact]
        return f"{self.form}: {'backward' if self.backward else 'forward'}, {name}"


@dataclass(frozen=True)
class Compiled:
    """A kernel that a part has launched.

    Attributes:
        name: of its function.
        seconds: that compiling or loading it took.
        found: whether it was in the cache.
    """

    name: str
    seconds: float
    found: bool


def parts_of(forms: Sequence[Form], ranks: bool = True) -> list[Part]:
    """All launches of forms, those that compile longest first.

    Args:
        forms: of the job.
        ranks: whether there are several, so that stages follow each other; otherwise on one GPU only.
    """
    if ranks:  # where a rank's tokens leap, rows behind see twice as many keys together, or too many
        windows = ([replace(form, window=n) for n in (form.window, 2 * form.window, 0)] for form in forms)
        forms = list(dict.fromkeys(itertools.chain.from_iterable(windows)))
    stages = [(False, False, True), *itertools.product((False, True), (False, True), (False,))][: 5 if ranks else 1]
    parts = [Part(form, backward, *stage) for stage in stages for form in forms for backward in (False, True)]
    return sorted(parts, key=lambda part: part.backward)


def warm(parts: Sequence[Part], device: torch.device, processes: int) -> Iterator[tuple[Part, list[Compiled]]]:
    """Launch parts, in processes of their own if several, and say of each what kernels it took.

    Args:
        parts: from `parts_of`.
        device: that they are launched on.
        processes: at a time; 1 for this one.
    """
    if processes == 1:
        yield from ((part, compile_part(part, device)) for part in parts)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(processes, context, _quiet) as pool:
        futures: dict[Future, Part] = {pool.submit(compile_part, part, device): part for part in parts}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _quiet() -> None:
    """What is compiled is told by `main`."""
    logging.getLogger("ringflash.kernels").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def compile_part(part: Part, device: torch.device) -> list[Compiled]:
    """Launch a part, and say what kernels it took; none where attention is torch's operators."""
    form = part.form
    kernels = select(device, form.dtype, *form.head_dims, "auto")
    if "triton" not in sys.modules:
        return []
    from triton import knobs

    compiled = []

    def note(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        compiled.append(Compiled(src.name, times.total / 1e6, cache_hit))

    with knobs.compilation.scope():
        knobs.compilation.listener = note
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _launch(kernels, part, device)
    return compiled


def _launch(kernels: ModuleType, part: Part, device: torch.device) -> None:
    form, exact = part.form, torch.float32
    (heads, key_heads), (dim, value_dim) = form.heads, form.head_dims

    def zeros(*shape: int, dtype: torch.dtype = form.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    query, key, value = zeros(ROWS, heads, dim), zeros(ROWS, key_heads, dim), zeros(ROWS, key_heads, value_dim)
    lse, intervals, modifiers = zeros(heads, ROWS, dtype=exact), _intervals(form, device), _modifiers(form, device)
    dtype = exact if part.kept_exact else form.dtype
    settings: dict[str, Any] = {"scale": dim**-0.5, "modifiers": modifiers}
    sinks = zeros(heads) if form.sinks and not part.kept_exact else None  # they join the last launch
    if dtype == exact != form.dtype:  # of several ranks, which take keys and values from each other
        lay_rows(key, value, zeros(ROWS * (key[0].nbytes + value[0].nbytes), dtype=torch.uint8))
    if not part.backward:
        carry = (zeros(ROWS, heads, value_dim, dtype=exact), lse) if part.carried else None
        kernels.attend(query, key, value, intervals, carry=carry, out_dtype=dtype, sinks=sinks, **settings)
        return
    if sinks is not None:
        kernels.sink_gradient(sinks, lse, lse)
    dout, settings = zeros(ROWS, heads, value_dim), {**settings, "deterministic": form.deterministic}
    if part.whole:
        whole_backward(kernels, dout, query, key, value, dout, lse, None, intervals, **settings)
        return
    delta = kernels.row_delta(dout, dout)
    # Of a narrow window one launch may have all keys, some of which are another rank's.
    for dkey_dtype in dict.fromkeys((dtype, exact if form.window else dtype)):
        _, *sums = kernels.attend_backward(
            dout, query, key, value, lse, delta, intervals,
            carry=zeros(*query.shape, dtype=exact) if part.carried else None,
            dquery_dtype=dtype, dkey_dtype=dkey_dtype, **settings,
        )  # fmt: skip
        if dkey_dtype == exact != form.dtype:  # gradients of keys are sums of what several ranks find
            parts = [SumPart(i, slice(0, ROWS), x.data_ptr(), lambda x=x: x) for i, x in enumerate(sums)]
            for ranks in range(1, MOST + 1):
                kernels.add_rows(sums, ranks * parts)
            for rounded in (sums[:1], sums):
                round_numbers([(x, x.new_empty(x.shape, dtype=form.dtype)) for x in rounded])


def _intervals(form: Form, device: torch.device) -> KeyIntervals:
    start, stop = (getattr(causal_intervals(ROWS, ROWS, device), name) for name in ("start", "stop"))
    tokens = [torch.zeros(ROWS, dtype=torch.int32, device=device) for _ in range(2 * form.sink_tokens)]
    band = form.window + 1 if form.window else None
    intervals = KeyIntervals((stop - band).clamp(min=0) if band else start, stop, ROWS, *tokens, band=band)
    if not form.blocks:
        return intervals
    count, place = -(-ROWS // form.blocks), torch.arange(ROWS, dtype=torch.int32) // form.blocks
    places = BlockPlaces(place, place, (unit_of(place), unit_of(place))).to(device)
    return intervals.with_blocks(places.showing(torch.ones(1, count, count, dtype=torch.bool, device=device)))


def _modifiers(form: Form, device: torch.device) -> Modifiers | None:
    if not form.modified:
        return None
    position = torch.arange(ROWS, dtype=torch.int32, device=device)
    positioned = form.alibi or bool(form.dropout)
    return Modifiers(
        softcap=form.softcap,
        slopes=torch.ones(form.heads[0], device=device).expand(ROWS, -1) if form.alibi else None,
        dropout=form.dropout,
        seed=torch.zeros(1, dtype=torch.int64, device=device) if form.dropout else None,
        query_positions=position if positioned else None,
        key_positions=position.clone() if positioned else None,
        key_visible=torch.ones(ROWS, dtype=torch.uint8, device=device) if form.padding else None,
    )


def _pairs(text: str) -> list[tuple[int, int]]:
    """The pairs (64, 64) and (192, 128) of "64,192/128", and so on."""
    pairs = []
    for word in text.split(","):
        first, _, second = word.partition("/")
        if not all(x.isdecimal() and int(x) for x in (first, second or first)):
            raise argparse.ArgumentTypeError(f"{word!r}; allowed are positive whole numbers, two of them as 192/128")
        pairs.append((int(first), int(second or first)))
    return pairs


def _dtypes(text: str) -> list[torch.dtype]:
    if missing := [word for word in text.split(",") if word not in DTYPES]:
        raise argparse.ArgumentTypeError(f"{missing[0]!r}; allowed are {', '.join(DTYPES)}")
    return [DTYPES[word] for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=_pairs, required=True, help="64,128 or query's/value's: 192/128")
    parser.add_argument("--heads", type=_pairs, required=True, help="query's/key's: 32/8; of one rank, if split")
    parser.add_argument("--dtypes", type=_dtypes, default=[torch.bfloat16], help=f"{', '.join(DTYPES)} (bfloat16)")
    parser.add_argument("--one-gpu", action="store_true", help="nothing for several ranks")
    parser.add_argument("--window", type=int, default=0, help="tokens in front of a query, where they are few (any)")
    parser.add_argument("--blocks", type=int, default=0, help="tokens of a block of the mask's layout (none)")
    parser.add_argument("--sink-tokens", action="store_true", help="first tokens stay visible behind a window")
    parser.add_argument("--sinks", action="store_true", help="learned sinks, of query's dtype")
    parser.add_argument("--softcap", type=float, default=0.0, help="bound of the scores (none)")
    parser.add_argument("--alibi", action="store_true", help="with ALiBi slopes")
    parser.add_argument("--dropout", type=float, default=0.0, help="probability (0)")
    parser.add_argument("--padding", action="store_true", help="with a mask of padding")
    parser.add_argument("--deterministic", action="store_true", help="gradients that repeat bit for bit")
    parser.add_argument("--processes", type=int, help="at a time (one a core, at most 8)")
    return parser


def _forms(options: argparse.Namespace) -> list[Form]:
    names = ("window", "blocks", "sink_tokens", "sinks", "softcap", "alibi", "dropout", "padding", "deterministic")
    features = {name: getattr(options, name) for name in names}
    chosen = itertools.product(options.dtypes, options.head_dims, options.heads)
    return [Form(dtype, head_dims, heads, **features) for dtype, head_dims, heads in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile what the command line names, and show what that took."""
    parser = _parser()
    options = parser.parse_args(as_flags(sys.argv[1:] if arguments is None else arguments))
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use, and kernels are compiled for the one they run on")
    parts = parts_of(_forms(options), not options.one_gpu)
    processes = options.processes or min(usable_cores(), len(parts), 8)
    begin, compiled, found = time.monotonic(), 0, 0
    try:
        for part, kernels in warm(parts, torch.device("cuda", torch.cuda.current_device()), processes):
            new = [f"{x.name} {x.seconds:.1f} s" for x in kernels if not x.found]
            compiled, found = compiled + len(new), found + len(kernels) - len(new)
            print(f"{part}: {', '.join(new) or 'nothing to compile'}", flush=True)
    except ArgumentError as error:
        parser.error(str(error))
    print(f"{compiled} kernels compiled, {found} found compiled, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
