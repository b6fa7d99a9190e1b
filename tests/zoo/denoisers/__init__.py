"""Every transformer denoiser of the installed diffusers at a tiny size, one entry a class: how to build it and how to feed it."""

from tests.zoo.denoisers import (
    allegro_to_ernie,
    first_generation,
    flux_to_hidream,
    hunyuan_to_kandinsky,
    kandinsky_sr_to_prx,
    qwen_to_z_image,
)

__all__ = ["allegro_to_ernie", "first_generation", "flux_to_hidream", "hunyuan_to_kandinsky", "kandinsky_sr_to_prx", "qwen_to_z_image"]
