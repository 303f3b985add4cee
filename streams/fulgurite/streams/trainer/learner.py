"""The learner: one model, AdamW, one optimizer step a window, plain torch on one device.

Promises: the same files, settings and samples give the same weights, bit for bit (on a CPU); nothing is changed when a
step raises. Does not know Kafka, windows or versions on disk; knows the number of the version it trains only to compare
its own logprobs with the sampler's.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fulgurite.schemas.errors import FulguriteError, LogprobMismatch
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.learners.packing import PackedBatch, pack, plan
from fulgurite.streams.learners.policy import load_policy
from fulgurite.streams.trainer.losses import behaviour_kl, effective_sample_fraction, policy_loss
from fulgurite.streams.trainer.samples import Sample

logger = logging.getLogger(__name__)


SAME_VERSION_TOKENS = "sampling/same_version_tokens"

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
    """What a window's tokens looked like under the current policy, [N] each, for the metrics."""

    logprobs: Tensor
    behaviour: Tensor
    entropy: Tensor
    same_version: Tensor
    weights: Tensor
    clipped: Tensor
    capped: Tensor


class Learner:
    """`folder` is a Hugging Face model; `state` the optimizer file of a checkpoint, None for a new run."""

    def __init__(self, folder: Path, settings: TrainerSettings, state: Path | None = None) -> None:
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._policy = load_policy(folder).to(self._device)
        self._parameters = [parameter for parameter in self._policy.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
        )
        self._updates = 0
        self._unchecked = 0
        if state is not None:
            saved = torch.load(state, map_location=self._device, weights_only=True)
            self._optimizer.load_state_dict(saved["optimizer"])
            self._updates = int(saved["updates"])
            torch.set_rng_state(saved["rng"].cpu())

    def save_weights(self, folder: Path) -> None:
        """What servers load: config.json and safetensors."""
        self._policy.model.save_pretrained(folder)

    def save_state(self, path: Path) -> None:
        """What only the next step needs: moments, updates done (the learning rate follows from it), random state."""
        torch.save(
            {"optimizer": self._optimizer.state_dict(), "updates": self._updates, "rng": torch.get_rng_state()}, path
        )

    def step(self, samples: list[Sample], version_in: int) -> StepResult:
        """One update from all samples of a window. Raises LogprobMismatch or NonFinite and then changes nothing."""
        torch.set_num_threads(self._settings.threads)  # OpenMP's setting is the calling thread's own
        token_count = sum(sum(sample.loss_mask) for sample in samples)
        self._optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        seen: list[_Seen] = []
        [batches] = plan([len(sample.token_ids) for sample in samples], max_tokens=self._settings.micro_batch_tokens)
        for numbers in batches:
            batch = pack([samples[number] for number in numbers]).to(self._device)
            part, tokens = self._accumulate(batch, version_in, token_count)
            loss += part
            seen.append(tokens)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFinite(
                f"loss {loss} and gradient norm {norm} of a window of {len(samples)} sequences, {token_count} tokens, "
                f"version {version_in}; rollouts {', '.join(sorted({s.rollout_id for s in samples})[:8])}, …: "
                "nothing was published; lower trainer.learning_rate, or look at these rollouts' logprobs"
            )
        learning_rate = self._learning_rate()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._updates += 1
        metrics = _metrics(seen) | {"actor/lr": learning_rate}
        self._watch_comparison(metrics[SAME_VERSION_TOKENS])
        return StepResult(loss, norm, token_count, metrics)

    def logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """[M] log p of each sampled token under the current policy, and the entropy of where it came from."""
        return self._policy(batch)

    def _accumulate(self, batch: PackedBatch, version_in: int, token_count: int) -> tuple[float, _Seen]:
        logprobs, entropy = self._policy(batch)
        current = logprobs.detach()
        self._check_same_version(batch, current, version_in)
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
        terms.loss.backward()
        seen = _Seen(
            current,
            batch.behaviour_logprobs,
            entropy,
            batch.versions == version_in,
            terms.importance_weights * terms.ratios,
            terms.clipped,
            terms.capped,
        )
        return terms.loss.item(), seen

    def _check_same_version(self, batch: PackedBatch, current: Tensor, version_in: int) -> None:
        """Tokens this very version sampled must have the probabilities it gave them."""
        same = batch.versions == version_in
        difference = torch.where(same, (current - batch.behaviour_logprobs).abs(), torch.zeros_like(current))
        # NaN counts as a difference: it compares false with everything.
        wrong = ~(difference <= self._settings.max_logprob_difference)
        if not wrong.any():
            return
        at = int(difference.nan_to_num(nan=float("inf")).argmax())
        raise LogprobMismatch(
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
