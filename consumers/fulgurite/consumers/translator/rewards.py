"""Rewards in spans of OTLP. A pure function; who publishes them is service.py.

    agentlightning.reward.<i>.{name, value}   one reward of the attempt: 0 is the one that trains, all are dimensions
    agentops.task.output, agentops.entity.output = {"type": "reward", "value": 0.5}, and the attribute `reward` of a
    span named agentlightning.annotation      Agent Lightning's older forms of the same
    event gen_ai.evaluation.result            one reward each, named gen_ai.evaluation.name, of the span it stands in;
                                              of the whole attempt where that name is `reward`

Agent Lightning's rewards are named `reward`, so that the last one of an attempt is the rollout's, as it is there. With
agentlightning.link.<i>.{key_match: span_id, value_match} a reward belongs to that span; other links stay in metadata.

Promises: the same span gives rewards with the same ids, however often; a span that says it has a reward and has none
that is a finite number gives a Refused. Spans without a rollout have nobody to reward: they give nothing. What becomes
metadata follows the rules of redaction for the attribute it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Final, cast

from pydantic import ValidationError

from fulgurite.consumers.otlp.rollout import attempt_of, text
from fulgurite.consumers.otlp.spans import Attributes, OtlpEvent, OtlpSpan
from fulgurite.producers.redaction import Redactor
from fulgurite.schemas.rewards import FINAL_REWARD, Reward

TELL_TALES: Final = (b"reward", b"gen_ai.evaluation.result")
"""A record without any of these bytes has no rewards; whether one with them has is seen when it is decoded."""

EVALUATION: Final = "gen_ai.evaluation.result"

_DIMENSION = re.compile(r"agentlightning\.reward\.(\d{1,4})\.(name|value)")
_LINK = re.compile(r"agentlightning\.link\.(\d{1,4})\.(key_match|value_match)")
_NUMBER = re.compile(r"[ \t\r\n]*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[ \t\r\n]*")
"""As JSON and XML write one: Python's float() would read 1_0 as 10, and digits of any script."""
_AGENTOPS = ("agentops.task.output", "agentops.entity.output")
_MAX_CHARS = 4_096


@dataclass(frozen=True, slots=True)
class Refused:
    """What should have been a reward."""

    index: int
    message: str


def rewards_of(span: OtlpSpan, redactor: Redactor | None = None) -> list[Reward | Refused]:
    """In the order in which the span has them."""
    if not attempt_of(span)[0]:
        return []
    found: list[Reward | Refused] = []
    spoken = _spoken(span)
    if spoken is not None:
        value, dimensions = spoken
        target, metadata = _links(span.attributes)
        found.append(
            _reward(span, "span", 0, value, dimensions=dimensions, span_id=target, metadata=metadata, source="otlp")
        )
    for number, event in enumerate(span.events):
        if event.name == EVALUATION and (reward := _evaluation(span, number, event, redactor)) is not None:
            found.append(reward)
    return found


def _spoken(span: OtlpSpan) -> tuple[object, dict[str, object]] | None:
    """The reward a span stands for: its value and its named dimensions, if there are several."""
    parts: dict[int, dict[str, object]] = {}
    for name, value in span.attributes.items():
        if (match := _DIMENSION.fullmatch(name)) is not None:
            parts.setdefault(int(match[1]), {})[match[2]] = value
    if parts:
        ordered = [parts[number] for number in sorted(parts)]
        names = {text(part.get("name")) or str(at): part.get("value") for at, part in enumerate(ordered)}
        return ordered[0].get("value"), names if len(ordered) > 1 else {}
    for name in _AGENTOPS:
        output: Any = span.attributes.get(name)
        if isinstance(output, str):
            try:
                output = json.loads(output)
            except (ValueError, RecursionError):
                continue
        if isinstance(output, dict) and cast("dict[str, Any]", output).get("type") == "reward":
            value = cast("dict[str, Any]", output).get("value")
            return None if value is None else (value, {})  # a reward function that gave none
    if span.name == "agentlightning.annotation" and "reward" in span.attributes:
        return span.attributes["reward"], {}
    return None


def _links(attributes: Attributes) -> tuple[str, dict[str, str]]:
    """The span a reward is linked to, "" where to none; the links as metadata."""
    links: dict[str, dict[str, str]] = {}
    for name, value in attributes.items():
        if (match := _LINK.fullmatch(name)) is not None:
            links.setdefault(match[1], {})[match[2]] = text(value)
    pairs = [(link.get("key_match", ""), link.get("value_match", "")) for _, link in sorted(links.items())]
    target = next((value for key, value in pairs if key == "span_id"), "")
    return target, {key: value[:_MAX_CHARS] for key, value in pairs if key}


def _evaluation(span: OtlpSpan, number: int, event: OtlpEvent, redactor: Redactor | None) -> Reward | Refused | None:
    value = event.attributes.get("gen_ai.evaluation.score.value")
    if value is None:
        return None  # a label alone is no reward; it stays in the span's events
    name = text(event.attributes.get("gen_ai.evaluation.name")) or "evaluation"
    sources = redactor.sources(event.attributes) if redactor is not None else event.attributes
    metadata = {
        key: text(sources[f"gen_ai.evaluation.{key}"])[:_MAX_CHARS]
        for key in ("score.label", "explanation")
        if f"gen_ai.evaluation.{key}" in sources
    }
    whole = name == FINAL_REWARD
    return _reward(
        span,
        "event",
        number,
        value,
        name=name,
        span_id="" if whole else span.span_id,
        metadata=metadata,
        source=EVALUATION,
        time_ns=event.time_ns,
    )


def _reward(span: OtlpSpan, kind: str, number: int, value: object, **fields: Any) -> Reward | Refused:
    rollout_id, attempt_id = attempt_of(span)
    identity = f"{rollout_id}/{attempt_id}/{span.trace_id}/{span.span_id}/{kind}/{number}"
    fields["dimensions"] = {name: _number(part) for name, part in dict(fields.get("dimensions") or {}).items()}
    fields.setdefault("time_ns", span.end_ns or span.start_ns)
    try:
        return Reward(
            reward_id=hashlib.sha256(identity.encode()).hexdigest()[:32],
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            value=_number(value),
            **fields,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return Refused(span.index, f"span {span.span_id}, {kind} {number}: {where}: {first['msg']}")


def _number(value: object) -> float:
    """Not a number where it is none, which the event refuses. A text of a number counts: some SDKs know texts only."""
    if isinstance(value, bool | int | float):
        return float(value) if abs(value) < 2**1000 else math.nan
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else math.nan
