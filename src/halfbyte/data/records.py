"""JSON lines or Parquet -> records: every complaint names the file, the line and the place inside the record."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halfbyte.config import DataConfig
from halfbyte.config.limits import limit
from halfbyte.data.rows import json_rows
from halfbyte.errors import DataError

Message = dict[str, str]
"""One turn: {"role": ..., "content": ...}."""

ROLES = ("system", "user", "assistant")
"""Roles every chat format knows; a template may know fewer or also "tool"."""

FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "segments": ("segments",),
    "text": ("text",),
}
"""The fields by which each format is known, in the order in which they are looked for."""

_MORE_FIELDS = {"messages": ("system",), "sharegpt": ("system",), "alpaca": ("system", "history", "input")}
"""What a record may have besides."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample as text: `messages`, `text` or `segments`."""

    line: int
    """1-based line in the file, or row."""
    messages: tuple[Message, ...] = ()
    """A checked conversation: at most one system turn, then a user turn; at least one assistant turn."""
    text: str = ""
    """Running text, when there are no messages."""
    segments: tuple[tuple[str, bool], ...] = ()
    """Pieces of text as they stand, and whether each is learned."""
    first_target: int = 0
    """Assistant turns before this message are context: they came in a `prompt` field."""
    needs_template: bool = True
    """False for a prompt and a completion given as strings: these also work without a chat template."""


class RecordReader:
    """Iterates over the records of a file of JSON lines, or of a .parquet file, holding one at a time.

    Lines are UTF-8 with or without a byte order mark, LF or CRLF; blank ones are ignored. Afterwards `format`,
    `read` (records seen), `dropped` (reason -> count), `first_dropped` (reason -> message), `unused_fields` and
    `sha256` (of the file's bytes) are complete; during it `line` is the one that was read last.

    Args:
        path: the file.
        format: a key of `FIELDS`, or "auto": the first readable record decides, for the whole file.
        on_bad_line: "error" raises at the first unusable line, "skip" counts it.
        roles: the roles a conversation may have.
        fields: what the file calls things otherwise: "OURS=THEIRS", as in data.fields.

    Raises:
        DataError: (while iterating) the file cannot be read, or a line is unusable and `on_bad_line` is "error".
    """

    def __init__(
        self, path: str | Path, *, format: str = "auto", on_bad_line: str = "error", roles: Sequence[str] = ROLES,
        fields: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.path = str(path)
        self.format = format
        self.on_bad_line = on_bad_line
        self.roles = roles
        self._ours = {theirs: ours for ours, _, theirs in (entry.partition("=") for entry in fields)}
        self.read = self.line = 0
        self.dropped: Counter[str] = Counter()
        self.first_dropped: dict[str, str] = {}
        self.unused_fields: set[str] = set()
        self.sha256 = ""

    @classmethod
    def from_config(cls, path: str | Path, config: DataConfig, roles: Sequence[str] = ROLES) -> RecordReader:
        """A reader with the format, the names and the strictness of `config`."""
        return cls(path, format=config.format, on_bad_line=config.on_bad_line, roles=roles, fields=config.fields)

    def __iter__(self) -> Iterator[Record]:
        digest = hashlib.sha256()
        for line, raw in json_rows(self.path, digest):
            self.read, self.line = self.read + 1, line
            try:
                record = self._parse(line, raw)
            except DataError as error:
                self.reject(error)
                continue
            yield record
        self.sha256 = digest.hexdigest()

    def where(self, line: int, place: str = "") -> str:
        """`file:line`, or `file:line place` with the path inside the record."""
        return f"{self.path}:{line} {place}".rstrip()

    def reject(self, error: DataError) -> None:
        """Count `error` under what it says if bad lines are skipped, else raise it."""
        if self.on_bad_line == "error":
            raise error
        self.dropped[error.what] += 1
        self.first_dropped.setdefault(error.what, str(error))

    def _parse(self, line: int, raw: bytes) -> Record:
        record = self._named(self._object(line, raw))
        looks_like = next((name for name, fields in FIELDS.items() if all(f in record for f in fields)), None)
        if self.format == "auto":
            if looks_like is None:
                known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FIELDS.items())
                fix = f"Give records the fields of one format ({known})"
                if "chosen" in record and "rejected" in record:
                    fix = "Tune to preferences with TRL, on a base in 4 bits: configs/preference.py (docs/tools.md)"
                raise DataError(
                    "no known format", where=self.where(line), why=f"the record has {_names(record)}", fix=fix
                )
            self.format = looks_like
        fields = FIELDS[self.format]
        if any(field not in record for field in fields):
            it_is = f"this record is of format {looks_like}" if looks_like else f"this record has {_names(record)}"
            raise DataError(
                "a record of another format", where=self.where(line),
                why=f"the file is read as format {self.format} ({', '.join(fields)}) and {it_is}",
                fix="Keep one format per file, or set data.format",
            )  # fmt: skip
        self.unused_fields.update(record.keys() - {*fields, *_MORE_FIELDS.get(self.format, ())})
        return self._record(line, record)

    def _object(self, line: int, raw: bytes) -> dict[str, Any]:
        where = self.where(line)
        if len(raw) > limit("line_bytes"):
            raise DataError(
                "a line that is too long", where=where, why=f"limits.line_bytes is {limit('line_bytes'):,}",
                fix="Write one sample per line, or raise it with --set limits.line_bytes=BYTES",
            )  # fmt: skip
        try:
            record = json.loads(raw.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as error:
            why = f"byte {error.start + 1} of the line is 0x{raw[error.start]:02x}"
            raise DataError("not valid UTF-8", where=where, why=why, fix="Save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError("not valid JSON", where=f"{where}:{error.colno}", why=error.msg) from None
        except RecursionError:
            raise DataError("nested too deeply", where=where) from None
        except ValueError as error:  # an integer of thousands of digits
            raise DataError("not valid JSON", where=where, why=str(error)) from None
        if not isinstance(record, dict):
            fix = "Write one JSON object per line"
            raise DataError("not a JSON object", where=where, why=f"it is {_kind(record)}", fix=fix)
        return record

    def _record(self, line: int, record: dict[str, Any]) -> Record:
        if self.format == "text":
            return Record(line=line, text=self._string(line, "text", record["text"]))
        if self.format in ("messages", "sharegpt"):
            (field,) = FIELDS[self.format]
            turns = self._messages(line, field, record[field])
            before = () if turns and turns[0]["role"] == "system" else self._system(line, record)
            return self._chat(line, before + turns)
        if self.format == "alpaca":
            return Record(line=line, messages=self._alpaca(line, record))
        if self.format == "segments":
            return Record(line=line, segments=self._segments(line, record["segments"]))
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            pair = self._string(line, "prompt", prompt), self._string(line, "completion", completion)
            return Record(line=line, messages=_exchange(*pair), needs_template=False)
        before = self._messages(line, "prompt", prompt)
        return self._chat(line, before + self._messages(line, "completion", completion), first_target=len(before))

    def _named(self, value: dict[str, Any]) -> dict[str, Any]:
        """`value` with our names for its fields; one that has our name already gives way."""
        return (
            {**value, **{self._ours[key]: value[key] for key in value if key in self._ours}} if self._ours else value
        )

    def _system(self, line: int, record: dict[str, Any]) -> tuple[Message, ...]:
        """The system turn that stands beside the conversation, if any."""
        if record.get("system") in (None, ""):
            return ()
        return ({"role": "system", "content": self._string(line, "system", record["system"])},)

    def _alpaca(self, line: int, record: dict[str, Any]) -> tuple[Message, ...]:
        turns = self._system(line, record)
        for i, pair in enumerate(record.get("history") or ()):
            place = f"history[{i}]"
            if not (isinstance(pair, list) and len(pair) == 2):
                raise DataError(
                    "not a question and an answer", where=self.where(line, place), why=f"it is {_kind(pair)}"
                )
            turns += _exchange(*(self._string(line, f"{place}[{j}]", text) for j, text in enumerate(pair)))
        user = self._string(line, "instruction", record["instruction"])
        if record.get("input") not in (None, ""):
            user += "\n\n" + self._string(line, "input", record["input"])
        return turns + _exchange(user, self._string(line, "output", record["output"]))

    def _segments(self, line: int, value: Any) -> tuple[tuple[str, bool], ...]:
        where = self.where(line, "segments")
        if not isinstance(value, list) or not all(
            isinstance(item, dict) and isinstance(item.get("label"), bool) for item in value
        ):
            raise DataError(
                "not a list of text and label", where=where, fix='Write {"text": TEXT, "label": true or false}'
            )
        texts = [
            self._string(line, f"segments[{i}].text", item.get("text"), any_text=True) for i, item in enumerate(value)
        ]
        return tuple(zip(texts, (item["label"] for item in value), strict=True))

    def _string(self, line: int, place: str, value: Any, *, any_text: bool = False) -> str:
        where = self.where(line, place)
        if not isinstance(value, str):
            raise DataError("not a string", where=where, why=f"it is {_kind(value)}")
        if not any_text and not value.strip():
            raise DataError("empty text", where=where)
        if "\0" in value:
            raise DataError("NUL character", where=where, why=f"character {value.index(chr(0)) + 1}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            raise DataError("lone surrogate", where=where, why=f"{code} at character {error.start + 1}") from None
        return value

    def _messages(self, line: int, place: str, value: Any) -> tuple[Message, ...]:
        if not isinstance(value, list):
            raise DataError("not a list of messages", where=self.where(line, place), why=f"it is {_kind(value)}")
        return tuple(self._message(line, f"{place}[{i}]", item) for i, item in enumerate(value))

    def _message(self, line: int, place: str, value: Any) -> Message:
        where = self.where(line, place)
        if not isinstance(value, dict):
            raise DataError("not a message", where=where, why=f"it is {_kind(value)}")
        value = self._named(value)
        sharegpt = self.format == "sharegpt" and "from" in value
        role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
        for key in (role_key, text_key):
            if key not in value:
                raise DataError(f"message without {key!r}", where=where, why=f"it has {_names(value)}")
        if value.get("tool_calls"):
            raise DataError("tool calls are not supported", where=f"{where}.tool_calls")
        self.unused_fields.update(f"{place.partition('[')[0]}[].{key}" for key in value.keys() - {role_key, text_key})
        name = self._string(line, f"{place}.{role_key}", value[role_key])
        role = self._ours.get(name, _SHAREGPT_ROLES.get(name, name) if self.format == "sharegpt" else name)
        if role not in self.roles:
            why = f"{name!r} is none of those the template knows ({', '.join(self.roles)})"
            raise DataError("unknown role", where=f"{where}.{role_key}", why=why)
        content = self._string(line, f"{place}.{text_key}", value[text_key], any_text=role in ("system", "tool"))
        return {"role": role, "content": content}

    def _chat(self, line: int, messages: tuple[Message, ...], first_target: int = 0) -> Record:
        where = self.where(line, "messages" if self.format == "messages" else "")
        roles = [message["role"] for message in messages]
        if roles.count("system") > 1:
            raise DataError("more than one system message", where=where)
        if "system" in roles[1:]:
            raise DataError("system message is not the first", where=where)
        if "assistant" not in roles[first_target:]:
            raise DataError("no assistant turn", where=where, why="there is nothing to learn")
        if next(role for role in roles if role != "system") != "user":
            raise DataError("the user does not speak first", where=where)
        return Record(line=line, messages=messages, first_target=first_target)


def _exchange(user: str, assistant: str) -> tuple[Message, ...]:
    return {"role": "user", "content": user}, {"role": "assistant", "content": assistant}


def _names(record: dict[str, Any]) -> str:
    names = [name[:40] for name in record][:8]
    return "the fields " + ", ".join(map(repr, names)) if names else "no fields"


def _kind(value: Any) -> Literal["null", "a boolean", "a number", "a string", "a list", "an object"]:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"
