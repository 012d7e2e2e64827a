"""llama.cpp generates at batch 1 (package xllamacpp). Prints one JSON line. usage: generate_llama.py GGUF THREADS"""

import json
import os
import sys

import xllamacpp


def main() -> None:
    """The prompts and lengths of generate_peer.py, timed by llama.cpp itself."""
    params = xllamacpp.CommonParams()
    params.model.path, threads = sys.argv[1], int(sys.argv[2])
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 1024, 1, 0, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def run(prompt, n_predict):
        request = {
            "prompt": prompt,
            "n_predict": n_predict,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        answer = server.handle_completions(request)
        return (json.loads(answer) if isinstance(answer, str) else answer)["timings"]

    ids = [i * 7919 % 49000 + 5 for i in range(512)]
    run(ids, 1)
    prompt = run(ids, 1)["prompt_per_second"]
    print(json.dumps({"prompt_tokens_per_s": prompt, "tokens_per_s": run(ids[:32], 65)["predicted_per_second"]}))
    sys.stdout.flush()
    os._exit(0)  # the server has no end


main()
