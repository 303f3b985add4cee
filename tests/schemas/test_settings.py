"""Settings: environment over file over defaults; a wrong one is named with where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import Section, Settings, load_settings, to_environment
from fulgurite.schemas.topics import OTLP_SPANS, SPANS


def env(tmp_path: Path, **values: str) -> dict[str, str]:
    return {"FULGURITE_HOME": str(tmp_path), **values}


def test_defaults(tmp_path: Path) -> None:
    settings = load_settings(env(tmp_path))
    assert settings == Settings()
    assert settings.kafka.topic(SPANS) == "fulgurite.spans"
    assert settings.kafka.topic(OTLP_SPANS) == "otlp_spans"


def test_environment_over_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "fulgurite.toml").write_text('[kafka]\npartitions = 8\ntopic_prefix = "a."\n[trainer]\nsteps = 3\n')
    settings = load_settings(env(tmp_path, FULGURITE_KAFKA__PARTITIONS="16"))
    assert (settings.kafka.partitions, settings.kafka.topic_prefix, settings.trainer.steps) == (16, "a.", 3)


def test_lists_and_tables_come_as_json(tmp_path: Path) -> None:
    settings = load_settings(
        env(
            tmp_path,
            FULGURITE_FOLLOWER__SERVERS='["http://a:1", "http://b:2"]',
            FULGURITE_TRAINER__SAMPLING_PARAMETERS='{"temperature": 1.0, "top_p": 0.9}',
        )
    )
    assert settings.follower.servers == ["http://a:1", "http://b:2"]
    assert settings.trainer.sampling_parameters["top_p"] == 0.9


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FULGURITE_KAFKA__PARTITIONS", "none", r"FULGURITE_KAFKA__PARTITIONS = 'none'"),
        ("FULGURITE_KAFKA__PARTITIONS", "0", r"greater than or equal to 1"),
        ("FULGURITE_KAFKA__PARTITION", "4", r"FULGURITE_KAFKA__PARTITION: no such setting; known ones: .*partitions"),
        ("FULGURITE_KAFKA", "4", r"FULGURITE_KAFKA: unknown"),
        ("FULGURITE_NOSUCH__X", "4", r"no such setting"),
        ("FULGURITE_CLICKHOUSE__URL", "localhost:8123", r"FULGURITE_CLICKHOUSE__URL"),
        ("FULGURITE_CLICKHOUSE__DATABASE", "x; DROP", r"FULGURITE_CLICKHOUSE__DATABASE"),
        ("FULGURITE_FOLLOWER__SERVERS", "http://a", r"FULGURITE_FOLLOWER__SERVERS: must be JSON"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings(env(tmp_path, **{name: value}))


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fulgurite.toml"
    path.write_text("[kafka]\npartitions = 'many'\n")
    with pytest.raises(SettingsError, match=r"kafka\.partitions in .*fulgurite\.toml"):
        load_settings(env(tmp_path))
    path.write_text("not toml")
    with pytest.raises(SettingsError, match=r"cannot read the settings file .*fulgurite\.toml"):
        load_settings(env(tmp_path))
    with pytest.raises(SettingsError, match="is not a file"):
        load_settings({"FULGURITE_CONFIG": str(tmp_path / "missing.toml")})


def test_to_environment_is_read_back(tmp_path: Path) -> None:
    wanted = {"kafka": {"partitions": 2, "topic_prefix": "t."}, "follower": {"servers": ["http://a:1"]}}
    settings = load_settings(env(tmp_path, **to_environment(wanted)))
    assert settings.kafka.partitions == 2
    assert settings.follower.servers == ["http://a:1"]


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    settings = load_settings(env(tmp_path, FULGURITE_CLICKHOUSE__PASSWORD="hunter2"))
    assert "hunter2" not in repr(settings)
    assert settings.clickhouse.password.get_secret_value() == "hunter2"


def test_every_setting_says_what_it_means() -> None:
    for field in Settings.model_fields.values():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        for name, setting in section.model_fields.items():
            assert setting.description, f"{section.__name__}.{name}"
