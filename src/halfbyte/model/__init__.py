"""A transformers model with our layers in it. (`adapt`, which imports PEFT, is for those who need it.)"""

from halfbyte.model.compute_dtype import choose_compute_dtype
from halfbyte.model.load import LoadedModel, load_model
from halfbyte.model.source import load_tokenizer, open_source

__all__ = ["LoadedModel", "choose_compute_dtype", "load_model", "load_tokenizer", "open_source"]
