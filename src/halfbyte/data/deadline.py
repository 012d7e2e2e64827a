"""A chat template is code from a model's folder: it runs in a sandbox, and is stopped when it does not end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")

SECONDS = 5.0


class _Late(BaseException):
    """Raised inside work whose time is over; no template can catch it."""


def in_time(work: Callable[[], T], progress: Callable[[], object] = bool) -> T:
    """`work()` on a thread of its own, stopped when it takes longer than `SECONDS`.

    Args:
        progress: for work of many parts: which part it is at; the time is for one part, and may be twice as long.

    Raises:
        TimeoutError: it was stopped; says after how long. And whatever `work` raises.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=copy_context().run, args=(run,), name="template", daemon=True)
    before = progress()
    thread.start()
    while True:
        thread.join(SECONDS)
        if not thread.is_alive():
            break
        now = progress()
        if now == before:
            # A template is Python code that loops: it can be stopped between two of its instructions, and only so.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Late))
            raise TimeoutError(f"it has not come to an end in {SECONDS:g} s")
        before = now
    if failure:
        raise failure[0]
    return result[0]
