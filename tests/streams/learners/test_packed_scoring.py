"""Packed sequences are scored as each alone, in memory that does not grow with the vocabulary."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTJConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from fulgurite.schemas.errors import SettingsError
from fulgurite.streams.learners.attention import NAME, fits_flash, layout_of
from fulgurite.streams.learners.packing import LEAST_SHARED_TOKENS, pack, plan, shared_prompts, tokens_once
from fulgurite.streams.learners.policy import Policy, load_policy
from fulgurite.streams.learners.scoring import token_scores
from fulgurite.streams.trainer.sample import Sample

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}


def model_of(config: PreTrainedConfig, attention: str = NAME) -> Any:
    torch.manual_seed(3)
    # A copy: a model writes its attention into its config.
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()


def sample(length: int, seed: int, *, prompt: int = 1) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return Sample(
        rollout_id=f"r{seed}",
        token_ids=torch.randint(0, VOCABULARY, (length,), generator=generator).tolist(),
        loss_mask=[0] * prompt + [1] * (length - prompt),
        behaviour_logprobs=[-1.0] * length,
        versions=[1] * length,
        advantage=float(seed),
    )


def alone(model: Any, each: Sample) -> Tensor:
    """[T - prompt] log p of the sampled tokens of one sequence, by the plain model and the plain formula."""
    logits = model(input_ids=torch.tensor([each.token_ids])).logits[0]
    log_p = torch.log_softmax(logits.double(), -1)
    return torch.stack([log_p[at - 1, each.token_ids[at]] for at, mask in enumerate(each.loss_mask) if mask])


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen3Config(**SIZES), MistralConfig(**SIZES)])
def test_packed_sequences_are_scored_as_each_alone_with_the_same_gradient(config: PreTrainedConfig) -> None:
    samples = [sample(length, number, prompt=1 + number) for number, length in enumerate((7, 33, 4, 18))]
    plain = model_of(config, "eager")
    policy = Policy(model_of(config), chunk_tokens=5)
    logprobs, entropy = policy(pack(samples))
    expected = torch.cat([alone(plain, each) for each in samples])
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=0)
    assert (entropy > 0).all()
    weights = torch.linspace(-1, 1, len(expected))
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(policy.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4)


def rollouts(prompt: list[int], lengths: list[int], first: int) -> list[Sample]:
    """A group's: one prompt, answers of these lengths."""
    return [
        replace(found, token_ids=prompt + found.token_ids[len(prompt) :])
        for found in (
            sample(len(prompt) + length, first + number, prompt=len(prompt)) for number, length in enumerate(lengths)
        )
    ]


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen3Config(**SIZES)])
def test_a_common_prompt_is_computed_once_and_changes_neither_scores_nor_gradients(config: PreTrainedConfig) -> None:
    one, other = sample(24, 7).token_ids, sample(LEAST_SHARED_TOKENS, 8).token_ids
    group, second = rollouts(one, [9, 1, 30, 12], 10), rollouts(other, [5, 20], 20)
    alone_here, short = sample(40, 30, prompt=30), rollouts(one[:5], [6, 6], 40)
    samples = [group[0], second[0], alone_here, *group[1:], *short, second[1]]
    plain = model_of(config, "eager")
    policy = Policy(model_of(config), chunk_tokens=5)
    batch = pack(samples, share_prompts=True)
    saved = 3 * len(one) + len(other)
    assert len(batch.token_ids) == len(batch.position_ids) == sum(len(each.token_ids) for each in samples) - saved
    assert saved == sum(len(s.token_ids) for s in samples) - tokens_once(samples, shared_prompts(samples))
    logprobs, _ = policy(batch)
    expected = torch.cat([alone(plain, each) for each in samples])
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=0)
    weights = torch.linspace(-1, 1, len(expected))
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(policy.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4)


def test_a_batch_without_a_common_prompt_is_packed_as_ever() -> None:
    samples = [sample(30, seed, prompt=20) for seed in range(3)]
    ours, plain = pack(samples, share_prompts=True), pack(samples)
    assert ours.layout.places is None
    for name in ("token_ids", "position_ids", "predicting", "targets", "sequences"):
        assert torch.equal(getattr(ours, name), getattr(plain, name))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 200), st.integers(2, 200)), min_size=1, max_size=20),
    st.integers(1, 5),
    st.integers(100, 1_500),
)
@hypothesis_settings(deadline=None, max_examples=200)
def test_a_plan_keeps_groups_together_and_within_the_bound(
    groups: list[tuple[int, int, int]], ranks: int, max_tokens: int
) -> None:
    together: list[list[int]] = []
    lengths: list[int] = []
    prompts: list[int] = []
    for members, prompt, answer in groups:
        together.append(list(range(len(lengths), len(lengths) + members)))
        lengths += [prompt + answer] * members
        prompts += [prompt] * members
    found = plan(lengths, max_tokens=max_tokens, ranks=ranks, together=together, prompts=prompts)
    assert len({len(batches) for batches in found}) == 1
    assert sorted(number for batches in found for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in (batch for batches in found for batch in batches):
        # What really lies in it: each prompt once, whoever put its readers there.
        once = sum(max((prompts[n] for n in batch if n in group), default=0) for group in together)
        assert len(batch) <= 1 or once + sum(lengths[n] - prompts[n] for n in batch) <= max_tokens
    if ranks == 1 and all(sum(lengths[number] for number in group) <= max_tokens for group in together):
        assert all(any(set(group) <= set(batch) for batch in found[0]) for group in together)


def test_what_another_sequence_says_changes_nothing_at_all() -> None:
    policy = Policy(model_of(LlamaConfig(**SIZES)))
    mine = sample(12, 1)
    with torch.no_grad():
        beside = [policy(pack([sample(20, seed), mine, sample(20, seed + 1)]))[0][19:30] for seed in (5, 50)]
    assert torch.equal(*beside)


def test_a_model_that_cannot_be_scored_exactly_is_refused() -> None:
    capped = Gemma2Config(**SIZES, final_logit_softcapping=0.5, attn_logit_softcapping=None, sliding_window=64)
    with pytest.raises(SettingsError, match="not its output layer"):
        Policy(model_of(capped))
    window = Policy(model_of(MistralConfig(**SIZES, sliding_window=16)))
    window(pack([sample(16, 1)]))
    with pytest.raises(SettingsError, match="attends to 16 tokens only"):
        window(pack([sample(17, 1)]))


PARTS: dict[str, Any] = {name: value for name, value in SIZES.items() if name != "head_dim"}
LONG_POSITIONS: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 2.0, 5.0],
}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GptOssConfig(**SIZES, num_local_experts=2), "has attention sinks"),
        (Gemma2Config(**SIZES, final_logit_softcapping=None, attn_logit_softcapping=0.5), "caps its attention"),
        (Lfm2Config(**PARTS, layer_types=["conv", "full_attention"]), "not those of each alone"),
        (
            Qwen3NextConfig(
                **SIZES, layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1
            ),
            "not those of each alone",
        ),
        (Phi3Config(**PARTS, pad_token_id=0, rope_parameters=LONG_POSITIONS), r"\(longrope\) depend on the longest"),
        (MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4), "cannot"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else "",
)
def test_sinks_caps_states_and_lengths_that_leak_are_refused(config: PreTrainedConfig, said: str) -> None:
    config.initializer_range = 0.3  # what leaks, shows
    with pytest.raises(SettingsError, match=said):
        Policy(model_of(config))


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
        GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),
    ],
)
def test_a_model_with_a_list_of_attentions_of_its_own_is_refused(config: PreTrainedConfig, tmp_path: Path) -> None:
    model_of(config, "eager").save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=r"attentions of its own, .* cannot be trained here"):
        load_policy(tmp_path)


@given(st.lists(st.integers(2, 300), min_size=1, max_size=60), st.integers(1, 5), st.integers(100, 700))
@hypothesis_settings(deadline=None, max_examples=200)
def test_a_plan_has_every_sample_once_and_equally_many_micro_batches_a_rank(
    lengths: list[int], ranks: int, max_tokens: int
) -> None:
    found = plan(lengths, max_tokens=max_tokens, ranks=ranks)
    assert len(found) == ranks
    assert len({len(batches) for batches in found}) == 1
    assert sorted(number for batches in found for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in (batch for batches in found for batch in batches):
        assert len(batch) <= 1 or sum(lengths[number] for number in batch) <= max_tokens
    assert len(found[0]) <= 2 * -(-sum(lengths) // (max_tokens * ranks)) + sum(n > max_tokens // 2 for n in lengths)


def test_a_plan_without_samples_and_with_fewer_than_ranks() -> None:
    assert plan([], max_tokens=10, ranks=2) == [[], []]
    assert plan([5], max_tokens=10, ranks=3) == [[[0]], [[]], [[]]]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1_000])
def test_chunks_change_no_number(chunk_tokens: int) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(64, 16, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(16, VOCABULARY, bias=False).double()
    targets = torch.randint(0, VOCABULARY, (64,))
    logprobs, entropy = token_scores(hidden, head, targets, chunk_tokens=chunk_tokens, entropy_gradient=True)
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    found = (hidden.grad, head.weight.grad)
    hidden.grad = head.weight.grad = None
    log_p = torch.log_softmax(head(hidden).float(), -1)
    expected = log_p[torch.arange(64), targets]
    (expected.sum() + 0.3 * -(log_p.exp() * log_p).sum()).backward()
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=0)
    for ours, theirs in zip(found, (hidden.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_largest_tensor_has_one_chunk_of_logits() -> None:
    """Measured on the autograd graph: what is saved for backward does not have N * V elements anywhere."""
    hidden = torch.randn(512, 8, requires_grad=True)
    head = torch.nn.Linear(8, 4_000, bias=False)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprobs, _ = token_scores(hidden, head, torch.zeros(512, dtype=torch.int64), chunk_tokens=32)
    assert max(saved, default=0) <= 32 * 4_000
    logprobs.sum().backward()
    assert hidden.grad is not None


def test_the_entropy_of_ruled_out_tokens_has_a_gradient_without_nan() -> None:
    logits = torch.tensor([[0.0, -50.0, -200.0, -torch.inf], [1.0, 1.0, -torch.inf, -torch.inf]], requires_grad=True)
    _, entropy = token_scores(logits, torch.clone, torch.tensor([0, 1]), chunk_tokens=8, entropy_gradient=True)
    assert entropy.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
    entropy.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_nan_stays_one_and_no_tokens_are_no_error() -> None:
    hidden = torch.full((2, 4), float("nan"))
    head = torch.nn.Linear(4, 5)
    logprobs, entropy = token_scores(hidden, head, torch.tensor([0, 1]), chunk_tokens=8)
    assert logprobs.isnan().all()
    assert entropy.isnan().all()
    assert token_scores(hidden[:0], head, torch.zeros(0, dtype=torch.int64), chunk_tokens=8)[0].shape == (0,)
    with pytest.raises(ValueError, match="at least one token"):
        layout_of([3, 0])


@pytest.mark.parametrize(
    ("head", "value", "fits"), [(128, 128, True), (192, 128, False), (320, 320, False), (4, 4, False)]
)
def test_heads_that_the_kernel_does_not_take_go_another_way(head: int, value: int, fits: bool) -> None:
    assert fits_flash(head, value) is fits
