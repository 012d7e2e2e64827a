"""What the user asked for."""

from halfbyte.config.load import config_from_dict, field_help, load_config
from halfbyte.config.schema import (
    DataConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
    to_dict,
)

__all__ = [
    "DataConfig", "LoraConfig", "MemoryConfig", "ModelConfig", "OptimConfig", "QuantConfig", "RunConfig",
    "TrainConfig", "config_from_dict", "field_help", "load_config", "to_dict",
]  # fmt: skip
