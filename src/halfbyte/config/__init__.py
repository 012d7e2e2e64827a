"""What the user asked for."""

from halfbyte.config.base import LoraConfig, ModelConfig, QuantConfig
from halfbyte.config.limits import LimitsConfig, hold_to
from halfbyte.config.load import config_from_dict, field_help, load_config, settings_of
from halfbyte.config.running import DataConfig, LogConfig, MemoryConfig, OptimConfig, TrainConfig
from halfbyte.config.schema import RunConfig, to_dict

__all__ = [
    "DataConfig", "LimitsConfig", "LogConfig", "LoraConfig", "MemoryConfig", "ModelConfig", "OptimConfig",
    "QuantConfig", "RunConfig", "TrainConfig", "config_from_dict", "field_help", "hold_to", "load_config",
    "settings_of", "to_dict",
]  # fmt: skip
