"""Settings of algorithms: lists of tables from the environment, and errors that say where without showing secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import Settings, load_settings

JUDGE = {"name": "a", "url": "http://judge/v1", "model": "m", "template": "t.txt", "api_key": "topsecret"}


def load(tmp_path: Path, **lists: Any) -> Settings:
    variables = {f"FULGURITE_{name}": json.dumps(value) for name, value in lists.items()}
    return load_settings({"FULGURITE_HOME": str(tmp_path), **variables})


def test_sources_and_rules_come_as_json(tmp_path: Path) -> None:
    rules = [{"name": "r", "deny_tools": ["rm"], "when": [{"field": "status", "value": "ok"}]}]
    found = load(tmp_path, AGGREGATOR__SOURCES=[JUDGE], COMPLIANCE__RULES=rules, PROMPT__MUST_CONTAIN=["{q}"])
    assert found.aggregator.sources[0].api_key.get_secret_value() == "topsecret"
    assert "topsecret" not in repr(found)
    assert found.compliance.rules[0].when[0].op == "eq"
    assert found.prompt.must_contain == ["{q}"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({**JUDGE, "model": ""}, "a: a judge needs model and template too"),
        ({**JUDGE, "function": "m:f"}, "needs a function .* or a judge's url, not both"),
        ({**JUDGE, "api_key": ["topsecret"]}, "api_key: Input should be a valid string"),
        ({**JUDGE, "answer": "(?=1)"}, "known to both Python and RE2"),
        ({**JUDGE, "low": 2, "high": 1}, "low = 2 is not below high = 1"),
        ({**JUDGE, "name": "reward"}, "a source cannot be named reward"),
    ],
)
def test_wrong_sources_are_named(tmp_path: Path, source: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        load(tmp_path, AGGREGATOR__SOURCES=[source])
    assert "topsecret" not in str(caught.value)


def test_names_differ(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="sources of the same name: a"):
        load(tmp_path, AGGREGATOR__SOURCES=[JUDGE, JUDGE])
