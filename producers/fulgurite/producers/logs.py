"""What a process of ours writes to stderr: lines for people, or one JSON object a line for what collects logs.

    {"timestamp": "2026-11-21T19:05:13.042Z", "level": "WARNING", "logger": "fulgurite.consumers…", "service":
     "materialiser", "message": "…", "exception": "Traceback …", "topic": "fulgurite.spans", "partition": 3}

| field | |
|---|---|
| timestamp | RFC 3339, UTC, milliseconds |
| level | DEBUG, INFO, WARNING, ERROR, CRITICAL |
| logger, service, message | |
| exception | with its traceback, in one text; only where there is one |
| any other | what the call gave as `extra`: topic, partition, offset |

Promises: as JSON, every line is an object, whatever was given to the call; libraries' lines, warnings, errors that end
a thread or the process, and what anybody prints to sys.stderr have the same form. What native code writes past Python
does not. Prompts, answers and secrets are never logged, by anyone.
"""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import threading
import types
from datetime import UTC, datetime
from typing import Any, TextIO

from fulgurite.schemas.log_settings import LogSettings

TEXT_FORMAT = "%(asctime)s %(levelname)-7s {service} %(name)s: %(message)s"

_NO_EXTRA = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
"""What every record has, and uvicorn's message once more with colours."""


def configure_logging(service: str, log: LogSettings) -> None:
    """Lines on stderr, of this service, from now on. May be called again."""
    stderr = sys.stderr.stream if isinstance(sys.stderr, PrintedLines) else sys.stderr
    handler = logging.StreamHandler(stderr)
    if log.format == "json":
        handler.setFormatter(JsonFormatter(service))
        sys.stderr = PrintedLines(stderr, handler)
        _log_what_ends_threads()
    else:
        handler.setFormatter(logging.Formatter(TEXT_FORMAT.format(service=service)))
    logging.basicConfig(level=log.level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(log.format == "json")
    _silence_clients()


def is_json() -> bool:
    """Whether this process was told to write JSON."""
    return isinstance(sys.stderr, PrintedLines)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, in ASCII: no locale, no line separator in a text can break it."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "timestamp": _rfc3339(record.created),
            "level": record.levelname,
            "logger": record.name,
            "service": self._service,
            "message": _message(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        for name, value in vars(record).items():
            if name not in _NO_EXTRA:
                line.setdefault(name, _plain(value))
        return json.dumps(line, default=repr)


class PrintedLines(io.TextIOBase):
    """In place of sys.stderr: what was not logged but printed becomes a record of the logger `stderr`, line by line."""

    def __init__(self, stream: TextIO, handler: logging.Handler) -> None:
        super().__init__()
        self.stream = stream
        self._handler = handler
        self._rest = threading.local()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  (a property of TextIOWrapper)
        return self.stream.encoding

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._rest, "text", "") + text).split("\n")
        self._rest.text = rest
        for line in lines:
            self._say(line)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def _say(self, line: str) -> None:
        # Where the handler itself fails (a full disk) it prints why: that must not come back to it.
        if line.strip() and not getattr(self._rest, "busy", False):
            self._rest.busy = True
            try:
                # Past the level: nobody knows how bad it is.
                self._handler.handle(
                    logging.LogRecord("stderr", logging.WARNING, "", 0, line.rstrip(), args=None, exc_info=None)
                )
            finally:
                self._rest.busy = False


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit the text: better both than neither
        return f"{record.msg} {record.args!r}"


def _plain(value: object) -> object:
    """NaN and infinities are no JSON; keys that are no text would be refused."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if value is None or isinstance(value, str | int | bool):
        return value
    return repr(value)


def _log_what_ends_threads() -> None:
    """Python prints it in many lines."""
    logger = logging.getLogger("python")

    def of_process(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        logger.critical("the process ends by an unexpected error", exc_info=(kind, error, trace))

    def of_thread(arguments: threading.ExceptHookArgs) -> None:
        error, thread = arguments.exc_value, arguments.thread
        if error is not None:
            name = thread.name if thread is not None else "unknown"
            logger.error("the thread %s ended by an unexpected error", name, exc_info=error)

    def unraisable(arguments: sys.UnraisableHookArgs) -> None:
        what = arguments.err_msg or "an error that nobody could be told"
        logger.error("%s: %r", what, arguments.object, exc_info=arguments.exc_value)

    sys.excepthook, threading.excepthook, sys.unraisablehook = of_process, of_thread, unraisable


def _silence_clients() -> None:
    """aiokafka repeats one line per retry while a broker is away; our own services say what they wait for."""
    from fulgurite.producers.credentials import log_only_refusals

    log_only_refusals()
    for client in ("httpx", "httpx2"):  # a line per request; httpx2 is what the openai client uses
        logging.getLogger(client).setLevel(logging.WARNING)
