"""``halfbyte chat``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Annotated

import typer

from halfbyte.cli.common import Adapter, AsJson, Config, Debug, Model, Set, console, emit, open_model
from halfbyte.cli.generate import MaxNewTokens, Seed, Temperature, stream_answer

COMMANDS = "/new starts over, /adapter turns the adapter off and on, /quit ends (so does Ctrl-D)"


def chat(
    model: Model = None,
    adapter: Adapter = None,
    system: Annotated[str, typer.Option("--system", help="A system message before the conversation.")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    config: Config = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """A conversation in the terminal; /adapter compares with and without the adapter."""
    from halfbyte.config import load_config
    from halfbyte.model.generate import prompt_ids

    run = load_config(config, settings or (), model__path=model)
    out = console()
    _, adapted, tokenizer, notes = open_model(run, adapter, out)
    for note in [*notes, COMMANDS]:
        out.print(note, style="dim", markup=False)
    start = [{"role": "system", "content": system}] if system else []
    messages, adapter_on = list(start), adapter is not None
    while True:
        try:
            said = out.input("[bold]you[/] ").strip()
        except EOFError:
            break
        if said == "/quit":
            break
        if said == "/new":
            messages = list(start)
            out.print("a new conversation", style="dim")
        elif said == "/adapter":
            adapter_on = adapter is not None and not adapter_on
            state = "on" if adapter_on else "off" if adapter is not None else "not given (--adapter)"
            out.print(f"adapter {state}", style="dim")
        elif said.startswith("/"):
            out.print(COMMANDS, style="dim", markup=False)
        elif said:
            messages.append({"role": "user", "content": said})
            off = nullcontext() if adapter_on or adapter is None else adapted.disable_adapter()
            with off:
                answer = stream_answer(
                    adapted, tokenizer, prompt_ids(tokenizer, messages), max_new_tokens=max_new_tokens,
                    temperature=temperature, seed=seed, show=not as_json,
                )  # fmt: skip
            messages.append({"role": "assistant", "content": answer["text"]})
            if as_json:
                print(json.dumps(answer), flush=True)
    emit({"messages": messages}, as_json)
