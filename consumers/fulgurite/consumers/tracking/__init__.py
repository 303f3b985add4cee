"""Tracking: a run's steps from the topic `training` into TensorBoard or Weights & Biases, while it runs or long after.

    training ─► service.py: this run's steps, in order ─► writers.py: one point a metric and step

Promises: every committed step is written, whenever this was started and however often it died: it reads the run from
its beginning each time, and a step written again takes the place of the same step. The trainer knows nothing of it and
cannot be held up by it. Does not know what the metrics mean.
"""

from __future__ import annotations

from fulgurite.consumers.tracking.service import main, track

__all__ = ["main", "track"]
