"""PEFT reads what we write, we read what PEFT writes, and what is wrong is said at once."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from halfbyte.checkpoint import check_base, load_adapter, save_adapter, verify_folder, versions
from halfbyte.errors import AdapterError, ConfigError, NumericsError

INFO = {
    "base_sha256": "ab" * 32, "base": "some/model", "quant": {"quant_type": "nf4", "blocksize": 64},
    "tokenizer_sha256": "cd" * 32, "chat_template": "{{ x }}", "mask_policy": "assistant", "versions": versions(),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


def trained(**options: Any) -> tuple[Net, Any]:
    """A base, and the same base under PEFT with a B that is not zero."""
    torch.manual_seed(0)
    base = Net()
    config = LoraConfig(**{"r": 4, "target_modules": ["up", "down"], **options})
    twin = Net()
    twin.load_state_dict(base.state_dict())
    model = get_peft_model(twin, config)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    return base, model


def parts(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return get_peft_model_state_dict(model), model.peft_config["default"].to_dict()


def test_peft_loads_ours(tmp_path: Path) -> None:
    base, model = trained(use_rslora=True, rank_pattern={"down": 2})
    state, config = parts(model)
    save_adapter(tmp_path / "out", state, config, INFO)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))
    verify_folder(tmp_path / "out")


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    state, config = parts(trained()[1])
    for name in ("one", "two"):
        save_adapter(tmp_path / name, state, config, INFO)
    adapter = load_adapter(tmp_path / "one")
    assert adapter.info == INFO
    assert adapter.config["r"] == 4
    assert adapter.config["target_modules"] == ["down", "up"]
    assert adapter.state.keys() == state.keys()
    assert all(torch.equal(adapter.state[name], state[name]) for name in state)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_we_load_plain_peft(tmp_path: Path) -> None:
    model = trained()[1]
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert all(torch.equal(adapter.state[name], tensor) for name, tensor in parts(model)[0].items())
    assert adapter.info == {}
    (note,) = check_base(adapter, "ab" * 32, base="x")
    assert "no record" in note


def test_base_check_names_both_sides(tmp_path: Path) -> None:
    state, config = parts(trained()[1])
    save_adapter(tmp_path / "out", state, config, INFO)
    adapter = load_adapter(tmp_path / "out")
    assert check_base(adapter, "ab" * 32, quant=INFO["quant"], tokenizer_sha256="cd" * 32) == []  # type: ignore[arg-type]
    signed = {"quant_type": "nf4", "blocksize": 64, "scale": "mse-signed"}
    assert check_base(adapter, "ab" * 32, quant=signed) == []  # the same bytes
    with pytest.raises(AdapterError, match="mse-signed"):
        check_base(adapter, "ef" * 32, quant=signed)
    with pytest.raises(AdapterError) as caught:
        check_base(adapter, "ef" * 32, base="other/model", tokenizer_sha256="00" * 32)
    for text in ("some/model", "other/model", "ab" * 32, "ef" * 32, "cd" * 32, "00" * 32):
        assert text in str(caught.value)
    with pytest.raises(AdapterError, match="fp4"):
        check_base(adapter, "ab" * 32, quant={"quant_type": "fp4", "blocksize": 64})


def drop_a(state: dict[str, Tensor], config: dict[str, Any]) -> None:
    del state["base_model.model.up.lora_A.weight"]


def other_rank(state: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["r"] = 8


def not_a_number(state: dict[str, Tensor], config: dict[str, Any]) -> None:
    state["base_model.model.up.lora_A.weight"][0, 0] = torch.nan


def unknown_key(state: dict[str, Tensor], config: dict[str, Any]) -> None:
    state["base_model.model.up.inner.weight"] = torch.zeros(2, 2)


def flat(state: dict[str, Tensor], config: dict[str, Any]) -> None:
    state["base_model.model.up.lora_A.weight"] = torch.zeros(0)


def set_to(key: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(state: dict[str, Tensor], config: dict[str, Any]) -> None:
        config[key] = value

    return change


FAULTS = [
    (drop_a, "up has lora_B alone"),
    (other_rank, "rank 4 in lora_A, 4 in lora_B, 8 in adapter_config.json"),
    (not_a_number, "up.lora_A.weight is not finite"),
    (unknown_key, "unknown tensor base_model.model.up.inner.weight"),
    (flat, r"is \(0,\) torch.float32, not a matrix"),
    (set_to("peft_type", "IA3"), "only LORA"),
    (set_to("use_dora", True), "has no magnitude, use_dora is true"),
    (set_to("modules_to_save", ["lm_head"]), "lm_head of modules_to_save is not there"),
    (set_to("modules_to_save", 5), "modules_to_save is 5, not a list of names"),
    (set_to("trainable_token_indices", {"embed_tokens": [-1]}), "not a list of tokens"),
    (set_to("trainable_token_indices", [7]), "the rows of trainable_token_indices are not there"),
    (set_to("bias", "all"), "bias 'all'"),
    (set_to("init_lora_weights", "pissa_niter_4"), "needs a changed base"),
    (set_to("r", 0), "r is 0"),
    (set_to("r", None), "r is None"),
    (set_to("lora_alpha", None), "lora_alpha is None"),
    (set_to("rank_pattern", {"(": 2}), "not a table of patterns"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_faults_are_refused_on_load_and_save(tmp_path: Path, fault: Any, message: str) -> None:
    state, config = parts(trained()[1])
    config = json.loads(json.dumps(config, default=list))
    fault(state, config)
    write_raw(tmp_path, state, config)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)
    with pytest.raises(NumericsError if fault is not_a_number else AdapterError):
        save_adapter(tmp_path / "out", state, config, INFO)
    assert not (tmp_path / "out").exists()


def write_raw(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_all_problems_at_once_first_five_shown(tmp_path: Path) -> None:
    state, config = parts(trained()[1])
    config = json.loads(json.dumps(config, default=list))
    state |= {f"base_model.model.x{number}.other": torch.zeros(1) for number in range(7)}
    other_rank(state, config)
    write_raw(tmp_path, state, config)
    with pytest.raises(AdapterError, match=r"9 faults: .*and 4 more"):
        load_adapter(tmp_path)


def test_pickles_are_refused_by_name_and_by_content(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"is a pickle.*save_pretrained\(\) writes safetensors"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    weights = tmp_path / "adapter_model.safetensors"
    with zipfile.ZipFile(weights, "w") as file:
        file.writestr("data.pkl", b"")
    with pytest.raises(AdapterError, match="pickle under a safetensors name"):
        load_adapter(tmp_path)
    weights.write_bytes(b"\x80\x04\x95")
    with pytest.raises(AdapterError, match="pickle under a safetensors name"):
        load_adapter(tmp_path)


def test_what_is_not_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        load_adapter(tmp_path / "absent")
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(AdapterError, match=r"adapter_config\.json: the file is missing"):
        load_adapter(tmp_path)
    for text in ("[", "[]", "\xff", "[" * 100_000):
        (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(AdapterError, match=r"adapter_config\.json: is not"):
            load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="is not a safetensors file"):
        load_adapter(tmp_path)


def test_damage_to_ours_is_found(tmp_path: Path) -> None:
    state, config = parts(trained()[1])
    save_adapter(tmp_path / "out", state, config, INFO)
    path = tmp_path / "out" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: the bytes are not those"):
        load_adapter(tmp_path / "out")


def test_a_folder_of_plain_peft_is_not_overwritten(tmp_path: Path) -> None:
    model = trained()[1]
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match="did not write"):
        save_adapter(tmp_path / "out", *parts(model), INFO)
