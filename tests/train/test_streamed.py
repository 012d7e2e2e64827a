"""Where the base lives changes nothing: the same losses and the same adapter, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from safetensors.torch import load_file

from halfbyte.config import QuantConfig, RunConfig, load_config
from halfbyte.data import load_data, make_batch
from halfbyte.errors import ConfigError
from halfbyte.model.adapt import attach_lora
from halfbyte.model.load import load_model
from halfbyte.model.placement import Placement
from halfbyte.model.quantize import quantize_model
from halfbyte.model.source import load_tokenizer
from halfbyte.nn import Linear4bit
from halfbyte.nn.row_embedding import RowEmbedding
from halfbyte.store import LayerStore
from halfbyte.store.tiers import STAGING_BYTES
from halfbyte.train import Observer, train
from halfbyte.train.objective import Objective
from halfbyte.train.setup import prepare

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def stored(folder: Path, plain: Path) -> Path:
    quantize_model(str(plain), folder / "model", QuantConfig())
    return folder / "model"


@pytest.fixture(scope="module")
def folder(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six layers, stored in 4 bits."""
    return stored(tmp_path_factory.mktemp("stored"), make_llama(num_hidden_layers=6))


def outcome(config: RunConfig) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses and gradient norms, step by step, and the adapter."""
    result = train(config)
    lines = (Path(config.train.output) / "metrics.jsonl").read_text().splitlines()
    numbers = [
        (e["event"], e["step"], e.get("loss", e.get("eval_loss")), e.get("grad_norm")) for e in map(json.loads, lines)
    ]
    return numbers, load_file(Path(result.adapter) / "adapter_model.safetensors")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_where_things_live_changes_nothing(
    folder: Path, make_run: Callable[..., RunConfig], eval_file: Path, checkpointing: bool
) -> None:
    """With three micro-batches a step, which streamed layers take together and resident ones one by one."""
    settings = {
        "model__path": str(folder), "train__gradient_accumulation_steps": 3, "train__eval_every": 3,
        "train__gradient_checkpointing": checkpointing, "data__eval": str(eval_file),
    }  # fmt: skip
    numbers, adapter = outcome(make_run("resident", **settings))
    assert len({loss for _, _, loss, _ in numbers}) > 6
    for where in ({"weights": "stream"}, {"weights": "mmap"}, {"activations": "disk"}):
        memory = {f"memory__{key}": value for key, value in where.items()}
        found, other = outcome(make_run("-".join(where.values()), **memory, **settings))
        assert found == numbers
        assert all(torch.equal(other[name], tensor) for name, tensor in adapter.items())
        assert other.keys() == adapter.keys()


def test_layers_that_stay_are_spread_and_hold_their_bytes(folder: Path) -> None:
    resident = load_model(str(folder), QuantConfig(), compute_dtype=torch.float32)
    some = load_model(
        str(folder),
        QuantConfig(),
        compute_dtype=torch.float32,
        placement=Placement(weights="stream", resident_layers=3),
    )
    assert some.base_sha256 == resident.base_sha256
    assert some.store is not None
    assert len(some.store.layers) == 3
    layers = some.model.get_submodule("model.layers")
    streamed = [hasattr(layer, "streamed") for layer in layers]
    assert streamed == [False, True, False, True, False, True]
    sizes = [sum(m.codes.numel() for m in layer.modules() if isinstance(m, Linear4bit)) for layer in layers]
    assert [size == 0 for size in sizes] == streamed
    assert isinstance(some.model.get_input_embeddings(), RowEmbedding)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(some.model(ids).logits, resident.model(ids).logits)


@pytest.mark.parametrize("copies", [0, 2, 6])
def test_layers_that_compute_behind_a_device(folder: Path, chat_file: Path, copies: int) -> None:
    """Host memory in a GPU's place, that the disk is kept from: the same losses and gradients to the bit."""

    def gradients(placement: Placement) -> tuple[list[torch.Tensor], LayerStore | None]:
        loaded = load_model(str(folder), QuantConfig(), compute_dtype=torch.float32, placement=placement)
        attach_lora(loaded.model, load_config(lora__r=4).lora, seed=0)
        config = load_config(data__max_seq_len=128).data
        data = load_data(chat_file, load_tokenizer(str(folder)), config)
        objective = Objective(loaded.model)
        with objective.ready():
            losses = objective.loss_sums([make_batch(data, [number]) for number in range(3)])
            torch.autograd.backward(losses)
        return [*losses, *(p.grad for p in loaded.model.parameters() if p.grad is not None)], loaded.store

    expected, _ = gradients(Placement())
    device = FakeDevice(copy_seconds=0.001)
    budget = copies * 150_000
    found, store = gradients(Placement(weights="stream", memory=device, host_budget=budget))
    assert len(found) == len(expected) == 3 + 2 * 6 * 7
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert store is not None
    assert device.peak == store.nbytes
    assert (store.host_bytes > 0) == (copies > 0)
    assert device.host <= budget + 2 * STAGING_BYTES
    assert (store.traffic.bytes_from_host > 0) == (copies > 0)


def test_an_embedding_that_is_the_head_stays(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    path = stored(tmp_path, make_llama(tie_word_embeddings=True))
    resident, streamed = (
        load_model(str(path), QuantConfig(), compute_dtype=torch.float32, placement=Placement(weights=weights))
        for weights in ("resident", "stream")
    )
    assert streamed.base_sha256 == resident.base_sha256
    assert streamed.model.get_output_embeddings().weight is streamed.model.get_input_embeddings().weight
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(streamed.model(ids).logits, resident.model(ids).logits)


def test_weights_that_are_quantized_on_loading_have_no_file(
    tiny_llama: Path, make_run: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=r"not stored quantized.*halfbyte quantize"):
        train(make_run(memory__weights="stream"))


def test_plain_layers_are_computed_again_where_they_are_streamed(
    folder: Path, make_run: Callable[..., RunConfig]
) -> None:
    """What they save for the backward pass would be another layer's bytes by then. Dropout: the same both times."""
    settings = {"model__path": str(folder), "lora__dropout": 0.2, "train__gradient_accumulation_steps": 2}
    numbers, adapter = outcome(make_run("resident", **settings))
    assert numbers != outcome(make_run("without", **settings | {"lora__dropout": 0.0}))[0]
    for name, more in {"stream": {}, "again": {"train__gradient_checkpointing": True}}.items():
        config = make_run(name, **settings, **more, memory__weights="stream")
        assert not prepare(config, Observer()).objective.fused
        found, other = outcome(config)
        assert found == numbers
        assert all(torch.equal(other[name], tensor) for name, tensor in adapter.items())
