"""Log-ratios of two policies per token, per sequence or as a sequence's product, and their bounded exponential.

    token              log r_t = log p_t - log q_t
    sequence_mean      log s   = 1/|o| sum_t log r_t      the geometric mean of the tokens' ratios (GSPO, AReaL)
    sequence_product   log P   = sum_t log r_t            the ratio of the sequences' probabilities

Where libraries differ. *Clamp*: verl clamps token log-ratios to +-20 before exp, and for GSPO to at most 10; OpenRLHF
and SkyRL clamp tokens to +-20; AReaL and TRL do not clamp. Here +-20 everywhere: e^20 is past any clip or cap, and
e^100 is no float32. A token beyond the clamp has no gradient. *Sequence*: AReaL and OpenRLHF gate sequences by the
geometric mean, verl, SkyRL and TRL's `sequence_*` modes by the product, whose spread grows with the length. Both are
here, named.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fulgurite.streams.objectives.packing import Sequences

Level = Literal["token", "sequence_mean", "sequence_product"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """e^x with x clamped to +-MAX_LOG_RATIO; any shape."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def log_ratios(logprobs: Tensor, old_logprobs: Tensor, sequences: Sequences, level: Level) -> Tensor:
    """log p - log q, both [N] -> [N]; at a sequence level every token of a sequence has the same value."""
    difference = logprobs - old_logprobs
    match level:
        case "token":
            return difference
        case "sequence_mean":
            return sequences.spread(sequences.means(difference))
        case "sequence_product":
            return sequences.spread(sequences.sums(difference))


def straight_through_sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, sequences: Sequences) -> Tensor:
    """GSPO's token form: value s_i, the sequence's geometric mean; gradient s_i * d log p_t for each token's own log p.

        s_it = sg[s_i] * p_t / sg[p_t]          arXiv:2507.18071, equation 14 (GSPO-token)

    Summed over a sequence whose tokens share advantage and weight it has the gradient of s_i itself, |o| times over;
    with other advantages or weights per token each token keeps its own, which the plain form would mix.
    """
    mean = log_ratios(logprobs.detach(), old_logprobs.detach(), sequences, "sequence_mean")
    return bounded_exp(mean) * (logprobs - logprobs.detach()).exp()
