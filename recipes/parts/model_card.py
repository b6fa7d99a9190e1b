"""The README.md of a trained adapter, in the form that model hubs read: what it is, what it costs, how to load it."""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import torch
from parts.pictures import draw_ratios
from torch import Tensor

import diffcr_surgery as dcs

__all__ = ["loading_code", "mean_ratio", "write_model_card"]

LOADING = """\
import torch
from diffusers import {diffusers}
{peft}
import diffcr_surgery as dcs

folder = "."  # where this file lies
{weights}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
with dcs.capture_inputs(pipe.transformer) as seen:
    pipe("a photograph", num_inference_steps=1, output_type="latent", {call})
dcs.load_adapter_(pipe.transformer, folder, seen.inputs)
dcs.specialize_(pipe.transformer)
"""
LORA = """\
pipe = DiffusionPipeline.from_pretrained({base!r}, torch_dtype={dtype})
PeftModel.from_pretrained(pipe.transformer, folder)  # puts LoRA into the transformer, in place"""
ALL_WEIGHTS = """\
transformer = AutoModel.from_pretrained(f"{{folder}}/transformer", torch_dtype={dtype})
pipe = DiffusionPipeline.from_pretrained({base!r}, transformer=transformer, torch_dtype={dtype})"""

CARD = Template("""\
---
base_model: $base
library_name: diffusers
tags: [diffcr, token-routing, diffusion-transformer]
---

# $title

$about

| | |
|---|---|
| base model | `$base` |
| trained | $trained |
| target | $target |
| compression ratio, learned / executed | $learned / $executed |
| blocks routed | $routed of $blocks |
| timestep regions | $regions |

In each routed block a router lets the low-scoring share of tokens pass by; how many was learned for each block and timestep region
([DiffCR, arXiv 2412.16822](https://arxiv.org/abs/2412.16822)).

![Learned ratios](ratios.png)

## How to load it

```python
$code
```

`specialize_(..., budget=0.9)` takes another point from the same table.
""")


def loading_code(base: str, dtype: torch.dtype, lora: bool, call: Mapping[str, Any]) -> str:
    """Return Python that loads a pipeline's adapter.

    Args:
        base: Folder or name of the pipeline.
        dtype: Precision to load it in.
        lora: Whether LoRA was trained, or all weights.
        call: Arguments of the pipeline besides prompt and steps.
    """
    return LOADING.format(
        diffusers="DiffusionPipeline" if lora else "AutoModel, DiffusionPipeline",
        peft="from peft import PeftModel\n" if lora else "",
        weights=(LORA if lora else ALL_WEIGHTS).format(base=base, dtype=dtype),
        call=", ".join(f"{name}={value!r}" for name, value in call.items()),
    )


def mean_ratio(model: Any, table: Tensor) -> float:
    """Return the mean of a table of ratios `l r`, every region counted as often as inference visits it."""
    weights = torch.tensor(model.diffcr.config.region_weights or (1.0,) * table.shape[1])
    return float((table.detach().float().cpu().mean(dim=0) * weights).sum() / weights.sum())


def write_model_card(folder: Path, model: Any, *, title: str, about: str, base: str, trained: str, code: str) -> None:
    """Write `README.md` and `ratios.png` beside an adapter.

    Args:
        folder: Where the adapter lies.
        model: The converted model, not specialised.
        title: Heading.
        about: A sentence or two on data and training.
        base: Folder or name of the model that was converted.
        trained: Which weights were trained, and for how long.
        code: Python that loads the result.
    """
    plan, config = model.diffcr.plan, model.diffcr.config
    draw_ratios(model).savefig(folder / "ratios.png", dpi=120)
    share = config.target_share
    text = CARD.substitute(
        title=title,
        about=about,
        base=base,
        trained=trained,
        target=f"ratio {config.target_ratio:g}" if share is None else f"{share:g} of the dense cost",
        learned=f"{mean_ratio(model, dcs.ratio_table(model)):.3f}",
        executed=f"{mean_ratio(model, model.diffcr.executed_ratios()):.3f}",
        routed=len(plan.routed_sites),
        blocks=len(plan.sites),
        regions=config.timestep_regions,
        code=code.strip(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
