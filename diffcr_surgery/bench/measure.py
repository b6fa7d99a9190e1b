"""What is measured of a model: latency in turns with others, peak memory, FLOPs, and how many tokens its blocks really got."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.profiler import ProfilerActivity, profile

from diffcr_surgery import SurgeryPlan
from diffcr_surgery.bench.hooks import stream_of
from diffcr_surgery.runtime.convert import state_of
from diffcr_surgery.runtime.execute import prepare
from diffcr_surgery.tokens import per_sample
from diffcr_surgery.trace.key import bind_call

__all__ = ["achieved_ratio", "peak_bytes", "routing_share", "seconds_in_turns"]

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


class _Shares(fx.Interpreter):
    """Runs a routed graph node by node, and adds up the time of the sites' blocks and of everything else that belongs to sites."""

    def __init__(self, model: nn.Module, graph: fx.Graph, cuda: bool) -> None:
        super().__init__(model, graph=graph)
        self.wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
        self.blocks = self.routing = 0.0

    def run_node(self, n: fx.Node) -> Any:
        self.wait()
        start = time.perf_counter()
        result = super().run_node(n)
        self.wait()
        taken = time.perf_counter() - start
        if n.target is per_sample or (n.op == "call_module" and not str(n.target).startswith("diffcr.")):
            self.blocks += taken if "site" in n.meta else 0.0
        elif "site" in n.meta:
            self.routing += taken
        return result


def routing_share(model: nn.Module, inputs: dict[str, Any], rounds: int, cuda: bool) -> float:
    """Return the time of router, choice, gathers, gate and scatter as a share of that of the blocks, in the median of some runs.

    Node by node, waiting for the GPU after each: what an operation takes to be launched counts in full, which a GPU that is busy hides.

    Args:
        model: A specialised model.
        inputs: Keyword arguments of a call.
        rounds: How often it is run, after a run that does not count.
        cuda: Whether to wait for the GPU.
    """
    (step,) = prepare(model, state_of(model), bind_call(model.forward, (), inputs), model.forward).steps
    shares = []
    for _ in range(rounds + 1):
        run = _Shares(model, step.graph, cuda)
        run.run(*step.inputs[1:])
        shares.append(run.routing / run.blocks)
    return statistics.median(shares[1:])


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
