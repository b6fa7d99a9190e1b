"""The whole line on real data: train a small denoiser, convert it, fine-tune it, measure it, sample from it.

`python -m diffcr_surgery demo --out DIR` runs it; `run.py` reads as the story, the other files are its parts:

* `data.py`: scikit-learn's scanned digits, scaled to [-1, 1], with a held-out split.
* `model.py`: a class-conditional adaLN-zero DiT, written as one writes it with timm and without a thought of routing.
* `diffusion.py`: noise and sampling, both by schedulers of diffusers.
* `training.py`: dense training, and the fine-tuning that all arms share.
* `measure.py`: held-out loss, FLOPs, latency, legibility.
* `pictures.py`: `samples.png`, `ratios.png`, `routing.png`.
* `report.py`: `report.json`, the table, and the verdict in words.
* `progress.py`: what is shown while it works.

Nothing here is imported by the library itself.
"""
