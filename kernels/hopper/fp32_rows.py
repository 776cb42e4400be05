"""64 rows of a result in fp32, as a carry is: on their way between global memory and a product's registers.

A thread has two rows of a product's result, and of each two columns in every eight. So an address for each row, and
offsets that are part of the instructions, reach all of them. The compiler does not find that by itself: it computes an
address for every two numbers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.hopper.softmax import ROWS


@gluon.constexpr_function
def load_assembly(count):
    """PTX that loads a thread's `count` registers; the operands behind them are the addresses of their rows.

    Registers 4 i + 2 r and the next are of row r and two of the columns from 8 i on. All rows exist: were a load left
    out, its registers would have to be kept free for long.
    """
    loads = " ".join(
        f"ld.global.v2.f32 {{${i}, ${i + 1}}}, [row{i // 2 % 2} + {i // 4 * 32}];" for i in range(0, count, 2)
    )
    return f"{{ .reg .b64 row0, row1; {own_columns(count)} {loads} }}"


@gluon.constexpr_function
def store_assembly(count):
    """PTX that stores a thread's `count` registers, in the order of `load_assembly`, but for rows with address 0.

    The result is the registers, as some must be named; the operands are they and the addresses of their rows.
    """
    stores = " ".join(
        f"@exists{i // 2 % 2} st.global.v2.f32 [row{i // 2 % 2} + {i // 4 * 32}], {{${i}, ${i + 1}}};"
        for i in range(0, count, 2)
    )
    exist = " ".join(f"setp.ne.b64 exists{row}, ${2 * count + 2 * row}, 0;" for row in range(2))
    declared = ".reg .pred exists0, exists1; .reg .b64 row0, row1;"
    return f"{{ {declared} {exist} {own_columns(2 * count)} {stores} }}"


@gluon.constexpr_function
def own_columns(first_address):
    """PTX that finds a thread's first column in its two rows, whose addresses are operands from first_address on."""
    rows = " ".join(f"mad.wide.u32 row{row}, lane, 8, ${first_address + 2 * row};" for row in range(2))
    return f".reg .b32 lane; mov.u32 lane, %laneid; and.b32 lane, lane, 3; {rows}"


@gluon.constexpr_function
def load_operands(count):
    """Constraints of `load_assembly`."""
    return ",".join(["=f"] * count + ["l"] * count)


@gluon.constexpr_function
def store_operands(count):
    """Constraints of `store_assembly`."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["l"] * count)


@gluon.jit
def row_addresses(base, row, head, heads, D: gl.constexpr):
    """Where rows of a head begin in a contiguous (T, H, D) tensor, int64."""
    return base.to(gl.int64) + (row.to(gl.int64) * heads + head) * (D * 4)


@gluon.jit
def load_rows(
    base, first_row, first_column, head, query_rows, heads,
    D: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """COLUMNS columns of 64 rows as a product's result has them; the last row's where there are none."""
    row = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), query_rows - 1)
    addresses = row_addresses(base, row, head, heads, D) + first_column * 4
    addresses, _ = gl.broadcast(addresses[:, None], gl.zeros([ROWS, COLUMNS], gl.int64, LAYOUT))
    return gl.inline_asm_elementwise(
        load_assembly(COLUMNS // 2), load_operands(COLUMNS // 2), [addresses],
        dtype=gl.float32, is_pure=False, pack=COLUMNS // 2,
    )  # fmt: skip


@gluon.jit
def store_rows(base, rows, first_row, first_column, head, query_rows, heads, WIDTH: gl.constexpr):
    """Store a product's result from first_column on in 64 rows of WIDTH columns; none behind the last row."""
    D: gl.constexpr = rows.shape[1]
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, rows.type.layout))
    addresses = gl.where(row < query_rows, row_addresses(base, row, head, heads, WIDTH) + first_column * 4, 0)
    rows, addresses = gl.broadcast(rows, addresses[:, None])
    gl.inline_asm_elementwise(
        store_assembly(D // 2), store_operands(D // 2), [rows, addresses],
        dtype=gl.float32, is_pure=False, pack=D // 2,
    )  # fmt: skip


@gluon.jit
def prefetch_rows(base, lse_ptr, first_row, head, query_rows, heads, M: gl.constexpr, D: gl.constexpr):
    """Bring M rows of a head and their lse (H, T) to the second-level cache; for one warp, a lane for each row."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    last_row = gl.minimum(first_row + M, query_rows) - 1
    prefetch((lse_ptr + head * query_rows + gl.minimum(first_row + lane * 32, last_row)).to(gl.int64))
    for more in gl.static_range(0, M, 32):
        addresses = row_addresses(base, gl.minimum(first_row + more + lane, last_row), head, heads, D)
        for line in gl.static_range(0, D * 4, 128):
            prefetch(addresses + line)


@gluon.jit
def prefetch(addresses):
    """Bring the lines of 128 bytes at these addresses to the second-level cache."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], dtype=gl.int32, is_pure=False, pack=1
    )
