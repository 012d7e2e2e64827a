"""Memory and time before you start; needs neither torch nor weights."""

import sys
from types import ModuleType
from typing import Any

from halfbyte.plan.machine import Machine, this_machine
from halfbyte.plan.phases import Work
from halfbyte.plan.planner import Plan, apply_choices, plan

__all__ = ["Machine", "Plan", "Work", "apply_choices", "plan", "this_machine"]


class _Room(ModuleType):
    """A room that is also the function of its name, as `halfbyte.train` is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
