"""The libraries' policy losses behind one signature: a case and what is asked for -> their scalar loss.

Each function only arranges arguments; what is computed is the library's own code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fulgurite.streams.objectives.aggregation import Aggregation
from fulgurite.streams.objectives.importance import Mode
from fulgurite.streams.objectives.kl import Gradient
from fulgurite.streams.objectives.ratios import Level
from tests.oracles.case import Case
from tests.oracles.standins import load

CONSTANT = 16
"""The longest length there may be, for Dr. GRPO."""
FAR = 1e9
"""A bound nothing reaches."""


@dataclass(frozen=True)
class Correction:
    """How tokens of the behaviour policy are weighed: importance.py's arguments."""

    mode: Mode
    high: float
    low: float = 0.0
    level: Level = "token"
    gate: Level | None = None


@dataclass(frozen=True)
class Asked:
    """A policy loss, in our words."""

    kind: str
    """clipped, gspo or cispo."""
    aggregation: Aggregation
    low: float
    high: float
    dual: float | None = None
    correction: Correction | None = None
    kl: float = 0.0
    """Coefficient of k3 in the loss."""
    kl_gradient: Gradient = "estimator"
    entropy: float = 0.0
    """Coefficient of the bonus; the square of log p stands in for the entropy, so that it has a gradient."""


Loss = Callable[[Case, Asked], Tensor]


def verl(case: Case, asked: Asked) -> Tensor:
    algorithms = load("verl.trainer.ppo.core_algos")
    mode = {
        "token_mean": "token-mean",
        "sequence_mean": "seq-mean-token-mean",
        "sequence_sum": "seq-mean-token-sum-norm",
    }[asked.aggregation]
    config = load("verl.workers.config").ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=asked.low,
        clip_ratio_high=asked.high,
        clip_ratio_c=asked.dual or FAR,
        global_batch_info={"loss_scale_factor": CONSTANT} if asked.aggregation == "sequence_sum" else {},
    )
    weights = None
    if asked.correction is not None:
        helper = load("verl.trainer.ppo.rollout_corr_helper")
        bounds: str | float = asked.correction.high
        if asked.correction.mode == "mask":
            bounds = f"{asked.correction.low}_{asked.correction.high}"
        weights, _ = helper.compute_rollout_correction_weights(
            case.padded(case.proximal - case.behaviour),
            case.mask,
            rollout_is={"token": "token", "sequence_product": "sequence"}[asked.correction.level],
            rollout_is_threshold=bounds,
        )
    name = {"clipped": "vanilla", "gspo": "gspo", "cispo": "cispo"}[asked.kind]
    loss, _ = algorithms.get_policy_loss_fn(name)(
        case.padded(case.proximal),
        case.padded(case.logprobs),
        case.padded(case.token_advantages),
        case.mask,
        mode,
        config,
        weights,
    )
    if asked.kl:
        name = {"estimator": "k3", "k2": "k3+"}[asked.kl_gradient]
        penalty = algorithms.kl_penalty(case.padded(case.logprobs), case.padded(case.reference), name)
        loss = loss + asked.kl * algorithms.agg_loss(penalty, case.mask, mode, **config.global_batch_info)
    if asked.entropy:
        entropies = case.padded(case.logprobs.square())
        loss = loss - asked.entropy * algorithms.agg_loss(entropies, case.mask, mode, **config.global_batch_info)
    return loss


def _trainer(case: Case, asked: Asked, loss_type: str) -> SimpleNamespace:
    """What TRL's method reads of its trainer: settings, and the log-probabilities a model would have given."""
    lengths = case.sequences.lengths

    def reduce(values: Tensor, reduction: str) -> Tensor:
        return values

    def gather(values: Tensor) -> Tensor:
        return values

    def logprobs_and_entropies(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return case.padded(case.logprobs), case.padded(case.logprobs.square()), None

    return SimpleNamespace(
        _get_per_token_logps_and_entropies=logprobs_and_entropies,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if asked.kind == "gspo" else "token",
        beta=asked.kl,
        epsilon_low=asked.low,
        epsilon_high=1.0 + asked.high if asked.kind == "cispo" else asked.high,
        loss_type=loss_type,
        args=SimpleNamespace(
            delta=asked.dual, use_bias_correction_kl=asked.kl_gradient == "ratio", steps_per_generation=1
        ),
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=CONSTANT,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, reduce=reduce, gather=gather, sync_gradients=False),
        num_items=lengths.sum(),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=asked.entropy != 0.0,
        use_adaptive_entropy=False,
        entropy_coef=asked.entropy,
    )


def trl(case: Case, asked: Asked) -> Tensor:
    if asked.correction is not None:
        raise NotImplementedError("TRL computes its weights inside the method that generates")
    trainer = load("trl.trainer.grpo_trainer").GRPOTrainer
    loss_type = {"token_mean": "dapo", "sequence_mean": "grpo", "sequence_sum": "dr_grpo"}[asked.aggregation]
    if asked.kind == "cispo":
        loss_type = "cispo"
    state = _trainer(case, asked, loss_type)
    state._metrics["train"]["policy_loss"] = []
    prompt = torch.zeros((len(case.sequences.lengths), 1), dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": torch.zeros_like(case.mask, dtype=torch.int64),
        "completion_mask": case.mask,
        "advantages": case.advantages,
        "old_per_token_logps": case.padded(case.proximal),
        "ref_per_token_logps": case.padded(case.reference),
        "num_items_in_batch": state.num_items,
    }
    return trainer._compute_loss(state, None, inputs)


def liger(case: Case, asked: Asked) -> Tensor:
    function = load("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction
    loss_type = {"token_mean": "dapo", "sequence_mean": "grpo", "sequence_sum": "dr_grpo"}[asked.aggregation]
    loss, _ = function.ppo_loss_fn(
        per_token_logps=case.padded(case.logprobs),
        attention_mask=case.mask,
        advantages=case.advantages,
        full_attention_mask=case.mask,
        ref_per_token_logps=case.padded(case.reference),
        old_per_token_logps=case.padded(case.proximal),
        epsilon_low=asked.low,
        epsilon_high=1.0 + asked.high if asked.kind == "cispo" else asked.high,
        beta=asked.kl,
        loss_type="cispo" if asked.kind == "cispo" else loss_type,
        max_completion_length=CONSTANT,
        importance_sampling_level="sequence" if asked.kind == "gspo" else "token",
        delta=asked.dual,
        use_bias_correction_kl=asked.kl_gradient == "ratio",
    )
    return loss


def openrlhf(case: Case, asked: Asked) -> Tensor:
    correction = asked.correction
    options: dict[str, Any] = {}
    if correction is not None:
        sequence = "sequence_mean" in (correction.level, correction.gate)
        if correction.level == "sequence_mean":
            case = with_mean_ratios(case)  # it gates by the mean, and weighs by tokens
        options = {
            "is_correction_level": "seq" if sequence else "token",
            "is_correction_mode": "clip" if correction.mode == "truncate" else "mask",
            "is_correction_threshold": [correction.low, correction.high],
        }
    module = load("openrlhf.models.loss").PolicyLoss(
        clip_eps_low=asked.low,
        clip_eps_high=asked.high,
        dual_clip=asked.dual,
        token_level_loss=asked.aggregation == "token_mean",
        policy_loss_type="gspo" if asked.kind == "gspo" else "ppo",
        **options,
    )
    loss, *_ = module(
        case.padded(case.logprobs),
        case.padded(case.proximal),
        case.padded(case.token_advantages),
        action_mask=case.mask,
        rollout_log_probs=case.padded(case.behaviour),
    )
    if asked.kl:
        penalty = load("openrlhf.models.utils").compute_approx_kl(
            case.padded(case.logprobs),
            case.padded(case.reference),
            kl_estimator="k3",
            unbiased_gradient=asked.kl_gradient == "k2",
        )
        aggregate = load("openrlhf.models.loss").aggregate_loss
        loss = loss + asked.kl * aggregate(penalty, case.mask, token_level_loss=asked.aggregation == "token_mean")
    return loss


def swift(case: Case, asked: Asked) -> Tensor:
    """ms-swift: its trainer without what its construction starts."""
    if asked.kl_gradient != "estimator":
        raise NotImplementedError("ms-swift differentiates its k3 as it is")
    trainer_class = load("swift.rlhf_trainers.grpo_trainer").GRPOTrainer
    trainer = object.__new__(trainer_class)
    loss_type = {"token_mean": "dapo", "sequence_mean": "grpo", "sequence_sum": "dr_grpo"}[asked.aggregation]

    def logprobs_and_entropies(*_: Any, **__: Any) -> tuple[Tensor, None]:
        return case.padded(case.logprobs), None

    def gathered(values: Tensor) -> Tensor:
        return values

    mode, threshold = _mode_of_swift(asked.correction)
    vars(trainer).update(
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=logprobs_and_entropies,
        args=SimpleNamespace(delta=asked.dual, gradient_accumulation_steps=1),
        accelerator=SimpleNamespace(num_processes=1, gather_for_metrics=gathered),
        compute_entropy=False,
        overlong_filter=False,
        beta=asked.kl,
        kl_in_reward=False,
        log_rollout_offpolicy_metrics=False,
        disable_rollout_importance_sampling=asked.correction is None,
        rollout_importance_sampling_mode=mode,
        rollout_importance_sampling_threshold=threshold,
        importance_sampling_level="sequence" if asked.kind == "gspo" else "token",
        loss_type="cispo" if asked.kind == "cispo" else loss_type,
        epsilon_low=asked.low,
        epsilon_high=1.0 + asked.high if asked.kind == "cispo" else asked.high,
        off_policy_sequence_mask_delta=None,
        max_completion_length=CONSTANT,
        sdar_loss_coef=0.0,
        chord_sft_iterator=None,
        model_accepts_loss_kwargs=False,
        compute_loss_func=None,
        current_gradient_accumulation_steps=1,
        _has_teacher=False,
    )
    batch = SimpleNamespace(
        completion_mask=case.mask.bool(),
        truncated_mask=None,
        ref_per_token_logps=case.padded(case.reference),
        old_per_token_logps=case.padded(case.proximal),
        rollout_per_token_logps=case.padded(case.behaviour),
        teacher_per_token_logps=None,
        advantages=case.padded(case.token_advantages),
        num_items_in_batch=case.mask.sum(),
    )
    loss, _ = trainer._compute_loss_and_metrics(None, None, batch)
    return loss


def _mode_of_swift(correction: Correction | None) -> tuple[str | None, float]:
    if correction is None:
        return None, FAR
    if correction.low:
        raise NotImplementedError("ms-swift has upper bounds only")
    sequence = "sequence_mean" in (correction.level, correction.gate)
    return f"{'sequence' if sequence else 'token'}_{correction.mode}", correction.high


def with_mean_ratios(case: Case) -> Case:
    """The ratio of each token is the mean one of its sequence, as ms-swift takes it."""
    trainer = load("swift.rlhf_trainers.grpo_trainer").GRPOTrainer
    ratios = (case.padded(case.proximal) - case.padded(case.behaviour)).exp()
    means = trainer._compute_sequence_level_ratios(None, ratios, case.mask)
    return replace(case, behaviour=case.proximal - case.sequences.spread(means.log()))


def areal(case: Case, asked: Asked) -> Tensor:
    """Packed, as ours: its mean is over all tokens."""
    correction = asked.correction
    sampling = None
    if correction is not None:
        sampling = load("areal.api.cli_args").RejectionSamplingConfig(
            level="token" if correction.level == "token" else "sequence",
            action="clamp" if correction.mode == "truncate" else "mask",
            metric="ratio",
            agg="mean",
            upper=correction.high,
            lower=correction.low or None,
        )
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), case.sequences.lengths.cumsum(0)])
    loss, _ = load("areal.utils.functional.functional").ppo_actor_loss_fn(
        case.logprobs,
        case.proximal,
        case.behaviour,
        case.token_advantages,
        eps_clip=asked.low,
        loss_mask=torch.ones(len(case.columns), dtype=torch.bool),
        eps_clip_higher=asked.high,
        c_clip=asked.dual,
        rejection_sampling=sampling,
        importance_sampling_level="sequence" if asked.kind == "gspo" else "token",
        cu_seqlens=ends,
    )
    return loss


def skyrl(case: Case, asked: Asked) -> Tensor:
    module = load("skyrl.backends.skyrl_train.utils.ppo_utils")
    name = {"clipped": "dual_clip" if asked.dual else "regular", "gspo": "gspo", "cispo": "cispo"}[asked.kind]
    reduction = {
        "token_mean": "token_mean",
        "sequence_mean": "sequence_mean",
        "sequence_sum": "seq_mean_token_sum_norm",
    }[asked.aggregation]
    advantages = module.apply_loss_reduction_to_advantages_minibatch(
        case.padded(case.token_advantages),
        case.mask,
        reduction,
        micro_batch_size=len(case.sequences.lengths),
        max_seq_len=CONSTANT,
    )
    if asked.correction is not None and asked.correction.level == "sequence_mean":
        case = with_mean_ratios(case)  # it gates by the mean, and weighs by tokens
    config = SimpleNamespace(
        policy_loss_type=name,
        loss_reduction=reduction,
        eps_clip_low=asked.low,
        eps_clip_high=asked.high,
        clip_ratio_c=asked.dual,
        cispo=SimpleNamespace(cispo_eps_clip_low=asked.low, cispo_eps_clip_high=asked.high),
        off_policy_correction=skyrl_correction(asked.correction),
    )
    loss, _ = module.PolicyLossRegistry.get(name)(
        case.padded(case.logprobs),
        case.padded(case.proximal),
        advantages,
        config,
        loss_mask=case.mask,
        rollout_logprobs=case.padded(case.behaviour),
    )
    return loss


def skyrl_correction(correction: Correction | None) -> SimpleNamespace:
    names = ("tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low")
    names += ("outlier_token_is_threshold_high", "token_mask_is_threshold_low", "token_mask_is_threshold_high")
    found = SimpleNamespace(**dict.fromkeys(names))
    if correction is None:
        return found
    found.tis_ratio_type = "sequence" if correction.level == "sequence_product" else "token"
    found.token_tis_ratio_clip_high = found.sequence_tis_ratio_clip_high = FAR
    if correction.mode == "truncate":
        found.token_tis_ratio_clip_high = found.sequence_tis_ratio_clip_high = correction.high
    elif "sequence_mean" in (correction.level, correction.gate):
        found.sequence_mask_metric = "geometric"
        found.geo_mask_low, found.geo_mask_high = correction.low, correction.high
    elif correction.level == "sequence_product":
        found.sequence_mask_metric = "product"
        found.product_mask_low, found.product_mask_high = correction.low, correction.high
    elif correction.level == "token":
        found.token_mask_is_threshold_low = max(correction.low, math.exp(-19))
        found.token_mask_is_threshold_high = correction.high
    return found


LIBRARIES: dict[str, Loss] = {
    "verl": verl,
    "trl": trl,
    "liger": liger,
    "openrlhf": openrlhf,
    "areal": areal,
    "skyrl": skyrl,
    "swift": swift,
}
