"""A step's record, its line in the log, its figures for Prometheus: what came in, what came out, what it took."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

from fulgurite.schemas.ids import now_ns
from fulgurite.schemas.training import RunFinished, TrainingStep
from fulgurite.streams.learners.launch import launched_ranks
from fulgurite.streams.objectives.advantages import mean_and_std
from fulgurite.streams.trainer.checkpoints import Checkpoint
from fulgurite.streams.trainer.metrics import Metrics
from fulgurite.streams.trainer.plan import Plan
from fulgurite.streams.trainer.samples import TrainingSet
from fulgurite.streams.trainer.window_metrics import staleness, window_metrics
from fulgurite.streams.trainer.windows import Window, Windows

if TYPE_CHECKING:
    from fulgurite.streams.learners.learner import StepResult

logger = logging.getLogger(__name__)


class Progress:
    """Clocks of the step under way, and of all steps of this process, for the time that is left."""

    def __init__(self, steps: int, steps_before: int, metrics: Metrics) -> None:
        self._steps = steps
        self._steps_before = steps_before
        self._started = time.monotonic()
        self._marks: list[float] = []
        self._last_event = 0.0
        """When the record of the step before was made; 0: of none in this process."""
        self._window_start_ns = 0
        self._metrics = metrics

    def ready(self, version: int) -> None:
        """The run's first version is committed, or it goes on from this one."""
        self._metrics.stands(self._steps_before, version, self._steps)

    def begin(self) -> None:
        self._marks = [time.monotonic()]
        self._window_start_ns = now_ns()
        self._metrics.waits()

    def filled(self) -> None:
        self._marks.append(time.monotonic())
        self._metrics.filled()

    def optimized(self) -> None:
        self._marks.append(time.monotonic())

    def event(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        window: Window,
        training: TrainingSet,
        result: StepResult | None,
        windows: Windows,
    ) -> TrainingStep:
        state = checkpoint.state
        reward_mean, reward_std = mean_and_std(training.rewards)
        behind_mean, behind_max = staleness(training, window)
        began, filled, optimized = self._marks
        # The record is in the transaction that ends its step: how long that took only the next one can say. So a step
        # goes from record to record, and steps add up to the time that they took.
        now, before = time.monotonic(), self._last_event or began
        self._last_event = now
        taken = max(now - before, 1e-9)
        metrics = {
            **window_metrics(window, training, plan.sampling_resource, plan.trainer.agents),
            **(result.metrics if result else {}),
            "rollouts/late": float(windows.late),
            "rollouts/duplicate": float(windows.duplicates),
            "timing_s/publish": began - before,
            "timing_s/wait": filled - began,
            "timing_s/update_actor": optimized - filled,
            "timing_s/checkpoint": now - optimized,
            "timing_s/step": taken,
            # As verl counts: prompts too, over the whole step, for each rank.
            "perf/throughput": sum(len(sample.token_ids) for sample in training.samples) / taken / launched_ranks(),
            "perf/trained_tok_s": (result.tokens if result else 0) / taken,
            "perf/wait_share": (filled - began) / taken,
        }
        windows.late = windows.duplicates = 0
        return TrainingStep(
            event_id=f"{plan.run_id}-step{state.step}",
            run_id=plan.run_id,
            step=state.step,
            resource=state.resource,
            version_in=window.version_in,
            version_out=state.version,
            rollout_ids=training.rollout_ids,
            again=training.again,
            dropped=training.dropped,
            groups=training.groups,
            tokens=result.tokens if result else 0,
            reward_mean=reward_mean,
            reward_std=reward_std,
            loss=result.loss if result else 0.0,
            grad_norm=result.grad_norm if result else 0.0,
            staleness_mean=behind_mean,
            staleness_max=behind_max,
            window_start_ns=self._window_start_ns,
            window_end_ns=now_ns(),
            offsets={str(partition): offset for partition, offset in state.offsets.items()},
            metrics=metrics,
        )

    def report(self, event: TrainingStep) -> None:
        """One line a step, after it is committed; and what Prometheus is told."""
        self._metrics.stepped(event)
        began, filled, optimized = self._marks
        now = time.monotonic()
        per_step = (now - self._started) / max(1, event.step - self._steps_before)
        logger.info(
            "step %d/%d version %d | reward %.3f | loss %+.4f | %d rollouts trained, %.0f dropped | staleness %.2f, "
            "at most %d | wait %.1f s (%.0f %%), train %.1f s, publish %.1f s | %.0f tokens/s | %s left",
            event.step, self._steps, event.version_out, event.reward_mean, event.loss, len(event.rollout_ids),
            event.metrics["rollouts/dropped"], event.staleness_mean, event.staleness_max, filled - began,
            100 * (filled - began) / (now - began), optimized - filled, now - optimized,
            event.metrics["perf/throughput"], _duration(per_step * (self._steps - event.step)),
        )  # fmt: skip

    def finished(self, event: RunFinished) -> None:
        """The run is over: nothing is waited for any more."""
        self._metrics.filled()
        self._metrics.dropped(event.dropped)


def waiting_for(windows: Windows) -> str:
    """What a window still lacks."""
    closed = sum(group.closed for group in windows.groups.values())
    missing = len(windows.outstanding())
    text = f"waiting: {closed} of {windows.shape.groups_per_step} groups complete, {missing} rollouts on their way"
    if reasons := why_dropped(windows):
        text += f", dropped since the last step: {reasons}"
    return text


def why_dropped(windows: Windows) -> str:
    """The commonest reasons since the last step, of rollouts named already, too; empty where nothing was dropped."""
    reasons = Counter(windows.named)
    reasons.update(dropped.reason.partition(":")[0] for dropped in windows.dropped)
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(4))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
