"""Recordings: verified graphs of a model, each answering under the key it was made with and no other."""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx

from diffcr_surgery._tree import fill, flatten
from diffcr_surgery.errors import TraceError
from diffcr_surgery.trace.blocks import block_candidates, block_kind
from diffcr_surgery.trace.builder import BuiltGraph, StaleRecordingError, build, build_flow, expect
from diffcr_surgery.trace.key import (
    Call,
    InputKey,
    ModelState,
    Settings,
    StateKey,
    check_arguments,
    copies,
    input_key,
    model_device,
    plain_values_that_differ,
)
from diffcr_surgery.trace.recorder import Frame, Recorder, rng_state
from diffcr_surgery.trace.reference import BlockSample, Place, Reference, perturbed_run, reference_run
from diffcr_surgery.trace.undisturbed import Rewind, equal, foreign_random, own_modules, set_rng_state, undisturbed

__all__ = [
    "BlockCall",
    "Flow",
    "Recording",
    "Recordings",
    "compile_graph",
    "record",
]

MAX_RECORDINGS = 64
MAX_VARIANTS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class BlockCall:
    """What a graph node that calls a block stands for; ``half`` is an attention or an MLP that has no module in common with the other."""

    path: str
    module: torch.nn.Module
    kind: Hashable
    checkpointed: bool
    random: bool
    half: bool = False


@dataclass(frozen=True)
class Held:
    """A constant of a graph that a module holds, in an attribute or in a dict or list that is one."""

    owner: Any
    key: Any
    tensor: torch.Tensor

    def unchanged(self) -> bool:
        """Tell whether the module still holds that tensor."""
        try:
            return self.owner[self.key] is self.tensor
        except LookupError:
            return False


@dataclass(frozen=True)
class Flow:
    """A run as a graph of functions and blocks, to follow data through; never run.

    Attributes:
        graph: The graph.
        calls: Its block nodes, in order -> the node of the same call in the recording's graph.
    """

    graph: fx.Graph
    calls: dict[fx.Node, fx.Node]


@dataclass
class Recording:
    """A graph that reproduces the model bit for bit under one key.

    Attributes:
        graph: The ``torch.fx`` graph.
        constants: Values of the trailing placeholders.
        output: The output structure with slots.
        blocks: Node of each block call -> what it calls.
        samples: Kind of block call -> arguments one such call had; emptied once the proof is done.
        state: The model state the recording depends on, and its value at the time.
        derived: What a later stage made of this recording.
        flow: The same run with all modules but blocks spread out; dropped once the proof is done.
        held: Constants that a module keeps in an attribute, a cache of its own, and may exchange.
        pinned: Input number -> the content it must have, where that says which tokens stem from the latent.
        ran: Paths of all modules that were called.
    """

    graph: fx.Graph
    constants: list[Any]
    output: Any
    blocks: dict[fx.Node, BlockCall]
    state: ModelState
    state_key: StateKey
    samples: dict[Hashable, BlockSample] = field(default_factory=dict)
    derived: Any = None
    flow: Flow | None = None
    pinned: dict[int, torch.Tensor] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)
    ran: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._run = compile_graph(self.graph)
        self.guarded = any(node.target is expect for node in self.graph.nodes)

    def forget_proof(self) -> None:
        """Let go of what only a proof needs: block arguments and index contents of the recorded run."""
        self.samples.clear()
        self.flow = None

    def fits(self, call: Call) -> bool:
        """Tell whether the model is in the recorded state, and inputs that were pinned are what they were."""
        pinned = all(torch.equal(call.tensors[index], content) for index, content in self.pinned.items())
        return pinned and all(held.unchanged() for held in self.held) and self.state.key() == self.state_key

    def run(self, model: torch.nn.Module, tensors: list[torch.Tensor]) -> Any:
        """Execute the graph on input tensors, with ``model`` as ``self``."""
        return self.execute(self._run, (model, *tensors, *self.constants))

    def execute(self, run: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """Call a compiled graph and rebuild the recorded output structure."""
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # a graph may be stopped by a guard while gradients are off
            values = run(*inputs)
        return fill(self.output, values)


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """Turn a graph into a Python function whose first argument is the model."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<diffcr_surgery graph>", "exec"), scope)  # the way torch.fx.GraphModule does it
    return scope["forward"]  # type: ignore[no-any-return]


class Recordings:
    """Keyed recordings of one model; safe under threads, bounded in number, dropped by deepcopy and pickle."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._entries: OrderedDict[InputKey, list[Recording]] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        return Recordings()

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def __iter__(self) -> Iterator[Recording]:
        return (recording for variants in list(self._entries.values()) for recording in list(variants))

    def answer(self, model: torch.nn.Module, call: Call, forward: Callable[..., Any], use: Callable[[Recording], T]) -> T:
        """Return ``use(recording)`` for a recording valid for ``call``; one is made now where there is none.

        Args:
            model: The model.
            call: The call to answer.
            forward: The model's own bound forward, which is recorded.
            use: Executes a recording's graph, or one derived from it.
        """
        key = input_key(model, call)
        recording = self._try(key, model, call, use)
        if recording is not None:
            return recording[0]
        with self._lock:
            recording = self._try(key, model, call, use)  # another thread may have recorded it meanwhile
            if recording is not None:
                return recording[0]
            if torch.compiler.is_exporting():
                raise TraceError(
                    f"{type(model).__name__} has to be recorded on inputs like these before it is exported: call the model once, on real "
                    "tensors of the same shapes and dtypes, with gradients on or off alike, and export it then."
                )
            made = record(model, call, forward)
            result = use(made)  # under the lock: what is derived from a recording is made once, before others see it
            self._store(key, made, model)
        return result

    def _try(self, key: InputKey, model: torch.nn.Module, call: Call, use: Callable[[Recording], T]) -> tuple[T] | None:
        for recording in list(self._entries.get(key, ())):
            if not recording.fits(call):
                continue
            if not recording.guarded:
                return (use(recording),)
            device = model_device(model, call.tensors)
            start = rng_state(device)
            try:
                result = use(recording)
            except StaleRecordingError:
                set_rng_state(start, device)
                continue
            self._move(recording, first=True)
            return (result,)
        return None

    def postpone(self, recording: Recording) -> None:
        """Let a variant that a guard has stopped be tried last next time."""
        self._move(recording, first=False)

    def _move(self, recording: Recording, *, first: bool) -> None:
        for key, variants in list(self._entries.items()):
            if len(variants) > 1 and variants[0 if first else -1] is not recording and any(other is recording for other in variants):
                with self._lock:
                    others = [other for other in self._entries.get(key, []) if other is not recording]
                    self._entries[key] = [recording, *others] if first else [*others, recording]

    def _store(self, key: InputKey, recording: Recording, model: torch.nn.Module) -> None:
        variants = self._entries.setdefault(key, [])
        variants.insert(0, recording)
        crowded, oldest = len(variants) > MAX_VARIANTS, variants[-1]
        del variants[MAX_VARIANTS:]
        self._entries.move_to_end(key)
        while len(self._entries) > MAX_RECORDINGS:
            former, _ = self._entries.popitem(last=False)
            varied = plain_values_that_differ(former, key)
            if varied:
                warnings.warn(
                    f"{type(model).__name__} is recorded anew for each value of {', '.join(map(repr, varied))}, which takes many times as "
                    f"long as a call, and no more than {MAX_RECORDINGS} are kept. Give it as a tensor.",
                    stacklevel=2,
                )
        changing = recording.state.changed(oldest.state_key[0]) if crowded else []
        if changing:
            warnings.warn(
                f"{', '.join(changing)}: changed from call to call, and the model is recorded anew each time, since its forward may read "
                "that. Keep what is no setting outside the model, or in a tensor.",
                stacklevel=2,
            )


def record(model: torch.nn.Module, call: Call, forward: Callable[..., Any]) -> Recording:
    """Record ``forward`` on ``call`` and verify the recording on other inputs of the same shapes.

    Costs three forwards: the recorded one, one on perturbed inputs, and the graph's answer to the same. All run on copies of the inputs.
    Random states, buffers and plain attributes are as before afterwards.

    Raises:
        TraceError: If the recording does not reproduce the model.
    """
    check_arguments(call)
    device = model_device(model, call.tensors)
    with undisturbed(model, device) as rewind:
        recorder, tensors = Recorder(model, device), copies(call.tensors)
        args, kwargs = call.on(tensors)
        inputs = list(zip(call.paths, tensors, strict=True))
        root, output = recorder.record(forward, model, args, kwargs)
        _, _, template = flatten(output)
        del output
        blocks = block_candidates(recorder, root)
        built = build(recorder, root, inputs, template, blocks)
        calls = {
            node: BlockCall(
                frame.path, frame.module, block_kind(recorder, frame), frame.checkpointed, frame.random, blocks[id(frame.module)]
            )
            for node, frame in built.frames.items()
            if id(frame.module) in blocks
        }
        leaves = {id(frame.module): frame.module for frame in built.frames.values()}
        covered = {id(inner) for leaf in leaves.values() for inner in leaf.modules()}
        inlined = [module for module in own_modules(model) if id(module) not in covered]
        state, training = ModelState(inlined, leaves.values()), [module.training for module in inlined]
        flow = _flow(recorder, root, inputs, blocks, built)
        recording = Recording(built.graph, built.constants, built.output, calls, state, state.key(), flow=flow)
        recording.held = _held(model, built.constants)
        recording.ran = frozenset(event.path for event in root.walk() if isinstance(event, Frame))
        places = _places(root, recording.blocks, built.frames)
        del recorder, root, args, kwargs, tensors, inputs
        _verify(recording, model, call, forward, partial(rewind, frozenset(map(id, inlined))), places)
        rewind()
        if training == [module.training for module in inlined]:  # else another thread has switched it, and what was recorded is the former
            recording.state_key = state.key()
    return recording


def _places(root: Frame, blocks: dict[fx.Node, BlockCall], frames: dict[fx.Node, Frame]) -> dict[Hashable, Place]:
    """Return one call of each kind of block."""
    before: Counter[torch.nn.Module] = Counter()
    places: dict[int, Place] = {}
    for event in root.walk():
        if isinstance(event, Frame):
            places[id(event)] = (event.module, before[event.module])
            before[event.module] += 1
    return {block.kind: places[id(frames[node])] for node, block in reversed(blocks.items())}


def _held(model: torch.nn.Module, constants: list[Any]) -> list[Held]:
    wanted = {id(constant): constant for constant in constants if isinstance(constant, torch.Tensor)}
    if not wanted:
        return []
    owners: list[Any] = [vars(module) for module in model.modules()]
    owners += [value for owner in list(owners) for value in owner.values() if type(value) in (dict, list)]
    items = ((owner, pair) for owner in owners for pair in (owner.items() if isinstance(owner, dict) else enumerate(owner)))
    return [Held(owner, key, value) for owner, (key, value) in items if id(value) in wanted]


def _flow(recorder: Recorder, root: Frame, inputs: list[tuple[str, torch.Tensor]], blocks: Collection[int], built: BuiltGraph) -> Flow:
    flow = build_flow(recorder, root, inputs, blocks)
    nodes = {id(frame): node for node, frame in built.frames.items()}
    return Flow(flow.graph, {node: nodes[id(frame)] for node, frame in flow.frames.items()})


def _verify(
    recording: Recording, model: torch.nn.Module, call: Call, forward: Callable[..., Any], rewind: Rewind, places: dict[Hashable, Place]
) -> None:
    """Compare the recording with the model, whose own modules are left as the recorded run left them.

    So what a first run does, or each run does anew, shows as a difference.
    """
    settled = recording.state.key()[0]
    reference = perturbed_run(call, forward, rewind, places)
    given = copies(reference.tensors)
    rewind()
    try:
        actual = recording.run(model, given)
    except StaleRecordingError:  # a guard saw the difference, as it should; what is left to check is the recorded call itself
        rewind()
        reference = reference_run(call, call.tensors, forward, places)
        given = copies(reference.tensors)
        rewind()
        try:
            actual = recording.run(model, given)
        except StaleRecordingError as change:
            raise TraceError(
                f"{type(model).__name__} reads a value out of a tensor that differs between two runs on the same inputs ({change}); such a "
                "model cannot be recorded. Move that part into a submodule, which is kept whole."
            ) from None
    recording.samples = reference.samples
    _check_effects(recording, model, call, forward, rewind, reference, settled)
    _, wanted, _ = flatten((reference.output, reference.left))
    _, got, _ = flatten((actual, given))
    if len(wanted) == len(got) and all(map(equal, wanted, got)):
        return
    pairs = [(a.detach(), b.detach()) for a, b in zip(wanted, got, strict=False) if a.shape == b.shape and a.is_floating_point()]
    gaps = [float((a - b).abs().max()) for a, b in pairs]
    raise TraceError(
        f"The recording of {type(model).__name__} does not reproduce it on other inputs of the same shapes (largest differences {gaps}). "
        f"{_suspects(recording)}{_fast_path(model)}Something in its forward escapes the recording: a tensor taken from a cache, a side "
        "effect on modules, or an input read outside torch. Move that part into a submodule, which is kept whole."
    )


def _check_effects(
    recording: Recording,
    model: torch.nn.Module,
    call: Call,
    forward: Callable[..., Any],
    rewind: Rewind,
    reference: Reference,
    settled: Settings,
) -> None:
    """Refuse what a run of the model does, and a run of its graph would not do or not undo."""
    name = type(model).__name__
    changing = recording.state.changed(settled)
    if changing:
        raise TraceError(
            f"The forward of {name} sets {', '.join(changing)} anew in every run, as a counter does, and a recording runs no such Python "
            "code. Set it outside of forward, or move that part into a submodule, which is kept whole."
        )
    now = foreign_random()
    drawn = [module for module, state in reference.random.items() if now.get(module, state) != state]
    if drawn:  # by the forward, if it does so again; by another thread, if not
        rewind()
        again = reference_run(call, reference.tensors, forward, {}).random
        drawn = [module for module in drawn if again.get(module) == reference.random[module]]
    if drawn:
        raise TraceError(
            f"The forward of {name} draws from {' and '.join(drawn)}, and a recording would repeat what was drawn once. Draw with "
            "torch.rand, or move that part into a submodule, which is kept whole."
        )
    written = [path for path, old, new in zip(call.paths, reference.tensors, reference.left, strict=True) if not equal(old, new)]
    if written and recording.guarded:
        raise TraceError(
            f"The forward of {name} writes into its input {written[0]!r} and lets Python read values out of tensors. Were another value "
            "read in a later call, the model would have to run again on an input that is overwritten. Let it work on a clone of that input."
        )


def _fast_path(model: torch.nn.Module) -> str:
    if torch.backends.mha.get_fastpath_enabled() and any(isinstance(m, torch.nn.TransformerEncoder) for m in model.modules()):
        return (
            "It holds a torch.nn.TransformerEncoder, whose fast path gives other values where tokens are padded, and is not taken while "
            "recording; call torch.backends.mha.set_fastpath_enabled(False) first. "
        )
    return ""


def _suspects(recording: Recording) -> str:
    constants = (node for node in recording.graph.nodes if node.op == "placeholder" and "path" not in node.meta)
    readers = {str(node): list(map(str, node.users)) for node in constants}
    return f"It baked in the constants {readers} (name: readers). " if readers else ""
