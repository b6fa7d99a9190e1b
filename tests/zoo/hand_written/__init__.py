"""Denoisers and encoders written by hand, the way other people write them: small, whole, and each with a habit of its own."""

from tests.zoo.hand_written import image_models, other_models

__all__ = ["image_models", "other_models"]
