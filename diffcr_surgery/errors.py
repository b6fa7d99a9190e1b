"""Every error this package raises on purpose.

All derive from :class:`SurgeryError`, so one ``except`` clause catches them; each says what was given, what was expected, where (a
qualified module or argument name) and what to do next. A model is never left half converted when one of them is raised.
"""

__all__ = [
    "AdapterError",
    "AlignmentError",
    "CannotCutError",
    "ConfigError",
    "ConversionError",
    "NoRoutableBlockError",
    "NonFiniteError",
    "PatternError",
    "SurgeryError",
    "TimestepError",
    "TraceError",
]


class SurgeryError(Exception):
    """Base class of all errors raised by ``diffcr_surgery``."""


class ConfigError(SurgeryError, ValueError):
    """A setting is outside its range or contradicts another one."""


class TraceError(SurgeryError):
    """The model could not be recorded, or its recording does not reproduce it."""


class NoRoutableBlockError(SurgeryError):
    """No block of the model can be routed; the text lists every block seen and why."""


class AlignmentError(SurgeryError):
    """The arguments of a block do not fit the axes proven or declared for it."""


class PatternError(SurgeryError, ValueError):
    """A block pattern is malformed, registered twice, or contradicted by the permutation proof."""


class TimestepError(SurgeryError, ValueError):
    """The timestep argument or its range is unknown, or a timestep lies outside the range."""


class CannotCutError(TimestepError):
    """The samples of a call lie in several regions, so that it would have to be cut, and it cannot be; ``why`` tells the reason."""

    why: str


class ConversionError(SurgeryError, RuntimeError):
    """The model is in the wrong state for the call: converted already, not converted, or specialised."""


class NonFiniteError(SurgeryError, ArithmeticError):
    """Scores, ratios or their gradients are NaN or infinite; the text names the site."""


class AdapterError(SurgeryError):
    """An adapter folder is missing, damaged, of another version, or belongs to another model."""
