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
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
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
TRY_AGAIN_SECONDS: Final = 30.0
JOIN_AGAIN_SECONDS: Final = 600.0
"""After a group that did not come about: the server's engine may wait in it for 300 s, and serves nobody meanwhile."""

_left: Final[list[Popen[bytes]]] = []
"""Senders that are told nothing any more, until they have ended."""


class Transfer:
    def __init__(self, url: str, settings: FollowerSettings) -> None:
        self._url = url
        self._settings = settings
        self._process: Popen[bytes] | None = None
        self._answers: asyncio.StreamReader | None = None
        self.absent = False
        """Whether this start of the server is known to have no such routes."""
        self.spoiled = False
        """Whether an update of the server may have begun and not come to its end."""
        self._not_before = -math.inf
        self._why_not = ""
        self._sending = False
        """Whether the server's workers wait for the sender, as far as is known."""

    @property
    def connected(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def connect(self) -> None:
        """Has a sender, unless the server cannot have one. The server serves meanwhile, but for the moment in which its
        workers join. Raises Unreachable: why there is none this time."""
        if self.connected:
            return
        if self._process:  # it ended while nobody talked to it
            self._sending = False
            self._leave(self._process)
        _left[:] = [process for process in _left if process.poll() is None]
        if time.monotonic() < self._not_before:
            raise Unreachable(f"{self._why_not}; not tried again for a while", answered=True)
        python = self._settings.transfer_python or sys.executable
        host, device = self._settings.transfer_host, self._settings.transfer_device
        seconds = self._settings.request_seconds
        command = [python, "-P", sender.__file__, self._url, f"--host={host}", f"--device={device}"]
        env = os.environ | {sender.API_KEY: self._settings.api_key.get_secret_value()}
        try:
            await self._start([*command, f"--seconds={seconds}", *(["--reset"] if self.spoiled else [])], env)
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
            self._why_not = f"the sender of weights did not start: {error}"
            if error.answered:
                self._not_before = time.monotonic() + (JOIN_AGAIN_SECONDS if error.joining else TRY_AGAIN_SECONDS)
            raise Unreachable(self._why_not, answered=error.answered) from None
        self.spoiled = False
        logger.info("%s gets weights from GPU to GPU", self._url)

    async def _start(self, command: list[str], env: dict[str, str]) -> None:
        # Not asyncio's: that kills the process when the loop ends, and it may have to outlive this one for a moment.
        start = partial(Popen, command, stdin=PIPE, stdout=PIPE, env=env, start_new_session=True, bufsize=0)
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(None, start)
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_end_unused)
            raise
        self._process = process
        self._answers = reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), process.stdout)

    def ensure_connected(self) -> None:
        """Raises Unreachable where `send` could not even begin."""
        if not self.connected:
            raise Unreachable("the sender of weights is gone", answered=True)

    async def send(self, folder: Path) -> None:
        """Returns when the server has all tensors of the folder. Raises Refused where it is untouched, and would be the
        next time, else Unreachable; there is no sender then until the next `connect`."""
        self.ensure_connected()
        assert self._process
        assert self._process.stdin
        self._sending = True
        try:
            self._process.stdin.write(json.dumps({"folder": str(folder)}).encode() + b"\n")  # it has room for that
            await self._answer(self._settings.request_seconds)
        except OSError as error:
            await self.close()
            raise Unreachable(f"the sender of weights ended: {error}", answered=True) from None
        except _Failed as error:
            self.spoiled |= error.touched
            # Untouched with nothing said by the server: the files cannot be read.
            if not error.touched and error.answered and error.status < 500:
                raise Refused(str(error), error.status) from None
            raise Unreachable(f"sending weights: {error}", answered=error.answered, status=error.status) from None

    def forget(self) -> None:
        """The server was started anew, or may have been: its workers are not those of the group."""
        self.absent = self.spoiled = False
        self._not_before = -math.inf
        if self._process:
            self._process.kill()
            self._leave(self._process)

    async def close(self) -> None:
        """Not by force where the server's workers wait for it: it ends by itself when it has sent what it began to."""
        process = self._process
        if process is None:
            return
        self._leave(process)
        if not self._sending:
            process.kill()
            with contextlib.suppress(TimeoutExpired):
                await asyncio.to_thread(process.wait, END_SECONDS)
        self._sending = False

    def _leave(self, process: Popen[bytes]) -> None:
        """It is told no more, and collected when it has ended."""
        assert process.stdin
        process.stdin.close()
        _left.append(process)
        self._process = None

    async def _answer(self, seconds: float) -> None:
        """Waits for the sender's next line. Raises _Failed, after which there is no sender."""
        assert self._answers
        try:
            async with asyncio.timeout(seconds):
                line = await self._answers.readline()
        except TimeoutError:
            self._sending = False
            await self.close()
            raise _Failed(f"no answer within {seconds:g} s", touched=True, joining=True) from None
        self._sending = False
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            found = {"error": "the sender ended without a word; what it printed is above", "touched": True}
        if "error" in found:
            await self.close()
            raise _Failed(**found)


def _end_unused(starting: asyncio.Future[Popen[bytes]]) -> None:
    """Of a start that nobody waited for to its end."""
    if starting.cancelled() or starting.exception() is not None:
        return
    process = starting.result()
    process.kill()
    for pipe in (process.stdin, process.stdout):
        assert pipe
        pipe.close()
    _left.append(process)


class _Failed(Exception):
    """What the sender said before it ended."""

    def __init__(
        self, error: str, status: int = 0, *, touched: bool, answered: bool = True, joining: bool = False
    ) -> None:
        super().__init__(error)
        self.status = status
        self.touched = touched
        self.answered = answered
        self.joining = joining
