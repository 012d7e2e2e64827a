"""Answers in a form that a request gives: JSON, any or by a schema. llguidance says which tokens may come next.

A schema is a program that a stranger wrote. What it may cost is bounded by its size (serve/schema.py), by llguidance's
own counts of steps, and by a trial in a process that can be stopped; all of it away from the event loop.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.serve.errors import ApiError
from halfbyte.serve.sampling import DeadEndError, MakeForm
from halfbyte.serve.schema import ResponseFormat
from halfbyte.serve.text import Texts

TRIAL = Path(__file__).with_name("grammar_trial.py")
TRIAL_SECONDS, WAIT_SECONDS = 2.0, 10.0
KNOWN = 256
"""Schemas that have stood their trial and need no other."""
LIMITS = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 100_000, "step_max_items": 20_000, "max_items_in_row": 1000,
    "max_lexer_states": 20_000, "max_grammar_size": 100_000, "verbose_errors": False,
}  # fmt: skip
STYLE = {"whitespace_pattern": r"[ \n]{1,16}", "item_separator": ",", "key_separator": ":", "lenient": False}
"""Blanks as the model likes them, but not for ever."""


class Grammars:
    """Forms for the answers of one tokenizer."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._worker = ThreadPoolExecutor(1, "grammar")
        self._tokenizer: Any = None
        self._known: OrderedDict[str, None] = OrderedDict()

    async def form(self, wanted: ResponseFormat | None) -> MakeForm | None:
        """What holds an answer to `wanted`; None where any text will do.

        Raises:
            ApiError: the schema is wrong, or too much, or the library is not installed.
        """
        if wanted is None or wanted.type == "text":
            return None
        field = "response_format.json_schema.schema" if wanted.json_schema else "response_format.type"
        if importlib.util.find_spec("llguidance") is None:
            fix = 'JSON needs llguidance, which is not installed: pip install "halfbyte[serve]"'
            raise ApiError(400, f"{field}: {fix}", param=field)
        schema = wanted.json_schema.schema_ if wanted.json_schema else {"type": "object"}
        work = self._worker.submit(self._prepare, schema)
        try:
            matcher = await asyncio.wait_for(asyncio.wrap_future(work), WAIT_SECONDS)
        except TimeoutError:
            raise ApiError(429, "too many schemas are waiting", code="queue_full", retry_after=1) from None
        except ValueError as error:
            raise ApiError(400, f"{field}: {error}"[:500], param=field) from None
        stops = [token for token in self._texts.stops if token < self._texts.vocab_size]  # a config may name others
        return partial(_Form, matcher, stops)

    def _prepare(self, schema: dict[str, Any]) -> Any:
        """A matcher at the beginning of an answer. Raises ValueError for the schema."""
        import llguidance
        from llguidance import hf

        if self._tokenizer is None:
            self._tokenizer = hf.from_tokenizer(self._texts.tokenizer)
        own = {key: value for key, value in schema.items() if key != "x-guidance"}
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(own), overrides=STYLE)
        if grammar not in self._known:
            _try_out(grammar)
            self._known[grammar] = None
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher


def _try_out(grammar: str) -> None:
    """Raises ValueError where it is wrong, or takes too much time or memory."""
    asked = json.dumps({"grammar": grammar, "limits": LIMITS})
    command = [sys.executable, "-P", str(TRIAL)]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError("it takes too long to prepare") from None
    if done.returncode:
        raise ValueError("it takes too much to prepare")
    if done.stdout:
        raise ValueError(" ".join(done.stdout.split()))


class _Form:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: Any, stops: list[int]) -> None:
        self._matcher, self._stops = matcher.deep_copy(), stops

    def allowed(self) -> Tensor:
        """(tokens,) bool, which may come next. Raises DeadEndError where that is too hard to tell."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise DeadEndError(f"response_format: {self._matcher.get_error()}"[:500])
        found = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()
        found[self._stops] = self._matcher.is_accepting()
        return found

    def took(self, token: int) -> None:
        self._matcher.consume_token(token)
