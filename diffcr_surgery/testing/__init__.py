"""The laws of the method, to hold one's own models and block patterns to; needs the extra ``testing`` (hypothesis).

A maintainer's test file::

    import torch
    from hypothesis import given, settings, strategies as st
    from diffcr_surgery import testing as dt
    from mylib import Block, MyDenoiser
    from mylib.diffcr import BLOCK                            # the BlockPattern that mylib registers

    MODEL = MyDenoiser(width=16, depth=2).eval()              # a tiny one
    INPUTS = {"x": torch.randn(3, 12, 16), "t": torch.tensor([10.0, 400.0, 900.0])}

    def test_pattern():                                       # plain pytest: one case
        dt.check_pattern(BLOCK, MODEL.blocks[0], {"x": torch.randn(2, 12, 16), "rope": torch.randn(12, 8)})

    @settings(max_examples=20, deadline=None)
    @given(inputs=dt.inputs_for(MODEL, like=INPUTS), config=dt.configs(timestep_range=(0.0, 1000.0)))
    def test_laws(inputs, config):                            # other inputs and settings each time
        dt.check_conversion(MODEL, inputs, config)
        dt.check_bypass(MODEL, inputs, config)
        dt.check_mixed_timesteps(MODEL, inputs, config)
        dt.check_gradients(MODEL, inputs, config)
        dt.check_round_trip(MODEL, inputs, config)
        dt.check_specialization(MODEL, inputs, config)

The strategies draw small models, sizes and settings; a counterexample shrinks to the simplest form that still breaks the law, and prints as
code. The laws need nothing but torch, take one model and one call, and raise :class:`LawError`.
"""

try:
    import hypothesis as hypothesis
except ImportError as error:
    raise ImportError("diffcr_surgery.testing draws its cases with hypothesis: pip install 'diffcr_surgery[testing]'.") from error

from diffcr_surgery.testing.compare import LawError
from diffcr_surgery.testing.denoisers import Architecture, Denoiser
from diffcr_surgery.testing.laws import (
    check_bypass,
    check_conversion,
    check_gradients,
    check_mixed_timesteps,
    check_round_trip,
    check_specialization,
)
from diffcr_surgery.testing.pattern_law import check_pattern
from diffcr_surgery.testing.strategies import block_patterns, blocks_with_pattern, configs, denoisers, inputs_for, ratio_tables

__all__ = [
    "Architecture",
    "Denoiser",
    "LawError",
    "block_patterns",
    "blocks_with_pattern",
    "check_bypass",
    "check_conversion",
    "check_gradients",
    "check_mixed_timesteps",
    "check_pattern",
    "check_round_trip",
    "check_specialization",
    "configs",
    "denoisers",
    "inputs_for",
    "ratio_tables",
]
