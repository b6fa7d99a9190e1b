"""Watch a converted model through hooks, and compare what is seen with the method done by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_surgery._tree import flatten
from diffcr_surgery.detect import named_leaves
from diffcr_surgery.plan import BlockSite, SurgeryPlan
from diffcr_surgery.testing.by_hand import ByHand, Run, Way
from diffcr_surgery.testing.compare import LawError, same
from diffcr_surgery.testing.pair import Pair, call, rounding

__all__ = ["compare_by_hand", "lengths_of", "require_planned_size"]

_CLOSE = 1e-6  # scores nearer than this, yet not equal, may change places by rounding


@contextmanager
def lengths_of(model: nn.Module, planned: SurgeryPlan) -> Iterator[dict[int, set[int]]]:
    """Collect how many tokens each site's block is given; of a block that is called twice, calls are not told apart, and none is noted."""
    found: dict[int, set[int]] = {}
    paths = [site.path for site in planned.routed_sites]

    def watch(row: int) -> Any:
        stream, axes = next(iter(planned.routed_sites[row].aligned.items()))
        at = axes.split().index("n")

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(row, set()).add(named_leaves(module, args, kwargs, Tensor)[stream][1].shape[at])

        return model.get_submodule(paths[row]).register_forward_pre_hook(see, with_kwargs=True)

    handles = [watch(row) for row, path in enumerate(paths) if paths.count(path) == 1]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def require_planned_size(law: str, pair: Pair) -> None:
    """Refuse a call of other sizes than the model was planned with: how many of its tokens may bypass is in no plan.

    Raises:
        ValueError: Naming the site.
    """
    with torch.no_grad(), lengths_of(pair.original, pair.plan) as lengths:
        call(pair.original, pair.arguments)
    for row, site in enumerate(pair.plan.routed_sites):
        if lengths.get(row, {site.tokens + site.staying}) != {site.tokens + site.staying}:
            raise ValueError(
                f"{law}: in this call {site.path} has {sorted(lengths[row])} tokens, and the model was planned with "
                f"{site.tokens + site.staying}. Give inputs of the size it was planned with, or the model before it is converted."
            )


@dataclass
class _Seen:
    """What hooks saw of a converted model.

    Attributes:
        streams: Row of each router -> the stream it was given, ``b n c``.
        scores: Row of each router -> its scores, ``b n``.
        read: Row of each site -> the stream it left, as the module read it that reads that very stream, ``b n c``.
    """

    streams: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    read: dict[int, Tensor] = field(default_factory=dict)


def _plain(x: Tensor, site: BlockSite) -> Tensor:
    """Bring a stream, or scores of it, into ``b n`` order."""
    words = next(iter(site.aligned.values())).split()
    return x[None] if "b" not in words else x.movedim((words.index("b"), words.index("n")), (0, 1))


@contextmanager
def _watched(pair: Pair, readers: Mapping[int, tuple[str, str]]) -> Iterator[_Seen]:
    """Watch the routers, and the modules that read the streams behind sites."""
    seen, sites = _Seen(), pair.plan.routed_sites

    def at_router(row: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], scores: Tensor) -> None:
            seen.streams[row] = _plain(args[0].detach().clone(), sites[row])
            seen.scores[row] = _plain(scores.detach().clone(), sites[row])

        return hook

    def at_reader(row: int, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            paths, tensors, _ = flatten((args, kwargs))
            if path in paths:
                seen.read[row] = _plain(tensors[paths.index(path)].detach().clone(), sites[row])

        return hook

    handles = [router.register_forward_hook(at_router(int(row))) for row, router in pair.state.routers.items()]
    for row, (module, path) in readers.items():
        handles.append(pair.converted.get_submodule(module).register_forward_pre_hook(at_reader(row, path), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compare_by_hand(law: str, pair: Pair, hand: ByHand, arguments: dict[str, Any], ways: Sequence[Sequence[Way]], what: str = "") -> bool:
    """Compare a call with the method done by hand.

    Args:
        law: Name of the law.
        pair: Converted and original.
        hand: What does the method by hand on the original.
        arguments: Of the call; all its samples run at the same ratios.
        ways: The ways through each site.
        what: Which sample is compared, for the message.

    Returns:
        Whether rounding could decide between two tokens in another call with these samples.

    Raises:
        LawError: Naming the site, sample and token.
    """
    with torch.no_grad():
        with _watched(pair, hand.readers) as seen:
            output = call(pair.converted, arguments)
        weights: dict[int, Tensor] = {int(row): router.get_parameter("weight") for row, router in pair.state.routers.items()}
        run = hand.run(arguments, ways, weights, seen.scores)
        if run.readers != hand.readers:
            hand.readers = run.readers
            with _watched(pair, hand.readers) as seen:
                output = call(pair.converted, arguments)
    sites, what = pair.plan.routed_sites, f"{what}: " if what else ""
    for row in sorted(seen.streams):
        where = f"{what}the stream that enters {sites[row].path}"
        same(law, where, seen.streams[row], run.entered[row], tolerance=rounding(seen.streams[row]), describe=_told(run, sites, row))
        same(law, f"{what}the scores at {sites[row].path}", seen.scores[row], run.scores[row], tolerance=rounding(seen.streams[row]))
    for row, site in enumerate(sites):
        after = seen.read.get(
            row, next((seen.streams[n] for n, before in run.continues.items() if before == row and n in seen.streams), None)
        )
        if row not in seen.streams or after is None or len({way.ratio for way in ways[row]}) > 1:
            continue
        moved = (after != seen.streams[row]).any(-1) & run.bypassed[row]
        if bool(moved.any()):
            sample, token = moved.nonzero()[0].tolist()
            raise LawError(f"{law}: {what}token {token} of sample {sample} bypassed {site.path}, and did not leave it as it entered.")
    same(law, f"{what}the output", output, run.output, tolerance=rounding(output), describe=_told(run, sites, len(sites)))
    return run.margin < _CLOSE


def _told(run: Run, sites: Sequence[BlockSite], row: int) -> Any:
    """Return what says which token of which site went wrong."""

    def describe(_: str, index: tuple[int, ...]) -> str:
        if row == 0 or row - 1 not in run.bypassed:
            return ""
        mask = run.bypassed[row - 1]
        if len(index) < 2 or row == len(sites) or index[0] >= mask.shape[0] or index[1] >= mask.shape[1]:
            return f"The last routed block before it is {sites[row - 1].path}."
        fate = "bypassed" if bool(mask[index[0], index[1]]) else "was kept by"
        return f"Token {index[1]} of sample {index[0]} {fate} {sites[row - 1].path}, the routed block before."

    return describe
