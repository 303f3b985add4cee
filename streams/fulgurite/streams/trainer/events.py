"""What the trainer says on the bus: its events, and a step's metrics under the names that verl and TRL users know."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError

from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import Topic
from fulgurite.schemas.training import RunStarted
from fulgurite.streams.objectives.advantages import spread
from fulgurite.streams.trainer.checkpoints import Checkpoint
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.samples import ADAPTER_CONFIG, TrainingSet, trained_sequences
from fulgurite.streams.trainer.windows import FILLED, Window
from fulgurite.streams.transactions import Outgoing


class Marker(BaseModel):
    """Stands beside the committed offsets, as their metadata; the only word of groups asked for since the version."""

    version: int
    step: int
    asked: int
    buried: int = 0
    """Dead letters of this partition's records below this offset are on the log; 0: they go with the offsets."""

    @classmethod
    def parse(cls, metadata: str) -> Marker | None:
        try:
            return cls.model_validate_json(metadata)
        except ValidationError:
            return None  # Kafka forgot it, or none was ever written


def outgoing(settings: KafkaSettings, topic: Topic, key: str, event: BaseModel) -> Outgoing:
    return Outgoing(settings.topic(topic), encode_key(key), encode(event, settings.max_record_bytes))


def version_event_id(run_id: str, version: int) -> str:
    return f"{run_id}-v{version}"


def version_event(checkpoint: Checkpoint, model: str) -> ResourceVersion:
    state = checkpoint.state
    return ResourceVersion(
        event_id=version_event_id(state.run_id, state.version),
        resource=state.resource,
        version=state.version,
        kind="lora" if (checkpoint.weights / ADAPTER_CONFIG).is_file() else "weights",
        uri=checkpoint.uri,
        sha256=state.sha256,
        run_id=state.run_id,
        step=state.step,
        model=model,
    )


def started_event(plan: Plan, step: int, version: int) -> RunStarted:
    return RunStarted(
        run_id=plan.run_id,
        step=step,
        resource=plan.trainer.resource,
        version=version,
        steps_total=plan.trainer.steps,
        config=plan.config(),
    )


def staleness(training: TrainingSet, window: Window) -> tuple[float, int]:
    """Versions behind, over the tokens trained on: mean and largest."""
    behind = [
        window.measured_at.get(sample.rollout_id, window.version_in) - version
        for sample in training.samples
        for version, sampled in zip(sample.versions, sample.loss_mask, strict=True)
        if sampled
    ]
    return (math.fsum(behind) / len(behind), max(0, *behind)) if behind else (0.0, 0)


def window_metrics(
    window: Window, training: TrainingSet, resource: str, agents: Sequence[str] = ()
) -> dict[str, float]:
    """Lengths are of what the resource's policy sampled for these agents: see trained_sequences."""
    members = [member for group in window.groups for member in group if member.reason != FILLED]
    sequences = [trained_sequences(member.trajectory, resource, agents) for member in members]
    lengths = [float(sum(sum(sequence.loss_mask) for sequence in own)) for own in sequences]
    prompts = [float(sequence.loss_mask.index(1)) for own in sequences for sequence in own]
    found = {
        **spread("critic/score", training.rewards),
        **spread("critic/rewards", [sum(both) for both in zip(training.rewards, training.penalties, strict=True)]),
        **spread("critic/advantages", [value for each in training.samples for value in each.sampled_advantages()]),
        **spread("response_length", lengths),
        **spread("prompt_length", prompts),
        **spread("num_turns", [float(member.trajectory.calls) for member in members]),
        "frac_reward_zero_std": training.groups_without_signal / max(1, training.groups),
        "groups/incomplete": float(window.groups_incomplete),
        "rollouts/trained": float(len(training.rollout_ids)),
        "rollouts/trained_again": float(len(training.again)),
        "rollouts/filled": float(sum(member.reason == FILLED for group in window.groups for member in group)),
        "rollouts/dropped": float(len(training.dropped)),
    }
    for dropped in training.dropped:
        name = f"rollouts/dropped/{dropped.reason.partition(':')[0]}"
        found[name] = found.get(name, 0.0) + 1.0
    return found
