"""Keep secrets out of configs that are printed and saved."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = re.compile(
    r"KEY|TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|CREDENTIAL|BEARER|COOKIE|WEBHOOK|"
    r"(?:^|_)(?:PASS|AUTH|PAT|DSN)(?:_|$)|_PWD$",
    re.IGNORECASE,
)
_SHORTEST = 6  # characters of a value that is looked for inside of longer strings
_PASSWORD_IN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]*@")


def masked(value: Any) -> Any:
    """Put ``${oc.env:NAME}`` in place of secrets, at any depth of a config.

    A secret is the value of an environment variable whose name looks like one (it contains KEY, TOKEN, SECRET,
    PASSWORD ...). A run of the saved config reads it from the environment again.

    Example:
        >>> os.environ["DEMO_API_KEY"] = "sk-123456"
        >>> masked({"url": "https://h/v1?key=sk-123456"})
        {'url': 'https://h/v1?key=${oc.env:DEMO_API_KEY}'}
    """
    return _replaced(value, {value: name for name, value in os.environ.items() if value and _NAMES.search(name)})


def _replaced(value: Any, secrets: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    if value in secrets:
        return f"${{oc.env:{secrets[value]}}}"
    # The longest first: one secret may be part of another.
    for secret in sorted((secret for secret in secrets if len(secret) >= _SHORTEST), key=len, reverse=True):
        value = value.replace(secret, f"${{oc.env:{secrets[secret]}}}")
    return value


def password_problems(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Find URLs with a user name or password in a config: (key, problem). The values are not shown."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from password_problems(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from password_problems(item, f"{key}[{i}]")
    elif isinstance(value, str) and _PASSWORD_IN_URL.match(value.strip()):
        yield (
            key,
            f"{key}: contains a user name or password, which would be printed and saved; give only the address, and "
            "the password in an environment variable",
        )
