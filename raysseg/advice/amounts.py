"""Memory and time as people write them: 12GiB, 50ms."""

from __future__ import annotations

import re
from collections.abc import Mapping

from raysseg.schema import InputError

_BYTES = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def to_bytes(text: str, where: str) -> int:
    """Bytes of `12GiB` or `24 GB`; raises InputError, which names ``where``."""
    return round(_amount(text, _BYTES, where, "12GiB"))


def to_seconds(text: str, where: str) -> float:
    """Seconds of `50ms` or `0.2s`; raises InputError, which names ``where``."""
    return _amount(text, _SECONDS, where, "50ms")


def in_gib(number: float) -> str:
    """Bytes for people."""
    return f"{number / 2**30:.3g} GiB"


def _amount(text: str, units: Mapping[str, float], where: str, example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    by_name = {name.lower(): factor for name, factor in units.items()}
    if found is None or found[2].lower() not in by_name or not float(found[1]):
        raise InputError(
            f"{where}: received {text!r}; allowed: a number above 0 and its unit, such as {example}; "
            f"units: {', '.join(units)}"
        )
    return float(found[1]) * by_name[found[2].lower()]
