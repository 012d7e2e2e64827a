"""Answers in company equal answers alone, whoever joins, leaves, shares a prompt or loses its blocks meanwhile."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from halfbyte.checkpoint import load_adapter
from halfbyte.kernels.batch_step import Row
from halfbyte.kernels.registry import cpu_choice
from halfbyte.model.adapt import attach_saved
from halfbyte.model.batch import BatchDecoder
from halfbyte.model.plain_batch import PlainBatch
from halfbyte.serve import Engine
from halfbyte.serve.engine import FullError, StoppedError
from halfbyte.serve.sampling import Sampler, Sampling

# PEFT 0.21 asks transformers for a deprecated attribute.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
NAMES = ("base", "a1", "a2", "a3")


def prompt_of(number: int, length: int) -> list[int]:
    return [(number * 37 + 11 * i) % 300 + 3 for i in range(length)]


def bound() -> float:
    """As in tests/model/test_decode.py; measured 7e-4 with AVX2, 1e-6 else."""
    library = cpu_choice().library
    return 5e-3 if library is not None and library.isa == "avx2" else 2e-5


def test_an_adapter_computes_what_peft_computes(decoder: BatchDecoder, base: Any, make_adapter: Any) -> None:
    saved = load_adapter(make_adapter(1))
    ids = prompt_of(1, 40)
    blocks = torch.arange(3, dtype=torch.int32)
    adapter = decoder.load(saved)
    found = decoder.run(ids, [Row(i, blocks, adapter) for i in range(40)], list(range(40)))
    adapted = attach_saved(base.model, saved)
    try:
        with torch.no_grad():
            expected = adapted(input_ids=torch.tensor([ids])).logits[0]
    finally:
        adapted.unload()
    assert float((found - expected).abs().max()) <= bound() * float(expected.abs().max())


def test_what_is_not_covered_goes_through_transformers(base: Any, decoder: BatchDecoder, make_adapter: Any) -> None:
    """The same engine, the same answers up to rounding, and adapters that go again."""
    folders = [make_adapter(seed) for seed in (1, 2)]
    plain = PlainBatch(base.model, positions=256, context=128)
    handles = [plain.load(load_adapter(folder)) for folder in folders]
    try:
        for number in range(3):
            ids, blocks = prompt_of(number, 20), torch.tensor([3, 1], dtype=torch.int32)
            native = None if number == 0 else decoder.load(load_adapter(folders[number - 1]))
            handle: Any = None if number == 0 else handles[number - 1]
            expected = decoder.run(ids, [Row(i, blocks, native) for i in range(20)], list(range(20)))
            rows = [Row(i, blocks, handle) for i in range(20)]
            first = plain.run(ids[:12], rows[:12], list(range(12)))
            rest = plain.run(ids[12:], rows[12:], list(range(8)))
            found = torch.cat([first, rest])
            assert float((found - expected).abs().max()) <= bound() * float(expected.abs().max())
        del handle, rows
        handles.pop()
        gc.collect()
        plain.run([5], [Row(0, torch.tensor([0], dtype=torch.int32), None)], [0])
        assert list(plain._model.peft_config) == ["adapter1"]
    finally:
        plain._model.unload()


def test_mixed_adapters_in_a_batch_answer_as_alone(ask: Any) -> None:
    cases = [
        (NAMES[i % 4], prompt_of(i, 5 + 7 * i), {"sampling": Sampling(temperature=0.9 * (i % 2), seed=i, top_p=0.9)})
        for i in range(12)
    ]
    alone = [ask(name, prompt, **options).ids for name, prompt, options in cases]
    together = [ask(name, prompt, **options) for name, prompt, options in cases]
    assert [answer.ids for answer in together] == alone
    assert len({tuple(ids) for ids in alone}) == 12


def test_rows_are_the_same_to_the_bit_in_any_company(decoder: BatchDecoder, make_adapter: Any) -> None:
    adapters = [None, *(decoder.load(load_adapter(make_adapter(seed))) for seed in (1, 2))]
    tables = [torch.arange(4 * i, 4 * i + 4, dtype=torch.int32) for i in range(11)]
    alone = []
    for i, table in enumerate(tables):  # a token at a time
        ids = prompt_of(i, 20 + i)
        alone.append([decoder.run([t], [Row(p, table, adapters[i % 3])], [0])[0] for p, t in enumerate(ids)][-1])
    rows, ids, wanted = list[Row](), list[int](), list[int]()
    for i, table in enumerate(tables):  # 11 prompts of different lengths, whole, in one call
        prompt = prompt_of(i, 20 + i)
        rows += [Row(p, table, adapters[i % 3]) for p in range(len(prompt))]
        ids += prompt
        wanted.append(len(rows) - 1)
    assert torch.equal(decoder.run(ids, rows, wanted), torch.stack(alone))


def test_an_answer_joins_and_another_leaves(ask: Any, engine: Engine) -> None:
    expected = ask("a1", prompt_of(1, 30), max_tokens=60).ids
    long = ask("a1", prompt_of(1, 30), max_tokens=60)
    long.first.wait(30)
    short = [ask("a2", prompt_of(i, 9), max_tokens=3) for i in range(5)]
    assert [len(answer.ids) for answer in short] == [3] * 5
    assert long.ids == expected
    assert long.reason == "length"


def test_prompts_share_blocks_of_the_same_adapter_alone(ask: Any, engine: Engine) -> None:
    prompt = prompt_of(3, 70)
    first = ask("a1", prompt).ids
    assert engine.counts.reused_tokens == 0
    assert ask("a1", prompt).ids == first
    assert engine.counts.reused_tokens == 64
    assert ask("a2", prompt).ids != first
    assert engine.counts.reused_tokens == 64
    together = [ask("a3", prompt) for _ in range(4)]  # the later ones wait for the first one's blocks
    assert len({tuple(answer.ids) for answer in together}) == 1
    assert engine.counts.reused_tokens == 64 * 4


def test_a_full_cache_is_shared_by_computing_anew(base: Any, asking: Any) -> None:
    small = BatchDecoder(base.model, positions=128, context=128)
    engine = Engine(small, most_running=8)
    engine.start()
    ask = asking(engine)
    alone = [ask(NAMES[i], prompt_of(i, 30), max_tokens=40).ids for i in range(4)]
    together = [ask(NAMES[i], prompt_of(i, 30), max_tokens=40) for i in range(4)]
    assert [answer.ids for answer in together] == alone
    assert engine.counts.recomputed > 0
    engine.stop(5)


def test_cancelling_frees_blocks(ask: Any, engine: Engine) -> None:
    from halfbyte.serve.sequence import Event, Sequence

    order, collected = ask.order("base", prompt_of(1, 40), max_tokens=80)
    submitted, put = threading.Event(), order.put

    def cancel_at_the_first(event: Event) -> None:
        """In the engine's thread: a thread of our own might come after the last token."""
        put(event)
        submitted.wait(30)
        engine.cancel(sequences)

    sequences: list[Sequence] = engine.submit([replace(order, put=cancel_at_the_first)])
    submitted.set()
    assert collected.reason == "cancelled"
    assert len(collected.ids) == 1
    assert engine.pool.in_use == 0


def test_the_queue_is_bounded(decoder: BatchDecoder, asking: Any) -> None:
    engine = Engine(decoder, most_running=1, most_waiting=2)
    engine.start()
    ask = asking(engine)
    orders = [ask.order("base", prompt_of(i, 9))[0] for i in range(3)]
    with pytest.raises(FullError):
        engine.submit(orders)  # all of them or none
    assert engine.waiting == 0
    engine.stop(0)
    with pytest.raises(StoppedError):
        ask("base", [1, 2])


class Broken:
    """A runner that fails where the prompt begins with 7, and gives NaN where it begins with 8."""

    def __init__(self, inner: BatchDecoder) -> None:
        self.inner, self.num_blocks, self.context = inner, inner.num_blocks, inner.context
        self.firsts: dict[int, int] = {}

    def run(self, ids: Any, rows: Any, wanted: Any) -> torch.Tensor:
        logits = self.inner.run(ids, rows, wanted)
        for index, row in enumerate(wanted):
            if ids[row] == 8:
                logits[index] = float("nan")
        if 7 in ids:
            raise MemoryError
        return logits


def test_a_failed_answer_leaves_the_others_alone(
    decoder: BatchDecoder, asking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN logits, a pass that raises, a sampler that raises: each ends one answer, its neighbours are the same."""
    engine = Engine(Broken(decoder))
    engine.start()
    ask = asking(engine)
    sampled = {"sampling": Sampling(temperature=0.9, seed=1), "logprobs": 2}
    alone = ask("a1", prompt_of(5, 20), **sampled)
    assert alone.reason == "length"
    expected, choose = alone.events, Sampler.choose

    def fails(sampler: Sampler, logits: torch.Tensor) -> int:
        if sampler.sampling.seed == 13:
            raise RuntimeError
        return choose(sampler, logits)

    monkeypatch.setattr(Sampler, "choose", fails)
    for prompt, options in (([20, 8], {}), ([7, 9], {}), ([20, 9], {"sampling": Sampling(temperature=1, seed=13)})):
        answers = [ask("a1", prompt_of(5, 20), **sampled), ask("a1", prompt, **options)]
        assert answers[1].reason == "error"
        assert answers[0].reason == "length"
        assert answers[0].events == expected
    engine.stop(5)
    assert engine.pool.in_use == 0


def test_a_dead_engine_says_so(decoder: BatchDecoder, asking: Any) -> None:
    class Dies(Broken):
        def run(self, ids: Any, rows: Any, wanted: Any) -> torch.Tensor:
            raise SystemExit

    dead = threading.Event()
    engine = Engine(Dies(decoder), on_death=dead.set)
    engine.start()
    assert asking(engine)("base", [3, 4]).reason == "error"
    assert dead.wait(10)
    time.sleep(0.05)
    assert not engine.alive
