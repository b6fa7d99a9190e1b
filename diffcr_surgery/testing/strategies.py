"""Hypothesis strategies for models, inputs, settings, ratio tables and block patterns.

Sizes are drawn from a few small numbers, so that tokens, text, samples and channels are often as many: an axis told by its length is told
wrong. Everything shrinks to the simplest form: one plain block, two tokens, one sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diffcr_surgery._tree import map_leaves
from diffcr_surgery.axes import TOKEN_WORDS
from diffcr_surgery.config import BRANCHES, DEFAULT_BINS, GATES, DiffCRConfig
from diffcr_surgery.patterns import BlockPattern
from diffcr_surgery.runtime.convert import ratio_table, state_of
from diffcr_surgery.testing.denoisers import TIMESTEPS, Architecture, Block, Denoiser
from diffcr_surgery.timesteps import TIMESTEP_NAMES
from diffcr_surgery.trace.perturb import generator, perturb_floats

__all__ = ["block_patterns", "blocks_with_pattern", "configs", "denoisers", "inputs_for", "ratio_tables"]

SEEDS = st.integers(0, 2**16)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Draw the form of a denoiser; what cannot go together is put right."""
    block: Any = draw(st.sampled_from(["plain", "cross", "single", "joint", "parallel"]))
    layouts = ["b n c", "n b c"] + (["n c"] if block == "plain" else [])
    depth, width = draw(st.sampled_from([1, 2, 3, 1, 4])), draw(st.sampled_from([4, 6, 8]))
    residual: Any = draw(st.sampled_from(["inside"] + (["outside"] if block != "joint" else [])))
    return Architecture(
        block=block,
        depth=depth,
        width=width,
        heads=draw(st.sampled_from([1, width // 2])),
        condition=draw(st.sampled_from(["none", "sample", "token"])),
        rotary=draw(st.sampled_from(["none", "shared", "sample"])),
        bias=draw(st.sampled_from(["none", "keys", "pairs"])),
        registers=draw(st.integers(0, 2)),
        text_last=block in ("single", "parallel", "joint") and draw(st.booleans()),
        skips=depth > 1 and residual == "inside" and draw(st.booleans()),
        residual=residual,
        layout=draw(st.sampled_from(layouts)),
        asleep=draw(st.booleans()),
    )


def denoisers() -> st.SearchStrategy[Denoiser]:
    """Draw small denoisers in the forms that transformer denoisers have; see :class:`Architecture`.

    Example:
        >>> from hypothesis import find
        >>> find(denoisers(), lambda model: model.form.rotary == "shared")
        Denoiser(Architecture(rotary='shared'))
    """
    return st.builds(Denoiser, architectures(), SEEDS)


def inputs_for(model: nn.Module, like: Mapping[str, Any] | None = None) -> st.SearchStrategy[dict[str, Any]]:
    """Draw the keyword arguments of a call.

    Args:
        model: One of :func:`denoisers`, or any other model if ``like`` is given.
        like: Arguments of a call of any model. Drawn are others of the same shapes: floating-point entries are scaled by factors in
            [0.5, 1); all else stays, whole-number timesteps too. Timesteps so stay within a range that begins at 0; where it begins
            elsewhere, as that of a noise level may, put yours in with ``.map``.

    Returns:
        A strategy of dicts. For a drawn denoiser: ``latent`` (``b n c`` or ``n c``), ``timestep`` (``b``, often on a region's edge), and
        ``text`` (``b m c``), with b in 1...4, n in 2...6 and m in 1...4.

    Raises:
        TypeError: If the model is none of :func:`denoisers`, and ``like`` is not given.

    Example:
        >>> from hypothesis import find
        >>> inputs = find(inputs_for(torch.nn.Identity(), like={"x": torch.ones(2, 3), "steps": 4}), lambda inputs: True)
        >>> inputs["x"].shape, inputs["steps"]
        (torch.Size([2, 3]), 4)
    """
    if like is not None:
        return SEEDS.map(lambda seed: _similar(like, seed))
    if not isinstance(model, Denoiser):
        raise TypeError(f"inputs_for knows the models of denoisers(), not {type(model).__name__}; give it a call's arguments as like=.")
    return _inputs(model)


def _similar(like: Mapping[str, Any], seed: int) -> dict[str, Any]:
    source = generator(seed)

    def draw(_: str, leaf: Any) -> Any:
        return perturb_floats(leaf, source) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return {name: map_leaves(value, draw) for name, value in like.items()}


@st.composite
def _inputs(draw: st.DrawFn, model: Denoiser) -> dict[str, Any]:
    form, packed = model.form, model.form.layout == "n c"
    batch = draw(st.integers(1, 4))  # where it means nothing too, so that a packed model shrinks to one that is not
    tokens = draw(st.integers(2, 6))
    seed = draw(SEEDS)
    source = torch.Generator().manual_seed(seed)
    if packed:
        batch = 1
    shape = (tokens, form.width) if packed else (batch, tokens, form.width)
    inputs: dict[str, Any] = {"latent": torch.randn(shape, generator=source)}
    if form.condition != "none":
        low, high = TIMESTEPS
        spots = st.integers(0, 12).map(lambda twelfth: low + (high - low) * twelfth / 12) | st.floats(low, high, width=32)
        inputs["timestep"] = torch.tensor(draw(st.lists(spots, min_size=batch, max_size=batch)))
    if form.reads_text:
        # Of a single word next to an `n b c` stream, a block run sample by sample hides where its batch axis is; it is left dense.
        fewest = 2 if form.block == "joint" and form.layout == "n b c" else 1
        inputs["text"] = torch.randn(batch, draw(st.integers(fewest, 4)), form.width, generator=source)
    return inputs


@st.composite
def configs(draw: st.DrawFn, /, model: nn.Module | None = None, **fixed: Any) -> DiffCRConfig:
    """Draw settings of a conversion.

    Args:
        draw: Given by hypothesis.
        model: What they are for: a model without a timestep gets one region.
        fixed: Settings that are not drawn, as values or as strategies. The range of the timesteps is that of :func:`denoisers`; for another
            model fix ``timestep_range``, and ``timestep_argument`` where its name is no usual one.

    Returns:
        A strategy of settings that go together.

    Example:
        >>> from hypothesis import find
        >>> find(configs(timestep_range=(0.0, 1.0), bins=(0.0, 0.5)), lambda config: config.timestep_regions == 2).reachable_bins
        (0.0, 0.5)
    """

    def setting(name: str, drawn: st.SearchStrategy[Any]) -> Any:
        given = fixed.pop(name, drawn)
        return draw(given) if isinstance(given, st.SearchStrategy) else given

    argument = setting("timestep_argument", st.just("auto"))
    if isinstance(model, Denoiser):
        timeless = model.form.condition == "none"
    elif model is not None and argument == "auto":
        timeless = inspect.signature(model.forward).parameters.keys().isdisjoint(TIMESTEP_NAMES)
    else:
        timeless = False
    regions = setting("timestep_regions", st.just(1) if timeless else st.integers(1, 4))
    weights = st.lists(st.integers(1, 9), min_size=regions, max_size=regions).map(tuple)
    learn = setting("learn_ratios", st.sampled_from([True, True, True, False]))
    bins = setting("bins", st.sampled_from([DEFAULT_BINS, (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5)]))
    max_ratio = setting("max_ratio", st.sampled_from([share for share in (0.9, 0.5, 0.7) if share <= bins[-1]] or [bins[-1]]))
    return DiffCRConfig(
        bins=bins,
        max_ratio=max_ratio,
        target_ratio=setting("target_ratio", st.integers(0, int(100 * max_ratio)).map(lambda hundredths: hundredths / 100)),
        timestep_regions=regions,
        timestep_argument=argument,
        timestep_range=setting("timestep_range", st.just(TIMESTEPS)),
        region_weights=setting("region_weights", st.none() | weights if regions > 1 else st.none()),
        gate=setting("gate", st.sampled_from(GATES)),
        branches=setting("branches", st.sampled_from(BRANCHES)),
        share_routing=setting("share_routing", st.integers(1, 3)),
        learn_ratios=learn,
        initial_ratio=setting("initial_ratio", st.just(0.0) if learn else st.sampled_from(bins).filter(lambda ratio: ratio <= max_ratio)),
        **{name: setting(name, st.nothing()) for name in list(fixed)},
    )


def ratio_tables(model: nn.Module) -> st.SearchStrategy[Tensor]:
    """Draw ratio tables for a converted model: executable ratios, and ratios between them, up to ``max_ratio``.

    Args:
        model: A converted model.

    Returns:
        A strategy of tables ``l r``, one row a routed site, one column a timestep region.

    Raises:
        ConversionError: If the model is not converted.

    Example:
        >>> from hypothesis import find
        >>> from diffcr_surgery import convert_
        >>> model = convert_(Denoiser(Architecture(depth=3)), {"latent": torch.randn(2, 6, 4)})
        >>> find(ratio_tables(model), lambda table: bool((table > 0.1).any())).shape
        torch.Size([3, 1])
    """
    table, config = ratio_table(model), state_of(model).config
    bins = [ratio for ratio in config.bins if ratio <= config.max_ratio]
    entries = st.sampled_from(bins) | st.integers(0, int(1000 * config.max_ratio)).map(lambda thousandths: thousandths / 1000)
    rows = st.lists(entries, min_size=table.numel(), max_size=table.numel())
    return rows.map(lambda values: torch.tensor(values).reshape(table.shape))


def block_patterns() -> st.SearchStrategy[BlockPattern]:
    """Draw well-formed block patterns, for what reads, prints or stores them; no library has their target.

    Example:
        >>> from hypothesis import find
        >>> find(block_patterns(), lambda pattern: "b m+n d" in pattern.inputs.values()).inputs["stream"]
        'b n c'
    """
    names = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
    streams = st.sampled_from(["b n c", "n b c", "n c"])
    word = st.sampled_from(TOKEN_WORDS)
    others = st.sampled_from(["-", "b 1 1 n", "b 1 n n", "n n"]) | word.map("b {} d".format) | word.map("{} d".format)

    def build(name: str, cls: str, stream: str, inputs: dict[str, str]) -> BlockPattern:
        return BlockPattern(name, f"{name}.models:{cls.title()}", {"stream": stream} | inputs, (stream,))

    arguments = st.dictionaries(names.map("argument_{}".format), others, max_size=3)
    return st.builds(build, names, names, streams, arguments)


@st.composite
def blocks_with_pattern(draw: st.DrawFn) -> tuple[BlockPattern, nn.Module, dict[str, Any]]:
    """Draw what :func:`check_pattern` takes.

    Args:
        draw: Given by hypothesis.

    Returns:
        A strategy of triples: the pattern that is true of a block, the block, and the keyword arguments of one call.

    Example:
        >>> from hypothesis import find
        >>> pattern, block, inputs = find(blocks_with_pattern(), lambda drawn: "rotary.0" in drawn[0].inputs)
        >>> pattern.inputs["rotary.0"], sorted(inputs)
        ('n d', ['rotary', 'x'])
    """
    model = draw(denoisers())
    seen: dict[str, Any] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update({"x": args[0]}, **{name: value for name, value in kwargs.items() if value is not None})

    block = model.blocks[-1]
    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**draw(inputs_for(model)))
    handle.remove()
    inputs = {name: axes for name, axes in model.form.moving.items() if name.split(".")[0] in seen}
    pattern = BlockPattern("drawn block", f"{Block.__module__}:{Block.__qualname__}", inputs)
    return pattern, block, seen
