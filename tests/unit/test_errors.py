"""Bad input: a `SurgeryError` that says what to do, and a model left as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffcr_surgery as dcs
from tests.models import CASES, Case, each_case, snapshot

DIT, PIXART = CASES["dit"], CASES["pixart"]


def config(**changes: Any) -> dcs.DiffCRConfig:
    return dcs.DiffCRConfig(**{"target_ratio": 0.3, "timestep_regions": 4, "timestep_range": (0, 1000)} | changes)


def converted(case: Case = DIT, **options: Any) -> nn.Module:
    model = case.build(0, **options)
    return dcs.convert_(model, case.inputs(model, 2, 1), config(timestep_range=case.timestep_range))


def refused(model: nn.Module, call: Callable[[], Any], *words: str) -> dcs.errors.SurgeryError:
    """Check that a call raises a `SurgeryError` with these words in it and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(dcs.errors.SurgeryError) as caught:
        call()
    assert snapshot(model) == before
    assert type(caught.value) is not dcs.errors.SurgeryError
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    return caught.value


# --- inputs that are not the model's ---------------------------------------------------------------------------------
def _wrong_inputs() -> dict[str, tuple[Any, tuple[str, ...]]]:
    inputs = DIT.inputs(DIT.build(0), 2, 1)
    image = inputs["hidden_states"]
    return {
        "unknown argument": ({"pixels": image}, ("pixels", "hidden_states", "timestep")),
        "missing argument": ({"timestep": inputs["timestep"]}, ("hidden_states",)),
        "too many": ((image,) * 9, ("hidden_states", "positional")),
        "not arguments at all": ("hidden_states", ("str", "dict", "capture_inputs")),
        "nothing": ({}, ("hidden_states",)),
        "wrong channels": (inputs | {"hidden_states": image[:, :3]}, ("DiTTransformer2DModel", "hidden_states", "3")),
        "wrong batch": (inputs | {"class_labels": inputs["class_labels"][:1].repeat(5)}, ("DiTTransformer2DModel",)),
        "class out of range": (inputs | {"class_labels": torch.tensor([99, 0])}, ("DiTTransformer2DModel",)),
    }


WRONG = _wrong_inputs()


@pytest.mark.parametrize("verb", ["trace", "plan", "convert_"])
@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_do_not_fit(name: str, verb: str) -> None:
    model = DIT.build(0)
    given, words = WRONG[name]
    arguments = (given,) if verb == "trace" else (given, config())
    refused(model, lambda: getattr(dcs, verb)(model, *arguments), *words)


# --- models with nothing to route ------------------------------------------------------------------------------------
class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.conv(x))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(ConvBlock(), ConvBlock())

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.stages(x * timestep[:, None, None, None])


class NeighbourBlock(nn.Module):
    """Attention beside a convolution along the tokens: not a function of a set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0] + self.mix(x.mT).mT
        return x + self.mlp(x)


class Neighbours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([NeighbourBlock(16), NeighbourBlock(16)])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + timestep[:, None, None] / 1000
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("verb", ["plan", "convert_"])
def test_no_block_lists_the_classes_seen(verb: str) -> None:
    model = ConvNet()
    inputs = {"x": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([100, 900])}
    error = refused(model, lambda: getattr(dcs, verb)(model, inputs, config()), "ConvNet", "ConvBlock")
    assert isinstance(error, dcs.errors.NoRoutableBlockError)


@pytest.mark.parametrize("verb", ["plan", "convert_"])
def test_blocks_that_are_no_function_of_a_set_are_listed_with_the_reason(verb: str) -> None:
    model = Neighbours().eval()
    inputs = {"x": torch.randn(2, 12, 16), "timestep": torch.tensor([100, 900])}
    words = ("NeighbourBlock", "layers.0", "layers.1")
    error = refused(model, lambda: getattr(dcs, verb)(model, inputs, config()), *words)
    assert isinstance(error, dcs.errors.NoRoutableBlockError)


def test_block_filter_that_matches_nothing_lists_the_blocks() -> None:
    model = DIT.build(0)
    inputs = DIT.inputs(model, 2, 1)
    refused(model, lambda: dcs.plan(model, inputs, config(blocks="nothing")), "blocks", "nothing", "transformer_blocks.0")


# --- the wrong moment ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("verb", ["plan", "convert_"])
def test_converted_models_are_not_converted_again(verb: str) -> None:
    model = converted()
    inputs = DIT.inputs(model, 2, 1)
    error = refused(model, lambda: getattr(dcs, verb)(model, inputs, config()), "DiTTransformer2DModel", "restore_")
    assert isinstance(error, dcs.errors.ConversionError)


def test_plan_made_before_the_conversion_is_refused_after_it() -> None:
    model = DIT.build(0)
    plan = dcs.plan(model, DIT.inputs(model, 2, 1), config())
    dcs.convert_(model, plan)
    refused(model, lambda: dcs.convert_(model, plan), "restore_")


def test_plan_of_another_model_is_refused() -> None:
    plan = dcs.plan(DIT.build(0), DIT.inputs(DIT.build(0), 2, 1), config())
    other = PIXART.build(0)
    refused(other, lambda: dcs.convert_(other, plan), "DiTTransformer2DModel", "PixArtTransformer2DModel", "plan")


@pytest.mark.parametrize("verb", ["restore_", "specialize_", "ratio_table", "ratio_loss"])
def test_plain_models_have_to_be_converted_first(verb: str) -> None:
    model = DIT.build(0)
    error = refused(model, lambda: getattr(dcs, verb)(model), "DiTTransformer2DModel", "convert_")
    assert isinstance(error, dcs.errors.ConversionError)


def test_plain_models_have_no_adapter_to_save(tmp_path: Path) -> None:
    model = DIT.build(0)
    refused(model, lambda: dcs.save_adapter(model, tmp_path / "out"), "convert_")
    assert not (tmp_path / "out").exists()


# --- timesteps -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("verb", ["plan", "convert_"])
def test_unknown_timestep_argument(verb: str) -> None:
    model = DIT.build(0)
    inputs = DIT.inputs(model, 2, 1)
    words = ("timestep_argument", "'sigma'", "timestep", "class_labels")
    error = refused(model, lambda: getattr(dcs, verb)(model, inputs, config(timestep_argument="sigma")), *words)
    assert isinstance(error, dcs.errors.TimestepError)


def test_range_the_examples_leave_open_is_asked_for() -> None:
    model = DIT.build(0)
    inputs = DIT.inputs(model, 2, 1, timesteps=torch.zeros(2, dtype=torch.int64))
    error = refused(model, lambda: dcs.plan(model, inputs, config(timestep_range="auto")), "timestep_range", "timestep")
    assert isinstance(error, dcs.errors.TimestepError)


@each_case
def test_timestep_outside_the_range_is_refused_at_the_call(case: Case) -> None:
    model = converted(case)
    high = case.timestep_range[1]
    for wrong in (-high, 2 * high):
        times = torch.tensor([high / 2, wrong], dtype=case.timestep_dtype)
        words = ("timestep_range", "timestep", f"{high:g}", f"{wrong:g}")
        error = refused(model, lambda times=times: model(**case.inputs(model, 2, 1, timesteps=times)), *words)
        assert isinstance(error, dcs.errors.TimestepError)


# --- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [-0.1, 0.05, 1.5, float("nan"), "half"])
def test_budget_out_of_range(budget: Any) -> None:
    model = converted()
    refused(model, lambda: dcs.specialize_(model, budget=budget), "budget", str(budget), "[0.1, 1]")


# --- adapters --------------------------------------------------------------------------------------------------------
@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the tiny DiT."""
    dcs.save_adapter(converted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused_adapter(folder: Path, *words: str, case: Case = DIT, **options: Any) -> None:
    model = case.build(0, **options)
    inputs = case.inputs(model, 2, 1)
    error = refused(model, lambda: dcs.load_adapter_(model, folder, inputs), *words)
    assert isinstance(error, dcs.errors.AdapterError)


def weights_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def config_file(folder: Path) -> Path:
    (path,) = folder.glob("*.json")
    return path


def test_adapter_of_the_same_model_loads(adapter: Path) -> None:
    """What the refusals below are measured against."""
    model = DIT.build(0)
    dcs.load_adapter_(model, adapter, DIT.inputs(model, 2, 1))
    assert isinstance(dcs.ratio_table(model), nn.Parameter)


def test_adapter_of_another_class(adapter: Path) -> None:
    refused_adapter(adapter, "DiTTransformer2DModel", "PixArtTransformer2DModel", case=PIXART)


def test_adapter_of_a_wider_model(adapter: Path) -> None:
    refused_adapter(adapter, "16", "24", width=24)


def test_adapter_of_a_deeper_model(tmp_path: Path) -> None:
    """Other sites are named, here those of a model whose middle block was left dense."""
    model = DIT.build(0)
    blocks = r"transformer_blocks\.[02]"
    dcs.convert_(model, DIT.inputs(model, 2, 1), config(blocks=blocks))
    dcs.save_adapter(model, tmp_path)
    settings = config_file(tmp_path)
    text = settings.read_text().replace("transformer_blocks.2", "transformer_blocks.7")
    assert text != settings.read_text()
    settings.write_text(text)
    refused_adapter(tmp_path, "transformer_blocks.7")


def test_missing_folder_and_missing_files(adapter: Path, tmp_path: Path) -> None:
    refused_adapter(tmp_path / "nowhere", "nowhere", "save_adapter")
    for path in (weights_file(adapter), config_file(adapter)):
        content = path.read_bytes()
        path.unlink()
        refused_adapter(adapter, path.name, "save_adapter")
        path.write_bytes(content)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"version": 1}', '"text"', "[" * 100_000])
def test_json_that_is_no_adapter(adapter: Path, content: str) -> None:
    path = config_file(adapter)
    path.write_text(content)
    refused_adapter(adapter, path.name)


def test_foreign_tensors_are_named(adapter: Path) -> None:
    path = weights_file(adapter)
    save_file(load_file(path) | {"stranger": torch.zeros(1)}, path)
    refused_adapter(adapter, path.name, "stranger")
