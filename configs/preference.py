"""Preference tuning (DPO) through TRL on a 4-bit base.

    python configs/preference.py --model MODEL --data pairs.jsonl --output preferred

Data: JSON lines of prompt, chosen, rejected. The reference is the base with the adapter off: there is no second model.
The adapter is PEFT's; halfbyte eval, chat, serve and merge take it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from halfbyte import HalfbyteConfig


def main() -> None:
    """Train on pairs of answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a transformers folder or hub id")
    parser.add_argument("--data", required=True, type=Path, help="JSON lines: prompt, chosen, rejected")
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=-1, help="optimizer steps; default: one pass over the data")
    arguments = parser.parse_args()

    on_cpu = not torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=HalfbyteConfig())
    rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    trainer = DPOTrainer(
        model=model,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=DPOConfig(
            output_dir=arguments.output, num_train_epochs=1, max_steps=arguments.steps, learning_rate=5e-5, beta=0.1,
            per_device_train_batch_size=1, gradient_accumulation_steps=8, max_length=1024, report_to="none",
            use_cpu=on_cpu, bf16=not on_cpu, save_strategy="no", logging_steps=1,
        ),
    )  # fmt: skip
    print("reference: the base with the adapter off; no second model is loaded")
    trainer.train()
    trainer.save_model(arguments.output)


if __name__ == "__main__":
    main()
