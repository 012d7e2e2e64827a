"""What a merge can write: each format as one object that says what it will be, writes it, and reads it back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from halfbyte.checkpoint import Adapter
from halfbyte.checkpoint.shard_writer import write_shards
from halfbyte.checkpoint.shards import SafetensorsFolder
from halfbyte.merge.fold import Fold
from halfbyte.merge.forward import Weights
from halfbyte.merge.gguf_file import GgufPlan, read_adapter, write_adapter, write_model
from halfbyte.merge.record import CONFIG_KEY, record
from halfbyte.merge.sixteen import merged_tensors
from halfbyte.model.gguf_source import GgufFile
from halfbyte.model.load import Progress
from halfbyte.model.quantize import COPIED_FILES


@dataclass(frozen=True)
class Job:
    """What is merged, checked: nothing is wrong that could have been known."""

    fold: Fold
    base_sha256: str
    adapter: Adapter
    tokenizer: Any
    output: Path
    gguf_type: str
    say: Callable[[str], None]

    def record(self, form: str, onto: str) -> dict[str, Any]:
        """What was merged on what."""
        return record(self.fold.base, self.base_sha256, self.adapter, form=form, onto=onto)


@dataclass(frozen=True)
class Written:
    """What was written: `bytes` of tensors; its `weights`, read back; how to `use` it, for the model card."""

    bytes: int
    weights: Weights
    use: str


class Format(Protocol):
    """A format with its choices made.

    Attributes:
        form: its name and its numbers.
        max_drift: KL from base + adapter, nats per token, above which a merge is refused unless told otherwise.
        expected_bytes: about what the disk must have room for.
    """

    form: str
    max_drift: float
    expected_bytes: int

    def write(self, fold: Fold, folder: Path, on_progress: Progress | None) -> Written: ...


class SixteenBit:
    """A standard transformers folder in the base's own 16-bit dtype."""

    max_drift = 0.01

    def __init__(self, job: Job) -> None:
        self._job, self._dtype = job, job.fold.base.dtype()
        name = str(self._dtype).removeprefix("torch.")
        self.form = f"16bit {name}"
        self.expected_bytes = 2 * sum(p.numel() for p in job.fold.base.model.parameters())
        job.say(f"dtype {name}: that of the base's weights, or bfloat16 for a base in float32")

    def write(self, fold: Fold, folder: Path, on_progress: Progress | None) -> Written:
        header = sum(2 * len(name) + 200 for name in fold.base.names)
        _, count = write_shards(folder, merged_tensors(fold, self._dtype, on_progress), header_bytes=header)
        write_config(self._job, self._dtype, self._job.record(self.form, fold.onto), folder)
        return Written(count, SafetensorsFolder(folder).read, transformers_use(self._job.output))


class Gguf:
    """One .gguf file."""

    def __init__(self, job: Job) -> None:
        self._job, self._plan = job, GgufPlan(job.fold.base, job.gguf_type)
        self.form = f"gguf {job.gguf_type}"
        self.max_drift = 0.01 if job.gguf_type in ("F16", "BF16", "Q8_0") else 0.2
        self.expected_bytes = sum(
            self._plan.nbytes(name, tuple(job.fold.base.model.get_parameter(name).shape))
            for name in job.fold.base.names
        )

    def write(self, fold: Fold, folder: Path, on_progress: Progress | None) -> Written:
        file = folder / f"{self._job.output.name}-{self._job.gguf_type}.gguf"
        merged = self._job.record(self.form, fold.onto)
        write_model(fold, self._plan, self._job.tokenizer, merged, file, on_progress)
        weights = GgufFile(file, fold.base.source.config).read
        return Written(file.stat().st_size, weights, f"```bash\nllama-cli -m {file.name}\n```\n")


class GgufLora:
    """The adapter alone, as a .gguf file for llama.cpp's --lora."""

    form, max_drift = "gguf-lora", 0.01

    def __init__(self, job: Job) -> None:
        self._job, self._plan = job, GgufPlan(job.fold.base, "F16")
        self.expected_bytes = sum(update.a.nbytes + update.b.nbytes for update in job.fold.updates.values())

    def write(self, fold: Fold, folder: Path, on_progress: Progress | None) -> Written:
        file = folder / f"{self._job.output.name}-lora.gguf"
        write_adapter(fold.updates, self._plan, self._job.record(self.form, fold.onto), file)
        there = replace(fold, updates=read_adapter(self._plan, fold.updates, file))
        use = f"```bash\nllama-cli -m BASE.gguf --lora {file.name}\n```\n"
        return Written(file.stat().st_size, there.weight, use)


FORMATS: dict[str, Callable[[Job], Format]] = {"16bit": SixteenBit, "gguf": Gguf, "gguf-lora": GgufLora}


def write_config(job: Job, dtype: torch.dtype, merged: dict[str, Any], folder: Path, **more: Any) -> None:
    """config.json without the base's quantization fields, tokenizer, chat template, generation config.

    Args:
        more: further fields of config.json.
    """
    source = job.fold.base.source
    config = source.config
    config.dtype = dtype
    config.architectures = [type(job.fold.base.model).__name__]
    for key, value in {CONFIG_KEY: merged, **more}.items():
        setattr(config, key, value)
    config.save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)
    for file in COPIED_FILES:
        if source.path.is_dir() and (source.path / file).is_file():
            shutil.copyfile(source.path / file, folder / file)


def transformers_use(output: Path) -> str:
    """For the model card."""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{output.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{output.name}")\n```\n'
    )
