"""Models as other people write them, through the contract of the zoo."""

import pytest
import torch

import diffcr_surgery as dcs
from diffcr_surgery.errors import NoRoutableBlockError, TimestepError, TraceError
from tests.zoo import contract, hand_written  # noqa: F401 - fills the zoo
from tests.zoo.entry import OTHERS, Entry, tensors
from tests.zoo.table import HAND_WRITTEN, HAND_WRITTEN_DENSE

routed_models = pytest.mark.parametrize("entry", [OTHERS[name] for name in HAND_WRITTEN], ids=HAND_WRITTEN)


@pytest.fixture(autouse=True)
def no_fast_path(request: pytest.FixtureRequest) -> None:
    if "entry" in request.fixturenames and request.getfixturevalue("entry").name == "MDMPadded":
        torch.backends.mha.set_fastpath_enabled(False)
        request.addfinalizer(lambda: torch.backends.mha.set_fastpath_enabled(True))


def test_every_model_is_expected_somewhere() -> None:
    assert HAND_WRITTEN.keys() | HAND_WRITTEN_DENSE.keys() == OTHERS.keys()


@pytest.mark.parametrize("entry", OTHERS.values(), ids=OTHERS)
def test_trace_is_exact(entry: Entry) -> None:
    contract.trace_is_exact(entry)


@routed_models
def test_plan_finds_the_sites(entry: Entry) -> None:
    assert contract.found_sites(dcs.plan(entry.build(), entry.inputs())) == HAND_WRITTEN[entry.name]


@pytest.mark.parametrize("entry", [OTHERS[name] for name in HAND_WRITTEN_DENSE], ids=HAND_WRITTEN_DENSE)
def test_what_cannot_be_routed_says_why(entry: Entry) -> None:
    with pytest.raises(NoRoutableBlockError, match=HAND_WRITTEN_DENSE[entry.name]):
        dcs.plan(entry.build(), entry.inputs())


@routed_models
def test_at_ratio_zero_nothing_changes(entry: Entry) -> None:
    contract.at_ratio_zero_nothing_changes(entry)


@routed_models
def test_routed_it_moves_and_repeats(entry: Entry) -> None:
    contract.routed_it_moves_and_repeats(entry)


@routed_models
def test_a_block_costs_what_its_kept_tokens_cost(entry: Entry) -> None:
    contract.a_block_costs_what_its_kept_tokens_cost(entry)


@routed_models
@pytest.mark.parametrize("branches", ["two", "boundary"])
def test_gradients_reach_every_router_and_ratio(entry: Entry, branches: str) -> None:
    # The class token is all that this model reads in the end: what the last block's router decides on reaches no loss.
    idle = {"blocks.2"} if entry.name in ("VisionTransformer",) else set()
    contract.gradients_reach_every_router_and_ratio(entry, idle, branches)


@routed_models
def test_others_run_and_restore_gives_the_model_back(entry: Entry) -> None:
    contract.others_run_and_restore_gives_the_model_back(entry)


def test_overwriting_blocks_equal_their_tidy_twins() -> None:
    entry = OTHERS["OverwritingDiT"]
    tidy, rude = entry.build(), entry.build()
    for block in tidy.blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: ((args[0].clone(), *args[1:]), kwargs), with_kwargs=True)
    inputs = entry.inputs()
    for model in (tidy, rude):
        dcs.convert_(model, inputs)
        with torch.no_grad():
            dcs.ratio_table(model).fill_(0.55)
            for number, router in enumerate(model.diffcr.routers.values()):
                router.weight.normal_(generator=torch.Generator().manual_seed(number))
    for training in (False, True):
        results = []
        for model in (tidy, rude):
            model.train(training).zero_grad()
            output = model(**inputs)
            contract.loss(output).backward()
            results.append([*tensors(output), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results)), training


def test_packed_samples_of_several_regions_are_refused() -> None:
    entry = OTHERS["PackedDiT"]
    model, inputs = entry.build(), entry.inputs()
    dcs.convert_(model, inputs, dcs.DiffCRConfig(timestep_regions=2, timestep_argument="timestep", timestep_range=(0, 1000)))
    inputs["timestep"] = torch.linspace(10, 900, len(inputs["timestep"])).to(inputs["timestep"])
    with torch.no_grad():
        model(**inputs)  # all ratios are alike, so there is nothing to split
        dcs.ratio_table(model)[:, 1] = 0.5
        with pytest.raises(TimestepError, match=r"none of its inputs can be split into samples \(a packed sequence"):
            model(**inputs)


def test_the_fast_path_of_torch_is_named() -> None:
    entry = OTHERS["MDMPadded"]
    with torch.no_grad(), pytest.raises(TraceError, match=r"torch\.backends\.mha\.set_fastpath_enabled\(False\)"):
        dcs.trace(entry.build(), entry.inputs())
