"""halfbyte data preview | check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from halfbyte.cli.data import data_app
from halfbyte.errors import ConfigError, DataError

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c\td\x1b"}]},
    {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ab" * 200}]},
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data file; the model is a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    fast.chat_template = TEMPLATE
    monkeypatch.setattr("halfbyte.model.load_tokenizer", lambda path: fast, raising=False)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def invoke(*args: object) -> Result:
    return CliRunner().invoke(data_app, [str(arg) for arg in args])


def test_preview_shows_the_mask_without_colour(data) -> None:
    result = invoke("preview", "--model", "tiny", "--data", data, "--samples", 1)
    assert result.exit_code == 0, result.output
    assert "format messages" in result.stdout
    assert "line 1: 27 tokens, 5 learned" in result.stdout
    assert "a|b|<|im_end|>|⏎\n<|im_start|>|a|s|s|i|s|t|a|n|t|⏎\n⟦c|⇥|d|\\x1b|<|im_end|>⟧|⏎" in result.stdout
    assert "\x1b" not in result.stdout
    assert "line 2" not in result.stdout


def test_preview_as_json(data) -> None:
    result = invoke("preview", "--model", "tiny", "--data", data, "--json", "--set", "data.max_seq_len=500")
    answer = json.loads(result.stdout.splitlines()[-1])
    first, second = answer["samples"]
    assert (answer["format"], first["line"], second["line"]) == ("messages", 1, 2)
    assert first["num_tokens"] == len(first["tokens"]) == len(first["targets"])
    learned = [token for token, target in zip(first["tokens"], first["targets"], strict=True) if target]
    assert "".join(learned) == "c\td\x1b<|im_end|>"
    assert first["num_targets"] == len(learned)


def test_check_counts(data, tmp_path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'[model]\npath = "tiny"\n[data]\ntrain = "{data}"\nmax_seq_len = 100\n')
    result = invoke("check", "--config", config)
    assert result.exit_code == 0, result.output
    assert "1  longer than max_seq_len" in result.stdout
    answer = json.loads(invoke("check", "--config", config, "--json").stdout.splitlines()[-1])
    assert {key: answer[key] for key in ("format", "read", "kept", "dropped", "tokens", "supervised_tokens")} == {
        "format": "messages", "read": 2, "kept": 1, "dropped": {"longer than max_seq_len": 1},
        "tokens": 27, "supervised_tokens": 5,
    }  # fmt: skip
    assert (answer["longest"], answer["supervised_share"], answer["notes"]) == (
        27,
        pytest.approx(5 / 27, abs=1e-5),
        [],
    )


def test_errors_are_raised_for_main(data) -> None:
    with pytest.raises(ConfigError, match="no model is given"):
        raise invoke("check", "--data", data).exception
    with pytest.raises(ConfigError, match="no data file is given"):
        raise invoke("preview", "--model", "tiny").exception
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        raise invoke("check", "--model", "tiny", "--data", data.parent / "none.jsonl").exception
