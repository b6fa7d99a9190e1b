"""Declare a block that the analysis cannot read: for maintainers of a library of diffusion models.

    python recipes/register_block_pattern.py

The block below mixes its tokens by gated pooling. It has no attention, so nothing tells it from an MLP, and a plan finds no block at all.
Its maintainer knows better, and says so once: which argument is the stream of tokens, and what is indexed by token with it. Most blocks
need none of this; look at `print(dcs.plan(model, inputs))` first.
"""

import torch
from torch import Tensor, nn

import diffcr_surgery as dcs


class PoolingBlock(nn.Module):
    """Tokens read a gated mean over all of them, at their positions, then pass an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.read = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, positions: Tensor, condition: Tensor) -> Tensor:
        h = x + positions + condition[:, None]
        x = x + self.read((h * self.gate(h).softmax(1)).sum(1, keepdim=True) * h)
        return x + self.mlp(x)


class Denoiser(nn.Module):
    def __init__(self, width: int = 32, depth: int = 4, tokens: int = 64) -> None:
        super().__init__()
        self.embed, self.time, self.head = nn.Linear(3, width), nn.Linear(1, width), nn.Linear(width, 3)
        self.positions = nn.Parameter(torch.randn(1, tokens, width))
        self.blocks = nn.ModuleList(PoolingBlock(width) for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x, condition = self.embed(x), self.time(timestep[:, None] / 1000)
        for block in self.blocks:
            x = block(x, self.positions, condition)
        return self.head(x)


# A library registers its patterns where its blocks are defined, or by an entry point in its pyproject.toml, so that no user has to:
#     [project.entry-points."diffcr_surgery.patterns"]
#     my_library = "my_library.diffcr:PATTERN"
PATTERN = dcs.BlockPattern(
    name="gated pooling",
    target=f"{__name__}:PoolingBlock",  # text, so that nothing is imported; here "my_library.blocks:PoolingBlock"
    inputs={"x": "b n c", "positions": "1 n c"},  # the stream first; what is not named, `condition`, stays as it is
    outputs=("b n c",),
)


def main() -> None:
    torch.manual_seed(0)
    model = Denoiser().eval()
    inputs = {"x": torch.randn(2, 64, 3), "timestep": torch.tensor([100.0, 900.0])}
    try:
        dcs.plan(model, inputs)
    except dcs.SurgeryError as error:
        print(f"Without a pattern: {error}\n")

    dcs.register_pattern(PATTERN)
    # The pattern is put through the permutation proof, on these inputs: a wrong one is an error that shows what it measured.
    plan = dcs.plan(model, inputs, dcs.DiffCRConfig(target_ratio=0.3))
    print(f"With it:\n{plan}\n")

    with torch.no_grad():
        before = model(**inputs)
        dcs.convert_(model, plan)
        print("At ratio 0 nothing has changed:", torch.equal(model(**inputs), before))
        dcs.ratio_table(model).fill_(0.3)
        print(f"At ratio 0.3 the output moves by {(model(**inputs) - before).abs().mean():.3f} on average.")


if __name__ == "__main__":
    main()
