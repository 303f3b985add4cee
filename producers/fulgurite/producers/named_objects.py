"""What a user names as `module:name`, agents and functions, imported from the folder a command is started in."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from fulgurite.schemas.errors import SettingsError


def load_object(spec: str, where: str, example: str) -> Any:
    """What `spec` names, the value of the setting `where`. Raises SettingsError: what is wrong, what is expected."""
    module_name, separator, path = spec.partition(":")
    if not (separator and module_name and path):
        raise SettingsError(f"{where} = {spec!r}: name it as module:function, for example {example}")
    if os.getcwd() not in sys.path:  # a console script does not look where it is started; python -m does
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingsError(f"{where} = {spec!r}: cannot import {module_name} from {os.getcwd()}: {error}") from error
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise SettingsError(f"{where} = {spec!r}: module {module_name} has no {path}")
    return found
