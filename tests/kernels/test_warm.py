"""What launch/warm.py compiles ahead is what a job's ranks launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from stand_in import stand_in

from ringflash import Mask, Sharding
from ringflash.functional import attention
from ringflash.kernels import hopper
from ringflash.kernels.gpu import compile_once
from ringflash.kernels.triton import attend as portable
from ringflash.launch import warm
from ringflash.parallel.execution import call
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.placement import Placement
from ringflash.parallel.transport.send_recv import Delivery, Ticket

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

CPU = torch.device("cpu")
NOTHING_COMPILED = SimpleNamespace(
    run=lambda *_: None, function=0, packed_metadata=(), launch_metadata=lambda *_: None, src=None
)


@contextmanager
def variants(kernels: ModuleType) -> Iterator[set[str]]:
    """Folders of Triton's cache that kernels are looked for in while this lasts; none is compiled."""
    found = set()

    def compiled(source, target, options) -> SimpleNamespace:
        found.add(compile_once.cache_of(source, target, options).key)
        return NOTHING_COMPILED

    with stand_in(kernels), mock.patch("triton.compiler.compile", compiled):
        yield found


class NoTransport:
    """Everything has arrived."""

    shelf = property(lambda self: self)

    def open(self, *_: object) -> None:
        pass

    publish = release = open

    def mark(self) -> None:
        pass

    def pull(self, *_: object) -> Ticket:
        return Ticket([], [], "")

    transfer = pull

    def copy_engines(self, _: object) -> None:
        return None

    def needs_room(self, *_: object) -> bool:
        return False

    def deliver(self, *_: object) -> Delivery:
        return Delivery(Ticket([], [], ""), [], 1, 1)


def both_ways(form: warm.Form, rank: int, ranks: int, mask: Mask) -> None:
    """A rank's whole call, forward and backward."""
    (heads, key_heads), (dim, value_dim) = form.heads, form.head_dims
    # Long enough for launches over all that see a sink token, for shards of whole blocks, and longer than windows.
    length = 4 * (1024 if form.sink_tokens or form.blocks or form.window > 48 else 96)
    sharding = Sharding(mask, seqlen=length, rank=rank, ranks=ranks)
    shapes = (heads, dim), (key_heads, dim), (key_heads, value_dim)
    leaves = [torch.zeros(1, sharding.tokens, *shape, dtype=form.dtype, requires_grad=True) for shape in shapes]
    features = {
        "softcap": form.softcap,
        "alibi_slopes": torch.ones(heads) if form.alibi else None,
        "dropout": form.dropout,
        "dropout_seed": torch.zeros(1, dtype=torch.int64) if form.dropout else None,
        "key_padding_mask": torch.ones(1, sharding.tokens, dtype=torch.bool) if form.padding else None,
        "deterministic": form.deterministic,
        "sinks": torch.zeros(heads, dtype=form.dtype, requires_grad=True) if form.sinks else None,
    }
    if ranks == 1:
        out, _ = attention(*leaves, mask=mask, group=ONE_DEVICE, **features)
        out.backward(out.detach())
        return
    sharding._placement.group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    agreed = SimpleNamespace(check=lambda *_: None, close=lambda *_: None)
    with (
        mock.patch.object(call, "agreement", return_value=agreed),
        mock.patch.object(Placement, "transport", NoTransport()),
        mock.patch.object(Placement, "bind"),
    ):
        out, _ = attention(*leaves, sharding=sharding, **features)
        out.backward(out.detach())


CAUSAL, WITH_SINKS = Mask.causal(), Mask.sliding_window(40, 0, 4)
IN_BLOCKS = CAUSAL & Mask.blocks(torch.ones(32, 32).tril().bool(), 128)
BF16 = torch.bfloat16
JOBS = {
    "hopper D128": (hopper, warm.Form(BF16, (128, 128), (8, 2)), CAUSAL),
    "hopper D256, fp16": (hopper, warm.Form(torch.float16, (256, 256), (4, 4)), CAUSAL),
    "hopper D256, deterministic": (hopper, warm.Form(BF16, (256, 256), (4, 4), deterministic=True), CAUSAL),
    "hopper D64, narrow window": (hopper, warm.Form(BF16, (64, 64), (4, 2), window=40), Mask.sliding_window(40, 0)),
    "hopper D64, window": (hopper, warm.Form(BF16, (64, 64), (4, 2)), Mask.sliding_window(300, 0)),
    "hopper D64, documents": (hopper, warm.Form(BF16, (64, 64), (4, 2)), CAUSAL & Mask.documents([0, 100, 384])),
    "hopper D512": (hopper, warm.Form(BF16, (512, 512), (4, 2)), CAUSAL),
    "hopper, blocks": (hopper, warm.Form(BF16, (128, 128), (8, 2), blocks=128), IN_BLOCKS),
    "hopper, learned sinks": (hopper, warm.Form(BF16, (128, 128), (8, 2), sinks=True), CAUSAL),
    "hopper, learned sinks, narrow window": (
        hopper, warm.Form(BF16, (64, 64), (8, 2), window=63, sinks=True), Mask.sliding_window(63),
    ),
    "hopper 192/128": (hopper, warm.Form(BF16, (192, 128), (4, 4)), CAUSAL),
    "hopper, sink tokens": (hopper, warm.Form(BF16, (64, 64), (8, 2), sink_tokens=True), WITH_SINKS),
    "hopper, softcap and ALiBi": (hopper, warm.Form(BF16, (128, 128), (8, 2), softcap=30.0, alibi=True), CAUSAL),
    "hopper, dropout and padding": (hopper, warm.Form(BF16, (128, 128), (8, 2), dropout=0.1, padding=True), CAUSAL),
    "portable 192/128": (portable, warm.Form(BF16, (192, 128), (4, 4)), CAUSAL),
    "portable D64, fp32": (portable, warm.Form(torch.float32, (64, 64), (8, 2)), CAUSAL),
    "portable, sink tokens": (portable, warm.Form(BF16, (64, 64), (8, 2), sink_tokens=True), WITH_SINKS),
    "portable, softcap and ALiBi": (portable, warm.Form(BF16, (64, 64), (8, 2), softcap=30.0, alibi=True), CAUSAL),
    "portable, dropout": (portable, warm.Form(BF16, (64, 64), (8, 2), dropout=0.1), CAUSAL),
    "portable, blocks": (portable, warm.Form(BF16, (64, 64), (8, 2), blocks=128), IN_BLOCKS),
    "portable, learned sinks": (portable, warm.Form(BF16, (64, 64), (8, 2), sinks=True), CAUSAL),
    "portable, padding": (portable, warm.Form(BF16, (64, 64), (8, 2), padding=True), CAUSAL),
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_warmed_job_finds_all_kernels_compiled(job: str, ranks: int) -> None:
    kernels, form, mask = JOBS[job]
    with variants(kernels) as launched:
        for rank in range(ranks):
            both_ways(form, rank, ranks, mask)
    with variants(kernels) as warmed:
        for part in warm.parts_of([form], ranks > 1):
            warm.compile_part(part, CPU)
    assert launched
    assert launched <= warmed
    if ranks == 1:
        assert launched == warmed, "nothing is compiled that no job of one GPU launches"


@pytest.mark.parametrize("kernels", [hopper, portable], ids=["hopper", "portable"])
def test_other_kernels_are_not_those_of_the_job(kernels: ModuleType) -> None:
    with variants(kernels) as launched:
        both_ways(warm.Form(BF16, (128, 128), (8, 2)), 0, 1, CAUSAL)
    with variants(kernels) as warmed:
        for part in warm.parts_of([warm.Form(BF16, (64, 64), (8, 2))]):
            warm.compile_part(part, CPU)
    assert not launched <= warmed


def test_what_was_compiled_and_what_was_there_is_told_apart(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = warm.Part(warm.Form(BF16, (64, 64), (4, 2)), backward=True, carried=False, kept_exact=False)
    names = {"delta_kernel", "prepare_rows_kernel", "attend_backward_kernel"}
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        for found in (False, True):
            with stand_in(hopper):
                [(_, compiled)] = warm.warm([part], CPU, processes=1)
            assert {(x.name, x.found) for x in compiled} == {(name, found) for name in names}


def test_several_processes_share_the_parts() -> None:
    """On CPUs, where nothing is compiled."""
    parts = warm.parts_of([warm.Form(torch.float32, (16, 16), (2, 1))], ranks=False)
    assert dict(warm.warm(parts, CPU, processes=2)) == {part: [] for part in parts}


@pytest.mark.gpu
def test_the_command_compiles_once(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for last in (" kernels compiled, 0 found compiled", "0 kernels compiled, "):
        warm.main(["head_dims=64", "heads=4/2", "processes=2", "one_gpu=true"])
        assert last in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["head_dims=64,x", "heads=4"], "argument --head-dims: 'x'; allowed are positive whole numbers"),
        (["head_dims=64", "heads=32/8/2"], "argument --heads: '32/8/2'; allowed are positive whole numbers"),
        (
            ["head_dims=64", "heads=4", "dtypes=bf16"],
            "--dtypes: 'bf16'; allowed are bfloat16, float16, float32",
        ),
        (["heads=4"], "the following arguments are required: --head-dims"),
    ],
)
def test_what_the_command_does_not_take_is_named(words: list[str], refused: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        warm.main(words)
    assert refused in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        warm.main(["head_dims=64", "heads=4/2"])
    assert "there is no GPU that torch can use" in capsys.readouterr().err
