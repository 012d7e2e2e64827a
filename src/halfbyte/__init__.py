"""halfbyte: QLoRA fine-tuning under a memory budget, on the machine you have."""
