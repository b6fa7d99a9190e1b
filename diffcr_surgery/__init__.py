"""Turn any diffusion transformer into a DiffCR model: learned token routing per layer and timestep region (arXiv 2412.16822).

plan = dcs.plan(model, example_inputs, dcs.DiffCRConfig(target_ratio=0.2, timestep_regions=4))
dcs.convert_(model, plan)          # in place; same class, same state-dict keys and "diffcr.*"
...                                # train as before
dcs.specialize_(model)             # a faster model of the same class
"""

from diffcr_surgery import errors as errors
from diffcr_surgery.atomic import atomic_folder
from diffcr_surgery.capture import capture_inputs
from diffcr_surgery.config import DiffCRConfig
from diffcr_surgery.errors import SurgeryError
from diffcr_surgery.optimizer import RatioOptimizer
from diffcr_surgery.patterns import BlockPattern, register_pattern
from diffcr_surgery.plan import SurgeryPlan, plan
from diffcr_surgery.runtime.convert import convert_, ratio_loss, ratio_table, restore_
from diffcr_surgery.save import load_adapter_, save_adapter
from diffcr_surgery.specialize import specialize_
from diffcr_surgery.timesteps import at_timestep
from diffcr_surgery.trace import trace
from diffcr_surgery.training import RegionSampler, parameter_groups

__all__ = [
    "BlockPattern",
    "DiffCRConfig",
    "RatioOptimizer",
    "RegionSampler",
    "SurgeryError",
    "SurgeryPlan",
    "at_timestep",
    "atomic_folder",
    "capture_inputs",
    "convert_",
    "load_adapter_",
    "parameter_groups",
    "plan",
    "ratio_loss",
    "ratio_table",
    "register_pattern",
    "restore_",
    "save_adapter",
    "specialize_",
    "trace",
]
