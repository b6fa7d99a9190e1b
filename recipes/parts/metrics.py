"""What images are judged by: FID and KID over any feature network, and CLIP score.

Images are `b c h w` in [0, 1] throughout, c 1 or 3.

How many are needed. FID is biased: the fewer the images, the larger it is, and a covariance of f features has no full rank below f images.
Its published values use 30,000 to 50,000 with Inception's 2048 features; below 10,000 they compare with nothing, and only arms of the same
number of images, features and real images compare with each other. Published values also come from Inception weights of their own, not
torchvision's. KID has no such bias, only more noise, and its spread over subsets comes
with it: below a few thousand images, go by KID.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms import v2
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

__all__ = ["ClipScore", "Distances", "SmallClassifier", "distances", "feature_network", "features_of", "train_classifier"]

CLIP_MEAN, CLIP_STD = timm.data.constants.OPENAI_CLIP_MEAN, timm.data.constants.OPENAI_CLIP_STD
KID_SUBSETS, KID_SUBSET = 100, 1000


class Prepared(nn.Module):
    """A network behind the resizing and normalising it was trained with.

    Args:
        network: Takes `b 3 s s`, gives `b f`.
        size: s.
        mean: Of each channel.
        std: Of each channel.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network, self.size = network, [size, size]
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return the features `b f` of images."""
        resized = v2.functional.resize(images, self.size, v2.InterpolationMode.BICUBIC, antialias=True)
        return self.network((resized.expand(-1, 3, -1, -1) - self.mean) / self.std)


class ImageEmbedding(nn.Module):
    """The image half of CLIP, as a network that gives one tensor."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.clip = CLIPVisionModelWithProjection.from_pretrained(folder)

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings `b f` of images."""
        return self.clip(images).image_embeds


class SmallClassifier(nn.Module):
    """Three convolutions and a layer of features: reads digits, and knows small images well enough to be a yardstick for samples.

    Larger images are shrunk to 16 x 16, where it sees what they are of and nothing of their detail.
    """

    def __init__(self, channels: int, classes: int, width: int = 32, features: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * width, features),
            nn.LayerNorm(features, elementwise_affine=False),  # KID's kernel takes features of the size of 1
        )
        self.head = nn.Sequential(nn.GELU(), nn.Linear(features, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features `b f` of images."""
        return self.body(functional.adaptive_avg_pool2d(images, 16) if images.shape[-1] > 16 else images)

    def recognised(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return for each image whether it is taken for its class, `b`."""
        return self.head(self(images)).argmax(dim=1) == labels


def train_classifier(images: Tensor, labels: Tensor, *, seed: int = 0, steps: int = 300) -> SmallClassifier:
    """Train a small classifier on real images; equal seeds give equal classifiers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SmallClassifier(images.shape[1], int(labels.max()) + 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(images), (64,), generator=generator)
            functional.cross_entropy(classifier.head(classifier(images[rows])), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return classifier.eval().requires_grad_(False)


def feature_network(spec: str) -> nn.Module:
    """Load a network whose features images are compared by.

    Args:
        spec: `inception:PATH` (torchvision's Inception v3, a file of its weights), `clip:DIR` (a folder of transformers' CLIP) or
            `timm:NAME[:PATH]` (any model of timm; without a file, its pretrained weights).

    Returns:
        A module in `eval()` that takes images and gives features `b f`.

    Raises:
        ValueError: If the network is none of these, or its file is missing.
    """
    kind, _, rest = spec.partition(":")
    if kind == "inception" and Path(rest).is_file():
        network = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)
        network.load_state_dict({name: tensor for name, tensor in _weights(rest).items() if not name.startswith("AuxLogits.")})
        network.fc = nn.Identity()
        prepared = Prepared(network, 299, [0.5] * 3, [0.5] * 3)  # its weights were trained in TensorFlow, on [-1, 1]
    elif kind == "clip" and Path(rest).is_dir():
        embedding = ImageEmbedding(rest)
        prepared = Prepared(embedding, embedding.clip.config.image_size, CLIP_MEAN, CLIP_STD)
    elif kind == "timm" and rest:
        name, _, path = rest.partition(":")
        network = timm.create_model(name, pretrained=not path, num_classes=0, checkpoint_path=path)
        config = timm.data.resolve_model_data_config(network)
        prepared = Prepared(network, config["input_size"][-1], config["mean"], config["std"])
    else:
        raise ValueError(f"{spec!r}: expected inception:PATH, clip:DIR or timm:NAME[:PATH], with a file or folder that is there")
    return prepared.eval().requires_grad_(False)


def _weights(path: str) -> dict[str, Tensor]:
    return load_file(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)


@torch.no_grad()
def features_of(network: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return the features `n f` of images that come in batches, on the CPU."""
    return torch.cat([network(batch).float().cpu() for batch in batches])


@dataclass(frozen=True)
class Distances:
    """How far generated images are from real ones.

    Attributes:
        fid: Fréchet distance.
        kid: Kernel distance (polynomial of degree 3), the mean over subsets.
        kid_std: Its standard deviation over subsets.
        kid_subset: Images in a subset: 1000, or half of the images if they are fewer than 2000.
    """

    fid: float
    kid: float
    kid_std: float
    kid_subset: int


def distances(real: Tensor, generated: Tensor, *, seed: int = 0) -> Distances:
    """Return the distances between two sets of features, `n f` and `m f`.

    Args:
        real: Features of real images.
        generated: Features of generated ones.
        seed: Of the subsets.

    Raises:
        ValueError: If either set has fewer than four images.
    """
    fewest = min(len(real), len(generated))
    if fewest < 4:
        raise ValueError(f"{len(real)} real and {len(generated)} generated images; expected at least 4 of each")
    subset = min(KID_SUBSET, fewest // 2)
    given = nn.Identity()  # the features are there already, and one pass serves both distances
    given.num_features = real.shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
        torch.manual_seed(seed)
        metrics: list[Any] = [FrechetInceptionDistance(given), KernelInceptionDistance(given, subsets=KID_SUBSETS, subset_size=subset)]
        for metric in metrics:
            metric.update(real.double(), real=True)
            metric.update(generated.double(), real=False)
        fid, (kid, spread) = (metric.compute() for metric in metrics)
    return Distances(float(fid), float(kid), float(spread), subset)


class ClipScore:
    """100 · cos of CLIP's embeddings of image and caption, at least 0 (arXiv 2104.08718, without its factor of 2.5).

    Args:
        folder: Of transformers' CLIP, with its tokenizer.
        device: Where it runs.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._clip = CLIPModel.from_pretrained(folder).eval().requires_grad_(False).to(device)
        vision, text = self._clip.config.vision_config, self._clip.config.text_config
        self._prepare = Prepared(nn.Identity(), vision.image_size, CLIP_MEAN, CLIP_STD).to(device)
        self._longest = text.max_position_embeddings

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the score of each image with its caption, `b`."""
        words = self._tokenizer(list(captions), padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        found = self._clip(**words.to(images.device), pixel_values=self._prepare(images))
        return 100 * functional.cosine_similarity(found.image_embeds, found.text_embeds).clamp_min(0)
