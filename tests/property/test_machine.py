"""A model's life in any order: each operation of the package and of its neighbours, and what must hold after every one of them."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import recurse_remove_peft_layers
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery import errors
from tests.models import CASES, output, snapshot
from tests.property.life import MIXED, Life, add_lora, in_precision, inner, modes, own, quietly
from tests.property.scenarios import BRANCHES, GATES, SPOTS

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm, in the original model too

CALLED: Counter[str] = Counter()  # calls seen by the hooks, by path of the module

batches = st.lists(st.integers(0, SPOTS - 1), min_size=1, max_size=3)  # timesteps of a batch, as in `scenarios`
sizes = st.integers(0, 3)  # of an image, by its place among the sizes of the case
ratios = st.sampled_from([-0.5, 0.0, 0.1, 0.37, 0.5, 0.82, 0.9, 1.5])
tables = st.just([0.0] * 24) | st.lists(ratios, min_size=24, max_size=24)  # as many as the largest table has
configs = st.fixed_dictionaries(
    {
        "timestep_regions": st.integers(1, 4),
        "gate": st.sampled_from(GATES),
        "branches": st.sampled_from(BRANCHES),
        "share_routing": st.integers(1, 3),
        "blocks": st.sampled_from([None, r".*[02]"]),
        "initial_ratio": st.sampled_from([0.0, 0.0, 0.3]),
        "learn_ratios": st.sampled_from([True, True, False]),
        "bins": st.sampled_from([dcs.DiffCRConfig.bins, (0.0, 0.25, 0.9), (0.0, 0.5, 0.95), (0.0, 0.5, 1.0)]),
    }
)


class PlantedError(Exception):
    """Raised by a block in the middle of an operation."""


def note(path: str, *_: Any) -> None:
    """Count a call. Hooks made of it can be pickled."""
    CALLED[path] += 1


def gradients(model: nn.Module, inputs: dict[str, Any], regularise: bool) -> dict[str, Tensor]:
    """Gradients of the loss, the budget term included, by name; none where nothing is to be learned."""
    loss = output(model(**inputs)).float().square().mean() + (dcs.ratio_loss(model) if regularise else 0.0)
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad.clone() for name, p in inner(model).named_parameters() if p.grad is not None}


class Machine(Life):
    """What may happen to a model."""

    @initialize(name=st.sampled_from(sorted(CASES)), size=sizes, seed=st.integers(0, 99), drawn=st.none() | configs, values=tables)
    def build(self, name: str, size: int, seed: int, drawn: dict[str, Any] | None, values: list[float]) -> None:
        """Build the model, and where settings are drawn, convert and route it at once: a life is short."""
        self.case, self.seed = CASES[name], seed
        self.size = self.case.sizes[size % len(self.case.sizes)]
        self.model = self.root = self.case.build(seed, size=self.size, label_dropout=False)
        self.keys = list(self.model.state_dict())
        self.status, self.dtype, self.lora, self.checkpointing = "plain", torch.float32, False, False
        self.hooks: dict[str, int] = {}
        self.planned, self.saved = None, {}
        self.record()
        if drawn is not None:
            self.convert_(self.inputs(MIXED), self.settings(**drawn))
            self.write(values, seed)

    # --- planning, converting, restoring -------------------------------------------------------------------------------
    @precondition(lambda self: self.status == "plain")
    @rule(drawn=configs, spots=batches, size=sizes, ahead=st.booleans())
    def convert(self, drawn: dict[str, Any], spots: list[int], size: int, ahead: bool) -> None:
        """Convert the model, or plan that ahead."""
        if ahead:
            with quietly():
                self.planned = dcs.plan(self.model, self.inputs(spots, size), self.settings(**drawn))
        else:
            self.convert_(self.inputs(spots, size), self.settings(**drawn))

    @precondition(lambda self: self.status == "plain" and self.planned is not None)
    @rule()
    def convert_as_planned(self) -> None:
        self.convert_(self.planned)

    @precondition(lambda self: self.status != "plain")
    @rule()
    def restore(self) -> None:
        with quietly():
            assert dcs.restore_(self.model) is self.model
        self.status, self.routing = "plain", {}

    @precondition(lambda self: self.status == "converted")
    @rule(budget=st.sampled_from([None, None, 1.0, 0.9, 0.75, 0.5, 0.25]), spots=batches)
    def specialize(self, budget: float | None, spots: list[int]) -> None:
        """At the trained ratios it gives what it gave in eval."""
        self.model.eval()
        self.modes, expected = modes(self.model), self.run(spots)
        with quietly():
            assert dcs.specialize_(self.root, budget=budget) is self.root
        self.status, before = "specialised", self.routing
        self.routing, self.trained, self.budget = self.learned(), before["ratio_table"], budget
        assert all(torch.equal(self.routing[name], before[name]) for name in self.routing if name != "ratio_table")
        assert set(self.table.flatten().tolist()) <= set(torch.tensor(self.config.bins).tolist())
        achieved = self.model.diffcr.achieved
        assert achieved.requested == budget
        if budget is None:
            torch.testing.assert_close(self.run(spots), expected)
        else:  # one entry goes to its next bin at a time, and bins lie at most 0.65 apart
            assert abs(achieved.share - budget) <= 0.65 / 2 / self.table.numel() + 1e-6

    # --- training ------------------------------------------------------------------------------------------------------
    @precondition(lambda self: self.thawed)
    @rule(spots=batches, size=sizes, paper=st.booleans(), steps=st.integers(1, 2))
    def train(self, spots: list[int], size: int, paper: bool, steps: int) -> None:
        """In the paper's way or by RatioOptimizer: gradients are the reference's, and what is frozen stays."""
        self.root.train()
        self.modes = dict.fromkeys(self.modes, True)
        learns = self.config.learn_ratios and self.model.diffcr.ratio_table.requires_grad
        groups = dcs.parameter_groups(self.root, lr=1e-3, ratio_lr=0.05 if paper and learns else None)
        optimizers = [torch.optim.AdamW(groups, eps=1e-3)]  # the default is 0 in float16
        if learns and not paper:
            optimizers.append(dcs.RatioOptimizer(self.root, total_steps=4))
        inputs = self.inputs(spots, size)
        for _ in range(steps):
            found = gradients(self.root, inputs, paper and learns)
            wanted = gradients(self.reference(), inputs, paper and learns and not self.dense)
            assert all(bool(gradient.isfinite().all()) for gradient in found.values())
            assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            before, frozen = self.weights, self.frozen
            self.record()
            assert self.frozen == frozen and all(torch.equal(self.weights[name], before[name]) for name in frozen)

    @precondition(lambda self: self.status == "converted")
    @rule(values=tables, seed=st.integers(0, 99))
    def write(self, values: list[float], seed: int) -> None:
        """Write table and routers by hand; what lies outside the bounds counts as the bound."""
        table, source = dcs.ratio_table(self.model), torch.Generator().manual_seed(seed)
        written = torch.tensor(values[: table.numel()]).reshape(table.shape)
        with torch.no_grad():
            table.copy_(written)
            for router in self.model.diffcr.routers.values():
                router.weight.copy_(torch.randn(router.weight.shape, generator=source) / 2)
        self.routing = self.learned()

    @rule(training=st.booleans(), block=st.booleans())
    def mode(self, training: bool, block: bool) -> None:
        """Of the model, or of its first block alone."""
        path = self.case.sites[0][0] if block else ""
        self.model.get_submodule(path).train(training)
        self.modes = {name: training if name.startswith(path) else mode for name, mode in self.modes.items()}

    @rule(path=st.sampled_from(["all", "block", "routing"]), frozen=st.booleans())
    def freeze(self, path: str, frozen: bool) -> None:
        if path == "routing":
            if self.status == "converted":
                self.model.diffcr.requires_grad_(not frozen)
            return
        for name, tensor in own(self.model).items():
            if isinstance(tensor, nn.Parameter) and name.startswith(self.case.sites[-1][0] if path == "block" else ""):
                tensor.requires_grad_(not frozen)
                (self.frozen.add if frozen else self.frozen.discard)(name)

    @rule(dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        if self.case.name == "timm_dit" and dtype.itemsize == 2:
            return  # its timestep embedding knows no half precision
        self.root.to(dtype)
        self.dtype = dtype
        self.weights = {name: in_precision(tensor, dtype) for name, tensor in self.weights.items()}
        for name in [name for name in self.routing if name.startswith("routers.")]:  # ratios stay in single precision
            self.routing[name] = self.routing[name].to(dtype)

    @precondition(lambda self: getattr(self.model, "_supports_gradient_checkpointing", False))
    @rule(on=st.booleans())
    def checkpoint(self, on: bool) -> None:
        self.checkpointing = on
        (self.model.enable_gradient_checkpointing if on else self.model.disable_gradient_checkpointing)()

    # --- files, copies, twins ------------------------------------------------------------------------------------------
    @precondition(lambda self: self.status == "converted")
    @rule()
    def save(self) -> None:
        with quietly():
            dcs.save_adapter(self.root, self.folder)
        self.saved = dict(self.routing)

    @precondition(lambda self: self.saved)
    @rule(spots=batches, size=sizes, take=st.booleans())
    def load(self, spots: list[int], size: int, take: bool) -> None:
        """Onto a twin; go on with it, or with the model."""
        twin = self.twin()
        with quietly():
            assert dcs.load_adapter_(twin, self.folder, self.inputs(spots, size)) is twin
        if take:
            precisions = {name: tensor.dtype for name, tensor in twin.diffcr.state_dict().items()}
            self.status, self.routing = "converted", {name: tensor.to(precisions[name]) for name, tensor in self.saved.items()}
            self.go_on_with(twin)

    @precondition(lambda self: self.status != "specialised")  # which has lost routers
    @rule(take=st.booleans())
    def load_state_dict(self, take: bool) -> None:
        twin = self.twin()
        if self.status == "converted":
            dcs.convert_(twin, self.model.diffcr.plan)
        twin.load_state_dict(self.model.state_dict())
        if take:
            self.go_on_with(twin)

    @rule(by=st.sampled_from(["deepcopy", "pickle"]))
    def duplicate(self, by: str) -> None:
        """Go on with a copy, which shares nothing with the first. What diffusers hangs in for checkpointing cannot be pickled."""
        local = any("_gradient_checkpointing_func" in vars(module) for module in self.model.modules())
        twin = copy.deepcopy(self.root) if local or by == "deepcopy" else pickle.loads(pickle.dumps(self.root))
        theirs = {tensor.data_ptr() for tensor in self.root.parameters()}
        assert not any(tensor.data_ptr() in theirs for tensor in twin.parameters())
        self.root, self.model = twin, inner(twin)

    # --- neighbours ----------------------------------------------------------------------------------------------------
    @precondition(lambda self: not self.lora)
    @rule(add=st.sampled_from([get_peft_model, inject_adapter_in_model]))
    def put_lora_on(self, add: Callable[..., Any]) -> None:
        before = self.run(MIXED)
        self.root, self.lora = add_lora(self.model, self.case, add), True
        self.record()
        assert inner(self.root) is self.model and not torch.equal(self.run(MIXED), before)

    @precondition(lambda self: self.lora)
    @rule(delete=st.booleans())
    def take_lora_off(self, delete: bool) -> None:
        """By peft where it wraps the model; where not, as diffusers does it."""
        if self.root is self.model:
            recurse_remove_peft_layers(self.model)
            vars(self.model).pop("peft_config", None)
        else:
            if delete:
                self.root.delete_adapter("default")
            assert self.root.unload() is self.model
        weights, self.root, self.lora = self.weights, self.model, False
        self.record()
        assert all(torch.equal(self.weights[name], weights[name]) for name in weights)

    @rule(site=st.integers(-1, 5))
    def hook(self, site: int) -> None:
        """Add a hook that counts calls to a block or the model; take it off if it is there."""
        path = "" if site < 0 else self.case.sites[site % len(self.case.sites)][0]
        module = self.model.get_submodule(path)
        if path in self.hooks:
            del module._forward_hooks[self.hooks.pop(path)]
        else:
            self.hooks[path] = module.register_forward_hook(functools.partial(note, path)).id

    # --- calls ---------------------------------------------------------------------------------------------------------
    @rule(spots=batches, size=sizes, way=st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]))
    def call(self, spots: list[int], size: int, way: Callable[[], Any]) -> None:
        """With other timesteps, batch and resolution; hooks see a block as often as it runs."""
        reference, inputs = self.reference(), self.inputs(spots, size)
        with way():
            first = output(self.root(**inputs)).detach()
            CALLED.clear()
            assert torch.equal(first, output(self.root(**inputs)))
            called = dict(CALLED)
            self.check(first, output(reference(**inputs)))
        for path in self.hooks:
            fewest, most = self.runs(path, spots)
            assert fewest <= called.get(path, 0) <= most

    def runs(self, path: str, spots: list[int]) -> tuple[int, int]:
        """How often a block may run: once for all samples that share their ratios, and at up to two bins in training.

        Where samples share a table of positions, as in FLUX, each that keeps other tokens may run by itself.
        """
        if path == "" or self.status == "plain":
            return 1, 1
        regions = {spot * self.config.timestep_regions // SPOTS for spot in spots}
        rows = [row for row, site in enumerate(self.model.diffcr.plan.routed_sites) if site.path == path]
        aligned = [axes for row in rows for axes in self.model.diffcr.plan.routed_sites[row].aligned.values()]
        apart = any("b" not in axes.split() and axes != "#n" for axes in aligned)
        if self.modes[""] and self.status == "converted":
            return 1, 2 * (len(spots) if apart else len(regions))
        ratios = self.model.diffcr.executed_ratios()
        groups = Counter(tuple(ratios[:, spot * self.config.timestep_regions // SPOTS].tolist()) for spot in spots)
        most = sum(count if apart and any(group[row] for row in rows) else 1 for group, count in groups.items())
        return sum(not any(group[row] == 1.0 for row in rows) for group in groups), most

    @rule(spots=batches, others=batches, size=sizes)
    def threads(self, spots: list[int], others: list[int], size: int) -> None:
        """Two threads that call at once get what each gets alone."""
        given, start = [self.inputs(spots, size), self.inputs(others, size)], threading.Barrier(2)

        @torch.no_grad()
        def call(inputs: dict[str, Any]) -> Tensor:
            start.wait()
            return output(self.root(**inputs))

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(call, given)
        assert torch.equal(first, self.run(spots, size)) and torch.equal(second, self.run(others, size))

    # --- what must fail, and change nothing ----------------------------------------------------------------------------
    @rule(spots=batches)
    def mistakes(self, spots: list[int]) -> None:
        """Whatever the status forbids is refused."""
        model, inputs, nowhere = self.model, self.inputs(spots), Path(self.scratch.name, "none")
        late = inputs | {self.case.timestep: torch.full_like(inputs[self.case.timestep], 2 * self.case.timestep_range[1])}
        if self.status == "plain":
            self.refused(errors.ConversionError, dcs.restore_, model)
            self.refused(errors.ConversionError, dcs.specialize_, model)
            self.refused(errors.ConversionError, dcs.save_adapter, model, nowhere)
            self.refused(errors.ConversionError, dcs.parameter_groups, model, lr=1e-3)
            self.refused(errors.ConversionError, dcs.RatioOptimizer, model, total_steps=1)
            self.refused(errors.AdapterError, dcs.load_adapter_, model, nowhere, inputs)
            self.refused(errors.TimestepError, dcs.convert_, model, late, self.settings(timestep_regions=2))
            self.refused(errors.NoRoutableBlockError, dcs.convert_, model, inputs, self.settings(blocks="none"))
            return
        self.refused(errors.ConversionError, dcs.plan, model, inputs)
        self.refused(errors.ConversionError, dcs.convert_, model, inputs)
        self.refused(errors.ConversionError, dcs.convert_, model, model.diffcr.plan)
        self.refused(errors.ConversionError, dcs.load_adapter_, model, self.folder, inputs)
        if self.config.timestep_regions > 1:
            self.refused(errors.TimestepError, self.root, **late)
        if self.root is not model:
            self.refused(errors.ConversionError, dcs.restore_, self.root)
        if self.status == "specialised":
            self.refused(errors.ConversionError, dcs.specialize_, model)
            self.refused(errors.ConversionError, dcs.save_adapter, model, self.folder)
            self.refused(errors.ConfigError, dcs.RatioOptimizer, model, total_steps=1)
            return
        self.refused(errors.ConfigError, dcs.specialize_, model, budget=0.0)
        if not self.thawed:
            self.refused(errors.ConversionError, dcs.parameter_groups, model, lr=1e-3)
        with torch.no_grad():
            model.diffcr.ratio_table[0] = float("nan")
            self.refused(errors.NonFiniteError, self.run, MIXED)
            model.diffcr.ratio_table.copy_(self.table)

    def refused(self, error: type[Exception], operation: Callable[..., Any], *given: Any, **settings: Any) -> None:
        before = snapshot(self.root)
        with pytest.raises(error):
            operation(*given, **settings)
        assert snapshot(self.root) == before

    @rule(drawn=configs, site=st.integers(0, 5), calls=st.integers(0, 12), spots=batches, size=sizes)
    def interrupt(self, drawn: dict[str, Any], site: int, calls: int, spots: list[int], size: int) -> None:
        """A block raises after some calls, in the middle of a conversion, of loading an adapter, or of a call."""
        left = [calls]

        def fail(*_: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise PlantedError

        handle = self.model.get_submodule(self.case.sites[site % len(self.case.sites)][0]).register_forward_pre_hook(fail)
        inputs, before = self.inputs(spots, size), snapshot(self.root)
        try:
            if self.status != "plain":
                self.run(spots, size)
            elif self.saved:
                dcs.restore_(dcs.load_adapter_(self.model, self.folder, inputs))
            else:
                dcs.restore_(dcs.convert_(self.model, inputs, self.settings(**drawn)))
        except (PlantedError, errors.SurgeryError):
            assert left[0] < 0
        assert snapshot(self.root) == before
        handle.remove()


# Each step runs the model and a twin several times, so the machine takes a share of the profile's examples.
Machine.TestCase.settings = settings(
    max_examples=max(2, settings().max_examples // 2),
    stateful_step_count=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking runs it for many minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestMachine = Machine.TestCase
