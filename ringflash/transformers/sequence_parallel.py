"""`SequenceParallel`: the tokens of each sequence of a Hugging Face batch lie on the ranks of a group.

A group stands for one device. What `shard` returns makes the mean over its ranks of the loss, and of the gradients,
what one device computes of the whole batch: DDP, FSDP and ZeRO take just that mean, over all ranks of a job.

Legend: B sequences; S tokens of one sequence over all ranks, s of them on this rank.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ringflash.deepspeed import check_mean
from ringflash.errors import ArgumentError
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.lookup import Shardings
from ringflash.parallel.mesh import ONE_DEVICE, Group
from ringflash.parallel.planning.heads import check_head_ranks
from ringflash.parallel.positions.balance import token_work
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, check_name
from ringflash.parallel.sharding import IGNORED_LABEL, Sharding
from ringflash.parallel.sharding_arguments import sharing_group
from ringflash.parallel.transport.select import check_all_alike
from ringflash.transformers.at_work import alone
from ringflash.transformers.batches import fingerprints, position_ids_of, shard_targets, shard_tokens, sizes_of
from ringflash.transformers.documents import Documents, documents_of
from ringflash.transformers.encoder_decoder import cross_sharding, join, mark_cross_attention, split
from ringflash.transformers.forward import forward_of, fuse
from ringflash.transformers.loaders import share_batches
from ringflash.transformers.masks import layer_masks
from ringflash.transformers.models import (
    check_shardable,
    is_causal,
    position_of_padding,
    predicts_next,
    pretrained_of,
    rotary_modules,
    scales_by_place,
)

SHARDINGS_BYTES = 64 * 2**20
"""What shardings that are kept for batches alike may come to; one is kept in any case."""


class SequenceParallel:
    """Shards Hugging Face batches for a model whose attention is "ring".

    Args:
        model: a Transformers model, also inside of PEFT's, DDP's, FSDP's or torch.compile's wrappers. Its attention is
            "ring": `from_pretrained(..., attn_implementation="ring")`.
        group: a ProcessGroup or one-dimensional DeviceMesh over whose ranks each sequence is sharded. None is the
            default group if torch.distributed is initialised, and one device otherwise;
            `ringflash.parallel.mesh.ONE_DEVICE` for models that are sharded over data alone.
        partition: "zigzag", "contiguous", "balanced" (equally long for the model's masks and width), or a `Partition`
            of one sequence. None is "balanced" for one sequence of several packed documents, and "zigzag" for all else.
        head_ranks: how many ranks that follow each other exchange heads for tokens inside of attention; see
            `ringflash.Sharding`. The model's query heads are a multiple of it. None is what is predicted to be
            fastest, and for contiguous shares, of which the last of a causal sequence is the most work, as many as
            ranks and query heads allow.

    Raises:
        ArgumentError: a model that cannot be sharded, by the name of its layer.

    Example:
        >>> sequence = SequenceParallel(model, group=mesh["cp"])
        >>> loss = model(**sequence.shard(batch), use_cache=False).loss
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group = None,
        partition: str | Partition | None = None,
        head_ranks: int | None = None,
    ) -> None:
        if partition is not None:
            check_name(partition)
        self._group = sharing_group(group)
        self._model = pretrained_of(model)
        self.head_ranks = self._default_head_ranks(partition) if head_ranks is None else head_ranks
        if self.head_ranks is not None:
            check_head_ranks(self.head_ranks, self.ranks)
        if self.ranks > 1:
            check_shardable(self._model)
        self.partition = partition
        self._masks = layer_masks(self._model.config.get_text_config(), causal=is_causal(self._model))
        if self._model.config.is_encoder_decoder:
            mark_cross_attention(self._model)
            # Cross attention has the queries of one side and the keys of the other, sharded in one way.
            self.partition = "zigzag" if partition is None else partition
            sides = ({"encoder": True}, False), ({"decoder": True}, True)
            self._pair_masks = [
                layer_masks(self._model.config.get_text_config(**side), causal) for side, causal in sides
            ]
        self._position_of_padding = position_of_padding(self._model)
        self._scales_by_place = scales_by_place(self._model)
        self._scaled_rotary = any(rotary_modules(self._model))
        self._forward = forward_of(self._model)
        self._shardings, self._finding = Shardings(SHARDINGS_BYTES), threading.Lock()

    def _default_head_ranks(self, partition: str | Partition | None) -> int | None:
        heads = getattr(self._model.config.get_text_config(), "num_attention_heads", 1)
        return math.gcd(self.ranks, heads) if partition == "contiguous" and is_causal(self._model) else None

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
            counted over the whole sequence, as the model does, where none were given; "shift_labels" (B, s), the next
            token of the same document, -100 at its end and at padding; "num_items_in_batch", a number, for the mean
            over ranks; and "sharding".

        Raises:
            ArgumentError: entries that contradict each other or cannot be sharded, or DeepSpeed was given an `mpu` or
                a mesh with which it would not take the mean of gradients over all ranks.
            RankMismatchError: ranks of the group have different batches.
        """
        try:
            if self._group is not None:
                check_mean(self._group)
            part = self.shard_alike(batch)
        except Exception as error:
            refuse(self.group, error)
            raise
        self._check_same(batch)
        return part

    def shard_alike(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`shard` without a word to the other ranks, for threads beside the step; who calls it makes batches alike.

        Args:
            batch: as `shard` takes it, and known to be the same on all ranks of the group.

        Returns:
            What `shard` returns.
        """
        return self._pair(batch) if self._model.config.is_encoder_decoder else self._part(batch, self._masks)[0]

    def _part(self, batch: Mapping[str, Any], masks: Mapping[Mask, int]) -> tuple[dict[str, Any], Documents]:
        """This rank's part of one sequence of tokens, and its documents."""
        size, seqlen = sizes_of(batch)
        documents = documents_of(batch, size, seqlen)
        sharding = self._sharding(masks, size, seqlen, documents.cu_seqlens)
        if 0 in (counts := sharding.partition.counts()):
            raise ArgumentError(
                f"a sequence of {seqlen} tokens leaves rank {counts.index(0)} of {self.ranks} without any; pad it, as "
                f"by a data collator's pad_to_multiple_of={2 * self.ranks}"
            )
        position_ids = position_ids_of(batch, self._position_of_padding)
        part = shard_tokens(batch, position_ids, sharding)
        part |= shard_targets(batch, documents, sharding, predicts_next(self._model))
        if documents.scattered:
            assert documents.seen is not None
            part["key_padding_mask"] = sharding.shard(documents.seen, 1).to(part["position_ids"].device)
        if self._scales_by_place:
            part["row_positions"] = sharding.partition.positions(sharding.rank).to(part["position_ids"].device)
        if self._scaled_rotary:
            part["last_position"] = position_ids.amax().reshape(1)
        return part | {"sharding": sharding}, documents

    def _sharding(self, masks: Mapping[Mask, int], size: int, seqlen: int, cu_seqlens: Tensor | None) -> Sharding:
        """One for batches alike, which most are whose sequences are filled up or cut."""
        edges = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
        alike = tuple(masks.items()), size, seqlen, edges, self.partition, self.head_ranks
        with self._finding:  # batches may be made in several threads, see `shard_alike`
            found = self._shardings.get(alike)
            if found is None:
                found = Sharding(
                    masks,
                    batch=size,
                    seqlen=seqlen,
                    cu_seqlens=cu_seqlens,
                    group=self.group,
                    partition=self.partition,
                    head_ranks=self.head_ranks,
                    token_work=token_work(self._model.config.get_text_config().hidden_size),
                )
                self._shardings.add(alike, found)
        return found

    def _pair(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of the tokens of an encoder and of a decoder."""
        batches = split(self._model, batch)
        (encoder, documents), (decoder, _) = (
            self._part(each, masks) for each, masks in zip(batches, self._pair_masks, strict=True)
        )
        if documents.scattered or self._scaled_rotary:
            raise ArgumentError(
                "an encoder and a decoder with padding between tokens, or with rotary frequencies that depend on the "
                "longest sequence, are not sharded"
            )
        shardings = encoder["sharding"], decoder["sharding"]
        return join(encoder, decoder, cross_sharding(*shardings, documents, self.group, self.partition))

    def count_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """How many targets a whole batch has: their sum over the batches of a step is "num_items_in_batch".

        Args:
            batch: as `shard` takes it.

        Returns:
            A number, int64; 0 without labels.

        Raises:
            ArgumentError: entries that contradict each other.
        """
        if self._model.config.is_encoder_decoder:
            batch = split(self._model, batch)[1]
        size, seqlen = sizes_of(batch)
        documents = documents_of(batch, size, seqlen)
        whole = Sharding(batch=size, seqlen=seqlen, cu_seqlens=documents.cu_seqlens, group=ONE_DEVICE)
        part = shard_targets(batch, documents, whole, predicts_next(self._model))
        targets = part.get("shift_labels", part.get("labels"))
        return torch.tensor(0) if targets is None else (targets != IGNORED_LABEL).sum()

    def reported(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch, the same on all ranks of the group, for logs: the mean of what each computed."""
        loss = loss.detach().clone()
        if self._group is not None:
            dist.all_reduce(loss, group=self._group)
        return loss / self.ranks

    def alone(self) -> AbstractContextManager[None]:
        """Every rank works for itself: for batches that are not sharded, to evaluate and to generate."""
        return alone()

    def share_batches(self, accelerator: Accelerator) -> None:
        """Let `accelerator.prepare(loader)` give all ranks of the group one batch, and each group another.

        Call it before loaders are prepared. `accelerator.gather_for_metrics` then counts each sample once.

        Args:
            accelerator: of this process.

        Raises:
            ArgumentError: the group is not of consecutive ranks, or `dispatch_batches` is True.
        """
        share_batches(accelerator, self._group)

    def fuse_loss(self) -> None:
        """Compute the loss inside of `model.forward` without the logits, which then never exist as a whole.

        Call it before the model is wrapped for training. Where the model is given labels, its output has no logits.

        Raises:
            ArgumentError: the model's output head is none that this is known of.
        """
        fuse(self._model, self._forward)

    @torch.no_grad()
    def token_losses(self, part: Mapping[str, Any]) -> Tensor:
        """Cross entropy (B, s) fp32 of each of this rank's tokens, 0 where it has no target; `fuse_loss` comes first.

        Args:
            part: what `shard` returned of a batch with labels.
        """
        if not self._forward.fused or part.get("labels") is None:
            raise ArgumentError("token_losses: call fuse_loss() before it, and shard a batch with labels")
        self._forward.each_token = True
        try:
            losses: Any = self._model(**part, use_cache=False)
        finally:
            self._forward.each_token = False
        return losses

    def _check_same(self, batch: Mapping[str, Any]) -> None:
        """Raise RankMismatchError on all ranks unless they have the same batch."""
        if self._group is None:
            return
        held = fingerprints(batch)
        device = next(x.device for x in batch.values() if isinstance(x, Tensor))
        check_all_alike(self._group, "batch", {"batch": list(held)} | held, device)
