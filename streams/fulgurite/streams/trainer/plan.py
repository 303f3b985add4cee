"""What a run is, checked before anything heavy is loaded: settings that cannot work end the process in a second."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.sampling import off_policy
from fulgurite.schemas.settings import Settings, SourceSettings, TrainerSettings
from fulgurite.schemas.topics import TRAJECTORIES
from fulgurite.streams.trainer.imitation import best_count
from fulgurite.streams.trainer.objective import check_objective
from fulgurite.streams.trainer.surroundings import check_surroundings
from fulgurite.streams.trainer.tasks import TaskFunction, load_tasks
from fulgurite.streams.trainer.unused import set_otherwise
from fulgurite.streams.trainer.windows import Shape

MAX_RUN_ID_CHARS = 64
"""Rollout and event ids are made of it and must stay below 128."""


OF_ASKING = (
    "tasks",
    "agent",
    "sampling_parameters",
    "rollout_timeout_seconds",
    "group_deadline_seconds",
    "lost_after_seconds",
    "pacing_staleness",
)
"""Settings of rollouts that a run asks for itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    settings: Settings
    shape: Shape
    tasks: TaskFunction | None
    """None for a replay, and for demonstrations, which ask for nothing."""
    start_model: Path | None

    @property
    def trainer(self) -> TrainerSettings:
        return self.settings.trainer

    @property
    def source(self) -> SourceSettings:
        return self.settings.source

    @property
    def is_replay(self) -> bool:
        return bool(self.source.run_id) or self.source.begin == "sql"

    @property
    def run_id(self) -> str:
        return self.trainer.run_id

    @property
    def sampling_resource(self) -> str:
        """The policy whose sampled tokens are trained on."""
        return self.source.resource or self.trainer.resource

    @property
    def is_own_policy(self) -> bool:
        """Whether it is the one whose versions this run makes: then versions in trajectories are its own."""
        return self.sampling_resource == self.trainer.resource and self.trainer.demonstrations is None

    def config(self) -> dict[str, Any]:
        """The settings that make the run what it is, as they are recorded with it."""
        config: dict[str, Any] = self.trainer.model_dump(mode="json")
        return config | ({"source": self.source.model_dump(mode="json")} if self.is_replay else {})

    @property
    def topic(self) -> str:
        return self.settings.kafka.topic(TRAJECTORIES)

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.trainer.output.resolve() / self.run_id

    @property
    def name(self) -> str:
        """Consumer group and transactional id. The id names the run, and a run's trainer reads all partitions: whoever
        starts the run again fences whoever ran it before."""
        return f"{self.settings.kafka.topic_prefix}trainer.{self.run_id}"

    def changed(self) -> list[str]:
        """What is otherwise than by default, as `section.name = value`."""
        sections: dict[str, TrainerSettings | SourceSettings] = {"trainer": self.trainer, "source": self.source}
        return [
            f"{section}.{name} = {value}"
            for section, settings in sections.items()
            for name, value in settings.model_dump(mode="json", exclude_defaults=True).items()
        ]


def make_plan(settings: Settings) -> Plan:
    """Raises SettingsError for what cannot work."""
    trainer = settings.trainer
    run_id = trainer.run_id
    if not run_id:
        # A name made up here would be another one after every restart: a run from the start model each time.
        raise SettingsError(
            "trainer.run_id is empty: name the run, trainer.run_id = NAME; a restart with the same name goes on where "
            "it stood"
        )
    if len(run_id) > MAX_RUN_ID_CHARS or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_id):
        raise SettingsError(
            f"trainer.run_id = {run_id!r}: at most {MAX_RUN_ID_CHARS} letters, digits, dots, dashes and underscores"
        )
    for fault in off_policy(trainer.sampling_parameters):
        raise SettingsError(
            f"trainer.sampling_parameters: {fault}, otherwise the recorded logprobs are not the policy's and every "
            "rollout would be dropped as partial:sampling"
        )
    check_together(trainer)
    check_source(settings)
    is_replay = bool(settings.source.run_id) or settings.source.begin == "sql"
    if is_replay and (names := list(set_otherwise(trainer, OF_ASKING))):
        others = "".join(f", nor has trainer.{name}" for name in names[1:])
        raise SettingsError(
            f"trainer.{names[0]} has no effect{others}: a run on another one's rollouts asks for none and has no "
            "clock; leave that out, or set it as the source run has it, or as by default"
        )
    shape = Shape(
        run_id=settings.source.run_id or run_id,
        group_size=trainer.group_size,
        groups_per_step=trainer.groups_per_step,
        groups_ahead=(trainer.pacing_staleness + 1) * trainer.groups_per_step,
        max_staleness=trainer.max_staleness,
        group_deadline_seconds=trainer.group_deadline_seconds,
        incomplete=trainer.incomplete,
        fill_reward=trainer.fill_reward,
        overlap_groups=trainer.overlap_groups,
        overlap_seconds=trainer.overlap_seconds,
        replayed=is_replay,
        refill=trainer.zero_variance == "refill",
    )
    if trainer.pacing_staleness > trainer.max_staleness and not is_replay:  # a replay asks for nothing
        raise SettingsError(
            f"trainer.pacing_staleness = {trainer.pacing_staleness} lets rollouts run further ahead than "
            f"trainer.max_staleness = {trainer.max_staleness} lets them be used"
        )
    check_surroundings(trainer)
    asks = not is_replay and trainer.demonstrations is None
    return Plan(settings, shape, load_tasks(trainer.tasks) if asks else None, trainer.model)


def check_together(trainer: TrainerSettings) -> None:
    """Raises SettingsError for settings that cannot go together; its text begins with the one to leave out."""
    check_objective(trainer)
    _check_windows(trainer)


def at_fault(error: SettingsError) -> str:
    """The setting with which an error of `check_together` begins."""
    found = re.match(r"trainer\.(\w+)", str(error))
    return found[1] if found else ""


def check_source(settings: Settings) -> None:
    """Raises SettingsError for what a replay cannot be, and for settings of one that nothing would read."""
    trainer, source = settings.trainer, settings.source
    is_replay = bool(source.run_id) or source.begin == "sql"
    if not is_replay:
        for name in source.model_fields_set - {"run_id"}:
            raise SettingsError(
                f"source.{name} has no effect: source.run_id is empty, so the run asks for its rollouts"
            )
        return
    if trainer.window_seconds is not None:
        raise SettingsError(
            f"trainer.window_seconds = {trainer.window_seconds:g}: a replay has no clock, its windows go by count"
        )
    for name, kind in (("offsets", "offset"), ("time", "time"), ("sql", "sql")):
        given = bool(getattr(source, name))
        if given != (source.begin == kind):
            wrong = "is empty, but" if source.begin == kind else "has no effect:"
            raise SettingsError(f"source.{name} {wrong} source.begin is {source.begin}")
    if trainer.demonstrations is not None:
        raise SettingsError("trainer.demonstrations and source.run_id or source.sql: a run learns from one of them")
    if source.run_id == trainer.run_id:
        raise SettingsError(
            f"trainer.run_id = {trainer.run_id} is the source run itself: give this run a name of its own"
        )
    if not source.resource and not source.run_id:
        raise SettingsError(
            "source.resource is empty: say whose sampled tokens source.sql selects, or set source.run_id"
        )


def _rollouts_of_a_window(trainer: TrainerSettings) -> int:
    """The most that are trained on."""
    if trainer.demonstrations is not None:
        return trainer.groups_per_step
    each = trainer.group_size if trainer.loss != "sft" else best_count(trainer.best_share, trainer.group_size)
    return (trainer.groups_per_step + trainer.overlap_groups) * each


def _check_windows(trainer: TrainerSettings) -> None:
    """Raises SettingsError for settings of windows that nothing would read, or that could never act."""
    if trainer.fill_reward and trainer.incomplete != "fill":
        raise SettingsError(
            f"trainer.fill_reward = {trainer.fill_reward:g}: trainer.incomplete = {trainer.incomplete} fills nothing in"
        )
    if trainer.zero_variance == "refill" and trainer.credit == "call":
        raise SettingsError(
            "trainer.zero_variance = refill and trainer.credit = call: whether a group teaches anything its calls' "
            "rewards say then, not those of its rollouts; set drop or keep"
        )
    if trainer.zero_variance == "refill" and trainer.best_threshold is not None:
        raise SettingsError(
            "trainer.zero_variance = refill and trainer.best_threshold: a group whose rewards all reach it teaches, "
            "too; set drop or keep"
        )
    if trainer.incomplete == "fill" and trainer.loss == "sft" and trainer.demonstrations is None:
        raise SettingsError(
            "trainer.incomplete = fill and trainer.loss = sft: the best of a group could be one that has no tokens; "
            "set mask or drop"
        )
    if trainer.minibatches > (most := _rollouts_of_a_window(trainer)):
        raise SettingsError(
            f"trainer.minibatches = {trainer.minibatches}: a window has {most} rollouts to be trained on, an update "
            "needs one at least"
        )
    if trainer.kl_in_reward and trainer.incomplete == "fill":
        raise SettingsError(
            "trainer.kl_in_reward and trainer.incomplete = fill: the penalty is taken from rewards, and then they are "
            "compared without members that have no tokens; set mask or drop"
        )
    if trainer.overlap_seconds is not None and not trainer.overlap_groups:
        raise SettingsError(
            f"trainer.overlap_seconds = {trainer.overlap_seconds:g}: trainer.overlap_groups is 0, windows do not "
            "slide; set the most groups that a window may have again"
        )
    if trainer.overlap_groups and not trainer.max_staleness:
        raise SettingsError(
            f"trainer.overlap_groups = {trainer.overlap_groups}: with trainer.max_staleness = 0 no group could be in a "
            "second window"
        )
    if trainer.overlap_groups and trainer.loss == "sft" and trainer.demonstrations is None:
        raise SettingsError(
            f"trainer.overlap_groups = {trainer.overlap_groups}: trainer.loss = sft learns the best of a group, and in "
            "a later window, without members that are too old by then, they could be others; leave it out"
        )
