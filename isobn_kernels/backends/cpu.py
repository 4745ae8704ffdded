"""Not built yet."""

from torch import Tensor

NAME = "cpu"


def unavailable_reason() -> str | None:
    return "it is not written yet"


def unsupported_reason(x: Tensor) -> str | None:
    return None
