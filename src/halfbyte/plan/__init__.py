"""Memory and time before you start; needs neither torch nor weights."""

import sys
from types import ModuleType
from typing import Any

from halfbyte.plan.base import Base, read_base
from halfbyte.plan.behind import SCRATCH, disk_text
from halfbyte.plan.budget import Budget, budget_of, device_budget, on_gpu
from halfbyte.plan.check import check_run
from halfbyte.plan.first import SHORTEST, Samples, first_settings, sequence_length, to_fit
from halfbyte.plan.machine import Machine, this_machine, write_calibration
from halfbyte.plan.phases import Work, compute_dtype, runs_fused, speed_key, tokenizer_bytes, worst_case
from halfbyte.plan.planner import Plan, apply_choices, plan
from halfbyte.plan.ranks import of_rank
from halfbyte.plan.serving import Serving, ServingPlan, plan_serving, serving_text
from halfbyte.plan.time import time_text

__all__ = [
    "SCRATCH", "SHORTEST", "Base", "Budget", "Machine", "Plan", "Samples", "Serving", "ServingPlan", "Work",
    "apply_choices", "budget_of", "check_run", "compute_dtype", "device_budget", "disk_text", "first_settings",
    "of_rank", "on_gpu", "plan", "plan_serving", "read_base", "runs_fused", "sequence_length", "serving_text",
    "speed_key", "this_machine", "time_text", "to_fit", "tokenizer_bytes", "worst_case", "write_calibration",
]  # fmt: skip


class _Room(ModuleType):
    """A room that is also the function of its name, as `halfbyte.train` is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
