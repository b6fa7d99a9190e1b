"""Caches of diffusers on routed models: refused where their state would be mixed up, and exact where they are let through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_group_offloading,
    apply_layerwise_casting,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_sea_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, HookRegistry, ModelHook, _set_cache_context
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import diffcr_surgery as dcs
from diffcr_surgery.caches import bare_copy, check_caches, is_quantized, uncached
from diffcr_surgery.errors import ConversionError
from diffcr_surgery.testing.denoisers import Architecture, Block, Denoiser
from tests.end_to_end.test_composition import gap, trained
from tests.models import CASES, output

ENDS = {  # the first and the last block that diffusers' caches find
    "pixart": ("transformer_blocks.0", "transformer_blocks.2"),
    "flux": ("transformer_blocks.0", "single_transformer_blocks.1"),
}
THRESHOLD = 0.2


def routed(name: str = "pixart", *, ends: float = 0.0, inner: float = 0.5) -> tuple[nn.Module, dict[str, Any]]:
    """A specialised model that has answered one call; the first and the last block run at the ratio ``ends``."""
    case = CASES[name]
    model = case.build(0)
    inputs = case.inputs(model, 2, seed=1)
    dcs.convert_(model, inputs, dcs.DiffCRConfig(timestep_range=case.timestep_range))
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        dcs.ratio_table(model).fill_(inner)
        dcs.ratio_table(model)[[0, -1]] = ends
        for router in model.diffcr.routers.values():
            router.weight.normal_(generator=source)
        dcs.specialize_(model)
        model(**inputs)
    return model, inputs


def altered(model: nn.Module) -> dict[str, bool]:
    """Which blocks some tokens bypass."""
    moves = dcs.ratio_table(model).gt(0).any(1).tolist()
    return {site.path: move for site, move in zip(model.diffcr.plan.routed_sites, moves, strict=True)}


def steps(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Inputs of a few denoising steps: small changes, and a large one at the fourth."""
    x, source = inputs["hidden_states"], torch.Generator().manual_seed(3)
    sizes = (0.0, 0.02, 0.04, 2.0, 2.02)
    noise = torch.randn(x.shape, generator=source)
    return [{**inputs, "hidden_states": x + size * noise} for size in sizes]


@contextmanager
def context(model: nn.Module, name: str) -> Iterator[None]:
    """`model.cache_context(name)`, which not all classes have."""
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()  # as `enable_cache` does
    _set_cache_context(model, CacheContext(name))
    try:
        yield
    finally:
        _set_cache_context(model, None)


def run(model: nn.Module, inputs: dict[str, Any], name: str = "cond") -> Tensor:
    with torch.no_grad(), context(model, name):
        return output(model(**inputs))


def parts(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def first_block_cache_by_hand(model: nn.Module, name: str, calls: list[dict[str, Any]]) -> tuple[list[Tensor], list[bool]]:
    """What First-Block-Cache has to compute, said with the whole routed model: the output of each step, and whether it was skipped."""
    first, last = (model.get_submodule(path) for path in ENDS[name])
    kept: dict[str, Any] = {"skips": []}

    def at_first(block: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
        stream = parts(made)[-1]
        residual = stream - (args[0] if args else kwargs["hidden_states"])
        old = kept.get("residual")
        kept["first"] = parts(made)
        kept["skip"] = old is not None and float((residual - old).abs().mean() / old.abs().mean()) <= THRESHOLD
        kept["skips"].append(kept["skip"])
        if not kept["skip"]:
            kept["residual"] = residual

    def at_last(block: nn.Module, args: Any, kwargs: Any, made: Any) -> Any:
        if not kept["skip"]:
            kept["rest"] = [a - b for a, b in zip(parts(made), kept["first"], strict=True)]
            return None
        result = tuple(a + b for a, b in zip(kept["rest"], kept["first"], strict=True))
        return result if isinstance(made, tuple) else result[0]

    handles = [first.register_forward_hook(at_first, with_kwargs=True), last.register_forward_hook(at_last, with_kwargs=True)]
    results = [run(model, call) for call in calls]
    for handle in handles:
        handle.remove()
    return results, kept["skips"]


@pytest.mark.parametrize("name", ENDS)
def test_first_block_cache_is_exact_where_first_and_last_block_keep_all_tokens(name: str) -> None:
    model, inputs = routed(name)
    expected, skips = first_block_cache_by_hand(model, name, steps(inputs))
    plain = [run(model, call) for call in steps(inputs)]
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=THRESHOLD))
    check_caches(model, altered(model))
    actual = [run(model, call) for call in steps(inputs)]
    assert skips == [False, True, True, False, True] and any(altered(model).values())
    for one, other, dense, skip in zip(actual, expected, plain, skips, strict=True):
        assert torch.equal(one, other) and torch.equal(one, dense) != skip


def test_mag_cache_is_exact_there_too() -> None:
    model, inputs = routed()
    first, last = (model.get_submodule(path) for path in ENDS["pixart"])
    seen: dict[str, Any] = {}
    handles = [
        first.register_forward_pre_hook(lambda block, args: seen.update(given=args[0])),
        last.register_forward_hook(lambda block, args, made: seen["given"] + seen["rest"] if "rest" in seen else None),
    ]
    keep = last.register_forward_hook(lambda block, args, made: seen.update(made=made))
    expected = []
    for index, call in enumerate(steps(inputs)):  # at most one step in a row is skipped: every second
        if index % 2 == 0:
            seen.pop("rest", None)
        expected.append(run(model, call))
        seen["rest"] = seen["made"] - seen["given"]
    for handle in (*handles, keep):
        handle.remove()
    ones = MagCacheConfig(max_skip_steps=1, retention_ratio=0.0, num_inference_steps=5, mag_ratios=[1.0] * 5)
    apply_mag_cache(model, ones)
    check_caches(model, altered(model))
    actual = [run(model, call) for call in steps(inputs)]
    assert all(map(torch.equal, actual, expected))


def test_the_two_channels_of_guidance_keep_states_of_their_own() -> None:
    cond, inputs = routed()
    calls = steps(inputs)
    uncond = [{**call, "encoder_hidden_states": torch.zeros_like(call["encoder_hidden_states"])} for call in reversed(calls)]
    wanted, _ = first_block_cache_by_hand(cond, "pixart", calls)
    wanted_uncond, skips = first_block_cache_by_hand(cond, "pixart", uncond)
    apply_first_block_cache(cond, FirstBlockCacheConfig(threshold=THRESHOLD))
    for index, pair in enumerate(zip(uncond, calls, strict=True)):
        assert torch.equal(run(cond, pair[0], "uncond"), wanted_uncond[index])
        assert torch.equal(run(cond, pair[1], "cond"), wanted[index])
    assert any(skips)


def _pyramid(model: nn.Module) -> None:
    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(model, config)


def _faster(model: nn.Module) -> None:
    config = FasterCacheConfig(current_timestep_callback=lambda: 500, tensor_format="BCHW", is_guidance_distilled=True)
    apply_faster_cache(model, config)


def _taylor(model: nn.Module) -> None:
    apply_taylorseer_cache(model, TaylorSeerCacheConfig(cache_identifiers=[r".*\.attn1"]))


def _first_block(model: nn.Module) -> None:
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=THRESHOLD))


def _mag(model: nn.Module) -> None:
    apply_mag_cache(model, MagCacheConfig(num_inference_steps=5, mag_ratios=[1.0] * 5))


def _sea(model: nn.Module) -> None:
    apply_sea_cache(model, SeaCacheConfig(raw_vision_callback=lambda module, args, kwargs: None))


INSIDE: list[tuple[Callable[[nn.Module], None], str]] = [
    (_pyramid, "pyramid_attention_broadcast"),
    (_faster, "faster_cache_block"),
    (_taylor, "taylorseer_cache"),
]
STACKS: list[tuple[Callable[[nn.Module], None], str]] = [
    (_first_block, "fbc_leader_block_hook"),
    (_mag, "mag_cache_leader_block_hook"),
    (_sea, "sea_cache_leader_block"),
]


@pytest.mark.parametrize(("put", "cache"), INSIDE, ids=[name for _, name in INSIDE])
def test_a_cache_inside_a_block_is_refused_where_tokens_bypass(put: Callable[[nn.Module], None], cache: str) -> None:
    model, _ = routed()
    put(model)
    wanted = (
        rf"^The cache '{cache}' \(\w+\) sits on transformer_blocks\.1\.attn1 and keeps its state from one step to the next, but "
        r"tokens bypass transformer_blocks\.1, other ones at each step.*\. Take it off \(model\.disable_cache\(\)\), or leave this "
        r"block out with DiffCRConfig\(blocks=\.\.\.\)"
    )
    with pytest.raises(ConversionError, match=wanted):
        check_caches(model, altered(model))
    check_caches(model, dict.fromkeys(altered(model), False))


@pytest.mark.parametrize(("put", "cache"), STACKS, ids=[name for _, name in STACKS])
def test_a_cache_of_a_stack_is_refused_where_tokens_bypass_an_end(put: Callable[[nn.Module], None], cache: str) -> None:
    model, _ = routed()
    put(model)
    check_caches(model, altered(model))
    for path, name in zip(ENDS["pixart"], (cache, cache.replace("leader_", "")), strict=True):
        way_out = rf"convert with a DiffCRConfig\(blocks=\.\.\.\) that does not match {path}, or set its ratios to 0"
        with pytest.raises(ConversionError, match=rf"^The cache '{name}' \(\w+\) sits on {path} .* {way_out}"):
            check_caches(model, altered(model) | {path: True})


@pytest.mark.parametrize(("put", "cache"), INSIDE[:1] + STACKS, ids=[name for _, name in INSIDE[:1] + STACKS])
def test_no_cache_is_let_through_where_a_call_is_split(put: Callable[[nn.Module], None], cache: str) -> None:
    model, _ = routed()
    check_caches(model, altered(model), parts=2)
    put(model)
    with pytest.raises(
        ConversionError, match=r"run in 2 parts, and the cache '\w+' \(\w+\) on [\w.]+( model)? would take each part for a step"
    ):
        check_caches(model, dict.fromkeys(altered(model), False), parts=2)


def test_a_cache_around_a_block_is_refused() -> None:
    model, _ = routed()
    model.shell = nn.Sequential(model.transformer_blocks[0])
    config = TaylorSeerCacheConfig(cache_identifiers=["shell"])
    apply_taylorseer_cache(model, config)
    with pytest.raises(
        ConversionError, match=r"'taylorseer_cache' \(TaylorSeerCacheHook\) sits around shell\.0, which a converted model calls"
    ):
        check_caches(model, {"shell.0": False})
    check_caches(model, altered(model))


def test_a_users_own_stateful_hook_is_refused_and_other_hooks_are_not() -> None:
    class Stateful(ModelHook):
        _is_stateful = True

    model, _ = routed()
    block = model.transformer_blocks[1]
    HookRegistry.check_if_exists_or_initialize(block.ff).register_hook(ModelHook(), "harmless")
    check_caches(model, altered(model), parts=2)
    HookRegistry.check_if_exists_or_initialize(block.ff).register_hook(Stateful(), "mine")
    with pytest.raises(ConversionError, match=r"^The cache 'mine' \(Stateful\) sits on transformer_blocks\.1\.ff and"):
        check_caches(model, altered(model))
    block.ff._diffusers_hook.remove_hook("mine")
    check_caches(model, altered(model), parts=2)


@pytest.mark.parametrize("put", [_first_block, _mag, _pyramid, _taylor], ids=lambda put: put.__name__.strip("_"))
def test_uncached_runs_change_no_state(put: Callable[[nn.Module], None]) -> None:
    """A cached run before and after; in between, calls that must neither be skipped nor counted."""
    calls = steps(routed()[1])
    results = []
    for between in (False, True):
        model, _ = routed(inner=0.0)
        plain = run(model, calls[3])
        put(model)
        made = [run(model, calls[0])]
        if between:
            with uncached(model), torch.no_grad():
                assert torch.equal(output(model(**calls[3])), plain)
            with pytest.raises(RuntimeError, match="stop"), uncached(model):
                raise RuntimeError("stop")
        results.append(made + [run(model, call) for call in calls[1:]])
    assert all(map(torch.equal, *results))
    assert any(not torch.equal(one, run(routed(inner=0.0)[0], call)) for one, call in zip(results[0], calls, strict=True))


@pytest.mark.parametrize("kind", ["casting", "offloading"])
def test_a_bare_copy_has_no_hooks_and_the_weights_that_compute(kind: str) -> None:
    block = CASES["pixart"].build(0).transformer_blocks[0]
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    if kind == "casting":
        apply_layerwise_casting(block, torch.float8_e4m3fn, torch.float32)
    else:
        apply_group_offloading(block, torch.device("cpu"), offload_type="leaf_level")
    twin = bare_copy(block, torch.device("cpu"))
    x, text, t = torch.randn(2, 4, 16), torch.randn(2, 3, 16), torch.randn(2, 96)
    with torch.no_grad():
        result = twin(x, encoder_hidden_states=text, timestep=t)
        assert torch.equal(result, block(x, encoder_hidden_states=text, timestep=t))
        for p in twin.parameters():
            p.zero_()
        assert not torch.equal(result, twin(x, encoder_hidden_states=text, timestep=t))
        assert torch.equal(result, block(x, encoder_hidden_states=text, timestep=t))
    assert not any({"_diffusers_hook", "forward"} & vars(module).keys() for module in twin.modules())
    assert all("_diffusers_hook" in vars(module) for module in block.modules() if isinstance(module, nn.Linear))
    stored = {name: p.dtype for name, p in block.named_parameters()}
    assert stored.keys() == before.keys() and (torch.float8_e4m3fn in stored.values()) == (kind == "casting")
    assert {p.dtype for p in twin.parameters()} == {torch.float32}


def test_a_bare_copy_of_a_block_without_hooks_is_a_plain_copy() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    HookRegistry.check_if_exists_or_initialize(block)  # an empty registry, as `cache_context` leaves it on a model
    block.forward = lambda x: x  # another library's
    twin = bare_copy(block, torch.device("cpu"))
    assert torch.equal(twin.forward(torch.ones(1)), torch.ones(1)) and torch.equal(twin[0].weight, block[0].weight)


def test_a_bare_copy_has_what_a_run_left_on_the_block_without_its_graph() -> None:
    """An attention map, wherever it is kept, or the weight that torch's first weight norm makes of two."""
    block = nn.Sequential(nn.Linear(4, 4))
    made = block(torch.ones(2, 4))
    block.map, block[0].kept = made, {"maps": [made]}
    twin = bare_copy(block, torch.device("cpu"))
    assert twin.map is twin[0].kept["maps"][0] and twin.map is not made
    assert torch.equal(twin.map, made) and not twin.map.requires_grad and made.requires_grad


def test_a_block_that_keeps_its_attention_map_is_routed() -> None:
    class Keeping(Block):
        def _attend(self, *args: Any) -> Tensor:
            self.attention = super()._attend(*args)
            return self.attention

    model = Denoiser(Architecture())
    model.blocks[0] = Keeping(Architecture())
    assert dcs.plan(model, {"latent": torch.randn(2, 5, 4)}).sites[0].routed
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.blocks[0].mlp[0])
    assert dcs.plan(model, {"latent": torch.randn(2, 5, 4)}).sites[0].routed


# --- caches in real calls --------------------------------------------------------------------------------------------
def cold(name: str) -> nn.Module:
    """A specialised model that has answered no call."""
    model, _ = routed(name)
    model.diffcr.recordings = type(model.diffcr.recordings)()
    return model


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_first_block_cache_is_exact_from_the_first_call_on(name: str) -> None:
    """The first call of a shape records the model by running it thrice, which the cache must not see."""
    model, inputs = routed(name)
    expected, skips = first_block_cache_by_hand(model, name, steps(inputs))
    model = cold(name)
    _first_block(model)
    actual = []
    for index, call in enumerate(steps(inputs)):
        if index in (1, 3):  # as at a new shape: recorded where the cache skips, and where it does not
            model.diffcr.recordings = type(model.diffcr.recordings)()
        actual.append(run(model, call))
    assert skips == [False, True, True, False, True] and all(map(torch.equal, actual, expected))


def test_a_call_refuses_caches_that_routing_would_mix_up() -> None:
    model, inputs = routed(ends=0.5)
    _first_block(model)
    with pytest.raises(ConversionError, match=r"^The cache 'fbc_leader_block_hook'"):
        run(model, inputs)
    model, inputs = routed()
    _pyramid(model)
    with pytest.raises(ConversionError, match=r"sits on transformer_blocks\.1\.attn1"):
        model(**inputs)


def test_a_call_of_two_regions_refuses_any_cache() -> None:
    case = CASES["pixart"]
    model, inputs = trained(case)
    with torch.no_grad():
        dcs.ratio_table(model)[[0, -1]] = 0.0
        dcs.ratio_table(model)[1] = torch.tensor([0.2, 0.3, 0.4, 0.5])
    dcs.specialize_(model)
    _first_block(model)
    with pytest.raises(ConversionError, match=r"run in 2 parts, and the cache"):
        run(model, inputs)
    one = {**inputs, "timestep": case.times(4, [2, 2])}
    assert bool(run(model, one).isfinite().all())


@pytest.mark.parametrize("gate", ["doubled_sigmoid", "sigmoid"])
def test_a_gate_that_acts_at_ratio_zero_counts_as_alteration(gate: str) -> None:
    case = CASES["pixart"]
    model = case.build(0)
    inputs = case.inputs(model, 2, seed=1)
    dcs.specialize_(dcs.convert_(model, inputs, dcs.DiffCRConfig(timestep_range=case.timestep_range, gate=gate)))
    _first_block(model)
    refusal = pytest.raises(ConversionError, match=r"^The cache 'fbc_leader_block_hook'")
    with refusal if gate == "sigmoid" else nullcontext():
        run(model, inputs)


def test_a_bare_copy_of_a_quantised_block_has_plain_weights_near_its_own() -> None:
    block = nn.Sequential(nn.Linear(32, 32))
    plain = block[0].weight.detach().clone()
    quantize_(block, Int8WeightOnlyConfig())
    twin = bare_copy(block, torch.device("cpu"))
    assert is_quantized(block[0].weight) and not is_quantized(twin[0].weight) and not is_quantized(plain)
    assert type(twin[0].weight) is nn.Parameter and 0 < gap(twin[0].weight.detach(), plain) < 0.01
