"""What the settings of the objective add up to, and which of them cannot go together. Pure, no torch.

    trainer.loss names a recipe; what else is set replaces its parts one by one.

The proximal policy follows from `trainer.correction`. For `clip` it is the policy that sampled: PPO's and GRPO's ratio
against the recorded log p. Else it is the one at the window's beginning: with a single update that is the current one
(the ratio is 1, its clip never acts, and the weight alone corrects: REINFORCE under importance weights), with several
it is decoupled PPO (arXiv:2505.24298).
"""

from __future__ import annotations

from dataclasses import replace

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import TrainerSettings
from fulgurite.streams.objectives.advantages import BY_TOKEN
from fulgurite.streams.objectives.recipes import PolicyLoss, find
from fulgurite.streams.trainer.unused import idle_recipe, set_otherwise, unused_setting


def recipe_of(settings: TrainerSettings) -> PolicyLoss:
    """The published recipe with what the settings replace. Raises SettingsError for a clip that makes no sense."""
    recipe = find(settings.loss)
    try:
        recipe = recipe.with_clip(settings.clip_low, settings.clip_high, settings.dual_clip)
    except ValueError as error:
        name = "clip_high" if settings.dual_clip is None else "dual_clip"
        raise SettingsError(f"trainer.{name} = {getattr(settings, name):g}: {error}") from None
    if settings.advantage != "recipe":
        recipe = replace(recipe, advantage=settings.advantage)
    if settings.aggregation != "recipe":
        recipe = replace(recipe, aggregation=settings.aggregation)
    return recipe


def check_objective(settings: TrainerSettings) -> None:
    """Raises SettingsError, naming the setting, for what would be ignored or could not be computed."""
    if wrong := _dual_clip_fault(settings, find(settings.loss)):
        raise SettingsError(wrong)
    recipe = recipe_of(settings)
    faults = _loss_fault(settings, recipe), _imitation_fault(settings), _correction_fault(settings, recipe)
    for wrong in (
        *faults,
        _fill_fault(settings, recipe),
        _terms_fault(settings),
        unused_setting(settings, recipe),
        idle_recipe(settings),
    ):
        if wrong:
            raise SettingsError(wrong)


def _loss_fault(settings: TrainerSettings, recipe: PolicyLoss) -> str:
    if recipe.aggregation == "sequence_sum" and settings.length_constant is None:
        return (
            f"trainer.length_constant is not set: trainer.loss = {settings.loss} with aggregation sequence_sum divides "
            "by it; set the most tokens that can be sampled in a sequence"
        )
    if recipe.aggregation != "sequence_sum" and settings.length_constant is not None:
        return (
            f"trainer.length_constant = {settings.length_constant}: aggregation {recipe.aggregation} has no such thing"
        )
    return ""


def _dual_clip_fault(settings: TrainerSettings, recipe: PolicyLoss) -> str:
    if settings.dual_clip is None:
        return ""
    if recipe.surrogate not in ("clipped", "sequence_clipped"):
        return f"trainer.dual_clip = {settings.dual_clip:g}: trainer.loss = {settings.loss} has no dual clip"
    if settings.correction != "clip" and settings.epochs * settings.minibatches == 1:
        return (
            f"trainer.dual_clip = {settings.dual_clip:g} never acts with trainer.correction = {settings.correction} "
            "and one update a window: the ratio it bounds is 1"
        )
    return ""


def _fill_fault(settings: TrainerSettings, recipe: PolicyLoss) -> str:
    if settings.incomplete == "fill" and recipe.advantage == "batch_normalised":
        return (
            f"trainer.incomplete = fill: with trainer.loss = {settings.loss} and advantage batch_normalised a rollout "
            "counts by its tokens, and what is filled in has none; set mask or drop"
        )
    return ""


def _imitation_fault(settings: TrainerSettings) -> str:
    if settings.loss != "sft":
        if settings.advantage == "one":
            return (
                f"trainer.advantage = one: with trainer.loss = {settings.loss} no reward would count; it is for sft, "
                "leave it out"
            )
        for name in set_otherwise(settings, ("best_share", "best_threshold", "demonstrations")):
            return f"trainer.{name} has no effect: trainer.loss is {settings.loss}, not sft"
        return ""
    if settings.advantage not in ("recipe", "one"):
        return f"trainer.advantage = {settings.advantage}: trainer.loss = sft learns what was best, as it is"
    if settings.credit != "rollout" or settings.kl_in_reward:
        name = "kl_in_reward" if settings.kl_in_reward else f"credit = {settings.credit}"
        return f"trainer.{name}: trainer.loss = sft has no advantages that it could change"
    if settings.demonstrations is None:
        return ""
    of_rollouts = ("best_share", "best_threshold", "max_mismatch_kl", "min_effective_sample_size", "tasks")
    for name in set_otherwise(settings, of_rollouts):
        return f"trainer.{name} has no effect with trainer.demonstrations: there are no rollouts"
    if settings.kl_coefficient and settings.kl_gradient == "ratio":
        return (
            "trainer.kl_gradient = ratio: demonstrations were sampled by nobody, so there is no ratio to the sampler; "
            "leave it out"
        )
    return ""


def _correction_fault(settings: TrainerSettings, recipe: PolicyLoss) -> str:
    if settings.loss == "sft":
        # - log p has no ratio: what older versions sampled is learned as it is, and nothing is there to be corrected.
        return (
            ""
            if settings.correction in ("clip", "none")
            else (
                f"trainer.correction = {settings.correction}: trainer.loss = sft has no ratio to correct; leave it out"
            )
        )
    if settings.correction == "clip" and recipe.surrogate == "reinforce":
        return (
            f"trainer.correction = clip: trainer.loss = {settings.loss} has no ratio that could be clipped; set "
            "truncate, mask or none"
        )
    if settings.importance_gate is not None and settings.correction != "mask":
        return f"trainer.importance_gate = {settings.importance_gate}: only trainer.correction = mask has a gate"
    if settings.correction in ("clip", "none"):
        if settings.importance_level != "token":
            return (
                f"trainer.importance_level = {settings.importance_level}: trainer.correction = {settings.correction} "
                "has no weights; set truncate or mask"
            )
        if settings.importance_low:
            return (
                f"trainer.importance_low = {settings.importance_low:g}: trainer.correction = {settings.correction} has "
                "no weights; set truncate or mask"
            )
        return ""
    if not settings.importance_low < 1.0 <= settings.importance_cap:
        return (
            f"trainer.importance_low = {settings.importance_low:g} and trainer.importance_cap = "
            f"{settings.importance_cap:g}: 1, the weight of what the current policy sampled, must lie between them"
        )
    return ""


def _terms_fault(settings: TrainerSettings) -> str:
    if settings.credit == "rollout" and settings.credit_discount != 1.0:
        return (
            f"trainer.credit_discount = {settings.credit_discount:g}: trainer.credit = rollout gives all calls the "
            "same; set discounted or call"
        )
    if settings.kl_in_reward and not settings.kl_coefficient:
        return "trainer.kl_in_reward: trainer.kl_coefficient is 0, there is no penalty to take from the reward"
    if settings.kl_in_reward and settings.credit == "discounted" and recipe_of(settings).advantage in BY_TOKEN:
        return (
            f"trainer.credit = discounted: with trainer.kl_in_reward and trainer.loss = {settings.loss} every token "
            "has what it led to; set rollout or call"
        )
    if settings.kl_coefficient:
        if settings.kl_in_reward and settings.kl_gradient != "estimator":
            return (
                f"trainer.kl_gradient = {settings.kl_gradient}: with trainer.kl_in_reward the penalty has no gradient"
            )
        if settings.kl_estimator == "k1" and settings.kl_gradient == "estimator" and not settings.kl_in_reward:
            return (
                "trainer.kl_gradient = estimator: k1 has a gradient of 0 on average, no penalty at all; set k2 or ratio"
            )
        if (settings.reference or settings.model) is None:
            return (
                "trainer.reference is empty, and so is trainer.model: trainer.kl_coefficient needs a reference policy"
            )
    if settings.overlong_buffer_tokens:
        if settings.overlong_max_tokens is None:
            return (
                f"trainer.overlong_max_tokens is not set: trainer.overlong_buffer_tokens = "
                f"{settings.overlong_buffer_tokens} are the last before it"
            )
        if settings.overlong_buffer_tokens > settings.overlong_max_tokens:
            return (
                f"trainer.overlong_buffer_tokens = {settings.overlong_buffer_tokens} is more than "
                f"trainer.overlong_max_tokens = {settings.overlong_max_tokens}"
            )
    updates = settings.steps * settings.epochs * settings.minibatches
    if settings.schedule != "constant" and settings.warmup_steps >= updates:
        return (
            f"trainer.warmup_steps = {settings.warmup_steps}: the learning rate cannot fall (trainer.schedule = "
            f"{settings.schedule}) within the {updates} updates of trainer.steps = {settings.steps}"
        )
    return ""
