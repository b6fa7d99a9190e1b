"""The laws of `diffcr_surgery.testing` over the models it draws, and on the six real classes; then laws that are broken on purpose."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery import testing as dt
from diffcr_surgery.axes import TOKEN_WORDS, parse_axes
from diffcr_surgery.ratios import Budget
from diffcr_surgery.rewrite import ops
from diffcr_surgery.testing import laws
from diffcr_surgery.testing.strategies import SEEDS, architectures
from diffcr_surgery.tokens import gather_each
from tests.models import Case, each_case
from tests.mutation.plant import BUGS, plant
from tests.property.scenarios import few

LAWS = [
    dt.check_conversion,
    dt.check_bypass,
    dt.check_mixed_timesteps,
    dt.check_gradients,
    dt.check_round_trip,
    dt.check_specialization,
]
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
drawn = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])


@each_law
@given(data=st.data())
@drawn
def test_laws_hold_for_drawn_denoisers(law: Callable[..., None], data: st.DataObject) -> None:
    model = data.draw(dt.denoisers())
    config = data.draw(dt.configs(model))
    seed = {} if law is dt.check_conversion else {"seed": data.draw(SEEDS)}
    law(model, data.draw(dt.inputs_for(model)), config, **seed)


@pytest.mark.parametrize("law", [dt.check_conversion, dt.check_bypass, dt.check_round_trip, dt.check_specialization])
@given(data=st.data())
@drawn
def test_laws_hold_under_autocast(law: Callable[..., None], data: st.DataObject) -> None:
    """A stream may then change its precision on the way through a block. (Laws on slopes ask for more than half precision has.)"""
    model = data.draw(dt.denoisers())
    with torch.autocast("cpu", torch.bfloat16):
        law(model, data.draw(dt.inputs_for(model)), data.draw(dt.configs(model)))


@given(data=st.data())
@drawn
def test_laws_take_converted_models_with_the_ratios_they_have(data: st.DataObject) -> None:
    model = data.draw(dt.denoisers())
    inputs = data.draw(dt.inputs_for(model))
    dcs.convert_(model, inputs, data.draw(dt.configs(model)))
    table = data.draw(dt.ratio_tables(model))
    with torch.no_grad():
        dcs.ratio_table(model).copy_(table)
        for router in model.diffcr.routers.values():
            router.weight.normal_(generator=torch.Generator().manual_seed(data.draw(SEEDS)))
    before = copy.deepcopy(model.state_dict())
    data.draw(st.sampled_from([law for law in LAWS if law is not dt.check_conversion]))(model, inputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@given(drawn_block=dt.blocks_with_pattern())
@drawn
def test_declared_patterns_agree_with_the_proof(drawn_block: tuple[dcs.BlockPattern, nn.Module, dict[str, Any]]) -> None:
    """The laws' own permutations and the library's accept what is true, and reject it with any argument left out."""
    dt.check_pattern(*drawn_block)


def meaning(axes: str, samples: int) -> tuple[str, ...]:
    """What counts of an axis pattern: which axes are tokens or samples, if there are several; all others are channels, whatever named."""
    return tuple(word if word in TOKEN_WORDS or (word == "b" and samples > 1) else "c" for word in axes.split())


@given(data=st.data())
@drawn
def test_the_search_finds_what_moves_and_what_stays(data: st.DataObject) -> None:
    """Whatever the sizes, and however many of them are alike, what is found is the truth."""
    model = data.draw(dt.denoisers())
    inputs = data.draw(dt.inputs_for(model))
    form, text = model.form, inputs.get("text")
    plan = dcs.plan(model, inputs)
    staying = form.registers + (text.shape[1] if text is not None and form.text_inside else 0)
    samples = 1 if form.layout == "n c" else len(inputs["latent"])
    for number, site in enumerate(plan.sites):
        assert site.routed, site.reason
        moving = {name: axes for name, axes in form.moving.items() if name != "skip" or hasattr(model.blocks[number], "merge")}
        found, wanted = ({name: meaning(axes, samples) for name, axes in each.items()} for each in (site.aligned, moving))
        assert found == wanted
        assert site.hint[1] == (form.residual == "outside")
        assert (site.tokens, site.staying) == (inputs["latent"].shape[-2], staying)


@each_law
@each_case
@given(data=st.data())
@few
def test_laws_hold_for_real_classes(case: Case, law: Callable[..., None], data: st.DataObject) -> None:
    model = case.build(data.draw(st.integers(0, 99)), label_dropout=law is dt.check_conversion)
    config = data.draw(dt.configs(timestep_range=case.timestep_range))
    inputs = case.inputs(model, data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99)))
    more: dict[str, Any] = {} if law is dt.check_conversion else {"seed": data.draw(SEEDS)}
    law(model, inputs, config, **more | ({"shared": case.shared} if law is dt.check_mixed_timesteps else {}))


@given(form=architectures(), seed=st.integers(0, 99))
@drawn
def test_a_drawn_model_prints_as_the_code_that_builds_it(form: dt.Architecture, seed: int) -> None:
    model = dt.Denoiser(form, seed)
    again = eval(repr(model), {"Denoiser": dt.Denoiser, "Architecture": dt.Architecture})
    assert again.form == form
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@given(pattern=dt.block_patterns())
@drawn
def test_drawn_patterns_are_well_formed(pattern: dcs.BlockPattern) -> None:
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert all(str(parse_axes(words)) == " ".join(words.split()) for words in pattern.inputs.values())


def forgets_the_table(x: Tensor, kept: Tensor, pattern: str, tokens: int) -> Tensor:
    """A planted bug: a table `n d` shared by the samples is cut to length instead of gathered."""
    if pattern.split()[:1] != ["n"] or pattern.count("n") > 1:
        return gather_each(x, kept, pattern, tokens)
    return x[: kept.shape[1]].expand(len(kept), -1, -1)


def test_a_planted_bug_shrinks_to_one_block_and_three_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffcr_surgery.rewrite.emit.gather_each", forgets_the_table)

    def breaks(situation: tuple[dt.Denoiser, dict[str, Any], dcs.DiffCRConfig]) -> bool:
        try:
            dt.check_bypass(*situation)
        except dt.LawError:
            return True
        return False

    situations = dt.denoisers().flatmap(lambda model: st.tuples(st.just(model), dt.inputs_for(model), dt.configs(model)))
    model, inputs, config = find(situations, breaks, settings=settings(max_examples=2000, deadline=None, database=None, derandomize=True))
    assert repr(model) == "Denoiser(Architecture(rotary='shared'))"
    assert inputs["latent"].shape == (2, 3, 4)  # two samples keep two tokens each: of one alone, its angle means nothing
    assert config.timestep_regions == 1
    with pytest.raises(
        dt.LawError, match=r"check_bypass: the output\[\d, \d, \d\] is .*; expected .*\. The last routed block before it is blocks\.0\."
    ):
        dt.check_bypass(model, inputs, config)


SITUATION = dt.Denoiser(dt.Architecture(depth=2, condition="sample"))
CALL = {"latent": torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)), "timestep": torch.tensor([10.0, 500.0, 990.0])}
CONFIG = dcs.DiffCRConfig(timestep_regions=2, timestep_range=(0, 1000))


def test_bypass_names_the_token_that_was_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    scatter = dcs.rewrite.emit.scatter_tokens
    monkeypatch.setattr("diffcr_surgery.rewrite.emit.scatter_tokens", lambda *given: scatter(*given) + 1e-6)
    with pytest.raises(dt.LawError, match=r"token \d of sample \d bypassed blocks\.0, and did not leave it as it entered"):
        dt.check_bypass(SITUATION, CALL, CONFIG)


def test_gradients_name_the_site_they_do_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = ops.blend_weight
    monkeypatch.setattr(ops, "blend_weight", lambda table, site, *rest: weight(table.detach() if site else table, site, *rest))
    with pytest.raises(dt.LawError, match=r"no gradient reaches the ratio of blocks\.1 in region 0"):
        dt.check_gradients(SITUATION, CALL, CONFIG)


def test_gradients_name_the_site_whose_slope_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = ops.blend_weight
    monkeypatch.setattr(ops, "blend_weight", lambda *given: 2 * weight(*given).detach() - weight(*given))
    with pytest.raises(dt.LawError, match=r"the gradient of the ratio of blocks\.1 in region 0 is .*; the loss has a slope of"):
        dt.check_gradients(SITUATION, CALL, CONFIG)


@pytest.mark.parametrize(
    ("rounded", "text"),
    [
        (lambda table: torch.zeros_like(table), r"blocks\.\d is executed at 0\.000 in region \d; its ratio 0\.\d* lies at"),
        (lambda table: (table * 10).floor() / 10, r"rounding moves the mean ratio by 0\.\d*, more than half a step of one ratio"),
    ],
    ids=["to nothing", "down"],
)
def test_specialization_names_the_ratio_that_is_not_executed(rounded: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "round", lambda self, table: rounded(table))
    with pytest.raises(dt.LawError, match=text):
        dt.check_specialization(SITUATION, CALL, CONFIG)


def test_large_gradients_may_not_be_wrong_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is a sum over many tokens has gradients in the thousands, and they may not be wrong in the first digit."""
    model = copy.deepcopy(SITUATION)
    with torch.no_grad():
        model.head.weight.mul_(100)
    dt.check_mixed_timesteps(model, CALL, CONFIG)
    gates = ops.gate_factor
    monkeypatch.setattr(
        ops, "gate_factor", lambda scores, *rest: gates(scores if len(scores) == 1 else 2 * scores - scores.detach(), *rest)
    )
    with pytest.raises(dt.LawError, match=r"the gradient in eval of"):
        dt.check_mixed_timesteps(model, CALL, CONFIG)


def test_conversion_names_what_planning_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(SITUATION)
    planned = laws.plan

    def touching(copied: nn.Module, *given: Any) -> dcs.SurgeryPlan:
        copied.blocks[1].out.bias.data.add_(1.0)
        return planned(copied, *given)

    monkeypatch.setattr(laws, "plan", touching)
    with pytest.raises(dt.LawError, match=r"check_conversion: planning has changed tensor blocks\.1\.out\.bias"):
        dt.check_conversion(model, CALL, CONFIG)


def test_specialization_names_site_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffcr_surgery.rewrite.emit.kept_count", lambda ratio, tokens, staying=0: max(1, tokens - int(ratio * tokens) - 1))
    with pytest.raises(dt.LawError, match=r"blocks\.\d was given \[\d\] tokens; at the ratios \{.*\} of 6 it has to be \[\d(, \d)*\]"):
        dt.check_specialization(SITUATION, CALL, CONFIG)


def test_patterns_are_told_what_is_missing_or_needless() -> None:
    block, angles = dt.Denoiser(dt.Architecture(block="cross", rotary="shared")).blocks[0], torch.randn(5, 4)
    call = {"x": torch.randn(2, 5, 4), "text": torch.randn(2, 5, 4), "rotary": (angles.cos(), angles.sin())}
    target, truth = "diffcr_surgery.testing.denoisers:Block", {"x": "b n c", "rotary.0": "n d", "rotary.1": "n d"}
    dt.check_pattern(dcs.BlockPattern("true", target, truth), block, call)
    for inputs, text in (
        (
            {"x": "b n c", "rotary.0": "n d"},
            r"raises RuntimeError on permuted or on fewer tokens: .* 'rotary\.1' has to move with the tokens too, as 'n d'",
        ),
        (truth | {"text": "b n c"}, r"moves 'text', which need not move"),
        ({"x": "b n c"}, r"No single argument more or less makes it true"),
        ({"x": "b n c", "rotary.0": "n c d"}, r"'rotary\.0' is written 'n c d', and has the shape \(5, 4\)"),
        ({"words": "b n c"}, r"declares \['words'\]; the forward of .* takes \['bias', 'c', 'rotary', 'skip', 'text', 'x'\]"),
        ({"skip": "b n c"}, r"names the stream 'skip'; the call's tensors are \['rotary\.0', 'rotary\.1', 'text', 'x'\]"),
    ):
        with pytest.raises(dt.LawError, match=text):
            dt.check_pattern(dcs.BlockPattern("planted", target, inputs), block, call)
    with pytest.raises(dt.LawError, match=r"is for elsewhere:Block; the block is a diffcr_surgery\.testing\.denoisers:Block"):
        dt.check_pattern(dcs.BlockPattern("true", "elsewhere:Block", truth), block, call)
    with pytest.raises(dt.LawError, match="holds a single token; give at least two"):
        dt.check_pattern(dcs.BlockPattern("true", target, {"x": "b n c"}), block, {"x": torch.randn(2, 1, 4)})


def test_outputs_of_a_pattern_are_counted_in_axes() -> None:
    block, target = dt.Denoiser(dt.Architecture()).blocks[0], "diffcr_surgery.testing:denoisers.Block"
    call = {"x": torch.randn(2, 5, 4)}
    dt.check_pattern(dcs.BlockPattern("true", "diffcr_surgery.testing.denoisers:Block", {"x": "b n c"}, ("b n c",)), block, call)
    with pytest.raises(dt.LawError, match=r"writes its outputs \['n c'\]; they have \[3\] axes"):
        dt.check_pattern(dcs.BlockPattern("planted", "diffcr_surgery.testing.denoisers:Block", {"x": "b n c"}, ("n c",)), block, call)
    with pytest.raises(dt.LawError, match="is for"):
        dt.check_pattern(dcs.BlockPattern("planted", target, {"x": "b n c"}), block, call)


class Refined(nn.Module):
    """Its root writes into what a module returned, and adds registers to that."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner, self.place = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))
        self.blocks = dt.Denoiser(dt.Architecture(depth=2)).blocks

    def forward(self, latent: Tensor, text: Tensor) -> Tensor:
        words = self.refiner(text)
        words += self.place
        x = torch.cat([words, latent], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, words.shape[1] :]


@pytest.mark.parametrize(
    ("model", "inputs", "settings_"),
    [
        (SITUATION, CALL, {"timestep_regions": 4, "timestep_range": (0, 1000), "region_weights": (0.97, 0.01, 0.01, 0.01)}),
        (SITUATION, CALL, {"bins": (0, 0.1234567, 0.5), "max_ratio": 0.5}),
        (Refined().eval(), {"latent": torch.randn(2, 5, 4), "text": torch.randn(2, 3, 4)}, {}),
        (copy.deepcopy(SITUATION).bfloat16(), {"latent": CALL["latent"].bfloat16(), "timestep": CALL["timestep"]}, {}),
    ],
    ids=["regions weighted", "bins between thousandths", "written in place", "bfloat16"],
)
def test_sound_models_pass(model: nn.Module, inputs: dict[str, Tensor], settings_: dict[str, Any]) -> None:
    for law in LAWS:
        law(model, inputs, dcs.DiffCRConfig(**settings_))


def test_gradients_of_a_frozen_table_or_without_a_budget_are_no_fault() -> None:
    dt.check_gradients(SITUATION, CALL, dcs.DiffCRConfig(timestep_regions=2, timestep_range=(0, 1000), ratio_loss_weight=0.0))
    model = dcs.convert_(copy.deepcopy(SITUATION), CALL, CONFIG)
    with torch.no_grad():
        dcs.ratio_table(model).fill_(0.45)
        for router in model.diffcr.routers.values():
            router.weight.normal_(generator=torch.Generator().manual_seed(0))
    dcs.ratio_table(model).requires_grad_(False)
    dt.check_gradients(model, CALL)


def test_laws_take_a_bare_tensor() -> None:
    plain = dt.Denoiser(dt.Architecture())
    dt.check_conversion(plain, CALL["latent"])
    dt.check_bypass(plain, CALL["latent"])


def test_laws_refuse_what_they_cannot_check() -> None:
    model = dcs.convert_(copy.deepcopy(SITUATION), CALL, CONFIG)
    with pytest.raises(ValueError, match="or a converted one with the settings it has"):
        dt.check_bypass(model, CALL, CONFIG)
    larger = {"latent": torch.randn(3, 8, 4), "timestep": CALL["timestep"]}
    for law in (dt.check_gradients, dt.check_specialization):
        with pytest.raises(ValueError, match=r"in this call blocks\.0 has \[8\] tokens, and the model was planned with 6"):
            law(model, larger)
    dt.check_bypass(model, larger)
    with pytest.raises(ValueError, match="not yet specialised"):
        dt.check_bypass(dcs.specialize_(model), CALL)
    with pytest.raises(ValueError, match="is a latent"):
        dt.check_bypass(Counted(), {"words": torch.tensor([[1, 2, 3]])})
    with pytest.raises(ValueError, match=r"Unnamed\.forward takes \['words'\] by position alone"):
        dt.check_bypass(Unnamed(), (torch.tensor([[1, 2, 3]]),))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = dt.Denoiser(dt.Architecture()).blocks

    def forward(self, words: Tensor) -> Tensor:
        return self.blocks[0](self.embed(words))


class Unnamed(Counted):
    def forward(self, words: Tensor, /) -> Tensor:
        return super().forward(words)


def test_a_table_without_any_gradient_is_told_by_its_first_site(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = ops.blend_weight
    monkeypatch.setattr(ops, "blend_weight", lambda table, *rest: weight(table.detach(), *rest))
    with pytest.raises(dt.LawError, match=r"no gradient reaches the ratio of blocks\.0"):
        dt.check_gradients(SITUATION, CALL, CONFIG)


def test_planted_bugs_are_up_to_date(tmp_path: Path) -> None:
    """`plant` refuses a bug whose text the source does not hold exactly once."""
    for bug in BUGS:
        plant(bug, tmp_path / bug.name)


def test_inputs_like_a_call_keep_its_form() -> None:
    like = {"x": torch.randn(2, 3), "more": (torch.tensor([1, 2]), "text"), "flag": True}
    with pytest.raises(TypeError, match="inputs_for knows the models of denoisers"):
        dt.inputs_for(nn.Identity())
    found = find(dt.inputs_for(nn.Identity(), like=like), lambda _: True)
    assert found["x"].shape == (2, 3) and bool((found["x"].abs() < like["x"].abs() + 1e-9).all())
    assert found["more"][0] is like["more"][0] and found["more"][1] == "text" and found["flag"] is True
