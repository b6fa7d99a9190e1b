"""A specialised model whose weights are stored otherwise: quantised by torchao, cast layer by layer, or offloaded in groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import diffcr_surgery as dcs
from diffcr_surgery.errors import ConversionError
from tests.end_to_end.test_composition import gap, offload, run, scores_of, trained
from tests.models import CASES

WHEN = pytest.mark.parametrize("when", ["before converting", "converted", "specialised", "used"])


def put_together(
    name: str, when: str, ratio: float | None, put: Any, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """A specialised model on which ``put`` was called at a given time."""
    dense = CASES[name].build(0).to(dtype)
    if when == "before converting":
        put(dense)
    model, inputs = trained(CASES[name], ratio, convert=dense, dtype=dtype)
    if when == "converted":
        put(model)
    dcs.specialize_(model)
    if when == "used":
        run(model, inputs)
    if when in ("specialised", "used"):
        put(model)
    return model, inputs


def bypassed(model: nn.Module, inputs: dict[str, Any]) -> None:
    """At ratio 0.5, the first block sees the better half of the tokens; the others pass it bit for bit."""
    streams: dict[str, Tensor] = {}
    handles = [
        model.diffcr.routers[row].register_forward_pre_hook(lambda router, args, row=row: streams.update({row: args[0].clone()}))
        for row in "01"
    ]
    with scores_of(model) as scores:
        assert bool(run(model, inputs).isfinite().all())
    for handle in handles:
        handle.remove()
    tokens = model.diffcr.plan.routed_sites[0].tokens
    kept = scores["0"][0].argsort(dim=1, descending=True, stable=True)[:, : tokens // 2]
    moved = (streams["0"] != streams["1"]).any(2)
    assert scores["0"][0].shape == (2, tokens) and bool(scores["0"][0].std() > 0.01)
    assert torch.equal(moved, torch.zeros_like(moved).scatter(1, kept, True))


# --- torchao ---------------------------------------------------------------------------------------------------------
def int8(model: nn.Module) -> None:
    quantize_(model, Int8WeightOnlyConfig())


def int8_activations(model: nn.Module) -> None:
    quantize_(model, Int8DynamicActivationInt8WeightConfig())


@WHEN
@pytest.mark.parametrize("put", [int8, int8_activations], ids=["weights", "activations too"])
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_quantised_linears(name: str, put: Any, when: str) -> None:
    """At ratio 0 bit for bit the quantised dense model; at 0.5 it runs; routers are no linear layers and keep their weights."""
    dense = CASES[name].build(0)
    put(dense)
    model, inputs = put_together(name, when, 0.0, put)
    assert torch.equal(run(model, inputs), run(dense, inputs))
    assert not torch.equal(run(dense, inputs), run(CASES[name].build(0), inputs))
    model, inputs = put_together(name, when, 0.5, put)
    assert all(type(p.data) is Tensor and p.dtype == torch.float32 for p in model.diffcr.parameters())
    assert sum(type(p.data) is not Tensor for p in model.parameters()) >= 12
    bypassed(model, inputs)
    plain, _ = trained(CASES[name], 0.5)
    with scores_of(dcs.specialize_(plain)) as scores:
        expected = run(plain, inputs)
    with scores_of(model, scores):
        assert 0 < gap(run(model, inputs), expected) < 0.3  # on the same tokens, it differs by quantisation


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_quantised_samples_of_two_regions(name: str) -> None:
    model, inputs = put_together(name, "specialised", None, int8)
    parts = [run(model, CASES[name].sample(inputs, index)) for index in range(2)]
    assert gap(run(model, inputs), torch.cat(parts)) < 1e-5


# --- layerwise casting -----------------------------------------------------------------------------------------------
@WHEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_layerwise_casting(name: str, dtype: torch.dtype, when: str) -> None:
    def cast(model: nn.Module) -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)

    dense = CASES[name].build(0).to(dtype)
    cast(dense)
    model, inputs = put_together(name, when, 0.0, cast, dtype)
    assert torch.equal(run(model, inputs), run(dense, inputs))
    model, inputs = put_together(name, when, 0.5, cast, dtype)
    assert {p.dtype for p in model.diffcr.routers.parameters()} == {dtype} and dcs.ratio_table(model).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} >= {torch.float8_e4m3fn, dtype}
    bypassed(model, inputs)
    block = model.transformer_blocks[0]
    assert (block.attn1 if name == "dit" else block.attn).to_q.weight.dtype == torch.float8_e4m3fn


def test_layerwise_cast_samples_of_two_regions() -> None:
    def cast(model: nn.Module) -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    model, inputs = put_together("sd3", "specialised", None, cast)
    parts = [run(model, CASES["sd3"].sample(inputs, index)) for index in range(2)]
    assert gap(run(model, inputs), torch.cat(parts)) < 1e-5


# --- group offloading ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("when", ["converted", "specialised"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_group_offloading_of_a_model_that_has_answered_none(name: str, kind: str, when: str) -> None:
    expected = run(*put_together(name, "specialised", None, lambda model: None))
    model, inputs = put_together(name, when, None, lambda model: offload(model, kind))
    assert torch.equal(run(model, inputs), expected)


def test_group_offloading_before_converting() -> None:
    """Leaf by leaf it can stay; by blocks diffusers replaces the forward of the model itself, and the error says what to take off."""
    expected = run(*put_together("sd3", "specialised", None, lambda model: None))
    assert torch.equal(run(*put_together("sd3", "before converting", None, lambda model: offload(model, "leaf_level"))), expected)
    with pytest.raises(ConversionError, match=r"hooks of accelerate and diffusers.*convert, and add it again"):
        put_together("sd3", "before converting", None, lambda model: offload(model, "block_level"))


def test_a_hook_that_was_taken_off_does_not_hinder_conversion() -> None:
    """diffusers leaves the plain forward behind on the object."""
    model = CASES["sd3"].build(0)
    offload(model, "block_level")
    model._diffusers_hook.remove_hook("group_offloading")
    assert "forward" in vars(model)
    model, inputs = trained(CASES["sd3"], convert=model)
    expected = run(dcs.specialize_(trained(CASES["sd3"])[0]), inputs)
    assert "forward" not in vars(model) and torch.equal(run(dcs.specialize_(model), inputs), expected)
