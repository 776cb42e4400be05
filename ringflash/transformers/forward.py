"""What a model's forward pass is told of its batch, and what is done within it, by hooks and its loss function.

A forward pass computes its loss by `model.loss_function`, whatever its class. There a rank's share of the loss is
taken, and a model that computes its loss elsewhere is found out and refused. `fuse` lets the output head compute the
loss itself, in chunks, while its weight is there: FSDP and ZeRO gather a head's weight for its own forward pass only.

Legend: B sequences; s tokens of one sequence on this rank; C hidden size; V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.utils import ModelOutput

from ringflash.errors import ArgumentError
from ringflash.loss import cross_entropy, cross_entropy_sum
from ringflash.parallel.sharding import IGNORED_LABEL
from ringflash.transformers.at_work import at_work
from ringflash.transformers.models import ROUTER_LOSS, predicts_next, rotary_modules

FORWARD = "ringflash_forward"
"""Attribute of a model that holds its `Forward`."""

PROBED = 4
"""Tokens whose logits the model is given in place of all, to see what it makes of them before its loss."""


@dataclass
class _Call:
    """One forward pass.

    Attributes:
        sharded: the batch lies on several ranks.
        last_position: (1,) largest position of the whole batch, for rotary frequencies that depend on it.
        targets: (B, s) labels of the fused loss; None where there is none to compute.
        items: by how many targets the fused loss is divided; those of this call if None.
        loss: what the fused head computed.
        losses: (B, s) the same of each token, where they are asked for.
        probe: logits of a few tokens that it returned.
        counted: whether the loss function has run.
        part: the model within the model that was called in its place.
    """

    sharded: bool = False
    last_position: Tensor | None = None
    targets: Tensor | None = None
    items: Tensor | float | None = None
    loss: Tensor | None = None
    losses: Tensor | None = None
    probe: Tensor | None = None
    counted: bool = False
    part: nn.Module | None = None


class Forward:
    """The forward passes of one model.

    Args:
        model: gets its hooks and its loss function.

    Attributes:
        call: the pass at work; an empty one between passes.
        fused: the output head computes the loss.
        each_token: the fused loss is asked for of each token, and without a gradient.
        loss_function: what the model computes its loss by.
        scale: factor of the logits that the model's configuration names.
        softcap: their bound, likewise; 0 for none.
        probed: what the model makes of its logits has been compared with that.
        logits_at_once: of the fused loss, see `ringflash.loss.cross_entropy_sum`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.call = _Call()
        self.fused = self.probed = self.each_token = False
        self.logits_at_once: int | None = None
        config = model.config.get_text_config()
        self.scale = float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))
        self.softcap = float(getattr(config, "final_logit_softcapping", None) or 0)
        self.predicts_next = predicts_next(model)
        self.loss_function = model.loss_function
        model.loss_function = functools.partial(_loss, self, self.loss_function)
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._finish, with_kwargs=True)
        model.register_forward_hook(_leave, always_call=True)
        rotary = list(rotary_modules(model))
        for part in model.modules() if rotary else ():
            if isinstance(part, PreTrainedModel) and part is not model:
                part.register_forward_pre_hook(self._begin_part, with_kwargs=True)
                part.register_forward_hook(self._finish_part, always_call=True)
        for module in rotary:
            module.register_forward_pre_hook(self._with_last_position, with_kwargs=True)
            module.register_forward_hook(self._without_last_position)

    def _begin(self, model: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        sharding = named.get("sharding")
        sharded = sharding is not None and sharding.ranks > 1
        at_work.sharding = None if named.get("encoder_sharding") is not None else sharding
        self.call = _Call(sharded, named.pop("last_position", None))
        if sharded and named.get("output_router_logits"):
            raise ArgumentError(ROUTER_LOSS.format("leave it out of the call"))
        keep = named.get("logits_to_keep")
        if sharded and (isinstance(keep, Tensor) or keep):
            raise ArgumentError(
                f"logits_to_keep={keep}: each rank would keep some of its own tokens; pass 0, and choose from "
                "sharding.unshard(logits, 1)"
            )
        if self.fused and named.get("labels") is not None:
            _check_head(model)
            self.call.targets, self.call.items = _targets(self, named), named.get("num_items_in_batch")
        return arguments, named

    def _finish(self, model: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> Any:
        call, self.call = self.call, _Call()
        if call.sharded and named.get("labels") is not None and not call.counted:
            raise ArgumentError(
                f"labels: {type(model).__name__} computes its loss itself, of each rank's tokens alone; pass no labels "
                "and take the loss of its logits, divided by the number of targets on all ranks. A loss_function of "
                "one's own is set before SequenceParallel is made"
            )
        if call.sharded and call.loss is None:
            _check_each_token(model, named, output)
        if call.losses is not None:
            return call.losses
        return output if call.loss is None else _without_logits(output)

    # Rotary frequencies that depend on the longest sequence are worked out from the largest position that they see. A
    # model without its head may be called itself.

    def _begin_part(self, part: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if named.get("last_position") is not None:
            self.call = _Call(last_position=named.pop("last_position"), part=part)
        return arguments, named

    def _finish_part(self, part: nn.Module, arguments: tuple, output: Any) -> None:
        if self.call.part is part:
            self.call = _Call()

    def _with_last_position(
        self, module: nn.Module, arguments: tuple, named: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if self.call.last_position is None:
            return arguments, named
        named = dict(zip(("x", "position_ids"), arguments, strict=False)) | named
        ids = named["position_ids"]
        last = self.call.last_position.to(ids).expand(*ids.shape[:-1], 1)
        return (), named | {"position_ids": torch.cat([ids, last], -1)}

    def _without_last_position(self, module: nn.Module, arguments: tuple, output: Any) -> Any:
        return output if self.call.last_position is None else tuple(x[..., :-1, :] for x in output)


def _leave(model: nn.Module, arguments: tuple, output: Any) -> None:
    at_work.sharding = None  # also where the pass ended in an error


def forward_of(model: PreTrainedModel) -> Forward:
    """The `Forward` of a model: one, however often it is asked for."""
    found = getattr(model, FORWARD, None)
    if found is None:
        found = Forward(model)
        setattr(model, FORWARD, found)
    return found


def _loss(
    forward: Forward, loss_function: Any, logits: Tensor, labels: Tensor, *arguments: Any, **named: Any
) -> Tensor:
    """`model.loss_function`; arguments are those of Transformers'."""
    call = forward.call
    call.counted = True
    if call.loss is not None:
        _check_probe(forward, logits)
        return _After.apply(call.loss, logits)
    if call.sharded and named.get("num_items_in_batch") is None:
        raise ArgumentError(
            "labels: the model does not hand num_items_in_batch to its loss, which would be the mean over each rank's "
            "tokens; pass no labels and take the loss of its logits, divided by the number of targets on all ranks"
        )
    return loss_function(logits, labels, *arguments, **named)


# The fused loss


def fuse(model: PreTrainedModel, forward: Forward) -> None:
    """Let the output head compute the loss in chunks where the model is given labels.

    Raises:
        ArgumentError: the head is none that this is known of, or the loss is another one than cross entropy.
    """
    if forward.loss_function not in (ForCausalLMLoss, ForMaskedLMLoss):
        name = getattr(forward.loss_function, "__name__", repr(forward.loss_function))
        raise ArgumentError(
            f"fuse_loss: {type(model).__name__} has loss_function {name}; allowed are ForCausalLMLoss and "
            "ForMaskedLMLoss, which are cross entropy"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ArgumentError(f"the output head of {type(model).__name__} is {type(head).__name__}; allowed is nn.Linear")
    if forward.fused:
        return
    forward.fused = True
    head.forward = functools.partial(_fused_head, forward, head, head.forward)


def _fused_head(forward: Forward, head: nn.Linear, logits_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The head's forward pass: the loss where there are targets, and the logits of a few tokens in place of all."""
    call = forward.call
    if call.targets is None:
        return logits_of(x)
    if x.shape[:2] != call.targets.shape:
        raise ArgumentError(f"logits_to_keep leaves {tuple(x.shape[:2])} of {tuple(call.targets.shape)} tokens; pass 0")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rest = head.weight, call.targets.flatten(), head.bias, forward.scale, forward.softcap
    if forward.each_token:
        call.losses = cross_entropy(x.flatten(0, 1), *rest).view(call.targets.shape)
        total = call.losses.sum()
    else:
        total = cross_entropy_sum(x.flatten(0, 1), *rest, forward.logits_at_once)
    items = (call.targets != IGNORED_LABEL).sum() if call.items is None else call.items
    call.loss = total / (
        items.to(total.device) if isinstance(items, Tensor) else items
    )  # copied, it would be waited for
    with torch.no_grad():
        call.probe = logits_of(x[:, :PROBED])
    return _After.apply(call.probe, call.loss)


class _After(torch.autograd.Function):
    """A tensor as it is, whose backward pass goes by way of another one, with a gradient of zero.

    The loss goes by way of the logits, and they by way of the loss of the head. So the backward pass comes through the
    head's output, where FSDP and ZeRO wait for it, before the gradient of the head's weight is taken.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        (other,) = ctx.saved_tensors
        return dx, torch.zeros_like(other)


def _check_head(model: Any) -> None:
    head = model.get_output_embeddings()
    if any(hasattr(head, name) for name in ("base_layer", "modules_to_save")):  # PEFT's wrappers
        raise ArgumentError(
            f"fuse_loss: the output head of {type(model).__name__} became a {type(head).__module__}."
            f"{type(head).__name__}; leave it out of PEFT's target_modules and modules_to_save, or leave fuse_loss out"
        )


def _check_probe(forward: Forward, logits: Tensor) -> None:
    """Raise ArgumentError if the model changes its logits, before its loss, by more than the fused loss knows of."""
    if forward.probed or torch.compiler.is_compiling() or forward.call.probe is None:
        return
    expected = forward.call.probe.float() * forward.scale
    expected = forward.softcap * (expected / forward.softcap).tanh() if forward.softcap else expected
    if not torch.allclose(logits.float(), expected, rtol=2e-2, atol=2e-2):
        raise ArgumentError(
            "fuse_loss: the model changes its logits before its loss by something other than a factor and a softcap "
            "that its configuration names; leave fuse_loss out"
        )
    forward.probed = True


def _check_each_token(model: nn.Module, named: dict[str, Any], output: Any) -> None:
    """Raise ArgumentError if an output is made of some of a rank's tokens, as if these were the whole sequence."""
    if not isinstance(output, ModelOutput):
        return
    logits, pooled = output.get("logits"), output.get("pooler_output")
    if isinstance(pooled, Tensor):
        raise ArgumentError(
            f"{type(model).__name__} pools each rank's tokens alone; load it with add_pooling_layer=False, and pool "
            "what sharding.unshard(last_hidden_state, 1) gives"
        )
    if isinstance(logits, Tensor) and logits.shape[1:2] != (named["sharding"].tokens,):
        raise ArgumentError(
            f"{type(model).__name__} makes logits {tuple(logits.shape)} of a rank's {named['sharding'].tokens} tokens; "
            "allowed are models with logits for each token"
        )


def _targets(forward: Forward, named: dict[str, Any]) -> Tensor:
    if (shifted := named.get("shift_labels")) is not None:
        return shifted
    labels = named["labels"]
    return nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:] if forward.predicts_next else labels


def _without_logits(output: Any) -> Any:
    if isinstance(output, ModelOutput):
        return type(output)(**{name: x for name, x in output.items() if name != "logits"})
    return (output[0], None, *output[2:])
