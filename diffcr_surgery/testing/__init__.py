"""The laws of the method, to hold one's own models and block patterns to; needs the extra ``testing`` (hypothesis).

The strategies draw small models, sizes and settings; a counterexample shrinks to the simplest form that still breaks the law, and prints as
code. The laws need nothing but torch, take one model and one call, and raise :class:`LawError`. A maintainer's whole test file is in the
README, under "Test your own models".

Example:
    >>> import torch
    >>> from diffcr_surgery import testing as dt
    >>> model = dt.Denoiser(dt.Architecture(depth=2, rotary="shared"))
    >>> dt.check_bypass(model, {"latent": torch.randn(2, 6, 4)}, seed=1)
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
