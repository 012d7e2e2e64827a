"""Greedy tokens of llama.cpp, for a process of its own: JSON in on standard input, JSON out on standard output.

Through its HTTP server: only there it gives ids, which texts do not where a token is a part of a character.
"""

from __future__ import annotations

import json
import sys
from urllib.request import Request, urlopen

import xllamacpp

job = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = job["model"]
params.n_ctx, params.n_parallel, params.warmup = job["context"], 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
if job.get("lora"):
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["lora"], 1.0)]
if job.get("cache"):
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = int(getattr(xllamacpp.ggml_type, f"GGML_TYPE_{job['cache'].upper()}"))
server = xllamacpp.Server(params)
answers = []
for prompt in job["prompts"]:
    asked = {"prompt": prompt, "n_predict": job["tokens"], "temperature": 0.0, "return_tokens": True,
             "cache_prompt": False}  # fmt: skip
    request = Request(f"{server.listening_address}/completion", json.dumps(asked).encode())
    with urlopen(request) as reply:
        answers.append(json.load(reply)["tokens"])
sys.stdout.write(json.dumps(answers))
