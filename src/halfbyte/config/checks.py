"""What every section sees to when it is made."""

from __future__ import annotations

from halfbyte.errors import ConfigError


def require(condition: bool, key: str, value: object, need: str) -> None:
    """See that `condition` holds of `value`, the setting called `key`.

    Raises:
        ConfigError: it does not; `need` says what is possible.
    """
    if not condition:
        raise ConfigError(f"{value!r} is not possible", where=key, why=need)


def require_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    """See that `value` is one of `choices`, as `require` does."""
    require(value in choices, key, value, "choose one of " + ", ".join(map(str, choices)))
