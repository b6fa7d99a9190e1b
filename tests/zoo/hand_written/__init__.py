"""Denoisers and encoders written by hand, the way other people write them: small, whole, and each with a habit of its own."""

from tests.zoo.hand_written import (
    layouts,
    library_blocks,
    llama_and_grids,
    odd_blocks,
    plain_dits,
    residuals_and_places,
    text_and_image,
    video_and_audio,
)

__all__ = [
    "layouts",
    "library_blocks",
    "llama_and_grids",
    "odd_blocks",
    "plain_dits",
    "residuals_and_places",
    "text_and_image",
    "video_and_audio",
]
