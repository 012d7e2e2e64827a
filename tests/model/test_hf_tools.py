"""The tools of docs/tools.md with the real libraries, as they are; its snippets are run from the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from trainers import arguments, packed, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from halfbyte.model.hf_config import HalfbyteConfig

PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def snippet(title: str) -> str:
    """The Python under a heading of the page."""
    (found,) = re.findall(rf"^## {title}\n.*?^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def rows(count: int = 4) -> list[dict[str, Any]]:
    ids = torch.randint(3, 128, (count, 16), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def test_our_loss_and_optimizer_in_transformers_trainer(llama: Any, tmp_path: Path) -> None:
    """The page's ChunkedTrainer: the first losses are the Trainer's own to rounding, and it learns."""
    options = arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    given = {"arguments": TrainingArguments(**options), "dataset": rows()}
    torch.manual_seed(0)
    exec(
        compile(snippet("The chunked loss in a Trainer").replace("MODEL", str(llama.folder)), "tools.md", "exec"),
        given,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    before = packed(model)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    stock = Trainer(model, TrainingArguments(**options | {"max_steps": 1}), train_dataset=rows())
    stock.train()

    ours: Any = given["trainer"]
    first, expected = ours.state.log_history[0]["loss"], stock.state.log_history[0]["loss"]
    assert first == pytest.approx(expected, rel=2e-5)  # logged to 4 digits after the point
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(packed(ours.model), before, strict=True))


@pytest.mark.filterwarnings("ignore")  # TRL's own, of generation settings
def test_trl_grpo_trainer(llama: Any, tmp_path: Path) -> None:
    """Answers are sampled from the 4-bit model and its adapters; a reward for even words is learned from."""
    trl = pytest.importorskip("trl", reason="needs the package trl")
    from datasets import Dataset

    def even(completions: list[str], **_: Any) -> list[float]:
        words = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
        return [sum(number % 2 == 0 for number in numbers) / max(len(numbers), 1) for numbers in words]

    model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    before = packed(model)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=even,
        args=trl.GRPOConfig(
            **arguments(tmp_path, gradient_checkpointing=False, max_steps=4, learning_rate=2e-2),
            num_generations=4, max_completion_length=8,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(8)]),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()

    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 4
    assert all(0 <= reward <= 1 for reward in rewards)
    assert all(torch.equal(a, b) for a, b in zip(packed(trainer.model), before, strict=True))
    adapters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert adapters
    assert all(".lora_" in name for name in adapters)
    assert all(p.any() for name, p in adapters.items() if "lora_B" in name)


def test_adapters_are_switched_and_mixed_in_one_batch(llama: Any, tmp_path: Path) -> None:
    """Rows of one batch under two adapters and none: each row's logits are those of its adapter alone."""
    base = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        get_peft_model(
            AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig()), config
        ).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one").eval()
    model.load_adapter(tmp_path / "two", adapter_name="two")
    ids = torch.arange(3, 15).expand(3, -1)
    with torch.no_grad():
        alone = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            alone[name] = model(ids[:1]).logits
        with model.disable_adapter():
            alone["__base__"] = model(ids[:1]).logits
        mixed = model(ids, adapter_names=["one", "two", "__base__"]).logits
    for row, (name, logits) in enumerate(alone.items()):
        torch.testing.assert_close(mixed[row : row + 1], logits, atol=2e-6, rtol=0)
        assert name == "one" or (logits - alone["one"]).abs().max() > 0.1


SCRIPT = """
import sys, torch
from accelerate import Accelerator
from halfbyte import HalfbyteConfig
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

folder, output = sys.argv[1:]
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HalfbyteConfig())
model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
ids = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))
loader = DataLoader(ids, batch_size=4 // accelerator.num_processes)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    optimizer.step()
    optimizer.zero_grad()
if accelerator.is_main_process:
    save_file(get_peft_model_state_dict(accelerator.unwrap_model(model)), output)
"""


def test_accelerate_launch(llama: Any, tmp_path: Path) -> None:
    """Two processes of half the batch come to the adapter of a plain loop in one."""
    from safetensors.torch import load_file

    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    output = tmp_path / "adapter.safetensors"
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
         str(tmp_path / "script.py"), str(llama.folder), str(output)],
        check=True, capture_output=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=HalfbyteConfig())
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for batch in torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0)).split(4):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected, found = get_peft_model_state_dict(model), load_file(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.any()
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


TASK = """
task: own_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: DATA
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    """A folder with a local task of four questions."""
    asked = [
        {"question": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{3 * i + 7}"], "answer": i % 2} for i in range(4)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    (folder / "own.yaml").write_text(TASK.replace("DATA", str(folder / "data.jsonl")), encoding="utf-8")
    return folder


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_lm_evaluation_harness(llama: Any, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model hf` on a 4-bit folder, by bitsandbytes, and the harness on our kernels: the same answers."""
    pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, config = tmp_path / "base-4bit", HalfbyteConfig(bnb_4bit_compute_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(llama.folder, quantization_config=config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (command,) = re.findall(r"^lm_eval (.*)$", PAGE, re.MULTILINE)
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *command.split(), "--output_path", "out", "--log_samples"],
        check=True, capture_output=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    theirs = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])

    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    exec(compile(snippet("lm-evaluation-harness"), "tools.md", "exec"), given)
    ours = sorted(given["results"]["samples"]["own_choice"], key=lambda sample: sample["doc_id"])
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        for (a, _), (b, _) in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
            # bitsandbytes' CPU kernels round to bfloat16 in float32 models too: up to 7e-3 seen, 2e-3 in logits.
            assert float(a) == pytest.approx(float(b), abs=2e-2)
