"""Adapters: routers, ratio table and settings in a folder of kilobytes, as safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed

from diffcr_surgery._shards import is_sharded, several_processes, whole
from diffcr_surgery.atomic import sync
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import AdapterError, ConfigError, ConversionError
from diffcr_surgery.plan import SurgeryPlan, plan
from diffcr_surgery.runtime.convert import convert_, restore_, state_of
from diffcr_surgery.timesteps import TimestepRegions

__all__ = ["load_adapter_", "save_adapter"]

ADAPTER_VERSION = 2  # 1 had no costs of the sites
TENSORS, SETTINGS = "diffcr.safetensors", "diffcr.json"
MAX_SETTINGS_BYTES = 16 * 1024 * 1024


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
        "target_ratio": state.config.target_ratio,
        "achieved_ratio": float((state.executed_ratios() * state.budget.region_weights).sum(1).mean()),
    }
    tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in state.state_dict().items()}
    settings["fingerprint"] = _fingerprint(settings, tensors)
    together = is_sharded(model) and several_processes()
    try:
        if not together or distributed.get_rank() == 0:
            _write(Path(directory), settings, tensors)
    finally:
        if together:
            distributed.barrier()  # whoever returns finds the adapter written


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
    except OSError as error:
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


def load_adapter_(model: torch.nn.Module, directory: str | os.PathLike[str], example_inputs: Any) -> torch.nn.Module:
    """Convert a model and give it the routers and ratios of a saved adapter, in place.

    Everything is read and checked before the model is touched.

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
    settings = _read_settings(folder)
    config = _read_config(folder, settings)
    tensors = _read_tensors(folder)
    if not _same_class(settings["model_class"], type(model)):
        raise AdapterError(
            f"The adapter in {folder} was trained on a {settings['model_class']}; this is a "
            f"{type(model).__module__}.{type(model).__qualname__}. Load it into a model of that class."
        )
    # What sites cost is in the file, and is not measured again.
    planned = plan(model, example_inputs, replace(config, cost="tokens", target_share=None))
    costs = tuple(tuple(row) for row in tensors["site_costs"].tolist()) if "site_costs" in tensors else ()
    planned = replace(planned, config=config, site_costs=costs)
    if _site_rows(planned) != settings["sites"]:
        raise AdapterError(
            f"The adapter in {folder} belongs to a model with the routed blocks {[row['path'] for row in settings['sites']]} of width "
            f"{sorted({row['width'] for row in settings['sites']})}; this one has {[site.path for site in planned.routed_sites]} of width "
            f"{sorted({site.width for site in planned.routed_sites})}. Load the base model it was trained on."
        )
    convert_(model, planned)
    try:
        _fill(model, tensors, folder)
    except BaseException:
        restore_(model)
        raise
    return model


def _fill(model: torch.nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    state = state_of(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise AdapterError(
            f"{folder / TENSORS} does not fit its settings: {wrong[:5]} are missing, extra, or of another shape. Save it anew."
        )
    broken = sorted(name for name, t in tensors.items() if not t.is_floating_point() or not bool(t.isfinite().all()))
    if broken:
        raise AdapterError(f"{folder / TENSORS}: {broken} hold values that are no finite numbers; the file is damaged. Save it anew.")
    table, limit = tensors["ratio_table"], state.config.max_ratio
    if bool(((table < 0) | (table > limit + 1e-6)).any()):
        raise AdapterError(f"{folder / TENSORS}: ratio_table holds ratios outside [0, {limit:g}]; the file is damaged. Save it anew.")
    state.load_state_dict(tensors)


def _same_class(saved: str, given: type) -> bool:
    """Tell whether a class has the name that was saved. One defined in the script that is run has no module of its own: `__main__`."""
    module, _, name = saved.rpartition(f".{given.__qualname__}")
    return not name and (module == given.__module__ or "__main__" in (module, given.__module__))


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings; those kept with the tensors, if a save was interrupted after it had replaced the tensors."""
    settings = _read_json(folder / SETTINGS)
    kept = _read_kept(folder)
    if kept is not None and kept.get("fingerprint") != settings["fingerprint"]:
        return _checked(kept, folder / TENSORS)
    return settings


def _read_kept(folder: Path) -> dict[str, Any] | None:
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            return dict(json.loads(file.metadata()[SETTINGS]))
    except Exception:  # what is wrong with the file is said where it is read in full
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise AdapterError(
                f"{path} is larger than any adapter's settings ({MAX_SETTINGS_BYTES} bytes); this is no adapter of this package."
            )
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} holds no {SETTINGS}; give the folder that save_adapter(model, folder) wrote.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}); the file is damaged. Save the adapter anew.") from error
    return _checked(settings, path)


def _checked(settings: Any, path: Path) -> dict[str, Any]:
    if not isinstance(settings, dict) or settings.get("version") != ADAPTER_VERSION:
        found = settings.get("version") if isinstance(settings, dict) else None
        raise AdapterError(
            f"{path} has adapter version {found!r}; this release reads version {ADAPTER_VERSION}. Save it anew with this release."
        )
    rows = settings.get("sites")
    keys = {"path": str, "occurrence": int, "block_class": str, "width": int}
    sound = isinstance(rows, list) and all(
        isinstance(row, dict) and row.keys() == keys.keys() and all(isinstance(row[k], kind) for k, kind in keys.items()) for row in rows
    )
    if not sound or not all(isinstance(settings.get(name), str) for name in ("model_class", "fingerprint")):
        raise AdapterError(f"{path} lacks its sites, model class or fingerprint; the file is damaged. Save the adapter anew.")
    return settings


def _read_config(folder: Path, settings: dict[str, Any]) -> DiffCRConfig:
    """Return the saved settings, with the timestep argument and range that were settled at conversion."""
    try:
        config = DiffCRConfig.from_dict(settings.get("config"))
        regions = settings["regions"]
        if config.timestep_regions == 1:
            return config
        settled = TimestepRegions(config.timestep_regions, regions["argument"], float(regions["low"]), float(regions["high"]))
        argument = settled.argument or "auto"
        return DiffCRConfig.from_dict({**settings["config"], "timestep_argument": argument, "timestep_range": [settled.low, settled.high]})
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder / SETTINGS} holds settings that cannot be used: {error}. Save the adapter anew.") from error


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        raise AdapterError(f"{folder} holds no {TENSORS}; give the folder that save_adapter(model, folder) wrote.")
    try:
        return dict(load_file(path))
    except Exception as error:  # safetensors raises its own error, and others for what the system reports
        raise AdapterError(f"{path} cannot be read ({error}); the file is damaged or cut short. Save the adapter anew.") from error
