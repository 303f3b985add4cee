"""The learner: one optimizer step a window, on whatever engine, one process or many.

    samples ─► plan: my micro-batches ─► score ─► loss ─► backward … ─► every rank's faults ─► update ─► metrics

Promises: the same files, settings, samples and ranks give the same weights, bit for bit (on a CPU); nothing is changed
when a step raises, and it raises on every rank or on none. Does not know Kafka, windows or versions on disk; knows the
number of the version it trains only to compare its own logprobs with the sampler's.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fulgurite.schemas.errors import FulguriteError, LogprobMismatch
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.engine import AdamW, Engine, OptimizerState, TorchEngine
from fulgurite.streams.learners.packing import PackedBatch, pack, plan
from fulgurite.streams.learners.policy import load_policy
from fulgurite.streams.objectives.importance import effective_sample_fraction
from fulgurite.streams.trainer.losses import behaviour_kl, policy_loss
from fulgurite.streams.trainer.samples import Sample

logger = logging.getLogger(__name__)


SAME_VERSION_TOKENS = "sampling/same_version_tokens"

_NOTHING: Final = Sample("", [0, 0], [0, 1], [0.0, 0.0], [-1, -1], 0.0)
"""What a rank works on that has no samples: it must take part in every collective of the others."""

UNCHECKED_STEPS = 20
"""So many steps in a row without one token of the current version are worth a warning: nothing was compared."""


class NonFinite(FulguriteError):
    """Loss or gradient is not a number: nothing was changed, the run stops with the evidence in the message."""


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float
    grad_norm: float
    tokens: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a micro-batch's tokens looked like under the current policy, [M] each on the CPU, for the metrics."""

    logprobs: Tensor
    behaviour: Tensor
    entropy: Tensor
    same_version: Tensor
    weights: Tensor
    clipped: Tensor
    capped: Tensor


class Learner:
    """Every rank has one, and is asked the same at the same time."""

    def __init__(self, engine: Engine, settings: TrainerSettings, updates: int = 0) -> None:
        self.engine = engine
        self._settings = settings
        self._updates = updates
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
        """One update from all samples of a window. Raises LogprobMismatch or NonFinite and then changes nothing."""
        torch.set_num_threads(self._settings.threads)  # OpenMP's setting is the calling thread's own
        token_count = sum(sum(sample.loss_mask) for sample in samples)
        loss, seen, fault = self._accumulate(samples, version_in, token_count)
        learning_rate = self._learning_rate()
        norm = self.engine.update(learning_rate)
        if fault:
            raise LogprobMismatch(fault)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFinite(
                f"loss {loss} and gradient norm {norm} of a window of {len(samples)} sequences, {token_count} tokens, "
                f"version {version_in}; rollouts {', '.join(sorted({s.rollout_id for s in samples})[:8])}, …: "
                "nothing was published; lower trainer.learning_rate, or look at these rollouts' logprobs"
            )
        self._updates += 1
        metrics = _metrics(seen) | {"actor/lr": learning_rate}
        self._watch_comparison(metrics[SAME_VERSION_TOKENS])
        return StepResult(loss, norm, token_count, metrics)

    def logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """[M] log p of each sampled token under the current policy, and the entropy of where it came from."""
        return self.engine.score(batch.to(self.engine.device), temperature=1.0, entropy_gradient=False)

    def _accumulate(self, samples: list[Sample], version_in: int, token_count: int) -> tuple[float, list[_Seen], str]:
        """The window's loss, its tokens, and what forbids the update (empty: nothing), the same on every rank.

        The gradients are poisoned where something does: `update` then changes nothing, and every engine cleans up.
        """
        loss, seen, faults = 0.0, list[_Seen](), list[str]()
        lengths = [len(sample.token_ids) for sample in samples]
        mine = plan(lengths, max_tokens=self._settings.micro_batch_tokens, ranks=self.engine.ranks)[self.engine.rank]
        for number, members in enumerate(mine, 1):
            batch = pack([samples[member] for member in members] or [_NOTHING]).to(self.engine.device)
            part, tokens, fault = self._score(batch, version_in, token_count)
            if members:
                loss += part.item()
                seen.append(tokens)
                faults += [fault] if fault else []
            last = number == len(mine)
            if last:
                found = self.engine.gather((loss, seen, faults))
                loss = math.fsum(each[0] for each in found)
                seen = [tokens for each in found for tokens in each[1]]
                faults = [fault for each in found for fault in each[2]]
            poison = last and (faults or not math.isfinite(loss))
            self.engine.backward(part * math.nan if poison else part, last=last)
        return loss, seen, faults[0] if faults else ""

    def _score(self, batch: PackedBatch, version_in: int, token_count: int) -> tuple[Tensor, _Seen, str]:
        logprobs, entropy = self.engine.score(batch, temperature=1.0, entropy_gradient=False)
        current = logprobs.detach()
        terms = policy_loss(
            logprobs,
            batch.behaviour_logprobs if self._settings.correction == "clip" else current,  # see losses.py
            batch.behaviour_logprobs,
            batch.advantages,
            token_count=token_count,
            clip_low=self._settings.clip_low,
            clip_high=self._settings.clip_high,
            importance_cap=self._settings.importance_cap,
        )
        seen = _Seen(
            current.cpu(),
            batch.behaviour_logprobs.cpu(),
            entropy.detach().cpu(),
            (batch.versions == version_in).cpu(),
            (terms.importance_weights * terms.ratios).cpu(),
            terms.clipped.cpu(),
            terms.capped.cpu(),
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

    def _learning_rate(self) -> float:
        """Linear warm-up, then constant."""
        warmup = self._settings.warmup_steps
        return self._settings.learning_rate * (min(1.0, (self._updates + 1) / warmup) if warmup else 1.0)


def _metrics(seen: list[_Seen]) -> dict[str, float]:
    """Names as verl and TRL users know them. `ppo_kl` is against the behaviour policy, the only older one there is."""
    current = torch.cat([part.logprobs for part in seen])
    behaviour = torch.cat([part.behaviour for part in seen])
    weights = torch.cat([part.weights for part in seen])
    kl, k3 = behaviour_kl(current, behaviour)
    difference = (current - behaviour).abs()
    same = difference[torch.cat([part.same_version for part in seen])]
    return {
        "actor/entropy": torch.cat([part.entropy for part in seen]).mean().item(),
        "actor/pg_clipfrac": torch.cat([part.clipped for part in seen]).float().mean().item(),
        "actor/ppo_kl": kl,
        "rollout_corr/kl": kl,
        "rollout_corr/k3_kl": k3,
        "rollout_corr/rollout_is_mean": weights.mean().item(),
        "rollout_corr/rollout_is_eff_sample_size": effective_sample_fraction(weights),
        "rollout_corr/rollout_is_capped_fraction": torch.cat([part.capped for part in seen]).float().mean().item(),
        "sampling/sampling_logp_difference/mean": difference.mean().item(),
        "sampling/sampling_logp_difference/max": difference.max().item(),
        SAME_VERSION_TOKENS: float(same.numel()),
        **({"sampling/same_version_logp_difference/max": same.max().item()} if same.numel() else {}),
    }


def load_learner(folder: Path, settings: TrainerSettings, state: Path | None = None) -> Learner:
    """`folder` is a Hugging Face model; `state` the optimizer file of a checkpoint, None for a new run. Raises
    StartError for a state of another model."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    saved = OptimizerState.load(state) if state is not None else None
    engine = _engine(folder, settings)
    if saved is not None:
        engine.restore(saved)
    return Learner(engine, settings, saved.updates if saved else 0)


def _engine(folder: Path, settings: TrainerSettings) -> Engine:
    policy = load_policy(folder)
    adamw = AdamW((settings.adam_beta1, settings.adam_beta2), settings.weight_decay, settings.max_grad_norm)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    if settings.zero_stage == 0:
        return TorchEngine(policy, adamw, dtype=dtype)
    # Here and not at the top: it takes seconds to import, and one device does without it.
    from fulgurite.streams.learners.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(policy, adamw, stage=settings.zero_stage, dtype=dtype)
