"""How fast this machine takes a training step, tried on a small model: for plans before the first run."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.checkpoint.shards import SINGLE_NAME
from halfbyte.config import load_config
from halfbyte.data import Batch
from halfbyte.kernels import panel_rule
from halfbyte.kernels.buffers import steady_memory
from halfbyte.model.adapt import attach_lora
from halfbyte.model.load import load_model
from halfbyte.plan import Machine, plan
from halfbyte.train.objective import Objective

TOKENS, REPEATS = 512, 3


def step_gflops(machine: Machine, dtypes: tuple[str, ...]) -> dict[str, float]:
    """Floating-point operations, 1e9 a second, of a forward and backward pass in each of `dtypes`: the median of a few
    passes of 512 tokens through two layers of 1024 features, random weights. Seconds."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-calibration-") as folder, steady_memory():
        _write_model(Path(folder))
        return {dtype: _measure(folder, machine, dtype) for dtype in dtypes}


def _measure(folder: str, machine: Machine, dtype: str) -> float:
    config = load_config(model__path=folder, quant__compute_dtype=dtype, data__max_seq_len=TOKENS)
    operations = plan(
        config, machine=replace(machine, threads=torch.get_num_threads(), panel_rows=panel_rule().rows)
    ).pass_operations
    loaded = load_model(folder, config.quant, compute_dtype=getattr(torch, dtype))
    attach_lora(loaded.model, config.lora, seed=0)
    objective = Objective(loaded.model.train())
    ids = torch.arange(TOKENS).unsqueeze(0) % loaded.model.config.vocab_size
    labels = ids.clone()
    labels[0, 0] = -100
    batch = Batch(
        input_ids=ids, labels=labels, position_ids=torch.arange(TOKENS).unsqueeze(0), num_tokens=TOKENS,
        seq_starts=torch.tensor([0, TOKENS], dtype=torch.int32), num_targets=TOKENS - 1,
    )  # fmt: skip
    seconds = []
    with objective.ready():
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            objective.loss_sum(batch).backward()
            seconds.append(time.perf_counter() - started)
    return operations / sorted(seconds[1:])[REPEATS // 2] / 1e9  # the first pass touches memory


def _write_model(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16,
            num_key_value_heads=8, vocab_size=4096, tie_word_embeddings=True, dtype="bfloat16",
        )).bfloat16()  # fmt: skip
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / SINGLE_NAME)
    model.config.save_pretrained(folder)
