"""The method done by hand: what a converted model has to give, worked out on the recorded model in the plainest way there is.

Nothing of the rewritten graph is used here, nor its functions: tokens are chosen, gathered and put back sample by sample by plain
indexing. It is slow, and meant for models of a few tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from diffcr_surgery._tree import fill, flatten, map_leaves
from diffcr_surgery.detect import named_leaves
from diffcr_surgery.plan import BlockSite, SurgeryPlan
from diffcr_surgery.trace import Trace
from diffcr_surgery.trace.key import example_call, input_key

__all__ = ["ByHand", "Run", "Way", "bracket", "gather", "kept_count"]


class Way(NamedTuple):
    """One way through a site: its share in the result, and the ratio of tokens that bypass."""

    share: float
    ratio: float


def kept_count(ratio: float, moving: int) -> int:
    """Return ⌈(1 − ρ)·n⌉, never 0, in exact arithmetic on the ratio as it is written."""
    return max(1, min(moving, math.ceil((1 - Fraction(repr(float(ratio)))) * moving)))


def bracket(ratio: float, bins: Sequence[float]) -> list[Way]:
    """Return the two bins around a ratio with the weights of the blend, the one that keeps more first."""
    low = max(i for i, ratio_of in enumerate(bins[:-1]) if i == 0 or ratio_of <= ratio + 1e-6)
    share = (ratio - bins[low]) / (bins[low + 1] - bins[low])
    return [Way(1 - share, bins[low]), Way(share, bins[low + 1])]


@dataclass
class Run:
    """What happened in one run.

    Attributes:
        output: What the model returns.
        entered: Row of each site -> the stream that entered it, ``b n c``.
        scores: Row of each router -> its scores, ``b n``.
        bypassed: Row of each site -> which tokens bypassed it, on the way that keeps most, ``b n``.
        continues: Row of each site whose stream is just what another site left -> that other's row.
        readers: Row of each site -> a module that reads the very stream it left, and where among its ``(args, kwargs)``.
        left: Row of each site -> the stream it left, in the block's layout.
        margin: How near two tokens came, one kept and one not: the smallest difference of their scores, unless they were equal.
    """

    output: Any = None
    entered: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    bypassed: dict[int, Tensor] = field(default_factory=dict)
    continues: dict[int, int] = field(default_factory=dict)
    readers: dict[int, tuple[str, str]] = field(default_factory=dict)
    left: dict[int, Tensor] = field(default_factory=dict)
    margin: float = math.inf

    def source_of(self, tensor: Tensor) -> int | None:
        """Return the row of the site that left this very tensor."""
        return next((row for row, left in self.left.items() if left is tensor), None)


class ByHand:
    """An unconverted model, routed by hand.

    Args:
        model: The model, not converted, in the mode to run in.
        inputs: Arguments of a call to record.
        plan: Which blocks are routed and what moves with their tokens.
    """

    def __init__(self, model: nn.Module, inputs: Any, plan: SurgeryPlan) -> None:
        self.model, self.plan = model, plan
        self.trace = Trace(model, inputs)
        self.readers: dict[int, tuple[str, str]] = {}
        self.rows = {(site.path, site.occurrence): row for row, site in enumerate(plan.routed_sites)}
        self.dense = {(site.path, site.occurrence) for site in plan.sites if not site.routed}

    @torch.no_grad()
    def run(
        self, arguments: Mapping[str, Any], ways: Sequence[Sequence[Way]], weights: Mapping[int, Tensor], observed: Mapping[int, Tensor]
    ) -> Run:
        """Run a call, on the recording there is if it fits.

        Args:
            arguments: Of the call, by name.
            ways: The ways through each site.
            weights: Row of each router -> its weight, ``1 c``.
            observed: Row of a router -> the scores ``b n`` the converted model gave. They decide between tokens, so that rounding does not.
        """
        run, seen = Run(), dict[str, int]()
        call, recording = example_call(self.model.forward, arguments), self.trace.recording
        if recording.guarded or input_key(self.model, call) != self.trace.key or not recording.fits(call):
            self.trace = Trace(self.model, arguments)
        graph = self.trace.recording.graph
        noise = torch.Generator().manual_seed(0)
        inputs = iter([*call.tensors, *self.trace.recording.constants])
        latent = _latent(call.paths, call.tensors, graph)
        # Each value twice: as it is, and with noise on the latent, which shows what stems from it.
        env: dict[fx.Node, tuple[Any, Any]] = {}
        for number, node in enumerate(graph.nodes):
            if node.op == "placeholder":
                value = next(inputs)
                if isinstance(value, Tensor):
                    value = value.detach().clone()
                    env[node] = (value, _noised(value, None, noise) if number in latent else value.clone())
                else:
                    env[node] = (value, value)
                continue
            if node.op == "get_attr":
                value = operator.attrgetter(node.target)(self.model)
                env[node] = (value, value.clone() if isinstance(value, Tensor) else value)
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n][0])
            other_args, other_kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n][1])
            if node.op == "output":
                run.output = fill(self.trace.recording.output, args[0])
            elif node.op == "call_function":
                env[node] = (node.target(*args, **kwargs), node.target(*other_args, **other_kwargs))
            elif node.op == "call_method":
                env[node] = tuple(getattr(a[0], node.target)(*a[1:], **k) for a, k in ((args, kwargs), (other_args, other_kwargs)))
            else:
                module = self.model.get_submodule(node.target)
                occurrence = seen.get(node.target, 0)
                seen[node.target] = occurrence + 1
                row = self.rows.get((node.target, occurrence))
                if row is not None:
                    site = _Site(self.plan, row, module, (args, kwargs), (other_args, other_kwargs), lone=_lone(node))
                    env[node] = site.run(ways[row], weights, observed, run, noise)
                elif (node.target, occurrence) in self.dense:
                    result = module(*args, **kwargs)
                    env[node] = (result, _carried((args, kwargs), (other_args, other_kwargs), result, noise))
                else:
                    for path, tensor in zip(*flatten((args, kwargs))[:2], strict=True):
                        source = run.source_of(tensor)
                        if source is not None:
                            run.readers[source] = (node.target, path)
                    env[node] = (module(*args, **kwargs), module(*other_args, **other_kwargs))
        return run


def _latent(paths: list[str], tensors: list[Tensor], graph: fx.Graph) -> set[int]:
    """Return the numbers of the inputs that are denoised: the first one shaped like an output, or else the first with two axes."""
    shapes = [tuple(node.meta["shape"]) for node in next(n for n in graph.nodes if n.op == "output").args[0] if "shape" in node.meta]
    candidates = [i for i, t in enumerate(tensors) if t.is_floating_point() and t.ndim >= 2]

    def alike(shape: tuple[int, ...]) -> bool:
        return any(len(shape) == len(s) and sum(a != b for a, b in zip(shape, s, strict=True)) <= 1 for s in shapes)

    if not candidates:
        raise ValueError(f"None of the call's tensors {paths} is a latent: a floating-point tensor with at least two axes.")
    found = next((i for i in candidates if alike(tuple(tensors[i].shape))), candidates[0])
    return {i for i in candidates if paths[i].split(".")[0] == paths[found].split(".")[0]}


def _noised(value: Tensor, where: Tensor | None, source: torch.Generator) -> Tensor:
    """Return the value with noise, on the marked entries alone if any are marked."""
    noise = (1.0 + torch.rand(value.shape, generator=source)).to(value.device, value.dtype)
    return value + noise if where is None else torch.where(where, value + noise, value)


def _carried(given: Any, other: Any, result: Any, source: torch.Generator) -> Any:
    """Return the noised twin of a dense block's result: what its arguments of that shape differ in, it differs in."""
    pairs = list(zip(flatten(given)[1], flatten(other)[1], strict=True))

    def twin(_: str, leaf: Any) -> Any:
        marks = [a != b for a, b in pairs if isinstance(leaf, Tensor) and leaf.is_floating_point() and a.shape == leaf.shape]
        mark = next((m for m in marks if bool(m.any())), None)
        if mark is None:
            return leaf.clone() if isinstance(leaf, Tensor) else leaf  # the model may write into it
        return _noised(leaf, mark.any(-1, keepdim=True).expand_as(mark), source)

    return map_leaves(result, twin)


def _lone(node: fx.Node) -> bool:
    """Tell whether a single output of a block is used."""
    return "shape" in node.meta or len({user.args[1] for user in node.users}) == 1


class _Site:
    def __init__(self, plan: SurgeryPlan, row: int, module: nn.Module, given: Any, other: Any, *, lone: bool) -> None:
        self.row, self.module, self.given, self.lone = row, module, given, lone
        self.gate, self.branches = plan.config.gate, plan.config.branches
        self.site: BlockSite = plan.routed_sites[row]
        self.named = named_leaves(module, given[0], given[1], Tensor)
        self.numbers = named_leaves(module, given[0], given[1], int)
        self.stream, pattern = next(iter(self.site.aligned.items()))
        words = pattern.split()
        self.token_axis, self.batch_axis = words.index("n"), words.index("b") if "b" in words else None
        self.x = self._plain(self.named[self.stream][1])
        twin = self._plain(named_leaves(module, other[0], other[1], Tensor)[self.stream][1])
        self.moves = (self.x != twin).any(-1)
        alignment, self.outside = self.site.hint
        self.output = alignment.output

    def _plain(self, x: Tensor) -> Tensor:
        """Bring a stream into ``b n c``."""
        return x[None] if self.batch_axis is None else x.movedim((self.batch_axis, self.token_axis), (0, 1))

    def _own(self, x: Tensor) -> Tensor:
        """Bring a stream ``b n c`` back into the block's layout."""
        return x[0] if self.batch_axis is None else x.movedim((0, 1), (self.batch_axis, self.token_axis))

    def run(
        self, ways: Sequence[Way], weights: Mapping[int, Tensor], observed: Mapping[int, Tensor], run: Run, source: torch.Generator
    ) -> tuple[Any, Any]:
        x, router = self.x, self.site.router
        run.entered[self.row] = x.clone()
        if router == self.row:
            run.scores[router] = torch.sigmoid((x @ weights[router].detach().to(x).T)[..., 0].float())
        scores = run.scores[router]
        deciding = observed.get(router, scores)
        sets = [self._kept(deciding, way.ratio, run) for way in ways]
        run.bypassed[self.row] = torch.stack([torch.ones(x.shape[1], dtype=torch.bool).index_fill(0, kept, False) for kept in sets[0]])
        before = run.source_of(self.named[self.stream][1])
        if before is not None:
            run.continues[self.row] = before
        if len(ways) == 1 and ways[0].ratio >= 1.0 and self.lone and bool(self.moves.all()):
            return self._gone(run, source)
        groups = [[i] for i in range(len(ways))] if self.branches == "two" else [list(range(len(ways)))]
        template: Any = None
        total: list[Tensor] = []
        for group in groups:
            # With "two" each way is a run of its own; with "boundary" the first stands for all, and scales what they keep.
            share = ways[group[0]].share if self.branches == "two" else 1.0
            template, tensors, stream_at = self._block(sets[group[0]])
            merged = (torch.zeros_like(x) if self.outside else x.clone()).to(tensors[stream_at].dtype)  # which autocast may have changed
            for sample, kept in enumerate(sets[group[0]]):
                entered = torch.zeros_like(x[sample, kept]) if self.outside else x[sample, kept]
                factor = torch.zeros(x.shape[1], dtype=x.dtype)
                for i in group:
                    own = sets[i][sample]
                    part = 1.0 if self.branches == "two" else ways[i].share
                    factor[own] += part * self._gates(scores[sample], self.moves[sample], own).to(x.dtype)
                update = self._plain(tensors[stream_at])[sample] if self.batch_axis is not None else tensors[stream_at]
                merged[sample, kept] = (entered + factor[kept, None] * (update - entered)).to(merged)
            tensors[stream_at] = self._own(merged)
            parts = [share * t if t.is_floating_point() else t for t in tensors]
            total = parts if not total else [a + b if a.is_floating_point() else a for a, b in zip(total, parts, strict=True)]
        run.left[self.row] = total[stream_at]
        twin = list(total)
        marks = self._own(self.moves[..., None].expand_as(x))
        twin[stream_at] = _noised(total[stream_at], marks, source)
        return fill(template, total), fill(template, twin)

    def _gone(self, run: Run, source: torch.Generator) -> tuple[Any, Any]:
        """Return what a block leaves that all tokens bypass, and whose other outputs no one reads: it is not called."""
        run.bypassed[self.row] = torch.ones_like(self.moves)
        left = self._own(torch.zeros_like(self.x) if self.outside else self.x.clone())
        run.left[self.row] = left
        other = _noised(left, self._own(self.moves[..., None].expand_as(self.x)), source)
        key = int(self.output) if self.output.isdigit() else self.output
        return (left, other) if self.output == "" else ({key: left}, {key: other})

    def _kept(self, scores: Tensor, ratio: float, run: Run) -> list[Tensor]:
        """Return the kept tokens of each sample in rising order: all that stay, and the best of the others, ties to the lower index."""
        staying = int((~self.moves).sum(1).max())
        count = staying + kept_count(ratio, self.moves.shape[1] - staying)
        found = []
        for moves, row in zip(self.moves.tolist(), scores.tolist(), strict=True):
            ranked = sorted(range(len(row)), key=lambda token: (moves[token], -row[token], token))
            found.append(torch.tensor(sorted(ranked[:count])))
            if 0 < count < len(row) and moves[ranked[count - 1]] and row[ranked[count - 1]] > row[ranked[count]]:
                run.margin = min(run.margin, row[ranked[count - 1]] - row[ranked[count]])
        return found

    def _gates(self, scores: Tensor, moves: Tensor, kept: Tensor) -> Tensor:
        """Return by how much the updates of one sample's kept tokens count; in full where no router decides, or the block keeps all."""
        if self.gate == "straight_through" or (self.gate == "doubled_sigmoid" and len(kept) == len(scores)):
            return torch.ones(len(kept))
        gates = scores if self.gate == "sigmoid" else 2 * scores
        return torch.where(moves, gates, torch.ones_like(gates))[kept]

    def _block(self, sets: list[Tensor]) -> tuple[Any, list[Tensor], int]:
        """Run the block for each sample's kept tokens, all samples gathered alike, and take that sample's part of every output."""
        template: Any = None
        taken: list[list[Tensor]] = []
        axes: list[int] = []
        for sample, kept in enumerate(sets):
            args, kwargs = self._arguments(kept)
            paths, tensors, template = flatten(self.module(*args, **kwargs))
            stream_at = paths.index(self.output)
            if self.batch_axis is None:
                return template, tensors, stream_at
            axes = [self._batch_of(t, len(sets), i == stream_at) for i, t in enumerate(tensors)]
            taken.append([t.narrow(axis, sample, 1) for t, axis in zip(tensors, axes, strict=True)])
        return template, [torch.cat(parts, axis) for parts, axis in zip(zip(*taken, strict=True), axes, strict=True)], stream_at

    def _batch_of(self, output: Tensor, samples: int, stream: bool) -> int:
        in_front = not stream and output.ndim > 0 and output.shape[0] == samples
        return 0 if in_front else self.batch_axis or 0

    def _arguments(self, kept: Tensor) -> Any:
        """Return the block's arguments with everything that moves gathered at the kept tokens."""
        tokens, staying = self.x.shape[1], int((~self.moves).sum(1).max())
        new: dict[str, Any] = {raw: leaf.clone() for raw, leaf in self.named.values()}
        for name, words in self.site.aligned.items():
            if name in self.named:
                raw, leaf = self.named[name]
                new[raw] = gather(leaf, words.split(), kept, tokens)
            elif name in self.numbers:
                new[self.numbers[name][0]] = {"#n": len(kept) - staying, "#m+n": len(kept), "off": False}[words]
        return map_leaves(self.given, lambda path, leaf: new.get(path, leaf))


def gather(x: Tensor, words: list[str], kept: Tensor, tokens: int) -> Tensor:
    """Pick the tokens ``k`` of one sample along every token axis; prefixes and suffixes stay whole."""
    for axis, word in enumerate(words):
        rest = torch.arange(max(0, x.shape[axis] - tokens))
        if word == "n":
            x = x.index_select(axis, kept)
        elif word == "m+n":
            x = x.index_select(axis, torch.cat([rest, kept + len(rest)]))
        elif word == "n+m":
            x = x.index_select(axis, torch.cat([kept, rest + tokens]))
        elif word == "n-m":
            ahead = tokens - x.shape[axis]
            x = x.index_select(axis, kept[kept >= ahead] - ahead)
    return x
