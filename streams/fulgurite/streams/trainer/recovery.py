"""Where a run stands: begun anew, gone on with, or over. The log decides, the checkpoint supplies.

What a crash left, and what is done about it (numbers as in `service.py`):
- before 3: nothing on disk. The last committed version's checkpoint is loaded and its offsets are read again.
- between 3 and 5: a checkpoint newer than the last committed version. Nobody was told of it; it is removed
  (`leftovers.py`), then as above.
- after 5: the newest checkpoint is the committed one.

A predecessor that only slept (in 4 or 5, or cut off from the network) may wake up while its successor loads the model:
by then the offsets carry the successor's stamp, so it neither commits nor fences. A start that sleeps in here may be
such a predecessor itself when it wakes up, and the log that it has read, history. So before it removes or refuses
anything, and where the committed version is not there as it was written, it confirms that it owns the run, and ends
fenced where it does not.

A log that does not know the run, or is more than one version behind the folder, or on which the run has other offsets
than those that the folder was written with (`Transactions.lineage`), is not what a crash leaves (another broker or
prefix, wiped topics): then nothing is removed, and the start is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiokafka.structs import OffsetAndMetadata, TopicPartition

from fulgurite.schemas.errors import FulguriteError, SettingsError
from fulgurite.schemas.ids import now_ns
from fulgurite.streams.learners.launch import launched_ranks
from fulgurite.streams.trainer.checkpoints import OPTIMIZER, Checkpoint, Checkpoints, SourceState
from fulgurite.streams.trainer.demonstrations import prepare
from fulgurite.streams.trainer.events import Marker
from fulgurite.streams.trainer.ledger import restore
from fulgurite.streams.trainer.leftovers import Leftovers
from fulgurite.streams.trainer.log import committed_run
from fulgurite.streams.trainer.ownership import Ownership
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.reader import TrajectoryReader
from fulgurite.streams.trainer.samples import ModelLimits, read_limits
from fulgurite.streams.trainer.selection import select
from fulgurite.streams.trainer.windows import Windows
from fulgurite.streams.transactions import Transactions

if TYPE_CHECKING:
    from fulgurite.streams.learners.ranks import AnyLearner

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """A run in memory. Everything but the learner's tensors is also in its last checkpoint."""

    version: int
    """The newest committed version; for a new run the one its first transaction will make."""
    step: int
    windows: Windows
    learner: AnyLearner
    limits: ModelLimits
    companions: Path
    """Where tokenizer and chat template are copied from: the start model, or the last version."""
    committed_offsets: dict[int, int]
    """As of `version`: what a transaction that makes no version repeats."""
    is_new: bool
    weights_since: int
    """The first version with the weights of `version`."""
    weights_sha256: str = ""
    """Of the files of `version`; empty before the first one is made."""
    is_mismatched: bool = False
    """Trainer and sampler disagreed when they could last be compared."""
    reference_sha256: str = ""
    """Of what a KL penalty compares with, since the first start that had one."""
    source: SourceState | None = None
    """How far a replay that goes on has read its source; None for other runs."""
    kept: str = ""
    """The file that it trains on, where it is a selection or demonstrations."""
    buried: dict[int, int] = field(default_factory=dict[int, int])
    """By partition: below which offset dead letters are on the log, since `version`."""

    def stands_at(self, checkpoint: Checkpoint) -> None:
        """Its version is committed."""
        state = checkpoint.state
        self.version, self.step = state.version, state.step
        self.weights_since = state.same_weights_since
        self.weights_sha256 = state.sha256
        self.committed_offsets = dict(state.offsets)
        self.companions = checkpoint.weights
        self.buried = {}

    def marker(self) -> Marker:
        return Marker(version=self.version, step=self.step, asked=self.windows.asked)


async def recover(
    plan: Plan,
    transactions: Transactions,
    reader: TrajectoryReader,
    checkpoints: Checkpoints,
    ownership: Ownership,
) -> Run | None:
    """None for a run that is over. Both clients have been started: a predecessor is fenced, and with the claim it stays
    so, whenever it wakes up; so the log is final, and what lies on disk beyond it is nobody's, up to the moment when
    a successor starts."""
    before = await transactions.claim(reader.partitions)
    committed = await committed_run(plan.settings.kafka, plan.run_id)
    if committed is None:
        found = checkpoints.uncommitted(None, {transactions.lineage}, begun=bool(_markers(before)))
        await _remove(found, transactions)
        return await _begin(plan, reader, checkpoints, ownership)
    if committed.resource != plan.trainer.resource:
        raise SettingsError(
            f"trainer.resource = {plan.trainer.resource!r}, but what the log knows as run {plan.run_id} makes versions "
            f"of {committed.resource!r}; set it back, or trainer.run_id to a new name"
        )
    lineages = None if committed.lineages is None else committed.lineages | {transactions.lineage}
    if committed.finished:
        # A start that slept until it was over may have written one more, of the model that the run began with.
        await _remove(checkpoints.uncommitted(committed.version, lineages), transactions)
        logger.info(
            "run %s is over: %d steps, version %d; nothing to do (set trainer.run_id to a new name for a new run)",
            plan.run_id, committed.step, committed.version,
        )  # fmt: skip
        return None
    _check_unchanged(plan, checkpoints.settings(committed.version))
    await ownership.check()
    await _remove(checkpoints.uncommitted(committed.version, lineages), transactions)
    async with _or_fenced(transactions):
        checkpoint = checkpoints.load(committed.version, lineages)
        state = checkpoint.state
        windows = checkpoints.windows(checkpoint, plan.shape, now_ns())
        markers = _markers(before)
        windows.asked = max([windows.asked, *(marker.asked for marker in markers.values())])
        restore(windows, committed.named, by_rollout=plan.source.begin == "sql")
        windows.choice = checkpoints.choice(committed.version)
        limits = await _limits(plan, checkpoint.weights)
        learner = await _load(plan, checkpoint.weights, checkpoint.folder / OPTIMIZER)
    reference_sha256 = await asyncio.to_thread(learner.reference_sha256)
    _check_reference(plan, state.reference_sha256, reference_sha256)
    await reader.seek(state.offsets)
    logger.info("run %s goes on at step %d, version %d", plan.run_id, committed.step, committed.version)
    return Run(
        version=committed.version,
        step=committed.step,
        windows=windows,
        learner=learner,
        limits=limits,
        companions=checkpoint.weights,
        committed_offsets=dict(state.offsets),
        is_new=False,
        weights_since=state.same_weights_since,
        weights_sha256=state.sha256,
        is_mismatched=state.is_mismatched,
        reference_sha256=state.reference_sha256 or reference_sha256,
        source=state.source,
        kept=state.kept,
        buried={number: each.buried for number, each in markers.items() if each.version == committed.version},
    )


async def _remove(found: Leftovers, transactions: Transactions) -> None:
    """What a predecessor left. Raises Fenced where it may be a successor's, StartError where it is another log's."""
    with contextlib.closing(found):
        if not found:
            return
        await transactions.confirm()
        for path in found.remove():
            logger.info("removed %s: written, but never committed", path)


@contextlib.asynccontextmanager
async def _or_fenced(transactions: Transactions) -> AsyncGenerator[None]:
    """What goes wrong in here is said as Fenced where there is a successor: it removes what it needs no more."""
    try:
        yield
    except (FulguriteError, OSError):
        await transactions.confirm()
        raise


def _markers(before: Mapping[TopicPartition, OffsetAndMetadata | None]) -> dict[int, Marker]:
    """By partition, where there is one."""
    parsed = {tp.partition: Marker.parse(at.metadata) for tp, at in before.items() if at is not None}
    return {number: marker for number, marker in parsed.items() if marker}


def _check_unchanged(plan: Plan, before: Mapping[str, Any]) -> None:
    """Raises SettingsError for what a run cannot change on its way: its ledger's names are made of it."""
    now = plan.config()
    if before.get("group_size", now["group_size"]) != now["group_size"]:
        raise SettingsError(
            f"trainer.group_size = {now['group_size']}, but run {plan.run_id} began with {before['group_size']}: "
            "groups are on their way; set it back, or trainer.run_id to a new name"
        )
    if before.get("agents", now["agents"]) != now["agents"]:
        raise SettingsError(
            f"trainer.agents = {now['agents']}, but run {plan.run_id} began with {before['agents']}: rollouts on their "
            "way were judged by it; set it back, or trainer.run_id to a new name and trainer.model to a version's "
            "weights/"
        )
    if plan.trainer.demonstrations is not None:
        for name in ("groups_per_step", "seed"):
            if before.get(name, now[name]) != now[name]:
                raise SettingsError(
                    f"trainer.{name} = {now[name]}, but run {plan.run_id} began with {before[name]}: which "
                    "demonstrations a step takes follows from it; set it back, or trainer.run_id to a new name"
                )
    theirs, ours = before.get("source", {}), now.get("source", {})
    for name in sorted(theirs if theirs else ours):
        if theirs.get(name) != ours.get(name) and name != "follow":
            raise SettingsError(
                f"source.{name} = {ours.get(name)}, but run {plan.run_id} began with {theirs.get(name)}: offsets and "
                "groups of another source mean nothing here; set it back, or trainer.run_id to a new name"
            )


def _check_reference(plan: Plan, before: str, now: str) -> None:
    """Raises SettingsError where a KL penalty would compare with another policy from here on."""
    if not before or not now or before == now:
        return
    trainer = plan.trainer
    name, folder = ("reference", trainer.reference) if trainer.reference else ("model", trainer.model)
    raise SettingsError(
        f"trainer.{name} = {folder} is the reference of the KL penalty, and its weights have sha256 {now}; those that "
        f"run {plan.run_id} began with have {before}: set trainer.reference to the folder that has them, wherever it "
        "lies now; or, for another reference, trainer.run_id to a new name and trainer.model to a version's weights/"
    )


async def _begin(plan: Plan, reader: TrajectoryReader, checkpoints: Checkpoints, ownership: Ownership) -> Run:
    if plan.start_model is None:
        raise SettingsError("trainer.model is empty: name the folder of the model to start from (Hugging Face format)")
    if not await asyncio.to_thread((plan.start_model / "config.json").is_file):
        raise SettingsError(f"trainer.model = {plan.start_model}: no model there (a folder with config.json is needed)")
    limits = await _limits(plan, plan.start_model)
    kept = ""
    if plan.source.begin == "sql":
        kept = await asyncio.to_thread(select, plan, await reader.first_offsets())
    if plan.trainer.demonstrations is not None:
        kept = await asyncio.to_thread(prepare, plan)
    learner = await _load(plan, plan.start_model, None)
    newest = await ownership.take_over()
    if plan.is_replay:
        await reader.seek_to_begin(plan.source)
    else:
        await reader.seek_to_end()
    logger.info("run %s begins with %s as version %d", plan.run_id, plan.start_model, newest + 1)
    return Run(
        version=newest + 1,
        step=0,
        windows=Windows(plan.shape),
        learner=learner,
        limits=limits,
        companions=plan.start_model,
        committed_offsets=dict(reader.offsets),
        is_new=True,
        weights_since=newest + 1,
        reference_sha256=await asyncio.to_thread(learner.reference_sha256),
        kept=kept,
    )


async def _limits(plan: Plan, weights: Path) -> ModelLimits:
    """Before the model is loaded: one that cannot be trained is refused in seconds."""
    # An adapter's folder has no config of a model.
    model = plan.start_model if plan.start_model and plan.trainer.lora_rank else weights
    return await asyncio.to_thread(read_limits, model)


async def _load(plan: Plan, folder: Path, state: Path | None) -> AnyLearner:
    # Here and not at the top: torch and transformers take seconds, and settings are checked before.
    def load() -> AnyLearner:
        if launched_ranks() > 1:
            from fulgurite.streams.learners.ranks import Lead

            return Lead(folder, plan.trainer, state)
        from fulgurite.streams.learners.learner import load_learner

        return load_learner(folder, plan.trainer, state)

    return await asyncio.to_thread(load)
