"""To which attempt of which rollout a span of OTLP belongs: the rule of tables/0011_otlp.sql, for those who decode in
Python. The first that is there counts:

    1  attributes of the span        fulgurite.rollout_id, agentlightning.rollout_id       (and …attempt_id)
    2  attributes of its resource    the same names
    3  baggage                       baggage.fulgurite.rollout_id, baggage.agentlightning.rollout_id, as a baggage
                                     processor with a prefix writes them (one without a prefix writes 1)
    4  a link of the span            its attribute fulgurite.rollout_id
"""

from __future__ import annotations

from fulgurite.consumers.otlp.spans import Attributes, OtlpSpan

_PREFIXES = ("fulgurite.", "agentlightning.")


def attempt_of(span: OtlpSpan) -> tuple[str, str]:
    """(rollout_id, attempt_id), each "" where the span says none."""
    return _find(span, "rollout_id"), _find(span, "attempt_id")


def _find(span: OtlpSpan, name: str) -> str:
    own = [prefix + name for prefix in _PREFIXES]
    for attributes, names, empty in (
        (span.attributes, own, True),
        (span.resource, own, False),
        (span.attributes, ["baggage." + one for one in own], True),
    ):
        for one in names:
            if one in attributes and (empty or attributes[one]):
                return text(attributes[one])
    return next((value for link in span.links if (value := text(link.attributes.get("fulgurite." + name)))), "")


def text(value: object) -> str:
    """A scalar as SQL writes it into columns and maps."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def attribute(attributes: Attributes, *names: str) -> object:
    """The first of these that is there."""
    return next((attributes[name] for name in names if name in attributes), None)
