"""What every part of a job is made of: a frozen pydantic model that is strict about its keys. No torch, no ray."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Section(BaseModel):
    """Part of a job: frozen, and strict about its keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, serialize_by_alias=True
    )

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            allowed = [field.alias or name for name, field in cls.model_fields.items()]
            unknown = [str(key) for key in value if key not in allowed]
            if unknown:
                errors = [InitErrorDetails(type=_unknown_key(key, allowed), input=None) for key in unknown]
                raise ValidationError.from_exception_data(cls.__name__, errors)
        return value


def _unknown_key(key: str, allowed: Sequence[str]) -> PydanticCustomError:
    near = [name for name in allowed if _initials(key) == name or _initials(name) == key]
    near = near or difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
    message = "there is no such key; allowed: {allowed}" + ("; did you mean `{near}`?" if near else "")
    context = {"key": key, "allowed": ", ".join(allowed), "near": (near or [""])[0]}
    return PydanticCustomError("unknown_key", message, context)


def not_ordered(key: str, first: float, second: float) -> PydanticCustomError:
    """The error of two bounds that stand the wrong way round."""
    message = "received [{first}, {second}]; allowed: [smallest, largest]"
    return PydanticCustomError("not_ordered", message, {"key": key, "first": first, "second": second})


def _initials(key: str) -> str:
    return "".join(word[:1] for word in key.split("_"))


def _number_and_unit(units: str, examples: str) -> BeforeValidator:
    def check(text: Any) -> Any:
        if not isinstance(text, str) or not re.fullmatch(rf"[1-9]\d* ({units})s?", text):
            raise ValueError(f"allowed: a number and its unit, such as {examples}")
        return text

    return BeforeValidator(check)


Interval = Annotated[str, _number_and_unit("step|epoch|second|minute|hour", "`500 steps`, `10 minutes` or `1 epoch`")]
"""Such as `500 steps`, `10 minutes` or `1 epoch`."""

Duration = Annotated[str, _number_and_unit("second|minute|hour", "`90 seconds`, `10 minutes` or `2 hours`")]
"""Such as `90 seconds`, `10 minutes` or `2 hours`."""

_SECONDS = {"second": 1, "minute": 60, "hour": 3600}


def seconds_of(text: Interval | Duration) -> float | None:
    """How long that is; None where it goes by steps or epochs."""
    amount, _, unit = text.partition(" ")
    seconds = _SECONDS.get(unit.removesuffix("s"))
    return int(amount) * seconds if seconds is not None else None
