"""Every transformer denoiser of the installed diffusers through the whole contract, at a tiny size and with weights that hide nothing.

`table.py` says what a plan has to find: block class, how many of them are routed, tokens that may bypass, and tokens in the same
stream that never do (text, registers, conditions). A class that diffusers adds fails `test_every_class_is_in_the_zoo` until it is here.
"""

import importlib
import inspect
import pkgutil
from dataclasses import replace

import diffusers.models.transformers
import pytest
import torch
from diffusers import ModelMixin

import diffcr_surgery as dcs
from diffcr_surgery.errors import NoRoutableBlockError, TimestepError
from tests.zoo import contract, denoisers  # noqa: F401 - fills the zoo
from tests.zoo.entry import ZOO, Entry
from tests.zoo.table import DENSE, NO_DENOISERS, NOT_COMPILED, NOT_SPLIT, SITES

every_class = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
routed_classes = pytest.mark.parametrize("entry", [ZOO[name] for name in SITES], ids=SITES)
without_flex = pytest.mark.parametrize("entry", [ZOO[name] for name in SITES if not ZOO[name].flex], ids=lambda e: e.name)


def test_every_class_is_in_the_zoo() -> None:
    package = diffusers.models.transformers
    modules = [importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    classes = {
        name
        for module in modules
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, ModelMixin) and cls.__module__ == module.__name__
    }
    assert classes - ZOO.keys() - NO_DENOISERS.keys() == set(), "not in the zoo yet"
    assert SITES.keys() | DENSE.keys() == ZOO.keys()


@every_class
def test_trace_is_exact(entry: Entry) -> None:
    contract.trace_is_exact(entry)


@routed_classes
def test_plan_finds_the_sites(entry: Entry) -> None:
    plan = dcs.plan(entry.build(), entry.inputs())
    assert contract.found_sites(plan) == SITES[entry.name]
    assert all("proven, error" in site.reason for site in plan.routed_sites)


@pytest.mark.parametrize("entry", [ZOO[name] for name in DENSE], ids=DENSE)
def test_what_cannot_be_routed_says_why(entry: Entry) -> None:
    model = entry.build()
    keys = list(model.state_dict())
    with pytest.raises(NoRoutableBlockError, match=DENSE[entry.name]):
        dcs.convert_(model, entry.inputs())
    assert list(model.state_dict()) == keys


@routed_classes
def test_at_ratio_zero_nothing_changes(entry: Entry) -> None:
    contract.at_ratio_zero_nothing_changes(entry)


@routed_classes
def test_routed_it_moves_and_repeats(entry: Entry) -> None:
    contract.routed_it_moves_and_repeats(entry)


@without_flex
def test_a_block_costs_what_its_kept_tokens_cost(entry: Entry) -> None:
    contract.a_block_costs_what_its_kept_tokens_cost(entry)


@without_flex
@pytest.mark.parametrize("branches", ["two", "boundary"])
def test_gradients_reach_every_router_and_ratio(entry: Entry, branches: str) -> None:
    contract.gradients_reach_every_router_and_ratio(entry, branches=branches)


@routed_classes
def test_others_run_and_restore_gives_the_model_back(entry: Entry) -> None:
    contract.others_run_and_restore_gives_the_model_back(entry)


@pytest.mark.parametrize("entry", [ZOO[name] for name in SITES if name not in NOT_SPLIT], ids=lambda e: e.name)
def test_mixed_timesteps_equal_single_samples(entry: Entry) -> None:
    contract.mixed_timesteps_equal_single_samples(entry)


@pytest.mark.parametrize("planned", [1, 2])
@pytest.mark.parametrize(
    "name", ["LatteTransformer3DModel", "NucleusMoEImageTransformer2DModel", "T5FilmDecoder", "ZImageTransformer2DModel"]
)
def test_mixed_timesteps_of_more_samples_than_planned(name: str, planned: int) -> None:
    contract.mixed_timesteps_equal_single_samples(ZOO[name], planned)


def test_mixed_timesteps_of_tokens() -> None:
    """Wan 2.2 gives every token its timestep: one region a sample is split, several in one sample are refused."""
    wan = ZOO["WanTransformer3DModel"]
    entry = replace(wan, example=lambda batch, rows: wan.example(batch, rows) | {"timestep": torch.full((batch, 10 * rows), 300.0)})
    contract.mixed_timesteps_equal_single_samples(entry)
    model, inputs, _ = contract.in_several_regions(entry, 2, 2)
    inputs["timestep"][1, 5:] = 0
    inputs["timestep"][1, :5] = 999
    with pytest.raises(TimestepError, match=r"One sample holds timesteps of several regions \(a timestep per token\)"):
        model(**inputs)


@pytest.mark.parametrize("entry", [ZOO[name] for name in NOT_SPLIT], ids=NOT_SPLIT)
def test_mixed_timesteps_that_cannot_be_split_are_refused(entry: Entry) -> None:
    contract.mixed_timesteps_are_refused(entry, 3, NOT_SPLIT[entry.name])


@pytest.mark.parametrize("entry", [ZOO[name] for name in NOT_SPLIT if name != "QwenImage21Transformer2DModel"], ids=lambda e: e.name)
def test_mixed_timesteps_are_refused_where_one_sample_was_planned_with(entry: Entry) -> None:
    """That a batch cannot be split shows at the first call that would need it. (Single samples of Qwen-Image 2.1 can run.)"""
    contract.mixed_timesteps_are_refused(entry, 1, "lie in several timestep regions and have to run apart, but")


def test_rows_shared_by_a_batch_that_no_sample_owns_are_named() -> None:
    """QwenImage 2.1 keeps batch + 1 rows of modulation and one rotary table for all: no sample of a larger batch can run alone."""
    entry = ZOO["QwenImage21Transformer2DModel"]
    with pytest.raises(NoRoutableBlockError, match=r"transformer_blocks\.0 .*no set: permuting them changes the output by"):
        dcs.plan(entry.build(), entry.inputs(batch=2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler warns of in the classes' own code
@pytest.mark.parametrize("entry", [ZOO[name] for name in SITES if name not in NOT_COMPILED], ids=lambda e: e.name)
def test_specialised_it_compiles_as_a_whole(entry: Entry) -> None:
    contract.compiles_as_a_whole(entry)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", [ZOO[name] for name in NOT_COMPILED], ids=lambda e: e.name)
def test_what_reads_content_does_not_compile_as_a_whole(entry: Entry) -> None:
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        contract.compiles_as_a_whole(entry)
