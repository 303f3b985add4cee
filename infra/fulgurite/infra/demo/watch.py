"""Watches a run: asks ClickHouse and Kafka every two seconds, in a thread of its own, and keeps the newest Figures.

Promises: a store that is away (the demo's user may kill it) only makes the figures old. Does not draw.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from copy import copy
from typing import Any

from aiokafka.errors import KafkaError
from clickhouse_connect.driver import Client
from clickhouse_connect.driver.exceptions import Error as ClickHouseError

from fulgurite.infra.demo import questions
from fulgurite.infra.demo.screen import Figures
from fulgurite.infra.lag import consumer_lag
from fulgurite.infra.sql import connect
from fulgurite.schemas.errors import FulguriteError
from fulgurite.schemas.settings import Settings
from fulgurite.schemas.topics import REWARDS, SPANS

EVERY_SECONDS = 2.0
_ASK_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Watcher:
    """Use as a context manager. `follow()` says whose figures are asked for; `figures()` gives a copy."""

    def __init__(self, settings: Settings, run_id: str, resource: str, started_ns: int) -> None:
        self._settings = settings
        self._run_id = run_id
        self._resource = resource
        self._since_ns = started_ns
        """When the servers were started: what was applied before says nothing about them."""
        self.mode = "val"
        self.prefix = ""
        """Counts the ended rollouts whose id begins with it."""
        self._figures = Figures()
        self.ended = 0
        self.newest_is_served = False
        self.rows_missing = 1
        """Spans and rewards on the log that are not rows yet."""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=_ASK_SECONDS)

    def follow(self, mode: str, prefix: str) -> None:
        """From now on rollouts of this mode; those whose id begins with `prefix` are counted, from none on."""
        with self._lock:
            self.mode, self.prefix, self.ended = mode, prefix, 0

    def figures(self) -> Figures:
        with self._lock:
            return copy(self._figures)

    def _watch(self) -> None:
        with asyncio.Runner() as runner:
            while not self._stop.is_set():
                try:
                    with connect(self._settings.clickhouse) as client:
                        while not self._stop.wait(EVERY_SECONDS):
                            self._ask(client)
                            self._ask_lag(runner)
                except (ClickHouseError, OSError) as error:
                    logger.info("ClickHouse does not answer: %s", error)
                    self._stop.wait(EVERY_SECONDS)

    def _ask_lag(self, runner: asyncio.Runner) -> None:
        try:
            found = runner.run(asyncio.wait_for(consumer_lag(self._settings.kafka), _ASK_SECONDS))
        except (KafkaError, FulguriteError, OSError, TimeoutError) as error:
            logger.info("Kafka does not answer: %s", error)
            return
        names = self._settings.kafka
        wanted = {name: name for name in ("coordinator", "assembler", self._settings.materialiser.group)}
        if self.mode == "train":
            wanted |= {f"trainer.{self._run_id}": "trainer"}
        ours = {group.removeprefix(names.topic_prefix): topics for group, topics in found.items()}
        by_group = {shown: ours[group] for group, shown in wanted.items() if group in ours}
        written = by_group.get(self._settings.materialiser.group, {})
        with self._lock:
            self._figures.lag = {group: sum(topics.values()) for group, topics in by_group.items()}
            self.rows_missing = sum(written.get(names.topic(topic), 1) for topic in (SPANS, REWARDS))

    def _ask(self, client: Client) -> None:
        with self._lock:
            mode, prefix = self.mode, self.prefix
        run: dict[str, Any] = {"run_id": self._run_id, "mode": mode}
        steps = client.query(questions.LAST_STEPS, run).result_rows
        rates = client.query(questions.RATES, run).result_rows
        tool_use = client.query(questions.TOOL_USE, run).result_rows
        dead = client.query(questions.DEAD_LETTERS, {}).result_rows
        served = client.query(questions.SERVED, {"resource": self._resource, "since_ns": self._since_ns}).result_rows
        ended = client.query(questions.ENDED, {"run_id": self._run_id, "prefix": prefix}).result_rows
        with self._lock:
            figures = self._figures
            if steps:
                step, version, reward, mean, most = steps[-1]
                figures.step, figures.version, figures.reward = int(step), int(version), float(reward)
                figures.staleness_mean, figures.staleness_max = float(mean), int(most)
                figures.curve = [float(row[2]) for row in steps]
            figures.rollouts_per_second = float(rates[0][0])
            used = tool_use[0][0]
            figures.tool_use = float(used) if used is not None and used == used else None
            figures.dead_letters = int(dead[0][0])
            figures.served_version = int(served[0][0]) or None
            self.newest_is_served = figures.served_version is not None and served[0][0] == served[0][1]
            if prefix == self.prefix:  # else these are others, and are counted next time
                self.ended = int(ended[0][0])
