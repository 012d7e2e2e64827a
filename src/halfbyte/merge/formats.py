"""What a merge can write: each format as one object that says what it will be, writes it, and reads it back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.shard_writer import ShardWriter, write_shards
from halfbyte.checkpoint.shards import SafetensorsFolder
from halfbyte.config.formats import bits_of
from halfbyte.data import calibration_text
from halfbyte.errors import ConfigError
from halfbyte.merge import gguf_blocks
from halfbyte.merge.adapter_folder import AdapterFolder
from halfbyte.merge.base import open_base
from halfbyte.merge.drift import probe_of
from halfbyte.merge.feedback import FeedbackWriter
from halfbyte.merge.fold import Fold
from halfbyte.merge.four import FourBitShards
from halfbyte.merge.gguf_file import GgufPlan, ModelFile, read_adapter, write_adapter, write_model
from halfbyte.merge.job import Format, Job, Written
from halfbyte.merge.memory import text_bytes
from halfbyte.merge.record import CONFIG_KEY
from halfbyte.merge.sixteen import merged_tensors
from halfbyte.model.experts import expert_layers
from halfbyte.model.gguf_source import GgufFile
from halfbyte.model.hf_config import HalfbyteConfig
from halfbyte.model.lent import LentModel
from halfbyte.model.load import Progress
from halfbyte.model.quantize import COPIED_FILES
from halfbyte.model.targets import linear_names
from halfbyte.plan.merging import CALIBRATION_TOKENS


class SixteenBit:
    """A standard transformers folder in the base's own 16-bit dtype."""

    max_drift, work_bytes, mapped_bytes = 0.01, 0, 0

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
        there = SafetensorsFolder(folder)
        return Written(count, lambda name: there.read(fold.base.file_name(name)), transformers_use(self._job.output))


class FourBit:
    """A folder in bitsandbytes' 4-bit format or our own, in the recipe of the base."""

    max_drift, mapped_bytes = 0.2, 0

    def __init__(self, job: Job) -> None:
        self._job, self._recipe = job, job.fold.base.quant.with_recipe(job.fold.base.recipe())
        text = training_text(job)
        if text is None:
            raise ConfigError(
                "is not set", where="data.train", why="codes are chosen on text like that which was trained on",
                fix="Give --set data.train=FILE",
            )  # fmt: skip
        self._text = text
        self.work_bytes = text_bytes(job.fold.base, self._text[0].numel())
        self.form = f"{bits_of(self._recipe.quant_type)}bit {self._recipe.quant_type}"
        self.expected_bytes = sum(p.numel() for p in job.fold.base.model.parameters())

    def write(self, fold: Fold, folder: Path, on_progress: Progress | None) -> Written:
        names = fold.base.names
        with ShardWriter(folder, header_bytes=sum(7 * (len(name) + 200) for name in names)) as shards:
            writer = FeedbackWriter(fold, FourBitShards(fold, self._recipe, shards), fold.base.targets, on_progress)
            writer.write(LentModel(fold.base.source), *self._text)
            shards.finish()
        merged, dtype = self._job.record(self.form, fold.onto), fold.base.dtype()
        skipped = sorted(
            set(linear_names(fold.base.model)) - {name.removesuffix(".weight") for name in fold.base.targets}
        )
        quantization = HalfbyteConfig(
            bnb_4bit_quant_type=self._recipe.quant_type, bnb_4bit_use_double_quant=self._recipe.double_quant,
            blocksize=self._recipe.blocksize, llm_int8_skip_modules=skipped,
            layers={name.removesuffix(".weight"): fold.base.format_of(name) for name in fold.base.targets},
        ).resolve(skip_modules=skipped, model_dtype=dtype, experts=bool(expert_layers(fold.base.model)))  # fmt: skip
        write_config(self._job, dtype, merged, folder, quantization_config=quantization.to_dict())
        there = Fold(open_base(str(folder), self._recipe), {})
        use = transformers_use(self._job.output, known="load_in_4bit" in quantization.to_dict())
        return Written(shards.bytes, there.weight, use, tuple(writer.survived))


class Gguf:
    """One .gguf file; in 4 and 5 bits its codes are chosen on text, where there is some."""

    def __init__(self, job: Job) -> None:
        self._job, self._plan = job, GgufPlan(job.fold.base, job.gguf_type)
        self.form = f"gguf {job.gguf_type}"
        self.max_drift = 0.2 if job.gguf_type in gguf_blocks.TYPES else 0.01
        self._text = training_text(job) if job.gguf_type in gguf_blocks.TYPES else None
        self.work_bytes = 0 if self._text is None else text_bytes(job.fold.base, self._text[0].numel())
        if self._text is None and job.gguf_type in gguf_blocks.TYPES:
            job.say(
                "codes: the nearest, for there is no training text (--set data.train=FILE) to choose better ones on"
            )
        self.expected_bytes = sum(
            self._plan.nbytes(name, tuple(job.fold.base.model.get_parameter(name).shape))
            for name in job.fold.base.names
        )
        largest = max(p.numel() for p in job.fold.base.model.parameters())
        self.mapped_bytes = self.expected_bytes + 12 * largest  # and a tensor on its way into it, in float32

    def write(self, fold: Fold, folder: Path, on_progress: Progress | None) -> Written:
        file = folder / f"{self._job.output.name}-{self._job.gguf_type}.gguf"
        merged = self._job.record(self.form, fold.onto)
        model, survived = ModelFile(fold, self._plan, self._job.tokenizer, merged, file), []
        if self._text is None:
            write_model(model, fold.base.names, on_progress)
        else:
            shapes = {name: tuple(fold.base.model.get_parameter(name).shape) for name in fold.base.targets}
            names = {
                name for name, shape in shapes.items() if self._plan.type_of(name, shape).name in gguf_blocks.TYPES
            }
            writer = FeedbackWriter(fold, model, names, on_progress)
            writer.write(LentModel(fold.base.source), *self._text)
            survived = writer.survived
        weights = GgufFile(file, fold.base.source.config).read
        return Written(
            file.stat().st_size, weights, f"```bash\nllama-cli -m {file.name}\n```\n", tuple(survived)
        )  # fmt: skip


class GgufLora:
    """The adapter alone, as a .gguf file for llama.cpp's --lora."""

    form, max_drift, work_bytes, mapped_bytes = "gguf-lora", 0.01, 0, 0

    def __init__(self, job: Job) -> None:
        self._job, self._plan = job, GgufPlan(job.fold.base, "F16")
        self.expected_bytes = sum(update.nbytes for update in job.fold.updates.values())

    def write(self, fold: Fold, folder: Path, on_progress: Progress | None) -> Written:
        file = folder / f"{self._job.output.name}-lora.gguf"
        write_adapter(fold.updates, self._plan, self._job.record(self.form, fold.onto), file)
        there = replace(fold, updates=read_adapter(self._plan, fold.updates, file))
        use = f"```bash\nllama-cli -m BASE.gguf --lora {file.name}\n```\n"
        return Written(file.stat().st_size, there.weight, use)


FORMATS: dict[str, Callable[[Job], Format]] = {
    "16bit": SixteenBit,
    "4bit": FourBit,
    "gguf": Gguf,
    "gguf-lora": GgufLora,
    "adapter": AdapterFolder,
}
ADAPTERS = ("gguf-lora", "adapter")
"""Those without the base."""


def training_text(job: Job) -> tuple[Tensor, Tensor] | None:
    """Ids (sequences, tokens) and which of them are text, of the run's training data; None where there is none."""
    files = list(dict.fromkeys(job.data.train or part.file("train") for part in job.parts))
    if not all(files):
        return None
    samples = CALIBRATION_TOKENS // 16 // len(files)
    probes = [probe_of(file, job.tokenizer, job.data, samples) for file in files]
    rows = [row for turn in zip_longest(*(probe.ids for probe in probes)) for row in turn if row is not None]
    ids, counts = calibration_text(rows, CALIBRATION_TOKENS)
    job.say(f"calibration: {int(counts.sum()):,} tokens of {', '.join(files)}")
    return ids, counts


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


def transformers_use(output: Path, *, known: bool = True) -> str:
    """For the model card; not `known`: transformers knows the format once halfbyte has told it."""
    first = "" if known else "from halfbyte import HalfbyteConfig  # makes the format known\n"
    return (
        f"```python\n{first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{output.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{output.name}")\n```\n'
    )
