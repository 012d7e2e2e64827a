"""Several adapters as one, in a folder that PEFT loads."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft

from halfbyte.checkpoint import FolderWriter, load_adapter, versions
from halfbyte.checkpoint.adapter import write_peft
from halfbyte.merge.combine import SUMS, combined
from halfbyte.merge.fold import Fold
from halfbyte.merge.job import Job, Written
from halfbyte.merge.parts import common
from halfbyte.merge.update import Updates, updates_of
from halfbyte.model.adapt import shortest_names
from halfbyte.model.load import Progress
from halfbyte.model.source import tokenizer_sha256


class AdapterFolder:
    """PEFT's folder, its scaling 1 and its tensors in float32; halfbyte.json as training writes it."""

    mapped_bytes = 0

    def __init__(self, job: Job) -> None:
        self._job = job
        self.form = f"adapter {job.combine}"
        self.max_drift = 0.01 if job.combine.how in SUMS else math.inf
        self.expected_bytes = sum(update.nbytes for part in job.parts for update in part.updates.values())
        largest = max(parameter.numel() for parameter in job.fold.base.model.parameters())
        whole = 4 * largest * (2 * len(job.parts) + 4) if job.combine.is_dense else 0
        self.work_bytes = 2 * self.expected_bytes + whole

    def write(self, fold: Fold, folder: Path, on_progress: Progress | None) -> Written:
        job, base = self._job, fold.base
        updates = combined([(part.weight, part.updates) for part in job.parts], job.combine, on_progress)
        state = {
            f"base_model.model.{name.removesuffix('.weight')}.lora_{which}.weight": factor
            for name, update in updates.items()
            for which, factor in (("A", update.a), ("B", update.b))
        }
        config = self._config(updates)
        write_peft(FolderWriter(folder), state, config.to_dict())
        there = replace(fold, updates=updates_of(load_adapter(folder), base.model))
        use = (
            "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{job.output.name}")\n```\n'
        )
        return Written(sum(tensor.nbytes for tensor in state.values()), there.weight, use, info=self._info())

    def _config(self, updates: Updates) -> peft.LoraConfig:
        """Of scaling 1: every layer's alpha is its rank."""
        first = self._job.parts[0].adapter.config
        ranks = {name.removesuffix(".weight"): len(update.a) for name, update in updates.items()}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        other = {name: rank for name, rank in ranks.items() if rank != usual}
        return peft.LoraConfig(
            r=usual, lora_alpha=usual, rank_pattern=other, alpha_pattern=dict(other),
            target_modules=shortest_names(self._job.fold.base.model, list(ranks)),
            fan_in_fan_out=bool(first.get("fan_in_fan_out")), task_type="CAUSAL_LM",
            base_model_name_or_path=first.get("base_model_name_or_path"),
        )  # fmt: skip

    def _info(self) -> dict[str, Any]:
        """What training records of an adapter: base and tokenizer at hand, and what the parts have in common."""
        job, base = self._job, self._job.fold.base
        infos = [part.adapter.info for part in job.parts]
        said = common(infos)
        settings = {key: value for key, value in said.get("config", {}).items() if key in ("data", "quant")}
        return {
            "base": base.source.label, "base_sha256": job.base_sha256, "quant": base.recipe(),
            "tokenizer_sha256": tokenizer_sha256(job.tokenizer), "chat_template": job.tokenizer.chat_template,
            "versions": versions(), "config": settings,
            **({"mask_policy": said["mask_policy"]} if "mask_policy" in said else {}),
        }  # fmt: skip
