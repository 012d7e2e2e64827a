"""Training data and tokenizers with something wrong: docs/refusals.md says what is said of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults.refusals import Change, chat, check, data, promised, tokenizer

from halfbyte.cli.main import main
from halfbyte.data import deadline

pytestmark = pytest.mark.filterwarnings("ignore")  # what the command line hides from users, it hides here
TABLE = "data"
GOOD = chat(("user", "a"), ("assistant", "b"))
ARGUMENTS = [
    "train", "--model", "PLACE/model", "--data", "PLACE/data.jsonl", "--output", "PLACE/out", "--steps", "1",
    "--set", "data.max_seq_len=96",
]  # fmt: skip
NO_TOOLS = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def _template(text: str) -> Change:
    return lambda place: (place / "model" / "chat_template.jinja").write_text(text)


def _add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    value["added_tokens"].append({**value["added_tokens"][0], "id": 320, "content": "§§", "special": False})
    path.write_text(json.dumps(value))


DATA: dict[str, Change] = {
    "no such file": lambda p: (p / "data.jsonl").unlink(),
    "a folder": lambda p: [(p / "data.jsonl").unlink(), (p / "data.jsonl").mkdir()],
    "an empty file": data(b""),
    "blank lines": data("", " ", ""),
    "nothing left after filters": data(chat(("user", "a" * 5000), ("assistant", "b"))),
    "line 73 is no JSON": data(*[GOOD] * 72, '{"messages": [}', GOOD),
    "the last line is cut off": data(GOOD, '{"messages": [{"role": "us'),
    "a byte that is no UTF-8": data(GOOD, b'{"text": "\xff"}'),
    "a lone surrogate": data(GOOD, chat(("user", "a\ud800"), ("assistant", "b"))),
    "NUL": data(GOOD, chat(("user", "a\0"), ("assistant", "b"))),
    "a list": data("[1, 2]"),
    "unknown fields": data('{"question": "a"}'),
    "preference pairs": data('{"prompt": "a", "chosen": "b", "rejected": "c"}'),
    "two formats": data(GOOD, '{"text": "x"}'),
    "messages that are no list": data('{"messages": "a"}'),
    "a message without content": data('{"messages": [{"role": "user"}]}'),
    "empty content": data(chat(("user", "a"), ("assistant", ""))),
    "content that is null": data(chat(("user", "a"), ("assistant", None))),
    "content that is a number": data(chat(("user", 3), ("assistant", "b"))),
    "nested 5,000 deep": data('{"messages": ' + "[" * 5000 + "]" * 5000 + "}"),
    "a line of 50 MB": data(GOOD, b'{"text": "' + b"x" * 50_000_000 + b'"}'),
    "an unknown role": data(chat(("wizard", "a"), ("assistant", "b"))),
    "a tool's turn for a template without tools": lambda p: [
        _template(NO_TOOLS)(p), data(chat(("user", "a"), ("tool", "b"), ("assistant", "c")))(p)
    ],
    "a system turn for a template without them": lambda p: [
        _template(NO_TOOLS)(p), data(chat(("system", "a"), ("user", "b"), ("assistant", "c")))(p)
    ],
    "two system turns": data(chat(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d"))),
    "the assistant speaks first": data(chat(("assistant", "b"))),
    "no assistant's turn": data(chat(("user", "a"))),
    "no tokenizer": lambda p: [f.unlink() for f in (p / "model").glob("*token*")],
    "a tokenizer that is no JSON": lambda p: (p / "model" / "tokenizer.json").write_text("{"),
    "a tokenizer without a chat template": lambda p: [
        (p / "model" / "chat_template.jinja").unlink(missing_ok=True), tokenizer(chat_template=None)(p)
    ],
    "neither the tokenizer nor the template has an end": lambda p: [
        _template(NO_END)(p), tokenizer(eos_token=None)(p)
    ],
    "a template that is no Jinja": _template("{% for %}"),
    "a template that looks around": _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "a template that loops": _template(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a template that loops at a word": _template(
        "{% if 'What' in messages[0].content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}" + NO_TOOLS
    ),
    "a token that the model has no row for": lambda p: [
        _add_token(p / "model"), data(chat(("user", "a§§b"), ("assistant", "b")))(p)
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
@pytest.mark.timeout(60)
def test_refused(case: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "SECONDS", 1.0)
    DATA[case](place)
    check(TABLE, case, ARGUMENTS, place, capsys)


def test_the_page_shows_these() -> None:
    assert list(promised(TABLE)) == list(DATA)


def test_bad_lines_can_be_skipped_and_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte order mark and CRLF are no fault."""
    good = [line + "\r" for line in (place / "data.jsonl").read_text().splitlines()]
    data("\ufeff" + good[0], "{", *good[1:], "[]", "{", chat(("user", "a" * 5000), ("assistant", "b")))(place)
    arguments = [each.replace("PLACE", str(place)) for each in ARGUMENTS]
    assert main([*arguments, "--set", "data.on_bad_line=skip"]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("training data: 40 of"))
    assert "40 of 44 samples" in line
    for dropped in ("2 dropped: not valid JSON", "1 dropped: not a JSON object", "1 dropped: longer than max_seq_len"):
        assert dropped in line
