"""Models that write in place, switch gradients off, leave blocks out or are wrapped: specialised, they give what they give in eval."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import diffcr_surgery as dcs
from diffcr_surgery.errors import ConfigError, ConversionError, TraceError
from tests.models import CASES, output


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend, self.merge, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        query, key, value = self.attend(self.norm(x) + position).chunk(3, dim=-1)
        x = x + self.merge(functional.scaled_dot_product_attention(query, key, value))
        return x + self.mlp(x)


class Overwriting(Block):
    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        result: Tensor = x.add_(super().forward(x, position))
        return result


class Denoiser(nn.Module):
    """Tokens in, tokens out; ``between`` stands for what a model does between its blocks."""

    def __init__(
        self, between: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda x, start, position: x, kind: type[Block] = Block
    ) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 8)
        self.stack = nn.ModuleDict({"blocks": nn.ModuleList([Block(16), kind(16), Block(16), Block(16)])})
        self.between = [between]

    def forward(self, x: Tensor, position: Tensor, timestep: Tensor) -> Tensor:
        x = start = self.embed(x) + timestep[:, None, None] / 1000
        position = position + 0
        for block in self.stack["blocks"]:
            x = self.between[0](block(x, position), start, position)
        return self.head(x + start)


def inputs(times: tuple[float, ...] = (500.0, 500.0)) -> dict[str, Tensor]:
    return {"x": torch.randn(len(times), 12, 8), "position": torch.randn(len(times), 12, 16), "timestep": torch.tensor(times)}


def converted(model: nn.Module, ratio: float = 0.5, **settings: Any) -> nn.Module:
    dcs.convert_(model.eval(), inputs(), dcs.DiffCRConfig(**settings))
    with torch.no_grad():
        dcs.ratio_table(model).fill_(ratio)
        for router in model.diffcr.routers.values():
            router.weight.normal_()
    return model


def write_into_stream(x: Tensor, start: Tensor, position: Tensor) -> Tensor:
    x[:, :6] += 0.3 * start[:, :6]
    return x


def write_into_table(x: Tensor, start: Tensor, position: Tensor) -> Tensor:
    position[:, :6] = position[:, :6] * 0.3
    return x


def write_through_a_view(x: Tensor, start: Tensor, position: Tensor) -> Tensor:
    x.chunk(2, dim=1)[0].mul_(0.5)
    return x


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("between", [write_into_stream, write_into_table, write_through_a_view])
@torch.no_grad()
def test_writes_between_blocks_are_seen(between: Any, share: int) -> None:
    model, call = converted(Denoiser(between), share_routing=share), inputs()
    expected = model(**call)
    kept = {name: tensor.clone() for name, tensor in call.items()}
    dcs.specialize_(model)
    assert torch.equal(model(**call), expected)
    assert all(torch.equal(call[name], tensor) for name, tensor in kept.items())


@torch.no_grad()
def test_a_site_that_is_gone_does_not_alias_its_stream() -> None:
    """The second block overwrites what the first was given, which is read again at the end."""
    model, call = Denoiser(kind=Overwriting), inputs()
    reference = Denoiser(kind=Overwriting)
    reference.load_state_dict(model.state_dict())
    reference.stack["blocks"][0].forward = lambda x, position: x.clone()
    expected = reference(**call)
    converted(model, 0.0, bins=(0.0, 0.5, 1.0), max_ratio=0.95)
    dcs.ratio_table(model)[0] = 0.95
    dcs.specialize_(model)
    assert torch.equal(model(**call), expected)


@pytest.mark.parametrize("decorate", [torch.no_grad(), torch.inference_mode()], ids=["no_grad", "inference_mode"])
def test_the_callers_gradient_mode_is_left_alone(decorate: Any) -> None:
    class Decorated(Denoiser):
        forward = decorate(Denoiser.forward)

    model = dcs.specialize_(converted(Decorated()))
    for _ in range(2):
        assert not model(**inputs()).requires_grad
        assert torch.is_grad_enabled()


def test_an_error_in_a_block_leaves_the_gradient_mode_alone() -> None:
    class Decorated(Denoiser):
        forward = torch.no_grad()(Denoiser.forward)

    model = dcs.specialize_(converted(Decorated()))
    model(**inputs())
    model.stack["blocks"][2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        model(**inputs())
    assert torch.is_grad_enabled()


def test_every_part_of_a_mixed_call_has_gradients() -> None:
    class Frozen(Denoiser):
        def forward(self, x: Tensor, position: Tensor, timestep: Tensor) -> Tensor:
            result = super().forward(x, position, timestep)
            with torch.no_grad():
                scale = timestep[:, None, None].sin()
            return result * scale

    model = converted(Frozen(), timestep_regions=2, timestep_range=(0, 1000))
    with torch.no_grad():
        dcs.ratio_table(model)[:, 1] = 0.2
    dcs.specialize_(model)
    call = inputs((100.0, 900.0))
    call["x"].requires_grad_()
    model(**call).sum().backward()
    assert call["x"].grad.abs().sum(dim=(1, 2)).gt(0).all()


@pytest.mark.parametrize("ratio", [0.0, 0.45])
def test_a_reentrant_checkpoint_hides_no_gradient(ratio: float) -> None:
    """Its forward runs with gradients off; those of the dense model come from a second run."""

    class Checkpointed(Denoiser):
        reentrant = True

        def forward(self, x: Tensor, position: Tensor, timestep: Tensor) -> Tensor:
            x = self.embed(x) + timestep[:, None, None] / 1000
            for block in self.stack["blocks"]:
                x = checkpoint(block, x, position, use_reentrant=self.reentrant)
            return self.head(x)

    dense, call = Checkpointed(), inputs()
    model = copy.deepcopy(dense).train()
    dcs.convert_(model, call, dcs.DiffCRConfig())
    with torch.no_grad():
        dcs.ratio_table(model).fill_(ratio)
    other = copy.deepcopy(model)
    other.reentrant = False
    for each in (dense, model, other):
        each(**call).square().mean().backward()
    for name, parameter in model.named_parameters():
        wanted = dense.get_parameter(name) if ratio == 0 and not name.startswith("diffcr.") else other.get_parameter(name)
        assert wanted.grad is not None and parameter.grad is not None and torch.equal(parameter.grad, wanted.grad), name


@pytest.mark.parametrize("share", [1, 2])
@torch.no_grad()
def test_a_call_may_leave_out_the_block_that_decides(share: int) -> None:
    """As diffusers' skip-layer guidance does."""
    case = CASES["sd3"]
    model = case.build(0)
    call = case.inputs(model, 2, seed=1)
    dcs.convert_(model, call, dcs.DiffCRConfig(share_routing=share, initial_ratio=0.5))
    expected = output(model(**call, skip_layers=[0]))
    dcs.specialize_(model)
    assert torch.equal(output(model(**call, skip_layers=[0])), expected)


@torch.no_grad()
def test_a_container_may_be_wrapped_after_conversion() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(16), Block(16)])

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, position)
            return x

    class Staged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.stage, self.head = nn.Linear(8, 16), Stage(), nn.Linear(16, 8)

        def forward(self, x: Tensor, position: Tensor, timestep: Tensor) -> Tensor:
            return self.head(self.stage(self.embed(x) + timestep[:, None, None], position))

    model, call = converted(Staged()), inputs()
    expected = model(**call)
    model.stage = checkpoint_wrapper(model.stage)
    assert torch.equal(model(**call), expected)
    assert torch.equal(dcs.specialize_(model)(**call), expected)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(lambda _, args, output: 2 * output),
    "before": lambda module: module.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "backward": lambda module: module.register_full_backward_hook(lambda _, given, taken: (2 * given[0],)),
    "before backward": lambda module: module.register_full_backward_pre_hook(lambda _, taken: (2 * taken[0],)),
}


@pytest.mark.parametrize("put", HOOKS.values(), ids=HOOKS)
def test_hooks_work_where_modules_are_kept_whole_and_are_refused_elsewhere(put: Callable[[nn.Module], Any]) -> None:
    """A sequence of blocks is spelled out, so what hangs on it would never run."""
    width = 8
    layers = [nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, norm_first=True, dropout=0.0) for _ in range(2)]
    model = nn.Sequential(nn.Linear(width, width), nn.Sequential(*layers), nn.Linear(width, width))
    plain, x = copy.deepcopy(model), torch.randn(2, 6, width, requires_grad=True)
    dcs.convert_(model, (x,), dcs.DiffCRConfig())
    model(x)
    handle = put(model.get_submodule("1"))
    with pytest.raises(TraceError, match=r"hook on '1' \(Sequential\).*never run.*such as '1\.0'"):
        model(x)
    handle.remove()
    assert torch.equal(model(x), plain(x))
    for each in (model, plain):
        put(each)
        put(each.get_submodule("0"))
        put(each.get_submodule("1.0"))
        each(x).square().mean().backward()
    assert torch.equal(model(x), plain(x))
    assert all(torch.equal(model.get_parameter(name).grad, parameter.grad) for name, parameter in plain.named_parameters())


@torch.no_grad()
def test_no_region_of_a_specialised_model_is_made_twice() -> None:
    regions = 70
    model = converted(Denoiser(), timestep_regions=regions, timestep_range=(0, 1000))
    dcs.ratio_table(model).copy_(torch.tensor([[(region // 10 ** min(row, 1) % 10) / 10 for region in range(regions)] for row in range(4)]))
    dcs.specialize_(model)
    made = []
    for _ in range(2):
        for region in range(regions):
            model(**inputs((1000.0 * (region + 0.5) / regions,) * 2))
        made.append({id(graph) for graph in model.diffcr.graphs()})
    assert made[0] == made[1] and len(made[0]) == len({model.diffcr.fixed[region] for region in range(regions)}) > 64


@torch.no_grad()
def test_the_variant_that_answered_is_tried_first() -> None:
    class Guarded(Denoiser):
        def forward(self, x: Tensor, position: Tensor, timestep: Tensor) -> Tensor:
            result = super().forward(x, position, timestep)
            return result * 3 if int(timestep[0]) > 500 else result

    model = dcs.specialize_(converted(Guarded()))
    runs: list[int] = []
    model.stack["blocks"][0].register_forward_hook(lambda *_: runs.append(1))
    for time in (100.0, 100.0, 900.0, 900.0):
        model(**inputs((time, time)))
    runs.clear()
    for time, expected in ((900.0, 1), (100.0, 2), (100.0, 1), (900.0, 2), (900.0, 1)):
        model(**inputs((time, time)))
        assert len(runs) == expected, time
        runs.clear()


@torch.no_grad()
def test_threads_that_make_the_first_mixed_call_together() -> None:
    model = converted(Denoiser(), timestep_regions=2, timestep_range=(0, 1000))
    dcs.ratio_table(model)[:, 1] = 0.2
    dcs.specialize_(model)
    call = inputs((100.0, 900.0))
    singles = torch.cat([model(**{name: tensor[i : i + 1] for name, tensor in call.items()}) for i in range(2)])
    answers: list[Tensor] = []
    threads = [threading.Thread(target=lambda: answers.append(torch.no_grad()(model)(**call))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    for answer in answers:
        torch.testing.assert_close(answer, singles, atol=1e-6, rtol=1e-5)


def test_costs_cannot_be_counted_on_a_call_that_leaves_blocks_out() -> None:
    case = CASES["sd3"]
    model = case.build(0)
    call = case.inputs(model, 1, seed=1)
    dcs.convert_(model, call, dcs.DiffCRConfig(initial_ratio=0.5))
    for budget in (None, 0.8):
        with pytest.raises(ConfigError, match=r"leave out the blocks \['transformer_blocks.0'\]"):
            dcs.specialize_(model, budget, cost="flops", example_inputs={**call, "skip_layers": [0]})
    assert not model.diffcr.specialized


def test_a_class_that_was_put_on_top_is_not_taken_off() -> None:
    class Scaled(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, **call: Tensor) -> Tensor:
            return super().forward(**call) * self.scale

    model = converted(Scaled())
    parametrize.register_parametrization(model, "scale", nn.Identity())
    with pytest.raises(ConversionError, match=r"ParametrizedScaled.*parametrize"):
        dcs.restore_(model)
    parametrize.remove_parametrizations(model, "scale")
    assert type(dcs.restore_(model)) is Scaled
