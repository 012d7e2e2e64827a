"""Every way a line can be wrong has its own answer, with the line and the place in it."""

from __future__ import annotations

import hashlib
import json

import pytest

from halfbyte.config import LimitsConfig, hold_to
from halfbyte.data import RecordReader
from halfbyte.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "four"}]}
EXCHANGE = [("user", "What?"), ("assistant", "four")]


def pairs(record) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record.messages]


def with_message(index: int, **changes) -> dict:
    row = json.loads(json.dumps(GOOD))
    row["messages"][index].update(changes)
    return row


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", GOOD),
        ("sharegpt", {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "four"}]}),
        ("sharegpt", {"conversations": GOOD["messages"]}),
        ("prompt", {"prompt": "What?", "completion": "four"}),
        ("prompt", {"prompt": GOOD["messages"][:1], "completion": GOOD["messages"][1:]}),
        ("alpaca", {"instruction": "What?", "output": "four"}),
        ("alpaca", {"instruction": "What?", "input": "", "output": "four"}),
        ("alpaca", {"instruction": "What?", "output": "four", "system": "", "history": []}),
    ],
)
def test_conversations_of_every_format_become_messages(write, format, row) -> None:
    for asked in ("auto", format):
        reader = RecordReader(write([row]), format=asked)
        (record,) = reader
        assert pairs(record) == EXCHANGE
        assert (reader.format, reader.read, record.line) == (format, 1, 1)


def test_other_shapes(write) -> None:
    (record,) = RecordReader(write([{"instruction": "Add", "input": "2 2", "output": "four"}]))
    assert pairs(record)[0] == ("user", "Add\n\n2 2")
    row = {"instruction": "and?", "output": "so", "system": "Be brief.", "history": [["What?", "four"]]}
    (record,) = RecordReader(write([row]))
    assert pairs(record) == [("system", "Be brief."), *EXCHANGE, ("user", "and?"), ("assistant", "so")]
    (record,) = RecordReader(write([GOOD | {"system": "Be brief."}]))
    assert pairs(record) == [("system", "Be brief."), *EXCHANGE]
    own = {"messages": [{"role": "system", "content": "Mine."}, *GOOD["messages"]], "system": "Be brief."}
    (record,) = RecordReader(write([own]))
    assert pairs(record) == [("system", "Mine."), *EXCHANGE]
    (record,) = RecordReader(write([{"segments": [{"text": " a", "label": False}, {"text": "b ", "label": True}]}]))
    assert record.segments == ((" a", False), ("b ", True))
    (record,) = RecordReader(write([{"text": "running text"}]))
    assert (record.text, record.messages) == ("running text", ())
    (record,) = RecordReader(write([{"prompt": "What?", "completion": "four"}]))
    assert not record.needs_template
    turns = [*GOOD["messages"], {"role": "user", "content": "and?"}]
    (record,) = RecordReader(write([{"prompt": turns, "completion": [{"role": "assistant", "content": "so"}]}]))
    assert (record.first_target, len(record.messages)) == (3, 4)
    system = {"from": "system", "value": ""}
    row = {"conversations": [system, {"from": "human", "value": "What?"}, {"from": "gpt", "value": "four"}]}
    (record,) = RecordReader(write([row]))
    assert pairs(record) == [("system", ""), *EXCHANGE]


@pytest.mark.parametrize(
    ("fields", "row"),
    [
        (
            ["messages=dialog", "role=who", "content=says", "user=customer", "assistant=agent"],
            {"dialog": [{"who": "customer", "says": "What?"}, {"who": "agent", "says": "four"}]},
        ),
        (
            ["assistant=bot"],
            {"conversations": [{"from": "human", "value": "What?"}, {"from": "bot", "value": "four"}]},
        ),
        (["instruction=question", "output=response"], {"question": "What?", "response": "four", "output": "not this"}),
        (["prompt=question", "completion=answer"], {"question": "What?", "answer": "four"}),
    ],
)
def test_other_names(write, fields, row) -> None:
    (record,) = RecordReader(write([row]), fields=fields)
    assert pairs(record) == EXCHANGE


def test_byte_order_mark_crlf_and_blank_lines(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    reader = RecordReader(path)
    assert [record.line for record in reader] == [1, 4]
    assert reader.read == 2
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_fields_not_used_are_named(write) -> None:
    row = with_message(0, name="x") | {"id": 7}
    reader = RecordReader(write([row]))
    list(reader)
    assert reader.unused_fields == {"id", "messages[].name"}


def test_malformed_line_73(write) -> None:
    lines = [GOOD] * 72 + ['{"messages": [{"role": "user", "content": oops}]}'] + [GOOD] * 7
    path = write(lines)
    with pytest.raises(DataError, match=r"data\.jsonl:73:43: not valid JSON: Expecting value") as caught:
        list(RecordReader(path))
    assert caught.value.exit_code == 3
    reader = RecordReader(path, on_bad_line="skip")
    assert len(list(reader)) == 79
    assert (reader.read, reader.dropped) == (80, {"not valid JSON": 1})
    assert ":73:43" in reader.first_dropped["not valid JSON"]


DEEP = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
TURNS = GOOD["messages"]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
REJECTED = {
    "truncated last line": ('{"messages": [{"role": "us', r":2:24: not valid JSON: Unterminated string"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', r":2: not valid UTF-8: byte 14 of the line is 0xe9\. Save the file as"),
    "a JSON list": ("[]", r":2: not a JSON object: it is a list\. Write one JSON object per line"),
    "a number of thousands of digits": ('{"a": ' + "9" * 5000 + "}", r":2: not valid JSON: Exceeds the limit"),
    "nested too deeply": (DEEP, r":2: nested too deeply"),
    "NUL": (with_message(0, content="a\0b"), r":2 messages\[0\]\.content: NUL character: character 2"),
    "lone surrogate": (
        with_message(1, content="ab\ud800"), r":2 messages\[1\]\.content: lone surrogate: \\ud800 at character 3",
    ),
    "null content": (with_message(1, content=None), r":2 messages\[1\]\.content: not a string: it is null"),
    "number as content": (with_message(1, content=4), r":2 messages\[1\]\.content: not a string: it is a number"),
    "list as content": (with_message(0, content=[]), r":2 messages\[0\]\.content: not a string: it is a list"),
    "empty content": (with_message(1, content=" \n"), r":2 messages\[1\]\.content: empty text"),
    "boolean as role": (with_message(0, role=True), r":2 messages\[0\]\.role: not a string: it is a boolean"),
    "messages not a list": ({"messages": "hi"}, r":2 messages: not a list of messages: it is a string"),
    "message not an object": ({"messages": ["hi"]}, r":2 messages\[0\]: not a message: it is a string"),
    "no content": ({"messages": [{"role": "user"}]}, r":2 messages\[0\]: message without 'content': .*'role'"),
    "sharegpt keys": (
        {"messages": [{"from": "human", "value": "a"}]},
        r":2 messages\[0\]: message without 'role': it has the fields 'from', 'value'",
    ),
    "unknown role": (
        with_message(0, role="moderator"),
        r":2 messages\[0\]\.role: unknown role: 'moderator' is none of those .* \(system, user, assistant\)",
    ),
    "tool turn without support": (with_message(0, role="tool"), r":2 messages\[0\]\.role: unknown role: 'tool'"),
    "tool call": ({"messages": [TURNS[0], TOOL_CALL]}, r":2 messages\[1\]\.tool_calls: tool calls are not supported"),
    "two systems": ({"messages": [SYSTEM, SYSTEM, *TURNS]}, r":2 messages: more than one system message"),
    "late system": ({"messages": [TURNS[0], SYSTEM, TURNS[1]]}, r":2 messages: system message is not the first"),
    "assistant first": ({"messages": [SYSTEM, TURNS[1], TURNS[0]]}, r":2 messages: the user does not speak first"),
    "no assistant": ({"messages": TURNS[:1]}, r":2 messages: no assistant turn: there is nothing to learn"),
    "no messages": ({"messages": []}, r":2 messages: no assistant turn"),
    "another format": (
        {"instruction": "a", "output": "b"},
        r":2: a record of another format: the file is read as format messages \(messages\) and this record is of "
        r"format alpaca\. Keep one format",
    ),
    "missing field": ({"message": []}, r":2: a record of another format: .* this record has the fields 'message'"),
    "no fields": ({}, r":2: a record of another format: .* has no fields"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_lines_say_where_and_why(write, name) -> None:
    row, message = REJECTED[name]
    path = write([GOOD, row])
    with pytest.raises(DataError, match=message) as caught:
        list(RecordReader(path))
    assert "\n" not in str(caught.value)
    reader = RecordReader(path, on_bad_line="skip")
    assert [record.line for record in reader] == [1]
    assert (reader.read, list(reader.dropped.values())) == (2, [1])


def test_a_line_over_the_cap_is_one_bad_line(write, default_limits) -> None:
    hold_to(LimitsConfig(line_bytes=200))
    path = write([GOOD, {"text": "x" * 1000}, GOOD])
    with pytest.raises(
        DataError, match=r":2: a line that is too long: limits\.line_bytes is 200\. Write one sample per line"
    ):
        list(RecordReader(path))
    reader = RecordReader(path, on_bad_line="skip")
    assert [record.line for record in reader] == [1, 3]
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_first_record_must_be_of_a_known_format(write) -> None:
    path = write([{"question": "a", "answer": "b"}, GOOD])
    with pytest.raises(DataError, match=r":1: no known format: the record has the fields 'question', 'answer'\. Give"):
        list(RecordReader(path))
    reader = RecordReader(path, on_bad_line="skip")
    assert (len(list(reader)), reader.format) == (1, "messages")


def test_a_prompt_and_a_completion_are_of_one_kind(write) -> None:
    with pytest.raises(DataError, match=r":1 prompt: not a list of messages: it is a string"):
        list(RecordReader(write([{"prompt": "a", "completion": TURNS[1:]}])))


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        list(RecordReader(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        list(RecordReader(tmp_path))
