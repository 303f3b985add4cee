"""What all sections of the settings share: they are frozen, refuse unknown names and what is no value for a field
though pydantic would take it, say what each field means, and have a word for what may be not set."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Port = Annotated[int, Field(ge=0, le=65_535)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/]+.*$")]


UNSET = "none"
"""For a field that may be not set: takes back what a file or a shadow's source sets. A path of that name is ./none."""


class Section(BaseModel):
    # NaN passes every comparison or none, and neither it nor infinity can be recorded as JSON.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps = true` in a file would be 1."""
        if (
            isinstance(value, bool)
            and info.field_name
            and not _takes_truth(cls.model_fields[info.field_name].annotation)
        ):
            raise ValueError(f"must not be {str(value).lower()}: this is no switch")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _word_for_unset(cls, value: Any, info: ValidationInfo) -> Any:
        if value != UNSET or not info.field_name:
            return value
        return None if NoneType in get_args(cls.model_fields[info.field_name].annotation) else value


def _takes_truth(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_takes_truth, get_args(annotation)))
