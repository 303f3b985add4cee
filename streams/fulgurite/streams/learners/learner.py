"""The learner: the optimizer steps of a window, on whatever engine, one process or many.

    samples ─► update_plan: whose update ─► plan: my micro-batches ─► score ─► loss ─► backward … ─► update     again
                        └─► several updates: every token scored once before the first of them (the proximal policy)

One update is the default. With more (trainer.epochs, trainer.minibatches) the window is first looked at as a whole,
without a gradient: what forbids a step is found before anything is changed, and ratios are against, or weights of, the
policy at the window's beginning (decoupled PPO, see trainer/losses.py).

Promises: the same files, settings, samples and ranks give the same weights, bit for bit (on a CPU); nothing is changed
when a step is skipped, or raises before its first update, and it does so on every rank or on none; of several updates
one that is refused is left out, and the result names the rollouts that none was made of. Does not know Kafka, windows
or versions on disk; knows the number of the version it trains only to compare its own logprobs with the sampler's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from fulgurite.schemas.checksum import weights_sha256
from fulgurite.schemas.errors import FulguriteError, LogprobMismatch
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.allocator import give_back_blocks_of
from fulgurite.streams.learners.comparison import (
    MISMATCH,
    USUAL_CAUSES,
    ComparisonWatch,
    same_version_fault,
    undecided_fault,
)
from fulgurite.streams.learners.engine import (
    AdamW,
    Engine,
    OptimizerState,
    TorchEngine,
    begin_with_masters,
    refused_by_disk,
)
from fulgurite.streams.learners.flops import Meter, meter_of
from fulgurite.streams.learners.metrics import (
    SAME_VERSION_TOKENS,
    Seen,
    Update,
    loss_fault,
    norm_fault,
    step_metrics,
    update_metrics,
    window_fault,
)
from fulgurite.streams.learners.packing import PackedBatch, pack, plan, prompt_tokens, shared_prompts, tokens_once
from fulgurite.streams.learners.policy import CHUNK_BYTES, Policy, load_trained_policy
from fulgurite.streams.learners.reference import Base, Reference, load_reference
from fulgurite.streams.learners.results import Pass, StepResult, skipped
from fulgurite.streams.learners.schedule import learning_rate
from fulgurite.streams.learners.updates import left_out, trained_tokens, update_plan
from fulgurite.streams.objectives.aggregation import WindowTotals, window_totals
from fulgurite.streams.objectives.kl import kl_estimate
from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.trainer.credit import with_penalties
from fulgurite.streams.trainer.losses import LossTerms, ScoredTokens, micro_batch_loss
from fulgurite.streams.trainer.sample import Sample
from fulgurite.streams.trainer.window_metrics import penalty_metrics

logger = logging.getLogger(__name__)

_NOTHING: Final = Sample("", [0, 0], [0, 1], [0.0, 0.0], [-1, -1], 0.0)
"""What a rank works on that has no samples, at weight 0: it must take part in every collective of the others."""


class BadStep(FulguriteError):
    """Loss or gradient is no number, or past a bound of the settings: nothing was published, the run stops with the
    evidence in the message (trainer.on_bad_step = stop)."""


def too_many_bad_steps(version: int, steps: int, fault: str) -> FulguriteError:
    """What ends a run that had so many in a row, the last one for this fault (trainer.on_bad_step = skip)."""
    evidence = (
        f"version {version}: {steps} steps in a row changed nothing, the last one for {fault.replace(':', ' ', 1)}; "
        "the ledger has the reasons of those before"
    )
    if fault.startswith(MISMATCH):
        return LogprobMismatch(f"{evidence}; {USUAL_CAUSES}")
    return BadStep(f"{evidence}; lower trainer.learning_rate, or widen the bound, or set trainer.max_bad_steps")


class Learner:
    """Every rank has one, and is asked the same at the same time."""

    def __init__(
        self,
        engine: Engine,
        settings: TrainerSettings,
        updates: int = 0,
        reference: Reference | Base | None = None,
        meter: Meter | None = None,
    ) -> None:
        """`reference` is needed where trainer.kl_coefficient is not 0; `meter` where the step's utilisation of a GPU is
        wanted."""
        self.engine = engine
        self._settings = settings
        self._updates = updates
        self._reference = reference
        self._meter = meter
        self._watch = ComparisonWatch()

    def save_weights(self, folder: Path) -> None:
        """What servers load: config.json and safetensors, or an adapter. Raises OSError where the disk refuses."""
        with refused_by_disk(folder, SafetensorError):
            self.engine.save_weights(folder)

    def save_state(self, path: Path) -> None:
        """What only the next step needs: moments, and how many updates were done: the learning rate follows from it.
        Raises OSError where the disk refuses."""
        state = self.engine.state()
        if state is not None:
            state.save(path)

    def reference_sha256(self) -> str:
        """Of the weights that a KL penalty compares with; empty where there is none. It reads them all."""
        if isinstance(self._reference, Base):
            return self._reference.sha256
        folder = self._settings.reference or self._settings.model
        return weights_sha256(folder) if self._reference is not None and folder is not None else ""

    def close(self) -> None:
        """Nothing to give back."""

    def step(
        self, samples: list[Sample], version_in: int, compared: Sequence[Sample] = (), is_mismatched: bool = False
    ) -> StepResult:
        """The updates of a window. Raises LogprobMismatch or BadStep: these weights must not be used any more.

        `compared`: see TrainingSet; they have no gradient. `is_mismatched`: trainer and sampler disagreed when they
        could last be compared; a window of which nothing can be is a bad step then."""
        torch.set_num_threads(self._settings.threads)  # OpenMP's setting is the calling thread's own
        began = time.perf_counter()
        if self._settings.kl_in_reward:
            samples, penalty = self._penalised(samples, compared)
        else:
            penalty = {}
        updates = update_plan(samples, self._settings, self._updates)
        undecided = undecided_fault(samples, version_in) if is_mismatched else ""
        result = (
            self._one_update(samples, version_in)
            if len(updates) == 1 and not undecided
            else self._updates_after_a_look(samples, version_in, updates, undecided)
        )
        utilisation = self._utilisation(samples, time.perf_counter() - began)
        return replace(result, metrics=result.metrics | penalty | utilisation)

    def logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """[M] log p of each sampled token under the current policy, and the entropy of where it came from."""
        return self.engine.score(batch.to(self.engine.device), temperature=1.0, entropy_gradient=False)

    def _utilisation(self, samples: list[Sample], seconds: float) -> dict[str, float]:
        """What common prompts save; on a known GPU MFU: the updates' operations over what it could do meanwhile."""
        lengths, sampled = [len(s.token_ids) for s in samples], sum(sum(s.loss_mask) for s in samples)
        once = tokens_once(samples, self._together(samples))
        found = {"perf/shared_prompt_share": 1.0 - once / sum(lengths)}
        if self._meter is None:
            return found
        flops = self._meter.work.flops(lengths, sampled, once) * self._settings.epochs
        return found | {"perf/mfu/actor": flops / (seconds * self._meter.peak * self.engine.ranks)}

    def _one_update(self, samples: list[Sample], version_in: int) -> StepResult:
        totals = window_totals(sum(sample.loss_mask) for sample in samples)
        found, metrics, fault = self._backward(samples, version_in, totals, None)
        rate = learning_rate(self._settings, self._updates)
        norm = self.engine.update(rate, self._settings.grad_norm_limit or math.inf)
        self._compared(samples, metrics)
        known = math.nan if fault else norm
        fault = fault or norm_fault(self._settings, norm)
        if fault:
            self._refuse(fault, found.loss, known, samples, version_in)
            return skipped(fault, found.loss, known, metrics, left_out(samples, [(range(len(samples)), fault)]))
        self._updates += 1
        return StepResult(found.loss, norm, totals.tokens, metrics | {"actor/lr": rate})

    def _updates_after_a_look(
        self, samples: list[Sample], version_in: int, updates: list[list[int]], undecided: str
    ) -> StepResult:
        """Several updates; or none, where it is known before that there must be none (`undecided`)."""
        totals = window_totals(sum(sample.loss_mask) for sample in samples)
        before = self._look(samples, version_in, totals)
        metrics = step_metrics(before.seen)
        self._compared(samples, metrics)
        fault = before.mismatch or undecided or window_fault(self._settings, before.loss, metrics)
        if fault:
            self._refuse(fault, before.loss, math.nan, samples, version_in)
            everything = left_out(samples, [(range(len(samples)), fault)])
            return skipped(fault, before.loss, math.nan, metrics, everything)
        done: list[Update] = []
        for members in updates:
            chosen = [samples[member] for member in members]
            proximal = [before.logprobs[member] for member in members]
            counted = window_totals(sum(sample.loss_mask) for sample in chosen)
            found, seen, fault = self._backward(chosen, version_in, counted, proximal)
            rate = learning_rate(self._settings, self._updates)
            norm = self.engine.update(rate, self._settings.grad_norm_limit or math.inf)
            fault = fault or norm_fault(self._settings, norm)
            if fault:
                self._refuse(fault, found.loss, norm, chosen, version_in)
            else:
                self._updates += 1
            done.append(Update(found.loss, norm, rate, fault, seen))
        metrics |= update_metrics(done)
        made = [update for update in done if not update.fault]
        fates = [(members, update.fault) for members, update in zip(updates, done, strict=True)]
        untrained = left_out(samples, fates)
        if not made:
            return skipped(done[0].fault, done[0].loss, done[0].grad_norm, metrics, untrained)
        loss, norm = (sum(values) / len(made) for values in ([u.loss for u in made], [u.grad_norm for u in made]))
        return StepResult(loss, norm, trained_tokens(samples, fates), metrics, left_out=untrained)

    def _compared(self, samples: list[Sample], metrics: dict[str, float]) -> None:
        if any(max(sample.versions) >= 0 for sample in samples):  # else another policy sampled: nothing to compare
            self._watch.saw(metrics[SAME_VERSION_TOKENS])

    @torch.no_grad()
    def _penalised(self, trained: list[Sample], compared: Sequence[Sample]) -> tuple[list[Sample], dict[str, float]]:
        """KL in the reward: advantages anew from what is left of it. Those that the others are compared with pay as
        they do: their rewards count in the same mean and deviation."""
        assert self._reference is not None, "check_objective refuses kl_in_reward without a coefficient"
        samples = [*trained, *compared]
        mine: dict[int, list[float]] = {}
        for members in self._batches(samples):
            batch = self._pack(samples, members, None)
            logprobs = self._reference.logprobs(batch)
            kl = kl_estimate(batch.behaviour_logprobs, logprobs, self._settings.kl_estimator).cpu()
            counts = [sum(samples[member].loss_mask) for member in members]
            for member, values in zip(members, kl.split(counts) if members else (), strict=True):
                mine[member] = values.tolist()
        found = {number: values for part in self.engine.gather(mine) for number, values in part.items()}
        by_token = [found[number] for number in range(len(samples))]
        after = with_penalties(samples, by_token, self._settings)[: len(trained)]
        return after, penalty_metrics(trained, by_token[: len(trained)], after, self._settings.kl_coefficient)

    def _refuse(self, fault: str, loss: float, norm: float, samples: list[Sample], version_in: int) -> None:
        """Says what was wrong with an update; raises LogprobMismatch or BadStep, or returns, as the settings say."""
        rollouts = sorted({sample.rollout_id for sample in samples})
        evidence = (
            f"version {version_in}: {fault.replace(':', ' ', 1)}; loss {loss:g}, gradient norm {norm:g} of "
            f"{len(samples)} sequences, rollouts {', '.join(rollouts[:8])}{', …' if len(rollouts) > 8 else ''}"
        )
        if self._settings.on_bad_step == "stop" and fault.startswith(MISMATCH):
            raise LogprobMismatch(f"{evidence}: trainer and sampler disagree; nothing was published; {USUAL_CAUSES}")
        if self._settings.on_bad_step == "stop":
            raise BadStep(
                f"{evidence}: nothing was published; lower trainer.learning_rate, look at these rollouts' logprobs, or "
                "set trainer.on_bad_step = skip to pass over such windows"
            )
        if self.engine.rank == 0:
            logger.warning("%s: skipped, the weights stay as they are", evidence)

    def _backward(
        self, samples: list[Sample], version_in: int, totals: WindowTotals, proximal: Sequence[Tensor] | None
    ) -> tuple[Pass, dict[str, float], str]:
        """One update's gradients, what its tokens looked like, and what forbids it, the same on every rank.

        The gradients are poisoned where something does: `update` then changes nothing, and every engine cleans up.
        `proximal`, by sample: there was a look before, which compared with the sampler.
        """
        mine, pack_seconds = Pass(), 0.0
        batches = self._batches(samples)
        for number, members in enumerate(batches, 1):
            began = time.perf_counter()
            batch = self._pack(samples, members, proximal)
            pack_seconds += time.perf_counter() - began
            terms, seen = self._score(batch, version_in, totals)
            if members:
                mismatch = "" if proximal else same_version_fault(self._settings, batch, terms.logprobs, version_in)
                mine.add(terms.loss, seen, mismatch)
            part = terms.loss if members else terms.loss * 0.0
            if number < len(batches):
                self.engine.backward(part, last=False)
                continue
            found = Pass.of(self.engine.gather(mine))
            metrics = step_metrics(found.seen)
            fault = loss_fault(found.loss) if proximal else window_fault(self._settings, found.loss, metrics)
            fault = found.mismatch or fault
            self.engine.backward(part * math.nan if fault else part, last=True)
            return found, metrics | {"timing_s/pack": pack_seconds}, fault
        raise AssertionError("a window has samples, and so every rank a micro-batch")

    @torch.no_grad()
    def _look(self, samples: list[Sample], version_in: int, totals: WindowTotals) -> Pass:
        """Every token under the policy at the window's beginning."""
        mine = Pass()
        for members in self._batches(samples):
            batch = self._pack(samples, members, None)
            terms, seen = self._score(batch, version_in, totals)
            if not members:
                continue
            mine.add(terms.loss, seen, same_version_fault(self._settings, batch, terms.logprobs, version_in))
            counts = [sum(samples[member].loss_mask) for member in members]
            mine.logprobs |= dict(zip(members, seen.logprobs.split(counts), strict=True))
        return Pass.of(self.engine.gather(mine))

    def _batches(self, samples: list[Sample]) -> list[list[int]]:
        """Numbers of samples by micro-batch of this rank."""
        return plan(
            [len(sample.token_ids) for sample in samples],
            max_tokens=self._settings.micro_batch_tokens,
            ranks=self.engine.ranks,
            together=self._together(samples),
            prompts=[prompt_tokens(sample) for sample in samples],
        )[self.engine.rank]

    def _together(self, samples: list[Sample]) -> list[list[int]]:
        return shared_prompts(samples) if self._settings.share_prompts else []

    def _pack(self, samples: list[Sample], members: list[int], proximal: Sequence[Tensor] | None) -> PackedBatch:
        if not members:
            return pack([_NOTHING], proximal and [torch.zeros(1)]).to(self.engine.device)
        chosen = [samples[member] for member in members]
        own = proximal and [proximal[member] for member in members]
        return pack(chosen, own, share_prompts=self._settings.share_prompts).to(self.engine.device)

    def _score(self, batch: PackedBatch, version_in: int, totals: WindowTotals) -> tuple[LossTerms, Seen]:
        in_loss = None if self._settings.kl_in_reward else self._reference
        reference = in_loss.logprobs(batch) if in_loss else None
        entropy_gradient = self._settings.entropy_coefficient > 0
        logprobs, entropy = self.engine.score(batch, temperature=1.0, entropy_gradient=entropy_gradient)
        tokens = ScoredTokens(
            logprobs,
            entropy,
            batch.behaviour_logprobs,
            batch.advantages,
            Sequences.from_index(batch.sequences, len(batch.rollout_ids)),
            reference,
            batch.proximal_logprobs,
        )
        terms = micro_batch_loss(self._settings, tokens, totals)
        return terms, Seen.of(batch, terms, entropy.detach(), version_in)


def load_learner(folder: Path, settings: TrainerSettings, state: Path | None = None) -> Learner:
    """`folder` is a Hugging Face model; `state` the optimizer file of a checkpoint, None for a new run. Raises
    StartError for a state of another model."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    saved = OptimizerState.load(state) if state is not None else None
    policy = load_trained_policy(folder, settings)
    if saved is not None:
        begin_with_masters(saved, policy, _dtype(settings))
    # Before there is an engine: ZeRO takes weights apart.
    meter = meter_of(policy.model, torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    engine = _engine(policy, settings)
    if engine.device.type == "cpu":
        give_back_blocks_of(CHUNK_BYTES["cpu"] // 2)  # a chunk of whole positions can be a little smaller
    if saved is not None:
        engine.restore(saved)
    return Learner(engine, settings, saved.updates if saved else 0, _reference(engine, policy, settings), meter)


def _reference(engine: Engine, policy: Policy, settings: TrainerSettings) -> Reference | Base | None:
    if not settings.kl_coefficient:
        return None
    if settings.lora_rank and settings.reference is None:
        return Base(engine, policy)
    folder = settings.reference or settings.model
    assert folder is not None, "make_plan refuses a KL penalty without a reference"
    vocab_size = int(policy.model.config.get_text_config().vocab_size)
    return load_reference(folder, settings, device=engine.device, vocab_size=vocab_size)


def _dtype(settings: TrainerSettings) -> torch.dtype:
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def _engine(policy: Policy, settings: TrainerSettings) -> Engine:
    adamw = AdamW((settings.adam_beta1, settings.adam_beta2), settings.weight_decay, settings.max_grad_norm)
    if settings.zero_stage == 0:
        return TorchEngine(policy, adamw, dtype=_dtype(settings))
    # Here and not at the top: it takes seconds to import, and one device does without it.
    from fulgurite.streams.learners.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(policy, adamw, stage=settings.zero_stage, dtype=_dtype(settings))
