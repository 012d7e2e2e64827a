"""Several adapters as one: which ways give the sum of the updates, and that PEFT reads and means the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halfbyte as hb
from halfbyte.checkpoint import load_adapter
from halfbyte.checkpoint.adapter import pairs
from halfbyte.checkpoint.shards import SafetensorsFolder
from halfbyte.cli.main import main
from halfbyte.config import QuantConfig
from halfbyte.errors import AdapterError, ConfigError, NumericsError
from halfbyte.merge.combine import Combine, combined
from halfbyte.merge.update import Update, sum_of
from halfbyte.model import load_model
from halfbyte.model.adapt import attach_saved

MakeLlama = Callable[..., Path]
MakeAdapter = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

Q_PROJ = "model.layers.0.self_attn.q_proj"


def run(model: Path, data: Path | str = "") -> hb.RunConfig:
    return hb.load_config(model__path=str(model), data__eval=str(data))


@pytest.fixture(scope="module")
def both(make_adapter: MakeAdapter, tiny_llama: Path) -> dict[str, float]:
    """Two adapters of one shape, and weights."""
    return {str(make_adapter(tiny_llama)): 0.7, str(make_adapter(tiny_llama, seed=1)): -0.3}


@pytest.fixture(scope="module")
def unlike(make_adapter: MakeAdapter, tiny_llama: Path) -> dict[str, float]:
    """Adapters of other ranks, scaling and layers."""
    wide = make_adapter(tiny_llama, seed=2, r=6, use_rslora=True)
    few = make_adapter(tiny_llama, seed=3, target_modules=["q_proj", "up_proj"])
    return {str(wide): 0.5, str(few): 1.5}


def updates_in(weights: dict[str, float]) -> dict[str, Tensor]:
    """The weighted sum of the updates by module, in float64, from the files."""
    total: dict[str, Tensor] = {}
    for folder, weight in weights.items():
        for module, (a, b, scale) in pairs(load_adapter(folder)).items():
            total[module] = total.get(module, 0) + weight * scale * b.double() @ a.double()
    return total


def logits_of(model: torch.nn.Module) -> Tensor:
    ids = (torch.arange(40) * 7 % 300).view(2, 20)
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits.float()
    return result


def in_peft(model: Path, weights: dict[str, float]) -> Any:
    """The 16-bit model in PEFT alone, with the adapters "0", "1", ... on it."""
    first, *rest = weights
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(plain, first, adapter_name="0")
    for number, folder in enumerate(rest, 1):
        adapted.load_adapter(folder, str(number))
    return adapted


@pytest.mark.parametrize("which", ["both", "unlike"])
def test_side_by_side_is_the_sum_in_peft_alone(
    which: str, tiny_llama: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Measured: the update 5e-8 of its norm from the sum in float64, logits 5e-6 from weights with the sum in them."""
    weights = request.getfixturevalue(which)
    result = hb.merge(run(tiny_llama), weights, tmp_path / "out", format="adapter")
    assert result.form == "adapter cat"
    assert result.drift.kl < 1e-9
    assert result.drift.greedy_agreement == 1
    wanted, got = updates_in(weights), updates_in({str(tmp_path / "out"): 1.0})
    assert wanted.keys() == got.keys()
    for module, update in wanted.items():
        assert (got[module] - update).norm() < 1e-6 * update.norm(), module
    theirs = in_peft(tiny_llama, {str(tmp_path / "out"): 1.0})
    summed = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = logits_of(summed)
    for module, update in wanted.items():
        summed.get_submodule(module).weight.data += update
    assert (logits_of(theirs) - logits_of(summed)).abs().max() < 5e-5
    assert (logits_of(summed) - plain).abs().max() > 0.5


def test_halfbyte_runs_it_over_the_4_bit_base(tiny_llama: Path, unlike: dict[str, float], tmp_path: Path) -> None:
    hb.merge(run(tiny_llama), unlike, tmp_path / "out", format="adapter")
    base = load_model(str(tiny_llama), QuantConfig(), compute_dtype=torch.float32).model
    ours = logits_of(attach_saved(base, load_adapter(tmp_path / "out")))
    summed = load_model(str(tiny_llama), QuantConfig(), compute_dtype=torch.float32).model
    for module, update in updates_in(unlike).items():
        layer = summed.get_submodule(module)
        weight = layer.quantized_weight.dequantize(torch.float32) + update.float()
        plain = torch.nn.Linear(*weight.T.shape, bias=False)
        plain.weight.data = weight
        summed.set_submodule(module, plain)
    assert (ours - logits_of(summed)).abs().max() < 1e-3  # measured 4e-6; AVX2 rounds some products to integers


@pytest.mark.parametrize(
    ("how", "more"),
    [
        ("svd", {"rank": 3}), ("svd", {}), ("linear", {}), ("ties_svd", {"density": 0.5}),
        ("magnitude_prune_svd", {"density": 0.3}),
    ],
)  # fmt: skip
def test_every_way_gives_what_peft_gives(
    tiny_llama: Path, both: dict[str, float], how: str, more: dict[str, Any], tmp_path: Path
) -> None:
    result = hb.merge(run(tiny_llama), both, tmp_path / "out", format="adapter", combine=how, max_drift=99, **more)
    assert result.form.startswith(f"adapter {how}")
    theirs = in_peft(tiny_llama, both)
    options = {"svd_rank": more.get("rank"), "density": more.get("density")}
    theirs.base_model.add_weighted_adapter(["0", "1"], list(both.values()), "all", combination_type=how, **options)
    for module, update in updates_in({str(tmp_path / "out"): 1.0}).items():
        wanted = theirs.base_model.model.get_submodule(module).get_delta_weight("all")
        assert (update - wanted).norm() < 1e-4 * wanted.norm(), module


def test_peft_keeps_rslora_for_the_sum_and_makes_it_too_large(
    tiny_llama: Path, unlike: dict[str, float], tmp_path: Path
) -> None:
    """What docs/merge.md says of PEFT 0.21; where this fails, PEFT has mended it."""
    hb.merge(run(tiny_llama), unlike, tmp_path / "out", format="adapter")
    ours = updates_in({str(tmp_path / "out"): 1.0})
    theirs = in_peft(tiny_llama, unlike)
    theirs.base_model.add_weighted_adapter(["0", "1"], list(unlike.values()), "all", combination_type="cat")
    wrong = theirs.base_model.model.get_submodule(Q_PROJ).get_delta_weight("all")
    assert (wrong - 10**0.5 * ours[Q_PROJ]).norm() < 1e-5 * wrong.norm()


@pytest.mark.parametrize("how", ["dare_linear_svd", "dare_ties_svd"])
def test_what_is_random_comes_from_the_seed(how: str) -> None:
    torch.manual_seed(0)
    parts = [(1.0, {"w": Update(torch.randn(2, 24), torch.randn(16, 2))}) for _ in range(2)]
    before = torch.random.get_rng_state()
    one, two, other = (combined(parts, Combine(how=how, seed=seed))["w"].rows() for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_only_all_ranks_hold_the_sum() -> None:
    """Of four adapters of rank 4: `svd` is as near as their ranks allow, and `linear` is another update."""
    torch.manual_seed(0)
    parts = [(0.25, {"w": Update(torch.randn(4, 96), torch.randn(64, 4), 2.0)}) for _ in range(4)]
    wanted = sum_of(parts)["w"].rows()
    tail = torch.linalg.svdvals(wanted.double())[6:].norm() / wanted.norm()

    def wrong(**how: Any) -> float:
        return float((combined(parts, Combine(**how))["w"].rows() - wanted).norm() / wanted.norm())

    assert wrong(how="cat") < 1e-6
    assert wrong(how="svd", rank=16) < 1e-6
    assert wrong(how="svd", rank=6) == pytest.approx(float(tail), rel=1e-4)
    assert wrong(how="linear") > 0.9


def test_several_at_once_into_16_bits_are_the_exact_sum(
    tiny_llama: Path, unlike: dict[str, float], tmp_path: Path
) -> None:
    result = hb.merge(run(tiny_llama), unlike, tmp_path / "out")
    assert result.drift.greedy_agreement > 0.95
    assert [adapter["weight"] for adapter in result.adapters] == [0.5, 1.5]
    base = load_model(str(tiny_llama), QuantConfig(), compute_dtype=torch.float32).model
    files = SafetensorsFolder(tmp_path / "out")
    for module, update in updates_in(unlike).items():
        wanted = base.get_submodule(module).quantized_weight.dequantize(torch.float32).double() + update
        got = files.read(f"{module}.weight").double()
        assert ((got - wanted).abs() <= wanted.abs() * 2**-8 * 1.001 + 1e-6).all(), module


@pytest.mark.parametrize("format", ["gguf", "gguf-lora"])
def test_several_at_once_for_llama_cpp(
    tiny_llama: Path, unlike: dict[str, float], tmp_path: Path, format: str
) -> None:
    assert hb.merge(run(tiny_llama), unlike, tmp_path / "out", format=format).drift.kl < 3e-6


def test_it_says_of_what_it_was_made(tiny_llama: Path, both: dict[str, float], tmp_path: Path) -> None:
    hb.merge(run(tiny_llama), both, tmp_path / "out", format="adapter", combine="svd", rank=8)
    info = load_adapter(tmp_path / "out").info
    first = load_adapter(next(iter(both))).info
    for key in ("base_sha256", "quant", "tokenizer_sha256"):
        assert info[key] == first[key]
    said = info["merged"]["adapters"]
    assert {adapter["adapter"]: adapter["weight"] for adapter in said} == both
    assert len({adapter["adapter_sha256"] for adapter in said}) == 2
    assert info["drift"]["kl"] < 0.01
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"{weight:g} x `{folder}`" in card for folder, weight in both.items())


def test_a_smaller_rank_that_loses_too_much_is_refused(
    tiny_llama: Path, both: dict[str, float], tmp_path: Path
) -> None:
    for how in ({"combine": "linear"}, {"combine": "svd", "rank": 1}):
        with pytest.raises(NumericsError, match=r"not what was trained: .* raise --max-drift"):
            hb.merge(run(tiny_llama), both, tmp_path / "out", format="adapter", **how)
    assert not (tmp_path / "out").exists()
    hb.merge(run(tiny_llama), both, tmp_path / "out", format="adapter", combine="ties_svd")  # is no sum


def changed(adapter: str, folder: Path, file: str, **values: object) -> str:
    """A copy of `adapter` of which a JSON file says something else."""
    shutil.copytree(adapter, folder)
    (folder / "manifest.json").unlink()
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    return str(folder)


def test_what_does_not_belong_together_is_refused(
    tiny_llama: Path, both: dict[str, float], make_llama: MakeLlama, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    one, other = both
    stranger = str(make_adapter(make_llama(initializer_range=0.05), seed=4))
    dora = changed(other, tmp_path / "dora", "adapter_config.json", use_dora=True)
    vocabulary = changed(other, tmp_path / "vocabulary", "halfbyte.json", tokenizer_sha256="0" * 64)
    infinite = changed(other, tmp_path / "infinite", "halfbyte.json")
    state = load_file(f"{infinite}/adapter_model.safetensors")
    state[next(iter(state))].fill_(torch.inf)
    save_file(state, f"{infinite}/adapter_model.safetensors")
    for weights, said in (
        ({one: 1.0, stranger: 1.0}, r"base_sha256 .* there, .* here"),
        ({one: 1.0, vocabulary: 1.0}, r"tokenizer_sha256 0000.* there"),
        ({one: 1.0, dora: 1.0}, "has no magnitude, use_dora is true"),
        ({one: 1.0, infinite: 1.0}, "is not finite"),
        ({one: 1.0, shutil.copytree(one, tmp_path / "twin"): 1.0}, "is the same as"),
    ):
        with pytest.raises(AdapterError, match=said):
            hb.merge(run(tiny_llama), weights, tmp_path / "out", format="adapter")
    for weights, options, said in (
        ({one: 0.0}, {}, "cannot be added"),
        ({one: float("nan")}, {}, "cannot be added"),
        (both, {"combine": "ties"}, "'ties' is not a choice"),
        (both, {"rank": 4}, "--rank: is not for cat"),
        (both, {"combine": "ties_svd", "density": 1.5}, "--density: 1.5 is not between"),
        (both, {"combine": "svd", "format": "16bit"}, "which takes the exact sum"),
        (both, {"base": "auto"}, "--base: is not for --format adapter"),
    ):
        with pytest.raises(ConfigError, match=said):
            hb.merge(run(tiny_llama), weights, tmp_path / "out", **{"format": "adapter", **options})
    with pytest.raises(NumericsError, match="the combined update is not finite"):
        hb.merge(run(tiny_llama), {one: 1e40, other: 1e40}, tmp_path / "out", format="adapter")
    assert not (tmp_path / "out").exists()


def test_ranks_that_differ_are_no_linear_sum(tiny_llama: Path, unlike: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"ranks 6, 4 cannot be added.*Choose --combine cat or svd"):
        hb.merge(run(tiny_llama), unlike, tmp_path / "out", format="adapter", combine="linear")


def test_another_chat_template_is_refused_unless_let_pass(
    tiny_llama: Path, both: dict[str, float], tmp_path: Path
) -> None:
    one, other = both
    tokenizer = hb.load_tokenizer(str(tiny_llama))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    from halfbyte.model.source import tokenizer_sha256

    said = {"chat_template": tokenizer.chat_template, "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    talks = changed(other, tmp_path / "talks", "halfbyte.json", **said)
    with pytest.raises(AdapterError, match=r"another chat template than .*--any-template"):
        hb.merge(run(tiny_llama), {one: 1.0, talks: 1.0}, tmp_path / "out", format="adapter")
    hb.merge(run(tiny_llama), {one: 1.0, talks: 1.0}, tmp_path / "out", format="adapter", any_template=True)
    assert load_adapter(tmp_path / "out").info["chat_template"] == hb.load_tokenizer(str(tiny_llama)).chat_template


def test_the_command_line_takes_weights(
    tiny_llama: Path, both: dict[str, float], eval_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["merge", "--model", str(tiny_llama), "--output", str(tmp_path / "out"), "--format", "adapter",
               "--data", str(eval_file), "--json"]  # fmt: skip
    one, other = both
    assert main([*options, "--adapter", f"{one}=0.7", "--adapter", other, "--combine", "svd", "--rank", "8"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [adapter["weight"] for adapter in result["adapters"]] == [0.7, 1.0]
    assert result["drift"]["on"].startswith("all 8 samples")
    for wrong, said in (
        (["--adapter", f"{one}=much"], "'much' is not a weight"),
        (["--adapter", one, "--adapter", f"{one}=2"], "is given twice"),
    ):
        assert main([*options, *wrong]) == 2
        assert said in capsys.readouterr().err
