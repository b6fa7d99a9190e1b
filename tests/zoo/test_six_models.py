"""The six classes at tiny sizes: what is routed, and that a converted model is still the model it was."""

import copy
import functools
import inspect
import pickle
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from torch import nn

import diffcr_surgery as dcs
from tests.models import CASES, DEFAULT, WIDE, Case, Size, each_case, output

from_diffusers = pytest.mark.parametrize("case", [case for case in CASES.values() if case.name != "timm_dit"], ids=lambda case: case.name)


def config(case: Case, **changes: Any) -> dcs.DiffCRConfig:
    return dcs.DiffCRConfig(**{"target_ratio": 0.3, "timestep_regions": 4, "timestep_range": case.timestep_range} | changes)


def converted(case: Case, ratio: float = 0.3, **options: Any) -> nn.Module:
    """A converted model with routers that differ between tokens and every ratio alike."""
    model = case.build(0, **options)
    dcs.convert_(model, case.inputs(model, 2, 1), config(case))
    with torch.no_grad():
        dcs.ratio_table(model).fill_(ratio)
        for router in model.diffcr.routers.values():
            nn.init.normal_(router.weight, std=0.5)
    return model


def double(result: Any) -> Any:
    return tuple(map(double, result)) if isinstance(result, tuple) else 2 * result


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return output(model(**inputs))


@each_case
def test_every_block_of_the_stream_is_routed(case: Case) -> None:
    model = case.build(0)
    plan = dcs.plan(model, case.inputs(model, 2, 1), config(case))
    assert tuple((site.path, site.block_class) for site in plan.routed_sites) == case.sites
    assert plan.routed_sites == tuple(site for site in plan.sites if site.routed)


@each_case
def test_plan_says_what_moves_with_the_tokens(case: Case) -> None:
    """With as many words as tokens, so that lengths do not tell the prompt from the image."""
    size = DEFAULT._replace(text=DEFAULT.tokens)
    model = case.build(0, size=size)
    plan = dcs.plan(model, case.inputs(model, 2, 1, size=size), config(case))
    for site in plan.routed_sites:
        moving = {name for name, axes in site.aligned.items() if {"n", "m+n"} & set(axes.split())}
        assert {name.split(".")[0] for name in moving} - {case.stream} <= set(case.moved)
        assert case.stream in moving
        for name, axes in case.moved.items():
            found = {key: value for key, value in site.aligned.items() if key.split(".")[0] == name}
            wanted = "m+n" if "m+n" in axes else "n"
            assert all(wanted in value.split() for value in found.values())
            assert found or name == "skip"  # the first half of a U has no skip


@each_case
def test_plan_prints_as_a_table(case: Case) -> None:
    model = case.build(0)
    head, *rows = str(dcs.plan(model, case.inputs(model, 2, 1), config(case))).splitlines()
    count = len(case.sites)
    for word in (case.cls.__name__, f"{count} of {count} blocks routed", "0.3", "4 timestep regions", repr(case.timestep)):
        assert word in head
    assert f"[0, {case.timestep_range[1]:g}]" in head
    for number, (path, block) in enumerate(case.sites):
        (row,) = (row for row in rows if f" {path} " in row)
        for word in (f"{number} ", f" {block} ", f" {DEFAULT.tokens} ", f" {case.stream}: b n c", "proven, error"):
            assert word in row
    assert all(any(argument in row for row in rows) for argument in case.moved)


@each_case
def test_timestep_and_range_are_read_off_the_example(case: Case) -> None:
    """`auto` puts the ends of the class's own range into the first and the last region."""
    model = case.build(0)
    auto = {"timestep_argument": "auto", "timestep_range": "auto"}
    dcs.convert_(model, case.inputs(model, 3, 1), config(case, **auto))
    model.train()
    for spot, region in ((0, 0), (11, 3)):
        model.zero_grad()
        output(model(**case.inputs(model, 1, 1, timesteps=case.times(12, [spot])))).square().sum().backward()
        seen = dcs.ratio_table(model).grad.abs().sum(dim=0) > 0
        assert seen.tolist() == [index == region for index in range(4)]


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_trace_equals_the_model(case: Case, training: bool) -> None:
    """On the recorded inputs, on fresh ones, and on other batches and sizes."""
    model = case.build(0).train(training)
    recorded = dcs.trace(model, case.inputs(model, 2, 1))
    others = [DEFAULT, Size(WIDE.rows, WIDE.columns, DEFAULT.text)] if WIDE in case.sizes else [DEFAULT]
    for batch, seed in ((2, 1), (2, 5), (3, 6), (1, 7)):
        for size in others:
            inputs = case.inputs(model, batch, seed, size=size)
            torch.manual_seed(seed)
            expected = model(**inputs)
            torch.manual_seed(seed)
            actual = recorded.run(**inputs)
            assert type(actual) is type(expected)
            assert torch.equal(output(actual), output(expected))


@each_case
def test_trace_shows_one_node_per_block(case: Case) -> None:
    model = case.build(0)
    graph = dcs.trace(model, case.inputs(model, 2, 1)).graph
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    assert [target for target in calls if target in dict(case.sites)] == [path for path, _ in case.sites]


@each_case
def test_captured_inputs_serve_as_examples(case: Case) -> None:
    model = case.build(0)
    with dcs.capture_inputs(model) as seen:
        model(**case.inputs(model, 2, 1))
    assert len(dcs.plan(model, seen.inputs, config(case)).routed_sites) == len(case.sites)


@each_case
def test_converted_model_is_still_the_model(case: Case) -> None:
    original, model = case.build(0), converted(case)
    assert isinstance(model, case.cls)
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    keys = list(model.state_dict())
    assert [key for key in keys if not key.startswith("diffcr.")] == list(original.state_dict())
    routers = {f"diffcr.routers.{index}.weight" for index in range(len(case.sites))}
    assert {key for key in keys if key.startswith("diffcr.")} == {"diffcr.ratio_table", "diffcr.site_costs", *routers}
    assert [name for name, _ in model.named_modules() if not name.startswith("diffcr")] == [name for name, _ in original.named_modules()]


@each_case
def test_sizes_other_than_the_planned_are_recorded_anew(case: Case) -> None:
    model, original = converted(case, ratio=0.0), case.build(0)
    for size in [size for size in case.sizes if case.resizable]:
        inputs = case.inputs(model, 3, 9, size=size)
        assert torch.equal(run(model, inputs), run(original, inputs))


@each_case
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["c", "p"])
def test_copies_work_and_are_independent(case: Case, copied: Any) -> None:
    model = converted(case)
    inputs = case.inputs(model, 2, 4)
    expected = run(model, inputs)
    twin = copied(model)
    assert torch.equal(run(twin, inputs), expected)
    with torch.no_grad():
        dcs.ratio_table(twin).fill_(0.7)
    assert not torch.equal(run(twin, inputs), expected)
    assert torch.equal(run(model, inputs), expected)
    dcs.restore_(twin)
    assert type(twin) is case.cls


@from_diffusers  # the demo's DiT embeds its timesteps in float32 whatever its weights are
def test_bfloat16(case: Case) -> None:
    """Casting a converted model is casting the original, and routing goes on in the new type."""

    def halved(inputs: dict[str, Any]) -> dict[str, Any]:
        floats = {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
        return inputs | {name: value.bfloat16() for name, value in floats.items()}

    original, model = case.build(0).bfloat16(), converted(case, ratio=0.0)
    first = run(model, case.inputs(model, 2, 4))
    model.bfloat16()
    inputs = halved(case.inputs(original, 2, 4))
    assert first.dtype == torch.float32
    assert torch.equal(run(model, inputs), run(original, inputs))
    with torch.no_grad():
        dcs.ratio_table(model).fill_(0.5)
    routed = run(model, inputs)
    assert routed.dtype == torch.bfloat16
    assert routed.isfinite().all()
    assert not torch.equal(routed, run(original, inputs))


@from_diffusers
def test_saved_model_loads_as_its_own_class(case: Case, tmp_path: Path) -> None:
    """The folder is a plain model folder: any diffusers loads it; the adapter brings the routing back."""
    # Weights read from a file lie at other addresses, from which matrix products may round differently.
    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    model = converted(case)
    inputs = case.inputs(model, 2, 4)
    model.save_pretrained(tmp_path / "model")
    dcs.save_adapter(model, tmp_path / "adapter")
    for load in (case.cls.from_pretrained, diffusers.AutoModel.from_pretrained):
        loaded = load(str(tmp_path / "model"))
        assert type(loaded) is case.cls
        close(run(loaded, inputs), run(case.build(0), inputs))
    dcs.load_adapter_(loaded, tmp_path / "adapter", inputs)
    close(run(loaded, inputs), run(model, inputs))


@each_case
def test_hooks_keep_firing(case: Case) -> None:
    """Hooks set before and after conversion, on the model, on blocks and inside them."""
    fired: list[str] = []
    model = case.build(0)
    path = case.sites[-1][0]
    inside = next(name for name, _ in model.named_modules() if name.startswith(path) and "norm" in name)

    def watch(name: str, when: str) -> None:
        model.get_submodule(name).register_forward_hook(lambda *_: fired.append(f"{when} {name}"))

    for name in ("", path, inside):
        watch(name, "before")
    dcs.convert_(model, case.inputs(model, 2, 1), config(case))
    with torch.no_grad():
        dcs.ratio_table(model).fill_(0.4)
    for name in ("", path, inside):
        watch(name, "after")
    fired.clear()
    run(model, case.inputs(model, 2, 1))
    assert set(fired) == {f"{when} {name}" for when in ("before", "after") for name in ("", path, inside)}
    assert fired.count("before ") == fired.count("after ") == 1


@each_case
def test_hook_that_changes_a_block_takes_effect(case: Case) -> None:
    model = converted(case)
    inputs = case.inputs(model, 2, 1)
    before = run(model, inputs)
    block = model.get_submodule(case.sites[0][0])
    with block.register_forward_hook(lambda _, args, out: double(out)):
        assert not torch.equal(run(model, inputs), before)
    assert torch.equal(run(model, inputs), before)


@each_case
@pytest.mark.parametrize("first", ["lora", "conversion"])
def test_lora(case: Case, first: str) -> None:
    """LoRA layers work inside the blocks, whether they come before the conversion or after it."""
    lora = peft.LoraConfig(r=2, target_modules=list(case.attention), init_lora_weights=False)

    def inject(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return peft.inject_adapter_in_model(lora, model)

    original = inject(case.build(0, label_dropout=False))
    model = case.build(0, label_dropout=False)
    steps = [inject, lambda model: dcs.convert_(model, case.inputs(model, 2, 1), config(case))]
    for step in steps if first == "lora" else reversed(steps):
        step(model)
    inputs = case.inputs(model, 2, 3)
    assert torch.equal(run(model, inputs), run(original, inputs))
    assert not torch.equal(run(model, inputs), run(case.build(0), inputs))
    with torch.no_grad():
        dcs.ratio_table(model).fill_(0.25)
    output(model.train()(**inputs)).square().sum().backward()
    layers = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert layers and all(parameter.grad.any() for parameter in layers)
