"""The plan against what is loaded, its answers to a budget, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.config import RunConfig, load_config
from halfbyte.errors import ConfigError, ModelError
from halfbyte.plan import Machine, Work, apply_choices, disk, plan, planner, worst_case
from halfbyte.plan.base import read_base
from halfbyte.plan.budget import container_limit
from halfbyte.plan.gpu import Gpu
from halfbyte.plan.picture import draw_plan
from halfbyte.plan.time import seconds_per_step

MACHINE = Machine(threads=1, bf16_units=False, runtime=400_000_000)

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": 4096}, "qwen2": {"vocab_size": 152064}, "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 256}, "phi3": {}, "unheard_of": {}, "gemma2": {"attn_logit_softcapping": 50.0},
    "mixtral": {"num_local_experts": 8},
}  # fmt: skip


def folder_of(path: Path, **changes: object) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    return str(path)


def config_of(path: str, **settings: object) -> RunConfig:
    return load_config(model__path=path, quant__compute_dtype="float32", **settings)


@pytest.mark.parametrize("embeddings", ["as_stored", "int8"])
def test_the_base_is_counted_to_the_byte(tiny_llama: Path, embeddings: str) -> None:
    """Against the inventory of the model as it is loaded, scales and all."""
    import torch

    from halfbyte.model import load_model

    config = config_of(str(tiny_llama), quant__embeddings=embeddings)
    base = read_base(config.model.path, config.quant, "float32")
    inventory = load_model(str(tiny_llama), config.quant, compute_dtype=torch.float32).inventory
    by_group: dict[str, int] = {}
    for row in inventory.rows:
        by_group[row.group] = by_group.get(row.group, 0) + row.bytes
    assert base.exact
    assert base.linears == by_group["quantized linears"]
    assert base.embeddings == by_group["embeddings"]
    assert base.head == by_group.get("head", 0)
    assert base.other == by_group["norms and biases"]


def test_a_config_alone_gives_the_same_sizes(tiny_llama: Path, tmp_path: Path) -> None:
    stored = json.loads((tiny_llama / "config.json").read_text())
    alone = folder_of(tmp_path / "alone", **stored)
    config = config_of(str(tiny_llama))
    whole, guessed = (read_base(path, config.quant, "float32") for path in (config.model.path, alone))
    assert (guessed.linears, guessed.embeddings, guessed.head) == (whole.linears, whole.embeddings, whole.head)
    assert not guessed.exact


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_plan_that_grows_with_the_work(family: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path / family, model_type=family, **FAMILIES[family])
    peaks = [
        plan(config_of(path, data__max_seq_len=length), machine=MACHINE).peak_memory for length in (128, 512, 2048)
    ]
    assert peaks == sorted(peaks)
    made = plan(config_of(path, data__eval="held_out.jsonl"), machine=MACHINE)
    assert sum(made.terms.values()) == made.peak_memory == max(made.phases.values())
    assert list(made.phases) == ["load", "train", "evaluate", "save", "generate"]
    assert any("estimated" in note for note in made.notes) == (family in ("unheard_of", "gemma2", "mixtral"))


def test_a_budget_is_met_with_the_cheapest_choices_first(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model")
    settings = {"train__micro_batch_size": 4, "data__max_seq_len": 512}
    free = plan(config_of(path, **settings), machine=MACHINE)
    assert free.changes == ()
    smaller = plan(config_of(path, **settings, memory__budget=str(int(free.peak_memory * 0.8))), machine=MACHINE)
    assert smaller.fits
    assert smaller.choices["micro_batch_size"] * smaller.choices["gradient_accumulation_steps"] == 4
    assert not smaller.choices["gradient_checkpointing"]
    assert smaller.largest is not None
    assert smaller.largest["micro_batch_size"] == smaller.choices["micro_batch_size"] or smaller.largest["r"] > 16
    least = plan(config_of(path, **settings, memory__budget=str(free.smallest_memory)), machine=MACHINE)
    assert least.fits
    assert least.choices["gradient_checkpointing"]
    assert apply_choices(config_of(path, **settings), least).train.gradient_checkpointing
    refused = plan(config_of(path, **settings, memory__budget=str(free.smallest_memory - 1)), machine=MACHINE)
    assert not refused.fits
    assert refused.smallest_memory == free.smallest_memory


def test_what_is_said_to_be_largest_fits_and_more_does_not(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model")
    made = plan(config_of(path, memory__budget="12GB"), machine=MACHINE)
    assert made.largest is not None
    for setting, key in (("train__micro_batch_size", "micro_batch_size"), ("lora__r", "r")):
        chosen = {"train__gradient_checkpointing": made.choices["gradient_checkpointing"]}
        peaks = [
            plan(config_of(path, **chosen, **{setting: made.largest[key] + more}), machine=MACHINE).peak_memory
            for more in (0, 1)
        ]
        assert peaks[0] <= 12e9 < peaks[1], key


def test_the_most_layers_are_those_of_a_larger_model(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model")
    made = plan(config_of(path, memory__budget="12GB"), machine=MACHINE)
    assert made.largest is not None
    most = made.largest["num_hidden_layers"]
    assert most > LLAMA_8B["num_hidden_layers"]
    for layers, fits in ((most, True), (most + 2, False)):  # sizes are scaled, rounded up, and the last norm with them
        larger = folder_of(tmp_path / f"model{layers}", num_hidden_layers=layers)
        chosen = {"train__gradient_checkpointing": made.choices["gradient_checkpointing"]}
        assert (plan(config_of(larger, **chosen), machine=MACHINE).peak_memory <= 12e9) == fits


def test_merging_is_told_beside_the_run(tmp_path: Path) -> None:
    made = plan(config_of(folder_of(tmp_path / "model")), machine=MACHINE)
    vocabulary, width = LLAMA_8B["vocab_size"], LLAMA_8B["hidden_size"]
    known = (
        4 * vocabulary * (5 * 512 + width)
    )  # five tensors of logits, the embedding in float32; a layer's beside them
    assert known < made.merge_memory["16bit"] - made.terms["runtime"] < 1.1 * known
    assert made.merge_memory["16bit"] < made.merge_memory["4bit"]


def test_the_largest_is_none_the_model_cannot_take(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model", max_position_embeddings=4096)
    made = plan(config_of(path, memory__budget="900GB"), machine=MACHINE)
    assert made.largest is not None
    assert (made.largest["max_seq_len"], made.largest["r"]) == (4096, LLAMA_8B["hidden_size"])


def test_the_smallest_budget_keeps_no_more_moments_than_were_allowed(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model")
    free, told = (plan(config_of(path, **more), machine=MACHINE) for more in ({}, {"memory__optimizer_budget": "1MB"}))
    assert told.smallest_memory < free.smallest_memory


def test_what_the_model_or_the_machine_cannot_take_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder_of(tmp_path / "model", max_position_embeddings=4096)
    monkeypatch.setattr(planner, "physical_memory", lambda: 1 << 50)
    made = plan(config_of(path, data__max_seq_len=5000), machine=MACHINE)
    assert any("5000 is more than the 4096 positions" in note for note in made.notes)
    assert not any("this machine has" in note for note in made.notes)
    monkeypatch.setattr(planner, "physical_memory", lambda: 1_000_000_000)
    made = plan(config_of(path), machine=MACHINE)
    assert any("this machine has 1.0 GB: give --memory" in note for note in made.notes)


def test_no_more_layers_stay_than_there_are(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model")
    every, more = (
        plan(config_of(path, memory__weights="stream", memory__resident_layers=count), machine=MACHINE)
        for count in (32, 99)
    )
    assert every.terms == more.terms


def test_known_data_takes_less_than_the_worst_case(tmp_path: Path) -> None:
    config = config_of(folder_of(tmp_path / "model"), data__max_seq_len=1024)
    worst = plan(config, machine=MACHINE).peak_memory
    assert plan(config, machine=MACHINE, work=Work(tokens=1024, targets=1024, longest=1024)).peak_memory == worst
    assert plan(config, machine=MACHINE, work=Work(tokens=700, targets=90, longest=300)).peak_memory < worst


def test_it_needs_no_torch(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model")
    code = (
        "import sys; from halfbyte.cli.main import main; "
        f"code = main(['plan', '--model', {path!r}, '--json']); code and sys.exit(code); "
        "print({'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, result, loaded = done.stdout.strip().splitlines()
    assert loaded == "set()"
    fields = {"fits", "peak_memory", "terms", "choices", "seconds_per_step", "smallest_memory", "phases"}
    assert fields <= set(json.loads(result))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model"):
        plan(config_of(str(tmp_path / "nothing")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="hidden_size"):
        plan(config_of(str(tmp_path)))
    with pytest.raises(ConfigError, match="is not a size"):
        config_of(str(tmp_path), memory__budget="much")


def test_the_container_limit_is_the_least_on_the_way_up(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    inner = root / "memory" / "docker" / "abc"
    inner.mkdir(parents=True)
    (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (root / "memory" / "docker" / "memory.limit_in_bytes").write_text("4000000000\n")
    (inner / "memory.limit_in_bytes").write_text("5000000000\n")
    (proc / "cgroup").write_text("5:devices:/\n4:memory:/docker/abc\n0::/\n")
    found = container_limit(proc, root)
    assert found is not None
    assert found.bytes == 4_000_000_000
    (root / "user.slice").mkdir()
    (root / "user.slice" / "memory.max").write_text("3000000000\n")
    (proc / "cgroup").write_text("0::/user.slice/scope\n")
    found = container_limit(proc, root)
    assert found is not None
    assert found.bytes == 3_000_000_000
    (root / "user.slice" / "memory.max").write_text("max\n")
    assert container_limit(proc, root) is None


def stored_in_4_bits(path: Path) -> str:
    """The header of a large model in 4 bits: a file with holes in the place of its bytes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 64}))
    entries: dict[str, object] = {}
    position = 0
    shapes = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
              "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
              "mlp.down_proj": (4096, 14336)}  # fmt: skip
    tensors: dict[str, tuple[str, list[int], int]] = {
        f"{name}.weight": ("BF16", [128256, 4096], 128256 * 4096 * 2) for name in ("model.embed_tokens", "lm_head")
    }
    for layer in range(64):
        for name, (out, into) in shapes.items():
            count = out * into
            place = f"model.layers.{layer}.{name}.weight"
            tensors[place] = ("U8", [count // 2, 1], count // 2)
            tensors[f"{place}.absmax"] = ("U8", [count // 64], count // 64)
            tensors[f"{place}.nested_absmax"] = ("F32", [count // 64 // 256], count // 64 // 64)
            tensors[f"{place}.quant_map"] = ("F32", [16], 64)
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(entries).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)
    return str(path)


def test_what_is_larger_than_the_budget_is_streamed(tmp_path: Path) -> None:
    """14 billion weights in 4 bits are 7.2 GB; 5 GB are enough, with as many layers in memory as there is room for."""
    path = stored_in_4_bits(tmp_path / "large")
    config = config_of(path, data__max_seq_len=512, memory__budget="5GB")
    made = plan(config, machine=MACHINE)
    chosen = apply_choices(config, made)
    assert made.fits
    assert made.peak_memory <= 5e9
    assert chosen.memory.weights == "stream"
    assert 0 < chosen.memory.resident_layers < 61
    one_more = load_config(**{
        "model__path": path, "quant__compute_dtype": "float32", "data__max_seq_len": 512, "optim__paged": True,
        "train__gradient_checkpointing": True, "memory__weights": "stream", "memory__activations": "disk",
        "memory__optimizer_budget": chosen.memory.optimizer_budget,
        "memory__resident_layers": chosen.memory.resident_layers + 1,
    })  # fmt: skip
    assert plan(one_more, machine=MACHINE).peak_memory > 5e9
    resident = plan(config_of(path, data__max_seq_len=512), machine=MACHINE)
    assert resident.peak_memory > 9e9
    assert apply_choices(config, resident).memory.weights == "resident"


def test_layers_that_stay_are_as_many_as_fit_on_a_gpu_whose_allocator_rounds_up(tmp_path: Path) -> None:
    path = stored_in_4_bits(tmp_path / "large")
    gpu = Machine(gpu=Gpu(name="any", memory=24 * 10**9, capability=8))
    for budget in (5e9, 6e9, 7e9):
        made = plan(config_of(path, memory__weights="stream", memory__budget=budget), machine=gpu)
        assert made.fits
        assert made.choices["resident_layers"] > 0


def test_more_micro_batches_of_streamed_layers_keep_more_inputs(tmp_path: Path) -> None:
    """They pass a layer together: every layer's input of every micro-batch waits for the backward pass."""
    path = stored_in_4_bits(tmp_path / "large")
    settings = {"memory__weights": "stream", "train__gradient_checkpointing": True, "data__max_seq_len": 256}
    one, four = (
        plan(config_of(path, train__gradient_accumulation_steps=count, **settings), machine=MACHINE)
        for count in (1, 4)
    )
    inputs = 64 * 256 * 4096 * 4
    assert four.terms["activations_saved"] - one.terms["activations_saved"] >= 3 * inputs


def test_the_picture_is_drawn_against_the_budget(tmp_path: Path) -> None:
    config = config_of(folder_of(tmp_path / "model"), memory__budget="12GB", data__max_seq_len=512)
    draw_plan(config, plan(config, machine=MACHINE), MACHINE, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = config_of(folder_of(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"p\.xyz: no picture is written under this ending\. Give \.png"):
        draw_plan(config, plan(config, machine=MACHINE), MACHINE, tmp_path / "p.xyz")


@pytest.mark.parametrize("weights", ["stream", "mmap"])
def test_a_base_that_is_not_stored_in_4_bits_cannot_stay_on_disk(tiny_llama: Path, weights: str) -> None:
    with pytest.raises(ConfigError, match=r"not stored quantized.*halfbyte quantize"):
        plan(config_of(str(tiny_llama), memory__weights=weights), machine=MACHINE)


def test_a_step_takes_as_long_as_computing_or_as_the_disk(tmp_path: Path) -> None:
    """Twice as fast a processor halves the first, and does nothing for a run that waits for its disk."""
    config = config_of(folder_of(tmp_path / "model"), data__max_seq_len=512)
    base, work = read_base(config.model.path, config.quant, "float32"), worst_case(config)
    streamed = replace(config, memory=replace(config.memory, weights="stream"))
    slow, fast = (replace(MACHINE, gflops={"float32": speed}) for speed in (100.0, 200.0))
    assert seconds_per_step(config, base, MACHINE, work, None) is None
    computing = seconds_per_step(config, base, slow, work, None)
    assert computing == 2 * (seconds_per_step(config, base, fast, work, None) or 0)
    assert 0.9 < computing / (4 * 8e9 * 512 / 100e9) < 1.3  # 2 operations a weight and token, up and down; the head
    assert seconds_per_step(streamed, base, slow, work, None) is None
    assert seconds_per_step(streamed, base, slow, work, 1e12) == computing
    for machine in (slow, fast):  # both passes read every layer
        waiting = seconds_per_step(streamed, base, machine, work, 1e7)
        assert waiting == pytest.approx(2 * base.linears / 1e7, rel=0.02)


def test_the_disk_is_tried_on_the_models_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.read_speed(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 16))
    assert disk.read_speed(tmp_path) is None  # too short to say anything
    monkeypatch.setattr(disk, "TRIED_BYTES", 1 << 16)
    speed = disk.read_speed(tmp_path)
    if speed is None:
        pytest.skip("the file system of the temporary folder takes no direct I/O")
    assert 1e5 < speed < 1e12
