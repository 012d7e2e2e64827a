"""`halfbyte serve` under load, over HTTP: every answer against the same request alone, throughput, latency, memory.

usage: bench_serve.py [--model MODEL] [--requests 1000] [--many 10000] [--rounds 3]

1. 8 adapters made at random (rank 16, all linear layers), and the base; each request first by itself.
2. The same requests from 16 clients at once in random order, while an admin unloads and loads adapters: every answer
   has to be the one that it was alone. A client that finds its adapter unloaded asks again.
3. Throughput of 1 and of 16 clients with the base, in turns; latency of the 1,000.
4. One pass of 8 sequences under 8 adapters against 8 under one, interleaved.
5. Memory and blocks after `--many` small requests more, beside what was planned.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from common import write_result

from halfbyte.cli.demo import smollm2_path
from halfbyte.kernels.buffers import steady_memory

ADAPTERS, CLIENTS, RANK = 8, 16, 16
WORDS = "write tell a short long story about the sea the wind and old mountains where nobody has lived"


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=smollm2_path())
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "serve.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    print(json.dumps(result, indent=1))
    write_result(options.output, result)


def run(options: Any, folder: Path) -> dict[str, Any]:
    with steady_memory():  # as the server holds them: adapters in large pages
        base = make_adapters(options.model, folder)
        pair = one_adapter_or_eight(base, folder)
        del base
    command = [sys.executable, "-m", "halfbyte", "serve", "--model", str(options.model), "--name", "base", "--json"]
    command += ["--port", "0", "--adapter-dir", str(folder), "--queue", "256"]
    for index in range(ADAPTERS):
        command += ["--adapter", f"a{index}={folder / f'a{index}'}"]
    keys = {"HALFBYTE_API_KEY": "user-key", "HALFBYTE_ADMIN_KEY": "admin-key"}
    with (folder / "log").open("w") as log, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | keys
    ) as server:  # fmt: skip
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise SystemExit((folder / "log").read_text())
        try:
            served = asyncio.run(load(json.loads(line)["url"], psutil.Process(server.pid), options))
        finally:
            server.terminate()
    return {"model": Path(options.model).name, "rank": RANK, **served, **pair}


def make_adapters(model: str, folder: Path) -> Any:
    from halfbyte.checkpoint import save_adapter
    from halfbyte.config import LoraConfig, QuantConfig
    from halfbyte.model import choose_compute_dtype, load_model
    from halfbyte.model.adapt import adapter_state, attach_lora

    quant = QuantConfig()
    loaded = load_model(model, quant, compute_dtype=choose_compute_dtype(quant.compute_dtype)[0])
    adapted = attach_lora(loaded.model, LoraConfig(r=RANK), seed=0)
    for index in range(ADAPTERS):
        random_numbers = torch.Generator().manual_seed(index)
        state = {
            name: torch.randn(tensor.shape, generator=random_numbers) * (0.02 if "lora_B" in name else tensor.std())
            for name, tensor in adapter_state(adapted).items()
        }
        config = adapted.peft_config["default"].to_dict()
        save_adapter(folder / f"a{index}", state, config, {"base_sha256": loaded.base_sha256, "quant": loaded.quant})
    return adapted.unload()


def one_adapter_or_eight(base: Any, folder: Path) -> dict[str, Any]:
    """Seconds of a pass of 8 rows, the two cases in turns."""
    from halfbyte.checkpoint import load_adapter
    from halfbyte.kernels.batch_step import Row
    from halfbyte.model.batch import BatchDecoder

    decoder = BatchDecoder(base, positions=2048, context=256)
    adapters = [decoder.load(load_adapter(folder / f"a{index}")) for index in range(ADAPTERS)]
    tables = [torch.arange(8 * i, 8 * i + 8, dtype=torch.int32) for i in range(ADAPTERS)]
    for table in tables:
        decoder.run(list(range(64)), [Row(p, table, None) for p in range(64)], [63])
    seconds: dict[str, list[float]] = {"one": [], "eight": []}
    for _ in range(30):
        for name, chosen in (("one", adapters[:1] * ADAPTERS), ("eight", adapters)):
            rows = [Row(64, table, adapter) for table, adapter in zip(tables, chosen, strict=True)]
            started = time.perf_counter()
            decoder.run(list(range(ADAPTERS)), rows, list(range(ADAPTERS)))
            seconds[name].append(time.perf_counter() - started)
    one, eight = (statistics.median(times) * 1e3 for times in seconds.values())
    return {"pass_of_8_one_adapter_ms": one, "pass_of_8_eight_adapters_ms": eight, "eight_over_one": eight / one}


def requests(count: int) -> list[dict[str, Any]]:
    choose = random.Random(0)
    made = []
    for index in range(count):
        model = ["base", *(f"a{i}" for i in range(ADAPTERS))][index % (ADAPTERS + 1)]
        text = " ".join(choose.choices(WORDS.split(), k=choose.randint(3, 30)))
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": choose.randint(4, 16)}
        made.append(body | ({"temperature": 0} if index % 2 else {"temperature": 0.8, "top_p": 0.95, "seed": index}))
    return made


async def load(url: str, process: psutil.Process, options: Any) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        client.headers["authorization"] = "Bearer user-key"
        asked = requests(options.requests)
        memory = {"at_start": process.memory_info().rss}
        alone = [await answer(client, body) for body in asked]
        memory["after_alone"] = process.memory_info().rss
        found, churned = await together(client, asked)
        equal = sum(mine[0] == other[0] for mine, other in zip(found, alone, strict=True))
        seconds = sorted(times for _, times, _ in found)
        memory["after_churn"] = process.memory_info().rss
        rates: dict[int, list[float]] = {1: [], CLIENTS: []}
        for _ in range(options.rounds):
            for clients, measured in rates.items():
                measured.append(await throughput(client, clients))
        one, sixteen = (statistics.median(measured) for measured in rates.values())
        memory["before_many"] = process.memory_info().rss
        gate = asyncio.Semaphore(CLIENTS)

        async def small(index: int) -> None:
            async with gate:
                body = {"model": f"a{index % ADAPTERS}", "prompt": [index % 5000 + 10, 20, 30], "max_tokens": 1}
                (await client.post("/v1/completions", json=body)).raise_for_status()

        quarter = max(options.many // 4, 1)
        for start in range(0, options.many, quarter):
            await asyncio.gather(*(small(i) for i in range(start, min(start + quarter, options.many))))
            memory.setdefault("after_a_quarter", process.memory_info().rss)
        memory["after_many"] = process.memory_info().rss
        metrics = (await client.get("/metrics")).text
        return {
            "requests": len(asked), "equal_to_alone": equal, "adapters_loaded_and_unloaded": churned,
            **{f"p{p}_s": seconds[min(len(seconds) * p // 100, len(seconds) - 1)] for p in (50, 95, 99)},
            "tokens_per_s_of_1": one, "tokens_per_s_of_16": sixteen, "sixteen_over_one": sixteen / one,
            "more_requests": options.many, "memory": memory,
            "planned_memory": number(metrics, "planned_memory_bytes"),
            "peak_memory": number(metrics, "peak_memory_bytes"),
            "blocks_in_use_after": number(metrics, "cache_blocks_in_use"), "descriptors": process.num_fds(),
        }  # fmt: skip


async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, float, int]:
    """Text, seconds, new tokens."""
    started = time.perf_counter()
    while True:
        got = await client.post("/v1/chat/completions", json=body)
        if got.status_code in (404, 429):
            await asyncio.sleep(0.02)
            continue
        found = got.raise_for_status().json()
        text = found["choices"][0]["message"]["content"]
        return text, time.perf_counter() - started, found["usage"]["completion_tokens"]


async def together(client: httpx.AsyncClient, asked: list[dict[str, Any]]) -> tuple[list[Any], int]:
    order = list(range(len(asked)))
    random.Random(1).shuffle(order)
    found: list[Any] = [None] * len(asked)
    churned, going = 0, True

    async def one_client() -> None:
        while order:
            index = order.pop()
            found[index] = await answer(client, asked[index])

    async def churn() -> None:
        """Unloads an adapter that requests are running with, and loads it again."""
        nonlocal churned
        admin = {"authorization": "Bearer admin-key"}
        while going:
            name = f"a{churned % ADAPTERS}"
            (await client.delete(f"/admin/adapters/{name}", headers=admin)).raise_for_status()
            (await client.post("/admin/adapters", json={"name": name}, headers=admin)).raise_for_status()
            churned += 1
            await asyncio.sleep(0.05)

    churning = asyncio.create_task(churn())
    await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
    going = False
    await churning
    return found, churned


async def throughput(client: httpx.AsyncClient, clients: int) -> float:
    """New tokens a second of all clients together: long answers to short prompts."""

    async def one_client(number: int) -> int:
        tokens = 0
        for turn in range(2):
            text = f"{number} {turn}: tell me a very long story about the sea."
            messages = [{"role": "user", "content": text}]
            tokens += (
                await answer(client, {"model": "base", "messages": messages, "max_tokens": 96, "temperature": 0})
            )[2]
        return tokens

    await one_client(99)
    started = time.perf_counter()
    tokens = sum(await asyncio.gather(*(one_client(number) for number in range(clients))))
    return tokens / (time.perf_counter() - started)


def number(metrics: str, name: str) -> float:
    return float(next(line.split()[1] for line in metrics.splitlines() if line.startswith(f"halfbyte_{name} ")))


if __name__ == "__main__":
    main()
