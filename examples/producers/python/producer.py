"""Spans and a reward of one attempt, published with aiokafka. Nothing of Fulgurite is imported.

    pip install "aiokafka==0.14.0" && python producer.py ROLLOUT_ID ATTEMPT_ID

Brokers, prefix of the topics and login come from FULGURITE_KAFKA__BOOTSTRAP_SERVERS, __TOPIC_PREFIX,
__SECURITY_PROTOCOL, __SASL_USERNAME and __SASL_PASSWORD, as for Fulgurite's own services. Ends with 0 only when the
brokers have acknowledged every record. All ids follow from the arguments: run again, it counts once all the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.helpers import create_ssl_context

CONNECTION: dict[str, Any] = {
    "bootstrap_servers": os.environ.get("FULGURITE_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:9092"),
    "security_protocol": os.environ.get("FULGURITE_KAFKA__SECURITY_PROTOCOL", "PLAINTEXT"),
    "sasl_plain_username": os.environ.get("FULGURITE_KAFKA__SASL_USERNAME"),
    "sasl_plain_password": os.environ.get("FULGURITE_KAFKA__SASL_PASSWORD"),
    "ssl_context": create_ssl_context(),
}
PREFIX = os.environ.get("FULGURITE_KAFKA__TOPIC_PREFIX", "fulgurite.")
DELIVERY_SECONDS, SERVICE = 30, "producer-python"


def hex_id(text: str, digits: int) -> str:  # the gateway makes trace ids so, too: its LLM calls join this trace
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


async def publish(rollout_id: str, attempt_id: str) -> None:
    attempt = f"{rollout_id}/{attempt_id}"
    root_id = hex_id(f"{attempt}/answer", 16)
    start_ns = time.time_ns()

    def span(name: str, operation: str, **fields: Any) -> str:
        return json.dumps({
            "rollout_id": rollout_id, "attempt_id": attempt_id, "name": name, "operation": operation,
            "trace_id": hex_id(attempt, 32), "span_id": hex_id(f"{attempt}/{name}", 16),
            "start_ns": start_ns, "end_ns": time.time_ns(), "service": SERVICE, **fields,
        })  # fmt: skip

    search = span("search", "execute_tool", parent_span_id=root_id, input='{"q": "fulgurite"}',
                  output='"glass" – made by\nlightning', attributes={"hits": 3})  # fmt: skip
    calculate = span("calculate", "execute_tool", parent_span_id=root_id, input="6*7", output="42")
    reward = json.dumps({"reward_id": f"{attempt_id}-reward", "rollout_id": rollout_id, "attempt_id": attempt_id,
                         "value": 0.75, "dimensions": {"exact": 1.0, "brief": 0.5}, "source": SERVICE})  # fmt: skip

    # The default partitioner is Kafka's murmur2 over the key, as it has to be.
    producer = AIOKafkaProducer(**CONNECTION, acks="all", enable_idempotence=True)
    try:
        async with asyncio.timeout(DELIVERY_SECONDS):
            await producer.start()
            key = rollout_id.encode()
            sent = [
                await producer.send(f"{PREFIX}spans", f"{search}\n{calculate}".encode(), key),  # a line each
                await producer.send(f"{PREFIX}spans", span("answer", "invoke_agent", status="ok").encode(), key),
                await producer.send(f"{PREFIX}rewards", reward.encode(), key),
            ]
            await asyncio.gather(*sent)  # the acknowledgements, or the first error
    finally:
        await asyncio.wait_for(producer.stop(), DELIVERY_SECONDS)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} ROLLOUT_ID ATTEMPT_ID")
    try:
        asyncio.run(publish(*sys.argv[1:]))
    except (KafkaError, TimeoutError) as error:
        sys.exit(f"not delivered: {error!r}")
