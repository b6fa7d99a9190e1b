"""Every transformer denoiser of the installed diffusers at a tiny size, one entry a class: how to build it and how to feed it."""
