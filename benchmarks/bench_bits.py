"""What a budget of bits (quant.bits) loses, spread by the weights' error and by measured sensitivity.

usage: bench_bits.py [--bits 3.5,4.5,5.0] [--tokens 500] [--work DIR]

SmolLM2-135M, codes not calibrated (nearest, absmax scales), so that the formats alone differ; measured on the demo's
training questions. KL divergence from 16 bits and perplexity at about that many tokens of each of: held-out answers,
Python's reference, licences. The models are compared in memory. Results are added to those stored before.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import smollm2_folder, write_result
from texts import docstring_data, licence_file, prose_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from halfbyte.calibrate.memory import measured_within
from halfbyte.calibrate.sensitivity import measure, weighted
from halfbyte.config import DataConfig, QuantConfig, load_config
from halfbyte.data import load_data
from halfbyte.model.lent import LentModel
from halfbyte.model.mix import unit_errors
from halfbyte.model.quantize import open_unquantized
from halfbyte.model.source import load_tokenizer
from halfbyte.quant import quantize
from halfbyte.quant.mix import Unit, spread

RESULT = Path(__file__).parent / "results" / "bits.json"
LONGEST = 256
"""Tokens of a sample."""
Rows = list[tuple[Tensor, Tensor]]


def rows_of(path: Path, model: str, tokens: int) -> Rows:
    """Ids of samples from all over the file, and which of their tokens predict one that is learned."""
    data = load_data(str(path), load_tokenizer(model), DataConfig())
    rows, count = Rows(), 0
    for number in range(0, len(data), max(len(data) // 24, 1)):
        ids, labels = (torch.from_numpy(of).long()[:LONGEST] for of in (data[number].input_ids, data[number].labels))
        learned = torch.cat([labels[1:] != -100, torch.zeros(1).bool()])
        rows.append((ids, learned))
        count += int(learned.sum())
        if count > tokens:
            break
    return rows


class Loss:
    """KL divergence and perplexity of SmolLM2 with its layers in other formats, by text."""

    def __init__(self, model: str, texts: dict[str, Path], tokens: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._texts = {name: rows_of(path, model, tokens) for name, path in texts.items()}
        self._exact = {name: self._hidden(rows) for name, rows in self._texts.items()}
        self._stored: dict[str, Tensor] = {}
        self._decoded: dict[tuple[str, str], Tensor] = {}

    def _hidden(self, rows: Rows) -> Tensor:
        return torch.cat([self._model.model(input_ids=ids[None])[0][0, learned] for ids, learned in rows])

    def of(self, formats: dict[str, str]) -> dict[str, dict[str, float]]:
        """Of each text: "kl" by token, "perplexity", and that of 16 bits."""
        for layer, kind in formats.items():
            weight = self._model.get_parameter(f"{layer}.weight")
            stored = self._stored.setdefault(layer, weight.data)
            if (layer, kind) not in self._decoded:
                made = quantize(stored.bfloat16(), quant_type=kind, scale="absmax")
                self._decoded[layer, kind] = made.dequantize(torch.float32)
            weight.data = self._decoded[layer, kind]
        return {name: self._far(rows, self._exact[name]) for name, rows in self._texts.items()}

    def _far(self, rows: Rows, exact: Tensor) -> dict[str, float]:
        targets = torch.cat([ids.roll(-1)[learned] for ids, learned in rows])
        kl = loss = loss_16 = 0.0
        for some in zip(*(of.split(256) for of in (exact, self._hidden(rows), targets)), strict=True):
            wanted, found = (self._model.lm_head(hidden).log_softmax(1) for hidden in some[:2])
            kl += float((wanted.exp() * (wanted - found)).sum())
            loss, loss_16 = (float(sum_ - scores.gather(1, some[2][:, None]).sum())
                             for sum_, scores in ((loss, found), (loss_16, wanted)))  # fmt: skip
        count = len(targets)
        return {"kl": kl / count, "perplexity": math.exp(loss / count), "16 bits": math.exp(loss_16 / count)}


@torch.no_grad()
def main() -> None:
    """Run, print, write results/bits.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="4.5,3.5,5.0")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    options = parser.parse_args()
    model = str(smollm2_folder(options.work / "model"))
    train, held_out = docstring_data(options.work)
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    config = load_config(None, [f"model.path={model}"])
    job = open_unquantized(model, options.work / "not-written", QuantConfig())
    data = load_data(str(train), load_tokenizer(model), DataConfig())

    def units_of(bits: float) -> tuple[list[Unit], tuple[str, ...]]:
        quant = QuantConfig(bits=bits, scale="absmax")
        return unit_errors(job.reader, job.model, job.names, job.targets, quant, model)

    units, _ = units_of(4.5)
    text, _ = measured_within(config, job.model, data, len(units))
    measured = measure(job, LentModel(job.source), text, units)
    sensitivities = {name: part.moved for name, part in measured.items()}
    result |= {"measured_tokens": int(text[1].sum()), "sensitivities": sensitivities}
    loss = Loss(model, {"answers": held_out, "prose": prose_file(options.work),
                        "licences": licence_file(options.work)}, options.tokens)  # fmt: skip
    for bits in map(float, options.bits.split(",")):
        units, formats = units_of(bits)
        for how, some in (("the weights' error", units), ("measured", weighted(units, measured))):
            chosen = spread(some, formats, QuantConfig(bits=bits))
            found = {"formats": dict(Counter(chosen.values()).most_common()), "texts": loss.of(chosen)}
            result["rows"].setdefault(f"{bits:g}", {})[how] = found
            print(bits, how, json.dumps(found), flush=True)
            write_result(RESULT, result)  # after each, for they are minutes


if __name__ == "__main__":
    main()
