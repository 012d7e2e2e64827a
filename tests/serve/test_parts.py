"""What the engine and the interface are made of: sampling, cache blocks, text in pieces, templates, the start."""

from __future__ import annotations

import copy
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from halfbyte.cli import serve as command
from halfbyte.cli.chat import chat
from halfbyte.cli.served import base_name
from halfbyte.data import deadline
from halfbyte.dtypes import parse_bytes
from halfbyte.errors import ConfigError, ResourceError
from halfbyte.serve.cache import BlockPool, chain, shared_prefix
from halfbyte.serve.errors import ApiError
from halfbyte.serve.guard import Keys
from halfbyte.serve.sampling import Sampler, Sampling
from halfbyte.serve.schema import ChatRequest, parse
from halfbyte.serve.start import Settings, bind
from halfbyte.serve.text import Texts, Writer


@pytest.mark.parametrize(
    ("fields", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"top_p": 0.99}, TopPLogitsWarper(0.99)),  # more than the first candidates that are sorted
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
)
def test_candidates_are_those_of_transformers(fields: dict[str, Any], warper: Any) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5000)
    expected = torch.softmax(warper(None, logits[None].double())[0], 0)
    tokens, weights = Sampler(Sampling(temperature=1, **fields), [1])._candidates(torch.softmax(logits.double(), 0))
    found = torch.zeros(5000, dtype=torch.float64)
    found[tokens] = weights / weights.sum()
    assert torch.allclose(found, expected, atol=1e-12)


def test_penalties_and_draws() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50)
    sampler = Sampler(
        Sampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, bias={7: 3.0}), [4]
    )
    for token in (9, 9):
        sampler.took(token)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[4, 9]]), logits[None].clone())[0]
    expected[9] -= 0.5 + 2 * 0.25
    expected[7] += 3
    assert torch.equal(sampler._changed(logits), expected)
    draws = Sampler(Sampling(temperature=1.0, seed=3), [1])
    counts = torch.bincount(torch.tensor([draws.choose(logits) for _ in range(4000)]), minlength=50) / 4000
    assert float((counts - torch.softmax(logits, 0)).abs().max()) < 0.03  # measured 0.009


def test_blocks() -> None:
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    assert None not in blocks
    assert pool.take() is None
    ids = list(range(33))
    first = chain(b"adapter", ids[:16])
    pool.know(0, first)
    pool.know(1, chain(first, ids[16:32]))
    for block in range(3):
        pool.give(block)
    assert pool.in_use == 0
    assert shared_prefix(pool, b"another", ids)[0] == []
    assert shared_prefix(pool, b"adapter", ids)[0] == [0, 1]
    assert shared_prefix(pool, b"adapter", ids[:32])[0] == [0]  # a token is left to compute
    assert pool.take() == 2
    assert pool.take() is None  # what is shared is in use


@pytest.fixture
def texts(tiny_tokenizer: Any) -> Texts:
    return Texts(copy.deepcopy(tiny_tokenizer), stops=[2], context=64)


def test_text_comes_in_whole_characters(texts: Texts) -> None:
    said = "After 3 comes 4: naïve 🦊 ✓"
    writer = Writer(texts, [])
    pieces = [writer.add(token) for token in texts.plain(said)] + [writer.end()]
    assert "".join(pieces) == said
    assert "�" not in "".join(pieces)


@pytest.mark.parametrize(("stops", "expected"), [(["comes"], "After 3 "), (["4:", "3"], "After "), (["4 now"], None)])
def test_stop_strings(texts: Texts, stops: list[str], expected: str | None) -> None:
    said = "After 3 comes 4: no"
    writer, written = Writer(texts, stops), ""
    for token in texts.plain(said):
        written += writer.add(token)
        if writer.stopped:
            break
    else:
        written += writer.end()
    assert written == (said if expected is None else expected)


def test_a_template_that_loops_is_stopped(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "SECONDS", 0.3)
    messages = [{"role": "user", "content": "{{ ''.__class__ }}"}]
    assert "__class__" in texts.decode(texts.chat(messages))  # text, not code
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    for template, said in ((loops + "{% endfor %}", "too long"), ("{{ ''.__class__.__mro__ }}", "template"),
                           ("{{ raise_exception('no') }}", "no")):  # fmt: skip
        texts.tokenizer.chat_template = template
        with pytest.raises(ApiError, match=said):
            texts.chat(messages)


def test_binding() -> None:
    with pytest.raises(ConfigError, match="without a key"):
        bind(Settings(host="0.0.0.0"))
    open_to_all = bind(Settings(host="0.0.0.0", port=0, keys=Keys("a-long-key", None)))
    open_to_all.close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="cannot be listened on"):
            bind(Settings(port=taken.getsockname()[1]))


def test_what_does_not_fit_is_not_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"are needed, 100.0 MB are allowed.* is the least") as small:
        command.serve(model=str(tiny_llama), memory="100MB", port=0)
    least = parse_bytes(str(small.value).rpartition(": ")[2].partition(" is the")[0])
    with pytest.raises(ResourceError, match=r"--cache-tokens \d+ fits"):
        command.serve(model=str(tiny_llama), memory=str(least + 10**7), port=0, cache_tokens=10**9)
    assert logging.getLogger("halfbyte.serve").handlers == []  # of a command that has ended
    with pytest.raises(ResourceError, match=r"are needed, 100.0 MB are allowed.*smaller --context"):
        chat(model=str(tiny_llama), memory="100MB")


def test_keys_and_names_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    monkeypatch.setenv("HALFBYTE_ADMIN_KEY", "from-the-environment")
    assert command._keys(tmp_path / "key", None) == Keys("from-a-file", "from-the-environment")
    monkeypatch.setenv("HALFBYTE_API_KEY", "short")
    with pytest.raises(ConfigError, match="fewer than 8"):
        command._keys(None, None)
    assert base_name("/models/Smol LM2.gguf/") == "Smol-LM2.gguf"
    with pytest.raises(ConfigError, match="NAME=DIR"):
        command._named("folder")
    monkeypatch.setattr(command, "NEEDED", ("no_such_package_here",))
    with pytest.raises(ResourceError, match=r'pip install "halfbyte\[serve\]"'):
        command._check_extra()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"tools": []}, "tools: is not supported here: /openapi.json has the fields"),
        ({"n": 0}, "n: must be at least 1"),
        ({"n": "1"}, "n: must be a whole number"),
        ({"temperature": "hot"}, "temperature: must be a number"),
        ({"top_p": 0}, "top_p: must be above 0"),
        ({"stream": 1}, "stream: must be true or false"),
        ({"messages": []}, "messages: must have at least 1 entries"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages.0.role: must be 'system', 'developer', 'user' or",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content: is missing"),
        ({"user": 5}, "user: must be text"),
        ({"top_logprobs": 2}, "top_logprobs: only with logprobs"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_plainly(field: dict[str, Any], said: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}]} | field
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(body).encode(), ChatRequest)
    assert caught.value.message.startswith(said)
    assert caught.value.param == said.partition(":")[0]
