"""The useful operations of a training step: those that its result asks for, however it is computed.

They are what MFU counts (Chowdhery et al., arXiv 2204.02311, appendix B). A token and a weight that it is multiplied
by are 2 operations forward, 2 for the gradient of the token, and 2 for that of the weight where it is trained: 6, or 4
of a weight that stays as it is, as those under adapters do (of the first layer too, whose input then wants none).
A query and a key that it sees are 2 for each element of the query and of the value, over all heads, and twice as many
backward; pairs that a mask hides are none. Of experts those count that a token is sent to.

Not counted are what is computed again (blocks, and the scores in attention's own backward pass), looking up embeddings,
and what is no product: norms, rotary embeddings, the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ringflash.training.model.decoder import Decoder


@dataclass(frozen=True)
class Operations:
    """Of a step, forward and backward.

    Attributes:
        token: for each token.
        pair: for each pair of a query and a key that it sees, over all layers.
    """

    token: float
    pair: float

    def of(self, tokens: float, pairs: float) -> float:
        """For so many tokens, and pairs in a layer, on average over the layers."""
        return self.token * tokens + self.pair * pairs


def operations_of(model: Decoder) -> Operations | None:
    """Of a model that no engine has divided; None for one of which nobody here knows what a token is multiplied by."""
    width, share = model.attention_width(), model.experts_share()
    token = 0.0
    for name, weight in _multiplied(model).items():
        expert = ".experts." in name
        if (expert and share is None) or weight.dim() > (3 if expert else 2):
            return None
        used = weight.numel() * (share if expert and share is not None else 1)
        token += (6 if weight.requires_grad else 4) * used
    return None if width is None else Operations(token, 6.0 * width)


def _multiplied(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that tokens are multiplied by, each once: an embedding is looked up, unless it is the head as well."""
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            own = module.named_parameters(prefix, recurse=False)
            found |= {weight: name for name, weight in own if weight.dim() > 1 and not name.endswith("bias")}
    return {name: weight for weight, name in found.items()}
