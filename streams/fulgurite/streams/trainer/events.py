"""What the trainer says on the bus: its events, and the word that stands beside committed offsets."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from fulgurite.schemas.codec import encode, encode_key
from fulgurite.schemas.resources import ResourceVersion
from fulgurite.schemas.settings import KafkaSettings
from fulgurite.schemas.topics import Topic
from fulgurite.schemas.training import RunStarted
from fulgurite.streams.trainer.checkpoints import Checkpoint
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.samples import ADAPTER_CONFIG
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


def started_event(plan: Plan, step: int, version: int, lineage: str) -> RunStarted:
    return RunStarted(
        run_id=plan.run_id,
        step=step,
        resource=plan.trainer.resource,
        version=version,
        steps_total=plan.trainer.steps,
        lineage=lineage,
        config=plan.config(),
    )
