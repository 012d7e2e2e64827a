"""RunConfig: defaults, TOML, --set, and errors that name the nearest key; every field is used and explained."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.config import QuantConfig, RunConfig, config_from_dict, field_help, load_config, to_dict
from halfbyte.config.limits import LimitsConfig
from halfbyte.config.load import SECTIONS
from halfbyte.config.running import warmup_of
from halfbyte.errors import ConfigError

SOURCE = Path(halfbyte.__file__).parent
FIELDS = [(section, field.name) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]


def test_defaults_are_the_papers() -> None:
    config = load_config()
    assert config == RunConfig()
    assert (config.quant.quant_type, config.quant.blocksize, config.quant.double_quant) == ("nf4", 64, True)
    assert (config.optim.lr, config.optim.schedule, config.optim.max_grad_norm) == (2e-4, "constant", 0.3)
    assert config.lora.target_modules == "all-linear"
    assert config.data.packing
    assert config.data.mask_prompt


def test_toml_file_flags_and_settings_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'model.path = "base"\n[lora]\nr = 8\ntarget_modules = ["q_proj", "v_proj"]\n'
        "[optim]\nlr = 1\nbetas = [0.8, 0.9]\n[train]\nsteps = 10\nseed = 1\n"
    )
    config = load_config(file)
    assert config.model.path == "base"
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert (config.optim.lr, type(config.optim.lr), config.optim.betas) == (1.0, float, (0.8, 0.9))
    assert load_config(memory__budget=9e8).memory.budget == "900000000"
    config = load_config(file, ["train.steps=30"], train__steps=20, train__seed=2, data__train=None)
    assert (config.train.steps, config.train.seed, config.data.train) == (30, 2, "")


SETTINGS: list[tuple[str, Any]] = [
    ("optim.lr=1e-3", 1e-3),
    ("optim.lr = 0.5", 0.5),
    ("train.steps=1_000", 1000),
    ("train.steps=5.0", 5),
    ("quant.double_quant=false", False),
    ("quant.quant_type=fp4", "fp4"),
    ('quant.quant_type="fp4"', "fp4"),
    ("lora.target_modules=q_proj,v_proj", ("q_proj", "v_proj")),
    ("lora.target_modules=q_proj", ("q_proj",)),
    ("lora.target_modules=all-linear", "all-linear"),
    ('quant.skip_modules=["a", "b"]', ("a", "b")),
    ("quant.skip_modules=[]", ()),
    ("optim.betas=[0.5, 0]", (0.5, 0.0)),
    ("data.train=/data/a=b.jsonl", "/data/a=b.jsonl"),
    ("data.train=with space.jsonl", "with space.jsonl"),
    ("train.output=2024", "2024"),
    ("train.output=1e5", "1e5"),
    ("train.output=true", "true"),
    ("model.path=2024-01-01", "2024-01-01"),
    ("data.eval=", ""),
    ("memory.budget=900000000", "900000000"),
]


@pytest.mark.parametrize(("setting", "value"), SETTINGS)
def test_settings(setting: str, value: Any) -> None:
    section, _, key = setting.partition("=")[0].strip().partition(".")
    found = getattr(getattr(load_config(settings=[setting]), section), key)
    assert found == value
    assert type(found) is type(value)


BAD_SETTINGS = [
    ("lora.rank=8", "unknown key lora.rank.*Known are r, lora_alpha"),
    ("lora.lora_alfa=8", "unknown key lora.lora_alfa.*Did you mean 'lora_alpha'"),
    ("optim.learning_rate=1", "unknown key optim.learning_rate"),
    ("train.step=1", "Did you mean 'steps'"),
    ("traim.steps=1", "unknown section 'traim'.*Did you mean 'train'"),
    ("steps=1", r"the form section\.key=value"),
    ("train.steps", r"the form section\.key=value"),
    ("train.steps=many", "train.steps cannot be 'many': it takes a whole number"),
    ("train.steps=1.5", "train.steps cannot be 1.5"),
    ("train.steps=true", "train.steps cannot be True"),
    ("train.steps=-1", "at least 0"),
    ("optim.lr=fast", "optim.lr cannot be 'fast': it takes a number"),
    ("optim.lr=true", "optim.lr cannot be True"),
    ("optim.lr=0", "optim.lr: 0.0 is not possible: above 0 and at most 1"),
    ("memory.activations=host", "memory.activations cannot be 'host': choose one of resident, disk"),
    ("optim.lr=-1", "above 0"),
    ("optim.lr=nan", "above 0"),
    ("optim.lr=1e9", "at most 1"),
    ("optim.lr=inf", "at most 1"),
    ("optim.betas=[0.9]", "two numbers"),
    ("optim.betas=[0.9, 1.0]", "two numbers"),
    ("optim.betas=0.9", "optim.betas cannot be 0.9"),
    ("optim.eps=0", "above 0"),
    ("optim.lr_b_ratio=0", "above 0"),
    ("optim.weight_decay=1", "below 1"),
    ("optim.max_grad_norm=-1", "0 or more"),
    ("optim.max_grad_norm=nan", "0 or more"),
    ("optim.warmup_steps=-1", "0 or more"),
    ("optim.schedule=step", "choose one of constant, linear, cosine"),
    ("lora.r=0", "the rank is at least 1"),
    ("lora.lora_alpha=0", "trains nothing"),
    ("lora.lora_alpha=nan", "trains nothing"),
    ("lora.lora_alpha=inf", "lora.lora_alpha"),
    ("lora.dropout=1", "below 1"),
    ("lora.dropout=-0.1", "at least 0"),
    ("lora.use_rslora=1", "lora.use_rslora cannot be 1"),
    ("lora.target_modules=[]", "name at least one layer"),
    ("lora.target_modules=[1]", "lora.target_modules cannot be"),
    ("quant.quant_type=nf5", "choose one of nf4, fp4"),
    ("quant.blocksize=48", "choose one of 32, 64"),
    ("quant.compute_dtype=float8", "choose one of auto, float32"),
    ("quant.embeddings=int4", "choose one of as_stored, int8"),
    ("data.max_seq_len=7", "at least 8"),
    ("data.format=csv", "choose one of auto"),
    ("data.on_long=cut", "choose one of skip"),
    ("train.epochs=0", "above 0"),
    ("train.epochs=inf", "train.epochs"),
    ("train.micro_batch_size=0", "at least 1"),
    ("train.gradient_accumulation_steps=0", "at least 1"),
    ("train.keep=0", "at least 1"),
    ("train.seed=-1", "at least 0"),
    ("train.seed=9223372036854775808", "below 2\\*\\*63"),
    ("memory.optimizer_budget=1kB", "at least 8192 bytes"),
    ("memory.budget=0", "at least 1 bytes"),
    ("memory.budget=8Q", "is not a size"),
]


@pytest.mark.parametrize(("setting", "message"), BAD_SETTINGS)
def test_bad_settings(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(settings=[setting])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 3\n", r"run\.toml: unknown key train\.step\. Did you mean 'steps'"),
        ("[trian]\nsteps = 3\n", r"run\.toml: unknown section 'trian'\. Did you mean 'train'"),
        ("steps = 3\n", r"run\.toml: 'steps' stands outside a section"),
        ("[train\n", r"run\.toml: is not valid TOML"),
        ('[train]\nsteps = "3"\n', r"run\.toml: train\.steps cannot be '3': it takes a whole number"),
        ("[train]\nsteps = 2024-01-01\n", "train.steps cannot be"),
        ("[train.steps]\na = 1\n", "train.steps cannot be"),
        ("[train]\noutput = 5\n", "train.output cannot be 5: it takes text"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"model__pth": "x"}, "unknown key model.pth. Did you mean 'path'."),
        ({"modle__path": "x"}, "unknown section 'modle'. Did you mean 'model'."),
        ({"train__steps": "x"}, "train.steps cannot be 'x': it takes a whole number"),
        ({"memory__budget": "9XB"}, "memory.budget: '9XB' is not a size"),
    ],
)
def test_in_python_an_error_names_the_key(flags: dict[str, Any], said: str) -> None:
    """And no flag, which nobody typed; the command line names its flags (tests/cli/test_main.py)."""
    with pytest.raises(ConfigError) as error:
        load_config(**flags)
    assert str(error.value).startswith(said)
    assert "--" not in str(error.value)


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps: 5 warm-up steps leave nothing of 5 steps"):
        load_config(settings=["optim.warmup_steps=5", "train.steps=5", "optim.schedule=cosine"])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="the output is a file"):
        load_config(train__output=str(tmp_path / "file"))


def test_a_warm_up_is_steps_or_a_share_of_them() -> None:
    for text, steps in {"5": 5, "0.1": 20, "0.001": 1, "0": 0}.items():
        config = load_config(settings=[f"optim.warmup_steps={text}"])
        assert warmup_of(config.optim.warmup_steps, 200) == steps
        assert load_config(settings=["train.steps=200", f"optim.warmup_steps={text}"])
    for text in ("1.5", "-1", "inf", "nan", "-0.5"):
        with pytest.raises(ConfigError, match="a share of them below 1"):
            load_config(settings=[f"optim.warmup_steps={text}"])
    with pytest.raises(ConfigError, match="2 warm-up steps leave nothing of 2 steps"):
        load_config(settings=["optim.warmup_steps=0.9", "train.steps=2", "optim.schedule=linear"])


def test_other_names_are_checked() -> None:
    assert load_config(settings=["data.fields=role=from,content=value"]).data.fields == ("role=from", "content=value")
    for text, why in {"rôle=from": "choose one of messages", "role": "OURS=THEIRS", "role=": "OURS=THEIRS"}.items():
        with pytest.raises(ConfigError, match=why):
            load_config(data__fields=[text])


def test_dict_round_trip() -> None:
    config = load_config(settings=["lora.target_modules=q_proj", "optim.betas=[0.5, 0.6]", "train.steps=3"])
    plain = to_dict(config)
    assert plain["lora"]["target_modules"] == ["q_proj"]
    assert config_from_dict(json.loads(json.dumps(plain))) == config
    with pytest.raises(ConfigError, match=r"lora\.rank: unknown key lora\.rank"):
        config_from_dict({"lora": {"rank": 1}})


def test_configs_are_frozen_and_keyword_only() -> None:
    for section, kind in SECTIONS.items():
        first = dataclasses.fields(kind)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(getattr(RunConfig(), section), first, None)
        with pytest.raises(TypeError):
            kind("x")


def test_scaling() -> None:
    assert load_config(settings=["lora.r=16", "lora.lora_alpha=32"]).lora.scaling == 2
    assert load_config(settings=["lora.r=16", "lora.lora_alpha=32", "lora.use_rslora=true"]).lora.scaling == 8


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_help_text(section: str) -> None:
    texts = field_help(SECTIONS[section])
    assert list(texts) == [field.name for field in dataclasses.fields(SECTIONS[section])]
    assert all(len(text) > 10 and text.endswith(".") and "\n" not in text for text in texts.values())


def fields_read() -> set[tuple[str, str]]:
    """(owner, name) of every ``owner.name`` and ``....owner.name`` that is read in the package outside config/."""
    found: set[tuple[str, str]] = set()
    for file in SOURCE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        if file.stem != "limits":  # these are asked for by name
            texts = {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
            found |= {("limits", field.name) for field in dataclasses.fields(LimitsConfig) if field.name in texts}
        if "config" in file.relative_to(SOURCE).parts:
            continue
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if isinstance(owner, ast.Name | ast.Attribute):
                    found.add((owner.id if isinstance(owner, ast.Name) else owner.attr.lstrip("_"), node.attr))
    return found


def test_every_field_is_used() -> None:
    """A setting that nothing reads is a promise that nothing keeps: ``optim.lr`` or ``config.lr`` stands somewhere."""
    read = fields_read()
    unused = [f"{section}.{name}" for section, name in FIELDS if not {(section, name), ("config", name)} & read]
    assert unused == []


def test_what_is_recorded_without_a_scale_has_absmax() -> None:
    """An adapter or a checkpoint from before least error was the default finds its base again."""
    quant = QuantConfig()
    assert quant.chosen_scale == quant.recipe["scale"] == "mse-signed"
    assert QuantConfig(quant_type="int8").chosen_scale == "absmax"
    before = quant.with_recipe({"quant_type": "nf4", "double_quant": True, "blocksize": 64})
    assert before.chosen_scale == "absmax"
    assert quant.with_recipe(before.recipe) == before
    assert quant.with_recipe(quant.recipe).chosen_scale == "mse-signed"
