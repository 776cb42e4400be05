"""Steps of the forward kernel's key loop: a warpgroup's rows over a block of keys, and over sink tokens in front.

Legend: M query rows of a tile, N key rows of a block, D head dimension.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ringflash.kernels.hopper.compat import release
from ringflash.kernels.hopper.dropout import drop, words_of_keys
from ringflash.kernels.hopper.listed_blocks import hide_unlisted
from ringflash.kernels.hopper.schedule import key_span, stage_and_parity
from ringflash.kernels.hopper.score_changes import change_scores, softmax_of_changed
from ringflash.kernels.hopper.sink_tokens import FEW, token_key
from ringflash.kernels.hopper.softmax import LOWEST, ROWS, hide, own_sums, rescale_if_needed


@gluon.jit
def attend_block(
    problem, memory, query, own, row_start, row_stop, position, slope, draw, words, bits, entry, no_scores, first_key,
    stage, parity, earlier, weights, out, out_rest, maximum, total, scale_log2,
    PART: gl.constexpr, HIDES_KEYS: gl.constexpr, KEY_REST: gl.constexpr, VALUE_REST: gl.constexpr,
):  # fmt: skip
    """A step of the key loop: this block's scores and weights, and the weights times values of the block `earlier`.

    With lists, entry is what the list says of this block, and bits are from `bits_of_rows`; else of no meaning.
    """
    keys, values = memory.key, memory.value
    N: gl.constexpr = keys.blocks.shape[1]
    SCORES: gl.constexpr = no_scores.type.layout
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=out.type.layout, k_width=2)
    mbarrier.wait(keys.full.index(stage), parity)
    scores_token = start_scores(memory, query, stage, no_scores, PART, KEY_REST)
    out_token = warpgroup_mma(weights, values.blocks.index(earlier), out, is_async=True)
    if VALUE_REST:
        rest_token = start_rest(weights, memory.value_rest.index(earlier), out_rest)
    scores = warpgroup_mma_wait(2 if VALUE_REST else 1, deps=[scores_token])
    scores = change_scores(scores, problem.changes, memory.key_numbers.index(stage), position, slope, HIDES_KEYS)
    release(keys.empty.index(stage))
    scores = hide(scores, own, row_start, row_stop, first_key, N, SCORES)
    BITS: gl.constexpr = problem.lists.bits is not None
    if BITS and (entry & 1) != 0:
        scores = hide_unlisted(scores, bits, first_key, float("-inf"))
    weights, rescale, maximum, total = softmax_of_changed(scores, problem.changes, maximum, total, scale_log2)
    if problem.dropout.seed_ptr is not None:
        weights = drop_block(weights, problem, memory, draw, words, stage, parity)
    weights = gl.convert_layout(weights.to(keys.blocks.dtype), WEIGHTS)
    # This wait is for the next step, but stands here: a branch between the softmax and the wait for the tensor
    # cores keeps ptxas from moving that wait in front of the softmax.
    mbarrier.wait(values.full.index(stage), parity)
    if VALUE_REST:
        out, out_rest = warpgroup_mma_wait(0, deps=[out_token, rest_token])
    else:
        out = warpgroup_mma_wait(0, deps=[out_token])
    release(values.empty.index(earlier))
    out, out_rest = rescale_all(out, out_rest, rescale, VALUE_REST)
    return out, out_rest, weights, maximum, total


@gluon.jit
def attend_tokens(
    problem, memory, pieces, first_row, step, tiles_done, position, slope, draw, words, no_scores, out, out_rest,
    maximum, total, scale_log2,
    PART: gl.constexpr, HIDES_KEYS: gl.constexpr, KEY_REST: gl.constexpr, VALUE_REST: gl.constexpr,
):  # fmt: skip
    """A warpgroup's rows over the tile's sink tokens, of which nothing is in flight any more when this returns."""
    queries, keys, values, tokens = memory.query, memory.key, memory.value, problem.tokens
    STAGES: gl.constexpr = keys.blocks.shape[0]
    N: gl.constexpr = keys.blocks.shape[1]
    SCORES: gl.constexpr = no_scores.type.layout
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=out.type.layout, k_width=2)
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    inside = rows < problem.query_rows
    row_start = gl.load(tokens.start_ptr + rows, mask=inside, other=0)
    row_stop = gl.load(tokens.stop_ptr + rows, mask=inside, other=0)
    own = key_span(tokens.start_ptr, tokens.stop_ptr, first_row, problem.query_rows, ROWS)
    query = queries.blocks.index(PART)
    stage, parity = stage_and_parity(step, STAGES)
    if pieces.blocks > 0:
        mbarrier.wait(queries.full.index(PART), tiles_done & 1)
        mbarrier.wait(keys.full.index(stage), parity)
    # What keys bring along is not cut down.
    CUTS: gl.constexpr = problem.changes.key_numbers_desc is None and problem.dropout.seed_ptr is None
    if CUTS and pieces.few:
        out, out_rest, maximum, total = attend_few(
            problem, memory, own, first_row, token_key(pieces, 0, N), stage, parity, out, out_rest, maximum, total,
            scale_log2, PART, KEY_REST, VALUE_REST,
        )  # fmt: skip
    elif pieces.blocks > 0:
        scores_token = start_scores(memory, query, stage, no_scores, PART, KEY_REST)
        scores = warpgroup_mma_wait(0, deps=[scores_token])
        scores = change_scores(scores, problem.changes, memory.key_numbers.index(stage), position, slope, HIDES_KEYS)
        release(keys.empty.index(stage))
        scores = hide(scores, own, row_start, row_stop, token_key(pieces, 0, N), N, SCORES)
        weights, _, maximum, total = softmax_of_changed(scores, problem.changes, maximum, total, scale_log2)
        if problem.dropout.seed_ptr is not None:
            weights = drop_block(weights, problem, memory, draw, words, stage, parity)
        weights = gl.convert_layout(weights.to(keys.blocks.dtype), WEIGHTS)
        mbarrier.wait(values.full.index(stage), parity)
        for block in range(1, pieces.blocks):
            earlier = stage
            stage, parity = stage_and_parity(step + block, STAGES)
            out, out_rest, weights, maximum, total = attend_block(
                problem, memory, query, own, row_start, row_stop, position, slope, draw, words, rows, block, no_scores,
                token_key(pieces, block, N), stage, parity, earlier, weights, out, out_rest, maximum, total,
                scale_log2, PART, HIDES_KEYS, KEY_REST, VALUE_REST,
            )  # fmt: skip
        out_token = warpgroup_mma(weights, values.blocks.index(stage), out, is_async=True)
        if VALUE_REST:
            rest_token = start_rest(weights, memory.value_rest.index(stage), out_rest)
            out, out_rest = warpgroup_mma_wait(0, deps=[out_token, rest_token])
        else:
            out = warpgroup_mma_wait(0, deps=[out_token])
        release(values.empty.index(stage))
    return out, out_rest, maximum, total


@gluon.jit
def attend_few(
    problem, memory, own, first_row, first_key, stage, parity, out, out_rest, maximum, total, scale_log2,
    PART: gl.constexpr, KEY_REST: gl.constexpr, VALUE_REST: gl.constexpr,
):  # fmt: skip
    """A warpgroup's rows over the first `FEW` keys of their first block, which has been waited for."""
    keys, values, tokens = memory.key, memory.value, problem.tokens
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=out.type.layout, k_width=2)
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    row_start = gl.load(tokens.start_ptr + rows, mask=rows < problem.query_rows, other=0)
    row_stop = gl.load(tokens.stop_ptr + rows, mask=rows < problem.query_rows, other=0)
    no_scores = gl.zeros([ROWS, FEW], gl.float32, SCORES)
    key = keys.blocks.index(stage).slice(0, FEW, 0).permute((1, 0))
    token = warpgroup_mma(memory.query.blocks.index(PART), key, no_scores, use_acc=False, is_async=True)
    if KEY_REST:
        key = memory.key_rest.index(stage).slice(0, FEW, 0).permute((1, 0))
        token = warpgroup_mma(memory.query_rest.index(PART), key, token, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[token])
    release(keys.empty.index(stage))
    scores = hide(scores, own, row_start, row_stop, first_key, FEW, SCORES)
    lowest = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    weights, _, few_maximum, few_total = softmax_of_changed(
        scores, problem.changes, lowest, own_sums(no_scores), scale_log2
    )
    weights = gl.convert_layout(weights.to(keys.blocks.dtype), WEIGHTS)
    mbarrier.wait(values.full.index(stage), parity)
    token = warpgroup_mma(weights, values.blocks.index(stage).slice(0, FEW, 0), out, is_async=True)
    if VALUE_REST:
        rest_token = start_rest(weights, memory.value_rest.index(stage).slice(0, FEW, 0), out_rest)
        out, out_rest = warpgroup_mma_wait(0, deps=[token, rest_token])
    else:
        out = warpgroup_mma_wait(0, deps=[token])
    release(values.empty.index(stage))
    maximum = gl.convert_layout(few_maximum, maximum.type.layout, assert_trivial=True)
    return out, out_rest, maximum, gl.convert_layout(few_total, total.type.layout, assert_trivial=True)


@gluon.jit
def drop_block(weights, problem, memory, draw, words, stage, parity):
    """Weights of a block without those that dropout drops; words of the query rows."""
    LAYOUT: gl.constexpr = weights.type.layout
    mbarrier.wait(memory.value.full.index(stage), parity)
    position = memory.key_positions.index(stage).load(gl.SliceLayout(0, LAYOUT)).to(gl.int32, bitcast=True)
    a, b, c, d = words_of_keys(draw, position)
    of_key = a[None, :], b[None, :], c[None, :], d[None, :]
    return drop(weights, problem.dropout, draw, (words[0][:, None], words[1][:, None]), of_key, False)


@gluon.jit
def rescale_all(out, out_rest, rescale, VALUE_REST: gl.constexpr):
    """The accumulators times each row's factor."""
    D: gl.constexpr = out.shape[1]
    out = rescale_if_needed(out, gl.convert_layout(rescale, gl.SliceLayout(1, out.type.layout)), D)
    if VALUE_REST:
        REST: gl.constexpr = out_rest.shape[1]
        factor = gl.convert_layout(rescale, gl.SliceLayout(1, out_rest.type.layout))
        out_rest = rescale_if_needed(out_rest, factor, REST)
    return out, out_rest


@gluon.jit
def start_scores(memory, query, stage, no_scores, PART: gl.constexpr, KEY_REST: gl.constexpr):
    """The product for a block's scores."""
    key = memory.key.blocks.index(stage).permute((1, 0))
    token = warpgroup_mma(query, key, no_scores, use_acc=False, is_async=True)
    if KEY_REST:
        key = memory.key_rest.index(stage).permute((1, 0))
        token = warpgroup_mma(memory.query_rest.index(PART), key, token, is_async=True)
    return token


@gluon.jit
def start_rest(weights, value, out):
    """The product of weights and the rest of the values' columns."""
    FACTOR: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=out.type.layout, k_width=2)
    return warpgroup_mma(gl.convert_layout(weights, FACTOR, assert_trivial=True), value, out, is_async=True)


@gluon.jit
def pass_over(keys, values, step, end, STAGES: gl.constexpr):
    """Give back the blocks of some steps unread, each once it is full: earlier would count for the round before."""
    for skipped in range(step, end):
        stage, parity = stage_and_parity(skipped, STAGES)
        mbarrier.wait(keys.full.index(stage), parity)
        release(keys.empty.index(stage))
        mbarrier.wait(values.full.index(stage), parity)
        release(values.empty.index(stage))
