"""Put what is in benchmarks/results/ into the tables of docs/*.md, under their ``<!-- table: NAME -->`` lines.

usage: tables.py [RESULTS_DIR] [PAGE.md ...]      default: the pages named in `main`

A table whose benchmark has not run stays as it is. The text around the tables is a person's.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = 16
Rows = list[list[str]]


STACKS = {"peft": "PEFT on {} weights", "halfbyte": "halfbyte, {}", "bitsandbytes": "PEFT + bitsandbytes NF4, {}",
          "fork": "PEFT + bitsandbytes-cpu-fork NF4, {}", "torchao": "PEFT + torchao NF4, {}"}  # fmt: skip
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def ratio(value: float) -> str:
    """Two digits where they say something."""
    return f"{value:.1f}" if value < 20 else f"{value:.0f}"


def step(result: dict[str, Any]) -> Rows:
    """Stacks by tokens/s and peak memory."""
    rows = [["stack", "tokens/s", "peak memory"]]
    for name, row in result["stacks"].items():
        stack, dtype, *rest = name.split("-")
        mark = "**" if stack == "halfbyte" else ""
        words = STACKS[stack].format(DTYPES[dtype]) + (", gradient checkpointing" if rest else "")
        rows.append(
            [words, f"{mark}{row['tokens_per_s']:.0f}{mark}", f"{mark}{row['peak_memory'] / 1e9:.2f} GB{mark}"]
        )
    return rows


def layer(result: dict[str, Any]) -> Rows:
    """Ours in GFLOP/s, and how many times longer the others take."""
    figures = result["seconds"]["default pages"]
    names = [name for name in next(iter(next(iter(figures.values())).values())) if name != "halfbyte"]
    rows = [["out x in", "tokens", "ours, GFLOP/s", *names]]
    for shape, by_count in figures.items():
        out, cols = map(int, shape.split("x"))
        for count, seconds in by_count.items():
            rate = (4 * out * cols + 6 * RANK * (out + cols)) * int(count) / seconds["halfbyte"] / 1e9
            others = [ratio(seconds[name] / seconds["halfbyte"]) if name in seconds else "" for name in names]
            rows.append(
                [shape if len(rows) == 1 or count == min(by_count, key=int) else "", count, f"{rate:.0f}", *others]
            )
    return rows


def kernels(*titles: str) -> Callable[[dict[str, Any]], Rows]:
    """Ours in milliseconds, and how many times longer the others take."""

    def rows_of(result: dict[str, Any]) -> Rows:
        cases = [(title, case) for title in titles for case in result["figures"][title]]
        names = list(dict.fromkeys(name for _, case in cases for name in case["ratios"]))
        rows = [["", "ours, ms", *names]]
        for title, case in cases:
            others = [ratio(case["ratios"][name]) if name in case["ratios"] else "" for name in names]
            what = case["case"] if title == "codec" else f"{title}, {case['case']}"
            rows.append([what, f"{case['seconds']['halfbyte'] * 1e3:.2f}", *others])
        return rows

    return rows_of


def chat(result: dict[str, Any]) -> Rows:
    """The same run on real data, by stack."""
    rows = [["stack", "held-out loss", "supervised tokens/s", "tokens/s", "peak memory"]]
    for name, row in result["rows"].items():
        speeds = [f"{row[key]:.0f}" for key in ("supervised_tokens_per_s", "tokens_per_s")]
        rows.append([name, f"{row['held_out_loss_same_tokens']:.4f}", *speeds, f"{row['peak_memory'] / 1e9:.2f} GB"])
    return rows


def generate(result: dict[str, Any]) -> Rows:
    """Prompt and written tokens a second."""
    rows = [["", "prompt tokens/s", "tokens/s"]]
    for name, row in result["medians"].items():
        rows.append([name, f"{row['prompt_tokens_per_s']:.0f}", f"{row['tokens_per_s']:.1f}"])
    return rows


def disk(key: str) -> Callable[[dict[str, Any]], Rows]:
    """Seconds, beside plain reading (and writing), and peak memory."""

    def rows_of(result: dict[str, Any]) -> Rows:
        rows = [["", "stack", "seconds", "times plain", "peak memory"]]
        for setting, stacks in result[key].items():
            for number, (name, row) in enumerate(stacks.items()):
                times = row["seconds"] / stacks["plain"]["seconds"]
                rows.append([setting if number == 0 else "", name, f"{row['seconds']:.2f}", f"{times:.2f}",
                             f"{row['peak_memory'] / 1e9:.2f} GB"])  # fmt: skip
        return rows

    return rows_of


def budgets(result: dict[str, Any]) -> Rows:
    """Runs inside a control group of the budget's size: what was planned, and the most that was resident."""
    rows = [
        [
            "model",
            "tokens",
            "batch",
            "r",
            "compute",
            "budget",
            "planned",
            "measured",
            "plan above",
            "what the plan changed",
        ]
    ]
    for row in result["rows"]:
        case = [row["model"], row["tokens"], row["batch"], row["rank"], row["compute_dtype"], row["budget"]]
        if row["exit"]:
            rows.append([*map(str, case), f"exit {row['exit']}", "", "", "; ".join(row["error"])])
            continue
        words = {"train.micro_batch_size": "smaller micro-batches", "train.gradient_checkpointing": "checkpointing",
                 "optim.paged": "paged moments", "memory.activations": "activations on disk",
                 "memory.weights": "streamed layers"}  # fmt: skip
        changes = [next(word for name, word in words.items() if name in text) for text in row["changes"]]
        sizes = [f"{row[name] / 1e9:.3f} GB" for name in ("planned", "measured")]
        rows.append([*map(str, case), *sizes, f"{row['planned'] / row['measured'] - 1:+.1%}", ", ".join(changes)])
    return rows


def streaming(result: dict[str, Any]) -> Rows:
    """A model of three times the budget, beside the same one in memory."""
    rows = [["", "tokens/s", "peak memory", "losses"]]
    for name, runs in result["runs"].items():
        speed, peak = result["tokens_per_s"][name], max(run["peak_memory"] for run in runs)
        losses = ", ".join(f"{loss:.6f}" for loss in runs[0]["losses"])
        rows.append([name, f"{speed:.1f}", f"{peak / 1e9:.2f} GB", losses])
    return rows


def seventy(result: dict[str, Any]) -> Rows:
    """Optimizer steps of a 70B model, by limit."""
    rows = [["limit", "planned", "measured", "tokens a step", "seconds a step", "whole run"]]
    for run in result["runs"]:
        sizes = [f"{run[name] / 1e9:.2f} GB" for name in ("limit", "predicted_peak_memory", "peak_memory")]
        steps = ", ".join(f"{seconds:.0f}" for seconds in run["step_seconds"])
        rows.append([*sizes, str(run["step_tokens"][0]), steps, f"{run['seconds'] / 60:.1f} min"])
    return rows


def merges(result: dict[str, Any]) -> Rows:
    """What each way to merge keeps of an adapter."""
    head = [
        "",
        "held-out improvement kept",
        "loss",
        "over base + adapter",
        "KL, nats/token",
        "same likeliest token",
        "size",
    ]
    rows = [head]
    for name, row in result["rows"].items():
        drift, size = row["drift"], f"{row['bytes_out'] / 1e6:.0f} MB" if "bytes_out" in row else ""
        over = f"{drift['loss'] / drift['trained_loss'] - 1:+.2%}"
        rows.append([name, f"{row['kept']:.1%}", f"{drift['loss']:.4f}", over, f"{drift['kl']:.1e}",
                     f"{drift['greedy_agreement']:.1%}", size])  # fmt: skip
    return rows


def combining(result: dict[str, Any]) -> Rows:
    """Two adapters as one, against the exact sum."""
    rows = [["", "loss", "KL from the exact sum", "same likeliest token", "size"]]
    for name, row in result.get("combined", {}).items():
        drift, size = row["drift"], f"{row['bytes_out'] / 1e6:.1f} MB" if "bytes_out" in row else ""
        far = [f"{drift['kl']:.1e}", f"{drift['greedy_agreement']:.1%}"] if size else ["", ""]
        rows.append([name, f"{drift['loss']:.4f}", *far, size])
    return rows


def same_answers(result: dict[str, Any]) -> Rows:
    """Free answers that equal halfbyte's, and where the others part from them."""
    found = {name: row for name, row in result.get("answers", {}).items() if isinstance(row, dict)}
    rows = [["", "equal answers", "gap of the two likeliest tokens where the others part, in logits"]]
    for name, row in found.items():
        gaps = ", ".join(f"{first['gap']:.3g}" for first in row["first_differences"])
        rows.append([name, f"{row['equal']} of {result['answers']['prompts']}", gaps])
    return rows


def formats(result: dict[str, Any]) -> Rows:
    """Formats by bits: squared errors in thousandths, perplexities, and how long a product takes beside NF4's."""
    rows = [
        ["format", "bits", "error, normal weights", "with mse-signed", "error, SmolLM2", "answers", "prose",
         "calibrated: answers", "prose", "product, 1 row", "256 rows"],
    ]  # fmt: skip
    found = result["rows"]
    for name, row in sorted(found.items(), key=lambda item: -item[1]["bits"]):
        texts = [f"{row[kind][text]:.1f}" if kind in row else ""
                 for kind in ("plain", "calibrated") for text in ("answers", "prose")]  # fmt: skip
        normal = [f"{1e3 * error:.3g}" for error in row.get("normal_error", {}).values()] or ["", ""]
        error = f"{1e3 * row['plain']['error']:.3g}" if "error" in row["plain"] else ""
        times = [f"{row['seconds'][m] / found['nf4']['seconds'][m]:.2g}" if "seconds" in row else ""
                 for m in ("1", "256")]  # fmt: skip
        label = f"{name} bits at most" if name.replace(".", "").isdigit() else name
        rows.append([label, f"{row['bits']:.3f}", *normal, error, *texts, *times])
    measured = [number for number in range(len(rows[0])) if any(row[number] for row in rows[1:])]
    return [[row[number] for number in measured] for row in rows]


def bits(result: dict[str, Any]) -> Rows:
    """KL divergence and perplexity of each budget, by what its bits were spread by."""
    found = [(name, how, row) for name, ways in result["rows"].items() for how, row in ways.items()]
    first = found[0][2]["texts"]
    rows = [
        ["bits", "spread by", "layers in", *(f"KL, {text}" for text in first), *(f"perplexity, {t}" for t in first)]
    ]
    rows.append(["16", "", "", *[""] * len(first), *(f"{of['16 bits']:.1f}" for of in first.values())])
    for name, how, row in sorted(found, key=lambda of: -float(of[0])):
        layers = ", ".join(f"{count} {kind}" for kind, count in row["formats"].items())
        kl, perplexity = ([of[key] for of in row["texts"].values()] for key in ("kl", "perplexity"))
        rows.append([name, how, layers, *(f"{x:.3f}" for x in kl), *(f"{x:.1f}" for x in perplexity)])
    return rows


def calibration(result: dict[str, Any]) -> Rows:
    """Seconds a decoder layer, what they come to, and memory beside the plan's."""
    rows = [["shape", "layers measured", "seconds a layer", "all layers, by these", "peak memory", "planned"]]
    for row in result["rows"].values():
        each = row["seconds"] / row["layers"]
        shape = row["shape"] + (", with a start" if row["start"] else "")
        memory = [f"{row[key] / 1e9:.2f} GB" for key in ("peak_memory", "predicted_peak_memory")]
        rows.append(
            [shape, f"{row['layers']} of {row['of']}", f"{each:.0f}", f"{each * row['of'] / 60:.0f} min", *memory]
        )
    return rows


def scales(result: dict[str, Any]) -> Rows:
    """Perplexities of each kind of scale on both weight sets."""
    rows = [["weights", "scale", "squared error", "reference", "licences", "code", "embeddings moved"]]
    for name, variants in result["sets"].items():
        for scale, row in variants.items():
            error = f"{row['error']:.2e}" if row.get("error") else ""
            texts = [f"{row[text]:.1f}" for text in ("reference", "licences", "code")]
            moved = f"{row['embeddings']:.4f}" if row.get("embeddings", 0) > 1e-6 else ""
            rows.append([name if scale == "16 bits" else "", scale, error, *texts, moved])
    return rows


def fidelity(result: dict[str, Any]) -> Rows:
    """Each base's losses on both data sets, and the shares of NF4's gaps that it closes."""
    kl = any("kl" in row for variants in result["sets"].values() for row in variants.values())
    rows = [["data", "base and start", "loss before", "closed", *["KL"] * kl, "loss after", "closed", "by seed",
             "outside", "closed"]]  # fmt: skip
    for data, variants in result["sets"].items():
        exact, stock = variants["16 bits"], variants["NF4"]
        for name, row in variants.items():
            shares = ["" if name in ("16 bits", "NF4") else f"{(most - loss) / (most - least):.0%}"
                      for loss, least, most in zip(*map(_losses, (row, exact, stock)), strict=True)]  # fmt: skip
            before, after, *outside = (f"{loss:.3f}" for loss in _losses(row)[: 2 + len(row["outside"])])
            first = 2 + len(outside)
            by_seed, by_text = (", ".join(filter(None, part)) for part in (shares[first:], shares[2:first]))
            rows.append([
                data if name == "16 bits" else "", name, before, shares[0], *([f"{row['kl']:.3f}"] if kl else []),
                after, shares[1], by_seed, ", ".join(outside), by_text,
            ])  # fmt: skip
    return rows


def _losses(row: dict[str, Any]) -> list[float]:
    """Before, after (mean), outside, and after by seed."""
    return [row["before"], statistics.mean(row["after"]), *row["outside"], *row["after"]]


def _counted(name: str, value: Any) -> str:
    """What a test counted under `name`, as JUnit's text: "3 files"; seconds rounded, a table of counts as a list."""
    words = name.replace("_", " ")
    if str(value).startswith("{"):
        return f"{words}: " + ", ".join(f"{count} {key}" for key, count in ast.literal_eval(value).items())
    if name.endswith("_seconds"):
        return f"{float(value):.2g} s a {words.removesuffix(' seconds')}"
    return f"{value} {words}"


def reliability(result: dict[str, Any]) -> Rows:
    """Each proof with what it counted."""
    rows = [["proof", "counted", "passed", "seconds"]]
    for name, row in result["cases"].items():
        test, _, case = name.removeprefix("test_").rstrip("]").partition("[")
        words = f"{test.replace('_', ' ')}: {re.sub(r'-(errors)?[0-9-]*$', '', case)}".rstrip(": ")
        counts = ", ".join(_counted(key, value) for key, value in row.items() if key not in ("passed", "seconds"))
        rows.append([words, counts, "yes" if row["passed"] else "**no**", f"{row['seconds']:.0f}"])
    return rows


def serving(result: dict[str, Any]) -> Rows:
    """Correctness, speed and memory under load, beside the goals."""
    count, churned, many = result["requests"], result["adapters_loaded_and_unloaded"], result["more_requests"]
    one, sixteen = result["tokens_per_s_of_1"], result["tokens_per_s_of_16"]
    seconds = ", ".join(f"{result[f'p{p}_s']:.2f}" for p in (50, 95, 99))

    def megabytes(*sizes: float) -> str:
        return ", ".join(f"{size / 1e6:.0f}" for size in sizes)

    memory = result["memory"]
    around = megabytes(*(memory[name] for name in ("at_start", "after_alone", "after_churn")))
    flat = megabytes(*(memory[name] for name in ("before_many", "after_a_quarter", "after_many")))
    return [
        ["", "", "goal"],
        [f"answers equal to those alone, adapters unloaded and loaded {churned} times meanwhile",
         f"{result['equal_to_alone']:,} of {count:,}", f"all of {count:,}"],
        ["tokens a second of 1 client, of 16", f"{one:.0f}, {sixteen:.0f}: {sixteen / one:.2f} times", "3 times"],
        ["a pass of 8 rows under 8 adapters, over one under one", f"{result['eight_over_one']:.2f}", "1.2"],
        ["seconds of an answer beside 15 others, p50, p95, p99", seconds, ""],
        ["MB at the start, after the requests alone, after those with adapters that came and went", around, "flat"],
        [f"MB before, after a quarter of and after {many:,} requests more", flat, "flat"],
        ["MB at most, and as planned", megabytes(result["peak_memory"], result["planned_memory"]), "no more"],
    ]  # fmt: skip


def comparison(result: dict[str, Any]) -> Rows:
    """Variants by held-out loss, bytes, speed and time."""

    def figure(mean: dict[str, float] | None, sign: str = "") -> str:
        if mean is None:
            return ""
        return f"{mean['value']:{sign}.4f}" + (f" ± {mean['half_width']:.4f}" if mean["half_width"] else "")

    rows = [["variant", "seeds", "before", "after", "difference", "base", "peak memory", "tokens/s"]]
    for row in result["rows"]:
        if row["after"] is not None:
            rows.append([
                f"`{row['name']}`", str(len(row["seeds"])), f"{row['before']:.4f}", figure(row["after"]),
                figure(row["difference"], "+"), f"{row['base_bytes'] / 1e6:.0f} MB",
                f"{row['peak_memory'] / 1e9:.2f} GB", f"{row['tokens_per_s']:.0f}",
            ])  # fmt: skip
    return rows


def gpu_products(result: dict[str, Any]) -> Rows:
    """Microseconds of device time of the largest weight's decoding and products."""
    most = max(case["out"] * case["in"] for case in result["kernels"])
    cases = [case for case in result["kernels"] if case["out"] * case["in"] == most]
    cases = [case for case in cases if case["out"] == cases[0]["out"]]
    names = list(dict.fromkeys(name for case in cases for name in case["seconds"]))
    rows = [[f"{cases[0]['out']} x {cases[0]['in']}", "rows", *names]]
    for case in cases:
        times = [f"{case['seconds'][n]['device_s'] * 1e6:.0f}" if n in case["seconds"] else "" for n in names]
        rows.append([case["what"], str(case["rows"] or ""), *times])
    return rows


def gpu_training(result: dict[str, Any]) -> Rows:
    """Tokens a second, and what is taken of the GPU, by model and stack; of halfbyte, as planned too."""
    rows = [["model", "stack", "tokens/s", "in tensors", "taken", "planned"]]
    for shape, stacks in result["figures"].items():
        for name, row in stacks.items():
            if "failed" in row:
                continue
            used, taken = (row.get(f"peak_{key}", row.get(other))
                           for key, other in (("tensors", "peak_memory"), ("taken", "taken_memory")))  # fmt: skip
            planned = row.get("predicted_peak_memory")
            sizes = [f"{size / 1e9:.2f} GB" if size else "" for size in (used, taken, planned)]
            rows.append([shape, name, f"{row['tokens_per_s']:,.0f}", *sizes])
    return rows


def ranks_memory(result: dict[str, Any]) -> Rows:
    """All processes of a machine together, and what each has."""
    rows = [["model", "processes", "together (PSS)", "of it, private", "a process's part"]]
    for task, how in (("memory", "one base for all"), ("sharding", "sharded")):
        for run in result.get(task, {"runs": []})["runs"]:
            count = run["ranks"]
            name = f"{count} ranks, {how}" if count > 1 else "one"
            sizes = [run["Pss"], run["Pss_Anon"], run["Pss"] / count]
            rows.append([result[task]["shape"], name, *(f"{size / 1e9:.2f} GB" for size in sizes)])
    return rows


def ranks_kills(result: dict[str, Any]) -> Rows:
    """What became of the kills; a difference would have ended the script."""
    found = result["kills"]
    moments = ", ".join(f"{count} {kind}" for kind, count in found["moments"].items())
    victims = ", ".join(f"{count} of rank {rank}" for rank, count in enumerate(found["of_rank"]))
    return [
        ["kills", "whom", "when", "most steps repeated", "bytes that differ"],
        [str(found["kills"]), victims, moments, str(found["most_steps_repeated"]), "none"],
    ]


def newcomer(result: dict[str, Any]) -> Rows:
    """What each command of the quick start takes."""
    load = [result["load_before"], result["load_after"]]
    rows = [["", f"seconds, at a load of {min(load):.0f} to {max(load):.0f} on {result['cores']} cores"]]
    for command, seconds in result["seconds"].items():
        words = re.sub(r"^\.venv/bin/", "", command).split(" --")[0]
        rows.append([f"`{words}`", f"{seconds:.0f}"])
    return [*rows, ["in all", f"{result['total']:.0f}"]]


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], Rows]]] = {
    "step": ("step-smollm2", step),
    "step 1B": ("step-llama-1b", step),
    "layer": ("linear", layer),
    "codec": ("kernels", kernels("codec")),
    "products": ("kernels", kernels("forward", "forward+backward")),
    "chat": ("finetune-10", chat),
    "generation": ("generate-smollm2-1", generate),
    "generation 1B": ("generate-llama-1b-1", generate),
    "generation AVX2": ("generate-smollm2-1-avx2", generate),
    "generation 1B AVX2": ("generate-llama-1b-1-avx2", generate),
    "quantizing": ("quantize", disk("figures")),
    "loading": ("load", disk("loads")),
    "budgets": ("memory", budgets),
    "streaming": ("large-stream", streaming),
    "70B": ("large-70b", seventy),
    "merging": ("merge", merges),
    "combining": ("merge", combining),
    "same answers": ("merge", same_answers),
    "fidelity": ("fidelity", fidelity),
    "formats": ("formats", formats),
    "bits": ("bits", bits),
    "calibration": ("calibrate", calibration),
    "fidelity GPU": ("fidelity-gpu", fidelity),
    "scales": ("scales", scales),
    "reliability": ("reliability", reliability),
    "serving": ("serve", serving),
    "comparison": ("compare", comparison),
    "GPU products": ("cuda", gpu_products),
    "GPU training": ("gpu-train", gpu_training),
    "ranks": ("ranks", ranks_memory),
    "killed ranks": ("ranks", ranks_kills),
    "newcomer": ("newcomer", newcomer),
}


def markdown(rows: Rows) -> str:
    """`rows`, the first of them the head."""
    lines = ["|---" * len(rows[0]) + "|" if row is None else "| " + " | ".join(row) + " |"
             for row in (rows[0], None, *rows[1:])]  # fmt: skip
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |") + "\n"


def fill(page: Path, folder: Path) -> None:
    """Rewrite the tables of `page` for which there are results."""
    text = page.read_text(encoding="utf-8")
    for title, (name, rows_of) in TABLES.items():
        mark, path = f"<!-- table: {title} -->\n", folder / f"{name}.json"
        if mark in text and path.exists():
            table = markdown(rows_of(json.loads(path.read_text(encoding="utf-8"))))
            text = re.sub(re.escape(mark) + r"(\|.*\n)*", lambda _, new=mark + table: new, text)
    page.write_text(text, encoding="utf-8")
    print(page)


def main() -> None:
    """Rewrite the pages."""
    root = Path(__file__).parent
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "results"
    docs = root.parent / "docs"
    for page in (
        map(Path, sys.argv[2:])
        if len(sys.argv) > 2
        else [
            docs / f"{name}.md"
            for name in (
                "speed",
                "memory",
                "merge",
                "fidelity",
                "formats",
                "reliability",
                "serve",
                "gpu",
                "compare",
                "ranks",
                "index",
            )
        ]
    ):
        fill(page, folder)


if __name__ == "__main__":
    main()
