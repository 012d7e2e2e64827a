"""/metrics: the engine's numbers as Prometheus reads them."""

from __future__ import annotations

from halfbyte.serve.engine import Engine


def metrics_text(engine: Engine, adapters: int) -> str:
    """One line a number, after its type."""
    counts, pool = engine.counts, engine.pool
    gauges = {
        "running_sequences": engine.running, "waiting_sequences": engine.waiting, "adapters": adapters,
        "cache_blocks": pool.count, "cache_blocks_in_use": pool.in_use,
    }  # fmt: skip
    counters = {
        "forward_passes": counts.steps, "rows": counts.rows, "prompt_tokens": counts.prompt_tokens,
        "reused_prompt_tokens": counts.reused_tokens, "recomputed_tokens": counts.recomputed,
        "generated_tokens": counts.new_tokens,
    }  # fmt: skip
    lines = [f"# TYPE halfbyte_{name} gauge\nhalfbyte_{name} {value}" for name, value in gauges.items()]
    lines += [
        f"# TYPE halfbyte_{name}_total counter\nhalfbyte_{name}_total {value}" for name, value in counters.items()
    ]
    lines.append("# TYPE halfbyte_answers_total counter")
    lines += [f'halfbyte_answers_total{{reason="{reason}"}} {n}' for reason, n in counts.finished.items()]
    return "\n".join(lines) + "\n"
