"""What a protocol is to the gateway: what may be asked, what the policy's server is asked, how its answer is read.

One object a protocol, without state; one Stream a streamed call. Pure: neither HTTP, nor Kafka, nor a clock.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Final

import orjson

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.errors import BACKEND_ERROR, ApiError
from fulgurite.producers.gateway.outcome import Outcome
from fulgurite.schemas.spans import OPERATION_CHAT

logger = logging.getLogger(__name__)

Json = dict[str, Any]

INVALID: Final = "backend_invalid"
"""Code of an ApiError: what the backend said is no answer. Such a call is a dead letter."""
ENDS: Final = frozenset(
    {
        *("stop", "length", "tool_calls", "function_call", "content_filter"),  # OpenAI's
        "repetition",  # vLLM's
        *("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal"),  # Anthropic's
        *("model_context_window_exceeded", "compaction"),
        *("eos", "eos_token", "model_length", "safety", "recitation"),  # other providers'
    }
)
"""What says that an answer came to an end. Of any other word nobody knows that, and `error` says that it did not."""
ABORTED: Final = "abort"
"""What says of a choice that the server ended it, being stopped or paused."""
NOTHING: Final = re.compile(rb'"output_tokens"\s*:\s*0\b')
"""What says of a whole answer that it has no token. A vLLM samples one at least, so it was aborted before."""
_TO_ZERO: Final = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER: Final = b"0" * 19
"""As many digits as a number of 64 bits may have, or one less, once all are zeros."""
MAX_CHOICES: Final = 128
"""Of one call (`n`), as OpenAI bounds it."""


class Stream(ABC):
    """Folds the events of one streamed answer into an Outcome, and says of each what the agent gets, and when."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self.ended = False
        """The protocol's last event was seen."""
        self.speaks = False
        """Text, tokens or a call of a tool have come."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the model has said all of its answer."""

    @abstractmethod
    def feed(self, event: sse.Event) -> tuple[bytes, bytes]:
        """(what passes on at once, what waits until the call is recorded). Raises ApiError(502) for what is no part of
        an answer: `backend_error` for a failure the backend reports, Aborted for an answer that it aborted, else
        `backend_invalid`."""

    def close(self) -> None:  # noqa: B027 (most have nothing to put together)
        """No more events come: puts together what was kept in pieces."""


class Api(ABC):
    """A protocol that agents speak."""

    route: ClassVar[str]
    operation: ClassVar[str] = OPERATION_CHAT
    passes: ClassVar[bool] = False
    """Whether a whole answer of the policy's server goes to the agent byte for byte."""

    @abstractmethod
    def gives_ids(self, body: Json) -> bool:
        """Whether the policy's server gives token ids and logprobs for this: without them an answer of it cannot be
        recorded as it must be. Where it does not, the call is recorded by its texts."""

    @abstractmethod
    def choices(self, body: Json) -> int:
        """How many answers this asks for. Raises ApiError(400) for what cannot be recorded."""

    @abstractmethod
    def for_policy(self, body: Json) -> Json:
        """The agent's request and the fields that make its answer recordable."""

    def for_provider(self, body: Json) -> Json | None:
        """The same for an external provider, where something needs to be added: None passes it as it came."""
        return None

    @abstractmethod
    def input_of(self, body: Json, index: int) -> str:
        """What is recorded as the input of choice `index`."""

    def first_with_input(self, body: Json, index: int) -> int:
        """The first choice whose input is also that of choice `index`."""
        return 0

    @abstractmethod
    def read(self, body: Json, response: Any) -> Outcome:
        """A whole answer. Raises ApiError(502) `backend_invalid` when it is none."""

    def seems_aborted(self, answer: bytes) -> bool:
        """A quick look at a whole answer: whether `is_aborted` is worth asking."""
        return b'"abort"' in answer  # cannot stand within a text: there its quotes are escaped

    @abstractmethod
    def is_aborted(self, response: Any, *, ours: bool) -> bool:
        """Whether a whole answer, of the policy's server or of a provider, says that it was ended before its end."""

    @abstractmethod
    def strip(self, body: Json, response: Any) -> None:
        """Takes out of a whole answer what the agent did not ask for."""

    @abstractmethod
    def stream(self, body: Json, *, strip: bool) -> Stream:
        """For the answer to `body`. Without `strip` every event passes as it came, less one that only `for_provider`
        asked for."""

    def error_body(self, error: ApiError) -> bytes:
        return error.body()

    def error_event(self, error: ApiError) -> bytes:
        """What ends a stream that cannot go on, such that this protocol's clients raise."""
        return sse.event(error.body())


def invalid(message: str) -> ApiError:
    return ApiError(502, INVALID, f"the policy server's answer {message}")


def unreadable(error: Exception) -> ApiError:
    """For whatever a reader of answers raised that it should not have: an answer in a shape that nobody foresaw."""
    logger.error("an answer could not be read: %s", where(error))
    return invalid(f"could not be read ({type(error).__name__})")


def where(error: BaseException) -> str:
    """An error by its type and its place, without its message: that may quote a prompt or an answer."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = (f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__} at {', '.join(places)}"


def reported(error: Any) -> ApiError:
    """A failure that the backend reports within a stream."""
    message = error.get("message") if isinstance(error, dict) else error
    return ApiError(502, BACKEND_ERROR, str(message or "the policy server failed within its answer")[:2_000])


def parse_data(event: sse.Event) -> Json:
    """The event's object, read as leniently as a whole answer; halves of characters stay in its texts, for
    `whole_text`. Raises ApiError(502)."""
    try:
        data = _loads(event.data)
    except ValueError:
        raise invalid("has an event that is not JSON") from None
    if not isinstance(data, dict):
        raise invalid("has an event that is no object")
    return data


def loads(data: bytes) -> Any:
    """JSON, in which whole numbers of more than 64 bits stay whole: orjson makes floats of them. Raises ValueError."""
    found = orjson.loads(data)
    if _LONG_NUMBER in data.translate(_TO_ZERO):
        try:
            return json.loads(data)
        except (ValueError, RecursionError):  # thousands of digits: nobody means them
            pass
    return found


def loads_lenient(data: bytes) -> Any:
    """JSON as Python's json module writes it: NaN, Infinity and half surrogate pairs included. Raises ValueError."""
    try:
        return loads(data)
    except orjson.JSONDecodeError:
        return json.loads(json.dumps(_loads(data), ensure_ascii=False).encode("utf-8", "replace"))


def _loads(data: bytes) -> Any:
    try:
        return loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def whole_text(pieces: Iterable[str]) -> str:
    """Pieces of a text put together, also where a character came in two halves; a half that stays alone is a ?."""
    text = "".join(pieces)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\ufffd", "?")
    return text


def without_seed(body: Json) -> Json:
    """A copy. A seed makes the samples of a group alike, and vLLM's CPU engine dies of it (chunked prefill)."""
    return {name: value for name, value in body.items() if name != "seed"}


def unfinished(reason: str) -> str:
    """What is wrong with an answer that ended so; empty for nothing."""
    return (
        "" if reason.lower() in ENDS else f"the answer did not come to its end: its finish reason is {reason[:100]!r}"
    )


def whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def to_bytes(value: Any) -> bytes:
    """As JSON, also what orjson does not write: deeper than it goes, or whole numbers of more than 64 bits."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        strict = json.loads(json.dumps(value), parse_constant=lambda _: None)  # NaN is null, as orjson writes it
        return json.dumps(strict, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def written(value: Any) -> bytes:
    """The same for a dead letter: nesting without end is told instead of raised."""
    try:
        return to_bytes(value)
    except RecursionError:
        return b"nested too deep to be written"


def to_json(value: Any) -> str:
    return to_bytes(value).decode()


def picked(body: Json, *names: str) -> str:
    """These fields of a request as JSON, as far as it has them."""
    return to_json({name: body[name] for name in names if body.get(name) is not None})
