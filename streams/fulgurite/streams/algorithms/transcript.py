"""What an attempt's spans say, as text for a model to read. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fulgurite.schemas.spans import OPERATION_AGENT, OPERATION_CHAT, Span
from fulgurite.streams.algorithms.compliance import tool_of

_LEFT_OUT = "\n[… left out …]\n"


def texts_of(spans: Sequence[Span]) -> Mapping[str, str]:
    """input: what the agent was given (of its root span, or its first call); output: what it said in the end (of its
    last call, or its root span); transcript: every call and tool in their order."""
    calls = [span for span in spans if span.operation == OPERATION_CHAT or span.resource]
    roots = [span for span in spans if span.operation == OPERATION_AGENT]
    return {
        "input": next((span.input for span in [*roots, *calls] if span.input), ""),
        "output": next((span.output for span in [*reversed(calls), *roots] if span.output), ""),
        "transcript": "\n\n".join(filter(None, (_said(span) for span in spans))),
    }


def shortened(text: str, max_chars: int) -> str:
    """Without its middle where it is too long: how it began and how it ended say most."""
    if len(text) <= max_chars:
        return text
    room = max_chars - len(_LEFT_OUT)
    return text[: room // 2] + _LEFT_OUT + text[len(text) - (room - room // 2) :]


def _said(span: Span) -> str:
    if span.operation == OPERATION_AGENT:
        return ""
    what = f"tool {tool}" if (tool := tool_of(span)) else (span.operation or span.name)
    lines = [f"[{what}]", f"in: {span.input}" if span.input else "", f"out: {span.output}" if span.output else ""]
    if span.status_message:
        lines.append(f"error: {span.status_message}")
    return "\n".join(filter(None, lines))
