"""A conversation -> the text its template prints, and which characters of it the model has to say itself.

What is a target is found by rendering, never by searching for a response marker:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
                                                          ^             ^
    start: where the generation prompt ends               |             |
    end: after the end-of-turn token that follows the content ----------+

The end of the content comes from a second rendering, in which every assistant turn carries marks: characters that
occur nowhere else in it. Without its marks that rendering must equal the plain one, or the sample is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from halfbyte.data.deadline import in_time
from halfbyte.data.records import ROLES, Message, Record
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Range = tuple[int, int]
"""Characters [start, end) of a text."""

_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError)
_START, _END, _OPEN, _CLOSE = range(4)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The text of one sample, rendered once."""

    text: str
    targets: tuple[Range, ...]
    """What the model has to say: in order, without overlap."""
    plain: tuple[Range, ...] = ()
    """Where the author of the data wrote the text of a special token: it stays text."""
    add_bos: bool = False
    """The text comes from no template: it begins with BOS if the tokenizer puts one."""
    add_eos: bool = False
    """The text does not end in an end token: EOS is to follow, as a target."""
    where: str = ""
    """File and line, for errors."""

    @property
    def spans(self) -> list[tuple[str, bool]]:
        """`text` cut into (piece, is it a target)."""
        spans, done = [], 0
        for start, end in self.targets:
            spans += [(self.text[done:start], False), (self.text[start:end], True)]
            done = end
        return [(piece, target) for piece, target in [*spans, (self.text[done:], False)] if piece]


class ChatTemplate:
    """Renders records with the tokenizer's own chat template (in transformers' immutable sandbox).

    Args:
        tokenizer: may have no chat template; then only text and prompt/completion strings can be rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(map(str, tokenizer.all_special_tokens))
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        self._special = _any_of(special)
        self._end_of_turn = re.compile(r"\s*(?:" + _any_of(special - ({bos} - {eos})).pattern + ")")
        self.exists = tokenizer.chat_template is not None
        self.roles: tuple[str, ...] = self._known_roles() if self.exists else ROLES

    def render(self, record: Record, where: str) -> Rendered:
        """The text and the targets of `record`; `where` names it in errors.

        Raises:
            DataError: there is no template for a chat, it refuses this conversation, or what the assistant says
                cannot be told apart in what it prints.
        """
        if record.text:
            everything = (0, len(record.text))
            return self._untemplated(record.text, everything, where)
        if record.segments:
            ends = list(accumulate(len(text) for text, _ in record.segments))
            learned = [
                (end - len(text), end) for (text, label), end in zip(record.segments, ends, strict=True) if label
            ]
            return Rendered(text="".join(text for text, _ in record.segments), targets=tuple(learned), where=where)
        if self.exists:
            return self._chat(record, where)
        if record.needs_template:
            raise DataError(
                "the tokenizer has no chat template", where=where,
                fix="Take the instruct variant of the model, or data with prompt and completion as strings",
            )  # fmt: skip
        prompt, completion = (message["content"] for message in record.messages)
        return self._untemplated(prompt + completion, (len(prompt), len(prompt) + len(completion)), where)

    def _untemplated(self, text: str, target: Range, where: str) -> Rendered:
        plain = tuple(match.span() for match in self._special.finditer(text))
        return Rendered(text=text, targets=(target,), plain=plain, add_bos=True, add_eos=True, where=where)

    def _chat(self, record: Record, where: str) -> Rendered:
        messages = record.messages
        text = self._apply(messages, where)
        marks = _unused_characters(text + "".join(message["content"] for message in messages))
        unmarked, found = _take_marks_out(self._apply([self._mark(m, marks) for m in messages], where), marks)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        plain = _pairs(found, _OPEN, _CLOSE)
        ends = [position for kind, position in found if kind == _END]
        if unmarked != text or len(ends) != len(turns) or plain is None:
            raise self._cannot_tell(where)
        targets, done, add_eos = [], 0, False
        for i, content_end in zip(turns, ends, strict=True):
            mark = next((p for kind, p in found if kind == _START and done <= p <= content_end), None)
            start = self._turn_start(messages[:i], text, done, mark, content_end)
            if start is None:
                raise self._cannot_tell(where)
            done, end_token = content_end, self._end_of_turn.match(text, content_end)
            if end_token:
                done = end_token.end()
            elif i == len(messages) - 1:  # what the template prints last must be learned, or EOS would not follow
                done, add_eos = len(text), True
            if i >= record.first_target:
                targets.append((start, done))
        return Rendered(text=text, targets=tuple(targets), plain=tuple(plain), add_eos=add_eos, where=where)

    def _turn_start(
        self, before: Sequence[Message], text: str, least: int, mark: int | None, content_end: int
    ) -> int | None:
        """Where the generation prompt after `before` ends in `text`; where that does not hold, the content's start.

        The first differs from the second where the template prints something that the model has to say (Llama-2's
        space, Qwen3's empty thinking). It does not hold where the template shows earlier turns otherwise (without
        their thinking), or opens the answer in the generation prompt (`<think>`), or has a header but no generation
        prompt: a header is not for the model to say.
        """
        try:
            prompt = self._render(before, add_generation_prompt=True)
            length, limit = len(prompt), content_end if mark is None else mark
            if text.startswith(prompt) and least <= length <= limit:
                only_space = mark is not None and not text[length:mark].strip()
                if only_space or prompt != self._render(before):
                    return length
        except _TEMPLATE_ERRORS:
            pass  # some templates refuse a conversation that stops here
        return mark

    def _mark(self, message: Message, marks: Sequence[str]) -> Message:
        """The message with marks around special-token text and, if it is the assistant's, around its content."""
        content = self._special.sub(lambda match: marks[_OPEN] + match[0] + marks[_CLOSE], message["content"])
        if message["role"] == "assistant":  # marks stand inside outer white space, which templates may trim
            core = content.strip()
            left, _, right = content.partition(core)
            content = left + marks[_START] + core + marks[_END] + right
        return {**message, "content": content}

    def _apply(self, messages: Sequence[Message], where: str) -> str:
        try:
            return self._render(messages)
        except _TEMPLATE_ERRORS as error:
            why = " ".join(str(error).split())[:300]
            raise DataError("the chat template refuses the conversation", where=where, why=why) from None

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _known_roles(self) -> tuple[str, ...]:
        """The roles whose content the template prints; some raise on a system turn or leave it out."""
        user, assistant = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        probes = {
            "system": [{"role": "system", "content": "probe"}, user, assistant],
            "tool": [user, assistant, {"role": "tool", "content": "probe"}, assistant],
        }
        known = {"user", "assistant"}
        for role, conversation in probes.items():
            try:
                if "probe" in in_time(partial(self._render, conversation)):
                    known.add(role)
            except TimeoutError as error:
                raise too_slow(error, "chat template") from None
            except _TEMPLATE_ERRORS:
                continue
        return tuple(role for role in (*ROLES, "tool") if role in known)

    def _cannot_tell(self, where: str) -> DataError:
        return DataError(
            "cannot tell what the assistant says in the rendered text", where=where,
            why="the chat template changes or leaves out the assistant's content",
            fix="Give the tokenizer a chat template that prints it as it is",
        )  # fmt: skip


def too_slow(error: TimeoutError, where: str) -> DataError:
    """The template did not come to an end."""
    return DataError("the chat template takes too long", where=where, why=str(error), fix="It may loop: look at it")


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """A pattern for any of `tokens`, longest first; it matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda t: (-len(t), t)))) or "(?!)")


def _unused_characters(text: str) -> list[str]:
    """Four private-use characters that `text` does not have."""
    used = set(text)
    return [c for c in map(chr, range(0xE000, 0xE000 + len(used) + 4)) if c not in used][:4]


def _take_marks_out(marked: str, marks: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and (which mark, its position in that text) in order."""
    pieces, found, length = [], [], 0
    for piece in re.split(f"([{''.join(marks)}])", marked):
        if piece in marks:
            found.append((marks.index(piece), length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), found


def _pairs(found: Sequence[tuple[int, int]], opening: int, closing: int) -> list[Range] | None:
    """Ranges from each opening mark to the closing mark right after it; None if they do not alternate."""
    inner = [(kind, position) for kind, position in found if kind in (opening, closing)]
    if [kind for kind, _ in inner] != [opening, closing] * (len(inner) // 2):
        return None
    return [(start, end) for (_, start), (_, end) in zip(inner[::2], inner[1::2], strict=True)]
