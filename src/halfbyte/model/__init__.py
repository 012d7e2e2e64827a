"""A transformers model with our layers in it."""

from halfbyte.model.adapt import adapter_state, attach_lora, attach_saved, load_adapter_state
from halfbyte.model.compute_dtype import choose_compute_dtype
from halfbyte.model.load import LoadedModel, load_model
from halfbyte.model.source import load_tokenizer, open_source

__all__ = [
    "LoadedModel", "adapter_state", "attach_lora", "attach_saved", "choose_compute_dtype", "load_adapter_state",
    "load_model", "load_tokenizer", "open_source",
]  # fmt: skip
