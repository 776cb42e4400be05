"""What is kept from call to call must not lie in the memory of torch.compile's CUDA graphs."""

from __future__ import annotations

import gc
import threading
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from ringflash import Mask
from ringflash.functional import attention
from ringflash.kernels import kept
from ringflash.kernels.intervals import causal_intervals
from ringflash.parallel.lookup import shardings
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.positions import visibility

MASKS = {
    "causal": Mask.causal(),
    "window-sink": Mask.sliding_window(20, sink=3),
    "documents": Mask.causal() & Mask.documents([0, 30, 31, 90, 100]),
    "blocks": Mask.blocks(torch.rand(7, 7, generator=torch.Generator().manual_seed(0)) < 0.4, 16),
}


@pytest.fixture
def threads_of_tensors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every thread that something to keep is built in while torch says that it warms up."""
    seen: list[int] = []
    monkeypatch.setattr(kept, "warming_up", lambda device: True)
    executor = kept.ThreadPoolExecutor

    class Watched(executor):
        def submit(self, build, /):
            def watched():
                seen.append(threading.get_ident())
                return build()

            return super().submit(watched)

    monkeypatch.setattr(kept, "ThreadPoolExecutor", Watched)
    return seen


def forget() -> None:
    shardings.clear()
    visibility._tensors.clear()


@pytest.mark.parametrize("name", MASKS)
def test_programs_are_built_in_another_thread_while_graphs_warm_up(name: str, threads_of_tensors: list[int]) -> None:
    operands = [torch.randn(1, 100, 2, 16) for _ in range(3)]
    forget()
    found = attention(*operands, mask=MASKS[name], group=ONE_DEVICE)
    assert threads_of_tensors
    assert threading.get_ident() not in threads_of_tensors
    forget()
    with mock.patch.object(kept, "warming_up", return_value=False):
        expected = attention(*operands, mask=MASKS[name], group=ONE_DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tables_of_tiles_are_built_in_another_thread_while_graphs_warm_up(threads_of_tensors: list[int]) -> None:
    intervals = causal_intervals(301, 307)
    tables = intervals.key_tile_rows(16), intervals.key_order(16), intervals.query_order(16)
    assert threads_of_tensors
    assert threading.get_ident() not in threads_of_tensors
    with mock.patch.object(kept, "warming_up", return_value=False):
        again = causal_intervals(301, 307)
        expected = again.key_tile_rows(16), again.key_order(16), again.query_order(16)
    assert all(torch.equal(a, b) for a, b in zip(tables, expected, strict=True))


def test_an_error_while_building_is_raised_as_it_is(threads_of_tensors: list[int]) -> None:
    with pytest.raises(ZeroDivisionError):
        kept.build_to_keep(lambda: 1 // 0, torch.device("cpu"))
    assert threads_of_tensors


KNOWN_DOCUMENTS = {
    "mask": {"mask": MASKS["documents"]},
    "list": {"cu_seqlens": [0, 30, 31, 90, 100]},
    "lists": {"mask": Mask.bidirectional(), "cu_seqlens": [0, 30, 100], "query_cu_seqlens": [0, 20, 100]},
    "mask and list": {"mask": MASKS["documents"], "cu_seqlens": [0, 50, 100]},
    "mask and slopes": {"mask": MASKS["documents"], "alibi_slopes": torch.tensor([0.5, 0.25])},
    "mask and slopes of sequences": {"mask": MASKS["documents"], "alibi_slopes": torch.tensor([[0.5, 0.25]])},
    "mask and slopes of documents": {"mask": MASKS["documents"], "alibi_slopes": torch.rand(4, 2)},
    "list and slopes of documents": {"cu_seqlens": [0, 30, 30, 100], "alibi_slopes": torch.rand(3, 2)},
}


@pytest.mark.parametrize("name", KNOWN_DOCUMENTS)
def test_documents_known_to_the_host_are_no_tensors_in_compiled_graphs(name: str) -> None:
    """Constants on the CPU, and what is kept of them for the backward pass, lie outside of the graphs' memory."""
    graphs = []

    def record(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = attention(query.sin(), key, value, **KNOWN_DOCUMENTS[name], group=ONE_DEVICE)
        return out.square().sum() + lse.square().sum()

    torch.compiler.reset()
    leaves = [torch.randn(1, 100, 2, 16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves), rtol=1e-6, atol=1e-6)
    forward, backward = graphs
    for graph in graphs:
        targets = " ".join(str(node.target) for node in graph.graph.nodes)
        assert not graph.graph.find_nodes(op="get_attr")
        assert "lift_fresh" not in targets
        assert "arange" not in targets  # rows numbered on the host
    kept = [
        node.meta["val"]
        for node in (*forward.graph.output_node().args[0], *backward.graph.find_nodes(op="placeholder"))
    ]
    assert {x.dtype for x in kept} == {torch.float32, torch.int32}  # int32: the table of documents on the device


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
def test_compiling_with_reduce_overhead_gives_the_same_in_every_call(name: str) -> None:
    """Two functions that share tables, called in turn, forward and backward, with new numbers each time."""
    forget()
    torch.compiler.reset()

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = attention(query.sin(), key, value, mask=MASKS[name], group=ONE_DEVICE)
        return (out.float() * 2).square().sum() + lse.square().sum()

    def other(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return loss(query, key, value) + query.float().sum()

    compiled = [torch.compile(function, mode="reduce-overhead") for function in (loss, other)]
    for round_ in range(4):
        torch.manual_seed(round_)
        leaves = [torch.randn(1, 100, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        for fast, plain in zip(compiled, (loss, other), strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            found = [x.clone() for x in torch.autograd.grad(fast(*leaves), leaves)]
            expected = torch.autograd.grad(plain(*leaves), leaves)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_captured_graph_reads_its_own_program_after_many_other_lengths() -> None:
    x = torch.randn(1, 1000, 4, 64, device="cuda", dtype=torch.bfloat16)
    edges = [0, 300, 1000]

    def attend(x: Tensor, edges: list[int]) -> Tensor:
        return attention(x, x, x, cu_seqlens=edges, group=ONE_DEVICE)[0]

    expected = attend(x, edges).clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend(x, edges)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(x, edges)
    for length in range(1, 301):
        attend(x, [0, length, 1000])
    shardings.clear()
    gc.collect()
    junk = [torch.full((250_000,), 2**30, device="cuda", dtype=torch.int32) for _ in range(64)]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected), len(junk)


def routed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention to four blocks of keys for each block of queries and key head, whose means are the nearest."""
    means = [x.detach().unflatten(1, (-1, 128)).mean(2) for x in (query, key)]
    scores = torch.einsum("bqhd,bkhd->hqk", means[0].unflatten(2, (key.shape[2], -1)).mean(3), means[1])
    layout = torch.zeros_like(scores, dtype=torch.bool).scatter(2, scores.topk(4, dim=2).indices, True)
    return attention(query, key, value, mask=Mask.causal() & Mask.blocks(layout, 128), group=ONE_DEVICE)[0]


@pytest.mark.gpu
def test_blocks_that_a_model_chooses_are_not_read_by_the_host_and_are_chosen_anew_by_a_graph() -> None:
    leaves = [
        torch.randn(1, 2048, heads, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)
    ]
    expected = routed(*leaves)
    expected.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = routed(*leaves)
        found.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            routed(*leaves)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            captured = routed(*leaves)
        for _ in range(2):
            leaves[0].copy_(torch.randn_like(leaves[0]))
            graph.replay()
            assert torch.equal(captured, routed(*leaves))


@pytest.mark.gpu
def test_packings_that_never_come_again_do_not_stay_on_the_gpu() -> None:
    tokens = 2**20
    x = torch.randn(1, tokens, 1, 64, device="cuda", dtype=torch.bfloat16)
    sizes = []
    for packing in range(1, 65):
        attention(x, x, x, cu_seqlens=[*range(0, packing * 16, 16), tokens // 2, tokens], group=ONE_DEVICE)
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[-1] - sizes[0] < 1.5 * shardings.most_bytes
