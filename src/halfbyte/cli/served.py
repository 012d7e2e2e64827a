"""What `halfbyte serve` and `halfbyte chat` answer with: planned, then loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli.common import check_adapter_fits, console, known_machine, load_base, with_base_of

if TYPE_CHECKING:
    from halfbyte.config import RunConfig
    from halfbyte.model.batch import BatchDecoder
    from halfbyte.model.plain_batch import PlainBatch
    from halfbyte.plan import ServingPlan
    from halfbyte.serve import Adapters, Room
    from halfbyte.serve.text import Texts


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be served.

    Attributes:
        name: of the base; "": the model's.
        named: adapters to begin with.
        folder: where more may be loaded from, by name.
        context: tokens of a sequence, at most.
        positions: whose keys and values are kept.
        answers: that run or wait at once.
        http: whether over HTTP.
    """

    name: str = ""
    named: list[tuple[str, Path]]
    folder: Path | None = None
    context: int
    positions: int
    answers: int
    http: bool = True

    def fix(self, made: ServingPlan, budget: int) -> str:
        """What to do where `made` does not fit."""
        most = made.most_cache_tokens(budget)
        least = f"{-(-made.with_cache(self.context).peak_memory // 10**6)}MB"  # rounded up: as much has to do
        if not self.http:
            return f"Give --memory more, a smaller --context or fewer adapters: {least} is the least here"
        fits = f"--cache-tokens {most} fits" if most >= self.context else f"{least} is the least"
        return f"Give --memory more, a smaller --cache-tokens or fewer adapters: {fits}"


@dataclass(frozen=True)
class Served:
    """What computes, what it serves, the tokenizer's side, notes for the user, and most memory in bytes as planned."""

    decoder: BatchDecoder | PlainBatch
    adapters: Adapters
    texts: Texts
    notes: list[str]
    planned_memory: int


def open_served(run: RunConfig, wanted: Wanted) -> Served:
    """Plan, then load; to be called inside `steady_memory`.

    Raises:
        ResourceError: it does not fit in memory; the base is not loaded then.
    """
    from halfbyte.checkpoint import load_adapter
    from halfbyte.kernels.buffers import trim_heap
    from halfbyte.model import load_tokenizer
    from halfbyte.model.generate import stop_ids
    from halfbyte.plan.start import check_whole
    from halfbyte.serve import Adapters
    from halfbyte.serve.text import Texts

    if not wanted.named and wanted.folder is None:
        check_whole(run.model.path)
    as_trained = with_base_of(run, load_adapter(wanted.named[0][1]) if wanted.named else None)
    tokenizer = load_tokenizer(run.model.path)
    planned, text, room = _plan(as_trained, wanted)
    loaded, notes = load_base(as_trained, console())
    decoder, more = _decoder(loaded.model, wanted.positions, wanted.context)
    adapters = Adapters(
        wanted.name or base_name(run.model.path), lay_out=decoder.load, folder=wanted.folder, room=room,
        check=lambda saved: check_adapter_fits(run, saved, loaded, tokenizer),
    )  # fmt: skip
    for adapter_name, folder in wanted.named:
        more += adapters.load(adapter_name, folder)
    trim_heap()  # what loading took for a moment
    texts = Texts(tokenizer, stops=stop_ids(loaded.model, tokenizer), context=decoder.context)
    return Served(decoder, adapters, texts, [*notes, *more, text], planned)


def _plan(run: RunConfig, wanted: Wanted) -> tuple[int, str, Room | None]:
    """Most memory in bytes, the plan in words, and what a budget leaves for adapters; the tokenizer is there already.

    Raises:
        ResourceError: it does not fit.
    """
    from halfbyte.dtypes import format_bytes
    from halfbyte.errors import ResourceError
    from halfbyte.model.memory import peak_memory, resident_memory
    from halfbyte.plan import Serving, budget_of, compute_dtype, on_gpu, plan_serving, read_base, serving_text
    from halfbyte.serve import Room

    machine, budget = known_machine(), budget_of(run)
    if on_gpu(run, machine):
        return 0, "memory: not planned on a GPU; --memory caps what is taken there", None
    base = read_base(run.model.path, run.quant, compute_dtype(run, machine))
    made = plan_serving(run, base, machine, Serving(
        cache_tokens=wanted.positions, context=wanted.context, answers=wanted.answers, http=wanted.http,
        adapters=[folder for _, folder in wanted.named], reloads=wanted.folder is not None,
        runtime=resident_memory(), so_far=peak_memory(),
    ))  # fmt: skip
    text = serving_text(made, budget)
    if budget is None:
        return made.peak_memory, text, None
    if made.peak_memory > budget.bytes:
        raise ResourceError(
            f"{format_bytes(made.peak_memory)} are needed, {format_bytes(budget.bytes)} are allowed",
            where=budget.source, why=text, fix=wanted.fix(made, budget.bytes),
        )  # fmt: skip
    return made.peak_memory, text, Room(made.room_for_adapters(budget.bytes), made.adapter_itemsize)


def _decoder(model: Any, positions: int, context: int) -> tuple[BatchDecoder | PlainBatch, list[str]]:
    """What computes, and a note where that is not the native step."""
    from halfbyte.model.batch import BatchDecoder
    from halfbyte.model.decoder_parts import NotCoveredError
    from halfbyte.model.plain_batch import PlainBatch

    model.eval()
    try:
        decoder = BatchDecoder(model, positions=positions, context=context)
        decoder.try_out()
    except NotCoveredError as error:
        note = f"served through transformers, one sequence at a time: {error}"
        return PlainBatch(model, positions=positions, context=context), [note]
    return decoder, []


def base_name(path: str) -> str:
    """The last part of a folder, file or hub id, with what a name may not have replaced."""
    last = path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:64] or "base"
