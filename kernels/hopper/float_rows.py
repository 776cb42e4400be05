"""64 rows of a result in fp32, as a carry is: on their way between global memory and a product's registers.

A thread has two rows of a product's result, and of each two columns in every eight. So an address for each row, and
offsets that are part of the instructions, reach all of them. The compiler does not find that by itself: it computes an
address for every two numbers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.hopper.softmax import ROWS


def _assembly(count: int, access: str, first_address: int) -> str:
    """PTX that does `access` for every two of a thread's `count` registers.

    Registers 4 i + 2 r and the next are of row r and two of the columns from 8 i on. The operands from first_address on
    are the addresses of the registers' rows.
    """
    rows = " ".join(
        f"setp.ne.b64 exists{row}, ${first_address + 2 * row}, 0;"
        f" mad.wide.u32 row{row}, lane, 8, ${first_address + 2 * row};"
        for row in range(2)
    )
    lines = " ".join(
        access.format(row=i // 2 % 2, numbers=f"{{${i}, ${i + 1}}}", address=f"[row{i // 2 % 2} + {i // 4 * 32}]")
        for i in range(0, count, 2)
    )
    return (
        "{ .reg .pred exists0, exists1; .reg .b64 row0, row1; .reg .b32 lane; mov.u32 lane, %laneid;"
        f" and.b32 lane, lane, 3; {rows} {lines} }}"
    )


def _load(count: int) -> tuple[str, str]:
    """PTX and its operands. Rows all exist: were a load left out, its registers would have to be kept free for long."""
    return _assembly(count, "ld.global.v2.f32 {numbers}, {address};", count), ",".join(["=f"] * count + ["l"] * count)


def _store(count: int) -> tuple[str, str]:
    """PTX and its operands. Rows with address 0 are left out. Results are the registers stored: some must be named."""
    text = _assembly(count, "@exists{row} st.global.v2.f32 {address}, {numbers};", 2 * count)
    return text, ",".join(["=f"] * count + [str(i) for i in range(count)] + ["l"] * count)


LOAD_32, LOAD_OPERANDS_32 = map(gl.constexpr, _load(32))
LOAD_64, LOAD_OPERANDS_64 = map(gl.constexpr, _load(64))
STORE_32, STORE_OPERANDS_32 = map(gl.constexpr, _store(32))
STORE_64, STORE_OPERANDS_64 = map(gl.constexpr, _store(64))
STORE_128, STORE_OPERANDS_128 = map(gl.constexpr, _store(128))


@gluon.jit
def row_addresses(base, row, head, heads, D: gl.constexpr):
    """Where rows of a head begin in a contiguous (T, H, D) tensor, int64."""
    return base.to(gl.int64) + (row.to(gl.int64) * heads + head) * (D * 4)


@gluon.jit
def load_rows(
    base, first_row, first_column, head, query_rows, heads,
    D: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """COLUMNS (64 or 128) columns of 64 rows as a product's result has them; the last row's where there are none."""
    row = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), query_rows - 1)
    addresses = row_addresses(base, row, head, heads, D) + first_column * 4
    addresses, _ = gl.broadcast(addresses[:, None], gl.zeros([ROWS, COLUMNS], gl.int64, LAYOUT))
    if COLUMNS == 64:
        return gl.inline_asm_elementwise(
            LOAD_32, LOAD_OPERANDS_32, [addresses], dtype=gl.float32, is_pure=False, pack=32
        )
    else:
        return gl.inline_asm_elementwise(
            LOAD_64, LOAD_OPERANDS_64, [addresses], dtype=gl.float32, is_pure=False, pack=64
        )


@gluon.jit
def store_rows(base, rows, first_row, head, query_rows, heads):
    """Store 64 rows of a product's result; none behind the last row."""
    D: gl.constexpr = rows.shape[1]
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, rows.type.layout))
    addresses = gl.where(row < query_rows, row_addresses(base, row, head, heads, D), 0)
    rows, addresses = gl.broadcast(rows, addresses[:, None])
    if D == 64:
        gl.inline_asm_elementwise(
            STORE_32, STORE_OPERANDS_32, [rows, addresses], dtype=gl.float32, is_pure=False, pack=32
        )
    elif D == 128:
        gl.inline_asm_elementwise(
            STORE_64, STORE_OPERANDS_64, [rows, addresses], dtype=gl.float32, is_pure=False, pack=64
        )
    else:
        gl.inline_asm_elementwise(
            STORE_128, STORE_OPERANDS_128, [rows, addresses], dtype=gl.float32, is_pure=False, pack=128
        )


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
