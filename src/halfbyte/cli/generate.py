"""``halfbyte generate``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from halfbyte.cli.common import Adapter, AsJson, Config, Debug, Device, Model, Set, console, emit, load_run, open_model

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time; higher varies more.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the sampling, when the temperature is above 0.")]


def generate(
    model: Model = None,
    prompt: Annotated[str, typer.Option("--prompt", help="What the user says; - reads standard input.")] = "",
    adapter: Adapter = None,
    system: Annotated[str, typer.Option("--system", help="A system message before it.")] = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = None,
    config: Config = None,
    settings: Set = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """One answer to one prompt, through the model's chat template."""
    from halfbyte.errors import ConfigError

    run = load_run(config, settings, {"--model": ("model.path", model), "--device": ("model.device", device)})
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigError("is empty", where="--prompt", fix="Say something")
    from halfbyte.model.generate import prompt_ids

    out = console()
    _, adapted, tokenizer, notes = open_model(run, adapter, out)
    for note in notes:
        out.print(note, style="dim", markup=False)
    messages = [{"role": "system", "content": system}] if system else []
    ids = prompt_ids(tokenizer, [*messages, {"role": "user", "content": text}])
    answer = stream_answer(
        adapted, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, show=not as_json
    )
    emit(answer, as_json)


def stream_answer(
    model: Any, tokenizer: Any, ids: list[int], *, max_new_tokens: int, temperature: float, seed: int, show: bool
) -> dict[str, Any]:
    """Generate after `ids`, writing words to standard output as they come if `show`; the fields of --json."""
    from halfbyte.model.generate import generate

    seen: list[int] = []
    written = 0

    def on_token(token: int) -> None:
        nonlocal written
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=True)
        if show and not text.endswith("�"):  # a character may take several tokens
            sys.stdout.write(text[written:])
            sys.stdout.flush()
            written = len(text)

    (answer,) = generate(
        model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, on_token=on_token
    )
    if show:
        sys.stdout.write("\n")
    return {
        "text": tokenizer.decode(answer.ids, skip_special_tokens=True),
        "tokens_per_s": answer.tokens_per_s,
        "prompt_tokens_per_s": answer.prompt_tokens_per_s,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.ids),
        "seconds_to_first_token": answer.prompt_seconds,
        "engine": answer.engine,
    }
