"""Many threads at once give what one gives.

Threads meet at a barrier and then work, and each story is told many times over; the interpreter switches threads every few microseconds.
Inputs are drawn before: the random state is the process's, and two threads that draw at once get neither's numbers.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.errors import ConversionError
from diffcr_surgery.runtime.convert import changing
from diffcr_surgery.testing.compare import what_changed
from tests.models import CASES, Case, output, snapshot, trained

REGIONS = 4
TURNS = 2  # of each story; twenty in the slow tier


@pytest.fixture(autouse=True)
def _restless() -> Iterator[None]:
    """Switches threads as often as the interpreter can, with one torch thread each."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


turns = pytest.mark.parametrize("turns", [pytest.param(TURNS, id="few"), pytest.param(10 * TURNS, marks=pytest.mark.slow, id="many")])


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run jobs in threads of their own, begun together; returns what each returned or raised."""
    barrier = threading.Barrier(len(jobs))
    results: list[Any] = [None] * len(jobs)

    def work(index: int, job: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            results[index] = job()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def config(case: Case) -> dcs.DiffCRConfig:
    return dcs.DiffCRConfig(target_ratio=0.3, timestep_regions=REGIONS, timestep_range=case.timestep_range)


def inputs(case: Case, model: nn.Module, *regions: int, seed: int = 1) -> dict[str, Any]:
    return case.inputs(model, len(regions), seed, timesteps=case.times(REGIONS, list(regions)))


def answer(model: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return output(model(**given))


@dataclass(frozen=True)
class Job:
    """To convert a model on some inputs, and to call it on others."""

    case: Case
    original: nn.Module
    examples: dict[str, Any]
    given: dict[str, Any]

    @classmethod
    def of(cls, case: Case, model: nn.Module, seed: int) -> Job:
        return cls(case, model, inputs(case, model, 0, 3, seed=seed), inputs(case, model, 1, 2, 1, seed=seed))

    def run(self, model: nn.Module) -> Tensor:
        return answer(trained(dcs.convert_(model, self.examples, config(self.case))), self.given)


def same(found: list[Any], wanted: list[Tensor]) -> bool:
    return all(isinstance(one, Tensor) and torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


@turns
@pytest.mark.parametrize("count", [2, 8])
def test_conversions_of_different_models(count: int, turns: int) -> None:
    cases = [list(CASES.values())[index % len(CASES)] for index in range(count)]
    jobs = [Job.of(case, case.build(index, label_dropout=False), index) for index, case in enumerate(cases)]
    wanted = [job.run(copy.deepcopy(job.original)) for job in jobs]
    for _ in range(turns):
        found = at_once(*[partial(job.run, copy.deepcopy(job.original)) for job in jobs])
        assert same(found, wanted), found


def sharing(case: Case, count: int) -> list[nn.Module]:
    """Models of their own blocks around one embedder of prompts."""
    models = [case.build(index, label_dropout=False) for index in range(count)]
    for model in models[1:]:
        model.caption_projection = models[0].caption_projection
    return models


@turns
@pytest.mark.parametrize("count", [2, 8])
def test_conversions_of_models_that_share_an_embedder(count: int, turns: int) -> None:
    case = CASES["pixart"]
    jobs = [Job.of(case, model, index) for index, model in enumerate(sharing(case, count))]
    wanted = [job.run(copy.deepcopy(job.original)) for job in jobs]
    for _ in range(turns):
        models = sharing(case, count)
        before = snapshot(models[0].caption_projection)
        found = at_once(*[partial(job.run, model) for job, model in zip(jobs, models, strict=True)])
        assert same(found, wanted), found
        assert not [name for name in what_changed(before, snapshot(models[0].caption_projection)) if name.startswith("module")]


def losses(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[float]:
    """Train on batches; what is computed depends on nothing random."""
    model.train()
    optimizer = torch.optim.SGD(dcs.parameter_groups(model, lr=1e-3, router_lr=1e-2, weight_decay=0.0))
    ratios = dcs.RatioOptimizer(model, total_steps=len(batches))
    found = []
    for batch in batches:
        loss = output(model(**batch)).square().mean()
        loss.backward()
        for each in (optimizer, ratios):
            each.step()
            each.zero_grad()
        found.append(loss.item())
    return found


@turns
@pytest.mark.parametrize("cost", ["tokens", "flops"])
def test_a_plan_beside_a_training_run(cost: str, turns: int) -> None:
    case, other = CASES["dit"], CASES["flux"]
    model, planned = case.build(0, label_dropout=False), other.build(0)
    dcs.convert_(model, inputs(case, model, 0, 3), config(case))
    settings = dcs.DiffCRConfig(target_ratio=0.3, timestep_regions=REGIONS, timestep_range=other.timestep_range, cost=cost)
    batches = [inputs(case, model, step % REGIONS, (step + 1) % REGIONS, seed=step) for step in range(6)]
    examples = inputs(other, planned, 0, 3)

    def plan() -> Any:
        made = dcs.plan(planned, examples, settings)
        return str(made), str(made.graph), made.site_costs

    wanted = [losses(copy.deepcopy(model), batches), plan()]
    for _ in range(turns):
        assert at_once(partial(losses, copy.deepcopy(model), batches), plan) == wanted


def answers(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Call the model three times on each batch."""
    return [answer(model, one) for one in batches for _ in range(3)]


@turns
@pytest.mark.parametrize("specialized", [False, True])
@pytest.mark.parametrize("name", ["dit", "flux", "hunyuan"])
def test_one_model_called_in_two_regions(name: str, specialized: bool, turns: int) -> None:
    """The first calls are made at once, mixed batches among them, and on weights that are zero as before training."""
    case = CASES[name]
    model = case.build(0, awake=False)
    trained(dcs.convert_(model, inputs(case, model, 0, 3), config(case)))
    if specialized:
        dcs.specialize_(model)
    calls = [[(0, 0), (1, 3), (2, 2), (0, 0)], [(3, 3), (3, 1), (1, 1), (3, 0, 2)]]
    given = [[inputs(case, model, *regions) for regions in batches] for batches in calls]
    wanted = [[answer(copy.deepcopy(model), one) for one in own] for own in given]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(turns):
        twin = copy.deepcopy(model)  # without recordings

        for found, right in zip(at_once(*[partial(answers, twin, own) for own in given]), wanted, strict=True):
            assert isinstance(found, list), found
            assert all(torch.equal(one, right[index // 3]) for index, one in enumerate(found))
        assert all(torch.equal(value, weights[name]) for name, value in twin.state_dict().items())


def raced(model: nn.Module, job: Callable[[], nn.Module], count: int) -> None:
    """Do it in several threads at once: one wins, and the others are told."""
    found = at_once(*[job] * count)
    assert sum(one is model for one in found) == 1, found
    assert all(one is model or isinstance(one, ConversionError) for one in found), found


@turns
@pytest.mark.parametrize("from_plan", [False, True])
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_a_race_to_convert_one_model(name: str, from_plan: bool, turns: int) -> None:
    case = CASES[name]
    original = case.build(0)
    given = inputs(case, original, 0, 3)
    plan = dcs.plan(original, given, config(case))
    wanted = answer(original, given)
    for turn in range(turns):
        model = copy.deepcopy(original)
        before = snapshot(model)
        job = partial(dcs.convert_, model, plan) if from_plan else partial(dcs.convert_, model, given, config(case))
        raced(model, job, 2 + turn % 3)
        assert type(model).__mro__[1] is type(original)
        assert torch.equal(answer(model, given), wanted)
        raced(model, partial(dcs.restore_, model), 2)
        assert snapshot(model) == before


def test_specialising_finds_out_that_another_thread_has_restored_the_model() -> None:
    case = CASES["dit"]
    model = case.build(0).train()
    dcs.convert_(model, case.inputs(model, 2, 0))
    with ThreadPoolExecutor(1) as pool, changing(model):
        waiting = pool.submit(dcs.specialize_, model)
        while not waiting.running():
            time.sleep(0.001)
        time.sleep(0.05)  # until it waits for this thread; were it later, it would raise the same
        dcs.restore_(model)
    with pytest.raises(ConversionError, match="is not converted"):
        waiting.result()
    assert model.training


@turns
def test_a_race_to_specialise_one_model(turns: int) -> None:
    case = CASES["dit"]
    original = case.build(0)
    trained(dcs.convert_(original, inputs(case, original, 0, 3), config(case))).train()
    given = inputs(case, original, 1, 2)
    wanted = answer(dcs.specialize_(copy.deepcopy(original)), given)
    for turn in range(turns):
        model = copy.deepcopy(original)
        raced(model, partial(dcs.specialize_, model), 2 + turn % 3)
        assert not any(module.training for module in model.modules())
        assert torch.equal(answer(model, given), wanted)
