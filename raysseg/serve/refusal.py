"""What a request is answered that can't be done: a status, and what is wrong, allowed and to be mended."""

from __future__ import annotations

from raysseg.schema import InputError


class Refusal(InputError):  # noqa: N818 - an answer
    """A request that is not done; the message says why, and what would be.

    Attributes:
        status: of HTTP, 400 to 503.
        retry_after_s: when to ask again, where that may help.
    """

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(status, message, retry_after_s)  # all of them, so that it can be pickled
        self.status, self.message, self.retry_after_s = status, message, retry_after_s

    def __str__(self) -> str:
        return self.message
