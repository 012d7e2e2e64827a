"""AdamW, its schedule, and what goes with it."""

from halfbyte.optim.adamw import AdamW
from halfbyte.optim.clip import clip_grad_norm
from halfbyte.optim.groups import lora_param_groups
from halfbyte.optim.schedule import learning_rate

__all__ = ["AdamW", "clip_grad_norm", "learning_rate", "lora_param_groups"]
