"""Passes over specialised graphs: what they leave out, what they must not touch, and that no value changes."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from diffcr_surgery.rewrite import FuseSites, ScatterInPlace, ShareGathers, ops
from diffcr_surgery.rewrite.passes import writes
from diffcr_surgery.tokens import gather_each, gather_tokens, scatter_tokens, scatter_tokens_, top_tokens
from diffcr_surgery.trace.builder import expect

N, K = 6, 4


class Model(nn.Module):
    """Two blocks and a router, to be called by hand-written graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.diffcr = nn.Module()
        self.diffcr.routers = nn.ModuleList([nn.Linear(4, 1)])


def build(write: Callable[[fx.Graph, fx.Node, fx.Node], Any]) -> fx.Graph:
    graph = fx.Graph()
    graph.output(write(graph, graph.placeholder("stream"), graph.placeholder("scores")))
    graph.lint()
    return graph


def site(graph: fx.Graph, stream: fx.Node, scores: fx.Node, block: str, count: int = K) -> fx.Node:
    kept = graph.call_function(top_tokens, (scores, count))
    tokens = graph.call_function(gather_tokens, (stream, kept, "b n c", N))
    return graph.call_function(scatter_tokens, (stream, graph.call_module(block, (tokens,)), kept, "b n c"))


def run(graph: fx.Graph) -> Tensor:
    torch.manual_seed(0)
    stream, scores = torch.randn(2, N, 4), torch.rand(2, N)
    kept = stream.clone()
    with torch.no_grad():
        result: Tensor = fx.GraphModule(Model(), graph)(stream, scores)
    assert torch.equal(stream, kept)  # nothing is written into the model's inputs
    return result


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def check(write: Callable[[fx.Graph, fx.Node, fx.Node], Any], *passes: Callable[[fx.Graph], bool]) -> tuple[fx.Graph, list[bool]]:
    """Apply passes to a graph; the result must be the same, bit for bit."""
    expected = run(build(write))
    graph = build(write)
    modified = [each(graph) for each in passes]
    graph.lint()
    assert torch.equal(run(graph), expected)
    return graph, modified


def test_consecutive_sites_with_one_kept_set_gather_and_scatter_once() -> None:
    graph, modified = check(
        lambda g, x, s: site(g, site(g, x, s, "a"), s, "b"),
        ShareGathers(),
        FuseSites(),
        ScatterInPlace(),
    )
    assert modified == [True, True, False]
    assert targets(graph) == [top_tokens, gather_tokens, scatter_tokens]


def test_other_counts_are_not_fused_and_the_second_scatter_is_in_place() -> None:
    graph, modified = check(
        lambda g, x, s: site(g, site(g, x, s, "a"), s, "b", K - 1),
        ShareGathers(),
        FuseSites(),
        ScatterInPlace(),
    )
    assert modified == [False, False, True]
    assert targets(graph) == [top_tokens, gather_tokens, scatter_tokens, top_tokens, gather_tokens, scatter_tokens_]


def test_a_stream_someone_else_reads_is_still_scattered() -> None:
    """As for a long skip, or the residuals that a ControlNet adds."""

    def write(g: fx.Graph, x: fx.Node, s: fx.Node) -> Any:
        first = site(g, x, s, "a")
        second = site(g, first, s, "b")
        return g.call_function(torch.add, (first, second))

    graph, _ = check(write, ShareGathers(), FuseSites(), ScatterInPlace())
    assert targets(graph) == [top_tokens, gather_tokens, scatter_tokens, scatter_tokens, torch.add]
    other, modified = check(lambda g, x, s: write(g, x, s), ScatterInPlace())
    assert modified == [False]
    assert scatter_tokens_ not in targets(other)


def test_the_models_input_is_never_written_into() -> None:
    graph, modified = check(lambda g, x, s: site(g, x, s, "a"), ScatterInPlace())
    assert modified == [False]
    assert scatter_tokens_ not in targets(graph)


def test_a_reader_after_the_scatter_keeps_the_copy() -> None:
    def write(g: fx.Graph, x: fx.Node, s: fx.Node) -> Any:
        first = site(g, x, s, "a")
        second = site(g, first, s, "b", K - 1)
        late = g.call_function(gather_tokens, (first, g.call_function(top_tokens, (s, 1)), "b n c", N))
        return g.call_function(torch.add, (second, late))

    graph, modified = check(write, ScatterInPlace())
    assert modified == [False]
    assert scatter_tokens_ not in targets(graph)


def test_shape_guards_do_not_keep_a_stream() -> None:
    def write(g: fx.Graph, x: fx.Node, s: fx.Node) -> Any:
        first = site(g, x, s, "a")
        g.call_function(expect, (g.call_function(getattr, (first, "shape")), (2, N, 4)))
        return site(g, first, s, "b")

    graph, _ = check(write, ShareGathers(), FuseSites())
    assert targets(graph) == [top_tokens, gather_tokens, scatter_tokens]


def test_a_shape_that_is_used_stays() -> None:
    def write(g: fx.Graph, x: fx.Node, s: fx.Node) -> Any:
        first = site(g, x, s, "a")
        shape = g.call_function(getattr, (first, "shape"))
        return g.call_method("reshape", (site(g, first, s, "b"), shape))

    check(write, ShareGathers(), FuseSites(), ScatterInPlace())


def test_shared_tables_are_gathered_once() -> None:
    def write(g: fx.Graph, x: fx.Node, s: fx.Node) -> Any:
        kept = [g.call_function(top_tokens, (s, K)) for _ in range(2)]
        table = g.call_method("select", (x, 0, 0))
        tables = [g.call_function(gather_each, (table, each, "n c", N)) for each in kept]
        factors = [g.call_function(ops.take_factors, (g.call_function(ops.gate_factor, (s, "sigmoid")), each)) for each in kept]
        return g.call_function(torch.add, (g.call_function(torch.add, tuple(tables)), g.call_function(sum, (factors[0],))))

    graph, modified = check(write, ShareGathers(), ShareGathers())
    assert modified == [True, False]
    found = targets(graph)
    assert [found.count(each) for each in (top_tokens, gather_each, ops.gate_factor, ops.take_factors)] == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_tokens_have_the_dtype_that_the_block_before_returned(dtype: torch.dtype) -> None:
    """Under autocast that may be another than the stream had."""

    def write(g: fx.Graph, x: fx.Node, s: fx.Node) -> Any:
        kept = g.call_function(top_tokens, (s, K))
        tokens = g.call_function(gather_tokens, (x, kept, "b n c", N))
        low = g.call_method("to", (g.call_module("a", (tokens,)), dtype))
        first = g.call_function(scatter_tokens, (x, low, kept, "b n c"))
        again = g.call_function(gather_tokens, (first, kept, "b n c", N))
        return g.call_function(scatter_tokens, (first, g.call_function(torch.tanh, (again,)), kept, "b n c"))

    graph, modified = check(write, ShareGathers(), FuseSites())
    assert modified[-1] and run(graph).dtype == dtype


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda x, mask: mask.__iand__(x > 0), True),
        (lambda x, mask: mask.__ior__(x > 0), True),
        (lambda x, mask: x.__iadd__(1), True),
        (lambda x, mask: x.mul_(2), True),
        (lambda x, mask: x.node.graph.call_function(operator.setitem, (x.node, 0, 1.0)), True),
        (lambda x, mask: torch.add(x, 1, out=x), True),
        (lambda x, mask: functional.relu(x, inplace=True), True),
        (lambda x, mask: functional.relu(x, inplace=False), False),
        (lambda x, mask: x.__getitem__(0), False),
        (lambda x, mask: x.__invert__(), False),
        (lambda x, mask: x + 1, False),
    ],
)
def test_every_way_to_write_is_told_from_a_graph(write: Any, expected: bool) -> None:
    graph = fx.Graph()
    x, mask = (fx.Proxy(graph.placeholder(name)) for name in ("x", "mask"))
    write(x, mask)
    assert any(map(writes, graph.nodes)) == expected
