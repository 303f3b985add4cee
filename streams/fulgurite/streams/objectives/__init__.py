"""What a policy is trained on: advantages, policy losses, importance weights, KL penalties. Pure functions, no model.

    rewards of groups ─► advantages.py, credit.py ─► one number a call       (rewards.py shapes before)
    log p now, log p old, advantages ─► policy_losses.py ─► a loss a token   (ratios.py, importance.py, kl.py)
                                        recipes.py: which of these a paper combines
    loss a token x weight a token (aggregation.py) ─► sum ─► this micro-batch's share of the window's loss

Tokens are packed: a tensor is [N] over the sampled tokens of a micro-batch, without padding and without prompt or
observation tokens, and `packing.Sequences` says which sequence each belongs to. Each module says where libraries
disagree and which way is taken; tests/oracles compares values and gradients with the libraries' own code.
"""
