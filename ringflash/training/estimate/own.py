"""Sizes of the recipe's own model and of what a rank has of a batch, and the bytes of a device that grow with them.

Counted tensor by tensor, as `ringflash.training.model.transformer`, `memory.blocks` and `memory.rows` hold them.

Legend: T tokens of a rank, C hidden size, F width of the feed-forward, H heads, K key heads, D head width, V rows of
the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ringflash.configs.schema import Config, ModelConfig
from ringflash.errors import ArgumentError
from ringflash.loss import CHUNK_ELEMENTS
from ringflash.parallel.planning.cost import Shape
from ringflash.parallel.planning.query_rounds import size_of_rounds
from ringflash.parallel.planning.ring import PIECE
from ringflash.training.config.checks import SMALLEST_VOCABULARY
from ringflash.training.config.derived import vocabulary
from ringflash.training.estimate.lasting import FP32, weights_of
from ringflash.training.estimate.operations import operations_of
from ringflash.training.estimate.sizes import Load, Sizes, Work, dtype_of, of_batch
from ringflash.training.memory.rows import TILE_ELEMENTS
from ringflash.training.model.shape import elements_again, head_dim, query_width
from ringflash.training.model.transformer import Transformer, attention_mask

AT_ONCE = 8
"""Tensors of a tile of the feed-forward that are there at once in its backward pass."""


@dataclass(frozen=True)
class OwnSizes(Sizes):
    """Sizes of the recipe's own model and of what a rank has of a batch; see Sizes.

    Attributes:
        model: its shape.
        weight: bytes of a weight as the model holds it.
    """

    model: ModelConfig
    weight: int

    @staticmethod
    def of(config: Config, gpus: int, vocab_size: int | None = None, load: Load | None = None) -> OwnSizes:
        """What a configuration says.

        Args:
            config: of a run with the recipe's own model.
            gpus: how many ranks.
            vocab_size: of the tokenizer; None: as data.tokenizer says.
            load: of the batch; None: each sequence is one document, and ranks have equally many tokens.

        Raises:
            ArgumentError: nobody knows the vocabulary.
        """
        model, dtype = config.model, dtype_of(config)
        rows = vocabulary(model, _tokens_of(config) if vocab_size is None else vocab_size)
        with torch.device("meta"):
            built = Transformer(model, rows, dtype=dtype)
        blocks, element = model.num_hidden_layers, dtype.itemsize
        of_the_batch: dict[str, Any] = of_batch(config, gpus, {attention_mask(config.attention): blocks}, load)
        return OwnSizes(
            weights=weights_of(built),
            blocks=blocks,
            element=element,
            operations=operations_of(built),
            model=model,
            weight=FP32 if config.engine.name == "ddp" else element,
            **of_the_batch,
        )

    @property
    def heads(self) -> Shape:
        """See Sizes."""
        model = self.model
        return Shape(model.num_attention_heads, model.num_key_value_heads, head_dim(model), self.element)

    @property
    def casts(self) -> bool:
        """See Sizes."""
        return False

    @property
    def queries(self) -> int:
        """See Sizes."""
        return self.rows if self.by_rows and self.alone else 0

    @property
    def query(self) -> int:
        """H D."""
        return query_width(self.model)

    @property
    def key(self) -> int:
        """K D."""
        return self.model.num_key_value_heads * head_dim(self.model)

    def kept(self, pairs: bool) -> float:
        """See Sizes."""
        stream = self.model.hidden_size / (2 if pairs else 1)
        return self.tokens * (self.element * (stream + self.query) + FP32 * self.model.num_attention_heads)

    @property
    def again(self) -> int:
        """See Sizes: outputs of norms, q, k, v, the stream between, gate and up."""
        return self.tokens * self.element * elements_again(self.model)

    @property
    def _projected(self) -> int:
        return self.query + 2 * self.key

    @property
    def rows(self) -> int:
        """Tokens of which blocks are computed again at a time where they go by rows, see `memory.by_rows`."""
        return size_of_rounds(self.tokens, self._most)

    @property
    def by_rows(self) -> bool:
        """Whether blocks are computed again by rows: in rounds, where a rank has whole sequences."""
        return self.mean > self._most

    @property
    def _most(self) -> int:
        return TILE_ELEMENTS["cuda"] // self.query

    def transient(self, plan_memory: float, moved: bool, pairs: bool = False) -> float:
        """See Sizes."""
        if self.by_rows:
            block = self._by_rows(plan_memory, moved, pairs)
        else:
            came_back = 2 * self.tokens * self.element * (self.model.hidden_size + self.query) if moved else 0
            again = self.tokens * self.element * (self.model.hidden_size + self._projected)  # a norm's output, q, k, v
            between = 2 * self.tokens * self.element * self.model.hidden_size  # the stream, and a norm's output
            block = came_back + again + max(self._attention(plan_memory), between + self._feed_forward)
        return max(self._loss, self._head_gradient + block)

    def transient_kept(self, plan_memory: float) -> float:
        """See Sizes."""
        return max(self._loss, self._head_gradient + max(self._attention(plan_memory), self._feed_forward))

    @property
    def _head_gradient(self) -> int:
        """What waits, of a head that is the embedding, for the embedding's own gradient behind all blocks."""
        return self.weight * self.weights.head if self.model.tie_word_embeddings else 0

    def _attention(self, plan_memory: float) -> float:
        """Its backward pass: gradients of stream, out, q, k, v, and what a plan has."""
        streams = self.tokens * self.element * (self.model.hidden_size + self.query)
        return streams + self._gradients + plan_memory

    @property
    def _gradients(self) -> float:
        """Of query, key and value of all tokens."""
        return self.aside(self._projected) + self.tokens * self.element * self._projected

    def _by_rows(self, plan_memory: float, moved: bool, pairs: bool) -> float:
        """A block's backward pass by rows: what is there of all tokens, then of some."""
        rows, stream = self.rows, self.model.hidden_size
        # Gradients of the output and the input, of pairs the input, and angles of positions.
        whole = self.tokens * (self.element * (3 if pairs else 2) * stream + FP32 * head_dim(self.model))
        came_back = self.element * 3 * stream if moved else 0  # one ahead, and the first of the block before
        # The stream and its norm with gradients, and the feed-forward; then gradients of the stream, a norm, query, key
        # and value, and their gradients.
        behind = rows * self.element * 4 * stream + AT_ONCE * self.element * self._tile(rows)
        before = rows * self.element * (2 * stream + 2 * self._projected)
        if self.alone:
            own, came = self._round(behind, before)
            came_back += came if moved else 0
        else:
            own = self._at_once(plan_memory, behind, before)
        return whole + own + rows * came_back + FP32 * self.weights.block

    def _round(self, behind: float, before: float) -> tuple[float, float]:
        """Where attention is in rounds: bytes beside what is alike, and what of a token comes back beside its input."""
        keys = self.tokens * (self.element + FP32) * 2 * self.key  # and their gradients
        # Out and its gradient, that of the query in fp32, and a part of those of all keys.
        attention = self.rows * (self.element * 2 * self.query + FP32 * self.query)
        attention += FP32 * 2 * self.key * min(PIECE, self.tokens)
        came_back = 2 * (self.element * self.query + FP32 * self.model.num_attention_heads)
        return keys + max(behind, before + attention), came_back

    def _at_once(self, plan_memory: float, behind: float, before: float) -> float:
        """Where attention is at once: query, key and value with out and its gradient, or with gradients of them all."""
        given, out = self.tokens * self.element * self._projected, 2 * self.tokens * self.element * self.query
        return max(given + out + max(behind, self._gradients + plan_memory), given + before)

    def _tile(self, rows: int) -> int:
        """Elements of one tensor of the feed-forward's tiles."""
        return min(TILE_ELEMENTS["cuda"], rows * self.model.intermediate_size)

    @property
    def _feed_forward(self) -> float:
        """Its backward pass: gradients of its output and input, a tile, and gradients of its weights."""
        model, tile = self.model, self._tile(self.tokens)
        streams = 2 * self.tokens * self.element * model.hidden_size
        return streams + AT_ONCE * self.element * tile + 3 * FP32 * model.hidden_size * model.intermediate_size

    @property
    def _loss(self) -> float:
        """Its forward pass: the last stream, its norm and its gradient, that of the head, and logits of a chunk."""
        streams = 3 * self.tokens * self.element * self.model.hidden_size
        logits = min(CHUNK_ELEMENTS["cuda"], self.tokens * self.weights.head // self.model.hidden_size)
        return streams + (FP32 + self.element) * self.weights.head + 3 * FP32 * logits

    def work(self, again: int, pairs: bool) -> Work:
        """See Sizes."""
        assert self.operations is not None
        down = self.model.hidden_size * self.model.intermediate_size
        products = self.operations.token + 2 * again * (self.weights.block - down)
        products += again // 2 * 2 * self.weights.block if pairs else 0
        if self.by_rows:  # what attention is given is made once more; in rounds, keys alone
            products += again * 2 * (2 * self.key + (0 if self.alone else self.query)) * self.model.hidden_size
        moved = self.blocks * self._touched + again * self._touched_again
        return Work(self.tokens * products, self.tokens * moved)

    @property
    def _touched(self) -> float:
        """Bytes that a token's forward and backward pass of a block reads and writes beside products and attention.

        SwiGLU's product has two operands and a result, and in the backward pass three of each; gradients of norms read
        two tensors and write one; two sums of the stream have gradients that are added too.
        """
        wide, stream = self.element * self.model.intermediate_size, self.element * self.model.hidden_size
        return self._touched_again + 9 * wide + 2 * (self._norm + stream) + self._rotary + 3 * 3 * stream

    @property
    def _touched_again(self) -> float:
        """The same of what is computed again: both norms, the rotary embedding, one sum of the stream."""
        return 2 * self._norm + self._rotary + 3 * self.element * self.model.hidden_size

    @property
    def _norm(self) -> float:
        """A norm: read and written; with weights in another dtype by way of fp32, which is written and read twice."""
        aside = 0 if self.weight == self.element else 4 * FP32
        return self.model.hidden_size * (2 * self.element + aside)

    @property
    def _rotary(self) -> float:
        """Queries and keys, read and written."""
        return 2 * self.element * (self.query + self.key)


def _tokens_of(config: Config) -> int:
    """Tokens of a tokenizer that is not there yet."""
    if config.data.tokenizer not in (None, "bpe", "bytes") and config.model.vocab_size is None:
        raise ArgumentError("model.vocab_size=null; give it, as a folder's tokenizer is not read here")
    of_bytes = config.data.tokenizer == "bytes" or config.model.vocab_size is not None
    return SMALLEST_VOCABULARY if of_bytes else config.data.vocab_size
