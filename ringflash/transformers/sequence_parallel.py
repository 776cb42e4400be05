"""`SequenceParallel`: the tokens of each sequence of a Hugging Face batch lie on the ranks of a group.

A group stands for one device. What `shard` returns makes the mean over its ranks of the loss, and of the gradients,
what one device computes of the whole batch: DDP, FSDP and ZeRO take just that mean, over all ranks of a job.

Legend: B sequences; S tokens of one sequence over all ranks, s of them on this rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringflash.errors import ArgumentError
from ringflash.parallel.agreement.rounds import agreement, digest_of, refuse
from ringflash.parallel.mesh import ONE_DEVICE, Group
from ringflash.parallel.positions.partition import Partition, check_name
from ringflash.parallel.sharding import IGNORED_LABEL, Sharding, sharing_group
from ringflash.transformers.attention import alone
from ringflash.transformers.documents import Documents, documents_of
from ringflash.transformers.forward import Forward, fuse
from ringflash.transformers.models import check_shardable, layer_masks, predicts_next, pretrained_of, rotary_modules

DOCUMENT_KEYS = ("attention_mask", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keys of a batch that the sharding stands for once it is made."""

LOSS_KEYS = ("labels", "shift_labels", "num_items_in_batch")


class SequenceParallel:
    """Shards Hugging Face batches for a model whose attention is "ring".

    Args:
        model: a Transformers model, also inside of PEFT's, DDP's, FSDP's or torch.compile's wrappers. Its attention is
            "ring": `from_pretrained(..., attn_implementation="ring")`.
        group: a ProcessGroup or one-dimensional DeviceMesh over whose ranks each sequence is sharded. None is the
            default group if torch.distributed is initialised, and one device otherwise;
            `ringflash.parallel.mesh.ONE_DEVICE` for models that are sharded over data alone.
        partition: "zigzag", "contiguous", "balanced" (for the model's masks), or a `Partition` of one sequence.

    Raises:
        ArgumentError: a model that cannot be sharded, by the name of its layer.

    Example:
        >>> sequence = SequenceParallel(model, group=mesh["cp"])
        >>> loss = model(**sequence.shard(batch), use_cache=False).loss
        >>> loss.backward()
    """

    def __init__(self, model: nn.Module, group: Group = None, partition: str | Partition = "zigzag") -> None:
        check_name(partition)
        self._group = sharing_group(group)
        self._model = pretrained_of(model)
        if self.ranks > 1:
            check_shardable(self._model)
        self.partition = partition
        self._masks = layer_masks(self._model)
        self._scaled_rotary = any(rotary_modules(self._model))
        self._forward = Forward(self._model)

    @property
    def ranks(self) -> int:
        """How many ranks share a sequence."""
        return 1 if self._group is None else self._group.size()

    @property
    def group(self) -> Group:
        """The ranks that share a sequence."""
        return ONE_DEVICE if self._group is None else self._group

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch that all ranks of the group have whole, for `model(**sequence.shard(batch))`.

        Reads numbers of the batch on the host: where it is on a GPU, the host waits for it once.

        Args:
            batch: "input_ids" (B, S) or "inputs_embeds" (B, S, C); "labels" (B, S), not shifted, or "shift_labels";
                "attention_mask" (B, S) of 0 and 1; documents by "cu_seq_lens_q" and "cu_seq_lens_k", by "seq_idx"
                (B, S), or by "position_ids" (B, S) that restart; "num_items_in_batch", by which the sum over targets
                is divided, their number in this batch if absent. Other tensors (B, S, ...) are sharded alike, and what
                is no tensor is passed on.

        Returns:
            The same keys with this rank's tokens, (B, s, ...), without those that `sharding` stands for; "position_ids"
            counted over the whole sequence where none were given; "shift_labels" (B, s), the next token of the same
            document, -100 at its end and at padding; "num_items_in_batch" for the mean over ranks; "sharding".

        Raises:
            ArgumentError: entries that contradict each other or cannot be sharded.
            RankMismatchError: ranks of the group have different batches.
        """
        try:
            size, seqlen = _sizes(batch)
            documents = documents_of(batch, size, seqlen)
            sharding = Sharding(
                self._masks,
                batch=size,
                seqlen=seqlen,
                cu_seqlens=documents.cu_seqlens,
                group=self.group,
                partition=self.partition,
            )
            part = self._tokens(batch, sharding) | self._targets(batch, documents, sharding)
        except Exception as error:
            refuse(self.group, error)
            raise
        self._check_same(batch)
        if documents.scattered:
            assert documents.seen is not None
            part["key_padding_mask"] = sharding.shard(documents.seen, 1).to(part["position_ids"].device)
        if self._scaled_rotary:
            part["last_position"] = _position_ids(batch).amax().reshape(1)
        return part | {"sharding": sharding}

    def reported(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch, the same on all ranks of the group, for logs: the mean of what each computed."""
        loss = loss.detach().clone()
        if self._group is not None:
            dist.all_reduce(loss, group=self._group)
        return loss / self.ranks

    def alone(self) -> AbstractContextManager[None]:
        """Every rank works for itself: for batches that are not sharded, to evaluate and to generate."""
        return alone()

    def fuse_loss(self) -> None:
        """Compute the loss inside of `model.forward` without the logits, which then never exist as a whole.

        Call it before the model is wrapped for training. Where the model is given labels, its output has no logits.

        Raises:
            ArgumentError: the model's output head is none that this is known of.
        """
        fuse(self._model, self._forward)

    def _tokens(self, batch: Mapping[str, Any], sharding: Sharding) -> dict[str, Any]:
        """This rank's part of everything that goes by tokens, but for labels."""
        part: dict[str, Any] = {"position_ids": sharding.shard(_position_ids(batch), -1)}
        whole = sharding.batch, sharding.seqlen
        for name, x in batch.items():
            if name in DOCUMENT_KEYS or name in LOSS_KEYS or name in part:
                continue
            if isinstance(x, Tensor) and x.dim() > 0:
                if tuple(x.shape[:2]) != whole:
                    raise ArgumentError(
                        f"{name} is {tuple(x.shape)}; allowed are tensors of {whole}, (batch, seqlen, ...). What is no "
                        "token, as pixel_values are, goes into inputs_embeds first"
                    )
                x = sharding.shard(x, 1)
            part[name] = x
        return part

    def _targets(self, batch: Mapping[str, Any], documents: Documents, sharding: Sharding) -> dict[str, Any]:
        """This rank's labels, and by what its loss is to be divided."""
        labels, shifted = batch.get("labels"), batch.get("shift_labels")
        name, given = ("labels", labels) if shifted is None else ("shift_labels", shifted)
        if given is None:
            return {}
        if tuple(given.shape) != (sharding.batch, sharding.seqlen):
            raise ArgumentError(
                f"{name} is {tuple(given.shape)}; allowed is {(sharding.batch, sharding.seqlen)}, (batch, seqlen)"
            )
        hidden = None if documents.seen is None else ~documents.seen.to(given.device) & (given != IGNORED_LABEL)
        if name == "labels" and hidden is not None and bool(hidden.any()):
            raise ArgumentError(
                f"labels has {int(hidden.sum())} targets at tokens that attention_mask hides; set them to "
                f"{IGNORED_LABEL}, as data collators do"
            )
        shift = shifted is None and predicts_next(self._model)
        whole = sharding.shifted_labels(given) if shift else given
        items = batch.get("num_items_in_batch")
        items = (whole != IGNORED_LABEL).sum().clamp(min=1) if items is None else torch.as_tensor(items)
        part = {"labels": sharding.shard(given, 1), "num_items_in_batch": items.to(given.device).double() / self.ranks}
        return part | {"shift_labels": sharding.shard(whole, 1)} if whole is not labels else part

    def _check_same(self, batch: Mapping[str, Any]) -> None:
        """Raise RankMismatchError on all ranks unless they have the same batch."""
        if self._group is None:
            return
        held = {name: _fingerprint(x) for name, x in batch.items()}
        device = next(x.device for x in batch.values() if isinstance(x, Tensor))
        agreement(self._group).check(
            digest_of(("batch", sorted(held.items()))), lambda: {"batch": sorted(held)} | held, device
        )


def _sizes(batch: Mapping[str, Any]) -> tuple[int, int]:
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
        x = batch.get(name)
        if x is not None:
            if not isinstance(x, Tensor) or x.dim() != dims:
                shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ArgumentError(f"{name} is {shape}; allowed is a tensor (batch, seqlen{', hidden' * (dims > 2)})")
            return x.shape[0], x.shape[1]
    raise ArgumentError(f"batch has {sorted(batch)}; input_ids or inputs_embeds is missing")


def _position_ids(batch: Mapping[str, Any]) -> Tensor:
    given = batch.get("position_ids")
    if given is not None:
        return given
    x = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    return torch.arange(x.shape[1], device=x.device)[None]


def _fingerprint(x: object) -> str:
    """What tells entries of batches apart: all of integers, and of others what they look like."""
    if not isinstance(x, Tensor):
        return repr(x)[:100]
    text = f"{x.dtype} {tuple(x.shape)}"
    if x.is_floating_point() or x.is_complex():
        return text
    values = x.detach().cpu().contiguous().view(torch.uint8).numpy()
    return f"{text} {hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()}"
