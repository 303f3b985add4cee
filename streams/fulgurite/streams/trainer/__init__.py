"""The trainer: from finished rollouts to new policy versions. Start with `service.py`."""

from fulgurite.streams.trainer.service import main, serve

__all__ = ["main", "serve"]
