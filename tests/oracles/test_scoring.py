"""Log-probabilities and entropies of our chunked scoring against the libraries' own: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fulgurite.streams.learners.scoring import token_scores
from tests.oracles.case import Case, cases
from tests.oracles.comparison import compare_losses
from tests.oracles.standins import load

pytestmark = pytest.mark.oracles

VOCABULARY = 50


def logits_of(case: Case) -> tuple[Tensor, Tensor]:
    """[N, V] logits that depend on the case's leaf, and the tokens that were chosen."""
    generator = torch.Generator().manual_seed(5)
    slope, start = torch.randn((2, VOCABULARY), generator=generator, dtype=torch.float64)
    chosen = torch.randint(VOCABULARY, (len(case.columns),), generator=generator)
    return case.logprobs.unsqueeze(1) * slope + 3.0 * start, chosen


def scores_of(library: str, logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    match library:
        case "verl":
            module = load("verl.utils.torch_functional")
            return module.logprobs_from_logits_naive(logits, chosen), module.entropy_from_logits(logits)
        case "trl":
            return load("trl.trainer.utils").selective_log_softmax_and_entropy(logits, chosen)
        case _:
            return load("areal.utils.functional.vocab_parallel").gather_logprobs_entropy(logits, chosen)


@pytest.mark.parametrize("library", ["verl", "trl", "areal"])
@pytest.mark.parametrize("which", ["log p", "entropy"])
def test_value_and_gradient(which: str, library: str) -> None:
    def picked(scores: tuple[Tensor, Tensor]) -> Tensor:
        """A sum in which every token has another weight, so that no difference cancels."""
        values = scores[0 if which == "log p" else 1]
        return (values * torch.linspace(0.5, 1.5, len(values))).mean()

    def ours(case: Case) -> Tensor:
        logits, chosen = logits_of(case)
        return picked(token_scores(logits, torch.clone, chosen, chunk_tokens=7, entropy_gradient=True))

    def theirs(case: Case) -> Tensor:
        return picked(scores_of(library, *logits_of(case)))

    compare_losses(which, library, ours, theirs, cases()[:3])
