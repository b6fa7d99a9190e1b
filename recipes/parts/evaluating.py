"""Arms of an evaluation: a dense denoiser, what training and baselines made of it, how each samples, and what each costs.

A subject is what an evaluation needs to know of a model: :class:`Pipeline` of a text-to-image or class-conditional pipeline of diffusers,
:class:`Demo` of the finished demo. All arms are modules of their own that share the dense one's weights where they can, so that they fit in
memory together and are timed in turns.
"""

import copy
import functools
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from baselines import random_tokens, token_merging
from baselines.random_tokens import STREAM
from datasets import load_dataset
from diffusers import DiffusionPipeline
from einops import rearrange
from parts.caching import read_image
from parts.calling import supported_arguments
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import diffcr_surgery as dcs
from diffcr_surgery.bench.hooks import stream_of
from diffcr_surgery.bench.measure import peak_bytes, seconds_in_turns
from diffcr_surgery.demo.data import load_splits
from diffcr_surgery.demo.diffusion import sample
from diffcr_surgery.demo.run import new_denoiser
from diffcr_surgery.flops import count_flops
from diffcr_surgery.plan import BlockSite
from diffcr_surgery.tokens import kept_count

__all__ = ["BASELINES", "Arm", "Cost", "Demo", "Pipeline", "Subject", "baseline", "costs", "twin"]

BASELINES = ("dense", "token_merging", "random")
DEMO_WEIGHTS = {"adapter": "denoiser.safetensors", "uniform": "uniform.safetensors"}
LORA, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


@dataclass(frozen=True)
class Arm:
    """A denoiser ready to sample.

    Attributes:
        name: Its row in the table.
        model: It.
        ratio: Mean compression ratio of its routed blocks, as executed.
    """

    name: str
    model: nn.Module
    ratio: float


class Subject(Protocol):
    """What is evaluated.

    Attributes:
        dense: The denoiser as it was before DiffCR.
        labels: Class of each real image, `n`.
    """

    dense: nn.Module
    labels: Tensor

    def real(self, batch: int) -> Iterator[Tensor]:
        """Return the real images in batches, `b c h w` in [0, 1]."""

    def sample(self, model: nn.Module, which: Sequence[int]) -> Tensor:
        """Draw some of the samples, `b c h w` in [0, 1]: the same conditions and the same noise for every model."""

    def wanted(self, which: Sequence[int]) -> tuple[list[str], Tensor]:
        """Return captions and classes of some of the samples."""

    def arm(self, name: str, folder: Path, inputs: dict[str, Any], budget: float | None) -> Arm:
        """Load what training left in a folder."""


def twin(dense: nn.Module) -> nn.Module:
    """Return a copy with modules of its own and the same tensors as weights and buffers."""
    return copy.deepcopy(dense, {id(tensor): tensor for tensor in itertools.chain(dense.parameters(), dense.buffers())})


def _is_plain(site: BlockSite, tokens: int) -> bool:
    """Tell whether a block is given nothing that baselines do not know: one stream of so many tokens, all of which may bypass."""
    numbers = [axes for axes in site.aligned.values() if axes == "off" or axes.startswith("#")]  # their number, or a flag
    stream, _ = stream_of(site)
    return not site.staying and not numbers and site.aligned[stream] == STREAM and site.tokens == tokens


def baseline(name: str, dense: nn.Module, plan: dcs.SurgeryPlan, ratio: float, seed: int) -> Arm:
    """Return an arm that takes no training.

    Raises:
        ValueError: If the ratio is more than the baseline can do, or a block is given what it knows nothing of.
    """
    if name == "dense":
        return Arm(name, dense, 0.0)
    odd = next((site.path for site in plan.routed_sites if not _is_plain(site, plan.routed_sites[0].tokens)), None)
    if odd is not None:
        raise ValueError(
            f"--baseline {name}: {odd} is given tokens that never bypass, a number that counts tokens, or a stream that is not `b n c` of "
            f"the first block's length; baselines know only streams that bypass whole. Leave {name} out."
        )
    model = twin(dense)
    if name == "random":
        random_tokens.attach(model, plan, ratio, seed, shared=True)
    else:
        token_merging.attach(model, plan, ratio, skips=True)
    ratios = [1 - kept_count(ratio, site.tokens) / site.tokens for site in plan.routed_sites]
    return Arm(f"{name} {ratio:g}", model, statistics.fmean(ratios))


def _specialised(name: str, model: nn.Module, folder: Path, inputs: dict[str, Any], budget: float | None) -> Arm:
    """Return an arm of routers and ratios on a model with the weights they belong to."""
    dcs.specialize_(dcs.load_adapter_(model, folder, inputs), budget)
    return Arm(name, model, model.diffcr.achieved.ratio)


def _merge_lora(model: nn.Module) -> None:
    """Add LoRA to the weights it belongs to, so that it costs an arm nothing; the dense model, which shares the others, keeps its own."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone())
            layer.merge()


class Pipeline:
    """A pipeline of diffusers, with images to compare its own with.

    Args:
        pipe: Text-to-image, or class-conditional such as DiTPipeline. Its transformer is called once a step.
        data: Folder of images in the form of Hugging Face's imagefolder: with a metadata file that has a `text` for each, or with a folder
            for each class.
        count: How many samples there will be; they take the data's conditions, evenly spread.
        call: Arguments of the pipeline besides the condition and the noise.
        seed: Of the noise; sample i has noise of its own.
    """

    def __init__(self, pipe: DiffusionPipeline, data: Path, count: int, call: dict[str, Any], seed: int) -> None:
        self.pipe, self.dense, self._seed = pipe, pipe.transformer, seed
        self._call = supported_arguments(pipe, call | {"use_resolution_binning": False, "clean_caption": False, "output_type": "np"})
        self._rows = load_dataset("imagefolder", data_dir=str(data), split="train")
        self._by_class = not supported_arguments(pipe, {"prompt": ""})
        column = "label" if self._by_class else "text"
        if column not in self._rows.column_names:
            needed = "a folder for each class" if self._by_class else "a metadata.jsonl with a `text` for each image"
            raise ValueError(f"{data} has the columns {self._rows.column_names}, not {column!r}; {type(pipe).__name__} needs {needed}")
        folders = self._rows.features["label"].names if self._by_class else []
        self._captions = [folders[label] for label in self._rows["label"]] if self._by_class else list(self._rows["text"])
        numbers = {caption: number for number, caption in enumerate(sorted(set(self._captions)))}
        self.labels = torch.tensor([numbers[caption] for caption in self._captions])
        self._condition = [row * len(self._captions) // count for row in range(count)]
        self.size = self.sample(self.dense, [0]).shape[-1]

    def real(self, batch: int) -> Iterator[Tensor]:
        """Return the real images in batches, `b 3 s s` in [0, 1]."""
        rows = self._rows.cast_column("image", type(self._rows.features["image"])(decode=False))
        for start in range(0, len(rows), batch):
            images = [read_image(image, self.size) for image in rows[start : start + batch]["image"]]
            yield (torch.stack(images) + 1) / 2

    def wanted(self, which: Sequence[int]) -> tuple[list[str], Tensor]:
        """Return captions and classes of some of the samples."""
        rows = [self._condition[index] for index in which]
        return [self._captions[row] for row in rows], self.labels[rows]

    def sample(self, model: nn.Module, which: Sequence[int]) -> Tensor:
        """Draw some of the samples, `b 3 h w` in [0, 1]."""
        captions, _ = self.wanted(which)
        self.pipe.transformer = model
        noise = [torch.Generator().manual_seed(self._seed + index) for index in which]
        torch.manual_seed(self._seed + which[0])  # of a scheduler that adds noise by itself
        condition = {"class_labels": [self._class_id(name) for name in captions]} if self._by_class else {"prompt": captions}
        images = self.pipe(**condition, generator=noise, **self._call).images
        return rearrange(torch.from_numpy(images).float(), "b h w c -> b c h w").to(model.device)

    def _class_id(self, name: str) -> int:
        """Return the model's number for the folder of a class: its name is that number, or one of the pipeline's labels."""
        return int(name) if name.isdecimal() else self.pipe.get_label_ids([name])[0]

    def arm(self, name: str, folder: Path, inputs: dict[str, Any], budget: float | None) -> Arm:
        """Load what training left in a folder: routers and ratios, LoRA or all weights, or several of them.

        Raises:
            ValueError: If there is nothing of the kind.
        """
        files = [path for path in ("transformer", LORA, PEFT, "diffcr.json") if (folder / path).exists()]
        if not files:
            raise ValueError(f"{folder} holds neither diffcr.json nor {LORA}, {PEFT} or a folder transformer: no trained arm")
        if "transformer" in files:
            loaded = type(self.dense).from_pretrained(folder / "transformer", torch_dtype=self.dense.dtype)
            model = loaded.to(self.dense.device)
        else:
            model = twin(self.dense)
        if LORA in files:
            self._load_lora(model, folder)
        if PEFT in files:
            PeftModel.from_pretrained(model, folder)  # puts LoRA into the model, in place
        _merge_lora(model)
        model.eval().requires_grad_(False)
        return _specialised(name, model, folder, inputs, budget) if "diffcr.json" in files else Arm(name, model, 0.0)

    def _load_lora(self, model: nn.Module, folder: Path) -> None:
        """Load LoRA as the pipeline's class saves it, or as the transformer by itself does."""
        with safe_open(folder / LORA, "pt") as file:
            of_pipeline = any(name.startswith("transformer.") for name in file.keys())
        self.pipe.transformer = model
        if of_pipeline and hasattr(self.pipe, "load_lora_weights"):
            self.pipe.load_lora_weights(folder, weight_name=LORA)
        elif hasattr(model, "load_lora_adapter"):
            model.load_lora_adapter(folder, weight_name=LORA, prefix="transformer" if of_pipeline else None)
        else:
            raise ValueError(f"{folder / LORA}: diffusers loads no LoRA into a {type(model).__name__}; save it with peft's save_pretrained")


class Demo:
    """The finished demo: a folder that `python -m diffcr_surgery demo` wrote.

    Args:
        folder: The demo's.
        split_seed: The demo's seed, which decided which digits it trained on.
        count: How many samples there will be, of all classes in turn.
        steps: Denoising steps of a sample.
        guidance: Strength of classifier-free guidance.
        seed: Of the noise.
    """

    def __init__(self, folder: Path, split_seed: int, count: int, steps: int, guidance: float, seed: int) -> None:
        training, _ = load_splits(split_seed)
        self.dense, self._training, self._seed = new_denoiser().eval(), training, seed
        self.dense.load_state_dict(load_file(folder / "dense.safetensors"))
        self.labels = training.labels
        self._settings = {"steps": steps, "guidance": guidance}
        self._classes = torch.arange(count) % 10

    def real(self, batch: int) -> Iterator[Tensor]:
        """Return the digits the demo was trained on in batches, `b 1 8 8` in [0, 1]."""
        yield from ((images + 1) / 2 for images in self._training.images.split(batch))

    def wanted(self, which: Sequence[int]) -> tuple[list[str], Tensor]:
        """Return classes of some of the samples, in words and as numbers."""
        return [str(int(label)) for label in self._classes[which]], self._classes[which]

    def sample(self, model: nn.Module, which: Sequence[int]) -> Tensor:
        """Draw some of the samples, `b 1 8 8` in [0, 1]."""
        return (sample(model, self._classes[which], seed=self._seed + which[0], **self._settings) + 1) / 2

    def arm(self, name: str, folder: Path, inputs: dict[str, Any], budget: float | None) -> Arm:
        """Load `adapter` or `uniform` of the demo, with the weights beside it."""
        model = new_denoiser()
        model.load_state_dict(load_file(folder.parent / DEMO_WEIGHTS[folder.name]))
        return _specialised(name, model.eval(), folder, inputs, budget)


@dataclass(frozen=True)
class Cost:
    """What a call of the denoiser takes, averaged over the steps of the sampler.

    Attributes:
        flops: Floating-point operations, as executed.
        latency_ms: The median of the rounds at each step.
        peak_mib: Memory beyond the weights, of the step that takes most.
    """

    flops: float
    latency_ms: float
    peak_mib: float


@torch.no_grad()
def costs(arms: Sequence[Arm], calls: Sequence[dict[str, Any]], rounds: int) -> list[Cost]:
    """Measure arms on the calls of one sampling run, in turns.

    Args:
        arms: What is measured.
        calls: Arguments of each step's call.
        rounds: How often each call of each arm is timed.
    """
    cuda = next(arms[0].model.parameters()).is_cuda
    in_turns = [lambda model=arm.model, call=call: model(**call) for call in calls for arm in arms]
    medians = [1e3 * statistics.median(column) for column in seconds_in_turns(in_turns, rounds, cuda)]

    def all_steps(model: nn.Module) -> None:
        for call in calls:
            model(**call)

    return [
        Cost(
            flops=count_flops(functools.partial(all_steps, arm.model)) / len(calls),
            latency_ms=statistics.fmean(medians[index :: len(arms)]),
            peak_mib=peak_bytes(functools.partial(all_steps, arm.model), cuda) / 2**20,
        )
        for index, arm in enumerate(arms)
    ]
