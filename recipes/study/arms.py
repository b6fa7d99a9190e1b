"""What is compared: each arm is a conversion of one dense model and a way to train it, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import diffcr_surgery as dcs
from study.tasks import TASKS, TIMESTEPS

__all__ = ["ARMS", "BINS", "SEEDS", "TARGETS", "VARIANT_TARGET", "Arm", "Experiment", "chosen"]

SEEDS = (11, 12, 13)  # the library's defaults were found on others
TARGETS = (0.2, 0.3, 0.5)
VARIANT_TARGET = 0.3  # at which single settings are compared
BINS = tuple(i / 20 for i in range(21))  # of every learned arm: in steps of 0.1 six layers could not be brought to equal FLOPs


@dataclass(frozen=True)
class Arm:
    """A way to spend less.

    Attributes:
        title: Its row in the tables.
        kind: What bypasses blocks: nothing, all tokens the last ones, random tokens, merged ones, or those a router chooses.
        trained: Whether it is fine-tuned, as long as the dense model; if not, it is made of the fine-tuned dense model.
        settings: Of the conversion, besides target and timestep range; of `TokenMerging`, if tokens are merged.
        rule: What moves the ratio table: nothing; `RatioOptimizer`, by the gradient as it is or relative to the loss of its part of the
            timestep range; or the budget term in the loss and Adam, as in the paper.
        options: Of `RatioOptimizer`, where they are not the library's defaults.
        distill_weight: Weight of the squared distance to the dense model's prediction, added to the loss.
        targets: Compression ratios it is trained for.
        against: Arm that it is with one thing changed, and is compared with; an arm without one stands in the main tables.
    """

    title: str
    kind: Literal["dense", "shallow", "random", "merging", "routed"] = "routed"
    trained: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    rule: Literal["fixed", "own", "relative", "paper"] = "own"
    options: Mapping[str, Any] = field(default_factory=dict)
    distill_weight: float = 0.0
    targets: tuple[float, ...] = TARGETS
    against: str | None = None

    def config(self, target: float) -> dcs.DiffCRConfig:
        """Return the settings of the conversion for a target: a saving of FLOPs as great as the ratio everywhere would be."""
        if self.rule == "fixed":
            # A ratio that stays runs once whatever `branches` says; it is named so that records outlive a change of its default.
            settings: dict[str, Any] = {"initial_ratio": target, "learn_ratios": False, "branches": "two"}
        else:
            settings = {"timestep_range": (0, TIMESTEPS), "bins": BINS, "branches": "boundary"}
        return dcs.DiffCRConfig(**{"target_ratio": target, "cost": "flops", **settings, **self.settings})


LT = {"timestep_regions": 4}
SKIPS = {"skips": True}


def _changed(title: str, **changes: Any) -> Arm:
    """Return DiffCR-LT with 4 regions, unless said otherwise, with something changed."""
    return Arm(title, **{"settings": LT, "targets": (VARIANT_TARGET,), "against": "regions-4", **changes})


ARMS = {
    "dense": Arm("dense", "dense", targets=(0.0,)),
    "random-free": Arm("random tokens, training-free", "random", trained=False),
    "merging-free": Arm("Token Merging, training-free", "merging", trained=False, settings=SKIPS),
    "random": Arm("random tokens", "random"),
    "merging": Arm("Token Merging", "merging", settings=SKIPS),
    "shallow": Arm("last blocks left out", "shallow"),
    "uniform": Arm("uniform (Mixture-of-Depths)", rule="fixed"),
    "uniform-ramped": Arm("uniform, ramped in as learned ratios are", options={"lr": 0.0}),
    "layers": Arm("DiffCR-L"),
    "regions-4": Arm("DiffCR-LT, 4 regions", settings=LT),
    "regions-10": Arm("DiffCR-LT, 10 regions", settings={"timestep_regions": 10}),
    "relative": Arm("DiffCR-LT, 4 regions, relative gradients", settings=LT, rule="relative", targets=(0.3, 0.5)),
    "two": _changed("two branches", settings=LT | {"branches": "two"}),
    "layers-two": _changed("two branches", settings={"branches": "two"}, against="layers"),
    "unsettled": _changed("table moves to the end", options={"settle": 0.0, "ramp": 0.4}),
    "straight-through": _changed("gate: straight-through", settings=LT | {"gate": "straight_through"}),
    "sigmoid": _changed("gate: sigmoid (the paper's)", settings=LT | {"gate": "sigmoid"}),
    "budget-0.3": _changed("the paper's rule, λ = 0.3", rule="paper", against="unsettled"),  # whose table moves to the end, too
    "budget-10": _changed("the paper's rule, λ = 10", rule="paper", settings=LT | {"ratio_loss_weight": 10.0}, against="unsettled"),
    "tokens": _changed("budget in tokens", settings=LT | {"cost": "tokens"}),
    "distilled": _changed("distillation from the dense model, weight 1", distill_weight=1.0),
}


@dataclass(frozen=True)
class Experiment:
    """An arm on a task, for a target, with a seed."""

    task: str
    arm: str
    target: float
    seed: int

    def __str__(self) -> str:
        return f"{self.task}/{self.arm}/{self.target:g}/{self.seed}"


def chosen(patterns: Sequence[str], seeds: Sequence[int]) -> list[Experiment]:
    """Return the experiments that match one of some shell patterns, seed by seed.

    Example:
        >>> [str(experiment) for experiment in chosen(["digits/uniform/*"], [11])]
        ['digits/uniform/0.2/11', 'digits/uniform/0.3/11', 'digits/uniform/0.5/11']
    """
    every = [
        Experiment(task, name, target, seed) for seed in seeds for name, arm in ARMS.items() for target in arm.targets for task in TASKS
    ]
    return [experiment for experiment in every if any(fnmatchcase(str(experiment), pattern) for pattern in patterns)]
