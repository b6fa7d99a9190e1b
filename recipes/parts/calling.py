"""How a diffusers pipeline calls its transformer: read off one sampling run, checked, and kept for training.

A training step has to hand the transformer what the pipeline will hand it when sampling: the same arguments, latents in the same layout and
scale, timesteps in the same unit. Pipelines differ in all of these. Instead of a branch for each, one run is watched, and what training
assumes is compared with what the run did; a pipeline that does otherwise is refused by name.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from torch import Tensor

import diffcr_surgery as dcs

__all__ = ["Calling", "UnsupportedPipeline", "encode_captions", "read_calling"]

STREAM, TIMESTEP = "hidden_states", "timestep"
LAYOUTS = (None, "b c (h p) (w q) -> b (h w) (c p q)", "b c (h p) (w q) -> b (h w) (p q c)")  # as the VAE gives it, or packed in 2 x 2


class UnsupportedPipeline(ValueError):
    """The pipeline does something between VAE, transformer and scheduler that training would not do."""


@dataclass(frozen=True)
class Calling:
    """What a training step has to know of a pipeline.

    Attributes:
        inputs: All arguments of one call, two captions.
        conditions: Names of the arguments with one row a caption.
        constants: The arguments that are equal for all captions.
        timestep_scale: The transformer's timestep over the scheduler's.
        timesteps: Those of one sampling run, in the transformer's unit.
        layout: How latents `b c h w` are packed for the transformer, as einops says it; `None` if they are not.
        shift: Subtracted from the VAE's latents.
        scale: They are then multiplied by it.
    """

    inputs: dict[str, Any]
    conditions: tuple[str, ...]
    constants: dict[str, Any]
    timestep_scale: float
    timesteps: tuple[float, ...]
    layout: str | None
    shift: float
    scale: float

    def to_stream(self, latents: Tensor) -> Tensor:
        """Return the VAE's latents `b c h w` as the transformer is given them."""
        scaled = (latents - self.shift) * self.scale
        return scaled if self.layout is None else rearrange(scaled, self.layout, p=2, q=2)

    def visits(self, regions: int, highest: float) -> tuple[float, ...]:
        """Return how many of a sampling run's timesteps lie in each of the equal parts of [0, highest], cleanest first."""
        counts = [0.0] * regions
        for timestep in self.timesteps:
            counts[min(int(regions * timestep / highest), regions - 1)] += 1.0
        return tuple(counts)


class Step(NamedTuple):
    """What a scheduler was given, and what it gave."""

    output: Tensor
    timestep: float
    sample: Tensor
    result: Tensor


def read_calling(pipe: DiffusionPipeline, *, steps: int, **call: Any) -> Calling:
    """Run a pipeline once and read off how it calls its transformer.

    Args:
        pipe: A text-to-image pipeline whose transformer is not converted.
        steps: Denoising steps of the sampling this is for.
        call: Other arguments of the pipeline: height, width, guidance.

    Raises:
        UnsupportedPipeline: If training could not do as the pipeline does; the text says where they part.
    """
    outputs: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0].detach()))
    try:
        with dcs.capture_inputs(pipe.transformer) as seen, _noted(pipe.scheduler, "step") as taken, _noted(pipe.vae, "decode") as decoded:
            pipe(prompt=["a photograph", "a drawing"], num_inference_steps=steps, output_type="pt", **call)
    finally:
        handle.remove()
    name, calls = type(pipe).__name__, seen.calls
    for argument in (STREAM, TIMESTEP):
        if not isinstance(seen.inputs.get(argument), Tensor):
            raise UnsupportedPipeline(f"{name}: {type(pipe.transformer).__name__} has no tensor `{argument}`, but {sorted(seen.inputs)}")
    if not len(calls) == len(taken) == len(outputs):
        raise UnsupportedPipeline(
            f"{name} calls its transformer {len(calls)} times in {len(taken)} steps of its scheduler; expected once each"
        )
    noted = [Step(args["model_output"], float(args["timestep"]), args["sample"], result[0]) for args, result in taken]
    for inputs, output, step in zip(calls, outputs, noted, strict=True):
        _same(name, "the latents of its scheduler", step.sample, "its transformer's `hidden_states`", inputs[STREAM])
        channels = step.output.shape[1]
        _same(name, "the output of its transformer", output[:, :channels], "what it hands its scheduler", step.output)
    ours = [float(inputs[TIMESTEP].flatten()[0]) for inputs in calls]
    scale = ours[0] / noted[0].timestep
    if not all(abs(mine - scale * step.timestep) <= 1e-2 * abs(ours[0]) for mine, step in zip(ours, noted, strict=True)):
        raise UnsupportedPipeline(
            f"{name} gives its transformer timesteps {ours} for {[step.timestep for step in noted]} of its scheduler: no multiple"
        )
    conditions, constants = _split(name, seen.inputs, encode_captions(pipe, ["a photograph"], **call))
    layout, shift, factor = _latents(name, pipe, noted[-1].result, decoded[0][0]["z"])
    return Calling(seen.inputs, conditions, constants, scale, tuple(ours), layout, shift, factor)


def encode_captions(pipe: DiffusionPipeline, captions: Sequence[str], **call: Any) -> dict[str, Any]:
    """Return what a pipeline hands its transformer for these captions; the transformer itself is not run."""

    class Reached(Exception):
        """The pipeline has come to its transformer."""

    def stop(module: torch.nn.Module, args: Any) -> None:
        raise Reached

    with dcs.capture_inputs(pipe.transformer) as seen:
        handle = pipe.transformer.register_forward_pre_hook(stop)
        try:
            pipe(prompt=list(captions), num_inference_steps=1, output_type="latent", **call)
        except Reached:
            pass
        finally:
            handle.remove()
    return seen.inputs


def supported_arguments(pipe: DiffusionPipeline, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that a pipeline's call has."""
    known = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in wanted.items() if name in known}


@contextmanager
def _noted(owner: Any, method: str) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Note the arguments and the result of every call of an object's method."""
    original, notes = getattr(owner, method), []
    signature = inspect.signature(original)

    @functools.wraps(original)
    def noting(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        notes.append((signature.bind(*args, **kwargs).arguments, result))
        return result

    setattr(owner, method, noting)
    try:
        yield notes
    finally:
        delattr(owner, method)


def _same(pipeline: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.shape != b.shape or not torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2 * float(b.float().std())):
        raise UnsupportedPipeline(f"{pipeline}: {first} {tuple(a.shape)} and {second} {tuple(b.shape)} are not the same")


def _split(pipeline: str, two: dict[str, Any], one: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Tell the arguments with a row for each caption from those that are the same for all."""
    rest = {name: value for name, value in two.items() if name not in (STREAM, TIMESTEP)}
    rows = [n for n, v in rest.items() if isinstance(v, Tensor) and v.ndim and (len(v), len(one[n])) == (2, 1)]
    constants = {name: value for name, value in rest.items() if name not in rows}
    for name, value in constants.items():
        if isinstance(value, (list, tuple, dict)) and any(
            isinstance(part, (Tensor, list)) for part in getattr(value, "values", lambda v=value: v)()
        ):
            raise UnsupportedPipeline(f"{pipeline} hands tensors to its transformer inside `{name}`; expected one tensor a condition")
    return tuple(rows), constants


def _latents(pipeline: str, pipe: DiffusionPipeline, stream: Tensor, decoded: Tensor) -> tuple[str | None, float, float]:
    """Find how latents as the VAE has them become the transformer's stream."""
    config = pipe.vae.config
    scale, shift = getattr(config, "scaling_factor", None), getattr(config, "shift_factor", None) or 0.0
    if scale is not None and decoded.ndim == 4:
        for layout in LAYOUTS:
            found = Calling({}, (), {}, 1.0, (), layout, shift, scale)
            if layout is not None and any(size % 2 for size in decoded.shape[2:]):
                continue
            packed = found.to_stream(decoded.float())
            if packed.shape == stream.shape and torch.allclose(packed, stream.float(), rtol=1e-2, atol=1e-2 * float(stream.float().std())):
                return layout, shift, scale
    raise UnsupportedPipeline(
        f"{pipeline}: what its VAE decodes {tuple(decoded.shape)} is not the stream {tuple(stream.shape)}, scaled by {scale} and shifted "
        f"by {shift}, plain or packed in 2 x 2"
    )
