"""What the zoo knows of one class: how to build a tiny one, how to feed it, and what a plan should find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffcr_surgery._tree import flatten

ZOO: dict[str, Entry] = {}  # the classes of diffusers
OTHERS: dict[str, Entry] = {}  # models written by hand, the way other people write them


@dataclass(frozen=True, repr=False)
class Entry:
    """One class of the zoo.

    Attributes:
        name: Class name, an attribute of `diffusers` or of the module named in `module`.
        config: Keyword arguments of the constructor; a tiny model.
        example: `(batch, rows)` -> keyword arguments of forward. `rows` scales the latent (its height, or length): 4 is the usual size.
        module: Where the class lives, if `diffusers` does not export it.
        batches: Batch sizes the class takes.
        rows: Latent sizes one model takes.
        timestep: Name of the timestep argument, `None` where forward takes an embedding or nothing.
        timestep_range: Its lowest and highest value.
        flex: Whether it knows flex attention alone, which on a CPU has no gradients, and whose FLOPs are not counted.
        shared: Paths of inputs that belong to a batch as a whole, where their length may be that of the batch.
        rounds: Whether it rounds to bfloat16 inside, whatever its dtype.
        warns: Beginnings of the warnings the class gives by itself.
    """

    name: str
    config: dict[str, Any]
    example: Callable[[int, int], dict[str, Any]]
    module: str = "diffusers"
    batches: tuple[int, ...] = (2, 3)
    rows: tuple[int, ...] = (4, 6)
    timestep: str | None = "timestep"
    timestep_range: tuple[float, float] = (0.0, 1000.0)
    flex: bool = False
    shared: tuple[str, ...] = ()
    rounds: bool = False
    warns: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> nn.Module:
        """Build the model from a seed; weights that start at zero get noise, so that every block does something."""
        owner = __import__(self.module, fromlist=[self.name]) if self.module != "diffusers" else diffusers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = getattr(owner, self.name)(**self.config)
            for parameter in model.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.2)
        return model.eval()

    def inputs(self, batch: int | None = None, rows: int | None = None, seed: int = 1) -> dict[str, Any]:
        """Draw the arguments of one call from a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.example(batch or self.batches[0], rows or self.rows[0])


def entry(
    name: str, config: dict[str, Any], *, into: dict[str, Entry] = ZOO, **options: Any
) -> Callable[[Callable[[int, int], dict[str, Any]]], Entry]:
    """Put a class into the zoo; decorates the function that makes its inputs."""

    def add(example: Callable[[int, int], dict[str, Any]]) -> Entry:
        assert name not in into, f"{name} is in the zoo already"
        into[name] = Entry(name, config, example, **options)
        return into[name]

    return add


def sample(tree: Any, index: int, batch: int, shared: tuple[str, ...] = (), path: str = "") -> Any:
    """Cut one sample out of inputs or outputs: rows of tensors and entries of lists, if there are as many as samples."""
    if path in shared:
        return tree
    if isinstance(tree, Tensor):
        return tree[index : index + 1] if tree.ndim and len(tree) == batch else tree
    if isinstance(tree, list) and len(tree) == batch:
        return [tree[index]]
    below = lambda key, value: sample(value, index, batch, shared, f"{path}.{key}" if path else str(key))  # noqa: E731
    if isinstance(tree, dict):
        return {key: below(key, value) for key, value in tree.items()}
    return type(tree)(below(i, value) for i, value in enumerate(tree)) if isinstance(tree, list | tuple) else tree


def grid(*sizes: int) -> Tensor:
    """Positions of all cells of a grid, in row order: `(tokens, axes)`."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


def text_mask(batch: int, length: int) -> Tensor:
    """Padding mask: the first sample lacks one token, the next ones two, three, one..."""
    return torch.arange(length) < (length - 1 - torch.arange(batch) % 3)[:, None]


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor in an output, in order."""
    return flatten(tree)[1]
