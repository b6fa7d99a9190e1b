"""LoRA by peft, on attention: added before or after the conversion, trained with the routers, saved apart from them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import ConversionError
from tests.models import CASES, output

ADDED = CASES["sd3"]  # a class with `add_adapter`
WRAPPED = CASES["pixart"]  # one without, that peft wraps
BATCH = 4
WAYS = ["before", "after", "wrapped"]


def lora(*, awake: bool = True) -> LoraConfig:
    """Rank 32; awake, its weights are such that it changes the output from the start."""
    return LoraConfig(r=32, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=not awake)


def config() -> dcs.DiffCRConfig:
    return dcs.DiffCRConfig(target_ratio=0.4, timestep_regions=4, timestep_range=(0, 1000))


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def plain(way: str) -> tuple[nn.Module, dict[str, Any]]:
    case = WRAPPED if way == "wrapped" else ADDED
    model = case.build(0)
    return model, case.inputs(model, BATCH, seed=1)


def with_lora(model: nn.Module, way: str, *, awake: bool = True) -> nn.Module:
    with seeded():
        if way == "wrapped":
            return get_peft_model(model, lora(awake=awake))  # type: ignore[return-value,arg-type]
        model.add_adapter(lora(awake=awake))
    return model


def both(way: str, *, awake: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """A model with LoRA, converted before or after, with all that is to be trained trainable."""
    model, inputs = plain(way)
    if way == "before":
        return dcs.convert_(with_lora(model, way, awake=awake), inputs, config()), inputs
    model = with_lora(dcs.convert_(model, inputs, config()), way, awake=awake)
    model.diffcr.requires_grad_(True)  # peft has frozen all but its own
    return model, inputs


def routed(model: nn.Module) -> nn.Module:
    """Give the routers and ratios values as training would."""
    state = model.diffcr
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        dcs.ratio_table(model).copy_(0.8 * torch.rand(state.ratio_table.shape, generator=source))
        for router in state.routers.values():
            router.weight.normal_(generator=source)
    return model


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return output(model(**inputs))


each_way = pytest.mark.parametrize("way", WAYS)


@each_way
def test_at_ratio_zero_nothing_changes(way: str) -> None:
    """Outputs and LoRA's gradients, bit for bit; routers carry no LoRA of their own."""
    unconverted, inputs = plain(way)
    unconverted = with_lora(unconverted, way)
    converted, _ = both(way)
    results = []
    for model in (unconverted, converted):
        model.zero_grad()
        result = output(model(**inputs))
        result.square().mean().backward()
        results.append((result, {n: p.grad for n, p in model.named_parameters() if "lora_" in n}))
    (expected, wanted), (actual, gradients) = results
    assert torch.equal(actual, expected) and wanted.keys() == gradients.keys() and len(wanted) >= 24
    assert all(torch.equal(gradients[name], wanted[name]) and bool(wanted[name].any()) for name in wanted)


@pytest.mark.parametrize("way", ["after", "wrapped"])
def test_routers_frozen_by_peft_are_named_and_thawed_by_one_call(way: str) -> None:
    model, inputs = plain(way)
    model = with_lora(dcs.convert_(model, inputs, config()), way)
    assert not any(p.requires_grad for p in model.diffcr.parameters())
    with pytest.raises(ConversionError, match=r"routers are frozen.*LoRA.*call model\.diffcr\.requires_grad_\(True\) afterwards"):
        dcs.parameter_groups(model, lr=1e-3)
    model.diffcr.requires_grad_(True)
    groups = {group["name"]: group["params"] for group in dcs.parameter_groups(model, lr=1e-3, ratio_lr=1e-2)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {name for group in groups.values() for name in (names[id(p)] for p in group)} == {
        name for name, p in model.named_parameters() if "lora_" in name or "diffcr." in name
    }
    assert groups["ratios"] == [model.diffcr.ratio_table] and len(groups["routers"]) == 3


@each_way
def test_training_moves_lora_routers_and_ratios_and_not_the_backbone(way: str) -> None:
    model, inputs = both(way, awake=False)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = 4
    optimizer = torch.optim.AdamW(dcs.parameter_groups(model, lr=1e-2, weight_decay=0.1))
    ratios = dcs.RatioOptimizer(model, total_steps=steps)
    target = torch.randn_like(output(model(**inputs)))
    for _ in range(steps):
        (output(model(**inputs)) - target).square().mean().backward()
        for each in (optimizer, ratios):
            each.step()
            each.zero_grad()
    for name, p in model.named_parameters():
        moves = "lora_" in name or "diffcr." in name
        assert torch.equal(p, before[name]) != moves, name
    assert float(dcs.ratio_table(model).detach().mean()) == pytest.approx(0.4, abs=1e-5)


@pytest.mark.parametrize("first", ["lora", "ours"])
def test_lora_and_our_adapter_are_saved_and_loaded_apart(first: str, tmp_path: Path) -> None:
    trained, inputs = both("after")
    routed(trained)
    trained.save_lora_adapter(tmp_path / "lora")
    dcs.save_adapter(trained, tmp_path / "ours")
    fresh = ADDED.build(0)

    def load_lora() -> None:
        fresh.load_lora_adapter(
            tmp_path / "lora", prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
        )  # fmt: skip

    if first == "lora":
        load_lora()
    dcs.load_adapter_(fresh, tmp_path / "ours", inputs)
    if first == "ours":
        load_lora()
    assert torch.equal(run(fresh, inputs), run(trained, inputs))
    assert not torch.equal(run(trained, inputs), run(ADDED.build(0), inputs))


def test_a_peft_checkpoint_holds_lora_alone(tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    trained, inputs = both("wrapped")
    routed(trained)
    trained.save_pretrained(tmp_path / "lora")
    dcs.save_adapter(trained, tmp_path / "ours")
    assert all("lora_" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    fresh = PeftModel.from_pretrained(dcs.load_adapter_(WRAPPED.build(0), tmp_path / "ours", inputs), tmp_path / "lora")
    assert torch.equal(run(fresh, inputs), run(trained, inputs))


@each_way
def test_merged_it_computes_the_same(way: str) -> None:
    model, inputs = both(way)
    expected = run(routed(model), inputs)
    if way == "wrapped":
        model = model.merge_and_unload()
        assert not any("lora_" in name for name, _ in model.named_parameters())
    else:
        model.fuse_lora()
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)
    dcs.specialize_(model)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)


@each_way
def test_specialised_with_lora_unmerged(way: str) -> None:
    model, inputs = both(way)
    expected = run(routed(model).eval(), inputs)
    dcs.specialize_(model)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-6, atol=1e-6)


def test_lora_is_switched_off_and_on_under_recordings_made_before() -> None:
    model, inputs = both("after")
    with_it = run(model, inputs)
    model.disable_adapters()
    assert torch.equal(run(model, inputs), run(ADDED.build(0), inputs))
    model.enable_adapters()
    assert torch.equal(run(model, inputs), with_it)


def test_restored_it_keeps_its_lora() -> None:
    for way in WAYS:
        model, inputs = both(way)
        with_it = run(copy.deepcopy(model), inputs)
        if way == "wrapped":
            with pytest.raises(ConversionError, match="wraps a converted model; give restore_ the model itself"):
                dcs.restore_(model)
        dcs.restore_(model.get_base_model() if way == "wrapped" else model)
        assert not hasattr(model, "diffcr") and torch.equal(run(model, inputs), with_it)
