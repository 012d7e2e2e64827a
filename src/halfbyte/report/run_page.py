"""A run as one page: `run_page` when it is done, and its parts for whoever draws it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from halfbyte.dtypes import format_bytes
from halfbyte.report.chart import Level, Line, chart, highest, smoothed, thinned
from halfbyte.report.html import page, table, text
from halfbyte.report.run import TERMS, Answer, RunReport, Shown

MOST_NOTES = 200


def run_page(run: RunReport) -> str:
    """The whole page."""
    parts = [
        heading(run), cards(run), curves(run), exchanges(run.answers), planned(run), masks(run.samples),
        _settings(run), _facts(run), notes(run),
    ]  # fmt: skip
    return page(f"{run.title}: halfbyte", parts)


def heading(run: RunReport) -> str:
    """Title, state, when and how long."""
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started))
    return (
        f"<h1>{text(run.title)}</h1><p class=soft>{text(run.state)}: {run.step:,} of {run.steps:,} steps; "
        f"begun {began}, {duration(run.seconds)}</p>"
    )


def cards(run: RunReport) -> str:
    """The figures one looks for first."""
    found: list[tuple[str, str, str]] = []
    if run.held_out:
        first, last = run.held_out[0], run.held_out[-1]
        before = f"{first[1]:.4f} before, {last[1] / first[1] - 1:+.1%}" if first[0] == 0 < last[0] else ""
        found.append(("held-out loss", f"{last[1]:.4f}", before or f"after {last[0]:,.0f} steps"))
    if run.train_loss is not None:
        found.append(("training loss", f"{run.train_loss:.4f}", "mean of the last tenth of the steps"))
    if run.tokens_per_s is not None:
        found.append(("tokens / s", f"{run.tokens_per_s:,.0f}", "of the steps, without evaluation"))
    if run.peak:
        plan = run.plan
        limit = f" of {format_bytes(plan.budget)}" if plan and plan.budget else ""
        told = f"{format_bytes(plan.peak_memory)} planned{limit}" if plan else ""
        found.append(("peak memory", format_bytes(run.peak), told))
    if run.step_seconds is not None and run.step < run.steps:
        left = duration((run.steps - run.step) * run.step_seconds)
        found.append(("time left", left, "of steps, at the last ones' pace"))
    boxes = (f"<div><span class=soft>{name}</span><b>{value}</b><small class=soft>{note}</small></div>" for
             name, value, note in found)  # fmt: skip
    return f"<div class=cards>{''.join(boxes)}</div>"


def curves(run: RunReport) -> str:
    """Loss, memory, speed and learning rate."""
    losses = [Line("each step", thinned(run.loss), 0, "thin"), Line("smoothed", thinned(smoothed(run.loss)), 0)]
    levels = []
    if run.plan is not None:
        levels.append(Level("planned peak", run.plan.peak_memory, 1))
        levels += [Level("budget", run.plan.budget, 3)] if run.plan.budget else []
    pictures = [
        chart("Loss", [*losses, Line("held-out", run.held_out, 1, "dots")], x="step"),
        chart("Memory", [Line("in use", thinned(run.memory, highest), 0)], x="seconds", levels=levels, zero=True,
              marks=[(at, 0.0) for at, _ in run.phases], mark_names=[name for _, name in run.phases],
              shown=_short_bytes),
        chart("Speed", [Line("learned tokens / s", thinned(run.speed), 2)], x="step", zero=True, shown="{:,g}".format),
        chart("Learning rate", [Line("", thinned(run.lr), 4)], x="step", zero=True),
    ]  # fmt: skip
    return f"<div class=grid>{''.join(pictures)}</div>"


def exchanges(answers: Iterable[Answer]) -> str:
    """Held-out prompts, before and after."""
    parts = []
    for one in answers:
        said = (("expected", one.expected), ("before", one.before), ("after", one.after))
        texts = "".join(f"<b>{who}</b><blockquote>{text(words)}</blockquote>" for who, words in said if words)
        parts.append(f"<details open><summary>{text(one.prompt)}</summary>{texts}</details>")
    return "<h2>Held-out prompts, before and after</h2>" + "".join(parts) if parts else ""


def planned(run: RunReport) -> str:
    """The plan beside what was measured: by phase, and term by term at its peak."""
    plan = run.plan
    if plan is None:
        return ""
    phases = [
        [text(name), format_bytes(size), *_beside(size, run.peaks.get(name))] for name, size in plan.phases.items()
    ]
    rows = sorted(plan.terms.items(), key=lambda item: -item[1])
    terms = [
        [text(TERMS.get(name, name.replace("_", " "))), format_bytes(size),
         format_bytes(run.measured[name]) if name in run.measured else ""]
        for name, size in rows
    ]  # fmt: skip
    rest = run.peak - sum(size for name, size in run.measured.items() if name in plan.terms)
    left = plan.peak_memory - sum(size for name, size in plan.terms.items() if name in run.measured)
    if run.peak and run.measured:
        terms.append(["all without a figure of its own", format_bytes(left), format_bytes(rest)])
    if run.peak:
        terms.append(["<b>peak</b>", f"<b>{format_bytes(plan.peak_memory)}</b>", f"<b>{format_bytes(run.peak)}</b>"])
    changes = "".join(f"<li>{text(change)}" for change in plan.changes)
    return (
        "<h2>Memory, planned and measured</h2>"
        + table(["phase", "planned", "measured", "planned more by"], phases)
        + f"<p class=soft>Measured by looking ten times a second, the peak by the system; what earlier phases "
        f"left in buffers counts until it is given back. Term by term at "
        f"the fullest moment, {text(plan.fullest)}:</p>"
        + table(["", "planned", "measured"], terms)
        + (f"<p>To fit the budget:</p><ul>{changes}</ul>" if changes else "")
    )


def masks(samples: Iterable[Shown]) -> str:
    """Samples token by token; what is learned is marked."""
    parts = []
    for sample in samples:
        tokens = "".join(
            f'<span class="{"on " * piece.learned}{"special" * piece.special}">{text(piece.text)}</span>'
            for piece in sample.pieces
        )
        more = sample.tokens - len(sample.pieces)
        cut = f" <span class=soft>… and {more:,} tokens more</span>" if more else ""
        title = f"line {sample.line}: {sample.tokens} tokens, {sample.targets} learned"
        parts.append(f"<details open><summary>{title}</summary><div class=tokens>{tokens}{cut}</div></details>")
    lead = '<p class="soft tokens"><span class=on>learned</span> <span>not learned</span></p>'
    return f"<h2>What is learned of a sample</h2>{lead}{''.join(parts)}" if parts else ""


def _settings(run: RunReport) -> str:
    rows = []
    for section, values in run.config.items():
        for key, value in values.items():
            own = value != run.defaults.get(section, {}).get(key)
            said = text(_value(value))
            rows.append([f"{section}.{key}", f"<b>{said}</b>" if own else said])
    lead = "<p class=soft>With the plan's choices; bold is what is not the default.</p>"
    return f"<h2>Settings</h2>{lead}{table([], rows, 'names')}" if rows else ""


def _facts(run: RunReport) -> str:
    parts = []
    for title, facts in run.facts.items():
        rows = [[text(name), f"<code>{text(fact)}</code>"] for name, fact in facts.items()]
        parts.append(f"<h2>{text(title)}</h2>{table([], rows, 'names')}")
    if run.command:
        parts.append(f"<h2>Again</h2><pre>{text(run.command)}</pre>")
    return "".join(parts)


def notes(run: RunReport) -> str:
    """What was decided, as it was told."""
    told = "\n".join(run.notes[:MOST_NOTES])
    return f"<details><summary>decisions, as they were told</summary><pre>{text(told)}</pre></details>"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _beside(planned: int, found: int | None) -> tuple[str, str]:
    """What was measured, and by how much more was planned."""
    return (format_bytes(found), f"{planned / found - 1:+.1%}") if found else ("", "")


def _short_bytes(size: float) -> str:
    return "0" if not size else format_bytes(size).replace(".0 ", " ")


def _value(value: Any) -> str:
    return '""' if value == "" else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
