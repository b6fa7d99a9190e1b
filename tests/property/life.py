"""The life of a model as a state machine of hypothesis: what is known of it, and what must hold after everything that is done to it.

The machine keeps one model and, beside it, the plain truth: what weights, modes and frozen parameters it must have by what was done to
it. Of these it builds an unconverted twin, or converts one anew by the model's own plan, to compare with: nothing that was recorded
before some change may answer after it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from hypothesis.stateful import RuleBasedStateMachine, invariant
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import diffcr_surgery as dcs
from tests.models import Case, output
from tests.property.scenarios import SPOTS

MIXED = [1, 10]  # timesteps of a batch from two regions, wherever there are two


def plain_name(name: str) -> str:
    """Name of a weight without what LoRA puts round its layer."""
    return name.replace(".base_layer", "")


def own(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by plain name, without those of the routing and of LoRA."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {plain_name(name): tensor for name, tensor in tensors if not name.startswith("diffcr.") and "lora_" not in name}


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules() if name.split(".")[0] != "diffcr"}


def add_lora(model: nn.Module, case: Case, add: Callable[..., Any]) -> Any:
    """Add LoRA to the attention of the blocks, with weights that change the output."""
    layers = [f"{path}.{name}" for path, _ in case.sites for name, _ in model.get_submodule(path).named_modules()]
    targets = [name for name in layers if name.split(".")[-1] in case.attention]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return add(model=model, peft_config=LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))


def in_precision(value: Any, dtype: torch.dtype) -> Any:
    """Cast a floating-point tensor, or a tuple of them; leave anything else."""
    if isinstance(value, tuple):
        return tuple(in_precision(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def inner(root: nn.Module) -> nn.Module:
    """The model inside peft's wrapper."""
    return root.get_base_model() if hasattr(root, "get_base_model") else root


@contextmanager
def quietly() -> Iterator[None]:
    """Hold that torch's random state is left alone."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


class Life(RuleBasedStateMachine):
    """One model, and what is known of it.

    Attributes:
        model: The denoiser; `root` is peft's wrapper around it, or the model itself.
        status: "plain", "converted" or "specialised".
        weights: What its own parameters and buffers must hold; `modes` and `frozen`: which modes and frozen tensors it must have.
        routing: What the state dict of `diffcr` must hold.
        trained: The table that a specialised model had before; `budget`: for which it was specialised.
        hooks: Path of a module with a hook that counts -> number of the hook.
        saved: The routing that lies in `folder`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self.scratch.name, "adapter")
        self.verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # diffusers has a word to say on every cast

    def teardown(self) -> None:
        logging.set_verbosity(self.verbosity)
        self.scratch.cleanup()

    # --- the plain truth -----------------------------------------------------------------------------------------------
    def record(self) -> None:
        """Take everything as it is now for the truth, after something that may change it."""
        found = own(self.model)
        self.weights = {name: tensor.detach().clone() for name, tensor in found.items()}
        self.frozen = {name for name, tensor in found.items() if not tensor.requires_grad}
        self.modes = modes(self.model)
        self.routing = {} if self.status == "plain" else self.learned()

    def learned(self) -> dict[str, Tensor]:
        """Take the routing as it counts, ratios out of bounds as the bound."""
        found = {name: tensor.clone() for name, tensor in self.model.diffcr.state_dict().items()}
        if self.status == "converted":
            found["ratio_table"].clamp_(0.0, self.config.max_ratio)
        return found

    def twin(self) -> nn.Module:
        """Build an unconverted model of the plain truth, LoRA included."""
        twin = self.case.build(self.seed, size=self.size, label_dropout=False).to(self.dtype)
        if self.lora:
            add_lora(twin, self.case, inject_adapter_in_model)
        lora = {name: p for name, p in self.model.named_parameters() if "lora_" in name}
        for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
            tensor.data = (lora[name].detach() if name in lora else self.weights[plain_name(name)]).clone()
            tensor.requires_grad_(lora[name].requires_grad if name in lora else plain_name(name) not in self.frozen)
        for name, module in twin.named_modules():
            module.training = self.modes[name]
        if self.checkpointing:
            twin.enable_gradient_checkpointing()
        return twin

    def reference(self) -> nn.Module:
        """The twin, where nothing is routed; else converted anew. A specialised model equals one in eval at its ratios.

        Where these hold a 1, it equals one in eval at the table it was specialised from, or, if a budget chose them, one specialised anew.
        """
        twin = self.twin()
        if self.dense:
            return twin
        plan, routing, full = self.model.diffcr.plan, self.routing, bool(self.table.max() == 1)
        if full:  # a ratio that rounds to 1 is written in no table but a specialised one's
            routing = routing | {"ratio_table": self.trained}
        elif self.status == "specialised":  # it may run at the bin above the highest ratio, which a table may hold
            plan = replace(plan, config=replace(plan.config, max_ratio=max(plan.config.max_ratio, float(self.table.max()))))
        state = dcs.convert_(twin, plan).diffcr
        state.load_state_dict(routing, strict=self.status == "converted")  # specialised it has lost routers
        for name, parameter in state.named_parameters():
            parameter.requires_grad_(dict(self.model.diffcr.named_parameters()).get(name, parameter).requires_grad)
        state.train(self.modes[""] and self.status == "converted")
        if full and self.budget is not None:  # its ratios are not those the table rounds to
            dcs.specialize_(twin, self.budget)
            for name, module in twin.named_modules():
                module.training = self.modes.get(name, False)
        return twin

    def check(self, found: Tensor, wanted: Tensor) -> None:
        """Compare with the reference: bit for bit, unless the model is specialised and may add up in another order."""
        assert bool(found.isfinite().all()) and found.dtype == self.dtype
        if self.dense or self.status != "specialised":
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted)

    def inputs(self, spots: list[int], size: int = 0) -> dict[str, Any]:
        """Inputs for one call: of the model's own size, or, where it takes others, of one of them."""
        grid = self.case.sizes[size % len(self.case.sizes)] if size and self.case.resizable else self.size
        found = self.case.inputs(self.model, len(spots), self.seed + 1, self.case.times(SPOTS, spots), grid)
        return {name: in_precision(value, self.dtype) for name, value in found.items()}

    def settings(self, **drawn: Any) -> dcs.DiffCRConfig:
        return dcs.DiffCRConfig(target_ratio=0.3, timestep_range=self.case.timestep_range, **drawn)

    @torch.no_grad()
    def run(self, spots: list[int], size: int = 0) -> Tensor:
        return output(self.root(**self.inputs(spots, size)))

    @property
    def config(self) -> dcs.DiffCRConfig:
        return self.model.diffcr.config

    @property
    def table(self) -> Tensor:
        return self.routing["ratio_table"]

    @property
    def dense(self) -> bool:
        """Whether the model has to equal the unconverted one bit for bit."""
        return self.status == "plain" or (self.config.gate != "sigmoid" and not self.table.any())

    @property
    def thawed(self) -> bool:
        return self.status == "converted" and all(p.requires_grad for p in self.model.diffcr.routers.parameters())

    # --- what must hold after every rule -------------------------------------------------------------------------------
    @invariant()
    def is_what_it_was(self) -> None:
        """Class, keys in order, weights, frozen tensors and modes; nothing of torch's left switched."""
        model, converted, found = self.model, self.status != "plain", own(self.model)
        assert isinstance(model, self.case.cls) and type(model).__name__ == self.case.cls.__name__
        assert (type(model) is self.case.cls) != converted
        keys = [key for key in model.state_dict() if "lora_" not in key]
        assert [plain_name(key) for key in keys if not key.startswith("diffcr.")] == self.keys
        assert any(key.startswith("diffcr.") for key in keys) == hasattr(model, "diffcr") == converted
        assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in self.weights.items()}
        assert [name for name, tensor in found.items() if not torch.equal(tensor, self.weights[name])] == []
        assert {name for name, tensor in found.items() if not tensor.requires_grad} == self.frozen
        assert modes(model) == self.modes
        assert torch._C._len_torch_function_stack() == 0 and torch._C._len_torch_dispatch_stack() == 0
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    @invariant()
    @torch.no_grad()
    def answers(self) -> None:
        """The same twice, and what the reference says; then the routing is what it must be, and the ratios within their bounds."""
        with quietly():
            first, second = self.run(MIXED), self.run(MIXED)
        assert torch.equal(first, second)
        self.check(first, output(self.reference()(**self.inputs(MIXED))))
        if self.status != "plain":
            found = self.model.diffcr.state_dict()
            assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in self.routing.items()}
            assert all(torch.equal(tensor, self.routing[name]) for name, tensor in found.items())

    # --- what several rules do
    def convert_(self, *given: Any) -> None:
        with quietly():
            assert dcs.convert_(self.model, *given) is self.model
        self.status = "converted"
        self.routing = self.learned()
        assert bool((self.table == self.config.initial_ratio).all())

    def go_on_with(self, twin: nn.Module) -> None:
        """Put a twin, which has no hooks, in the model's place; the truth stays."""
        self.model = self.root = twin
        self.hooks = {}
