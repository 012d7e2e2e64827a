"""``halfbyte chat``."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.common import AsJson, Config, Debug, Device, Memory, Model, Set, console, emit, load_run
from halfbyte.cli.generate import MaxNewTokens, Seed, Temperature
from halfbyte.cli.served import Wanted, base_name, open_served

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.cli.speaker import Answer, Conversation, Speaker
    from halfbyte.serve import Adapters

HELP = """\
/adapter NAME   talk to this adapter from here on; /adapter off to the base, /adapter alone switches to and fro
/adapters       which ones there are
/compare TEXT   answers of the base and of every adapter to TEXT, in one batch; the conversation stays as it is
/retry          another answer to the last message
/new            start over
/system TEXT    another system message; without TEXT, none
/save FILE      add the conversation to FILE, a line of JSON as `train --data` reads it
/quit           end, as Ctrl-D; Ctrl-C stops an answer
A message that begins with / is written with two: //"""


def chat(
    model: Model = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="[NAME=]DIR", help="An adapter to talk to; repeatable.")
    ] = None,
    system: Annotated[str, typer.Option("--system", help="A system message before the conversation.")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    context: Annotated[int, typer.Option("--context", min=64, help="Longest conversation, in tokens.")] = 4096,
    device: Device = None,
    memory: Memory = None,
    config: Config = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """A conversation in the terminal, with adapters to switch between and to compare; /help tells more."""
    from halfbyte.cli.speaker import Conversation, Speaker
    from halfbyte.kernels.buffers import steady_memory
    from halfbyte.serve import Engine

    flags = {
        "--model": ("model.path", model),
        "--device": ("model.device", device),
        "--memory": ("memory.budget", memory),
    }
    run, out = load_run(config, settings, flags), console()
    named = list(name_adapters(adapter or ()).items())
    # Twice: the base's or another adapter's reading of the conversation stays beside the one that goes on.
    positions = 2 * context if named else context
    wanted = Wanted(named=named, context=context, positions=positions, answers=len(named) + 1, http=False)
    with steady_memory():
        served = open_served(run, wanted)
        if not served.texts.chats:
            served.notes.append("this model has no chat template: each message is continued by itself")
        for note in [*served.notes, "/help tells the commands"]:
            out.print(note, style="dim", markup=False)
        engine = Engine(served.decoder, most_running=wanted.answers, most_waiting=wanted.answers)
        engine.start()
        try:
            talk = Chat(
                Speaker(engine, served.texts), served.adapters, Conversation(served.texts, system, max_new_tokens),
                out, temperature=temperature, seed=seed, as_json=as_json,
            )  # fmt: skip
            talk.run()
        finally:
            engine.stop(1)
    emit({"messages": talk.conversation.messages}, as_json)


def name_adapters(given: list[str] | tuple[str, ...]) -> dict[str, Path]:
    """Folders by name, in order: of "NAME=DIR", or of "DIR" under the folder's own. Raises ConfigError."""
    from halfbyte.errors import ConfigError

    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (equals and name and folder) or Path(text).is_dir():
            name, folder = base_name(str(Path(text).absolute())), text
        if name in found:
            raise ConfigError(f"two adapters called {name}", where="--adapter", fix="Write --adapter NAME=DIR")
        found[name] = Path(folder)
    return found


class Chat:
    """The loop: a line is a message, or a command of `HELP`."""

    def __init__(
        self, speaker: Speaker, adapters: Adapters, conversation: Conversation, out: Console, *, temperature: float,
        seed: int, as_json: bool,
    ) -> None:  # fmt: skip
        self._speaker, self._adapters, self.conversation, self._out = speaker, adapters, conversation, out
        self._temperature, self._seed, self._as_json = temperature, seed, as_json
        self._base, *others = adapters.all()
        self._voice = self._last = others[0] if others else self._base
        self._commands = {
            "/adapter": self._switch, "/adapters": self._list, "/compare": self._compare, "/retry": self._retry,
            "/new": self._new, "/system": self._system, "/save": self._save, "/help": self._help,
        }  # fmt: skip

    def run(self) -> None:
        """Until /quit, the end of the input, or Ctrl-C twice at the prompt."""
        interrupted = False
        while True:
            try:
                said = _read_line(f"{self._voice.name}> ").strip()
                interrupted = False
                if said == "/quit":
                    return
                self._do(said)
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                self._note("\nCtrl-C again ends, as /quit and Ctrl-D do")

    def _do(self, said: str) -> None:
        command, _, argument = said.partition(" ")
        if said.startswith("//"):
            self._ask(said[1:])
        elif command in self._commands:
            self._commands[command](argument.strip())
        elif said.startswith("/"):
            self._note(f"{command} is no command\n{HELP}")
        elif said:
            self._ask(said)

    def _ask(self, said: str) -> bool:
        """Whether there is an answer; it is part of the conversation then."""
        answers = self._answers(said, [self._voice])
        if answers:
            self.conversation.add(said, answers[0].text)
        return bool(answers)

    def _answers(self, said: str, voices: list[Any]) -> list[Answer]:
        from halfbyte.cli.speaker import NoAnswerError, TooLongError
        from halfbyte.serve.errors import ApiError
        from halfbyte.serve.sampling import Sampling

        try:
            ids, most, left_out = self.conversation.prompt(said)
        except (TooLongError, ApiError) as error:
            self._note(f"not asked: {error}")
            return []
        if left_out:
            self._note(
                f"the conversation is longer than the context: its oldest {left_out} messages are left out from here "
                "on (/new starts over, --context sets the length)"
            )
        sampling = Sampling(temperature=self._temperature, seed=self._seed)
        self._seed += 1
        screen = _Screen(self._out, self._as_json, titles=len(voices) > 1)
        try:
            return self._speaker.ask(voices, ids, max_tokens=most, sampling=sampling, screen=screen)
        except NoAnswerError as error:
            self._note(f"no answer: {error}")
            return []

    def _switch(self, name: str) -> None:
        known = {served.name: served for served in self._adapters.all()}
        if not name:
            chosen = self._last if self._voice is self._base else self._base
        elif name in known or name == "off":
            chosen = known.get(name, self._base)
        else:
            self._note(f"no adapter {name}")
            self._list("")
            return
        self._voice = chosen
        self._last = self._last if chosen is self._base else chosen
        self._note(f"talking to {chosen.name}" + (" (the base, no adapter)" if chosen is self._base else ""))

    def _list(self, _: str) -> None:
        for served in self._adapters.all():
            mark = "*" if served is self._voice else " "
            self._note(f"{mark} {served.name}" + (" (the base)" if served is self._base else ""))

    def _compare(self, said: str) -> None:
        if said:
            self._answers(said, self._adapters.all())
        else:
            self._note("/compare needs a text")

    def _retry(self, _: str) -> None:
        last = self.conversation.take_back()
        if last is None:
            self._note("nothing has been answered")
            return
        if self._temperature == 0:
            self._note("at --temperature 0 the same adapter says the same again")
        if not self._ask(last[0]):
            self.conversation.add(*last)

    def _new(self, _: str) -> None:
        self.conversation.clear()
        self._note("a new conversation")

    def _system(self, text: str) -> None:
        self.conversation.system = text
        self._note("system message set" if text else "no system message")

    def _save(self, file: str) -> None:
        if not file or not self.conversation.turns:
            self._note("nothing has been said" if file else "/save needs a file")
            return
        path = Path(file).expanduser()
        try:
            _append_line(path, json.dumps({"messages": self.conversation.messages}, ensure_ascii=False))
        except OSError as error:
            self._note(f"not saved: {path}: {error.strerror}")
        else:
            self._note(f"added to {path}")

    def _help(self, _: str) -> None:
        self._note(HELP)

    def _note(self, text: str) -> None:
        self._out.print(text, style="dim", markup=False)


def _append_line(file: Path, line: str) -> None:
    with file.open("a+b") as stream:
        if stream.tell():  # what is there may lack the end of its last line
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(line.encode() + b"\n")


class _Screen:
    """Answers on standard output, what is to be known of them on standard error."""

    def __init__(self, out: Console, as_json: bool, *, titles: bool) -> None:
        self._out, self._as_json, self._titles = out, as_json, titles

    def begin(self, answer: Answer) -> None:
        if self._titles:
            self._out.print(f"{answer.name}:", style="bold", markup=False)

    def write(self, text: str) -> None:
        if not self._as_json:
            sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
            sys.stdout.flush()

    def end(self, answer: Answer) -> None:
        why = {"length": ", cut for its length", "cancelled": ", stopped"}.get(answer.finish, "")
        if self._as_json:
            print(json.dumps({
                "model": answer.name, "text": answer.text, "finish_reason": answer.finish,
                "prompt_tokens": answer.prompt_tokens, "reused_tokens": answer.reused_tokens,
                "new_tokens": answer.new_tokens,
                "seconds_to_first_token": answer.seconds_to_first_token, "tokens_per_s": answer.tokens_per_s,
            }), flush=True)  # fmt: skip
            return
        print(flush=True)
        first, speed = answer.seconds_to_first_token, answer.tokens_per_s
        self._out.print(
            f"{answer.new_tokens} tokens, the first after {first:.2f} s, {speed:.0f} tokens/s{why}", style="dim"
        )


_CONTROLS = {code: "�" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""What a model may not do to a terminal."""


def _read_line(prompt: str) -> str:
    """A line of standard input; with editing and history where Python has readline. Raises EOFError."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401
        return input(prompt)
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
