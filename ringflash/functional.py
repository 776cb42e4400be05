"""`attention`: the one function under every interface, with every feature, on one device or on many.

Legend: B sequences; S query and Sk key tokens of one sequence over all ranks, s and sk of them on this rank; H query
heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from ringflash.errors import ArgumentError, UnsupportedError
from ringflash.kernels.kept import Kept, metadata
from ringflash.kernels.select import NAMES
from ringflash.kernels.torch_private import mapped
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.device_boundaries import on_a_device
from ringflash.parallel.execution.call import NEEDS, Request
from ringflash.parallel.execution.operators import NO_FORWARD_MODE, NO_VMAP, call_attention, transformed
from ringflash.parallel.lookup import find
from ringflash.parallel.mesh import Group, process_group
from ringflash.parallel.planning.generators import check_plan
from ringflash.parallel.planning.heads import check_head_ranks, check_heads
from ringflash.parallel.positions.integers import check_flag, check_number, integers
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.sharding import Sharding, check_marks
from ringflash.recomputed import here

Boundaries = Sequence[int] | Tensor | None
Numbers = tuple[int, ...]

CAUSAL = Mask.causal()
"""What no mask stands for."""


class Located(NamedTuple):
    """All that tells the operator which sharding a call has, and how many documents that has.

    Attributes:
        tensors: handle, boundaries and query_boundaries (see `ringflash.parallel.execution.call.Inputs`).
        request: see `ringflash.parallel.execution.call.Settings`.
        sizes: see there.
        documents: number of documents that were given; None without any.
    """

    tensors: tuple[Tensor | None, Tensor | None, Tensor | None]
    request: str
    sizes: tuple[int, ...]
    documents: int | None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    cu_seqlens: Boundaries = None,
    query_cu_seqlens: Boundaries = None,
    seqlen: int | None = None,
    key_seqlen: int | None = None,
    group: Group = None,
    partition: str | Partition | None = None,
    head_ranks: int | None = None,
    plan: str | None = None,
    sharding: Sharding | None = None,
    scale: float | None = None,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout: float | None = 0.0,
    dropout_seed: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Exact attention of this rank's queries to the keys of all ranks.

    Args:
        query: (B, s, H, D), fp32, fp16 or bf16; fp64 for checks.
        key: (B, sk, Hk, D), same dtype; H a multiple of Hk.
        value: (B, sk, Hk, Dv), same dtype.
        mask: which keys a query may see, over global positions; causal if None. Where queries and keys differ in
            length, the last query stands at the last key.
        cu_seqlens: global document boundaries over the B * Sk keys laid end to end, (documents + 1,); on the host if
            there is more than one rank. To torch.compile a list is a constant, as the mask is: code is compiled anew
            for another one. Pass boundaries that change as a tensor.
        query_cu_seqlens: those of the B * S queries, where they differ.
        seqlen: S; needed only where not every rank holds the same number of queries.
        key_seqlen: Sk; likewise for keys.
        group: a ProcessGroup or one-dimensional DeviceMesh over whose ranks each sequence is sharded. None is the
            default group if torch.distributed is initialised, and one device otherwise;
            `ringflash.parallel.mesh.ONE_DEVICE` never communicates.
        partition: how tokens are sharded; see `ringflash.shard`. "zigzag" if None.
        head_ranks: how many ranks that follow each other exchange heads for tokens; see `ringflash.Sharding`. H is a
            multiple of it. What is predicted to be fastest if None.
        plan: how keys travel; see `ringflash.Sharding`, which chooses if None.
        sharding: how the batch lies on its ranks, in place of lengths, documents, partition, head_ranks and plan.
            `mask` is then one of its masks, and may be None where it has one.
        scale: factor of the scores before the softmax; 1 / sqrt(D) if None.
        softcap: scores become softcap * tanh(score / softcap); 0 or None for none.
        alibi_slopes: fp32 (H,), or (B, H), or (documents, H) with cu_seqlens; slope * distance is taken from a score.
            There is no gradient by them.
        dropout: probability of dropping a pair; 0 or None for none.
        dropout_seed: (1,) int64 on the query's device, the same on all ranks; with it everything that is dropped is
            given. None draws one from torch's generator of that device: ranks that were given the same
            `torch.manual_seed` drop what one device would.
        key_padding_mask: (B, sk) bool, False for keys that nobody may see. What is there must be finite all the same.
        sinks: (H,) learned logits that join each row's softmax without a value, as in gpt-oss.
        kernel: "auto", or the name of one implementation (see `ringflash.kernels.select`).
        deterministic: gradients repeat bit for bit.

    Returns:
        out (B, s, H, Dv) in the query's dtype, and the log-sum-exp (B, H, s) fp32, both differentiable.

    Raises:
        ArgumentError: an argument is not supported; raised before any communication.
        RankMismatchError: ranks disagree on an argument.
        UnsupportedError: asked for second derivatives, for forward-mode derivatives, or under torch.vmap.
    """
    if sharding is not None:
        check_sharding(sharding)
    try:
        others = {
            "alibi_slopes": alibi_slopes,
            "dropout_seed": dropout_seed,
            "key_padding_mask": key_padding_mask,
            "sinks": sinks,
        }
        check_types({"query": query, "key": key, "value": value}, others)
        query, key, value = _autocast(query, key, value)
        softcap, dropout = 0.0 if softcap is None else softcap, 0.0 if dropout is None else dropout
        _check_transformations((query, key, value, alibi_slopes), (cu_seqlens, query_cu_seqlens, *others.values()))
        numbers = scale, softcap, dropout, kernel, deterministic
        settings_of = _settings if torch.compiler.is_compiling() else _settings_once
        settings = settings_of(query, key, value, *numbers)
        if mask is not None and not isinstance(mask, Mask):
            raise ArgumentError(f"mask={mask!r}; allowed are ringflash.Mask, as Mask.causal(), and None for that")
        blocks = None
        if (sharding is not None and sharding.layout_comes_with_calls) if mask is None else mask.routed is not None:
            blocks, mask = _blocks(mask, query, key)
        if sharding is None:
            given = CAUSAL if mask is None else mask, cu_seqlens, query_cu_seqlens, seqlen, key_seqlen
            partition = "zigzag" if partition is None else partition
            located = _located(query, key, value, *given, process_group(group), partition, head_ranks, plan)
        else:
            _check_alone(cu_seqlens, query_cu_seqlens, seqlen, key_seqlen, partition, head_ranks, plan)
            located = _located_by(sharding, query, key, value, mask, group)
        if alibi_slopes is not None:
            _check_slopes(alibi_slopes, query, located)
        if sinks is not None:
            _check_sinks(sinks, query)
        region = None if torch.compiler.is_compiling() else here.region
        arguments = (
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            *located.tensors,
            alibi_slopes,
            _seed(dropout, dropout_seed, query) if dropout or dropout_seed is not None else None,
            None if key_padding_mask is None else _visible_keys(key_padding_mask, key),
            blocks,
            sinks,
            located.request,
            # What is computed again crosses again: a region has no room for what crossed.
            located.sizes if region is None or located.tensors[0] is None else (),
            *settings,
            _needs(query, key, value, sinks),
        )
    except Exception as error:
        refuse(group if sharding is None else sharding.peers(group), error)
        raise
    called = call_attention(*arguments) if region is None else region.attention(call_attention, arguments)
    out, lse = called[:2]
    (batch, tokens), heads = query.shape[:2], query.shape[2]
    return out.view(batch, tokens, heads, value.shape[3]), lse.view(heads, batch, tokens).transpose(0, 1)


_settings_kept = Kept()
"""What `_settings` gave, by what it was asked for."""


def _settings_once(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple:
    """`_settings`, worked out anew only for calls of another form."""
    call = (metadata(query), metadata(key), metadata(value), others)
    try:
        found = _settings_kept.get(call)
    except TypeError:  # not hashable: sizes that are symbols, or arguments that are refused
        return _settings(query, key, value, *others)
    return found or _settings_kept.add(call, _settings(query, key, value, *others))


def _settings(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    softcap: float,
    dropout: float,
    kernel: str,
    deterministic: bool,
) -> tuple:
    """The operator's settings (see `ringflash.parallel.execution.call.Settings`), checked."""
    check_tensors(query, key, value)
    _check_numbers(softcap, dropout, scale)
    check_flag("deterministic", deterministic)
    if not isinstance(kernel, str):
        raise ArgumentError(f"kernel={kernel!r}; allowed are {', '.join(NAMES)}")
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return scale, float(softcap), float(dropout), kernel, bool(deterministic)


def _needs(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> int:
    """Which gradients somebody may ask for, as the sum of `NEEDS`."""
    everything = transformed()  # by torch.func, whose tensors do not say what is needed
    if not (everything or torch.is_grad_enabled()):
        return 0
    given = ((query, NEEDS["query"]), (key, NEEDS["key"]), (value, NEEDS["value"]), (sinks, NEEDS["sinks"]))
    return sum([bit for x, bit in given if x is not None and (everything or x.requires_grad)])


# Which sharding a call has


def _located(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    cu_seqlens: Boundaries,
    query_cu_seqlens: Boundaries,
    seqlen: int | None,
    key_seqlen: int | None,
    group: dist.ProcessGroup | None,
    partition: str | Partition,
    head_ranks: int | None,
    plan: str | None,
) -> Located:
    """By mask, documents and lengths: looked up here, or by the operator where the host cannot."""
    ranks = 1 if group is None else group.size()
    if head_ranks is not None:
        check_head_ranks(head_ranks, ranks)
        check_heads(query.shape[2], head_ranks)
    if plan is not None:
        check_plan(plan)
    group = None if ranks == 1 else group
    for what, length in (("seqlen", seqlen), ("key_seqlen", key_seqlen)):
        if isinstance(length, float | str | Tensor) or (length is not None and length < 0):
            raise ArgumentError(f"{what}={length}; allowed are integers from 0, or None")
    (batch, tokens), key_tokens = query.shape[:2], key.shape[1]
    seqlen = tokens * ranks if seqlen is None else seqlen
    key_seqlen = (seqlen if key_tokens == tokens else key_tokens * ranks) if key_seqlen is None else key_seqlen
    sizes = batch, seqlen, key_seqlen
    if cu_seqlens is not None or query_cu_seqlens is not None:
        _check_boundaries(mask, cu_seqlens, query_cu_seqlens, ranks)
    on_device = cu_seqlens is not None and (on_a_device(cu_seqlens) or on_a_device(query_cu_seqlens))
    if on_device or torch.compiler.is_compiling():
        known, boundaries, query_boundaries = _boundaries(mask, cu_seqlens, query_cu_seqlens)
        request = Request(
            mask.spec(documents=False),
            _documents(mask, known).spec(),
            partition if isinstance(partition, str) else partition.spec(),
            "" if head_ranks is None else str(head_ranks),
            plan or "",
            "" if group is None else group.group_name,
        )
        edges = known[0] if known is not None else boundaries if boundaries is not None else mask.boundaries
        count = None if edges is None else len(edges) - 1
        return Located((None, boundaries, query_boundaries), request.text(), sizes, count)
    sharding = find(mask, sizes, group, partition, cu_seqlens, query_cu_seqlens, head_ranks, plan)
    check_marks(sharding, query, key, value)
    return Located((sharding.handle(mask), None, None), "", sharding.crossing(mask), sharding.documents)


def _located_by(
    sharding: Sharding, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, group: Group
) -> Located:
    """By a sharding."""
    if query.dim() == 4 and query.shape[0] != sharding.batch:
        raise ArgumentError(f"query has a batch of {query.shape[0]}; sharding was made for batch={sharding.batch}")
    check_heads(query.shape[2], sharding.head_ranks)
    if torch.compiler.is_compiling():
        known = group is None and sharding.group is not None
        found = None if known else process_group(group)
        name = "" if found is None or found.size() == 1 else found.group_name
        rules = "" if mask is None else mask.spec()
        request = Request(rules, "", "", "", "", name).text()
        return Located((sharding.first_handle, None, None), request, sharding.crossing(mask), sharding.documents)
    if group is not None or sharding.group is None:
        sharding.bind(group)
    check_marks(sharding, query, key, value)
    return Located((sharding.handle(mask), None, None), "", sharding.crossing(mask), sharding.documents)


def _check_alone(
    cu_seqlens: Boundaries,
    query_cu_seqlens: Boundaries,
    seqlen: int | None,
    key_seqlen: int | None,
    partition: str | Partition | None,
    head_ranks: int | None,
    plan: str | None,
) -> None:
    given = {
        "cu_seqlens": cu_seqlens,
        "query_cu_seqlens": query_cu_seqlens,
        "seqlen": seqlen,
        "key_seqlen": key_seqlen,
        "partition": partition,
        "head_ranks": head_ranks,
        "plan": plan,
    }
    if beside := [name for name, x in given.items() if x is not None]:
        raise ArgumentError(f"{', '.join(beside)} beside sharding, which has them; pass the sharding alone")


def check_sharding(sharding: object) -> None:
    """Raise ArgumentError for what is neither a Sharding nor None."""
    if sharding is not None and not isinstance(sharding, Sharding):
        raise ArgumentError(f"sharding={sharding!r}; allowed are ringflash.Sharding and None")


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ArgumentError unless query (B, s, H, D), key (B, sk, Hk, D) and value (B, sk, Hk, Dv) go together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}; allowed is (batch, seqlen, heads, head_dim)")
        if tensor.shape[0] == 0:
            raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}; the batch must hold at least one sequence")
        if 0 in tensor.shape[2:]:
            raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}; allowed is at least one head and head_dim")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ArgumentError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}; make them agree"
            )
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(f"{name} is {tensor.dtype}; allowed are float16, bfloat16, float32 and float64")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ArgumentError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous")
    if key.shape[0] != query.shape[0] or value.shape[:3] != key.shape[:3] or key.shape[3] != query.shape[3]:
        raise ArgumentError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} do not go together; "
            "allowed are (B, s, H, D), (B, sk, Hk, D), (B, sk, Hk, Dv)"
        )
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ArgumentError(f"query has {query.shape[2]} heads, key {key.shape[2]}; the first must be a multiple")


def _check_numbers(softcap: float, dropout: float, scale: float | None) -> None:
    check_number("softcap", softcap, ", 0 or None for none")
    check_number("dropout", dropout, ", 0 or None for none")
    if scale is not None:
        check_number("scale", scale, ", or None for 1 / sqrt(head_dim)")
    if not 0 <= softcap < float("inf"):
        raise ArgumentError(f"softcap={softcap}; allowed are 0 for none, and positive numbers")
    if not 0 <= dropout < 1:
        raise ArgumentError(f"dropout={dropout}; allowed is 0 <= dropout < 1")
    if scale is not None and not 0 < scale < float("inf"):
        raise ArgumentError(f"scale={scale}; allowed are positive numbers, or None for 1 / sqrt(head_dim)")


def check_types(tensors: Mapping[str, object], others: Mapping[str, object] | None = None) -> None:
    """Raise ArgumentError, naming an argument, unless the first are tensors and the others tensors or None."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ArgumentError(f"{name} is {_kind(x)}; allowed is a tensor")
    for name, x in (others or {}).items():
        if x is not None and not isinstance(x, Tensor):
            raise ArgumentError(f"{name} is {_kind(x)}; allowed are a tensor and None")


def _kind(x: object) -> str:
    return "None" if x is None else f"a {type(x).__name__}"


def _check_transformations(tensors: tuple[Tensor | None, ...], others: tuple[object, ...]) -> None:
    if torch.compiler.is_compiling():
        return
    # Without this check torch takes the tangent of an operator that has no formula for it to be zero.
    if any([x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors]):
        raise UnsupportedError(NO_FORWARD_MODE)
    if mapped(*tensors, *others):  # the operator would refuse it too late for peers to be notified
        raise UnsupportedError(NO_VMAP)


def _seed(dropout: float, given: Tensor | None, query: Tensor) -> Tensor | None:
    if given is not None:
        if given.shape != (1,) or given.dtype != torch.int64 or given.device != query.device:
            raise ArgumentError(
                f"dropout_seed is {given.dtype} {tuple(given.shape)} on {given.device}; allowed is int64 (1,) on "
                f"{query.device}"
            )
        if not dropout:
            raise ArgumentError("dropout_seed is given, but dropout is 0")
        return given
    return torch.randint(2**62, (1,), device=query.device)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _check_boundaries(mask: Mask, cu_seqlens: Boundaries, query_cu_seqlens: Boundaries, ranks: int) -> None:
    if cu_seqlens is None:
        raise ArgumentError("query_cu_seqlens is given without cu_seqlens, the boundaries of the keys")
    for name, x in (("cu_seqlens", cu_seqlens), ("query_cu_seqlens", query_cu_seqlens)):
        if isinstance(x, Tensor) and (x.dtype not in (torch.int32, torch.int64) or x.dim() != 1):
            raise ArgumentError(f"{name} is {x.dtype} {tuple(x.shape)}; allowed is int32 or int64 (documents + 1,)")
        if on_a_device(x) and (ranks > 1 or mask.boundaries is not None):
            raise ArgumentError(f"{name} is on {x.device}; plans for {ranks} ranks are made on the CPU, pass it there")


def _boundaries(
    mask: Mask, cu_seqlens: Boundaries, query_cu_seqlens: Boundaries
) -> tuple[tuple[Numbers, Numbers | None] | None, Tensor | None, Tensor | None]:
    """Document boundaries of keys and of queries: as numbers or, one by one, as tensors, which may hold others later.

    As numbers if they are lists, which as tensors would be constants on the CPU in a compiled graph: CUDA graphs
    refuse those. And if the mask, which holds numbers, has boundaries of its own to intersect them with.
    """
    if cu_seqlens is None:
        return None, None, None
    given = {"cu_seqlens": cu_seqlens, "query_cu_seqlens": query_cu_seqlens}
    device = next((x.device for x in given.values() if isinstance(x, Tensor)), None)
    if mask.boundaries is not None or device is None:
        known: Any = tuple(None if x is None else integers(name, x) for name, x in given.items())
        return known, None, None
    keys, queries = (
        x if x is None or isinstance(x, Tensor) else torch.tensor(integers(name, x), device=device)
        for name, x in given.items()  # a list goes where the tensor beside it is
    )
    return None, keys, queries


def _documents(mask: Mask, known: tuple[Numbers, Numbers | None] | None) -> Mask:
    """Documents of the mask and of known boundaries, in a mask of nothing else."""
    if known is not None and mask.boundaries is None:
        return Mask(boundaries=known[0], query_boundaries=known[1])  # checked by the operator, as tensors are
    documents = Mask(boundaries=mask.boundaries, query_boundaries=mask.query_boundaries)
    return documents if known is None else documents & Mask.documents(*known)


def _check_slopes(slopes: Tensor, query: Tensor, located: Located) -> None:
    batch, _, heads, _ = query.shape
    allowed = {(heads,), (batch, heads), (batch if located.documents is None else located.documents, heads)}
    if tuple(slopes.shape) not in allowed or slopes.dtype != torch.float32 or slopes.device != query.device:
        raise ArgumentError(
            f"alibi_slopes is {slopes.dtype} {tuple(slopes.shape)} on {slopes.device}; allowed is float32 of "
            f"{' or '.join(map(str, sorted(allowed)))} on {query.device}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("alibi_slopes requires a gradient; there is none by slopes, pass alibi_slopes.detach()")


def _blocks(mask: Mask | None, query: Tensor, key: Tensor) -> tuple[Tensor, Mask]:
    """The layout of blocks that comes with a call, and its mask without it."""
    if mask is None:
        raise ArgumentError("mask=None, and the sharding's has a layout that comes with each call; pass it as a mask")
    blocks = mask.blocks_given
    if blocks is None:
        raise ArgumentError("mask: its layout of blocks is missing, as in Sharding.masks; pass it by Mask.blocks")
    if blocks.device != query.device:
        raise ArgumentError(f"mask: the layout of blocks is on {blocks.device}; allowed is the query's, {query.device}")
    if key.shape[2] % blocks.shape[0]:
        raise ArgumentError(
            f"mask: the layout of blocks is {tuple(blocks.shape)}; allowed are numbers of groups that divide the "
            f"{key.shape[2]} key heads"
        )
    return blocks, mask.planned()


def _visible_keys(key_padding_mask: Tensor, key: Tensor) -> Tensor:
    x = key_padding_mask
    if x.dtype != torch.bool or x.shape != key.shape[:2] or x.device != key.device:
        raise ArgumentError(
            f"key_padding_mask is {x.dtype} {tuple(x.shape)} on {x.device}; allowed is bool {tuple(key.shape[:2])} on "
            f"{key.device}, True for keys that may be seen"
        )
    return key_padding_mask.flatten().to(torch.uint8)


def _check_sinks(sinks: Tensor, query: Tensor) -> None:
    if sinks.shape != (query.shape[2],):
        raise ArgumentError(f"sinks has shape {tuple(sinks.shape)}; allowed is ({query.shape[2]},), one for each head")
    if not sinks.dtype.is_floating_point or sinks.device != query.device:
        raise ArgumentError(f"sinks is {sinks.dtype} on {sinks.device}; allowed are floats on {query.device}")
