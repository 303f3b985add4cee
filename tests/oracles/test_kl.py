"""Our KL estimates against the libraries' own: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fulgurite.streams.objectives.kl import Estimator, kl_estimate
from tests.oracles.case import Case, cases
from tests.oracles.comparison import compare_losses
from tests.oracles.standins import load

pytestmark = pytest.mark.oracles


def verl(case: Case, estimator: Estimator) -> Tensor:
    return load("verl.trainer.ppo.core_algos").kl_penalty(case.logprobs, case.reference, estimator)


def areal(case: Case, estimator: Estimator) -> Tensor:
    return load("areal.utils.data").KLEstimator(estimator)(case.logprobs, case.reference)


def openrlhf(case: Case, estimator: Estimator) -> Tensor:
    return load("openrlhf.models.utils").compute_approx_kl(case.logprobs, case.reference, kl_estimator=estimator)


def skyrl(case: Case, estimator: Estimator) -> Tensor:
    module = load("skyrl.backends.skyrl_train.utils.ppo_utils")
    return module.compute_approx_kl(case.logprobs, case.reference, kl_estimator_type=estimator)


LIBRARIES: dict[str, Callable[[Case, Estimator], Tensor]] = {
    "verl": verl,
    "areal": areal,
    "openrlhf": openrlhf,
    "skyrl": skyrl,
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_value_and_gradient(estimator: Estimator, library: str) -> None:
    def weighed(estimates: Tensor) -> Tensor:
        """A sum in which every token has another weight, so that no difference cancels."""
        return (estimates * torch.linspace(0.5, 1.5, len(estimates))).mean()

    compare_losses(
        f"kl {estimator}",
        library,
        lambda case: weighed(kl_estimate(case.logprobs, case.reference, estimator)),
        lambda case: weighed(LIBRARIES[library](case, estimator)),
        cases()[1:4],  # at a deviation of 0 there is nothing, and far off they clamp values to 10
    )
