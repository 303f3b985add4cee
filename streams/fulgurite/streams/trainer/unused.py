"""Settings that nothing would read, given the others: whoever set one believes that it does something. Pure, no torch.

Only what was set counts, and not to its default: defaults never fail, neither does a record of all settings of a run,
nor what a replay takes from its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.objectives.recipes import PolicyLoss

_CLIP = ("clip_low", "clip_high")
_WEIGHT = ("importance_cap",)
_ADAPTER = ("lora_alpha", "lora_target_modules")
_PENALTY = ("kl_estimator", "kl_gradient", "reference")
_OVERLONG = ("overlong_penalty", "overlong_max_tokens")
_OF_SFT = (
    "importance_level",
    "importance_gate",
    "importance_low",
    "importance_cap",
    "overlong_buffer_tokens",
    *_OVERLONG,
)
_OF_ROLLOUTS = (
    "overlap_groups",
    "overlap_seconds",
    "incomplete",
    "agents",
    "window_seconds",
    "group_size",
    "group_deadline_seconds",
    "lost_after_seconds",
    "max_staleness",
    "pacing_staleness",
    "zero_variance",
    "agent",
    "max_logprob_difference",
    "sampling_parameters",
    "rollout_timeout_seconds",
)
_ALL_RATIO = {
    "gspo": "loss = grpo (importance_level = sequence_mean weighs sequences)",
    "ppo_dual_clip": "loss = ppo",
}
"""Recipes that differ from another one by what they do with a ratio alone, and that other one."""


def set_otherwise(settings: TrainerSettings, names: Iterable[str]) -> Iterator[str]:
    """Those of them that were set, and to something else than by default."""
    for name in names:
        default = TrainerSettings.model_fields[name].get_default(call_default_factory=True)
        if name in settings.model_fields_set and getattr(settings, name) != default:
            yield name


def unused_setting(settings: TrainerSettings, recipe: PolicyLoss) -> str:
    """What is wrong with the first that is set and not read; empty where there is none."""
    for names, why in _unread(settings, recipe):
        for name in set_otherwise(settings, names):
            return f"trainer.{name} has no effect: {why}"
    return ""


def idle_recipe(settings: TrainerSettings) -> str:
    """What is wrong where a recipe's ratio, all that tells it from another, is always 1; else empty."""
    if settings.loss not in _ALL_RATIO or settings.correction == "clip" or settings.epochs * settings.minibatches > 1:
        return ""
    return (
        f"trainer.loss = {settings.loss} has no effect of its own: with trainer.correction = {settings.correction} and "
        f"one update a window the ratio that it bounds is 1; set {_ALL_RATIO[settings.loss]}, correction = clip, or "
        "more trainer.epochs or trainer.minibatches"
    )


def _unread(settings: TrainerSettings, recipe: PolicyLoss) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are not read, and why."""
    is_sft = settings.loss == "sft"
    if is_sft:
        yield _OF_SFT, "trainer.loss = sft has no ratio to weigh and no advantage to lessen; leave it out"
    if settings.demonstrations is not None:
        yield _OF_ROLLOUTS, "with trainer.demonstrations there are no rollouts; leave it out"
    if recipe.surrogate == "reinforce":
        yield _CLIP, f"trainer.loss = {settings.loss} has no ratio that could be clipped; leave it out"
    elif settings.correction != "clip" and settings.epochs * settings.minibatches == 1:
        yield (
            _CLIP,
            (
                f"with trainer.correction = {settings.correction} and one update a window the ratio is 1; set "
                "correction = clip, or more trainer.epochs or trainer.minibatches"
            ),
        )
    if settings.correction in ("clip", "none"):
        yield _WEIGHT, f"trainer.correction = {settings.correction} has no weights; set truncate or mask"
    if not settings.lora_rank:
        yield _ADAPTER, "trainer.lora_rank is 0, all weights are trained; set it to the adapter's rank"
    if settings.on_bad_step == "stop":
        yield ("max_bad_steps",), "trainer.on_bad_step = stop ends the run at the first; set skip"
    if settings.schedule == "constant":
        yield ("min_learning_rate_ratio",), "trainer.schedule = constant does not fall; set linear or cosine"
    if not settings.kl_coefficient:
        yield _PENALTY, "trainer.kl_coefficient is 0, there is no KL penalty; set its weight"
    if not settings.overlong_buffer_tokens:
        yield _OVERLONG, "trainer.overlong_buffer_tokens is 0, no length is penalised; set the tokens over which it is"
