"""Bytes on disk: durable folders, PEFT's adapter folder, the state of a run."""

from halfbyte.checkpoint.adapter import Adapter, check_base, load_adapter, save_adapter, versions
from halfbyte.checkpoint.compare import Difference, compare_config
from halfbyte.checkpoint.durable import FolderWriter, write_file, write_folder
from halfbyte.checkpoint.lock import locked
from halfbyte.checkpoint.manifest import verify_folder
from halfbyte.checkpoint.rng import capture_rng, restore_rng
from halfbyte.checkpoint.run_state import (
    Checkpoint,
    checkpoint_origin,
    environment_changes,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from halfbyte.config.target import check_target

__all__ = [
    "Adapter", "Checkpoint", "Difference", "FolderWriter", "capture_rng", "check_base", "check_target",
    "checkpoint_origin", "compare_config", "environment_changes", "latest_checkpoint", "load_adapter",
    "load_checkpoint", "locked", "prune_checkpoints", "restore_rng", "save_adapter", "save_checkpoint",
    "verify_folder", "versions", "write_file", "write_folder",
]  # fmt: skip
