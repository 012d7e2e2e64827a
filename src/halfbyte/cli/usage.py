"""What is wrong with a command line as it was typed, in one line that names the way."""

from __future__ import annotations

from typing import Any

from typer.exceptions import TyperException


def usage_text(error: TyperException) -> str:
    """Where, what and what to do: of a misspelt option or command the nearest there is."""
    found: Any = error
    context = getattr(found, "ctx", None)
    path = context.command_path if context is not None else "halfbyte"
    command = path.partition(" ")[2]
    where, what = _found(found, context, f"{command}: " if command else "")
    return f"{where}{what.rstrip('.? ')}. See {path} --help."


def _found(error: Any, context: Any, command: str) -> tuple[str, str]:
    """(where, what)."""
    from halfbyte.config.load import nearest

    message, parameter = error.format_message(), getattr(error, "param", None)
    commands = getattr(context.command, "commands", {}) if context is not None else {}
    if commands and message.startswith(("Missing command", "No such command")):
        given = message.partition("'")[2].partition("'")[0]
        what = f"there is no command {given!r}" if given else "a command is missing"
        return command, f"{what}. {nearest(given, commands)}"
    if option := getattr(error, "option_name", ""):
        if not message.startswith("No such option"):
            return f"{option}: ", "needs a value"
        near = nearest(option, error.possibilities) if getattr(error, "possibilities", None) else ""
        return command, f"there is no option {option}. {near}"
    if message.startswith("Got unexpected extra argument"):
        return command, f"takes no {message.partition('(s) ')[2].strip('()') or 'more'}"
    if parameter is None:
        return command, message
    if message.startswith("Missing "):
        return command, f"{_name(parameter)} is not given"
    return f"{_name(parameter)}: ", _why(error)


def _name(parameter: Any) -> str:
    name = str(parameter.opts[0])
    return name if name.startswith("-") else str(parameter.metavar or name.upper())


def _why(error: Any) -> str:
    """What pydantic, which typer asks, finds; else as typer says it."""
    from halfbyte.config.plain_words import in_plain_words

    cause = error.__context__
    if not hasattr(cause, "errors"):
        return str(error.message)
    first = cause.errors(include_url=False)[0]
    return f"{in_plain_words(first)}, not {first['input']}"
