"""How a query block's gradient leaves a program: in parts of 64 rows and columns, added to global memory in fp32.

Each of the two consumer warpgroups computes one part in a step (two of head dimension 256), lays it down in shared
memory, and the tensor memory engine adds it from there.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.hopper.blocks import add_block, head_place
from ringflash.kernels.hopper.compat import reinterpret
from ringflash.kernels.hopper.rows_visited import RANGE, entry_of, row_of

HALF = gl.constexpr(64)
"""Rows and columns of a part; also key rows of a warpgroup."""


@gluon.constexpr_function
def parts_in_step(dim):
    """Parts that a warpgroup computes one after the other."""
    return max(1, dim // 128)


@gluon.jit
def add_part(
    dquery_desc, staging, row, head, D: gl.constexpr, PART: gl.constexpr, PIECE: gl.constexpr
):  # fmt: skip
    """Add what a warpgroup has laid down of a block of dQ: at 64 columns half of the rows, else of the columns."""
    place = head_place(dquery_desc, head, D)
    if D == 64:
        add_block(dquery_desc, row + PART * 64, place, 0, staging)
    else:
        add_block(dquery_desc, row, place, PART * (D // 2) + PIECE * 64, staging)


@gluon.jit
def add_earlier(
    dquery_desc, staging, rows, step, block, member, M: gl.constexpr, D: gl.constexpr, PART: gl.constexpr,
    WALK: gl.constexpr,
):  # fmt: skip
    """Add the last part laid down in the step before `step`, the one at `block` and `member`; none is before the first.

    All threads of the warpgroup must have passed a fence and a barrier since. So nobody waits for shared memory to have
    taken the part: by the time that the next step's dscores are fenced off, as they have to be, it has.
    """
    if step > 0:
        row, head = earlier_block(rows, block, member, M, WALK)
        add_part(dquery_desc, staging, row, head, D, PART, parts_in_step(D) - 1)


@gluon.jit
def earlier_block(rows, block, member, M: gl.constexpr, WALK: gl.constexpr = RANGE):
    """First row and head of the block before the one at `block` and `member`, where not ORDERED."""
    first = block == 0
    earlier = gl.where(first, rows.blocks - 1, block - 1)
    row = row_of(rows, earlier, entry_of(rows, earlier, WALK), M, WALK)
    head = rows.first_head + gl.where(first, member - 1, member)
    return row, head


# In the layout of a product's result, eight threads with the same columns have eight rows, of which the swizzle of
# shared memory separates no two neighbours: storing 8 bytes each, all of a half-warp, would take twice the time. So
# odd rows store other columns in each instruction, those that differ in bit 4. Two things together do that: their
# threads swap registers, and the part is stored to a layout in which odd rows are swapped as well.
SWAPPED = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [1, 4 ^ 16], [2, 8], [4, 16], [8, 0], [16, 0], [32, 0], [0, 32]],
        alignment=1024,
    )
)


def _swap_assembly() -> tuple[str, str]:
    """PTX (and its operands): threads of odd rows swap their registers 16 columns apart.

    Register 4 i + 2 r + c is of columns 8 i + c, and of the thread's first row or the row eight below.
    """
    swaps = " ".join(f"selp.f32 ${i}, ${32 + (i ^ 8)}, ${32 + i}, odd;" for i in range(32))
    text = (
        "{ .reg .pred odd; .reg .b32 lane; mov.u32 lane, %laneid; and.b32 lane, lane, 4;"
        f" setp.ne.u32 odd, lane, 0; {swaps} }}"
    )
    return text, ",".join(["=&f"] * 32 + ["f"] * 32)


SWAP, SWAP_OPERANDS = map(gl.constexpr, _swap_assembly())


@gluon.jit
def lay_down(staging, part):
    """Store a part where the tensor memory engine will take it from."""
    swapped = gl.inline_asm_elementwise(SWAP, SWAP_OPERANDS, [part], dtype=gl.float32, is_pure=True, pack=32)
    reinterpret(staging, gl.float32, [HALF, HALF], SWAPPED).store(swapped)
