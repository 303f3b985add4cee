"""What is wrong with the name of a setting, and which one was probably meant.

Given the tree of settings as a model of sections; knows no setting itself, and never looks at a value.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

from pydantic import BaseModel

_CUTOFF = 0.6
"""How alike two names are at least (difflib): less alike ones were hardly meant."""


def wrong_variable(settings: type[BaseModel], prefix: str, others: Sequence[str], name: str) -> str:
    """Of a variable of the environment that begins with `prefix`; empty where it is a setting's.

    `others` are variables that are no settings.
    """
    section, separator, field = name.removeprefix(prefix).lower().partition("__")
    if separator and section in settings.model_fields:
        model = section_of(settings, section)
        if field in model.model_fields:
            return ""
        nearest = _nearest(field, model.model_fields, lambda found: _variable(prefix, section, found))
        return f"{name}: no such setting; {nearest}known ones of {section}: {_listed(model)}"
    variables = [
        _variable(prefix, one, two) for one in settings.model_fields for two in section_of(settings, one).model_fields
    ]
    # Without the prefix: what all have in common says nothing about how alike they are.
    bare = [variable.removeprefix(prefix) for variable in (*others, *variables)]
    nearest = _nearest(name.removeprefix(prefix).upper(), bare, prefix.__add__)
    if separator:
        return f"{name}: there is no section {section}; {nearest}known ones: {_listed(settings)}"
    return f"{name}: no setting; {nearest}they are {prefix}<SECTION>__<NAME>, or one of {', '.join(others)}"


def wrong_name(settings: type[BaseModel], where: Sequence[str]) -> str:
    """Of a name that pydantic did not know, by its place in the tree, which may lie below the settings (a rule's)."""
    *above, name = where
    model = settings
    for part in above:
        below = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(below, type) and issubclass(below, BaseModel)):
            return "no such name here"
        model = below
    nearest = _nearest(name, model.model_fields, lambda found: ".".join([*above, found]))
    return f"no such setting; {nearest}known ones: {_listed(model)}"


def section_of(settings: type[BaseModel], name: str) -> type[BaseModel]:
    """The section of this name, which must exist."""
    model = settings.model_fields[name].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model


def _variable(prefix: str, section: str, field: str) -> str:
    return f"{prefix}{section.upper()}__{field.upper()}"


def _nearest(name: str, known: Iterable[str], spelled: Callable[[str], str] = str) -> str:
    found = difflib.get_close_matches(name, known, n=1, cutoff=_CUTOFF)
    return f"the nearest is {spelled(found[0])}; " if found else ""


def _listed(model: type[BaseModel]) -> str:
    return ", ".join(sorted(model.model_fields))
