"""Paths: /rollout/{rollout_id}/attempt/{attempt_id}/v1/… and /v1/… are the same routes, with and without ids."""

from __future__ import annotations


def split(path: str) -> tuple[dict[str, str], str]:
    """(the ids in a path, the route they stand before). A path of another form is its own route."""
    if not path.startswith("/rollout/"):
        return {}, path
    parts = path.split("/", 5)
    if len(parts) < 6 or parts[3] != "attempt":
        return {}, path
    return {"rollout_id": parts[2], "attempt_id": parts[4]}, f"/{parts[5]}"
