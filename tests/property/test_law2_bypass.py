"""Law 2: a bypassed token leaves its block as it entered; a kept one as if the block had seen the kept tokens alone."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import Case, each_case, output
from tests.property.scenarios import Branch, Scenario, by_hand, few, kept_count, scenarios, top_tokens

COMPRESSED = st.sampled_from([tenths / 10 for tenths in range(1, 10)])


@each_case
@given(data=st.data())
@few
def test_inference_equals_routing_by_hand(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case))
    converted = scenario.convert(scenario.original())
    executed = converted.diffcr.executed_ratios()

    def ways(site: int, region: int) -> list[Branch]:
        return [Branch(1.0, kept_count(float(executed[site, region]), scenario.size.tokens))]

    with torch.no_grad():
        expected = by_hand(scenario, converted, ways)
        actual = output(converted(**scenario.inputs(converted)))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


class Watch:
    """Streams of one call, seen from outside: what enters and leaves each site, what enters and leaves its block."""

    def __init__(self, model: nn.Module, scenario: Scenario) -> None:
        case, inputs = scenario.case, scenario.inputs(model)
        with torch.no_grad():
            model(**inputs)  # the first call records the model, and hooks would see the recording too
        self.streams: list[Tensor] = []  # at every router, then at the tail
        self.scores: list[Tensor] = []
        self.inside: list[list[tuple[Tensor, Tensor]]] = []
        for index, (path, _) in enumerate(case.sites):
            self.inside.append([])
            model.diffcr.routers[str(index)].register_forward_hook(self._router)
            model.get_submodule(path).register_forward_hook(self._block(case, index), with_kwargs=True)
        model.get_submodule(case.tail).register_forward_pre_hook(lambda _, args: self.streams.append(args[0].clone()))
        with torch.no_grad():
            model(**inputs)

    def _router(self, _: nn.Module, args: tuple[Tensor], scores: Tensor) -> None:
        self.streams.append(args[0].clone())
        self.scores.append(scores.clone())

    def _block(self, case: Case, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            stream = kwargs[case.stream] if case.stream in kwargs else args[0]
            out = result[1] if isinstance(result, tuple) else result
            self.inside[index].append((stream.clone(), out.clone()))

        return hook

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """Input and output `b k c` of a block, whether it was called once or sample by sample."""
        before, after = zip(*self.inside[index], strict=True)
        return torch.cat(before), torch.cat(after)


@each_case
@given(data=st.data())
@few
def test_bypassed_tokens_are_untouched_and_kept_ones_are_the_blocks(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case, ratios=COMPRESSED, min_tokens=10, same_region=True, shares=[1]))
    model = scenario.convert(scenario.original())
    watch = Watch(model, scenario)
    executed = model.diffcr.executed_ratios()[:, scenario.sample_regions[0]]
    assert len(watch.scores) == len(case.sites)
    for site, scores in enumerate(watch.scores):
        before, after = watch.streams[site], watch.streams[site + 1]
        kept = top_tokens(scores, kept_count(float(executed[site]), scenario.size.tokens))
        entered, left = watch.block(site)
        places = kept[..., None].expand(-1, -1, before.shape[-1])
        chosen = before.gather(1, places)
        # The block may be given its tokens in any order: bring them into ours.
        order = torch.cdist(chosen, entered).argmin(dim=2)[..., None].expand_as(chosen)
        assert torch.equal(entered.gather(1, order), chosen)
        factor = {"doubled_sigmoid": 2 * scores, "straight_through": torch.ones_like(scores), "sigmoid": scores}
        gate = factor[scenario.gate].gather(1, kept)[..., None]
        expected = chosen + gate * (left.gather(1, order) - chosen)
        torch.testing.assert_close(after.gather(1, places), expected, atol=1e-5, rtol=1e-4)
        bypassed = torch.ones_like(scores, dtype=torch.bool).scatter(1, kept, False)
        assert torch.equal(after[bypassed], before[bypassed])
        assert (after[~bypassed] != before[~bypassed]).any(dim=1).all()
