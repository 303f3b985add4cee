"""The one error of the API: a request that cannot be done."""

from __future__ import annotations

from fulgurite.schemas.errors import FulguriteError


class Refused(FulguriteError):
    """`status` is HTTP's; the message says what is wrong, for the caller."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
