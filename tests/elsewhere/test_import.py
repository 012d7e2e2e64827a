"""Configs of other tools: whose they are, every key accounted for, values that load, files that are none."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.main import main
from halfbyte.config import load_config
from halfbyte.elsewhere import SOURCES, translate
from halfbyte.elsewhere.read import read_settings, without_parts
from halfbyte.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
FILES = sorted(path for path in CONFIGS.iterdir() if path.is_file())

EXPECTED: dict[str, dict[str, Any]] = {
    "axolotl-qlora.yml": {
        "model.path": "example/Llama-8B", "lora.r": 32, "lora.lora_alpha": 16, "data.format": "alpaca",
        "data.train": "someone-alpaca.jsonl", "optim.lr": 2e-4, "optim.paged": True, "optim.warmup_steps": 0.1,
        "train.epochs": 4, "train.gradient_checkpointing": True, "data.packing": True,
    },
    "axolotl-chat.yml": {
        "lora.target_modules": ["q_proj", "v_proj"], "lora.use_rslora": True, "train.steps": 300, "optim.bits": 8,
        "data.fields": ["messages=conversations", "role=from", "content=value", "user=customer", "assistant=agent",
                        "assistant=bot"],
        "data.eval": "data/held_out.jsonl", "quant.quant_type": "int8", "optim.schedule": "constant",
        "memory.budget": "20GB", "train.keep": 3,
    },
    "axolotl-several.yml": {"data.train": "train.jsonl", "data.format": "sharegpt", "data.mask_prompt": False},
    "axolotl-segments.yml": {
        "quant.quant_type": "fp4", "quant.double_quant": False, "data.format": "segments", "optim.lr_b_ratio": 16,
        "memory.activations": "disk",
    },
    "llamafactory-qlora.yaml": {
        "lora.r": 8, "lora.lora_alpha": 16, "data.max_seq_len": 2048, "optim.warmup_steps": 0.1,
        "train.save_every": 500, "optim.max_grad_norm": 1, "data.packing": False,
    },
    "llamafactory-tags.yaml": {
        "data.train": "data/support.jsonl", "data.format": "messages", "lora.lora_alpha": 32,
        "data.fields": ["messages=dialog", "role=speaker", "content=said", "user=customer", "assistant=agent"],
    },
    "llamafactory-columns.yaml": {
        "data.format": "alpaca", "data.fields": ["instruction=question", "output=answer", "history=before"],
        "train.steps": 20, "data.packing": True,
    },
    "llamafactory-books.yaml": {"data.format": "text", "data.fields": ["text=page"]},
    "unsloth-args.txt": {
        "lora.r": 64, "optim.lr": 2e-6, "optim.warmup_steps": 5, "train.steps": 400, "train.seed": 3407,
        "optim.bits": 8, "lora.use_rslora": True,
    },
    "unsloth.json": {"model.path": "example/qwen-7b", "lora.r": 8, "train.seed": 1, "data.max_seq_len": 1024},
    "unsloth-notebook.txt": {
        "model.path": "example/Llama-8B", "data.train": "talks.jsonl", "data.max_seq_len": 2048, "lora.r": 16,
        "lora.target_modules": ["q_proj", "k_proj"], "train.seed": 3407, "train.micro_batch_size": 2,
        "train.steps": 60, "optim.lr": 2e-4, "optim.bits": 8, "train.output": "outputs",
    },
    "trl-script.py": {
        "model.path": "example/qwen-0.5b", "lora.r": 4, "lora.lora_alpha": 8, "quant.quant_type": "nf4",
        "data.train": "train.jsonl", "optim.lr": 1e-4, "train.output": "2024", "data.max_seq_len": 512,
    },
    "trl-script.json": {
        "quant.double_quant": True, "lora.r": 16, "optim.paged": True, "optim.bits": 8, "optim.warmup_steps": 0.03,
        "data.mask_prompt": True, "data.on_long": "truncate", "log.tensorboard": True,
    },
    "trl-command.txt": {"lora.r": 32, "lora.dropout": 0.05, "optim.betas": [0.9, 0.95], "quant.double_quant": False},
    "trl-bnb.yaml": {"quant.quant_type": "fp4", "lora.use_dora": True, "lora.lora_alpha": 8},
}  # fmt: skip


def test_there_is_an_expectation_for_every_config() -> None:
    assert {path.name for path in FILES} == EXPECTED.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_config_becomes_one_that_loads_and_no_key_is_lost(path: Path, tmp_path: Path) -> None:
    result = translate(path)
    assert result.source == path.name.replace(".", "-").partition("-")[0]
    values = {name: setting.value for name, setting in result.settings.items()}
    assert {name: values.get(name) for name in EXPECTED[path.name]} == EXPECTED[path.name]

    file = tmp_path / "run.toml"
    file.write_text(result.toml(), encoding="utf-8")
    config = load_config(file)
    for name, value in values.items():
        section, _, key = name.partition(".")
        found = getattr(getattr(config, section), key)
        assert (list(found) if isinstance(found, tuple) else found) == value

    source, read = SOURCES[result.source], read_settings(path)
    given = without_parts(read, source.rules) if source.in_parts else read
    accounted = result.mapped.keys() | result.differs.keys() | result.unmapped.keys()
    assert {key for key, value in given.items() if value not in (None, "", [], {})} <= accounted
    for key, text in {**result.differs, **result.unmapped}.items():
        assert f"{key}: {text[:40]}" in result.toml().replace("\n#   ", " ")


def test_the_page_shows_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "elsewhere.md").read_text(encoding="utf-8")
    example = {
        name: re.findall(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", page, re.DOTALL)[0]
        for name in ("axolotl", "result", "script", "arguments")
    }
    Path("axolotl.yml").write_text(example["axolotl"], encoding="utf-8")
    assert translate(Path("axolotl.yml")).toml() == example["result"]
    for name, file in (("script", "script.py"), ("arguments", "arguments.txt")):
        Path(file).write_text(example[name], encoding="utf-8")
        result = translate(Path(file))
        values = {key: setting.value for key, setting in result.settings.items()}
        wanted = {"model.path": "models/llama-3-8b", "lora.r": 16, "train.steps": 60, "optim.lr": 2e-4}
        assert (result.source, {key: values[key] for key in wanted}) == ("unsloth", wanted)
        assert not [key for key, why in result.unmapped.items() if why == "not known here"]


def test_a_key_that_nobody_knows_is_named() -> None:
    result = translate(CONFIGS / "axolotl-qlora.yml")
    assert result.unmapped["frobnicate"] == "not known here"
    assert "strict" not in result.unmapped, "false asks for nothing"
    assert "roles_to_train" in translate(CONFIGS / "axolotl-chat.yml").differs["datasets"]
    assert "b.json > b.jsonl" in translate(CONFIGS / "axolotl-several.yml").differs["datasets"]


PREFERENCES = {
    "axolotl.yml": ("base_model: m\nadapter: qlora\nrl: dpo\n", "rl dpo"),
    "reward.yml": ("base_model: m\nadapter: qlora\nreward_model: true\n", "reward_model True"),
    "llamafactory.yaml": ("model_name_or_path: m\nstage: dpo\nfinetuning_type: lora\n", "stage dpo"),
    "dpo.json": ('{"model_name_or_path": "m", "use_peft": true, "beta": 0.1}', "beta 0.1"),
    "loss.json": ('{"model_name_or_path": "m", "use_peft": true, "loss_type": "sigmoid"}', "loss_type sigmoid"),
    "dpo.py": ("trainer = DPOTrainer('m', args=DPOConfig(max_length=9), train_dataset=rows)\n", "DPOTrainer"),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_tuning_is_refused_with_the_way(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, why = PREFERENCES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert main(["import-config", str(tmp_path / name), "--output", str(tmp_path / "run.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"which halfbyte train does not do: {why}. TRL does it" in line
    for page in re.findall(r"(?:configs|docs)/[\w.]+\.(?:py|md)", line):
        assert (Path(__file__).parents[2] / page).is_file(), page
    assert not (tmp_path / "run.toml").exists()


def test_rankings_in_the_data_are_preferences(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"pairs": {"file_name": "p.json", "ranking": true}}')
    (tmp_path / "a.yaml").write_text("model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ndataset: pairs\n")
    with pytest.raises(ConfigError, match="chosen and rejected answers"):
        translate(tmp_path / "a.yaml")


def test_only_keys_that_are_there_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yml").write_text("base_model: m\nadapter: qlora\nlora_r: 8\nfrobnicate: 1\n", encoding="utf-8")
    result = translate(tmp_path / "a.yml")
    assert result.mapped.keys() == {"base_model", "adapter", "lora_r"}
    assert result.defaults["seed"] == "train.seed"
    assert main(["import-config", str(tmp_path / "a.yml")]) == 0
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith("axolotl: of its keys 3 map, 0 differ, 1 have no counterpart; where it is silent, ")


def test_quoted_numbers_are_numbers_and_text_stays_text(tmp_path: Path) -> None:
    lines = ['base_model: "7"', 'lora_r: "16"', 'learning_rate: "0.0003"', 'micro_batch_size: "2"', 'max_steps: "5"',
             'num_epochs: "3"', 'sequence_len: "64"', 'sample_packing: "false"', 'weight_decay: "1e-2"',
             'output_dir: "2024"']  # fmt: skip
    (tmp_path / "a.yml").write_text("\n".join(lines), encoding="utf-8")
    values = {name: setting.value for name, setting in translate(tmp_path / "a.yml").settings.items()}
    expected = {
        "model.path": "7", "lora.r": 16, "optim.lr": 3e-4, "train.micro_batch_size": 2, "train.steps": 5,
        "data.max_seq_len": 64, "data.packing": False, "optim.weight_decay": 0.01, "train.output": "2024",
    }  # fmt: skip
    assert {name: values.get(name) for name in expected} == expected
    assert "train.epochs" not in values


def test_the_wrong_tool_is_told_whose_it_looks_like(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / "axolotl-qlora.yml"
    assert "try --from axolotl" in translate(path, "trl").hint
    assert translate(path, "axolotl").hint == ""
    assert main(["import-config", str(path), "--from", "llamafactory"]) == 0
    assert "hint            its keys look like axolotl's: try --from axolotl" in capsys.readouterr().err


def test_a_script_is_read_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"""import pathlib
pathlib.Path({str(mark)!r}).touch()
rate = 1e-4
rate = rate * 2
model = AutoModelForCausalLM.from_pretrained("m", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
tokenizer = AutoTokenizer.from_pretrained("another")
lora = LoraConfig(r=len("ab"), target_modules="\\d")
trainer = SFTTrainer(model=model, args=SFTConfig(learning_rate=rate, max_length=256), peft_config=lora)
again = AutoModelForCausalLM.from_pretrained("result")
"""
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    result = translate(tmp_path / "a.py")
    assert not mark.exists()
    assert result.settings["model.path"].value == "m"
    assert result.settings["data.max_seq_len"].value == 256
    assert result.unmapped["learning_rate"] == "the script computes it: rate"
    assert result.unmapped["r"] == "the script computes it: len('ab')"


def test_every_rule_leads_to_settings_that_exist() -> None:
    """Each rule on values of every kind: it answers, and names only settings there are."""
    known = {f"{section}.{key}" for section, part in load_config().__dict__.items() for key in part.__dict__}
    for source in SOURCES.values():
        for key, rule in source.rules.items():
            for value in (
                True,
                False,
                1,
                0.5,
                "text",
                "auto",
                ["a", "b"],
                {"a": 1},
                [{"path": "a", "type": "alpaca"}],
            ):
                assert rule(value, {key: value}).settings.keys() <= known, (source.name, key, value)


@pytest.mark.parametrize("path", [CONFIGS / "axolotl-qlora.yml", CONFIGS / "trl-script.json"], ids=lambda p: p.name)
def test_the_command_writes_what_plan_reads(
    path: Path, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    assert main(["import-config", str(path), "--output", str(file), "--json"]) == 0
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said.keys() >= {"settings", "mapped", "differs", "unmapped"}
    assert "have no counterpart" in captured.err
    assert main(["plan", "--config", str(file), "--model", str(tiny_llama), "--set", "train.output=", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"]
    assert main(["import-config", str(path), "--output", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["import-config", str(path)]) == 0
    assert tomllib.loads(capsys.readouterr().out)


BAD = {
    "none.yml": (None, "No such file"),
    "empty.yml": ("", "it holds no keys"),
    "list.yml": ("- a\n- b\n", "it holds no keys"),
    "run.toml": ('[model]\npath = "m"\n', "is halfbyte's own already. Use it as it is: halfbyte train --config"),
    "half.py": ("model = from_pretrained(\n", "is no Python: line 1"),
    "other.py": ("print('hello')\n", "it holds no keys"),
    "deep.py": ("from_pretrained(" + "(" * 100_000, "is no Python"),
    "tab.yml": ("a: b: c\n", "line 1: mapping values"),
    "code.yml": ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    "aliases.yml": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases"),
    "cut.json": ('{"base_model": ', "Expecting value"),
    "deep.json": ("[" * 100_000, "is neither"),
    "deeper.json": ('{"a": ' * 100_000, "is neither"),
    "long.yml": ("a: " + "x" * 1_000_001, "more than 1,000,000 bytes"),
    "who.yml": ("colour: blue\n", "whose config this is does not show"),
    "latin.yml": (b"a: \xff\n", "not valid UTF-8"),
    "rate.yml": ("base_model: a\nlearning_rate: fast\n", "rate.yml: learning_rate: optim.lr cannot be 'fast'"),
    "rank.yml": ("base_model: a\nlora_r: 0\n", "rank.yml: lora_r: lora.r cannot be 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_config_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        translate(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_new_tokens_and_whole_tables() -> None:
    rules = SOURCES["axolotl"].rules
    assert rules["tokens"](["<|a|>"], {}).settings == {"lora.trainable_tokens": ["<|a|>"]}
    both = rules["lora_modules_to_save"](["embed_tokens", "lm_head"], {})
    assert both.settings == {"lora.modules_to_save": ["embed_tokens", "lm_head"]}
    assert "only the input embedding" in rules["lora_modules_to_save"](["norm"], {}).missing
    other = SOURCES["llamafactory"].rules
    assert other["add_tokens"]("<|a|>, <|b|>", {}).settings == {"lora.trainable_tokens": ["<|a|>", "<|b|>"]}
    assert other["additional_target"]("embed_tokens,lm_head", {}).settings == both.settings
    among = SOURCES["unsloth"].rules["target_modules"](["q_proj", "lm_head", "embed_tokens"], {})
    assert among.settings == {
        "lora.modules_to_save": ["lm_head", "embed_tokens"],
        "lora.target_modules": ["q_proj"],
    }
    assert "trained whole" in among.differs
