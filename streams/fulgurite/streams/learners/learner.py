"""The learner: one optimizer step a window, on whatever engine, one process or many.

    samples ─► plan: my micro-batches ─► score ─► loss ─► backward … ─► every rank's tokens, faults ─► update

Promises: the same files, settings, samples and ranks give the same weights, bit for bit (on a CPU); nothing is changed
when a step raises or is skipped, and it does so on every rank or on none. Does not know Kafka, windows or versions on
disk; knows the number of the version it trains only to compare its own logprobs with the sampler's.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fulgurite.schemas.errors import FulguriteError, LogprobMismatch
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.engine import AdamW, Engine, OptimizerState, TorchEngine
from fulgurite.streams.learners.metrics import SAME_VERSION_TOKENS, Seen, norm_fault, step_metrics, window_fault
from fulgurite.streams.learners.packing import PackedBatch, pack, plan
from fulgurite.streams.learners.policy import Policy, load_trained_policy
from fulgurite.streams.learners.reference import Base, Reference, load_reference
from fulgurite.streams.learners.schedule import learning_rate
from fulgurite.streams.objectives.aggregation import WindowTotals, window_totals
from fulgurite.streams.objectives.packing import Sequences
from fulgurite.streams.trainer.losses import ScoredTokens, micro_batch_loss
from fulgurite.streams.trainer.samples import Sample

logger = logging.getLogger(__name__)

_NOTHING: Final = Sample("", [0, 0], [0, 1], [0.0, 0.0], [-1, -1], 0.0)
"""What a rank works on that has no samples, at weight 0: it must take part in every collective of the others."""

UNCHECKED_STEPS = 20
"""So many steps in a row without one token of the current version are worth a warning: nothing was compared."""


class BadStep(FulguriteError):
    """Loss or gradient is no number, or past a bound of the settings: nothing was changed, the run stops with the
    evidence in the message (trainer.on_bad_step = stop)."""


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float
    grad_norm: float
    tokens: int
    """That the weights were changed by."""
    metrics: dict[str, float]
    skipped: str = ""
    """Why nothing was changed, as `kind:figures` (trainer.on_bad_step = skip); empty where something was."""


@dataclass(frozen=True, slots=True)
class _Accumulated:
    """A window's micro-batches of all ranks, before the update. With a fault the gradients are no numbers."""

    loss: float
    metrics: dict[str, float]
    mismatch: str
    """How trainer and sampler disagree; empty where they agree."""
    fault: str
    """What else forbids the update, see metrics.window_fault."""


class Learner:
    """Every rank has one, and is asked the same at the same time."""

    def __init__(
        self, engine: Engine, settings: TrainerSettings, updates: int = 0, reference: Reference | Base | None = None
    ) -> None:
        """`reference` is needed where trainer.kl_coefficient is not 0."""
        self.engine = engine
        self._settings = settings
        self._updates = updates
        self._reference = reference
        self._unchecked = 0

    def save_weights(self, folder: Path) -> None:
        """What servers load: config.json and safetensors."""
        self.engine.save_weights(folder)

    def save_state(self, path: Path) -> None:
        """What only the next step needs: moments, and how many updates were done: the learning rate follows from it."""
        state = self.engine.state()
        if state is not None:
            state.save(path)

    def close(self) -> None:
        """Nothing to give back."""

    def step(self, samples: list[Sample], version_in: int) -> StepResult:
        """One update from all samples of a window. Raises LogprobMismatch or BadStep and then changes nothing."""
        torch.set_num_threads(self._settings.threads)  # OpenMP's setting is the calling thread's own
        totals = window_totals(sum(sample.loss_mask) for sample in samples)
        found = self._accumulate(samples, version_in, totals)
        rate = learning_rate(self._settings, self._updates)
        norm = self.engine.update(rate, self._settings.grad_norm_limit or math.inf)
        if found.mismatch:
            raise LogprobMismatch(found.mismatch)
        if any(max(sample.versions) >= 0 for sample in samples):  # else another policy sampled: nothing to compare
            self._watch_comparison(found.metrics[SAME_VERSION_TOKENS])
        fault = found.fault or norm_fault(self._settings, norm)
        if fault:
            return self._refuse(fault, found, math.nan if found.fault else norm, samples, version_in)
        self._updates += 1
        return StepResult(found.loss, norm, totals.tokens, found.metrics | {"actor/lr": rate})

    def _refuse(
        self, fault: str, found: _Accumulated, norm: float, samples: list[Sample], version_in: int
    ) -> StepResult:
        """Says what was wrong, and stops or goes on without an update, as the settings say."""
        rollouts = sorted({sample.rollout_id for sample in samples})
        evidence = (
            f"version {version_in}: {fault.replace(':', ' ', 1)}; loss {found.loss:g}, gradient norm {norm:g} of "
            f"{len(samples)} sequences, rollouts {', '.join(rollouts[:8])}{', …' if len(rollouts) > 8 else ''}"
        )
        if self._settings.on_bad_step == "stop":
            raise BadStep(
                f"{evidence}: nothing was published; lower trainer.learning_rate, look at these rollouts' logprobs, or "
                "set trainer.on_bad_step = skip to pass over such windows"
            )
        if self.engine.rank == 0:
            logger.warning("%s: skipped, the weights stay as they are", evidence)
        finite = {name: value for name, value in found.metrics.items() if math.isfinite(value)}
        return StepResult(_finite(found.loss), _finite(norm), 0, finite, skipped=fault)

    def logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """[M] log p of each sampled token under the current policy, and the entropy of where it came from."""
        return self.engine.score(batch.to(self.engine.device), temperature=1.0, entropy_gradient=False)

    def _accumulate(self, samples: list[Sample], version_in: int, totals: WindowTotals) -> _Accumulated:
        """The window's loss, its tokens, and what forbids the update, the same on every rank.

        The gradients are poisoned where something does: `update` then changes nothing, and every engine cleans up.
        """
        loss, pack_seconds, seen, mismatches = 0.0, 0.0, list[Seen](), list[str]()
        lengths = [len(sample.token_ids) for sample in samples]
        mine = plan(lengths, max_tokens=self._settings.micro_batch_tokens, ranks=self.engine.ranks)[self.engine.rank]
        for number, members in enumerate(mine, 1):
            began = time.perf_counter()
            batch = pack([samples[member] for member in members] or [_NOTHING]).to(self.engine.device)
            pack_seconds += time.perf_counter() - began
            part, tokens, mismatch = self._score(batch, version_in, totals)
            if members:
                loss += part.item()
                seen.append(tokens)
                mismatches += [mismatch] if mismatch else []
            else:
                part = part * 0.0
            if number < len(mine):
                self.engine.backward(part, last=False)
                continue
            found = self._gather(loss, seen, mismatches)
            found.metrics["timing_s/pack"] = pack_seconds
            self.engine.backward(part * math.nan if found.mismatch or found.fault else part, last=True)
            return found
        raise AssertionError("a window has samples, and so every rank a micro-batch")

    def _gather(self, loss: float, seen: list[Seen], mismatches: list[str]) -> _Accumulated:
        """What all ranks came to."""
        found = self.engine.gather((loss, seen, mismatches))
        loss = sum(each[0] for each in found)  # fsum refuses inf - inf, which is a fault like others
        metrics = step_metrics([tokens for each in found for tokens in each[1]])
        mismatch = next((mismatch for each in found for mismatch in each[2]), "")
        return _Accumulated(loss, metrics, mismatch, window_fault(self._settings, loss, metrics))

    def _score(self, batch: PackedBatch, version_in: int, totals: WindowTotals) -> tuple[Tensor, Seen, str]:
        reference = self._reference.logprobs(batch) if self._reference else None
        entropy_gradient = self._settings.entropy_coefficient > 0
        logprobs, entropy = self.engine.score(batch, temperature=1.0, entropy_gradient=entropy_gradient)
        sequences = Sequences.from_index(batch.sequences, len(batch.rollout_ids))
        tokens = ScoredTokens(logprobs, entropy, batch.behaviour_logprobs, batch.advantages, sequences, reference)
        terms = micro_batch_loss(self._settings, tokens, totals)
        current = logprobs.detach()
        seen = Seen(
            current.cpu(),
            batch.behaviour_logprobs.cpu(),
            entropy.detach().cpu(),
            (batch.versions == version_in).cpu(),
            terms.ratios.cpu(),
            terms.clipped.cpu(),
            terms.dual_clipped.cpu(),
            terms.held.cpu(),
            None if terms.kl is None else terms.kl.cpu(),
        )
        return terms.loss, seen, self._same_version_fault(batch, current, version_in)

    def _same_version_fault(self, batch: PackedBatch, current: Tensor, version_in: int) -> str:
        """Tokens this very version sampled must have the probabilities it gave them; empty where they do."""
        same = batch.versions == version_in
        difference = torch.where(same, (current - batch.behaviour_logprobs).abs(), torch.zeros_like(current))
        # NaN counts as a difference: it compares false with everything.
        wrong = ~(difference <= self._settings.max_logprob_difference)
        if not wrong.any():
            return ""
        at = int(difference.nan_to_num(nan=float("inf")).argmax())
        return (
            f"trainer and sampler disagree about version {version_in}: "
            f"rollout {batch.rollout_ids[int(batch.sequences[at])]}, "
            f"position {int(batch.position_ids[batch.predicting[at]]) + 1}, "
            f"token {int(batch.targets[at])}: log p is {current[at].item():.6f} here, "
            f"{batch.behaviour_logprobs[at].item():.6f} as recorded; {int(wrong.sum())} of {len(wrong)} tokens differ "
            f"by more than trainer.max_logprob_difference = {self._settings.max_logprob_difference:g}. Nothing was "
            "published. Usual causes: a temperature or top_p other than 1, a stale prefix cache after a swap, weights "
            "not as announced"
        )

    def _watch_comparison(self, same_version_tokens: float) -> None:
        """The comparison above sees only tokens of the version under training; says so when there are never any."""
        self._unchecked = 0 if same_version_tokens else self._unchecked + 1
        if self._unchecked and self._unchecked % UNCHECKED_STEPS == 0:
            logger.warning(
                "%d steps without a token sampled by the version under training: trainer and sampler were not compared "
                "(trainer.max_logprob_difference); trainer.pacing_staleness = 0 would make every token one",
                self._unchecked,
            )


def _finite(value: float) -> float:
    """Records hold numbers only; what was none is in the reason."""
    return value if math.isfinite(value) else 0.0


def load_learner(folder: Path, settings: TrainerSettings, state: Path | None = None) -> Learner:
    """`folder` is a Hugging Face model; `state` the optimizer file of a checkpoint, None for a new run. Raises
    StartError for a state of another model."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    saved = OptimizerState.load(state) if state is not None else None
    policy = load_trained_policy(folder, settings)
    engine = _engine(policy, settings)
    if saved is not None:
        engine.restore(saved)
    return Learner(engine, settings, saved.updates if saved else 0, _reference(engine, policy, settings))


def _reference(engine: Engine, policy: Policy, settings: TrainerSettings) -> Reference | Base | None:
    if not settings.kl_coefficient:
        return None
    if settings.lora_rank and settings.reference is None:
        return Base(engine, policy)
    folder = settings.reference or settings.model
    assert folder is not None, "make_plan refuses a KL penalty without a reference"
    vocab_size = int(policy.model.config.get_text_config().vocab_size)
    return load_reference(folder, device=engine.device, dtype=_dtype(settings), vocab_size=vocab_size)


def _dtype(settings: TrainerSettings) -> torch.dtype:
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def _engine(policy: Policy, settings: TrainerSettings) -> Engine:
    adamw = AdamW((settings.adam_beta1, settings.adam_beta2), settings.weight_decay, settings.max_grad_norm)
    if settings.zero_stage == 0:
        return TorchEngine(policy, adamw, dtype=_dtype(settings))
    # Here and not at the top: it takes seconds to import, and one device does without it.
    from fulgurite.streams.learners.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(policy, adamw, stage=settings.zero_stage, dtype=_dtype(settings))
