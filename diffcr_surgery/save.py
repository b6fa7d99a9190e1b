"""Adapters: routers, ratio table and settings in a folder of kilobytes, as safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from diffcr_surgery._shards import by_first, is_sharded, whole
from diffcr_surgery.atomic import sync
from diffcr_surgery.config import DiffCRConfig, shown
from diffcr_surgery.errors import AdapterError, ConfigError, ConversionError
from diffcr_surgery.plan import SurgeryPlan, plan_blocks
from diffcr_surgery.runtime.convert import convert_, restore_, state_of

__all__ = ["load_adapter_", "save_adapter"]

ADAPTER_VERSION = 2  # 1 had no costs of the sites
TENSORS, SETTINGS = "diffcr.safetensors", "diffcr.json"
MAX_SETTINGS_BYTES, MAX_HEADER_BYTES, MAX_TENSORS_BYTES = 2**20, 2**22, 2**28  # several times what a thousand blocks need
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_adapter(model: torch.nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write routers, ratio table and settings of a converted model into a folder.

    Each file is replaced in one step, and that of the tensors holds the settings too: whenever a save is interrupted, what can be loaded
    is the earlier adapter or this one, whole.

    A model sharded by ``fully_shard`` is gathered, so every process has to make this call; the first one writes. Under DDP all hold the
    same, and one of them is enough.

    Args:
        model: A converted model, not specialised.
        directory: Folder; made if missing.

    Raises:
        ConversionError: If the model is not converted, or specialised.
        AdapterError: If the folder cannot be written.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> from diffcr_surgery import convert_
        >>> save_adapter(convert_(model, inputs), "adapter")
        >>> sorted(path.name for path in Path("adapter").iterdir())
        ['diffcr.json', 'diffcr.safetensors']
    """
    state = state_of(model)
    if state.specialized:
        raise ConversionError("A specialised model has lost the routers that decide nothing; save_adapter before specialize_.")
    state.ratios()
    settings = {
        "version": ADAPTER_VERSION,
        "model_class": state.plan.model_class,
        "config": json.loads(state.config.to_json()),
        "regions": {
            "argument": state.plan.regions.argument,
            "low": state.plan.regions.low,
            "high": state.plan.regions.high,
        },
        "sites": _site_rows(state.plan),
        "left_out": _left_out(state.plan),
        "target_ratio": state.config.target_ratio,
        "achieved_ratio": float((state.executed_ratios() * state.budget.region_weights).sum(1).mean()),
    }
    tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in state.state_dict().items()}
    settings["fingerprint"] = _fingerprint(settings, tensors)
    write = partial(_write, Path(directory), settings, tensors)
    if is_sharded(model):
        by_first(write)  # whoever returns finds the adapter written
    else:
        write()


def _write(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            text = json.dumps(settings, indent=2) + "\n"
            save_file(tensors, os.path.join(scratch, TENSORS), metadata={SETTINGS: text})
            Path(scratch, SETTINGS).write_text(text, encoding="utf-8")
            os.chmod(Path(scratch, TENSORS), Path(scratch, SETTINGS).stat().st_mode)  # safetensors lets only its writer read
            for name in (TENSORS, SETTINGS):
                sync(Path(scratch, name))
                os.replace(os.path.join(scratch, name), folder / name)
        sync(folder)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"The adapter could not be written to {folder}: {error}. Choose a folder that can be written.") from error


def _fingerprint(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Return a digest by which settings and tensors of one save know each other."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()


def _site_rows(planned: SurgeryPlan) -> list[dict[str, Any]]:
    return [
        {"path": site.path, "occurrence": site.occurrence, "block_class": site.block_class, "width": site.width}
        for site in planned.routed_sites
    ]


def _left_out(planned: SurgeryPlan) -> list[str]:
    """Return the paths of the blocks that stay dense."""
    return sorted({site.path for site in planned.sites if not site.routed})


def load_adapter_(model: torch.nn.Module, directory: str | os.PathLike[str], example_inputs: Any) -> torch.nn.Module:
    """Convert a model and give it the routers and ratios of a saved adapter, in place.

    Whatever is refused, the model is left as it was. A file that is damaged or was edited by hand is refused, and one that was made to do
    harm can do none but by its numbers: nothing in it is run, not even its expression for blocks, for the blocks are listed.

    Args:
        model: A model of the class, and with the blocks, the adapter was trained on; not converted.
        directory: Folder written by :func:`save_adapter`.
        example_inputs: As for :func:`plan`.

    Returns:
        The same object, converted.

    Raises:
        AdapterError: If the folder is missing or damaged, or the adapter belongs to another model.
        ConversionError: If the model is converted already.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        >>> from diffcr_surgery import DiffCRConfig, convert_, ratio_table, restore_
        >>> save_adapter(convert_(model, inputs, DiffCRConfig(initial_ratio=0.5)), "adapter")
        >>> model = load_adapter_(restore_(model), "adapter", inputs)
        >>> ratio_table(model).flatten().tolist()
        [0.5, 0.5]
    """
    if hasattr(model, "diffcr"):
        raise ConversionError(f"This {type(model).__name__} is converted already; call restore_(model) before loading an adapter.")
    folder = Path(directory)
    settings, tensors = _read(folder)
    config = _read_config(folder, settings)
    if not _same_class(settings["model_class"], type(model)):
        raise AdapterError(
            f"The adapter in {folder} was trained on a {settings['model_class']}; this is a "
            f"{type(model).__module__}.{type(model).__qualname__}. Load it into a model of that class."
        )
    # What sites cost is in the file, and is not measured again. Nor is its expression for blocks matched: it could take for ever.
    rows = settings["sites"]
    unmeasured = replace(config, cost="tokens", target_share=None)
    planned = plan_blocks(model, example_inputs, unmeasured, {row["path"] for row in rows} if config.blocks is not None else None)
    found = _site_rows(planned)
    # A deeper model than the adapter's would pass for one whose last blocks were left out. (Older files do not list those.)
    foreign = sorted(set(_left_out(planned)) - set(settings["left_out"])) if config.blocks is not None and "left_out" in settings else []
    if foreign or found != rows:
        raise AdapterError(
            f"The adapter in {folder} belongs to a model with the routed blocks {shown([row['path'] for row in rows])} of width "
            f"{shown(sorted({row['width'] for row in rows}))}; this one has {[row['path'] for row in found] + foreign} of width "
            f"{sorted({row['width'] for row in found})}. Load the base model it was trained on."
        )
    convert_(model, replace(planned, config=config))
    try:
        _fill(model, settings, tensors, folder)
    except BaseException:
        restore_(model)
        raise
    return model


def _fill(model: torch.nn.Module, settings: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    state, path = state_of(model), folder / TENSORS
    own = state.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise AdapterError(f"{path} does not fit its settings: {shown(wrong[:5])} are missing, extra, or of another shape. Save it anew.")
    broken = sorted(name for name, t in tensors.items() if t.dtype not in FLOATS or not bool(t.to(own[name].dtype).isfinite().all()))
    if broken:
        raise AdapterError(f"{path}: {broken} hold values that are no finite numbers; the file is damaged. Save it anew.")
    table, limit, costs = tensors["ratio_table"], state.config.reachable_bins[-1], tensors["site_costs"]
    if bool(((table < 0) | (table > limit + 1e-6)).any()):
        raise AdapterError(f"{path}: ratio_table holds ratios outside [0, {limit:g}]; the file is damaged. Save it anew.")
    if bool((costs < 0).any() or (costs > 1).any() or (costs[:, 0] == 0).any() or (costs.diff(dim=1) > 0).any()):
        raise AdapterError(
            f"{path}: site_costs holds no shares of the dense model's cost that fall from bin to bin; the file is damaged. Save it anew."
        )
    if _fingerprint({name: value for name, value in settings.items() if name != "fingerprint"}, tensors) != settings["fingerprint"]:
        raise AdapterError(f"{path} and {SETTINGS} beside it are not what was saved together; one of them was changed. Save them anew.")
    state.load_state_dict(tensors)
    state.plan = replace(state.plan, site_costs=tuple(map(tuple, state.site_costs.tolist())))


def _same_class(saved: str, given: type) -> bool:
    """Tell whether a class has the name that was saved. One defined in the script that is run has no module of its own: `__main__`."""
    module, _, name = saved.rpartition(f".{given.__qualname__}")
    return not name and (module == given.__module__ or "__main__" in (module, given.__module__))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read settings and tensors; the settings kept with the tensors, if a save was interrupted after it had replaced the tensors."""
    settings = _parsed(_content(folder / SETTINGS, MAX_SETTINGS_BYTES), folder / SETTINGS)
    path = folder / TENSORS
    content = _content(path, MAX_TENSORS_BYTES)
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        if end > MAX_HEADER_BYTES:
            raise ValueError("its header is larger than any adapter's")
        tensors = dict(load(content))
        text = json.loads(content[8:end]).get("__metadata__", {}).get(SETTINGS)
    except Exception as error:  # safetensors raises its own error, and others for what it does not know
        raise AdapterError(f"{path} cannot be read ({shown(error)}); the file is damaged or cut short. Save the adapter anew.") from error
    kept = settings if text is None else _parsed(text.encode(), path)
    return (settings if kept["fingerprint"] == settings["fingerprint"] else kept), tensors


def _content(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file: a pipe or a device might never end."""
    try:
        if not path.is_file():
            raise AdapterError(f"{path.parent} holds no {path.name}; give the folder that save_adapter(model, folder) wrote.")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error}); give the folder that save_adapter(model, folder) wrote.") from error
    if len(content) > limit:
        raise AdapterError(f"{path} is larger than any adapter's ({limit} bytes); this is no adapter of this package.")
    return content


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}); the file is damaged. Save the adapter anew.") from error
    version = settings.get("version") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or type(version) is not int or version != ADAPTER_VERSION:  # JSON's 2.0 equals 2
        raise AdapterError(
            f"{path} has adapter version {shown(version)}; this release reads version {ADAPTER_VERSION}. Save it anew with this release."
        )
    rows = settings.get("sites")
    keys = {"path": str, "occurrence": int, "block_class": str, "width": int}
    sound = isinstance(rows, list) and all(
        isinstance(row, dict) and row.keys() == keys.keys() and all(type(row[k]) is kind for k, kind in keys.items()) for row in rows
    )
    left_out = settings.get("left_out", [])
    names = [settings.get("model_class"), settings.get("fingerprint"), *(left_out if isinstance(left_out, list) else [left_out])]
    if not sound or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise AdapterError(f"{path} lacks its sites, model class or fingerprint; the file is damaged. Save the adapter anew.")
    return settings


def _read_config(folder: Path, settings: dict[str, Any]) -> DiffCRConfig:
    """Return the saved settings, with the timestep argument and range that were settled at conversion."""
    try:
        config = DiffCRConfig.from_dict(settings.get("config"))
        if config.timestep_regions == 1:
            return config
        regions = settings["regions"]
        argument = "auto" if regions["argument"] is None else regions["argument"]
        settled = {"timestep_argument": argument, "timestep_range": [regions["low"], regions["high"]]}
        return DiffCRConfig.from_dict(settings["config"] | settled)
    except (ConfigError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder / SETTINGS} holds settings that cannot be used: {str(error).rstrip('.')}. Save the adapter anew."
        ) from error
