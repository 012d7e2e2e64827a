"""A paged AdamW gives the unpaged one's bits, whatever its budget, and takes its place everywhere."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from halfbyte.checkpoint.shard_writer import Pieces
from halfbyte.errors import ResourceError
from halfbyte.optim import AdamW
from halfbyte.store import Memory

LEAST = 8192
BUDGETS = [LEAST, 3 * 4096, "20kB", "100 KiB", 10**6]
"""Two pages; three; pages that no run fills; most of the states; all."""


def parameters() -> list[Parameter]:
    """Of all kinds: large, tiny, empty, 16-bit, not contiguous. 92,000 elements: 740 kB of 32-bit moments."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    return [
        Parameter(normal(64, 300)), Parameter(normal(7)), Parameter(normal(0)), Parameter(normal(1, 1)),
        Parameter(normal(333, 65).bfloat16()), Parameter(normal(90, 257).t()), Parameter(normal(5, 1000)),
        Parameter(normal(255)), Parameter(normal(70, 300).half().t()), Parameter(normal(256)),
    ]  # fmt: skip


def paging(paged: bool, budget: int, folder: Path) -> dict[str, Any]:
    return {"paged": True, "budget": budget, "offload_dir": folder} if paged else {}


def give_gradients(params: list[Parameter], step: int) -> None:
    """Also of other strides than the parameter's, and sometimes none."""
    generator = torch.Generator().manual_seed(step)
    for number, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if (number + step) % 7 == 0 else grad.t().contiguous().t() if grad.ndim == 2 else grad


def train(params: list[Parameter], optimizer: AdamW, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(params, step)
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()


def groups(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:4], "weight_decay": 0.1}, {"params": params[4:], "lr": 3e-2}]


def check_equal(one: AdamW, other: AdamW) -> None:
    """Parameters and states, to the bit."""
    for ours, theirs in zip(one.param_groups, other.param_groups, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours["params"], theirs["params"], strict=True))
    mine, yours = one.state_dict(), other.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    assert sorted(mine["state"]) == sorted(yours["state"])
    for number, state in mine["state"].items():
        assert list(state) == list(yours["state"][number])
        for name, value in state.items():
            twin = yours["state"][number][name]
            assert torch.equal(value, twin) if isinstance(value, Tensor) else value == twin, (number, name)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("budget", BUDGETS)
def test_paged_equals_unpaged(budget: int | str, bits: int, tmp_path: Path) -> None:
    """Over steps, a parameter group that comes later, and a closure."""
    ours, theirs = parameters(), parameters()
    paged = AdamW(groups(ours[:8]), lr=1e-2, bits=bits, paged=True, budget=budget, offload_dir=tmp_path)
    plain = AdamW(groups(theirs[:8]), lr=1e-2, bits=bits)
    for params, optimizer in ((ours, paged), (theirs, plain)):
        train(params[:8], optimizer, 0, 4)
        optimizer.add_param_group({"params": params[8:], "lr": 1e-3})
        train(params, optimizer, 4, 9)
        give_gradients(params, 9)
        assert optimizer.step(lambda: 1.5) == 1.5
    check_equal(paged, plain)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("from_paged", [False, True])
def test_they_resume_each_other(from_paged: bool, bits: int, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"paged": True, "budget": LEAST, "offload_dir": tmp_path}]
    whole = parameters()
    first = AdamW(groups(whole), bits=bits, **settings[from_paged])
    train(whole, first, 0, 4)
    state = copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(state)
    resumed = [Parameter(param.detach().clone()) for param in whole]
    second = AdamW(groups(resumed), lr=7.0, **settings[not from_paged])
    train(resumed, second, 20, 21)  # what it held is forgotten
    for param, value in zip(resumed, whole, strict=True):
        param.data.copy_(value.detach())
    second.load_state_dict(state)
    train(whole, first, 4, 8)
    train(resumed, second, 4, 8)
    check_equal(first, second)
    for number, part in state["state"].items():
        assert all(
            torch.equal(value, kept["state"][number][name]) for name, value in part.items() if name != "step"
        ), "what was loaded is a copy"


@pytest.mark.parametrize("bits", [32, 8])
def test_a_streamed_state_is_the_state(bits: int, tmp_path: Path) -> None:
    """One tensor after the other, a page in memory at a time; training goes on after it."""
    params = parameters()
    optimizer = AdamW(groups(params), bits=bits, paged=True, budget=LEAST, offload_dir=tmp_path)
    train(params, optimizer, 1, 3)
    whole, streamed = optimizer.state_dict(), optimizer.streamed_state_dict()
    assert streamed["param_groups"] == whole["param_groups"]
    assert list(streamed["state"]) == list(whole["state"])
    for number, state in streamed["state"].items():
        assert list(state) == list(whole["state"][number])
        for name, value in state.items():
            if name == "step":
                assert value == whole["state"][number]["step"]
                continue
            assert isinstance(value, Pieces)
            expected = whole["state"][number][name]
            assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
            parts = [part.clone() for part in value.parts]
            assert max((part.nbytes for part in parts), default=0) <= 4096
            assert torch.equal(torch.cat([expected.new_empty(0), *parts]), expected.view(-1))
    assert all(list(state) == ["step"] for state in optimizer.state.values())
    plain = AdamW(groups(params))
    assert plain.streamed_state_dict() == plain.state_dict()


def test_room_is_taken_before_the_first_step(tmp_path: Path) -> None:
    params = parameters()
    optimizer = AdamW(params, paged=True, budget="100KiB", offload_dir=tmp_path)
    text = optimizer.reserve()
    assert text.startswith(f"737.3 kB in pages of 12.3 kB: 98.3 kB in memory, 663.6 kB in {tmp_path} (the file"), text
    train(params, optimizer, 1, 3)
    assert optimizer.reserve() == text
    assert optimizer._pages is not None
    assert optimizer._pages._pool.resident_bytes <= 100 * 1024
    assert AdamW(params).reserve() == "in memory"
    small = AdamW(params, bits=8, paged=True, budget="100KiB", offload_dir=tmp_path)
    assert small.reserve().startswith("208.9 kB"), "a quarter, and the parameters below 4096 elements in 32 bits"


@pytest.mark.parametrize("host_budget", [0, "100kB", None])
def test_behind_a_device(host_budget: int | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device, host memory, disk, by the same code; here the device is host memory that the disk is kept from."""
    monkeypatch.setattr(Memory, "is_host", False)
    ours, theirs = parameters(), parameters()
    paged = AdamW(ours, paged=True, budget=40_000, host_budget=host_budget, offload_dir=tmp_path)
    text = paged.reserve()
    assert ("in host memory" in text) == (host_budget != 0)
    assert (str(tmp_path) in text) == (host_budget is not None)
    plain = AdamW(theirs)
    plain.reserve()
    train(ours, paged, 0, 4)
    train(theirs, plain, 0, 4)
    check_equal(paged, plain)


def test_a_disk_without_room_is_an_error_before_anything_changes(tmp_path: Path) -> None:
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = AdamW(params, paged=True, budget=LEAST, offload_dir=tmp_path / "absent")
    with pytest.raises(ResourceError, match="absent: cannot be written: No such file or directory"):
        optimizer.reserve()
    give_gradients(params, 1)
    with pytest.raises(ResourceError, match="absent"):
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, params, strict=True))
    assert not any(optimizer.state.values())
    enough = AdamW(params, paged=True, budget="1GB", offload_dir=tmp_path / "absent")
    assert enough.reserve().endswith("1.0 MB in memory"), "no disk where the budget is enough"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("host_budget", ["100kB", None])
def test_on_a_gpu(host_budget: str | None, tmp_path: Path) -> None:
    ours, theirs = ([Parameter(param.detach().cuda()) for param in parameters()] for _ in range(2))
    paged = AdamW(ours, paged=True, budget=40_000, host_budget=host_budget, offload_dir=tmp_path)
    plain = AdamW(theirs)
    for params, optimizer in ((ours, paged), (theirs, plain)):
        for step in range(4):
            host = parameters()
            give_gradients(host, step + 1)
            for param, source in zip(params, host, strict=True):
                param.grad = None if source.grad is None else source.grad.cuda()
            optimizer.step()
    for state in plain.state.values():
        state |= {name: value.cpu() for name, value in state.items() if name != "step"}
    check_equal(paged, plain)


def test_what_it_refuses(tmp_path: Path) -> None:
    params = parameters()
    optimizer = AdamW(params, paged=True, budget=LEAST, offload_dir=tmp_path)
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"not copied or pickled: part of it is on disk\. Use state_dict"):
            copier(optimizer)
    for budget in (LEAST - 1, "1 kB", "-5", "many"):
        with pytest.raises(ValueError, match=r"at least 8192 bytes|is not a size"):
            AdamW(params, paged=True, budget=budget)
    for ignored in ({"budget": "1GB"}, {"host_budget": "1GB"}, {"offload_dir": tmp_path}):
        with pytest.raises(ValueError, match="are of paged moments: give paged=True"):
            AdamW(params, **ignored)
    two = [params[0], Parameter(torch.zeros(3, device="meta"))]
    with pytest.raises(ValueError, match="on one device, not on cpu and meta"):
        AdamW(two, paged=True, budget=LEAST, offload_dir=tmp_path).reserve()


@pytest.mark.parametrize("paged", [False, True])
def test_a_foreign_state_is_refused(paged: bool, tmp_path: Path) -> None:
    params = parameters()[:1]
    optimizer = AdamW(params, **paging(paged, LEAST, tmp_path))
    train(params, optimizer, 1, 2)
    good = optimizer.state_dict()
    for change, text in (
        ({"exp_avg": torch.zeros(3)}, r"saved exp_avg is \(3,\) torch.float32, and AdamW's .* \(64, 300\)"),
        ({"exp_avg_sq": None}, "saved exp_avg_sq is None"),
        ({"exp_avg_absmax": torch.zeros(75), "exp_avg_sq_absmax": torch.zeros(75)}, "is torch.uint8"),
    ):
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict({**good, "state": {0: good["state"][0] | change}})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_in_the_trainer_of_transformers(tmp_path: Path) -> None:
    """With a schedule, accumulation, clipping, checkpoints, and a resumed run of the other kind: the same bits."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    data = [{"input_ids": torch.arange(8) + i % 3, "labels": torch.arange(8) + i % 3} for i in range(16)]

    def run(name: str, paged: bool, resume: str | None = None) -> list[Tensor]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        ))  # fmt: skip
        optimizer = AdamW(model.parameters(), lr=1e-2, **paging(paged, 3 * 4096, tmp_path))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=6, per_device_train_batch_size=2, save_steps=3,
            gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="linear",
            logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        assert all(state["step"] == 6 for state in optimizer.state.values())
        return [param.detach() for param in model.parameters()]

    expected = run("plain", False)
    for name, paged, resume in (
        ("paged", True, None), ("resumed", True, str(tmp_path / "plain/checkpoint-3")),
        ("back", False, str(tmp_path / "paged/checkpoint-3")),
    ):  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(run(name, paged, resume), expected, strict=True)), name
