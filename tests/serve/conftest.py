"""A tiny base in 4 bits with adapters made at random, as `halfbyte serve` holds them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import write_random_adapter

from halfbyte.config import QuantConfig
from halfbyte.kernels.registry import cpu_choice
from halfbyte.model import load_model
from halfbyte.model.batch import BatchDecoder
from halfbyte.serve import Adapters, Engine
from halfbyte.serve.sequence import Event, Finished, Order, Token

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def base(make_llama: Any) -> Any:
    return load_model(make_llama(intermediate_size=128), QuantConfig(), compute_dtype=torch.float32)


@pytest.fixture(scope="session")
def make_adapter(base: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """`make_adapter(seed)`: the folder of a random adapter on all linear layers of `base`."""

    def make(
        seed: int, folder: Path | None = None, *, base_sha256: str = base.base_sha256, scale: float = 0.3
    ) -> Path:
        folder = folder or tmp_path_factory.mktemp("adapters") / f"a{seed}"
        return write_random_adapter(folder, base.model, base_sha256, seed, scale)

    return make


@pytest.fixture
def decoder(base: Any) -> BatchDecoder:
    if cpu_choice().library is None:
        pytest.skip("no native library")
    decoder = BatchDecoder(base.model, positions=1024, context=128)
    decoder.try_out()
    return decoder


@pytest.fixture
def adapters(decoder: BatchDecoder, base: Any, make_adapter: MakeAdapter, tmp_path: Path) -> Adapters:
    """base, a1, a2, a3; more may be loaded from `tmp_path`/adapters."""
    from halfbyte.checkpoint import check_base

    (tmp_path / "adapters").mkdir()
    adapters = Adapters(
        "base", lay_out=decoder.load, check=lambda saved: check_base(saved, base.base_sha256),
        folder=tmp_path / "adapters",
    )  # fmt: skip
    for seed in (1, 2, 3):
        adapters.load(f"a{seed}", make_adapter(seed))
    return adapters


@pytest.fixture
def engine(decoder: BatchDecoder) -> Iterator[Engine]:
    engine = Engine(decoder, most_running=8, most_waiting=64)
    engine.start()
    yield engine
    engine.stop(5)
    assert engine.pool.in_use == 0


class Collected:
    """The events of one order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()
        self.first = threading.Event()

    def put(self, event: Event) -> None:
        self.events.append(event)
        self.first.set()
        if isinstance(event, Finished):
            self.done.set()

    @property
    def ids(self) -> list[int]:
        assert self.done.wait(60)
        return [event.id for event in self.events if isinstance(event, Token) and not event.prompt]

    @property
    def reason(self) -> str:
        assert self.done.wait(60)
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last.reason


class Ask:
    """Orders for an engine, by the names of adapters."""

    def __init__(self, engine: Engine, adapters: Adapters) -> None:
        self.engine, self.adapters = engine, adapters

    def order(self, name: str, prompt: list[int], **options: Any) -> tuple[Order, Collected]:
        collected = Collected()
        served = self.adapters.find(name)
        assert served is not None
        settings = {"max_tokens": 12} | options
        return Order(served=served, prompt=prompt, put=collected.put, **settings), collected

    def __call__(self, name: str, prompt: list[int], **options: Any) -> Collected:
        order, collected = self.order(name, prompt, **options)
        self.engine.submit([order])
        return collected


@pytest.fixture
def asking(adapters: Adapters) -> Callable[[Engine], Ask]:
    """`asking(engine)`: orders for it."""
    return lambda engine: Ask(engine, adapters)


@pytest.fixture
def ask(engine: Engine, asking: Callable[[Engine], Ask]) -> Ask:
    return asking(engine)


@dataclass
class Server:
    """A server on a port of its own."""

    url: str
    port: int
    engine: Engine
    folder: Path
    user: dict[str, str] = field(default_factory=lambda: {"authorization": "Bearer user-key"})
    admin: dict[str, str] = field(default_factory=lambda: {"authorization": "Bearer admin-key"})


@pytest.fixture
def server(engine: Engine, adapters: Adapters, tiny_tokenizer: Any, tmp_path: Path) -> Iterator[Server]:
    from halfbyte.serve.app import make_app
    from halfbyte.serve.guard import Keys
    from halfbyte.serve.start import Settings, bind, make_server
    from halfbyte.serve.text import Texts

    texts = Texts(tiny_tokenizer, stops=[2, 999], context=128)  # a config may name a token that is none
    keys = Keys("user-key", "admin-key")
    running = make_server(make_app(engine, adapters, texts, keys, local_only=True))
    listening = bind(Settings(port=0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    port = listening.getsockname()[1]
    yield Server(f"http://127.0.0.1:{port}", port, engine, tmp_path / "adapters")
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
