"""The calculator: a tiny policy that learns to use its tool instead of guessing. Start with agent.py."""
