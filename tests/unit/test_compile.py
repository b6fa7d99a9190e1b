"""``torch.compile`` and ``torch.export`` of specialised models: one graph for each region and shape, no break, the same values."""

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import diffcr_surgery as dcs
from diffcr_surgery.errors import TimestepError, TraceError
from tests.models import CASES, Case, Size, each_case, output

SPOTS = 12
RATIOS = (0.0, 0.5, 0.3)  # of the regions, in turn


class Compiler:
    """A backend that keeps the graphs it was given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def specialised(case: Case, ratios: tuple[float, ...] = RATIOS, regions: int = 3) -> nn.Module:
    model = case.build(0)
    config = dcs.DiffCRConfig(timestep_regions=regions, timestep_range=case.timestep_range)
    dcs.convert_(model, inputs(case, model, 0), config)
    with torch.no_grad():
        for router in model.diffcr.routers.values():
            router.weight.normal_()
        for region in range(regions):
            dcs.ratio_table(model)[:, region] = ratios[region % len(ratios)]
    return dcs.specialize_(model)


def inputs(case: Case, model: nn.Module, *spots: int, size: Size | None = None) -> dict[str, Any]:
    sized = {} if size is None else {"size": size}
    return case.inputs(model, len(spots), 1, timesteps=case.times(SPOTS, list(spots)), **sized)


@each_case
@torch.no_grad()
def test_one_graph_a_region_and_shape_and_no_break(case: Case) -> None:
    model = specialised(case)
    calls = [inputs(case, model, spot, spot) for spot in (0, 5, 11, 1, 4, 10)]
    wanted = [output(model(**call)) for call in calls]
    compiler = Compiler()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for _ in range(2):  # the second time round, nothing is compiled
        assert all(torch.equal(output(compiled(**call)), result) for call, result in zip(calls, wanted, strict=True))
        assert len(compiler.graphs) == 3
    for graph, ratio in zip(compiler.graphs, RATIOS, strict=True):
        assert_whole(graph, model, routed=ratio > 0)
    single = inputs(case, model, 0)
    assert torch.equal(output(compiled(**single)), output(model(**single)))
    assert len(compiler.graphs) == 4
    assert not counters["graph_break"]


def assert_whole(graph: fx.GraphModule, model: nn.Module, *, routed: bool) -> None:
    """It holds every linear layer of the blocks that run, and is no dense fallback."""
    assert any("topk" in str(node.target) for node in graph.graph.nodes) == routed
    given = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    seen = {id(tensor): tensor.numel() for tensor in (*graph.parameters(), *given) if isinstance(tensor, Tensor)}
    assert sum(seen.values()) >= 0.9 * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


@torch.no_grad()
def test_a_batch_of_several_regions_runs_their_graphs() -> None:
    case, compiler = CASES["dit"], Compiler()
    model = specialised(case)
    mixed = inputs(case, model, 0, 5, 11, 0)
    wanted = output(model(**mixed))
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    assert torch.equal(output(compiled(**mixed)), wanted)
    assert torch.equal(output(compiled(**mixed)), wanted)
    assert len(compiler.graphs) == 3 and not counters["graph_break"]


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor_gives_the_same() -> None:
    """For a DiT, the recipe that packages one compares."""
    case = CASES["flux"]
    model = specialised(case, (0.5,), 1)
    call = inputs(case, model, 3, 3)
    wanted = output(model(**call))
    torch.testing.assert_close(output(torch.compile(model, fullgraph=True)(**call)), wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_compiling_in_place_and_copies() -> None:
    case = CASES["dit"]
    model = specialised(case)
    call = inputs(case, model, 5, 5)
    wanted = output(model(**call))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        compiler = Compiler()
        other.compile(fullgraph=True, backend=compiler)
        assert torch.equal(output(other(**call)), wanted)
        assert torch.equal(output(other(**call)), wanted)
        assert len(compiler.graphs) == 1
    assert torch._dynamo.explain(model)(**call).graph_break_count == 0


def test_a_model_in_training_runs_beside_the_compiler() -> None:
    """Once any model is specialised, the others' calls are passed over as well; their values and gradients are what they were."""
    specialised(CASES["dit"])
    case = CASES["pixart"]
    model = case.build(0)
    call = inputs(case, model, 5, 5)
    dcs.convert_(model, call, dcs.DiffCRConfig(initial_ratio=0.25)).train()
    wanted = output(model(**call))
    wanted.sum().backward()
    gradient = dcs.ratio_table(model).grad.clone()
    model.zero_grad()
    found = output(torch.compile(model, backend=Compiler())(**call))
    found.sum().backward()
    assert torch.equal(found, wanted) and torch.equal(dcs.ratio_table(model).grad, gradient)


@each_case
@torch.no_grad()
def test_export_of_one_region(case: Case) -> None:
    model = specialised(case)
    call, other = inputs(case, model, 5, 5), inputs(case, model, 4, 5)
    wanted = [output(model(**each)) for each in (call, other)]
    with dcs.at_timestep(model, case.times(SPOTS, [5])[0].item()):
        program = torch.export.export(model, (), call)
    exported = program.module()
    assert torch.equal(output(exported(**call)), wanted[0])
    torch.testing.assert_close(output(exported(**other)), wanted[1])


@torch.no_grad()
def test_export_says_what_it_needs() -> None:
    case = CASES["dit"]
    model = specialised(case)
    with pytest.raises(TraceError, match=r"has to be recorded on inputs like these before it is exported: call the model once"):
        with dcs.at_timestep(model, 500):
            torch.export.export(model, (), inputs(case, model, 5, 5, 5))
    call = inputs(case, model, 5, 5)
    model(**call)
    with pytest.raises(TimestepError, match=r"no timestep can be read while exporting.*at_timestep\(model, 500\)"):
        torch.export.export(model, (), call)
