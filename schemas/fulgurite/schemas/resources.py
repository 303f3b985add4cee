"""A version of something agents or servers use. Direction: trainer -> followers, runners. Never weights inline.

`resources` is compacted by resource name: its newest record is the version to serve. Version numbers of a resource only
grow, over all runs.

A version of kind `lora` is served as a model of its own, named by `adapter_name`, beside those before it; so the newest
one that a server has is what its list of models says it is, and nobody else need be asked.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from fulgurite.schemas.event import Event, Labels, Name, ShortText, Text, TimeNs, Version
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
    """The folder of the files: file:///…, which the servers see as well, or in an object store (s3://, gs://, …); of a
    text urn:sha256:…"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Over the files in order of their names: see `fulgurite.schemas.checksum`; of a text over its UTF-8."""
    content: Text = ""
    """The text itself, of a prompt template; empty where the uri names files."""
    run_id: OptionalId = ""
    step: Annotated[int, Field(ge=0)] = 0
    model: Name = ""
    time_ns: TimeNs = Field(default_factory=now_ns)
    metadata: Labels = Field(default_factory=dict)


def prompt_version(resource: str, version: int, text: str, **fields: Any) -> ResourceVersion:
    """A version of a prompt template."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return ResourceVersion(
        resource=resource,
        version=version,
        kind="prompt_template",
        uri=f"urn:sha256:{digest}",
        sha256=digest,
        content=text,
        **fields,
    )


def adapter_name(resource: str, version: int) -> str:
    """The model name under which servers have a version of kind `lora`.

    >>> adapter_name("policy", 17)
    'policy-v17'
    """
    return f"{resource}-v{version}"


def adapter_version(resource: str, model: str) -> int | None:
    """The version of `resource` that a served model is, None where it is none of its adapters.

    >>> adapter_version("policy", "policy-v17"), adapter_version("policy", "policy")
    (17, None)
    """
    found = re.fullmatch(r"(.+)-v(0|[1-9][0-9]{0,18})", model, re.ASCII)
    return int(found[2]) if found and found[1] == resource else None
