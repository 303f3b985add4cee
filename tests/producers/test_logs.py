"""Lines of JSON: one object each, whoever wrote them and whatever was given to the call."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from typing import Any

import pytest

from fulgurite.producers.logs import JsonFormatter

_ANYTHING = """
import logging, sys, threading, warnings
from fulgurite.producers.logs import configure_logging
from fulgurite.schemas.log_settings import LogSettings

configure_logging("first", LogSettings(format="json", level="warning"))
configure_logging("test", LogSettings(format="json", level="warning"))
logging.getLogger("quiet").info("not written")
logging.getLogger("ours").warning("of %s", "one\\nrecord", extra={"topic": "spans", "partition": 3})
warnings.warn("old")
print("printed", file=sys.stderr)
print("a bar ", end="", file=sys.stderr)
print("in two parts", file=sys.stderr)
logging.getLogger("ours").error("%d", "does not fit")

library = logging.getLogger("library")  # as some do: a handler of its own
library.addHandler(logging.StreamHandler())
library.propagate = False
library.warning("its own way")

thread = threading.Thread(target=lambda: 1 / 0, name="counts")
thread.start()
thread.join()
raise RuntimeError("the end")
"""


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_of_a_process_is_an_object() -> None:
    done = subprocess.run([sys.executable, "-c", _ANYTHING], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    found = lines(done.stderr)
    assert {line["service"] for line in found} == {"test"}
    for line in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    assert [(line["logger"], line["level"], line["message"]) for line in found if line["logger"] != "py.warnings"] == [
        ("ours", "WARNING", "of one\nrecord"),
        ("stderr", "WARNING", "printed"),
        ("stderr", "WARNING", "a bar in two parts"),
        ("ours", "ERROR", "%d ('does not fit',)"),
        ("stderr", "WARNING", "its own way"),
        ("python", "ERROR", "the thread counts ended by an unexpected error"),
        ("python", "CRITICAL", "the process ends by an unexpected error"),
    ]
    assert (found[0]["topic"], found[0]["partition"]) == ("spans", 3)
    assert found[1]["logger"] == "py.warnings"
    assert found[-2]["exception"].startswith("Traceback (most recent call last):\n")
    assert found[-2]["exception"].endswith("ZeroDivisionError: division by zero")
    assert found[-1]["exception"].endswith("RuntimeError: the end")


def formatted(**extra: Any) -> dict[str, Any]:
    record = logging.makeLogRecord({"name": "n", "msg": "m", "levelname": "INFO", "created": 1.0625, **extra})
    text = JsonFormatter("service").format(record)
    assert text.isascii()
    assert "\n" not in text
    return json.loads(text)


def test_ours_are_the_names_of_the_fields() -> None:
    assert formatted(service="another", level="x", topic="t") == {
        "timestamp": "1970-01-01T00:00:01.062Z",
        "level": "INFO",
        "logger": "n",
        "service": "service",
        "message": "m",
        "topic": "t",
    }


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1.5, 1.5),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (None, None),
        (True, True),
        ("a\u2028\x00ü\ud800", "a\u2028\x00ü\ud800"),
        (b"\xff", "b'\\xff'"),
        ({1: 2}, "{1: 2}"),
    ],
)
def test_any_value_can_be_written(value: object, written: object) -> None:
    assert formatted(value=value)["value"] == written
