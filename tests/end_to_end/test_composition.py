"""A specialised model with what users put around it: half precision, LoRA, guidance, offloading."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import ConversionError
from tests.models import CASES, Case, output

CPU = torch.device("cpu")


def trained(
    case: Case, ratio: float | None = None, *, convert: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """A converted model with ratios and routers as training might leave them, or all at one ratio; and inputs for it."""
    model = case.build(0) if convert is None else convert
    inputs = to(case.inputs(model, 2, seed=1, timesteps=case.times(4, [0, 2])), dtype)
    dcs.convert_(model, inputs, dcs.DiffCRConfig(timestep_regions=4, timestep_range=case.timestep_range))
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        table = dcs.ratio_table(model)
        table.copy_(0.8 * torch.rand(table.shape, generator=source) if ratio is None else torch.full_like(table, ratio))
        for router in model.diffcr.routers.values():
            router.weight.copy_(torch.randn(router.weight.shape, generator=source))  # the same draw in every precision
    return model.eval(), inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return output(model(**inputs))


def to(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs as a pipeline in ``dtype`` gives them: timesteps and positions stay as they are."""
    fixed = ("timestep", "img_ids", "txt_ids")
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and k not in fixed else v for k, v in inputs.items()}


@contextmanager
def scores_of(model: nn.Module, given: dict[str, list[Tensor]] | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """Note every router's scores; with ``given``, put those in their place, so that two models keep the same tokens."""
    seen: dict[str, list[Tensor]] = {name: [] for name in model.diffcr.routers}

    def hook(name: str) -> Any:
        def note(router: nn.Module, args: Any, scores: Tensor) -> Tensor:
            seen[name].append(scores)
            return scores if given is None else given[name][len(seen[name]) - 1]

        return note

    handles = [router.register_forward_hook(hook(name)) for name, router in model.diffcr.routers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((one.double() - other.double()).abs().max() / other.abs().max())


# --- half precision --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_in_half_precision_it_computes_the_same(name: str, dtype: torch.dtype, when: str) -> None:
    """Cast before or after `specialize_`: with the tokens kept that single precision keeps, it rounds as a dense model does."""
    model, inputs = trained(CASES[name])
    ratios = dcs.ratio_table(model).detach().clone()
    if when == "before":
        dcs.specialize_(model.to(dtype))
    else:
        dcs.specialize_(model).to(dtype)
    reference = copy.deepcopy(model).float()
    assert {router.weight.dtype for router in model.diffcr.routers.values()} == {dtype}
    assert dcs.ratio_table(model).dtype == torch.float32 and bool(dcs.ratio_table(model).any())
    assert torch.equal(dcs.ratio_table(model), dcs.ratio_table(dcs.specialize_(trained(CASES[name])[0])))
    assert not torch.equal(dcs.ratio_table(model), ratios)
    inputs = to(inputs, dtype)
    single = {k: v.float() if isinstance(v, Tensor) and v.dtype == dtype else v for k, v in inputs.items()}
    with scores_of(reference) as wanted:
        expected = run(reference, single)
    with scores_of(model, wanted) as scores:
        result = run(model, inputs)
    dense = CASES[name].build(0).to(dtype)
    rounding = gap(run(dense, inputs), run(dense.float(), single))
    assert result.dtype == dtype and 0 < gap(result, expected) < 2 * rounding < 0.1
    assert scores.keys() == wanted.keys() and any(scores.values())
    for router in scores:
        for one, other in zip(scores[router], wanted[router], strict=True):
            assert one.dtype == torch.float32 and bool(one.std() > 0.01) and float((one - other).abs().max()) < 0.1
    assert run(model, inputs).isfinite().all()  # on the tokens it keeps by itself


# --- LoRA ------------------------------------------------------------------------------------------------------------
def with_lora(model: nn.Module) -> nn.Module:
    """Add an adapter that changes the output from the start, the same to every model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    return model


LORA = pytest.mark.parametrize("name", ["sd3", "flux"])  # classes with `add_adapter`


@LORA
def test_unmerged_lora_on_a_specialised_model_at_ratio_zero_is_that_on_the_dense_one(name: str) -> None:
    model, inputs = trained(CASES[name], 0.0)
    plain = run(model, inputs)
    with_lora(dcs.specialize_(model))
    assert torch.equal(run(model, inputs), run(with_lora(CASES[name].build(0)), inputs))
    assert not torch.equal(run(model, inputs), plain)
    model.disable_adapters()
    assert torch.equal(run(model, inputs), plain)


@LORA
@pytest.mark.parametrize("when", ["before", "after"])
def test_unmerged_lora_on_a_specialised_model_computes_what_it_did_before(name: str, when: str) -> None:
    """Added before or after `specialize_`, it is what the converted model with the same LoRA gives in `eval()`."""
    converted, inputs = trained(CASES[name], 0.5)
    expected = run(with_lora(converted), inputs)
    model = converted if when == "before" else trained(CASES[name], 0.5)[0]
    dcs.specialize_(model)
    if when == "after":
        run(model, inputs)  # recorded without LoRA
        with_lora(model)
    assert torch.equal(run(model, inputs), expected)
    assert not any("lora" in name for name, _ in model.diffcr.named_parameters())


# --- classifier-free guidance ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "hunyuan"])
@pytest.mark.parametrize("expanded", [False, True], ids=["one timestep each", "expanded scalar"])
def test_both_channels_of_guidance_in_one_batch_equal_them_apart(name: str, expanded: bool) -> None:
    """The same latent twice, with a prompt and without: each keeps the tokens that it keeps alone."""
    case = CASES[name]
    model, inputs = trained(case)
    dcs.specialize_(model)
    time = case.times(4, [2])
    both = {**inputs, "timestep": time[0].expand(2) if expanded else time.repeat(2)}
    both["hidden_states"] = inputs["hidden_states"][:1].repeat(2, *[1] * (inputs["hidden_states"].ndim - 1))
    assert not expanded or both["timestep"].stride() == (0,)
    with scores_of(model) as together:
        result = run(model, both)
    with scores_of(model) as apart:
        parts = [run(model, case.sample(both, index)) for index in range(2)]
    assert gap(result, torch.cat(parts)) < 1e-5 and gap(result[:1], result[1:]) > 1e-3
    differing = False
    for router, (scores,) in ((router, scores) for router, scores in together.items() if scores):
        order = scores.argsort(1)
        assert torch.equal(order, torch.cat(apart[router]).argsort(1))
        differing |= not torch.equal(order[0], order[1])
    assert differing


# --- offloading ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_group_offloading_of_a_model_that_has_answered_a_call(name: str, kind: str) -> None:
    model, inputs = trained(CASES[name])
    expected = run(dcs.specialize_(model), inputs)
    offload(model, kind)
    with scores_of(model) as scores:
        assert torch.equal(run(model, inputs), expected)
    assert any(scores.values())
    if kind == "block_level":  # diffusers replaces the root's forward, and a restored one would be lost
        with pytest.raises(ConversionError, match="forward was replaced on the object itself after the conversion"):
            dcs.restore_(model)


def offload(model: nn.Module, kind: str) -> None:
    model.enable_group_offload(onload_device=CPU, offload_type=kind, num_blocks_per_group=1)
