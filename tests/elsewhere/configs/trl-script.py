"""As scripts with TRL stand in many repositories."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

MODEL, RATE = "example/qwen-0.5b", 1e-4
RANK = 4
bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained("example/qwen-0.5b", quantization_config=bnb, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
train = load_dataset("json", data_files="train.jsonl")["train"]
lora = LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
arguments = SFTConfig(output_dir="2024", learning_rate=1e-4, max_length=512, bf16=torch.cuda.is_bf16_supported())
SFTTrainer(model=model, args=arguments, train_dataset=train, peft_config=lora).train()
