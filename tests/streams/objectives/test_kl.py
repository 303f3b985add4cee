"""KL penalties against the divergence itself, whose value and gradient are known for a small vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fulgurite.streams.objectives.entropy import entropy_loss
from fulgurite.streams.objectives.kl import Estimator, Gradient, kl_estimate, kl_penalty

REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
OLD = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def policy() -> tuple[Tensor, Tensor]:
    """Logits, and log p of each token of the vocabulary."""
    logits = torch.tensor([0.1, 0.9, -0.4], dtype=torch.float64, requires_grad=True)
    return logits, torch.log_softmax(logits, dim=0)


def gradient(value: Tensor, logits: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(value, logits)
    return found.tolist()


def true_gradients() -> tuple[list[float], list[float]]:
    """Of KL(p || ref) and of KL(ref || p)."""
    logits, log_p = policy()
    reverse = gradient((log_p.exp() * (log_p - REFERENCE.log())).sum(), logits)
    logits, log_p = policy()
    forward = gradient((REFERENCE * (REFERENCE.log() - log_p)).sum(), logits)
    return reverse, forward


def expected(estimator: Estimator, how: Gradient, sampler: Tensor | None = None) -> tuple[float, list[float]]:
    """Mean value and mean gradient of the penalty over tokens drawn from `sampler`, by default from p itself."""
    logits, log_p = policy()
    drawn = log_p.exp().detach() if sampler is None else sampler
    penalty = kl_penalty(log_p, REFERENCE.log(), estimator, how, old_logprobs=drawn.log())
    mean = (drawn * penalty).sum()
    return mean.item(), gradient(mean, logits)


def test_k1_and_k3_estimate_the_divergence() -> None:
    _, log_p = policy()
    p = log_p.exp()
    exact = (p * (log_p - REFERENCE.log())).sum().item()
    for estimator in ("k1", "k3"):
        assert (p * kl_estimate(log_p, REFERENCE.log(), estimator)).sum().item() == pytest.approx(exact)
    nearly = (p * kl_estimate(log_p, REFERENCE.log(), "k2")).sum().item()
    assert nearly == pytest.approx(exact, rel=0.2)
    assert nearly != pytest.approx(exact, rel=1e-3)


def test_the_gradient_of_an_estimator_is_not_the_estimate_of_the_gradient() -> None:
    reverse, forward = true_gradients()
    assert expected("k2", "estimator")[1] == pytest.approx(reverse)
    assert expected("k3", "estimator")[1] == pytest.approx(forward), "k3 pulls as the other direction's divergence"
    logits, log_p = policy()
    k1 = (log_p.exp().detach() * kl_estimate(log_p, REFERENCE.log(), "k1")).sum()
    assert gradient(k1, logits) == pytest.approx([0.0] * 3, abs=1e-12)
    with pytest.raises(ValueError, match="no gradient"):
        kl_penalty(log_p, REFERENCE.log(), "k1", "estimator")


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k2s_gradient_under_another_estimators_value(estimator: Estimator) -> None:
    _, log_p = policy()
    exact = (log_p.exp() * (log_p - REFERENCE.log())).sum().item()
    value, found = expected(estimator, "k2")
    assert value == pytest.approx(exact)
    assert found == pytest.approx(true_gradients()[0])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("sampler", [None, OLD])
def test_times_the_ratio_it_is_right_for_old_samples_too(estimator: Estimator, sampler: Tensor | None) -> None:
    """TRL's default. It changes the gradient on-policy too, where the ratio is 1: no longer that of KL(ref || p)."""
    _, log_p = policy()
    exact = (log_p.exp() * (log_p - REFERENCE.log())).sum().item()
    value, found = expected(estimator, "ratio", sampler)
    assert value == pytest.approx(exact)
    assert found == pytest.approx(true_gradients()[0])


def test_a_token_far_off_is_still_pulled_back() -> None:
    """verl, SkyRL and OpenRLHF clamp k3 to 10: from a log-ratio of about 2.6 on nothing pulls. Here until 20."""
    logprobs = torch.tensor([-6.0, -30.0], dtype=torch.float64, requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([-1.0, -1.0], dtype=torch.float64), "k3", "estimator")
    (found,) = torch.autograd.grad(penalty.sum(), logprobs)
    assert penalty.tolist() == pytest.approx([math.exp(5) - 6, math.exp(20) - 21])
    assert found.tolist() == pytest.approx([1 - math.exp(5), 0.0])


def test_the_ratio_needs_the_policy_that_sampled() -> None:
    _, log_p = policy()
    with pytest.raises(ValueError, match="sampled"):
        kl_penalty(log_p, REFERENCE.log(), "k3", "ratio")


def test_entropy_is_a_bonus() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, dim=-1)
    entropies = -(log_p.exp() * log_p).sum(dim=-1)
    loss = entropy_loss(entropies, torch.tensor([0.5], dtype=torch.float64), 0.01)
    assert loss.item() == pytest.approx(-0.005 * entropies.item())
    (found,) = torch.autograd.grad(loss, logits)
    assert found[0, 2] > 0 > found[0, 0], "descent takes from the likely and gives to the unlikely"
