"""Ways to train: mixed precision, gradient checkpointing, torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffcr_surgery as dcs
from diffcr_surgery.errors import ConversionError
from diffcr_surgery.testing import Architecture, Denoiser, check_conversion
from tests.models import CASES, output

pytestmark = [
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # torch's RMSNorm, in the original model too
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo looks at a block's inputs
]

each_way = pytest.mark.parametrize("branches", ["two", "boundary"])
# One class of each kind: plain blocks, text beside the image, text before it in one stream.
each_case = pytest.mark.parametrize("name", ["dit", "sd3", "flux", "pixart"])
SIZE = CASES["dit"].sizes[-1]


def prepared(name: str, ratio: float | None, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model in training, converted if a ratio is given, with routers that tell tokens apart."""
    case = CASES[name]
    model = case.build(0, size=SIZE, label_dropout=False).train()
    inputs = case.inputs(model, 2, 0, size=SIZE)
    if ratio is not None:
        dcs.convert_(model, inputs, dcs.DiffCRConfig(**settings))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            dcs.ratio_table(model).fill_(ratio)
            for router in model.diffcr.routers.values():
                nn.init.normal_(router.weight, std=0.5)
    return model, inputs


def gradients(model: nn.Module, inputs: dict[str, Any], call: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    result = output((model if call is None else call)(**inputs))
    result.float().square().mean().backward()
    return result.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@each_case
@each_way
def test_under_autocast_ratio_zero_is_the_original_bit_for_bit(name: str, branches: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        wanted, theirs = gradients(*prepared(name, None))
        got, ours = gradients(*prepared(name, 0.0, branches=branches))
    assert torch.equal(got, wanted) and got.dtype == wanted.dtype
    assert all(torch.equal(ours[key], gradient) for key, gradient in theirs.items())


@each_way
@pytest.mark.parametrize("tokens", [4, 5])  # of 4, the bins 0 and 0.1 keep all; of 5, the bins 0.2 and 0.3 keep four
def test_where_two_bins_keep_the_same_tokens_nothing_is_left_without_a_gradient(branches: str, tokens: int) -> None:
    """Processes that average gradients wait for each other: a parameter that is in the graph of one step has to be in that of the next."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.Sequential(block, copy.deepcopy(block)).train()
    stream = torch.randn(2, tokens, 8)
    plain = model(stream)
    dcs.convert_(model, (stream,), dcs.DiffCRConfig(branches=branches, initial_ratio=0.0 if tokens == 4 else 0.25))
    found = model(stream)
    found.square().mean().backward()
    assert torch.equal(found, plain) == (tokens == 4)
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not dcs.ratio_table(model).grad.any()  # a little more ratio changes nothing


@each_case
@each_way
def test_under_autocast_ratios_and_routers_learn_in_single_precision(name: str, branches: str) -> None:
    model, inputs = prepared(name, 0.45, branches=branches)
    exact, wanted = gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough, found = gradients(model, inputs)
    assert float((rough.float() - exact).abs().max()) < 0.2 * float(exact.std())
    for key in (key for key in wanted if key.startswith("diffcr.")):
        assert found[key].dtype == torch.float32 and found[key].isfinite().all() and found[key].any()
    assert torch.cosine_similarity(found["diffcr.ratio_table"].flatten(), wanted["diffcr.ratio_table"].flatten(), dim=0) > 0.8


@each_case
@each_way
@pytest.mark.parametrize("ratio", [0.0, 0.45])
def test_a_checkpointed_site_gives_the_same_and_keeps_only_its_inputs(name: str, branches: str, ratio: float) -> None:
    """Router, gathers, block, gate and skip are recomputed as one: what is kept from the forward does not grow with the block."""
    kept: dict[bool, int] = {}
    results = []
    for checkpointed in (False, True):
        model, inputs = prepared(name, ratio, branches=branches)
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(**inputs)  # records
        size: dict[int, int] = {}

        def pack(tensor: Tensor, size: dict[int, int] = size) -> Tensor:
            size[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = output(model(**inputs))
        kept[checkpointed] = sum(size.values())
        del result
        results.append(gradients(model, inputs))
    (one, wanted), (other, found) = results
    assert torch.equal(one, other) and all(torch.equal(found[key], gradient) for key, gradient in wanted.items())
    assert kept[True] < 0.6 * kept[False]


@each_way
@pytest.mark.parametrize(
    "form",
    [
        Architecture(block="single", rotary="sample", bias="keys", text_last=True),
        Architecture(depth=2, condition="sample", skips=True, layout="n b c"),
    ],
    ids=["tables", "skips"],
)
def test_gradients_at_ratio_0_are_added_in_the_dense_models_order(form: Architecture, branches: str) -> None:
    """The other ratio sends zeros back. Had they come first, a sum over a table or a stream would have gone by their strides."""
    for seed in (0, 1, 2, 12, 14, 28):
        source = torch.Generator().manual_seed(seed)
        inputs = {"latent": torch.randn(2, 5, 4, generator=source)}
        if form.reads_text:
            inputs["text"] = torch.randn(2, 2, 4, generator=source)
        if form.condition != "none":
            inputs["timestep"] = torch.zeros(2)
        config = dcs.DiffCRConfig(bins=(0.0, 0.25, 0.5, 0.75, 1.0), branches=branches, timestep_range=(0, 1000))
        check_conversion(Denoiser(form), inputs, config)


@each_way
def test_compiled_blocks_train_with_few_graphs_whatever_the_ratios(branches: str) -> None:
    """The way to compile a training step: block by block, since kept counts move as ratios are learned."""
    model, inputs = prepared("dit", 0.25, branches=branches)
    wanted, theirs = gradients(model, inputs)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.transformer_blocks:
        block.compile(backend=counter)
    got, ours = gradients(model, inputs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, atol=1e-5, rtol=1e-3, msg=key)
    for ratio in (0.35, 0.45, 0.55, 0.65, 0.75):
        with torch.no_grad():
            dcs.ratio_table(model).fill_(ratio)
        gradients(model, inputs)
    assert counter.frame_count <= 3  # the first shape, and one for all others (two where a batch is one sample at a time)
    torch._dynamo.reset()


def test_a_converted_model_under_torch_compile_runs_as_it_is() -> None:
    """Routing follows the ratios, which move with every step: the whole is left to Python, without an error or a recompilation."""
    model, inputs = prepared("dit", 0.25, branches="boundary")
    wanted, theirs = gradients(model, inputs)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for ratio in (0.25, 0.55, 0.25):
        with torch.no_grad():
            dcs.ratio_table(model).fill_(ratio)
        got, ours = gradients(model, inputs, compiled)
    assert torch.equal(got, wanted) and all(torch.equal(ours[key], gradient) for key, gradient in theirs.items())
    assert counter.frame_count <= 1
    torch._dynamo.reset()


def test_accelerates_mixed_precision_comes_off_and_leaves_the_routing() -> None:
    """accelerate replaces `forward` on the object, and takes that back by following `__wrapped__`: not as far as the dense forward."""
    model, inputs = prepared("dit", 0.5)
    model.eval()
    wanted = output(model(**inputs))
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare_model(model)
        with pytest.raises(ConversionError, match="keep_fp32_wrapper=False"):
            dcs.restore_(model)
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(output(model(**inputs)), wanted)
    assert "forward" not in vars(dcs.restore_(model)) and not torch.equal(output(model(**inputs)), wanted)
