"""Base models with something wrong: docs/refusals.md says what is said of each, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from faults.refusals import (
    INDEX,
    WEIGHTS,
    Change,
    check,
    config,
    cut,
    entry,
    header,
    index,
    pickled,
    promised,
    said,
    tensors,
)
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.shards import SafetensorsFolder
from halfbyte.cli.main import main
from halfbyte.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")  # what the command line hides from users, it hides here
TABLE = "base models"
MANY = b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(100_001)) + b"}"
FILES: dict[str, Change] = {
    "cut short": cut(f"model/{WEIGHTS}", 100),
    "cut in its header": lambda p: os.truncate(p / "model" / WEIGHTS, 300),
    "an empty file": lambda p: (p / "model" / WEIGHTS).write_bytes(b""),
    "a header of 0 bytes": header(b"", body=0),
    "a header of 7 bytes": header(b"{}", length=7),
    "a header of 2^31 bytes": header(b"{}", length=2**31),
    "a header of 2^60 bytes": header(b"{}", length=2**60),
    "a header of 2^64 - 1 bytes": header(b"{}", length=2**64 - 1),
    "a header longer than the file by 1": header(b"{}", length=3, body=0),
    "a header that is no UTF-8": header(b'{"\xff\xfe": 1}'),
    "a header that is no JSON": header(b"not JSON"),
    "nested 100,000 deep": header(b'{"a":' * 100_000),
    "NaN as an offset": header(b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[NaN,32]}}'),
    "1e999 as a size": header(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,32]}}'),
    "a tensor twice": header(b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},'
                             b'"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}'),
    "a negative offset": header({"a": entry(-32, 0, [8])}),
    "a fraction as an offset": header({"a": entry(0.0, 32.0, [8])}),
    "an offset of 2^63": header({"a": entry(0, 2**63, [8])}),
    "a tensor that ends before it begins": header({"a": entry(32, 0, [8])}),
    "tensors that overlap": header({"a": entry(0, 24, [6]), "b": entry(16, 32, [4])}),
    "a hole between tensors": header({"a": entry(0, 8, [2]), "b": entry(16, 32, [4])}),
    "bytes behind the last tensor": header({"a": entry(0, 24, [6])}),
    "a shape whose product overflows": header({"a": entry(0, 32, [4194305, 4194305, 211106198978564])}),
    "100,001 tensors": header(MANY, body=0),
    "a name of 513 bytes": header({"a" * 513: entry(0, 32, [8])}),
    "nine dimensions": header({"a": entry(0, 32, [1] * 8 + [8])}),
    "8-bit floats": header({"a": entry(0, 32, [32], "F8_E4M3")}),
    "complex numbers": header({"a": entry(0, 32, [4], "C64")}),
    "an unknown dtype": header({"a": entry(0, 32, [8], "F31")}),
    "pickled weights": pickled,
    "no weights": lambda p: (p / "model" / WEIGHTS).unlink(),
    "an index whose file is missing": index(lambda i, folder: (folder / "two.safetensors").unlink()),
    "an index of a tensor that is nowhere": index(lambda i, folder: i["weight_map"].update(ghost="one.safetensors")),
    "a tensor in two files": index(
        lambda i, folder: save_file(
            load_file(folder / "one.safetensors") | load_file(folder / "two.safetensors"), folder / "two.safetensors"
        )
    ),
    "an index with an absolute path": index(
        lambda i, folder: i["weight_map"].update(x=str(folder.parent / "outside.safetensors"))
    ),
    "an index that leads out": index(lambda i, folder: i["weight_map"].update(x="../outside.safetensors")),
    "a link that leads out": lambda p: [
        (p / "model" / WEIGHTS).unlink(), os.mkfifo(p / WEIGHTS), (p / "model" / WEIGHTS).symlink_to(p / WEIGHTS)
    ],
    "an index over its limit": index(lambda i, folder: i["metadata"].update(x="x" * 2**24)),
}  # fmt: skip
CONFIGS: dict[str, Change] = {
    "no config": lambda p: (p / "model/config.json").unlink(),
    "a config that is no JSON": lambda p: (p / "model/config.json").write_text("{"),
    "a config of 200 MB": lambda p: os.truncate(p / "model/config.json", 200_000_000),
    "a config with NaN": config(rms_norm_eps=float("nan")),
    "an unknown architecture": config(model_type="nope", architectures=["Nope"]),
    "code in the model's folder": config(
        model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    ),
    "an unknown kind of rope": config(rope_parameters={"rope_type": "nope", "rope_theta": 10000.0}),
    "an unknown activation": config(hidden_act="nope"),
    "10^9 layers": config(num_hidden_layers=10**9),
    "-1 layers": config(num_hidden_layers=-1),
    "a text for a number": config(hidden_size="64"),
    "no heads": config(num_attention_heads=0),
    "no key-value heads": config(num_key_value_heads=0),
    "10^12 tokens": config(vocab_size=10**12),
    "another hidden size": config(hidden_size=128),
    "another number of heads": config(num_attention_heads=2, head_dim=16),
    "another number of key-value heads": config(num_key_value_heads=4),
    "another vocabulary": config(vocab_size=999),
    "another number of layers": config(num_hidden_layers=3),
    "fewer layers": config(num_hidden_layers=1),
    "a head that the config ties": tensors(head=None),
    "another quantization": config(quantization_config={"quant_method": "gptq", "bits": 4}),
}
TENSORS: dict[str, Change] = {
    "a tensor less": tensors(norm=None),
    "a tensor more": tensors(more=torch.ones(3)),
    "integers in a linear layer": tensors(q=torch.ones(64, 64, dtype=torch.int32)),
    "float64 in a linear layer": tensors(q=torch.ones(64, 64, dtype=torch.float64)),
    "a NaN": tensors(q=torch.full((64, 64), torch.nan)),
    "infinite weights": tensors(q=torch.full((64, 64), torch.inf, dtype=torch.bfloat16)),
}
MODELS = {**FILES, **CONFIGS, **TENSORS}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", ["quantize", "train"])
@pytest.mark.timeout(120)
def test_refused(command: str, case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "model" / "mine.py").write_text(f"open({str(place / 'ran')!r}, 'w')")
    MODELS[case](place)
    arguments = [command, "--model", "PLACE/model", "--output", "PLACE/out"]
    arguments += ["--data", "PLACE/data.jsonl", "--steps", "1"] if command == "train" else []
    check(TABLE, case, arguments, place, capsys)
    assert not (place / "ran").exists()


def test_the_page_shows_these() -> None:
    assert list(promised(TABLE)) == list(MODELS)


def test_weights_cut_at_any_byte(place: Path) -> None:
    """Every byte of the first 4 KiB, and 200 places behind them: the header alone tells."""
    folder = place / "model"
    SafetensorsFolder(folder)
    size = (folder / WEIGHTS).stat().st_size
    more = torch.randint(4096, size, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for length in sorted((*range(4096), *more), reverse=True):
        os.truncate(folder / WEIGHTS, length)
        with pytest.raises(ModelError, match=WEIGHTS):
            SafetensorsFolder(folder)


def test_limits_can_be_raised_and_lowered(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the limit, and one beyond it; the advice of the refusal is good."""
    count = len(load_file(place / "model" / WEIGHTS))
    arguments = ["quantize", "--model", f"{place}/model", "--output", f"{place}/out", "--set"]
    code, line = said([*arguments, f"limits.tensors={count - 1}"], capsys)
    assert code == 3
    assert f"{count} tensors: limits.tensors is {count - 1}. If you trust the file" in line
    advice = line.rpartition("--set ")[2].rstrip(".")
    assert advice == f"limits.tensors={count}"
    assert main([*arguments, advice]) == 0


def test_what_names_code_is_read_without_it(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / "model" / "mine.py").write_text(f"open({str(place / 'ran')!r}, 'w')")
    config(auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}, trust_remote_code=True)(place)
    assert main(["quantize", "--model", f"{place}/model", "--output", f"{place}/out"]) == 0
    assert "(auto_map), which is not run" in caplog.text
    assert not (place / "ran").exists()
    assert not (place / "out" / "mine.py").exists()


def test_the_hubs_own_links_are_followed(place: Path) -> None:
    """snapshots/<revision>/<file> -> ../../blobs/<hash>, as huggingface_hub stores a model."""
    folder, blobs = place / "hub" / "snapshots" / "abc", place / "hub" / "blobs"
    folder.mkdir(parents=True)
    shutil.copytree(place / "model", blobs)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(f"../../blobs/{file.name}")
    assert main(["quantize", "--model", str(folder), "--output", f"{place}/out"]) == 0


def test_a_wrong_total_size_is_not_believed(place: Path) -> None:
    index(lambda value, folder: value["metadata"].update(total_size=1))(place)
    assert json.loads((place / "model" / INDEX).read_text())["metadata"] == {"total_size": 1}
    assert main(["quantize", "--model", f"{place}/model", "--output", f"{place}/out"]) == 0
