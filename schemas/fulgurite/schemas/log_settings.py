"""The section `log`: how every service writes its log. How it is done: fulgurite.producers.logs."""

from __future__ import annotations

from typing import Literal

from fulgurite.schemas.sections import Section


class LogSettings(Section):
    format: Literal["text", "json"] = "text"
    """Of a service's lines on stderr. text: for people; json: one object a line, for what collects logs."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is written."""
