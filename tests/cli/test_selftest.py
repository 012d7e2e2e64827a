"""``halfbyte selftest`` runs every claim, and says so where one does not hold."""

from __future__ import annotations

import json

import pytest

from halfbyte.cli.main import main
from halfbyte.train import selftest

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def test_all_claims_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["passed"]
    assert [check["name"] for check in result["checks"]] == [
        "decode == reference", "packed == unpacked", "checkpointed == stored", "streamed == resident",
        "mapped == resident", "paged == unpaged", "offloaded == kept", "resumed == uninterrupted",
    ]  # fmt: skip


def test_a_claim_that_does_not_hold_is_exit_code_5(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another learning rate in the place of streaming: the losses differ, and that is noticed and said."""

    def checks(self: selftest._Laboratory) -> dict[str, object]:
        return {"streamed == resident": lambda: self._runs(optim__lr=1e-3)}

    monkeypatch.setattr(selftest._Laboratory, "checks", property(checks))
    assert main(["selftest", "--json"]) == 5
    captured = capsys.readouterr()
    assert not json.loads(captured.out.splitlines()[-1])["passed"]
    assert "DIFFERS" in captured.err
    assert "losses" in captured.err
