"""The docs say what the code does: tables, examples, command lines and settings are read from them and compared."""

from __future__ import annotations

import ast
import contextlib
import doctest
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.exceptions
import typer.main

from halfbyte import errors
from halfbyte.checkpoint import adapter, compare, manifest, shards
from halfbyte.cli.main import app
from halfbyte.config import config_from_dict, field_help, load_config, to_dict
from halfbyte.config.base import BLOCKSIZES
from halfbyte.config.formats import QUANT_TYPES
from halfbyte.config.load import SECTIONS
from halfbyte.config.schema import RunConfig
from halfbyte.data import RecordReader, records
from halfbyte.errors import DataError
from halfbyte.quant.blocks import bits_per_weight
from halfbyte.quant.codebook import FP4_TWELFTHS, NF4

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SOURCE = ROOT / "src" / "halfbyte"

Row = list[str]


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def table(name: str, title: str) -> list[Row]:
    """The rows, without the head, of the table under ``<!-- table: title -->``."""
    _, found, after = text_of(name).partition(f"<!-- table: {title} -->\n")
    assert found, f"docs/{name} has no table {title!r}"
    lines = after.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]


def commands(text: str) -> list[str]:
    """Every ``halfbyte ...`` line of a shell block."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.startswith("halfbyte ")]


def parse(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of `arguments`, without running it: the options of the last command."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("halfbyte", arguments)
    while hasattr(command, "commands") and (words := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, words)
        context = command.make_context(name, rest, parent=context)
    return dict(context.params)


# -- command lines and links ------------------------------------------------------------------------------------------


def test_there_are_pages_and_commands() -> None:
    assert {page.name for page in DOCS} >= {"format.md", "numerics.md", "config.md", "design.md", "data.md"}
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_parse(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        options = parse(shlex.split(line)[1:])
        load_config(None, options.get("settings") or ())


def test_the_parser_of_this_file_finds_mistakes() -> None:
    for line in ("train --modle x", "plna --model x", "train --steps many"):
        with pytest.raises(typer.exceptions.TyperException):
            parse(line.split())
    assert parse(["data", "preview", "--samples", "2"])["samples"] == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_in_text_exist(page: Path) -> None:
    command: Any = typer.main.get_command(app)
    named = set(re.findall(r"`halfbyte ([a-z-]+)", page.read_text(encoding="utf-8")))
    assert named <= set(command.commands)


def test_the_design_lists_every_command_once() -> None:
    rows = [row for row in text_of("design.md").splitlines() if row.startswith("| `") and row.endswith("built |")]
    command: Any = typer.main.get_command(app)
    groups = {name: each for name, each in command.commands.items() if hasattr(each, "commands")}
    have = {name for name in command.commands if name not in groups or groups[name].invoke_without_command}
    have |= {f"{name} {sub}" for name, group in groups.items() for sub in group.commands}
    (built,) = rows
    assert set(re.findall(r"`([a-z -]+)`", built)) == have


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    def anchor(title: str) -> str:
        return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")

    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), f"{page.name}: {target}"
        if fragment:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, heads), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_text_exist(page: Path) -> None:
    pattern = r"(?:tests|benchmarks|scripts|src|docs|csrc)/[\w./-]+"
    for name in re.findall(rf"`({pattern})`|python ({pattern})", page.read_text(encoding="utf-8")):
        path = "".join(name)
        assert (ROOT / path).exists(), f"{page.name}: {path}"


# -- format.md --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["format.md", "formats.md"])
def test_examples_run(page: str) -> None:
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    names: dict[str, Any] = {}
    examples = blocks(text_of(page), "pycon")
    assert len(examples) >= 2
    for number, code in enumerate(examples):
        test = parser.get_doctest(code, names, f"{page}, example {number + 1}", None, None)
        runner.run(test, clear_globs=False)
        names = test.globs
    assert runner.summarize(verbose=False).failed == 0


def test_codebooks() -> None:
    cells = [cell for row in table("format.md", "nf4") for cell in row]
    assert {int(code): float(value) for code, value in zip(cells[::2], cells[1::2], strict=True)} == dict(
        enumerate(NF4)
    )
    ((_, *values),) = table("format.md", "fp4")
    assert tuple(map(float, values)) == FP4_TWELFTHS


def test_bits_per_weight() -> None:
    rows = table("format.md", "bits")
    assert [int(row[0]) for row in rows] == list(BLOCKSIZES)
    for size, plain, nested in rows:
        assert plain == f"{bits_per_weight(int(size), False):.4f}"
        assert nested == f"{bits_per_weight(int(size), True):.4f}"


def test_what_the_format_page_names() -> None:
    text = text_of("format.md")
    assert all(f"`{suffix}`" in text for suffix in shards.PICKLE_SUFFIXES)
    assert f'"format": {manifest.FORMAT_VERSION}' in text
    assert adapter.WEIGHTS in text


def test_quantization_config() -> None:
    from halfbyte.model.hf_config import HalfbyteConfig

    (stated,) = (json.loads(block) for block in blocks(text_of("format.md"), "json"))
    config = HalfbyteConfig(bnb_4bit_compute_dtype="bfloat16", llm_int8_skip_modules=["lm_head"])
    assert stated == config.to_dict()


# -- config.md --------------------------------------------------------------------------------------------------------


def test_every_setting_stands_once_with_its_default_and_help() -> None:
    defaults = to_dict(RunConfig())
    expected = [
        f"| `{section}.{key}` | `{json.dumps(defaults[section][key])}` | {' '.join(text.split())} |"
        for section, kind in SECTIONS.items()
        for key, text in field_help(kind).items()
    ]
    assert len(expected) == sum(map(len, defaults.values())), "a field has no docstring"
    assert [line for line in text_of("config.md").splitlines() if re.match(r"\| `\w+\.\w+` \| `", line)] == expected


def test_every_flag_stands_with_its_setting_and_its_commands() -> None:
    """What a flag sets is read from the commands' sources, which options there are from the commands themselves."""
    found = dict(_leaves(typer.main.get_command(app)))
    sets: dict[tuple[str, str], list[str]] = {}
    own: dict[str, list[str]] = {}
    everywhere = {"--json", "--debug"}
    for name, command in found.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        settings = _flags(SOURCE.parent / Path(*command.callback.__module__.split(".")).with_suffix(".py"), options)
        for pair in settings.items():
            sets.setdefault(pair, []).append(f"`{name}`")
        assert everywhere <= options, name
        assert ("--set" in options) == bool(settings), name
        assert ("--config" in options) == (bool(settings) and name not in ("demo", "init")), name
        own[name] = sorted(options - settings.keys() - everywhere - {"--set", "--config"})
    stated = {(flag.strip("`"), key.strip("`")): names.split(", ") for flag, key, names in table("config.md", "flags")}
    assert stated == sets
    others = {
        name.strip("`"): re.findall(r"`([^`]+)`", options) for name, options in table("config.md", "other options")
    }
    assert others == {name: options for name, options in own.items() if options}


def _leaves(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The commands by name, without the groups that only hold others."""
    if not hasattr(command, "commands") or command.invoke_without_command:
        yield name, command
    for part, inner in getattr(command, "commands", {}).items():
        yield from _leaves(inner, f"{name} {part}".strip())


def _flags(file: Path, options: set[str]) -> dict[str, str]:
    """The setting of each of `options`: what load_run is given, {"--steps": ("train.steps", steps)}."""
    return {
        key.value: value.elts[0].value
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value in options
        if isinstance(value, ast.Tuple) and isinstance(value.elts[0], ast.Constant)
    }


def test_the_formats_stand_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    (help_text,) = (
        parameter.help
        for parameter in dict(_leaves(typer.main.get_command(app)))["quantize"].params
        if "--quant-type" in parameter.opts
    )
    assert set(re.findall(r"[a-z]+\d(?:-[a-z]+)?", help_text)) == set(QUANT_TYPES)


def test_settings_named_in_text_exist() -> None:
    known = {f"{section}.{key}" for section, part in to_dict(RunConfig()).items() for key in part}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)[ =`]", text))
        named = {name for name in named if not name.endswith((".safetensors", ".jsonl", ".md"))}
        assert named <= known, page.name


def test_toml_examples_load(tmp_path: Path) -> None:
    for page in DOCS:
        for example in blocks(page.read_text(encoding="utf-8"), "toml"):
            file = tmp_path / "run.toml"
            file.write_text(example, encoding="utf-8")
            given, loaded = tomllib.loads(example), to_dict(load_config(file))
            assert all(loaded[section][key] == value for section in given for key, value in given[section].items())
            assert config_from_dict(loaded) == load_config(file)


def test_what_a_resumed_run_may_change() -> None:
    _, _, after = text_of("config.md").partition("<!-- list: resume -->\n")
    assert set(re.findall(r"`([a-z_.]+)`", after.split("\n\n")[0])) == compare.ALLOWED
    assert all(f"`{key}`" in after.split("\n\n")[1] for key in compare.SAME_BYTES)


def test_exit_codes() -> None:
    stated = {
        name: int(code)
        for code, _, names in table("config.md", "exit codes")
        for name in re.findall(r"\w+Error", names)
    }
    real = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.HalfbyteError)
    }
    assert stated == real


# -- data.md ----------------------------------------------------------------------------------------------------------


def test_every_format_has_an_example_that_is_read(tmp_path: Path) -> None:
    examples = re.findall(r"<!-- example: (\w+) -->\n```json\n(.*?)\n```", text_of("data.md"), re.DOTALL)
    assert [name for name, _ in examples] == list(records.FIELDS)
    for name, line in examples:
        file = tmp_path / f"{name}.jsonl"
        file.write_text(line + "\n", encoding="utf-8")
        reader = RecordReader(file)
        (record,) = reader
        assert reader.format == name
        assert (
            record.text
            or record.segments
            or [message["role"] for message in record.messages][-2:] == ["user", "assistant"]
        )


def test_bad_lines_say_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = table("data.md", "bad lines")
    assert len(rows) >= 15
    for line, message in rows:
        Path("train.jsonl").write_text(line.strip("`") + "\n", encoding="utf-8")
        with pytest.raises(DataError) as caught:
            list(RecordReader("train.jsonl"))
        assert str(caught.value) == message


def test_every_refusal_of_the_data_room_is_on_the_page() -> None:
    """What each DataError says first, with … for what is filled in; and nothing on the page that is not raised."""
    raised = set()
    for file in (SOURCE / "data").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and called == "DataError":
                raised.add(_pattern(node.args[0]))
            elif called == "read_error":
                raised.add("cannot be read")
    listed = {row[0].strip("`") for row in table("data.md", "refusals")}
    shown = {_known(message, raised) for _, message in table("data.md", "bad lines")}
    assert listed | shown == raised


def _pattern(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return str(ast.literal_eval(node))


def _known(message: str, raised: set[str]) -> str:
    for pattern in raised:
        with contextlib.suppress(re.error):
            if re.search(": " + ".+?".join(map(re.escape, pattern.split("…"))), message):
                return pattern
    raise AssertionError(f"no refusal says {message!r}")


# -- reliability.md ---------------------------------------------------------------------------------------------------


def test_every_rule_names_tests_that_exist() -> None:
    rows = table("reliability.md", "rules")
    assert len(rows) >= 25
    for rule, shown in rows:
        names = re.findall(r"`([^`]+)`", shown)
        assert names or "](" in shown, rule
        for name in names:
            file, _, test = name.partition("::")
            path = ROOT / file.partition(" ")[0]
            assert path.is_file(), name
            assert not test or re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE), name


# -- the workflows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.name)
def test_workflows_are_yaml_and_call_scripts_that_exist(file: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="needs the package pyyaml")
    text = file.read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["jobs"]
    for name in re.findall(r"(?:run: |project\}/)(scripts/\w+(?:\.py)?)", text + project):
        assert (ROOT / name).is_file(), name
