"""The six denoisers of the tests at tiny sizes, each as a frozen case: how to build it, feed it, and what to expect.

Sizes are counted in tokens: `Size(rows, columns, text)` is the token grid and the length of the prompt. Widths, grids
and prompts are free, so that a test can make the token axis as long as the batch, the prompt or the channels.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

from diffcr_surgery import ratio_table
from diffcr_surgery.demo.model import DiT
from diffcr_surgery.testing.compare import snapshot as snapshot

LATENT = 4  # channels of the images
PATCH = 2  # pixels along a token's side, where a model has patches
HEAD = 8  # width of an attention head
POOLED = 12  # width of a pooled prompt
CLASSES = 10


class Size(NamedTuple):
    """Token grid of the image and length of the prompt."""

    rows: int = 4
    columns: int = 4
    text: int = 5

    @property
    def tokens(self) -> int:
        """Length of the routed axis."""
        return self.rows * self.columns


DEFAULT = Size()
SMALL, NARROW, WIDE = Size(2, 2), Size(1, 3), Size(2, 5)


@dataclass(frozen=True, repr=False)
class Case:
    """A denoiser under test.

    Attributes:
        name: Short name, the key in `CASES`.
        cls: The model class.
        sites: Path and class name of every block that has to be routed, in order of execution.
        timestep: Name of the timestep argument; `timestep_range` its lowest and highest value.
        sizes: Sizes the class can be built and called at.
        resizable: Whether one model takes images of several sizes.
        stream: Name of the block's argument that carries the tokens.
        tail: Module that reads the stream after the last site.
        moved: Block arguments that are indexed by token, with the axes of their tensors (`n c`, `b n c`, `m+n c`).
        shared: Model inputs without a batch axis.
        attention: Names of attention's linear layers (for LoRA).
    """

    name: str
    cls: type[nn.Module]
    make: Callable[[Size, int], nn.Module]
    example: Callable[[nn.Module, Size, int, Tensor], dict[str, Any]]
    sites: tuple[tuple[str, str], ...]
    timestep: str = "timestep"
    timestep_range: tuple[float, float] = (0.0, 1000.0)
    timestep_dtype: torch.dtype = torch.int64
    sizes: tuple[Size, ...] = (DEFAULT, SMALL)
    resizable: bool = True
    stream: str = "hidden_states"
    tail: str = "norm_out"
    moved: Mapping[str, str] = field(default_factory=lambda: types.MappingProxyType({}))
    shared: frozenset[str] = frozenset()
    attention: tuple[str, ...] = ("to_q", "to_v")

    def __repr__(self) -> str:
        return f"CASES[{self.name!r}]"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # hypothesis prints failing examples by this
        printer.text(repr(self))

    def build(self, seed: int, *, size: Size = DEFAULT, width: int = 16, awake: bool = True, label_dropout: bool = True) -> nn.Module:
        """Build the model from a seed, leaving the global random state alone.

        Args:
            seed: Seed of the weights.
            size: Token grid and prompt length the model is made for.
            width: Channels of the stream, a multiple of 8.
            awake: Give noise to all weights that start at zero (gates, heads), so that every block changes its tokens.
            label_dropout: Keep random label dropout in training, where the class has it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make(size, width)
            for parameter in model.parameters() if awake else ():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.2)
        for module in model.modules() if not label_dropout else ():
            if hasattr(module, "token_drop"):
                module.dropout_prob = 0.0
        return model.eval()

    def times(self, regions: int, of_samples: list[int]) -> Tensor:
        """Timesteps `b` in the middle of the given regions (0 = least noise) out of so many regions."""
        low, high = self.timestep_range
        middle = [low + (high - low) * (region + 0.5) / regions for region in of_samples]
        return torch.tensor(middle, dtype=torch.float64).to(self.timestep_dtype)

    def inputs(self, model: nn.Module, batch: int, seed: int, timesteps: Tensor | None = None, size: Size = DEFAULT) -> dict[str, Any]:
        """Keyword arguments for one call, drawn from a seed; without timesteps, they are spread over the range."""
        if timesteps is None:
            timesteps = self.times(batch, list(range(batch)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.example(model, size, batch, timesteps)

    def sample(self, inputs: Mapping[str, Any], index: int) -> dict[str, Any]:
        """One sample of a batch of inputs, as a batch of one."""
        return {
            name: value[index : index + 1] if isinstance(value, Tensor) and name not in self.shared else value
            for name, value in inputs.items()
        }


def output(result: Any) -> Tensor:
    """Return the predicted image or tokens from whatever a model returns."""
    return result if isinstance(result, Tensor) else result[0]


def trained(model: nn.Module) -> nn.Module:
    """Give the routers and the ratio table of a converted model an opinion, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in model.diffcr.routers.values():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        table = ratio_table(model)
        table.copy_(0.8 * torch.rand(table.shape, generator=generator))
    return model


def _image(size: Size, batch: int) -> Tensor:
    return torch.randn(batch, LATENT, size.rows * PATCH, size.columns * PATCH)


def _padding(size: Size, batch: int) -> Tensor:
    """Prompt mask `b m`: the last word of every second prompt is padding."""
    mask = torch.ones(batch, size.text)
    mask[1::2, -1] = 0
    return mask


def _dit(size: Size, width: int) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=width // HEAD, attention_head_dim=HEAD, in_channels=LATENT, num_layers=3,
        sample_size=size.rows * PATCH, patch_size=PATCH, num_embeds_ada_norm=CLASSES, norm_num_groups=4,
    )  # fmt: skip


def _dit_inputs(model: nn.Module, size: Size, batch: int, t: Tensor) -> dict[str, Any]:
    return {"hidden_states": _image(size, batch), "timestep": t, "class_labels": torch.randint(CLASSES, (batch,))}


def _pixart(size: Size, width: int) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=width // HEAD, attention_head_dim=HEAD, in_channels=LATENT, num_layers=3, norm_num_groups=4,
        cross_attention_dim=width, sample_size=size.rows * PATCH, patch_size=PATCH, caption_channels=POOLED,
    )  # fmt: skip


def _pixart_inputs(model: nn.Module, size: Size, batch: int, t: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": _image(size, batch),
        "encoder_hidden_states": torch.randn(batch, size.text, POOLED),
        "timestep": t,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": _padding(size, batch),
    }


def _sd3(size: Size, width: int) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=size.rows * PATCH, patch_size=PATCH, in_channels=LATENT, num_layers=3, attention_head_dim=HEAD,
        num_attention_heads=width // HEAD, joint_attention_dim=POOLED, caption_projection_dim=width,
        pooled_projection_dim=POOLED, out_channels=LATENT, pos_embed_max_size=8, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip


def _sd3_inputs(model: nn.Module, size: Size, batch: int, t: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": _image(size, batch),
        "encoder_hidden_states": torch.randn(batch, size.text, POOLED),
        "pooled_projections": torch.randn(batch, POOLED),
        "timestep": t,
    }


def _flux(size: Size, width: int) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=LATENT, num_layers=2, num_single_layers=2, attention_head_dim=HEAD,
        num_attention_heads=width // HEAD, joint_attention_dim=POOLED, pooled_projection_dim=POOLED,
        guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def _flux_inputs(model: nn.Module, size: Size, batch: int, t: Tensor) -> dict[str, Any]:
    grid = torch.stack(torch.meshgrid(torch.arange(size.rows), torch.arange(size.columns), indexing="ij"), dim=-1)
    return {
        "hidden_states": torch.randn(batch, size.tokens, LATENT),
        "encoder_hidden_states": torch.randn(batch, size.text, POOLED),
        "pooled_projections": torch.randn(batch, POOLED),
        "timestep": t,
        "img_ids": nn.functional.pad(grid.reshape(-1, 2), (1, 0)).float(),
        "txt_ids": torch.zeros(size.text, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def _hunyuan(size: Size, width: int) -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=width // HEAD, attention_head_dim=HEAD, in_channels=LATENT, patch_size=PATCH,
        sample_size=size.rows * PATCH, hidden_size=width, num_layers=6, mlp_ratio=2.0, cross_attention_dim=POOLED,
        cross_attention_dim_t5=16, pooled_projection_dim=POOLED, text_len=size.text, text_len_t5=size.text,
    )  # fmt: skip


def _hunyuan_inputs(model: nn.Module, size: Size, batch: int, t: Tensor) -> dict[str, Any]:
    grid = (size.rows, size.columns)
    return {
        "hidden_states": _image(size, batch),
        "timestep": t,
        "encoder_hidden_states": torch.randn(batch, size.text, POOLED),
        "text_embedding_mask": _padding(size, batch),
        "encoder_hidden_states_t5": torch.randn(batch, size.text, 16),
        "text_embedding_mask_t5": _padding(size, batch),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]).repeat(batch, 1),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed(HEAD, ((0, 0), grid), grid, output_type="pt"),
    }


def _timm(size: Size, width: int) -> nn.Module:
    return DiT(
        image_size=size.rows * PATCH, patch_size=PATCH, in_channels=LATENT, width=width, depth=3, heads=width // HEAD,
        classes=CLASSES,
    )  # fmt: skip


def _timm_inputs(model: nn.Module, size: Size, batch: int, t: Tensor) -> dict[str, Any]:
    return {"x": _image(size, batch), "timestep": t, "y": torch.randint(CLASSES, (batch,))}


def _paths(folder: str, count: int, block: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{folder}.{index}", block) for index in range(count))


_ALL = (DEFAULT, SMALL, NARROW, WIDE)
_CASES = (
    Case(
        "dit", diffusers.DiTTransformer2DModel, _dit, _dit_inputs,
        _paths("transformer_blocks", 3, "BasicTransformerBlock"),
    ),
    Case(
        "pixart", diffusers.PixArtTransformer2DModel, _pixart, _pixart_inputs,
        _paths("transformer_blocks", 3, "BasicTransformerBlock"),
        sizes=_ALL, shared=frozenset({"added_cond_kwargs"}),
    ),
    Case(
        "sd3", diffusers.SD3Transformer2DModel, _sd3, _sd3_inputs,
        _paths("transformer_blocks", 3, "JointTransformerBlock"),
        timestep_dtype=torch.float32, sizes=_ALL,
    ),
    Case(
        "flux", diffusers.FluxTransformer2DModel, _flux, _flux_inputs,
        _paths("transformer_blocks", 2, "FluxTransformerBlock")
        + _paths("single_transformer_blocks", 2, "FluxSingleTransformerBlock"),
        timestep_range=(0.0, 1.0), timestep_dtype=torch.float32, sizes=_ALL,
        moved={"image_rotary_emb": "m+n c"}, shared=frozenset({"img_ids", "txt_ids"}),
    ),
    Case(
        "hunyuan", diffusers.HunyuanDiT2DModel, _hunyuan, _hunyuan_inputs,
        _paths("blocks", 6, "HunyuanDiTBlock"),
        timestep_dtype=torch.float32, sizes=_ALL,
        moved={"image_rotary_emb": "n c", "skip": "b n c"}, shared=frozenset({"image_rotary_emb"}),
    ),
    Case(
        "timm_dit", DiT, _timm, _timm_inputs,
        _paths("blocks", 3, "DiTBlock"),
        resizable=False, stream="x", tail="final_layer", attention=("qkv", "proj"),
    ),
)  # fmt: skip
CASES: dict[str, Case] = {case.name: case for case in _CASES}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
