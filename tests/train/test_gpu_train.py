"""A run on a GPU beside the same run on the CPU. ``pytest -m gpu``; needs a CUDA device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.calibrate import quantize_with_start
from halfbyte.checkpoint.shards import SafetensorsFolder
from halfbyte.cli.main import main
from halfbyte.config import QuantConfig, RunConfig
from halfbyte.errors import ResourceError
from halfbyte.model.quantize import quantize_model
from halfbyte.train import TrainResult, setup, train
from halfbyte.train.gpu import capped, cuda_bytes
from halfbyte.train.observer import Observer

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
]  # fmt: skip
MakeRun = Callable[..., RunConfig]


class Notes(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def losses(config: RunConfig) -> list[float]:
    events = map(json.loads, (Path(config.train.output) / "metrics.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "step"]


def outcome(config: RunConfig) -> tuple[TrainResult, list[float], dict[str, torch.Tensor]]:
    result = train(config)
    adapter = SafetensorsFolder(result.adapter)
    return result, losses(config), {name: adapter.read(name) for name in adapter.names()}


def test_losses_are_those_of_the_cpu(make_run: MakeRun, eval_file: Path) -> None:
    """In float32; 6 steps of the tiny Llama, and the held-out loss."""
    runs = [make_run(device, model__device=device, data__eval=str(eval_file)) for device in ("cpu", "cuda")]
    (cpu, cpu_losses, _), (gpu, gpu_losses, _) = map(outcome, runs)
    assert (cpu.device, gpu.device) == ("cpu", "cuda")
    assert gpu_losses == pytest.approx(cpu_losses, rel=1e-4)
    assert gpu.eval_loss_before == pytest.approx(cpu.eval_loss_before, rel=1e-5)
    assert gpu.eval_loss == pytest.approx(cpu.eval_loss, rel=1e-4)
    hashes = [json.loads((Path(run.train.output) / "adapter" / "halfbyte.json").read_text())["base_sha256"]
              for run in runs]  # fmt: skip
    assert hashes[0] == hashes[1], "quantized to the same bytes"


def test_the_default_is_bfloat16_in_fused_layers(make_run: MakeRun) -> None:
    observer = Notes()
    exact = make_run("exact", model__device="cuda")
    train(exact)
    config = make_run("half", quant__compute_dtype="auto")
    train(config, observer=observer)
    assert any(text.startswith("compute dtype bfloat16") for text in observer.texts), observer.texts
    assert any("run as one function each" in text for text in observer.texts), observer.texts
    assert losses(config) == pytest.approx(losses(exact), rel=2e-2)


@pytest.mark.parametrize("packing", [True, False])
def test_the_same_seed_gives_the_same_bits(packing: bool, make_run: MakeRun) -> None:
    settings: dict[str, Any] = {"quant__compute_dtype": "bfloat16", "model__device": "cuda", "data__packing": packing}
    _, first, adapter = outcome(make_run("first", train__micro_batch_size=3, **settings))
    _, second, again = outcome(make_run("second", train__micro_batch_size=3, **settings))
    assert first == second
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_is_the_uninterrupted_one(dropout: float, make_run: MakeRun) -> None:
    """With dropout too, whose random numbers come from the GPU's generator."""
    settings: dict[str, Any] = {"quant__compute_dtype": "bfloat16", "lora__dropout": dropout, "model__device": "cuda"}
    _, expected, adapter = outcome(make_run("whole", **settings))
    outcome(make_run("parts", train__steps=3, train__save_every=3, **settings))
    _, resumed, again = outcome(make_run("parts", **settings))
    assert resumed == expected
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__gradient_checkpointing": True}, {"optim__paged": True, "memory__optimizer_budget": "8192"},
        {"train__gradient_accumulation_steps": 2, "optim__bits": 8},
    ],
)  # fmt: skip
def test_settings_that_save_memory(changes: dict[str, Any], make_run: MakeRun) -> None:
    """The first two give the bits of the plain run; the last only has to run."""
    settings: dict[str, Any] = {"quant__compute_dtype": "bfloat16", "model__device": "cuda"}
    _, found, _ = outcome(make_run("other", **settings, **changes))
    if "optim__bits" not in changes:
        assert found == outcome(make_run("plain", **settings))[1]


@pytest.mark.parametrize("host_memory", ["1GB", "4096"])
def test_what_waits_behind_the_gpu_changes_nothing(
    host_memory: str, make_run: MakeRun, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers and activations in pinned host memory, and on disk; with three micro-batches a step."""
    quantize_model(str(make_llama(num_hidden_layers=6)), tmp_path / "model", QuantConfig())
    settings: dict[str, Any] = {
        "model__path": str(tmp_path / "model"), "quant__compute_dtype": "bfloat16", "model__device": "cuda",
        "train__gradient_accumulation_steps": 3, "memory__host_budget": "20GB",
    }  # fmt: skip
    _, expected, adapter = outcome(make_run("resident", **settings))
    for where in ({"weights": "stream"}, {"activations": "disk"}, {"weights": "stream", "resident_layers": 2}):
        behind = {f"memory__{key}": value for key, value in where.items()}
        config = make_run("-".join(map(str, where.values())), **settings, **behind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup, "host_share", lambda *_: int(host_memory) if host_memory.isdecimal() else 10**9)
            _, found, other = outcome(config)
        assert found == expected
        assert all(torch.equal(adapter[name], other[name]) for name in adapter)


def test_a_budget_too_small_is_refused_before_loading(make_run: MakeRun) -> None:
    with pytest.raises(ResourceError, match="are needed at least") as caught:
        train(make_run(model__device="cuda", memory__budget="100MB"))
    assert caught.value.exit_code == 4


def test_the_cap_holds() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    budget = cuda_bytes(device) + torch.cuda.memory_reserved() + 64 * 2**20
    with capped(device, budget):
        torch.empty(16 * 2**20, device=device, dtype=torch.uint8)
    with pytest.raises(ResourceError, match=r"more was needed; .* are allowed"), capped(device, budget):
        torch.empty(1 << 30, device=device, dtype=torch.uint8)
    torch.empty(1 << 30, device=device, dtype=torch.uint8)


def test_peaks_are_within_the_plan(make_run: MakeRun) -> None:
    """Tensors that are nearly nothing: what is planned and measured here is CUDA's own. The rest: bench_gpu_train.

    Alone on the device: what others take of it meanwhile counts as this run's.
    """
    result = train(make_run(model__device="cuda", quant__compute_dtype="auto"))
    assert 0 < result.peak_memory <= result.taken_memory <= result.predicted_peak_memory


def test_eval_generate_and_merge_read_what_it_left(
    make_run: MakeRun, eval_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(model__device="cuda", data__eval=str(eval_file))
    result = train(config)
    options = ["--model", config.model.path, "--adapter", result.adapter, "--json", "--set",
               "quant.compute_dtype=float32", "--set", "data.max_seq_len=160"]  # fmt: skip
    found = {}
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        assert main(["eval", "--data", str(eval_file), "--device", device, *options]) == 0
        found[device] = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
        assert main(["generate", "--prompt", "One?", "--max-new-tokens", "8", "--device", device, *options]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_tokens"] > 0
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-4)
    assert found["cuda"] == pytest.approx(result.eval_loss, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        *({"quant__quant_type": name} for name in ("fp4", "int4", "af4", "bof4-s", "int8", "nf3", "nf2")),
        {"quant__scale": "mse-signed"}, {"quant__bits": 4.5}, {"lora__use_dora": True},
        {"lora__use_dora": True, "lora__init": "pissa"}, {"lora__use_rslora": True, "optim__lr_b_ratio": 4.0},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)  # fmt: skip
def test_variants_have_the_losses_of_the_cpu(
    settings: dict[str, Any], make_run: MakeRun, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Every format and kind of adapter, in float32."""
    base = tmp_path / "base"
    config = make_run("first", model__path=str(make_llama()), **settings)
    if config.lora.init == "random":
        quantize_model(config.model.path, base, config.quant)
    else:
        quantize_with_start(config, base)
    used = {key: value for key, value in settings.items() if key.startswith(("lora", "optim"))}
    used |= {"model__path": str(base), "train__steps": 3}
    cpu, cuda = (losses_of(make_run(device, model__device=device, **used)) for device in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=1e-4)


def losses_of(config: RunConfig) -> list[float]:
    train(config)
    return losses(config)


def test_the_page_of_a_run_shows_the_same_pictures(make_run: MakeRun, eval_file: Path) -> None:
    """report.html, with memory over time against plan and budget."""
    pictures = {}
    for device in ("cpu", "cuda"):
        config = make_run(device, model__device=device, data__eval=str(eval_file), memory__budget="8GB")
        train(config)
        pictures[device] = (Path(config.train.output) / "report.html").read_text(encoding="utf-8").count("<svg")
    assert pictures["cuda"] == pictures["cpu"] >= 2
