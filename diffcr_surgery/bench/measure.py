"""What is measured of a model: latency in turns with others, peak memory, FLOPs, and how many tokens its blocks really got."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffcr_surgery import SurgeryPlan
from diffcr_surgery.bench.hooks import stream_of

__all__ = ["achieved_ratio", "count_flops", "peak_bytes", "seconds_in_turns"]

Call = Callable[[], object]


def seconds_in_turns(calls: Sequence[Call], rounds: int, cuda: bool) -> list[list[float]]:
    """Time calls in turns, so that whatever slows the machine down slows all of them down.

    Args:
        calls: What to time; each is run once before, which does not count.
        rounds: How often each is run.
        cuda: Whether to wait for the GPU.

    Returns:
        Seconds of each call, round by round.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, column in zip(calls, seconds, strict=True):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            column.append(time.perf_counter() - start)
    return seconds


def peak_bytes(call: Call, cuda: bool) -> int:
    """Return the bytes that a call takes at its peak, beyond what is held before it: beyond the weights."""
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = peak = 0
    recorded: Any = profiled.profiler  # Any: neither is annotated
    for event in sorted(recorded.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def count_flops(call: Call) -> int:
    """Return the floating-point operations of a call as they are executed. A converted model's first call runs more than later ones."""
    with FlopCounterMode(display=False) as counter:
        call()
    total: int = counter.get_total_flops()
    return total


def achieved_ratio(model: nn.Module, plan: SurgeryPlan, call: Call) -> float:
    """Run a call that is not the first; return the share of tokens that entered no routed block, as seen at the blocks themselves."""
    seen: list[float] = []

    def watch(name: str, tokens: int) -> Any:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = kwargs[name] if name in kwargs else args[0]
            seen.append(1.0 - stream.shape[1] / tokens)

        return before

    hooks = [
        model.get_submodule(site.path).register_forward_pre_hook(watch(stream_of(site)[0], site.tokens), with_kwargs=True)
        for site in plan.routed_sites
    ]
    call()
    for hook in hooks:
        hook.remove()
    return sum(seen) / len(seen)
