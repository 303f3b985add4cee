"""The trainer's settings: the run, its windows, the objective, what makes a step unfit, the optimizer, the machine.

What cannot go together is refused by the trainer's plan before anything is loaded. Knows nothing of the trainer's code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fulgurite.schemas.event import Name
from fulgurite.schemas.ids import Id
from fulgurite.schemas.rewards import MAX_REWARD
from fulgurite.schemas.sections import Seconds, Section

LossName = Literal[
    "dapo",
    "grpo",
    "dr_grpo",
    "gspo",
    "cispo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "ppo",
    "ppo_dual_clip",
    "reinforce",
    "sft",
]
AdvantageName = Literal[
    "recipe",
    "group_normalised",
    "mean_centred",
    "leave_one_out",
    "batch_normalised",
    "group_mean_batch_normalised",
    "one",
]
MAX_COUNT = 2**31 - 1
MAX_RATIO = 1e6
MAX_WEIGHT = 1e6
"""What float32 and int32 compute with still; what is beyond was a slip, or meant "no bound"."""

RatioLevel = Literal["token", "sequence_mean", "sequence_product"]


GROUPS = {
    "The run": "run_id",
    "Windows": "steps",
    "The objective": "loss",
    "What makes a step unfit": "max_logprob_difference",
    "The optimizer": "learning_rate",
    "The machine": "micro_batch_tokens",
    "Rollouts it asks for": "sampling_parameters",
    "Everything else": "keep_versions",
}
"""Groups of settings for who reads their list: title and first setting, in the order of the fields."""


class TrainerSettings(Section):
    run_id: str = ""
    """Name of the run; a restart with the same name goes on where it stood. Required."""
    resource: Id = "policy"
    """Which policy it makes versions of."""
    model: Path | None = None
    """Folder of the model to start from (Hugging Face format)."""
    output: Path = Path(".fulgurite/policy")
    """Where checkpoints and versions are written; servers must be able to read it."""
    tasks: str = ""
    """Where tasks come from, as module:function; function(index) gives the task's input as JSON-able value."""
    agent: Name = ""
    """Recorded on its rollouts, for streams with several agents."""
    agents: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list[str])
    """Whose calls are trained on, where several agents act in a rollout: the names on their spans. Empty: all."""
    steps: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 60
    """Versions to make."""
    groups_per_step: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Complete groups in a window."""
    group_size: Annotated[int, Field(ge=2, le=1_024)] = 8
    """Rollouts of one task."""
    group_deadline_seconds: Seconds = 120.0
    """After its first trajectory a group waits this long for the rest; then it closes with who is there."""
    lost_after_seconds: Seconds | None = None
    """So long after all rollouts of a group ended, by the coordinator, without a record of any, its deadline counts all
    the same: for what Kafka's retention took before the assembler or an aggregator had read it. Choose it longer than
    these may be behind, or wait for a judge. Not set: such a group is waited for, and the log says so."""
    incomplete: Literal["mask", "drop", "fill"] = "mask"
    """Of groups with a member that gives no data (failed, partial, stale, not there at the deadline). mask: the others,
    two at least, are compared with each other; drop: the group is; fill: its reward counts in the comparison, or
    fill_reward where it has none, and nothing of it is trained on."""
    fill_reward: Annotated[float, Field(ge=-MAX_REWARD, le=MAX_REWARD)] = 0.0
    """For incomplete = fill."""
    window_seconds: Seconds | None = None
    """Windows by time: a window whose first complete group has waited so long is closed with what is there, at least
    one group. Not set: it waits for groups_per_step."""
    overlap_groups: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Sliding windows: a window has this many groups of earlier ones besides its new ones, the newest that
    max_staleness allows. A rollout is trained on once in each window that it is in."""
    overlap_seconds: Seconds | None = None
    """The same by time: such groups are at most so much older than the window's newest. Not set: any age."""
    max_staleness: Annotated[int, Field(ge=0, le=1_000)] = 4
    """Rollouts with a token more versions behind are dropped."""
    pacing_staleness: Annotated[int, Field(ge=0, le=1_000)] = 1
    """How many versions rollouts may run ahead: new ones are asked for only so far."""
    zero_variance: Literal["recipe", "drop", "keep", "refill"] = "recipe"
    """Groups whose rewards do not differ. recipe: keep where the advantage is over the window alone, as that of
    reinforce_plus_plus, so that they have one too; else drop. drop: not trained on, though they are groups of their
    window and count in means over it; refill: dropped before a window is made, and others asked for in their place
    (DAPO's dynamic sampling), at most ten windows' worth for one window; keep: trained on like others, in the
    denominators of the loss and under its KL and entropy."""
    loss: LossName = "dapo"
    """The published objective: how a token's ratio is made and clipped, and what trainer.advantage,
    trainer.aggregation, trainer.clip_low, trainer.clip_high and trainer.dual_clip are where they are not set."""
    best_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """For sft: which share of each group is learned from, its best by reward, at least one."""
    best_threshold: float | None = None
    """For sft: the least reward of what is learned from. Not set: any, but then groups whose rewards do not differ are
    dropped as trainer.zero_variance says."""
    demonstrations: Path | None = None
    """For sft: a file of demonstrations to learn from, trainer.groups_per_step of them a step, instead of rollouts: one
    JSON object a line with messages, prompt and completion, token ids, or a trajectory (docs/algorithms.md)."""
    advantage: AdvantageName = "recipe"
    """How much better a rollout was than its baseline, from its group's or its window's rewards; recipe: as
    trainer.loss."""
    credit: Literal["rollout", "discounted", "call"] = "rollout"
    """Which tokens get it. rollout: all of a rollout's alike; discounted: those of a call, times credit_discount for
    each call after it; call: each call's own, from rewards that name its span (the rollout's reward is its last
    call's) and credit_discount times what followed, compared with all calls of the group."""
    credit_discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Gamma from call to call, for discounted and call."""
    aggregation: Literal["recipe", "token_mean", "sequence_mean", "sequence_sum"] = "recipe"
    """How losses of tokens become the window's: every token counts the same, every sequence does, or sums of sequences
    over trainer.length_constant; recipe: as trainer.loss."""
    length_constant: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Tokens: what sequence_sum (of dr_grpo) divides by, the most that can be sampled in a sequence. Required there."""
    clip_low: Annotated[float, Field(ge=0, le=1)] | None = None
    """Clip of the ratio below: ratio >= 1 - clip_low. Not set: as trainer.loss (dapo: 0.2)."""
    clip_high: Annotated[float, Field(ge=0, le=MAX_RATIO)] | None = None
    """Clip of the ratio above: ratio <= 1 + clip_high. Not set: as trainer.loss (dapo: 0.28)."""
    dual_clip: Annotated[float, Field(gt=1, le=MAX_RATIO)] | None = None
    """Largest ratio that counts where the advantage is negative. Not set: as trainer.loss (ppo_dual_clip: 3, others
    have none)."""
    correction: Literal["clip", "truncate", "mask", "none"] = "clip"
    """For tokens of older versions. clip: the loss's ratio is that of current to sampling policy, and its clip holds
    it; truncate: that ratio as a weight without gradient, at most importance_cap; mask: as a weight that is 0 outside
    [importance_low, importance_cap]; none: no correction, to see what it is worth."""
    importance_level: RatioLevel = "token"
    """Of the weight of truncate and mask: each token's ratio, its sequence's geometric mean, or its sequence's
    product."""
    importance_gate: RatioLevel | None = None
    """For mask: the ratio that the bounds are for, where it is not the weight itself."""
    importance_low: Annotated[float, Field(ge=0, le=MAX_RATIO)] = 0.0
    """Bound of the weight below, for truncate and mask."""
    importance_cap: Annotated[float, Field(gt=0, le=MAX_RATIO)] = 2.0
    """Bound of the weight above, for truncate and mask."""
    kl_coefficient: Annotated[float, Field(ge=0, le=MAX_WEIGHT)] = 0.0
    """Weight of the KL penalty against a frozen reference policy; 0: none, and no reference is loaded."""
    kl_in_reward: bool = False
    """Take it from the reward instead of adding it to the loss: kl_coefficient times the estimates of tokens, by the
    log p of the policy that sampled them. For reinforce_plus_plus each token pays for itself and those after it; for
    others all tokens of a rollout (or call) pay for their sum. Advantages over the window compare with groups dropped
    for zero variance, too: the reference scores these as well, so that what is compared is the same with and without
    the penalty, and all of it pays."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Its value on sampled tokens, with d = log p_ref - log p: k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d."""
    kl_gradient: Literal["estimator", "k2", "ratio"] = "estimator"
    """Its gradient. estimator: its formula's own; k2: that of KL(p || p_ref) on tokens of the current policy; ratio:
    the same on tokens of older ones too, as they are weighed by p / p_old."""
    reference: Path | None = None
    """Folder of the reference policy, whole on every rank. Not set: trainer.model."""
    entropy_coefficient: Annotated[float, Field(ge=0, le=MAX_WEIGHT)] = 0.0
    """Weight of the entropy bonus, in nats a token; 0: none."""
    overlong_buffer_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    """Over the last so many tokens before overlong_max_tokens the reward falls by up to overlong_penalty (DAPO); 0: it
    does not."""
    overlong_max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Sampled tokens of a rollout at which it has fallen all the way. Required with overlong_buffer_tokens."""
    overlong_penalty: Annotated[float, Field(gt=0, le=MAX_REWARD)] = 1.0
    """By how much, in units of the reward."""
    max_logprob_difference: Annotated[float, Field(gt=0)] | None = None
    """Largest |difference| of log p between trainer and sampler for tokens that the weights under training sampled;
    beyond it the step is a bad one, and so is each that has nothing to compare until one agrees. Not set: 1e-3 in
    float32; 0.5 in bfloat16, whose rounding alone makes hundredths, and more of rare tokens."""
    on_bad_step: Literal["stop", "skip"] = "skip"
    """A step whose loss or gradient is no number, or past the bound above or one of the three below, changes nothing.
    skip: it makes a version of the same weights, and the ledger names its rollouts and the reason; of several updates
    only that one is left out, with the rollouts that no other was made of. stop: the run ends with the reason."""
    max_bad_steps: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 5
    """With skip: so many of them in a row, and the run ends after all."""
    grad_norm_limit: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm, before it is clipped to max_grad_norm. Not set: any number."""
    max_mismatch_kl: Annotated[float, Field(gt=0)] | None = None
    """Largest KL(sampler || trainer) over a window's tokens, in nats a token (estimator k3). Not set: any."""
    min_effective_sample_size: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Least share of its n tokens that a window is worth, by the ratios r of current to sampling policy:
    (sum r)^2 / (n sum r^2). Not set: any."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 4e-4
    """AdamW's, at its highest."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after the warm-up: how it falls to min_learning_rate_ratio until the updates of
    trainer.steps windows are done."""
    warmup_steps: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 10
    """Updates over which the learning rate rises from 0, linearly."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What of learning_rate is left at the end, for linear and cosine."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """AdamW's second."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    """AdamW's."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    epochs: Annotated[int, Field(ge=1, le=16)] = 1
    """Passes over a window."""
    minibatches: Annotated[int, Field(ge=1, le=64)] = 1
    """Optimizer updates of one pass, each from as many of the window's rollouts, drawn anew for every pass. With more
    than one update a window, correction = truncate or mask is decoupled PPO: the clipped ratio is against the policy at
    the window's beginning, whose tokens are scored once more for it."""
    micro_batch_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 16_384
    """Tokens of one forward pass."""
    share_prompts: bool = True
    """Compute a prompt that sequences have in common, as a group's have, once in a forward pass and not for each."""
    lora_rank: Annotated[int, Field(ge=0, le=4_096)] = 0
    """Rank of a LoRA adapter, which alone is trained and published; servers must have trainer.model as it is. 0: all
    weights are trained."""
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    """What the adapter adds is multiplied by lora_alpha / lora_rank."""
    lora_target_modules: list[str] = Field(default_factory=list)
    """Names of the layers that get an adapter, for example q_proj, v_proj. Empty: all linear ones but the output
    layer."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them: less memory for a third more
    time."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed's ZeRO stage, for several processes under torchrun; 0: plain torch on one device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass and of published weights. The optimizer's own copy is float32 always; so are sums of
    gradients over micro-batches, but with zero_stage = 1."""
    sampling_parameters: dict[str, Any] = Field(default_factory=lambda: {"temperature": 1.0})
    """For the agent's LLM calls. Temperature must be 1 for the recorded logprobs to be the policy's."""
    rollout_timeout_seconds: Seconds = 60.0
    """Longest one attempt may take."""
    keep_versions: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 8
    """Newest versions' files that are kept on disk."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """torch threads."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Of everything random in the trainer."""
    metrics_host: str = "127.0.0.1"
    """Where /metrics and /health listen; under torchrun on rank 0 alone."""
    metrics_port: Annotated[int, Field(ge=0, lt=65_536)] = 0
    """0: nowhere."""
