"""Stage 3, align: which axis of which argument moves with the tokens; found by search, settled by proof.

The smallest set of arguments is wanted that has to be permuted along with the stream. An argument that is permuted without need is a
fault too: text keys of the same length as the image pass any permutation test, and gathering them would throw words away. The search
therefore begins with the stream alone. Then it tells each argument by itself, while the others are the same for every token; whole sets
are tried only where that does not lead to a proof.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffcr_surgery.align.candidates import by_likelihood, combinations, complete, options_of, prefix_lengths, prefix_of, stream_patterns
from diffcr_surgery.align.proof import Stream, Subject
from diffcr_surgery.axes import parse_axes
from diffcr_surgery.detect import by_sample, named_leaves
from diffcr_surgery.tokens import keep_tokens, kept_count, rank_tokens
from diffcr_surgery.trace.reference import OUT_OF_MEMORY, BlockSample

__all__ = ["Alignment", "align_block"]

FEW_TOKENS = 64  # of fewer, a proof draws arguments and weights three times
MAX_TRIALS = 600  # a round; reached only where many lengths are alike
_COUNTS_OTHERS = re.compile("head|group|dim|channel|layer|block|index|idx", re.IGNORECASE)  # numbers equal to n by chance


@dataclass(frozen=True)
class Alignment:
    """What the proof found for one kind of block call.

    Attributes:
        routable: Whether the block treats its tokens as a set.
        reason: Why not; or the measured error of the proof.
        stream: Path of the stream argument, by the names of the block's forward.
        output: Path of the output that continues it (``""`` for a lone one).
        axes: Argument path -> axis pattern, for every argument that moves, and ``"b"`` for what is batched besides.
        tokens: Length of the stream's token axis in the arguments the proof was run on; 1 if a single token left nothing to prove.
        error: Largest error of the proof relative to the output's spread.
        counts: Path of each whole number that counts tokens -> ``"n"`` (those that may bypass) or ``"m+n"`` (all); and of each flag
            that says a mask is causal -> ``"off"``.
        overwrites: Whether the block writes into the stream it is given.
        given: Paths of all tensor arguments the proof was run on.
        batches: Path of each output whose batch axis is another one than the stream's -> that axis.
        undecided: Whether it could not be told which axis of the stream holds samples and which tokens.
    """

    routable: bool
    reason: str
    stream: str = ""
    output: str = ""
    axes: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    error: float = float("inf")
    counts: dict[str, str] = field(default_factory=dict)
    overwrites: bool = False
    given: frozenset[str] = frozenset()
    batches: dict[str, int] = field(default_factory=dict)
    undecided: bool = False

    @property
    def aligned(self) -> dict[str, str]:
        """Argument path -> axis pattern of what moves with the tokens; ``"#n"`` for a number that counts them, ``"off"`` for a flag."""
        moved = {path: pattern for path, pattern in self.axes.items() if parse_axes(pattern).tokens}
        return moved | {path: word if word == "off" else f"#{word}" for path, word in self.counts.items()}


def align_block(
    sample: BlockSample,
    streams: Mapping[str, Tensor],
    hint: dict[str, str] | None = None,
    *,
    search: bool = True,
    unread: frozenset[str] = frozenset(),
    batch_axes: Mapping[str, int] | None = None,
) -> Alignment:
    """Find what moves with the tokens of a block, and prove it.

    Args:
        sample: The block and arguments it was really called with.
        streams: Path of each argument that may be the routed stream, likeliest first -> which of its tokens stem from the latent
            (booleans, the stream's shape without channels); the others stay where they are.
        hint: Argument path -> axis pattern, tried first: a declared pattern or what was proven before.
        search: Whether to search when there is no hint or it fails.
        unread: Paths of outputs that no one uses, such as attention maps; they may come out as they like.
        batch_axes: Path of a stream -> the axis that holds its samples, for a block that mixes along neither axis of it.

    Returns:
        The alignment; ``routable`` is false, with the reason, where no assignment passes.
    """
    leaves = named_leaves(sample.module, sample.args, sample.kwargs, Tensor)
    candidates = [path for path in streams if path in leaves]
    if not candidates:
        return Alignment(False, "no argument carries the denoising stream (a text refiner or context encoder)")
    try:
        subject = Subject.prepare(sample.module, sample.args, sample.kwargs, unread)
    except OUT_OF_MEMORY:  # a RuntimeError too
        raise
    except RuntimeError as error:
        return Alignment(False, str(error))
    shapes = {leaves[path][1].shape for path in candidates}  # an output shaped like the stream may be its continuation, read or not
    subject.read = [i for i, t in enumerate(subject.baseline) if i in subject.read or t.shape in shapes]
    raw = {name: path for name, (path, _) in leaves.items()}
    trial = _Trial(subject, raw, named_leaves(sample.module, sample.args, sample.kwargs, int), batch_axes or {})
    spoiled = {trial.names[subject.paths[i]] for i in subject.overwritten}
    tried = [stream for stream in candidates if spoiled <= {stream}]
    for stream in tried:
        if (found := trial.settle(stream, streams[stream], hint, search)) is not None:
            return found
    if not tried:
        return Alignment(False, _OVERWRITES.format(sorted(spoiled - {candidates[0]})))
    if trial.undecided:
        return Alignment(False, _UNDECIDED.format(trial.undecided), undecided=True)
    if search:
        trial.several = next(filter(None, (trial.moves_several(stream, streams[stream]) for stream in tried)), [])
    tokens = 1 if trial.single and trial.best == float("inf") else 0
    return Alignment(False, trial.verdict(), tokens=tokens, error=trial.best)


_OVERWRITES = (
    "it writes into its arguments {}, which are not the stream that is routed: what bypasses the block would go unwritten, and a second "
    "run in training would write twice; let it work on clones"
)
_UNDECIDED = (
    "it mixes nothing along either axis of its stream {}, nor does another block on that stream, so that tokens cannot be told from "
    "samples: there may be a single token alone, or attention to other tokens only; declare its axes by a BlockPattern"
)
_OTHER_SAMPLE = "an output may have the samples on another axis, and no other first sample, which would tell, runs; plan with other samples"


class _Trial:
    """The search over one block's arguments."""

    def __init__(self, subject: Subject, raw: dict[str, str], numbers: dict[str, tuple[str, Any]], batch_axes: Mapping[str, int]) -> None:
        self.subject = subject
        self.raw = raw
        self.names = {path: name for name, path in raw.items()}
        self.numbers = numbers
        self.batch_axes = batch_axes
        self.mixed: dict[tuple[str, int], bool] = {}
        self.shared: dict[tuple[str, int, int, int | None], bool] = {}
        self.undecided: tuple[int, ...] = ()
        self.best = float("inf")
        self.complaint = ""
        self.several: list[str] = []
        self.single = False

    def verdict(self) -> str:
        if self.several:
            return (
                f"its tokens are a set, but its outputs {self.several} all move with them, and only one can take a bypassed token up again"
            )
        if self.best == float("inf"):
            return f"no set of arguments moves with its tokens ({self.complaint or 'no output has the shape of its stream'})"
        if self.best <= self._tolerance():
            return f"it takes its tokens in any order (error {self.best:.1e}), but not fewer of them: {self.complaint}"
        return (
            f"its tokens are no set: permuting them changes the output by {self.best:.1e} of its spread (tolerance "
            f"{self._tolerance():.0e}); a convolution, a window, or positions counted inside the block"
            + (f" (other arguments moved along: {self.complaint})" if self.complaint else "")
        )

    def _tolerance(self) -> float:
        return max(self.subject.tolerance(t) for t in self.subject.baseline if t.is_floating_point())

    def settle(self, name: str, mark: Tensor, hint: dict[str, str] | None, search: bool) -> Alignment | None:
        index, outputs = self._stream(name)
        patterns = stream_patterns(self.subject.tensors[index])
        for widely, output, pattern in itertools.product((False, True) if search else (False,), outputs, patterns):
            axes = parse_axes(pattern)
            stream = Stream(index, pattern, by_sample(mark, axes.batch))
            if not self._holds_tokens(name, index, outputs, axes.tokens[0], hint):
                continue
            if int(stream.moving.sum(1).max()) < 2:
                self.complaint = "its stream holds a single token that stems from the latent; a proof takes at least two"
                self.single = True
                continue
            if int(stream.moving.sum(1).min()) < 1:
                self.complaint = "the stream of a sample holds no token that stems from the latent"
                continue
            for assignment in self._sets(stream) if widely else self._likely(stream, [output], hint, search):
                error = self._error(assignment, stream, output)
                if error > self._tolerance():
                    continue
                needless = [] if search else self._needless(assignment, stream, output)
                if not needless:
                    return self._proven(name, assignment, stream, output, error)
                self.complaint = f"{needless} need not move with the tokens, so gathering them would throw content away"
                self.best = float("inf")
        return None

    def _stream(self, name: str) -> tuple[int, list[int]]:
        """Return the index of a stream among the tensors, and those of the outputs that may continue it."""
        index = self.subject.paths.index(self.raw[name])
        shape = self.subject.tensors[index].shape
        return index, [i for i in self.subject.read if self.subject.baseline[i].shape == shape]

    def _proven(self, name: str, assignment: dict[str, str], stream: Stream, output: int, error: float) -> Alignment:
        batches = self.subject.batches(stream, output)
        if batches is None:
            return Alignment(False, _OTHER_SAMPLE)
        return Alignment(
            True,
            f"proven, error {error:.0e}",
            stream=name,
            output=self.subject.outputs[output],
            axes={self.names[path]: words for path, words in assignment.items()},
            tokens=stream.tokens,
            error=error,
            counts=self._counts(assignment, stream, output),
            overwrites=stream.index in self.subject.overwritten,
            given=frozenset(self.raw),
            batches={self.subject.outputs[i]: at for i, at in batches.items()},
        )

    def _holds_tokens(self, name: str, index: int, outputs: list[int], axis: int, hint: dict[str, str] | None) -> bool:
        """Tell whether the stream may have its tokens on an axis: any block is equivariant along its batch; tokens are what it mixes."""
        shape = self.subject.tensors[index].shape
        if len(shape) < 3:
            return True
        if hint and name in hint:
            return parse_axes(hint[name]).tokens == (axis,)
        for each in (axis, 1 - axis):
            if (name, each) not in self.mixed:
                self.mixed[name, each] = any(self.subject.mixes(index, output, each) for output in outputs)
            if self.mixed[name, each]:
                return each == axis
        if name not in self.batch_axes:
            self.undecided = tuple(shape)
        return self.batch_axes.get(name, axis) != axis

    def moves_several(self, name: str, mark: Tensor) -> list[str]:
        """Return the outputs that all move with the tokens of a block that could not be routed, if that is what stands in the way."""
        index, outputs = self._stream(name)
        if len(outputs) < 2 or mark.ndim != 2:
            return []
        stream = Stream(index, "b n c", mark)
        for assignment in itertools.chain(self._likely(stream, outputs, None, True), self._sets(stream)):
            try:
                error = self._gap(assignment, stream, outputs)
            except OUT_OF_MEMORY:
                raise
            except Exception:  # as in _error
                continue
            if error <= self._tolerance():
                return [self.subject.outputs[i] for i in outputs]
        return []

    def _counts(self, patterns: dict[str, str], stream: Stream, output: int) -> dict[str, str]:
        """Return the whole numbers among the arguments that have to follow the number of tokens.

        Such a number equals it, and without it the block does not run on fewer; or it takes its tokens for a set with that number alone:
        with one less, a token is treated unlike the others.
        """
        found = {name: "off" for name, (path, _) in self.numbers.items() if path in self.subject.off}
        needed = self._needed(patterns, stream, output) or {}
        kept = self._half(stream)
        for name, (word, path, follows) in self._countable(stream).items():
            if path in needed:
                found[name] = word
                continue
            try:
                one_less = {path: self.numbers[name][1] - 1}
                still_a_set = self._gap(patterns, stream, [output], one_less) <= self._tolerance()
                shape = self.subject.run(patterns, stream, kept, {**needed, path: follows})[output].shape
            except OUT_OF_MEMORY:
                raise
            except Exception:  # a number of heads, say, that happens to equal the number of tokens
                continue
            if not still_a_set and shape == self.subject.run(patterns, stream, kept, needed)[output].shape:
                found[name] = word
        return found

    def _countable(self, stream: Stream) -> dict[str, tuple[str, str, int]]:
        """Return name of each number that may count tokens -> which, its path, and what it is on half of them."""
        total, most = stream.tokens, int(stream.moving.sum(1).max())
        count = self._half(stream).shape[1]
        found = {}
        for name, (path, value) in self.numbers.items():
            if type(value) is int and value in (most, total) and not _COUNTS_OTHERS.search(name):
                word = "m+n" if value == total and most < total else "n"
                found[name] = (word, path, count - (total - most if word == "n" else 0))
        return found

    def _gap(self, patterns: dict[str, str], stream: Stream, outputs: Sequence[int], counts: dict[str, int] | None = None) -> float:
        """Return the error of equivariance; of few tokens, where it is small, the largest on several draws of arguments and weights.

        Attention can be so sharp that a table or a mask counts for nothing, whatever its axes.
        """
        error = self.subject.error(patterns, stream, outputs, counts)
        if error <= self._tolerance() and stream.tokens < FEW_TOKENS:
            error = max([error, *(other.error(patterns, stream, outputs, counts) for other in self.subject.again())])
        return error

    def _error(self, patterns: dict[str, str], stream: Stream, output: int) -> float:
        """Return the error of equivariance, infinite if the block does not run on permuted or on fewer tokens."""
        try:
            error = self._gap(patterns, stream, [output])
            self.best = min(self.best, error)
            if error > self._tolerance():
                return error
            return float("inf") if self._needed(patterns, stream, output) is None else error
        except OUT_OF_MEMORY:
            raise
        except Exception as failure:  # a wrong assignment may break the block in any way
            self.complaint = _told(failure)
            return float("inf")

    def _needless(self, patterns: dict[str, str], stream: Stream, output: int) -> list[str]:
        """Return the arguments without which a declared set passes too: text keys, say, which any permutation leaves alone."""
        own = self.subject.paths[stream.index]
        moved = {path: axes for path, axes in patterns.items() if parse_axes(axes).tokens}
        found = []
        for path in moved.keys() - {own}:
            rest = {other: axes for other, axes in moved.items() if other != path}
            if any(self._error(fewer, stream, output) <= self._tolerance() for fewer in self._completed(rest, stream)):
                found.append(self.names[path])
        return sorted(found)

    def _needed(self, patterns: dict[str, str], stream: Stream, output: int) -> dict[str, int] | None:
        """Return what numbers have to be for the block to run on half its tokens: path -> value; ``None`` if it runs on all alone."""
        kept = self._half(stream)
        shape = list(self.subject.tensors[stream.index].shape)
        shape[parse_axes(stream.pattern).tokens[0]] = kept.shape[1]
        others = [i for i in self.subject.read if i != output]
        countable = [(path, follows) for _, path, follows in self._countable(stream).values()]
        complaint = ""
        for chosen in itertools.chain.from_iterable(itertools.combinations(countable, size) for size in range(len(countable) + 1)):
            numbers = dict(chosen)
            try:
                results = self.subject.run(patterns, stream, kept, numbers)
            except OUT_OF_MEMORY:
                raise
            except Exception as failure:  # a number that stays, say, while the tokens are fewer
                complaint = complaint or _told(failure)
                continue
            if list(results[output].shape) == shape and all(results[i].shape == self.subject.baseline[i].shape for i in others):
                return numbers
            complaint = complaint or f"on {kept.shape[1]} of {stream.tokens} tokens its output has shape {tuple(results[output].shape)}"
        self.complaint = complaint
        return None

    def _half(self, stream: Stream) -> Tensor:
        """Return a choice of tokens, ``b k``: the later half of those that may bypass, and all that stay."""
        staying = ~stream.moving.to(self.subject.tensors[stream.index].device)
        count = kept_count(0.5, stream.tokens, int(staying.sum(1).max()))
        later = torch.arange(stream.tokens, device=staying.device, dtype=torch.float32).expand(staying.shape)
        return keep_tokens(rank_tokens(later, staying), count, in_order=True)

    def _likely(self, stream: Stream, outputs: list[int], hint: dict[str, str] | None, search: bool) -> Iterator[dict[str, str]]:
        """Yield the argument sets to try first: what is declared, the stream alone, and what moves one by one."""
        own = self.subject.paths[stream.index]
        if hint is not None:
            moved = {self.raw[name]: axes for name, axes in hint.items() if name in self.raw and parse_axes(axes).tokens}
            if own in moved:
                yield from self._completed(moved, stream)
        if search:
            yield from self._completed({own: stream.pattern}, stream)
            found = self._one_by_one(stream, outputs)
            if found is not None:
                yield from self._completed(found, stream)

    def _sets(self, stream: Stream) -> Iterator[dict[str, str]]:
        """Yield any argument sets, the smallest first; similar tensors of one container move together, then apart."""
        own = self.subject.paths[stream.index]
        options, groups = self._options(stream)
        apart = [[path] for path in options]
        rounds = [groups] if len(groups) == len(apart) else [groups, apart]
        tried: set[frozenset[tuple[str, str]]] = set()
        for likely in by_likelihood(options):
            sets = itertools.chain.from_iterable(combinations(r, likely) for r in rounds)
            for moved in itertools.islice(sets, MAX_TRIALS):
                if frozenset(moved.items()) not in tried:
                    tried.add(frozenset(moved.items()))
                    yield from self._completed({own: stream.pattern} | moved, stream)

    def _options(self, stream: Stream) -> tuple[dict[str, list[str]], list[list[str]]]:
        """Return the arguments that could move -> how; and those paths by container and shape."""
        samples, ahead, lengths = self._samples(stream), prefix_of(stream.moving), prefix_lengths(self.subject.tensors)
        options, groups = {}, dict[tuple[str, torch.Size], list[str]]()
        for path, t in zip(self.subject.paths, self.subject.tensors, strict=True):
            found = options_of(t, stream.tokens, samples, stream.batch, lengths, ahead)
            if found and path != self.subject.paths[stream.index]:
                options[path] = found
                groups.setdefault((path.rpartition(".")[0] if path.count(".") > 1 else path, t.shape), []).append(path)
        return options, list(groups.values())

    def _one_by_one(self, stream: Stream, outputs: list[int]) -> dict[str, str] | None:
        """Return the arguments that move, each told by itself while the others are the same for every token.

        So the trials add up, where those of whole sets multiply. What shows beside another argument alone is left to those.
        """
        moved = {self.subject.paths[stream.index]: stream.pattern}
        options, groups = self._options(stream)
        shapes = dict(zip(self.subject.paths, (t.shape for t in self.subject.tensors), strict=True))
        # First what is shaped like the stream, whose batch axis is then known where a table makes a block run sample by sample.
        groups.sort(key=lambda group: shapes[group[0]] != self.subject.tensors[stream.index].shape)
        axes = {path: {axis for words in found for axis in parse_axes(words).tokens} for path, found in options.items()}
        draws = [self.subject, *(self.subject.again() if stream.tokens < FEW_TOKENS else ())]  # see `_gap`
        for group in groups:
            levels = [level for level in (draw.leveled(axes, but=group) for draw in draws) if level is not None]
            ways = dict.fromkeys(words for likely in by_likelihood(options) for words in likely[group[0]])
            sets = [moved, *(moved | dict.fromkeys(group, words) for words in ways)]
            found = next((each for each in sets if all(self._moves(level, stream, outputs, each) for level in levels)), None)
            if found is None or not levels:
                return None
            moved = found
        return moved if len(moved) > 1 else None

    def _moves(self, level: Subject, stream: Stream, outputs: list[int], moved: dict[str, str]) -> bool:
        for patterns in self._completed(moved, stream):
            try:
                if level.error(patterns, stream, outputs) <= self._tolerance():
                    return True
            except OUT_OF_MEMORY:
                raise
            except Exception:  # as in _error
                continue
        return False

    def _samples(self, stream: Stream) -> int | None:
        return None if stream.batch is None else self.subject.tensors[stream.index].shape[stream.batch]

    def _completed(self, moved: dict[str, str], stream: Stream) -> Iterator[dict[str, str]]:
        batch, samples = stream.batch, self._samples(stream)

        def shares(path: str, axis: int) -> bool:
            key = (path, axis, stream.index, batch)
            if key not in self.shared:
                self.shared[key] = self.subject.shares(self.subject.paths.index(path), axis, stream.index, batch or 0)
            return self.shared[key]

        tensors = dict(zip(self.subject.paths, self.subject.tensors, strict=True))
        first = complete(moved, tensors, samples, batch, shares)
        yield first
        if batch:  # where two axes are as long as the batch, the rest may have theirs in front, unlike the stream
            other = complete(moved, tensors, samples, 0, shares)
            if other != first:
                yield other


def _told(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
