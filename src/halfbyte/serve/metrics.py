"""/metrics: the engine's numbers as Prometheus reads them."""

from __future__ import annotations

from halfbyte.model.memory import peak_memory, resident_memory
from halfbyte.serve.adapters import Adapters
from halfbyte.serve.engine import Engine


def metrics_text(engine: Engine, adapters: Adapters, planned_memory: int) -> str:
    """One line a number, after its type; of memory, bytes."""
    counts, pool = engine.counts, engine.pool
    gauges = {
        "running_sequences": engine.running, "waiting_sequences": engine.waiting, "adapters": len(adapters.all()) - 1,
        "cache_blocks": pool.count, "cache_blocks_in_use": pool.in_use, "adapter_bytes": adapters.nbytes,
        "resident_memory_bytes": resident_memory(), "peak_memory_bytes": peak_memory(),
        "planned_memory_bytes": planned_memory,
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
