"""Recordings: verified graphs of a model, each answering under the key it was made with and no other."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx

from diffcr_surgery._tree import fill, flatten, map_leaves
from diffcr_surgery.caches import uncached
from diffcr_surgery.errors import TraceError
from diffcr_surgery.trace.blocks import block_candidates, block_kind
from diffcr_surgery.trace.builder import BuiltGraph, StaleRecordingError, build, build_flow, expect
from diffcr_surgery.trace.key import Call, ModelState, input_key, model_device
from diffcr_surgery.trace.perturb import perturb_inputs, tame
from diffcr_surgery.trace.recorder import Frame, Recorder, rng_state

__all__ = [
    "OUT_OF_MEMORY",
    "BlockCall",
    "BlockSample",
    "Flow",
    "Recording",
    "Recordings",
    "compile_graph",
    "record",
    "run_call",
    "undisturbed",
]

MAX_RECORDINGS = 64
MAX_VARIANTS = 16
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # it tells of the machine and not of the model, so no trial may take it for an answer

T = TypeVar("T")


@dataclass(frozen=True)
class BlockSample:
    """Arguments a block was really called with; the raw material of the permutation proof."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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
    """

    graph: fx.Graph
    constants: list[Any]
    output: Any
    blocks: dict[fx.Node, BlockCall]
    state: ModelState
    state_key: Hashable
    samples: dict[Hashable, BlockSample] = field(default_factory=dict)
    derived: Any = None
    flow: Flow | None = None
    pinned: dict[int, torch.Tensor] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)

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
        self._entries: OrderedDict[Hashable, list[Recording]] = OrderedDict()

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
        key = input_key(call)
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
            self._store(key, made)
        return result

    def _try(self, key: Hashable, model: torch.nn.Module, call: Call, use: Callable[[Recording], T]) -> tuple[T] | None:
        for recording in self._valid(key, call):
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

    def _valid(self, key: Hashable, call: Call) -> list[Recording]:
        return [recording for recording in list(self._entries.get(key, ())) if recording.fits(call)]

    def postpone(self, recording: Recording) -> None:
        """Let a variant that a guard has stopped be tried last next time."""
        self._move(recording, first=False)

    def _move(self, recording: Recording, *, first: bool) -> None:
        for key, variants in list(self._entries.items()):
            if len(variants) > 1 and variants[0 if first else -1] is not recording and any(other is recording for other in variants):
                with self._lock:
                    others = [other for other in self._entries.get(key, []) if other is not recording]
                    self._entries[key] = [recording, *others] if first else [*others, recording]

    def _store(self, key: Hashable, recording: Recording) -> None:
        variants = self._entries.setdefault(key, [])
        variants.insert(0, recording)
        del variants[MAX_VARIANTS:]
        self._entries.move_to_end(key)
        while len(self._entries) > MAX_RECORDINGS:
            self._entries.popitem(last=False)


def set_rng_state(states: tuple[torch.Tensor, ...], device: torch.device) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    """Restore random state and buffers at the end; the yielded function restores them in between. Caches stand aside."""
    start = rng_state(device)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def rewind() -> None:
        set_rng_state(start, device)
        with torch.no_grad():
            for buffer, value in buffers:
                if not _same(buffer, value):
                    buffer.copy_(value)

    try:
        with uncached(model):
            yield rewind
    finally:
        rewind()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and bool(((one == other) | (one.isnan() & other.isnan())).all())


def record(model: torch.nn.Module, call: Call, forward: Callable[..., Any]) -> Recording:
    """Record ``forward`` on ``call`` and verify the recording on other inputs of the same shapes.

    Costs three forwards: the recorded one, one on perturbed inputs, and the graph's answer to the same. Random state and
    buffers are as before afterwards.

    Raises:
        TraceError: If the recording does not reproduce the model.
    """
    device = model_device(model, call.tensors)
    with undisturbed(model, device) as rewind:
        recorder = Recorder(model, device)
        args, kwargs = map_leaves((call.args, call.kwargs), lambda _, leaf: leaf)  # containers of its own: a forward may pop from them
        root, output = recorder.record(forward, model, args, kwargs)
        _, _, template = flatten(output)
        del output
        rewind()
        blocks = block_candidates(recorder, root)
        built = build(recorder, root, list(zip(call.paths, call.tensors, strict=True)), template, blocks)
        calls = {
            node: BlockCall(
                frame.path, frame.module, block_kind(recorder, frame), frame.checkpointed, frame.random, blocks[id(frame.module)]
            )
            for node, frame in built.frames.items()
            if id(frame.module) in blocks
        }
        leaves = {id(frame.module): frame.module for frame in built.frames.values()}
        covered = {id(inner) for leaf in leaves.values() for inner in leaf.modules()}
        own = ((name, module) for name, module in model.named_modules() if name.split(".")[0] != "diffcr")  # which its forward never reads
        inlined = [module for _, module in own if id(module) not in covered]
        state = ModelState(inlined, leaves.values())
        flow = _flow(recorder, root, call, blocks, built)
        recording = Recording(built.graph, built.constants, built.output, calls, state, state.key(), flow=flow)
        recording.held = _held(model, built.constants)
        del recorder, root
        _verify(recording, model, call, forward, rewind)
    return recording


def _held(model: torch.nn.Module, constants: list[Any]) -> list[Held]:
    wanted = {id(constant): constant for constant in constants if isinstance(constant, torch.Tensor)}
    if not wanted:
        return []
    owners: list[Any] = [vars(module) for module in model.modules()]
    owners += [value for owner in list(owners) for value in owner.values() if type(value) in (dict, list)]
    items = ((owner, pair) for owner in owners for pair in (owner.items() if isinstance(owner, dict) else enumerate(owner)))
    return [Held(owner, key, value) for owner, (key, value) in items if id(value) in wanted]


def _flow(recorder: Recorder, root: Frame, call: Call, blocks: Collection[int], built: BuiltGraph) -> Flow:
    flow = build_flow(recorder, root, list(zip(call.paths, call.tensors, strict=True)), blocks)
    nodes = {id(frame): node for node, frame in built.frames.items()}
    return Flow(flow.graph, {node: nodes[id(frame)] for node, frame in flow.frames.items()})


def _verify(recording: Recording, model: torch.nn.Module, call: Call, forward: Callable[..., Any], rewind: Callable[[], None]) -> None:
    representatives = {block.kind: block for block in reversed(recording.blocks.values())}
    with _sampling(recording, representatives):
        tensors, expected = _reference(call, forward, rewind)
    rewind()
    try:
        actual = recording.run(model, tensors)
    except StaleRecordingError:  # a guard saw the difference, as it should; what is left to check is the recorded call itself
        rewind()
        tensors = call.tensors
        expected = run_call(call, tensors, forward)
        rewind()
        try:
            actual = recording.run(model, tensors)
        except StaleRecordingError as change:
            raise TraceError(
                f"{type(model).__name__} reads a value out of a tensor that differs between two runs on the same inputs ({change}); such a "
                "model cannot be recorded. Move that part into a submodule, which is kept whole."
            ) from None
    _, wanted, _ = flatten(expected)
    _, got, _ = flatten(actual)
    if len(wanted) == len(got) and all(map(_same, wanted, got)):
        return
    pairs = [(a.detach(), b.detach()) for a, b in zip(wanted, got, strict=False) if a.shape == b.shape and a.is_floating_point()]
    gaps = [float((a - b).abs().max()) for a, b in pairs]
    raise TraceError(
        f"The recording of {type(model).__name__} does not reproduce it on other inputs of the same shapes (largest differences {gaps}). "
        f"{_suspects(recording)}{_fast_path(model)}Something in its forward escapes the recording: a tensor taken from a cache, a side "
        "effect on modules, or an input read outside torch. Move that part into a submodule, which is kept whole."
    )


def _fast_path(model: torch.nn.Module) -> str:
    if torch.backends.mha.get_fastpath_enabled() and any(isinstance(m, torch.nn.TransformerEncoder) for m in model.modules()):
        return (
            "It holds a torch.nn.TransformerEncoder, whose fast path gives other values where tokens are padded, and is not taken while "
            "recording; call torch.backends.mha.set_fastpath_enabled(False) first. "
        )
    return ""


def _suspects(recording: Recording) -> str:
    names = [str(n) for n in recording.graph.nodes if n.op == "placeholder" and n.name.startswith(("constant_", "object_"))]
    readers = {name: [str(user) for node in recording.graph.nodes if node.name == name for user in node.users] for name in names}
    return f"It baked in the constants {readers} (name: readers). " if readers else ""


def _reference(call: Call, forward: Callable[..., Any], rewind: Callable[[], None]) -> tuple[list[torch.Tensor], Any]:
    """Run the model on perturbed inputs; fewer are perturbed if it cannot take them, and broken numbers taken out if no output is sound."""
    for integers, given in ((True, call.tensors), (False, call.tensors), (False, list(map(tame, call.tensors)))):
        tensors = perturb_inputs(given, integers=integers)
        try:
            output = run_call(call, tensors, forward)
            if _finite(output):
                return tensors, output
        except OUT_OF_MEMORY:
            raise
        except Exception:  # a model may refuse any input by any error; the unperturbed ones are known to work
            pass
        rewind()
    return call.tensors, run_call(call, call.tensors, forward)


def _finite(output: Any) -> bool:
    """Tell whether a run made sense: a text mask perturbed to all zeros, say, makes attention divide by zero."""
    return all(bool(t.isfinite().all()) for t in flatten(output)[1] if t.is_floating_point())


def run_call(call: Call, tensors: list[torch.Tensor], forward: Callable[..., Any]) -> Any:
    """Call ``forward`` as in ``call``, on other input tensors."""
    other = {id(old): new for old, new in zip(call.tensors, tensors, strict=True)}
    swap = lambda _, leaf: other.get(id(leaf), leaf)  # noqa: E731
    args, kwargs = map_leaves((call.args, call.kwargs), swap)
    return forward(*args, **kwargs)


@contextmanager
def _sampling(recording: Recording, representatives: dict[Hashable, BlockCall]) -> Iterator[None]:
    """Keep the arguments of the first call of each representative block while the body runs."""
    thread = threading.get_ident()

    def keep(kind: Hashable) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any = None) -> None:  # another thread may come by while it is being put on
            if threading.get_ident() == thread:
                copy = lambda _, leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
                recording.samples[kind] = BlockSample(module, *map_leaves((args, kwargs), copy))

        return hook

    handles = [
        block.module.register_forward_pre_hook(keep(kind), prepend=True, with_kwargs=True) for kind, block in representatives.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
