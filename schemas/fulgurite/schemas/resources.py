"""A version of something agents or servers use. Direction: trainer -> followers, runners. Never weights inline.

`resources` is compacted by resource name: its newest record is the version to serve. Version numbers of a resource only
grow, over all runs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fulgurite.schemas.event import Event, Labels, Name, ShortText, TimeNs, Version
from fulgurite.schemas.ids import Id, OptionalId, new_id, now_ns

ResourceKind = Literal["weights", "lora", "prompt_template", "endpoint"]


class ResourceVersion(Event):
    """Topic `resources`, key resource. Identity: (resource, version)."""

    event_id: Id = Field(default_factory=new_id)
    resource: Id
    """Its name, for example `policy`."""
    version: Version
    kind: ResourceKind = "weights"
    uri: ShortText
    """Where the files are: file:///…, or what the servers can read."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Over the files in order of their names: see `fulgurite.schemas.checksum`."""
    run_id: OptionalId = ""
    step: Annotated[int, Field(ge=0)] = 0
    model: Name = ""
    time_ns: TimeNs = Field(default_factory=now_ns)
    metadata: Labels = Field(default_factory=dict)
