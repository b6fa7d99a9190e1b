"""Broken numbers: an error that names where, or what the original model makes of them; never other tokens without a word."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import NonFiniteError, TimestepError
from tests.models import CASES, DEFAULT, Case, Size, output, snapshot
from tests.property.scenarios import kept_count, top_tokens

NAN, INFINITY = float("nan"), float("inf")
BROKEN = (NAN, INFINITY, -INFINITY, 1e38, -1e38)  # the last two overflow in the first product
ODD = (-0.0, 1e-40, -1e-45)
PRIMES = (1, 2, 3, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (5, 7, 13)))

each_case = pytest.mark.parametrize("name", CASES)


@cache
def converted(name: str, ratio: float, regions: int = 2, text: int = 5) -> nn.Module:
    """A model with routers that have an opinion, never called; take a copy."""
    case = CASES[name]
    size = Size(text=text)
    model = case.build(0, size=size, label_dropout=False)
    config = dcs.DiffCRConfig(target_ratio=0.3, timestep_regions=regions, timestep_range=case.timestep_range)
    dcs.convert_(model, case.inputs(model, 2, 1, size=size), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in model.diffcr.routers.values():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        dcs.ratio_table(model).fill_(ratio)
    return model


@cache
def dense(name: str, text: int = 5) -> nn.Module:
    return CASES[name].build(0, size=Size(text=text), label_dropout=False)


def in_state(model: nn.Module, state: str) -> nn.Module:
    """Return a copy in training, in eval, or specialised."""
    twin = copy.deepcopy(model)
    return dcs.specialize_(twin) if state == "specialised" else twin.train(state == "training")


def answer(model: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return output(model(**given))


def inputs(name: str, *regions: int, count: int = 2, size: Size = DEFAULT) -> dict[str, Any]:
    """Draw inputs for samples in these of `count` regions."""
    case = CASES[name]
    return case.inputs(dense(name), len(regions), 5, timesteps=case.times(count, list(regions)), size=size)


def floats(name: str) -> list[str]:
    """Names of the inputs that take any number."""
    return [key for key, value in inputs(name, 0, 1).items() if isinstance(value, Tensor) and value.is_floating_point()]


def alike(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal, NaN for NaN."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def with_number(value: Tensor, number: float, sample: int = 0) -> Tensor:
    broken = value.clone()
    broken[sample].reshape(-1)[0] = number
    return broken


def unharmed(model: nn.Module, name: str, before: dict[str, Any]) -> None:
    """Check that a model is what it was, and that its next sound call is what another's is."""
    assert snapshot(model) == before
    twin = copy.deepcopy(model)
    assert torch.equal(answer(model, inputs(name, 0, 1, 1)), answer(twin, inputs(name, 0, 1, 1)))


# --- in the inputs ---------------------------------------------------------------------------------------------------
@each_case
@pytest.mark.parametrize("state", ["training", "eval", "specialised"])
@given(data=st.data(), number=st.sampled_from(BROKEN + ODD), before=st.booleans())
@settings(max_examples=4, deadline=None)
def test_numbers_in_the_inputs(name: str, state: str, data: st.DataObject, number: float, before: bool) -> None:
    """In the first call of its shape and in later ones, of one region and of several.

    A specialised model does not look at its scores, which would make a GPU wait: what is not finite comes out in the sample it came in
    with, and in no other.
    """
    case = CASES[name]
    model = in_state(converted(name, 0.3), state)
    argument = data.draw(st.sampled_from(floats(name)))
    regions = data.draw(st.sampled_from([(0, 0, 0), (0, 1, 1)]))
    sound = inputs(name, *regions)
    given = sound | {argument: with_number(sound[argument], number)}
    if before:
        answer(model, sound)
    was = snapshot(model)
    wanted = answer(dense(name), given)
    if argument == case.timestep and not abs(number) < 1:
        with pytest.raises(TimestepError, match="lies outside the range"):
            answer(model, given)
    elif bool(wanted.isfinite().all()):
        if argument == case.timestep and number == -1e-45:
            return  # which is below the range, or rounded to 0
        assert bool(answer(model, given).isfinite().all())
    elif state == "specialised":
        found = answer(model, given)
        assert not bool(found[0].isfinite().all())
        if argument not in case.shared:
            assert torch.equal(found[1:], answer(model, sound)[1:])
    else:
        with pytest.raises(NonFiniteError, match=r"The router of .* gives scores that are no finite numbers"):
            answer(model, given)
    unharmed(model, name, was)


@each_case
@pytest.mark.parametrize("state", ["eval", "specialised"])
@given(data=st.data(), number=st.sampled_from(BROKEN + ODD))
@settings(max_examples=3, deadline=None)
def test_at_ratio_zero_a_model_makes_of_them_what_the_original_does(name: str, state: str, data: st.DataObject, number: float) -> None:
    model = in_state(converted(name, 0.0), state)
    argument = data.draw(st.sampled_from([key for key in floats(name) if key != CASES[name].timestep]))
    sound = inputs(name, 0, 0, 1)
    given = sound | {argument: with_number(sound[argument], number)}
    assert alike(answer(model, given), answer(dense(name), given))


@each_case
@pytest.mark.parametrize("number", [NAN, INFINITY, -INFINITY, 1e38, -1e38, -1.0])
def test_timesteps(name: str, number: float) -> None:
    """Given as floats, whatever the class takes."""
    case, model = CASES[name], in_state(converted(name, 0.3), "eval")
    given = inputs(name, 0, 1)
    was = snapshot(model)
    with pytest.raises(TimestepError, match="lies outside the range"):
        answer(model, given | {case.timestep: with_number(given[case.timestep].float(), number)})
    unharmed(model, name, was)


# --- in what is learned ----------------------------------------------------------------------------------------------
@each_case
@pytest.mark.parametrize("state", ["training", "eval"])
@pytest.mark.parametrize("number", [NAN, INFINITY, -INFINITY])
def test_router_weights_that_are_no_numbers_are_named(name: str, state: str, number: float) -> None:
    model = in_state(converted(name, 0.3), state)
    with torch.no_grad():
        model.diffcr.routers["1"].weight[0, 3] = number
    was, path = snapshot(model), CASES[name].sites[1][0]
    for regions in ((0, 0), (0, 1)):
        with pytest.raises(NonFiniteError, match=rf"The router of {path} gives"):
            answer(model, inputs(name, *regions))
    with pytest.raises(NonFiniteError, match=rf"The router of {path} "):
        dcs.specialize_(model)  # which no longer looks at scores
    assert snapshot(model) == was
    with torch.no_grad():
        model.diffcr.routers["1"].weight.copy_(converted(name, 0.3).diffcr.routers["1"].weight)
    unharmed(model, name, snapshot(model))


@each_case
@pytest.mark.parametrize("number", [NAN, INFINITY, -INFINITY])
def test_ratios_that_are_no_numbers_are_named(name: str, number: float) -> None:
    model = in_state(converted(name, 0.3), "training")
    with torch.no_grad():
        dcs.ratio_table(model)[1, 1] = number
    was, path = snapshot(model), CASES[name].sites[1][0]
    jobs: tuple[Callable[[], Any], ...] = (
        lambda: answer(model, inputs(name, 0, 0)), lambda: dcs.ratio_loss(model), lambda: dcs.ratio_table(model),
        lambda: dcs.specialize_(model), lambda: dcs.save_adapter(model, "nowhere"),
    )  # fmt: skip
    for job in jobs:
        with pytest.raises(NonFiniteError, match=rf"\['{path}'\] are not finite"):
            job()
    assert snapshot(model) == was


@each_case
@pytest.mark.parametrize("state", ["training", "eval", "specialised"])
@pytest.mark.parametrize(("bound", "numbers"), [(0.0, (-0.0, 1e-40, -1e-45, -1e38, -3.0)), (0.9, (0.9000001, 1e38, 3.0))])
def test_ratios_out_of_range_count_as_the_bound_they_crossed(name: str, state: str, bound: float, numbers: tuple[float, ...]) -> None:
    model = in_state(converted(name, 0.3), "eval" if state == "eval" else "training")

    def at(number: float) -> Tensor:
        with torch.no_grad():
            dcs.ratio_table(model)[1] = number
        return answer(in_state(model, state) if state == "specialised" else model, inputs(name, 0, 1))

    wanted = at(bound)
    assert [number for number in numbers if not torch.equal(at(number), wanted)] == []


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1.0, 1e20, 1e34])
def test_gradients_of_any_size_that_single_precision_holds_lead_to_the_same_table(scale: float) -> None:
    direction = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    tables = []
    for factor in (1.0, scale):
        model = in_state(converted("dit", 0.3), "training")
        optimizer = dcs.RatioOptimizer(model, total_steps=5)
        for _ in range(3):
            dcs.ratio_table(model).grad = direction * factor
            optimizer.step()
        tables.append(dcs.ratio_table(model).detach())
    assert torch.allclose(*tables, atol=1e-5 if scale > 1e-39 else 1e-2)  # a denormal number has few digits


@pytest.mark.parametrize("number", [NAN, INFINITY, -INFINITY, 3e38])
def test_a_step_with_a_broken_gradient_is_not_taken(number: float) -> None:
    model = in_state(converted("dit", 0.3), "training")
    optimizer = dcs.RatioOptimizer(model, total_steps=5)
    output(model(**inputs("dit", 0, 1))).square().sum().backward()
    optimizer.step()
    output(model(**inputs("dit", 0, 1))).square().sum().backward()
    sound = dcs.ratio_table(model).grad.clone()
    twin, other = copy.deepcopy((model, optimizer))
    dcs.ratio_table(twin).grad = sound.clone()
    dcs.ratio_table(model).grad[1, 0] = number
    was, kept = snapshot(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(NonFiniteError, match=r"\['transformer_blocks.1'\] are not finite.*GradScaler"):
        optimizer.step()
    assert snapshot(model) == was and torch.equal(model.diffcr.visits, twin.diffcr.visits)
    assert str(optimizer.state_dict()) == str(kept)
    dcs.ratio_table(model).grad.copy_(sound)
    for one in (optimizer, other):
        one.step()
    assert torch.equal(dcs.ratio_table(model), dcs.ratio_table(twin))


# --- ties ------------------------------------------------------------------------------------------------------------
def choices(model: nn.Module, name: str, given: dict[str, Any]) -> list[tuple[Tensor, set[bytes], Tensor]]:
    """Call the model; of each site, its scores, the tokens that entered its block, and all tokens."""
    case, seen = CASES[name], []
    answer(model, given)  # recorded, so that blocks are run by the graph alone
    streams: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for number, (path, _) in enumerate(case.sites):
        handles.append(
            model.diffcr.routers[str(number)].register_forward_hook(
                lambda _, args, out, path=path: streams.update({path: (args[0].clone(), out)})
            )
        )
    for path, _ in case.sites:

        def enters(block: nn.Module, args: Any, kwargs: dict[str, Any], path: str = path) -> None:
            tokens = kwargs[case.stream] if case.stream in kwargs else args[0]
            stream, scores = streams[path]
            seen.append((scores, {row.numpy().tobytes() for row in tokens[0]}, stream))

        handles.append(model.get_submodule(path).register_forward_pre_hook(enters, with_kwargs=True))
    answer(model, given)
    for handle in handles:
        handle.remove()
    return seen


@each_case
@pytest.mark.parametrize("state", ["training", "eval", "specialised"])
@pytest.mark.parametrize("steepness", [0.0, 1e5], ids=["all alike", "zeros and ones"])
def test_of_equal_scores_the_lower_index_stays(name: str, state: str, steepness: float) -> None:
    """All scores are 1/2; or all are 0 or 1, so that those kept are told by their index."""
    model = copy.deepcopy(converted(name, 0.3))
    with torch.no_grad():
        for router in model.diffcr.routers.values():
            router.weight.mul_(steepness)
    model = in_state(model, state)
    found = choices(model, name, inputs(name, 0))
    assert found
    tied = 0
    for scores, kept, stream in found:
        if len(kept) == stream.shape[1]:
            continue  # the lower of the two bins, or a site that keeps all
        assert set(scores.unique().tolist()) <= ({0.0, 1.0} if steepness else {0.5})
        order = top_tokens(scores, len(kept))[0]
        tied += int(scores[0].sort(descending=True).values[len(kept) - 1] == scores[0].sort(descending=True).values[len(kept)])
        assert kept == {stream[0, index].numpy().tobytes() for index in order}
    assert tied, "no choice was between equals"


@each_case
@pytest.mark.parametrize("state", ["eval", "specialised"])
def test_a_batch_breaks_ties_as_its_samples_do(name: str, state: str) -> None:
    model = copy.deepcopy(converted(name, 0.3))
    with torch.no_grad():
        for router in model.diffcr.routers.values():
            router.weight.zero_()
    model, given = in_state(model, state), inputs(name, 0, 1, 0, 1, 1)
    single = torch.cat([answer(model, CASES[name].sample(given, index)) for index in range(5)])
    assert torch.allclose(answer(model, given), single, atol=1e-4, rtol=1e-4)


# --- sizes -----------------------------------------------------------------------------------------------------------
GRIDS = (Size(1, 1), Size(1, 2), Size(2, 1), Size(1, 3), Size(1, 7), Size(7, 1))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.resizable and case.sizes != CASES["dit"].sizes])
@pytest.mark.parametrize("state", ["training", "eval", "specialised"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.rows}x{grid.columns}")
def test_short_and_odd_streams(name: str, state: str, grid: Size) -> None:
    """Routed as told, and one token is always left: at k = N nothing but the original's output may come out."""
    model = in_state(converted(name, 0.9), state)
    routed = answer(model, inputs(name, 0, 1, size=grid))
    wanted = answer(dense(name), inputs(name, 0, 1, size=grid))
    assert routed.shape == wanted.shape and bool(routed.isfinite().all())
    counts = {kept_count(ratio, grid.tokens) for ratio in (0.8, 0.9)}
    assert torch.equal(routed, wanted) == (counts == {grid.tokens})


@pytest.mark.parametrize("text", [0, 1])
@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "hunyuan"])
def test_prompts_of_no_word_and_of_one(name: str, text: int) -> None:
    """As far as the original takes them; a prompt of another length is recorded anew."""
    size, plain = Size(text=text), dense(name, text)
    case = CASES[name]
    times = case.times(2, [0, 1])
    draw = lambda: case.inputs(plain, 2, 5, timesteps=times, size=size)  # noqa: E731
    try:
        wanted = answer(plain, draw())
    except (IndexError, RuntimeError) as refused:
        with pytest.raises(Exception, match=str(refused)[:20]):
            dcs.plan(plain, draw())
        return
    at_zero = copy.deepcopy(converted(name, 0.0, text=text))
    assert torch.equal(answer(at_zero, draw()), wanted)
    for state in ("training", "eval", "specialised"):
        assert bool(answer(in_state(converted(name, 0.5, text=text), state), draw()).isfinite().all())


@each_case
@pytest.mark.parametrize("batch", PRIMES)
@pytest.mark.parametrize("state", ["training", "eval", "specialised"])
def test_every_sample_in_a_region_of_its_own(name: str, state: str, batch: int) -> None:
    """With a ratio of its own, each runs alone, so that the batch equals its samples bit for bit."""
    model = copy.deepcopy(converted(name, 0.0, regions=13))
    table = dcs.ratio_table(model)
    with torch.no_grad():
        for region in range(13):  # in training between two bins that no other region is between
            table[:, region] = region % 9 / 10 + 0.05 * (state == "training")
            table[0, region] = (region + region // 9) % 9 / 10 + 0.05 * (state == "training")
    model = in_state(model, state)
    regions = [(5 * index) % 13 for index in range(batch)]
    given = inputs(name, *regions, count=13)
    single = torch.cat([answer(model, CASES[name].sample(given, index)) for index in range(batch)])
    assert torch.equal(answer(model, given), single)


# --- precision -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])  # the others' own forward mixes precisions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precision(name: str, dtype: torch.dtype) -> None:
    """Converted in it or moved to it; at ratio 0 the original bit for bit, and what is not finite is named in it too."""
    case, plain = CASES[name], copy.deepcopy(dense(name)).to(dtype)
    given = cast(inputs(name, 0, 1), dtype, case)
    wanted = answer(plain, given)
    moved = copy.deepcopy(converted(name, 0.0)).to(dtype)
    config = dcs.DiffCRConfig(target_ratio=0.3, timestep_regions=2, timestep_range=case.timestep_range)
    for model in (moved, dcs.convert_(copy.deepcopy(plain), given, config)):
        assert dcs.ratio_table(model).dtype == torch.float32
        assert torch.equal(answer(model, given), wanted)
        with torch.no_grad():
            dcs.ratio_table(model).fill_(0.5)
        assert answer(model, given).dtype == wanted.dtype
        latent = next(iter(given))
        with pytest.raises(NonFiniteError, match="The router of"):
            answer(model, given | {latent: with_number(given[latent], NAN)})
        specialised = dcs.specialize_(copy.deepcopy(model))
        assert torch.equal(answer(specialised, given), answer(model, given))


def cast(given: dict[str, Any], dtype: torch.dtype, case: Case) -> dict[str, Any]:
    kept: Sequence[str] = (case.timestep, "img_ids", "txt_ids", "image_rotary_emb")  # as pipelines give them
    fits = lambda key, value: isinstance(value, Tensor) and value.is_floating_point() and key not in kept  # noqa: E731
    return {key: value.to(dtype) if fits(key, value) else value for key, value in given.items()}
