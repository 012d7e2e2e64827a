"""Every reader of files that people bring, and what it may do with a bad one: refuse it, in one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from faults.mutate import Mutation, change_header, change_value
from faults.scenarios import CONFIG, tensors
from gguf import GGUFWriter
from safetensors.torch import save_file

from halfbyte.checkpoint import load_adapter, load_checkpoint
from halfbyte.checkpoint.shards import INDEX_NAME, SINGLE_NAME, SafetensorsFolder
from halfbyte.config import QuantConfig, load_config
from halfbyte.config.gguf_header import read_gguf_header
from halfbyte.data.records import RecordReader
from halfbyte.plan.base import read_base


@dataclass(frozen=True)
class Reader:
    """A reader, and a good file for it.

    Attributes:
        file: the file that is changed, below the folder.
        make: writes the good files into an empty folder.
        read: reads them; raises HalfbyteError for what is wrong.
        mutations: beside those of bytes.
        oracle: raises what another reader finds wrong with the same file.
    """

    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    mutations: tuple[Mutation, ...] = ()
    oracle: Callable[[Path], object] | None = None


def _make_safetensors(folder: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.arange(i * 6.0).view(i, 6) for i in range(1, 5)}
    save_file({**tensors, "b": torch.ones(3, dtype=torch.bfloat16)}, folder / SINGLE_NAME, metadata={"format": "pt"})


def _read_safetensors(folder: Path) -> None:
    reader = SafetensorsFolder(folder)
    for name in reader.names():
        reader.read(name)


def _safe_open(folder: Path) -> None:
    with safetensors.safe_open(folder / SINGLE_NAME, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (it is no dict)
            file.get_tensor(name)


def _make_index(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    index = {"metadata": {"total_size": 20}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def _make_adapter(folder: Path) -> None:
    save_file(tensors(1), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "lora_dropout": 0.0, "bias": "none"}))
    (folder / "halfbyte.json").write_text(json.dumps({"base_sha256": "aa" * 32, "quant": {"quant_type": "nf4"}}))


def _make_jsonl(folder: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i} ä"}, {"role": "assistant", "content": "a" * i + "b"}]}
        for i in range(6)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_jsonl(folder: Path) -> None:
    for _ in RecordReader(folder / "data.jsonl"):
        pass


def _change_line(data: bytes, chance: object) -> bytes:
    lines = data.split(b"\n")
    number = chance.randrange(len(lines))  # type: ignore[attr-defined]
    lines[number] = change_value(lines[number] or b"{}", chance)  # type: ignore[arg-type]
    return b"\n".join(lines)


def _make_gguf(folder: Path) -> None:
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list([f"token{i}" for i in range(50)])
    writer.add_token_scores([0.5] * 50)
    writer.add_chat_template("{{ messages }}")
    for i in range(3):
        writer.add_tensor(f"blk.{i}.attn_q.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _make_config(folder: Path) -> None:
    _make_safetensors(folder)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 320, "head_dim": 16,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rope_scaling": None, "max_position_embeddings": 512,
    }))  # fmt: skip


def _make_toml(folder: Path) -> None:
    (folder / "run.toml").write_text(
        '[model]\npath = "m"\n[lora]\nr = 8\nlora_alpha = 16.0\ntarget_modules = ["q_proj"]\n[optim]\nlr = 1e-4\n'
        'betas = [0.9, 0.99]\n[train]\noutput = "out"\nsteps = 3\n[memory]\nbudget = "8GB"\n[data]\npacking = true\n'
    )


READERS = {
    "safetensors": Reader(
        SINGLE_NAME, _make_safetensors, _read_safetensors, (change_header,) * 4, _safe_open
    ),
    "index": Reader(INDEX_NAME, _make_index, SafetensorsFolder, (change_value,)),
    "adapter weights": Reader("adapter_model.safetensors", _make_adapter, load_adapter, (change_header,)),
    "adapter config": Reader("adapter_config.json", _make_adapter, load_adapter, (change_value,)),
    "adapter info": Reader("halfbyte.json", _make_adapter, load_adapter, (change_value,)),
    "jsonl": Reader("data.jsonl", _make_jsonl, _read_jsonl, (_change_line,)),
    "gguf": Reader("model.gguf", _make_gguf, lambda folder: read_gguf_header(folder / "model.gguf")),
    "config.json": Reader(
        "config.json", _make_config, lambda folder: read_base(str(folder), QuantConfig(), "float32"), (change_value,)
    ),
    "toml": Reader("run.toml", _make_toml, lambda folder: load_config(folder / "run.toml")),
}  # fmt: skip
CHECKPOINT_FILES = (
    "adapter_model.safetensors", "adapter_config.json", "halfbyte.json", "optimizer.safetensors", "rng.safetensors",
    "run_state.json", "manifest.json",
)  # fmt: skip


def read_checkpoint(folder: Path) -> object:
    """The one that SCENARIOS["checkpoint"] prepares."""
    return load_checkpoint(folder / "run" / "checkpoint-1")
