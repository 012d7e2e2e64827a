"""``halfbyte selftest``."""

from __future__ import annotations

import typer

from halfbyte.cli.common import AsJson, Debug, console, emit


def selftest(as_json: AsJson = False, debug: Debug = False) -> None:
    """Streamed == resident, paged == unpaged, packed == unpacked and so on, bit for bit on this machine.

    Trains a small random model several ways and compares losses and adapters; takes less than a minute and needs
    neither a model nor a network. Exit code 5 if anything differs.
    """
    from halfbyte.train.selftest import Check
    from halfbyte.train.selftest import selftest as run_checks

    out = console()
    checks: list[Check] = []
    for check in run_checks():
        checks.append(check)
        mark, style = ("ok", "green") if check.passed else ("DIFFERS", "bold red")
        out.print(f"{mark:<8} {check.name:<26} {check.seconds:5.1f} s  {check.detail}", style=style, markup=False)
    passed = all(check.passed for check in checks)
    text = f"{sum(check.passed for check in checks)} of {len(checks)} hold on this machine"
    emit({"passed": passed, "checks": [check.to_dict() for check in checks]}, as_json, text)
    if not passed:
        raise typer.Exit(5)
