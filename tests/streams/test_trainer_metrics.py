"""What Prometheus is told of a trainer: every figure of a step, progress, counters; served while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from fulgurite.producers.service import bind
from fulgurite.schemas.errors import StartError
from fulgurite.schemas.settings import KafkaSettings, Settings, TrainerSettings
from fulgurite.schemas.training import DroppedRollout, TrainingStep
from fulgurite.schemas.trajectories import Trajectory
from fulgurite.streams.trainer import serve
from fulgurite.streams.trainer.metrics import Metrics, legal_name
from tests.streams.trainer_world import World, build_model, training_events

SETTINGS = TrainerSettings(run_id="run", steps=7)
OF_RUN = {"run_id": "run", "resource": "policy"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def step(number: int, metrics: dict[str, float], dropped: tuple[str, ...] = ()) -> TrainingStep:
    return TrainingStep(
        run_id="run",
        step=number,
        resource="policy",
        version_in=number,
        version_out=number + 1,
        rollout_ids=["a", "b"],
        dropped=[DroppedRollout(rollout_id=f"d{index}", reason=reason) for index, reason in enumerate(dropped)],
        loss=0.25,
        metrics=metrics,
    )


def values(text: str) -> dict[str, float]:
    """Every series of ours; a reason is part of its name here."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert {name: sample.labels[name] for name in OF_RUN} == OF_RUN
            name = sample.name + "".join(f" {sample.labels[key]}" for key in ("reason",) if key in sample.labels)
            assert name not in found
            found[name] = sample.value
    return found


def test_every_metric_of_a_step_is_a_gauge_of_its_name() -> None:
    metrics = Metrics(SETTINGS)
    metrics.stands(0, 1, 7)
    assert values(generate_latest(metrics.registry).decode()) == {
        "fulgurite_trainer_step": 0,
        "fulgurite_trainer_planned_steps": 7,
        "fulgurite_trainer_version": 1,
        "fulgurite_trainer_steps_total": 0,
        "fulgurite_trainer_trained_rollouts_total": 0,
        "fulgurite_trainer_waited_seconds_total": 0,
    }
    metrics.stepped(step(1, {"actor/entropy": 1.5, "rollouts/dropped/partial:x": 1.0}, ("stale", "grad_norm:9, more")))
    metrics.stepped(step(2, {"actor/entropy": 0.5, "timing_s/step": 3.0}, ("stale",)))
    found = values(generate_latest(metrics.registry).decode())
    assert found["fulgurite_trainer_actor_entropy"] == 0.5
    assert found["fulgurite_trainer_timing_s_step"] == 3.0
    assert found["fulgurite_trainer_actor_loss"] == 0.25
    assert not [name for name in found if "partial" in name], "the last step has none"
    assert (found["fulgurite_trainer_step"], found["fulgurite_trainer_version"]) == (2, 3)
    assert found["fulgurite_trainer_steps_total"] == 2
    assert found["fulgurite_trainer_trained_rollouts_total"] == 4
    assert found["fulgurite_trainer_dropped_rollouts_total stale"] == 2
    assert found["fulgurite_trainer_dropped_rollouts_total grad_norm"] == 1
    assert found["fulgurite_trainer_last_step_timestamp_seconds"] > 1e9


def test_names_that_prometheus_has_not_break_nothing() -> None:
    assert legal_name("critic/score/mean") == "fulgurite_trainer_critic_score_mean"
    assert legal_name("rollouts/dropped/partial:sampling,no reward") == (
        "fulgurite_trainer_rollouts_dropped_partial_sampling_no_reward"
    )
    metrics = Metrics(SETTINGS)
    metrics.stepped(step(1, {"a/b": 1.0, "a_b": 2.0, "step": 99.0, "rollouts/trained": 2.0, "é:!": 4.0}))
    for text in (generate_latest(metrics.registry), generate_openmetrics(metrics.registry)):
        names = re.findall(r"^# TYPE (\S+)", text.decode(), re.MULTILINE)
        assert len(names) == len(set(names))
    families = {family.name: family for family in parse_openmetrics(generate_openmetrics(metrics.registry).decode())}
    assert families["fulgurite_trainer_step"].samples[0].value == 1


async def test_time_waited_is_counted_while_it_passes() -> None:
    metrics = Metrics(SETTINGS)

    def waited() -> float:
        return values(generate_latest(metrics.registry).decode())["fulgurite_trainer_waited_seconds_total"]

    metrics.waits()
    await asyncio.sleep(0.05)
    first = waited()
    assert first >= 0.05
    metrics.filled()
    still = waited()
    await asyncio.sleep(0.05)
    assert first <= still == waited()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny") / "model")


def configured(kafka: KafkaSettings, model: Path, folder: Path, port: int) -> Settings:
    trainer = TrainerSettings(
        run_id="run",
        model=model,
        output=folder / "policy",
        tasks="tests.streams.trainer_world:bandit",
        steps=3,
        groups_per_step=2,
        group_size=4,
        pacing_staleness=0,
        metrics_port=port,
    )
    return Settings(kafka=kafka, trainer=trainer)


async def scraped(http: httpx.AsyncClient, steps: int) -> dict[str, float]:
    """What is served once so many steps are done."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(httpx.TransportError):
                found = values((await http.get("/metrics/")).text)
                if found["fulgurite_trainer_step"] == steps:
                    return found
            await asyncio.sleep(0.1)


async def test_a_running_trainer_serves_its_last_step_until_it_is_stopped(
    kafka_settings: KafkaSettings, tiny_model: Path, tmp_path: Path
) -> None:
    def alter(trajectory: Trajectory) -> Trajectory | None:
        """Nobody answers for the third step."""
        return None if trajectory.group_id in ("run-g4", "run-g5") else trajectory

    stop, port = asyncio.Event(), free_port()
    async with (
        World(kafka_settings, alter).running(),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        training = asyncio.create_task(serve(configured(kafka_settings, tiny_model, tmp_path, port), stop))
        try:
            found = await scraped(http, 2)
            later = await scraped(http, 2)
            assert (await http.get("/health")).text == "ok"
        finally:
            stop.set()
            async with asyncio.timeout(30):
                await training
    with bind("trainer metrics", "127.0.0.1", port):
        pass  # the port is free again
    last = [event for event in await training_events(kafka_settings, "run") if isinstance(event, TrainingStep)][-1]
    assert len(last.metrics) > 20
    assert {name: found[legal_name(name)] for name in last.metrics} == last.metrics
    assert found["fulgurite_trainer_version"] == last.version_out
    assert found["fulgurite_trainer_planned_steps"] == 3
    assert later["fulgurite_trainer_waited_seconds_total"] > found["fulgurite_trainer_waited_seconds_total"]


async def test_a_taken_port_ends_the_trainer_before_it_begins(
    kafka_settings: KafkaSettings, tiny_model: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = configured(kafka_settings, tiny_model, tmp_path, taken.getsockname()[1])
        async with asyncio.timeout(30):
            with pytest.raises(StartError, match=r"trainer metrics cannot listen .*\(set trainer\.metrics_port\)"):
                await serve(settings, asyncio.Event())
    assert await training_events(kafka_settings, "run") == []
