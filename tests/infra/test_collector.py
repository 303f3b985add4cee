"""The Collector's configuration: sizes that leave no span for it to drop. What it delivers: tests/chaos."""

from __future__ import annotations

import re
from pathlib import Path

from fulgurite.schemas.settings import KafkaSettings

CONFIGURATION = Path(__file__).parents[2] / "infra" / "collector" / "otelcol.yaml"


def test_what_is_accepted_fits_a_batch_and_a_batch_fits_a_record() -> None:
    text = CONFIGURATION.read_text()
    receivers = text[text.index("\nreceivers:") : text.index("\nexporters:")]
    bodies = [int(size) for size in re.findall(r"max_request_body_size: (\d+)", receivers)]
    assert len(bodies) == len(re.findall(r"^ +endpoint:", receivers, re.MULTILINE)), "every receiver has a bound"
    (batch,) = (int(size) for size in re.findall(r" max_size: (\d+)", text))
    (message,) = (int(size) for size in re.findall(r"max_message_bytes: (\d+)", text))
    assert max(bodies) < batch < message <= KafkaSettings().max_record_bytes
