"""One server's sender (sender.py), as the follower sees it: started when it is first needed, told a folder, ended when
it fails or the server was started anew.

`follower.load = "transfer"` asks for it. A server whose vLLM has no weight-transfer routes, or was started without
--weight-transfer-config, is given files as ever: `connect` finds out, before anything is paused. Knows nothing of
versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any, Final

from fulgurite.consumers.follower import sender
from fulgurite.consumers.follower.server import Refused, Unreachable
from fulgurite.schemas.settings import FollowerSettings

logger = logging.getLogger(__name__)

NOT_CONFIGURED: Final = "not configured"
"""In what vLLM answers where it was started without --weight-transfer-config."""
START_SECONDS: Final = 120.0
"""vLLM's import, and the first contact with a GPU, besides the calls themselves."""
END_SECONDS: Final = 5.0


class Transfer:
    def __init__(self, url: str, settings: FollowerSettings) -> None:
        self._url = url
        self._settings = settings
        self._process: Process | None = None
        self.absent = False
        """Whether this start of the server is known to have no such routes."""

    @property
    def connected(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def connect(self) -> None:
        """Has a sender, unless the server cannot have one. The server serves meanwhile, but for the moment in which its
        workers join. Raises Unreachable: why there is none this time."""
        if self.absent or self.connected:
            return
        python = self._settings.transfer_python or sys.executable
        host, device = self._settings.transfer_host, self._settings.transfer_device
        seconds = self._settings.request_seconds
        command = [python, "-P", sender.__file__, self._url, f"--host={host}", f"--device={device}"]
        env = os.environ | {sender.API_KEY: self._settings.api_key.get_secret_value()}
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command, f"--seconds={seconds}", stdin=PIPE, stdout=PIPE, env=env
            )
        except OSError as error:
            raise Unreachable(f"follower.transfer_python: {python} cannot be run: {error}", answered=True) from None
        try:
            await self._answer(START_SECONDS + 2 * seconds)
        except _Failed as error:
            if error.status == 404 or NOT_CONFIGURED in str(error):
                self.absent = True
                logger.warning(
                    "%s takes no weights over the network (%s): it is given files; start vLLM with "
                    '--weight-transfer-config \'{"backend": "nccl"}\'',
                    self._url,
                    error,
                )
                return
            # Whether the server is there at all the other routes say.
            raise Unreachable(f"the sender of weights did not start: {error}", answered=True) from None
        logger.info("%s gets weights from GPU to GPU", self._url)

    async def send(self, folder: Path) -> None:
        """Returns when the server has all tensors of the folder. Raises Refused where it is untouched and said no, else
        Unreachable; there is no sender then until the next `connect`."""
        if not self.connected:
            raise Unreachable("the sender of weights is gone", answered=True)
        assert self._process
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"folder": str(folder)}).encode() + b"\n")
            await self._process.stdin.drain()
            await self._answer(self._settings.request_seconds)
        except OSError as error:
            await self.close()
            raise Unreachable(f"the sender of weights ended: {error}", answered=True) from None
        except _Failed as error:
            if not error.touched and 400 <= error.status < 500:
                raise Refused(str(error), error.status) from None
            raise Unreachable(f"sending weights: {error}", answered=error.answered, status=error.status) from None
        except asyncio.CancelledError:
            await self.close()
            raise

    def forget(self) -> None:
        """The server was started anew, or may have been: its workers are not those of the group."""
        self.absent = False
        if self.connected:
            assert self._process
            self._process.kill()
        self._process = None

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_SECONDS)

    async def _answer(self, seconds: float) -> dict[str, Any]:
        """The sender's next line. Raises _Failed, after which there is no sender."""
        assert self._process
        assert self._process.stdout
        try:
            async with asyncio.timeout(seconds):
                line = await self._process.stdout.readline()
        except TimeoutError:
            await self.close()
            raise _Failed(f"no answer within {seconds:g} s", 0, touched=True, answered=False) from None
        except asyncio.CancelledError:
            await self.close()
            raise
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            found = {"error": "the sender ended without a word; what it printed is above", "touched": True}
        if "error" in found:
            await self.close()
            answered = bool(found.get("answered", True))
            raise _Failed(
                str(found["error"]), int(found.get("status", 0)), touched=bool(found["touched"]), answered=answered
            )
        return found


class _Failed(Exception):
    """What the sender said before it ended."""

    def __init__(self, message: str, status: int, *, touched: bool, answered: bool) -> None:
        super().__init__(message)
        self.status = status
        self.answered = answered
        self.touched = touched
