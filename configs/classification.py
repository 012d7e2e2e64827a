"""Text classification on a 4-bit base: adapters on its layers, a new head in full precision.

    python configs/classification.py --model MODEL --data labelled.jsonl --output classifier

Data: JSON lines of text and label. One in ten is held out; its accuracy is printed at the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from halfbyte import HalfbyteConfig


def main() -> None:
    """Train a classifier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a transformers folder or hub id")
    parser.add_argument("--data", required=True, type=Path, help="JSON lines: text, label")
    parser.add_argument("--output", required=True, help="folder for the adapter and the head")
    parser.add_argument("--steps", type=int, default=-1, help="optimizer steps; default: three passes over the data")
    arguments = parser.parse_args()

    rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    samples = [
        {**tokenizer(row["text"], truncation=True, max_length=512), "labels": labels.index(row["label"])}
        for row in rows
    ]
    held_out, train = samples[::10], [sample for i, sample in enumerate(samples) if i % 10]

    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(labels), quantization_config=HalfbyteConfig(),
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    )  # fmt: skip
    model.config.pad_token_id = tokenizer.pad_token_id
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"))
    on_cpu = not torch.cuda.is_available()
    trainer = Trainer(
        model=model,
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        args=TrainingArguments(
            output_dir=arguments.output, num_train_epochs=3, max_steps=arguments.steps, learning_rate=5e-4,
            per_device_train_batch_size=8, report_to="none", use_cpu=on_cpu, bf16=not on_cpu, save_strategy="no",
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(arguments.output)
    guesses = trainer.predict(held_out).predictions.argmax(-1)
    right = sum(int(guess) == sample["labels"] for guess, sample in zip(guesses, held_out, strict=True))
    print(f"{right} of {len(held_out)} held-out samples right")


if __name__ == "__main__":
    main()
