"""A stream by token ids: the events of the generate route in the shape of the chat route's. See token_flow.py."""

from __future__ import annotations

import orjson

from fulgurite.producers.gateway import sse
from fulgurite.producers.gateway.calls import Call
from fulgurite.producers.gateway.protocols.base import Json, invalid, parse_data
from fulgurite.producers.gateway.protocols.choices import DONE
from fulgurite.producers.gateway.token_asking import Prepared, has_choices
from fulgurite.producers.gateway.token_route import chat_chunk, has_texts


class Translation:
    """One stream of GENERATE, event by event in the shape of the chat route's."""

    def __init__(self, call: Call, prepared: Prepared) -> None:
        self.prepared = prepared
        self.ends: dict[int, Json] = {}
        """Of each choice that came to its end: its last event's, for what ended it."""
        self.wordless = False
        """Whether its last event has tokens alone: the server does not know `output_mode`."""
        self._call = call
        self._begun: set[int] = set()

    def __call__(self, event: sse.Event) -> sse.Event:
        if not event.data or event.data == DONE:
            return event
        given = parse_data(event)
        if given.get("error"):
            return event
        if not has_choices(given):
            raise invalid("has an event without choices")
        self.wordless = not has_texts(given)
        if not all(isinstance(choice.get("text"), str) for choice in given["choices"]):
            raise invalid("has an event without text")
        self.ends |= {choice["index"]: choice for choice in given["choices"] if choice.get("finish_reason")}
        created = self._call.start_ns // 10**9
        if not self._begun.issuperset(choice["index"] for choice in given["choices"]):  # each choice begins by itself
            given["prompt_token_ids"] = self.prepared.prompt
        chunk = chat_chunk(self._call.body, self.prepared.rendered, given, self._begun, created)
        data = orjson.dumps(chunk)
        return sse.Event(sse.event(data), data)
