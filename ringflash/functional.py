"""`attention`: the one function under every front, with every feature, on one device or on many.

Legend: B sequences; S query and Sk key tokens of one sequence over all ranks, s and sk of them on this rank; H query
heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ringflash.errors import ArgumentError, UnsupportedError
from ringflash.kernels.kept import Kept, metadata
from ringflash.parallel.agreement.agreement import tell_peers
from ringflash.parallel.execution.operators import NO_FORWARD_MODE, NO_VMAP, call_attention, mapped
from ringflash.parallel.mesh import Group, group_rank, group_size, process_group
from ringflash.parallel.positions.integers import integers
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, check_name, resolve
from ringflash.parallel.positions.segments import count, intersect

Boundaries = Sequence[int] | Tensor | None
Numbers = tuple[int, ...]


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
    partition: str | Partition = "zigzag",
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
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
        group: a ProcessGroup or one-dimensional DeviceMesh over whose ranks each sequence is dealt. None is the default
            group if torch.distributed is initialised, and one device otherwise; `ringflash.parallel.mesh.ONE_DEVICE`
            never communicates.
        partition: how tokens are dealt; see `ringflash.shard`.
        scale: factor of the scores before the softmax; 1 / sqrt(D) if None.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        alibi_slopes: fp32 (H,), or (B, H), or (documents, H) with cu_seqlens; slope * distance is taken from a score.
            There is no gradient by them.
        dropout: probability of dropping a pair.
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
    try:
        query, key, value = _autocast(query, key, value)
        others = {
            "alibi_slopes": alibi_slopes,
            "dropout_seed": dropout_seed,
            "key_padding_mask": key_padding_mask,
            "sinks": sinks,
        }
        _check_tensors_or_none(others)
        _check_transformations((query, key, value, alibi_slopes), (cu_seqlens, query_cu_seqlens, *others.values()))
        found = process_group(group)
        ranks, name = (1, "") if found is None else (found.size(), found.group_name)
        numbers = seqlen, key_seqlen, ranks, name, partition, scale, softcap, dropout, kernel, deterministic
        settings_of = _settings if torch.compiler.is_compiling() else _settings_once
        mask, rules, *settings = settings_of(query, key, value, mask, *numbers)
        known, boundaries, query_boundaries = None, None, None
        if cu_seqlens is not None or query_cu_seqlens is not None:
            known, boundaries, query_boundaries = _boundaries(mask, cu_seqlens, query_cu_seqlens, ranks)
        documents_of = _documents if torch.compiler.is_compiling() else _documents_once
        documents, text = documents_of(mask, known)
        arguments = (
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            boundaries,
            query_boundaries,
            None
            if alibi_slopes is None
            else _slopes_of_rows(
                alibi_slopes, query, mask, documents, boundaries, query_boundaries, settings[3], group, partition
            ),
            _seed(dropout, dropout_seed, query),
            _visible_keys(key_padding_mask, key),
            rules,
            text,
            *settings,
            sinks is not None,
        )
        if sinks is not None:
            _check_sinks(sinks, query)
    except Exception as error:
        tell_peers(group, error)
        raise
    out, lse, _ = call_attention(*arguments)
    (batch, tokens), heads = query.shape[:2], query.shape[2]
    out = out.view(batch, tokens, heads, value.shape[3])
    lse = lse.view(heads, batch, tokens).transpose(0, 1)
    return (out, lse) if sinks is None else _with_sinks(out, lse, sinks)


_plans = Kept()
"""What `_settings` gave, by what it was asked for."""


def _settings_once(query: Tensor, key: Tensor, value: Tensor, *others: object) -> tuple:
    """`_settings`, worked out anew only for calls of another form."""
    call = (metadata(query), metadata(key), metadata(value), others)
    try:
        found = _plans.get(call)
    except TypeError:  # not hashable: sizes that are symbols, or arguments that are refused
        return _settings(query, key, value, *others)
    return found or _plans.add(call, _settings(query, key, value, *others))


def _settings(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    seqlen: int | None,
    key_seqlen: int | None,
    ranks: int,
    name: str,
    partition: str | Partition,
    scale: float | None,
    softcap: float,
    dropout: float,
    kernel: str,
    deterministic: bool,
) -> tuple:
    """The mask, and the settings but the documents (`ringflash.parallel.execution.call.Call`), checked."""
    check_tensors(query, key, value)
    _check_numbers(softcap, dropout, scale)
    check_name(partition)
    mask = Mask.causal() if mask is None else mask
    if not isinstance(mask, Mask):
        raise ArgumentError(f"mask={mask!r}; allowed are ringflash.Mask, as Mask.causal(), and None for that")
    for what, length in (("seqlen", seqlen), ("key_seqlen", key_seqlen)):
        if isinstance(length, float | str | Tensor) or (length is not None and length < 0):
            raise ArgumentError(f"{what}={length}; allowed are integers from 0, or None")
    (batch, tokens, _, dim), key_tokens = query.shape, key.shape[1]
    seqlen = tokens * ranks if seqlen is None else seqlen
    key_seqlen = (seqlen if key_tokens == tokens else key_tokens * ranks) if key_seqlen is None else key_seqlen
    return (
        mask,
        mask.spec(documents=False),
        partition if isinstance(partition, str) else partition.spec(),
        name if ranks > 1 else "",
        batch,
        seqlen,
        key_seqlen,
        dim**-0.5 if scale is None else scale,
        float(softcap),
        float(dropout),
        kernel,
        deterministic,
    )


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
    if not 0 <= softcap < float("inf"):
        raise ArgumentError(f"softcap={softcap}; allowed are 0 for none, and positive numbers")
    if not 0 <= dropout < 1:
        raise ArgumentError(f"dropout={dropout}; allowed is 0 <= dropout < 1")
    if scale is not None and not 0 < scale < float("inf"):
        raise ArgumentError(f"scale={scale}; allowed are positive numbers, or None for 1 / sqrt(head_dim)")


def _check_tensors_or_none(given: dict[str, object]) -> None:
    for name, x in given.items():
        if x is not None and not isinstance(x, Tensor):
            raise ArgumentError(f"{name} is a {type(x).__name__}; allowed are a tensor and None")


def _check_transformations(tensors: tuple[Tensor | None, ...], others: tuple[object, ...]) -> None:
    if torch.compiler.is_compiling():
        return
    # Without this check torch takes the tangent of an operator that has no formula for it to be zero.
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedError(NO_FORWARD_MODE)
    if mapped(*tensors, *others):  # the operator would refuse it too late for peers to be told
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
    return torch.randint(2**62, (1,), device=query.device) if dropout else None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _boundaries(
    mask: Mask, cu_seqlens: Boundaries, query_cu_seqlens: Boundaries, ranks: int
) -> tuple[tuple[Numbers, Numbers | None] | None, Tensor | None, Tensor | None]:
    """Document boundaries of keys and of queries: as numbers or, one by one, as tensors, which may hold others later.

    As numbers if they are lists, which as tensors would be constants on the CPU in a compiled graph: CUDA graphs
    refuse those. And if the mask, which holds numbers, has boundaries of its own to intersect them with.
    """
    if query_cu_seqlens is not None and cu_seqlens is None:
        raise ArgumentError("query_cu_seqlens is given without cu_seqlens, the boundaries of the keys")
    given = {"cu_seqlens": cu_seqlens, "query_cu_seqlens": query_cu_seqlens}
    for name, x in given.items():
        if isinstance(x, Tensor) and (x.dtype not in (torch.int32, torch.int64) or x.dim() != 1):
            raise ArgumentError(f"{name} is {x.dtype} {tuple(x.shape)}; allowed is int32 or int64 (documents + 1,)")
        if isinstance(x, Tensor) and x.device.type != "cpu" and (ranks > 1 or mask.boundaries is not None):
            raise ArgumentError(f"{name} is on {x.device}; plans for {ranks} ranks are made on the CPU, pass it there")
    device = next((x.device for x in given.values() if isinstance(x, Tensor)), None)
    if mask.boundaries is not None or device is None:
        return tuple(None if x is None else integers(name, x) for name, x in given.items()), None, None
    return None, *(
        x if x is None or isinstance(x, Tensor) else torch.tensor(integers(name, x), device=device)
        for name, x in given.items()  # a list goes where the tensor beside it is
    )


def _documents(mask: Mask, known: tuple[Numbers, Numbers | None] | None) -> tuple[Mask, str]:
    """Documents of the mask and of known boundaries, in a mask of nothing else, and its text."""
    if known is not None and mask.boundaries is None:
        documents = Mask(boundaries=known[0], query_boundaries=known[1])  # checked by the operator, as tensors are
    else:
        documents = Mask(boundaries=mask.boundaries, query_boundaries=mask.query_boundaries)
        documents = documents if known is None else documents & Mask.documents(*known)
    return documents, documents.spec()


_documents_once = lru_cache(maxsize=256)(_documents)


def _slopes_of_rows(
    slopes: Tensor,
    query: Tensor,
    mask: Mask,
    documents: Mask,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    seqlen: int,
    group: Group,
    partition: str | Partition,
) -> Tensor:
    """The ALiBi slopes of each of this rank's rows, (B * s, H) fp32."""
    batch, tokens, heads, _ = query.shape
    own = boundaries if query_boundaries is None else query_boundaries
    if own is None:
        own = documents.query_boundaries or documents.boundaries
    documents_of_rows = batch if own is None else len(own) - 1
    allowed = {(heads,), (batch, heads), (documents_of_rows, heads)}
    if tuple(slopes.shape) not in allowed or slopes.dtype != torch.float32 or slopes.device != query.device:
        raise ArgumentError(
            f"alibi_slopes is {slopes.dtype} {tuple(slopes.shape)} on {slopes.device}; allowed is float32 of "
            f"{' or '.join(map(str, sorted(allowed)))} on {query.device}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("alibi_slopes requires a gradient; there is none by slopes, pass alibi_slopes.detach()")
    if slopes.dim() == 1:
        return slopes.expand(batch * tokens, heads)
    if slopes.shape[0] != documents_of_rows or own is None:
        return slopes.repeat_interleave(tokens, dim=0)
    ranks, rows = group_size(group), ((0, batch * tokens),)
    if ranks > 1:
        if partition == "balanced":  # the one that looks at the documents
            keys = documents.boundaries if boundaries is None else boundaries.tolist()
            mask = mask & Mask.documents(keys, own.tolist() if isinstance(own, Tensor) else own)
        rows = resolve(partition, seqlen, ranks, mask, batch).repeat(batch).segments[group_rank(group)]
    if not torch.compiler.is_compiling():
        own = torch.as_tensor(own, device=own.device if isinstance(own, Tensor) else slopes.device)
    if isinstance(own, Tensor):
        positions = torch.cat([torch.arange(start, stop, device=own.device) for start, stop in rows or ((0, 0),)])
        return slopes[(torch.searchsorted(own.long(), positions, right=True) - 1).to(slopes.device)]
    # From numbers alone: a tensor of them would be a constant of the CPU in compiled code, which CUDA graphs refuse.
    lengths = [count(intersect(rows, (document,))) for document in pairwise(own)]
    return torch.cat([x.expand(n, heads) for x, n in zip(slopes.unbind(), lengths, strict=True)])


def _visible_keys(key_padding_mask: Tensor | None, key: Tensor) -> Tensor | None:
    if key_padding_mask is None:
        return None
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


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One more logit per head in the softmax: rows shrink by their share of the sum, exp(lse - lse with sink)."""
    sink = sinks.float()[None, :, None]
    nothing = torch.isneginf(lse) & torch.isneginf(sink)
    sink = sink.clamp(min=torch.finfo(torch.float32).min)  # finite: the difference of two infinities is nan
    share = torch.sigmoid(lse - sink).transpose(1, 2)[..., None]
    return (out.float() * share).to(out.dtype), torch.logaddexp(lse, sink).masked_fill(nothing, -torch.inf)
