"""Tell samples from tokens where a block mixes neither: an MLP by itself, cross-attention to text alone, attention over a single token.

Any such block is equivariant along both axes of its stream, and gathering along the samples' axis would let whole samples bypass. So the
rest of the recording is asked: blocks on the same stream that do mix, and then where the samples of the latent lie in it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from diffcr_surgery.align.proof import Subject
from diffcr_surgery.detect import MOVES, Lineage, function_of, latent_inputs, named_leaves, sources_of
from diffcr_surgery.trace.recording import BlockCall, Flow, Recording
from diffcr_surgery.trace.reference import OUT_OF_MEMORY, BlockSample

__all__ = ["Layouts"]


class Layouts:
    """What a recording tells of the layout of its streams.

    Attributes:
        streams: Node of each settled block call -> node of the stream it was given.
    """

    def __init__(self, recording: Recording, flow: Flow) -> None:
        self.streams: dict[fx.Node, fx.Node] = {}
        self._recording = recording
        self._graph = flow.graph
        self._calls = flow.calls
        self._mixed: dict[tuple[object, str], frozenset[int]] = {}

    def batch_axis(self, stream: fx.Node, mark: Tensor) -> int | None:
        """Return the axis of a stream ``b n c`` or ``n b c`` that holds samples, ``None`` if nothing tells.

        Args:
            stream: Its node.
            mark: Which of its tokens stem from the latent, ``b n`` or ``n b``.
        """
        mixed = {axis for block, given in self._readers(stream) for axis in self._mixed_axes(block, given)}
        if mixed:
            return 0 if 1 in mixed else 1
        return self._axis_of_samples(stream, mark)

    def _block(self, node: fx.Node) -> BlockCall:
        return self._recording.blocks[self._calls[node]]

    def _mixed_axes(self, node: fx.Node, given: fx.Node) -> frozenset[int]:
        block = self._block(node)
        found: frozenset[int] = frozenset()
        for path, source in sources_of(block.module, node).items():
            if source is given:
                key = (block.kind, path)
                if key not in self._mixed:
                    self._mixed[key] = _mixed_axes(self._recording.samples[block.kind], path)
                found |= self._mixed[key]
        return found

    def _readers(self, stream: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Yield the block calls that read the same stream, before or after others have worked on it, and what each is given."""
        shape = stream.meta["shape"]
        found = [stream]
        seen = {stream}
        for here in found:  # which grows meanwhile
            near = [self.streams[here]] if here in self.streams else list(here.all_input_nodes) if self._keeps(here) else []
            for user in here.users:
                if user in self._calls:
                    yield user, here
                    near += [user, *user.users]
                elif self._keeps(user):
                    near.append(user)
            for node in near:
                if node not in seen and (node.meta.get("shape") == shape or node in self.streams):
                    seen.add(node)
                    found.append(node)

    def _keeps(self, node: fx.Node) -> bool:
        """Tell whether what a node returns has its axes in the order of what it is given, if it has the same shape."""
        if node.target in (operator.getitem, getattr) and node.args[0] in self._calls:
            return True
        name = function_of(node)
        return node not in self._calls and name != "einsum" and (name not in MOVES or name in ("clone", "contiguous", "detach", "data"))

    def _axis_of_samples(self, stream: fx.Node, mark: Tensor) -> int | None:
        latent = latent_inputs(self._graph)
        samples = _samples(self._graph, latent)
        if samples is None:
            return None
        if samples == 1:
            return next((axis for axis in (0, 1) if mark.shape[axis] == 1), 0)
        lineage = _FirstSample(latent)
        for node in self._graph.nodes:
            if node in self._calls:
                lineage.settle_dense(self._block(node).module, node)
            else:
                lineage.follow(node)
            if node is stream:
                break
        first = lineage.tokens(stream)
        # All that stems from the latent in some rows, or in some columns, but not in all of them.
        found = [axis for axis in (0, 1) if torch.equal(first, mark & first.any(1 - axis, keepdim=True)) and not torch.equal(first, mark)]
        return found[0] if len(found) == 1 else None


def _mixed_axes(sample: BlockSample, path: str) -> frozenset[int]:
    """Return the axes (0, 1) of a stream ``b n c`` or ``n b c`` along which a block mixes: it holds its tokens there."""
    raw, tensor = named_leaves(sample.module, sample.args, sample.kwargs, Tensor)[path]
    try:
        subject = Subject.prepare(sample.module, sample.args, sample.kwargs)
    except OUT_OF_MEMORY:
        raise
    except RuntimeError:  # it cannot be run on its own
        return frozenset()
    outputs = [i for i, t in enumerate(subject.baseline) if t.shape == tensor.shape]
    return frozenset(axis for axis in (0, 1) if any(subject.mixes(subject.paths.index(raw), i, axis) for i in outputs))


def _samples(graph: fx.Graph, latent: set[fx.Node]) -> int | None:
    """Return b, the rows of the latent; ``None`` where timesteps or text have others, or where a lone latent may have its tokens there."""
    inputs = [node for node in graph.nodes if node.op == "placeholder" and "path" in node.meta]
    if len(latent) > 1:
        return len(latent)
    found = next((node.meta["shape"][0] for node in latent if len(node.meta["shape"]) > 2), None)
    others = {node.meta["shape"][0] for node in inputs if node not in latent and len(node.meta["shape"]) in (1, 3)}
    return found if found is not None and others <= {1, found} and (found > 1 or others) else None


class _FirstSample(Lineage):
    """Follows the first sample of the latent instead of all of it."""

    def follow(self, node: fx.Node) -> None:
        super().follow(node)
        if node.op == "placeholder" and node in self._latent:
            mark = torch.zeros(node.meta["shape"], dtype=torch.bool, device="cpu")
            if len(self._latent) == 1:
                mark[:1] = True
            else:  # one input a sample
                mark[...] = node is min(self._latent)
            self._marks[node] = mark

    def tokens(self, stream: fx.Node) -> Tensor:
        """Return which tokens of a stream stem from the first sample, without its channels."""
        mark: Tensor = self._marks[stream]
        return mark.any(-1)

    def _through(self, node: fx.Node) -> Any:
        """Let a convolution, which patches come from, spread a sample over itself alone."""
        if function_of(node) not in ("conv1d", "conv2d", "conv3d") or not node.args:
            return super()._through(node)
        mark, shape = self._marks.get(node.all_input_nodes[0]), node.meta["shape"]
        if not isinstance(mark, Tensor) or mark.ndim != len(shape) or mark.shape[0] != shape[0]:
            return super()._through(node)
        return mark.flatten(1).any(1).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
