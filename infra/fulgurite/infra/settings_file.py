"""Writes <data>/fulgurite.toml, through which every other command finds the stores. It holds a password: mode 0600."""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.kafka_settings import SECURITY_FIELDS
from fulgurite.schemas.settings import CONFIG_NAME, ClickHouseSettings, KafkaSettings

_HEADER = """\
# Written by Fulgurite when its stores start: addresses may change then. Other settings in this file are kept
# (comments are not). Environment variables FULGURITE_<SECTION>__<NAME> win over it. Holds passwords: keep it private.
"""


def write_settings_file(data: Path, kafka: KafkaSettings, clickhouse: ClickHouseSettings) -> Path:
    """Puts the stores' addresses into the file, whatever else stands there. Raises SettingsError for a broken file."""
    path = data / CONFIG_NAME
    tree = _read(path)
    kept = {name: value for name, value in tree.get("kafka", {}).items() if name not in SECURITY_FIELDS}
    tree["kafka"] = kept | {
        "bootstrap_servers": kafka.bootstrap_servers,
        "topic_prefix": kafka.topic_prefix,
        "otlp_topic": kafka.otlp_topic,
        "partitions": kafka.partitions,
        **_security(kafka),
    }
    tree["clickhouse"] = tree.get("clickhouse", {}) | {
        "url": clickhouse.url,
        "user": clickhouse.user,
        "password": clickhouse.password.get_secret_value(),
        "database": clickhouse.database,
    }
    write_private(path, _HEADER + "".join(_section(name, fields) for name, fields in tree.items()))
    return path


def stored_password(path: Path) -> SecretStr:
    """The password in this file; made at the first time, readable by its owner only."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, secrets.token_urlsafe(24))
    return SecretStr(path.read_text().strip())


def _security(kafka: KafkaSettings) -> dict[str, Any]:
    """What is said of security; a protocol alone says all where there is nothing more."""
    values = {name: getattr(kafka, name) for name in SECURITY_FIELDS}
    if not kafka.security_protocol.startswith("SASL"):
        del values["sasl_mechanism"]
    return {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in values.items()
        if value is not None
    }


def write_private(path: Path, text: str) -> None:
    """Readable by its owner only, from its first byte on; complete or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the settings file {path}: {error}") from None


def _section(name: str, fields: Mapping[str, Any]) -> str:
    return f"\n[{name}]\n" + "".join(f"{key} = {_value(value)}\n" for key, value in fields.items())


def _value(value: Any) -> str:
    """A TOML value; JSON's scalars and lists are TOML's, tables are not."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)
