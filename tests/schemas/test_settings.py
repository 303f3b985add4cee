"""Settings: environment over file over defaults; a wrong one is named with where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import Section, Settings, load_settings, to_environment
from fulgurite.schemas.topics import OTLP_SPANS, SPANS

SECTIONS: list[type[BaseModel]] = [type(section) for _, section in Settings()]


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


def test_true_in_a_file_is_no_number_of_any_section(tmp_path: Path) -> None:
    for section in SECTIONS:
        for name, field in section.model_fields.items():
            if field.annotation is int or field.annotation is float:
                with pytest.raises(ValidationError, match=rf"{name}\n.*"):
                    section.model_validate({name: True})
    (tmp_path / "fulgurite.toml").write_text("[materialiser]\nbatch_records = true\n")
    with pytest.raises(SettingsError, match="this is no switch"):
        load_settings(env(tmp_path))


def test_no_number_of_any_section_is_infinite() -> None:
    for section in SECTIONS:
        for name, field in section.model_fields.items():
            if field.annotation is float:
                with pytest.raises(ValidationError, match=r"finite|less than|greater than"):
                    section.model_validate({name: "nan"})


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
        (
            "FULGURITE_KAFKA__PARTITION",
            "4",
            r"FULGURITE_KAFKA__PARTITION: no such setting; the nearest is FULGURITE_KAFKA__PARTITIONS; "
            r"known ones of kafka: .*partitions",
        ),
        ("FULGURITE_KAFKA__BOOTSTRP", "h:1", r"KAFKA__BOOTSTRP: .* nearest is FULGURITE_KAFKA__BOOTSTRAP_SERVERS;"),
        (
            "FULGURITE_MATERIALSER__PORT",
            "1",
            r"  FULGURITE_MATERIALSER__PORT: there is no section materialser; "
            r"the nearest is FULGURITE_MATERIALISER__PORT; known ones: aggregator, .*trainer$",
        ),
        ("FULGURITE_KAFKA", "4", r"FULGURITE_KAFKA: no setting; they are FULGURITE_<SECTION>__<NAME>"),
        ("FULGURITE_KAFKA_PARTITIONS", "4", r"no setting; the nearest is FULGURITE_KAFKA__PARTITIONS; they are"),
        ("FULGURITE_HOMES", "x", r"FULGURITE_HOMES: no setting; the nearest is FULGURITE_HOME; they are"),
        ("FULGURITE_NOSUCH__X", "4", r"FULGURITE_NOSUCH__X: there is no section nosuch; known ones"),
        ("FULGURITE_CLICKHOUSE__URL", "localhost:8123", r"FULGURITE_CLICKHOUSE__URL"),
        ("FULGURITE_CLICKHOUSE__DATABASE", "x; DROP", r"FULGURITE_CLICKHOUSE__DATABASE"),
        ("FULGURITE_CLICKHOUSE__URL", "http://h:99999", r"FULGURITE_CLICKHOUSE__URL = .*a port from 1 to 65535"),
        ("FULGURITE_CLICKHOUSE__URL", "http://u:hunter2@h:99999", r"'http://\*\*\*@h:99999'"),
        (
            "FULGURITE_KAFKA__BOOTSTRAP_SERVERS",
            "localhost:abc",
            r"BOOTSTRAP_SERVERS = 'localhost:abc': must be host:port",
        ),
        ("FULGURITE_KAFKA__BOOTSTRAP_SERVERS", "a:9092,b:70000", r"ports from 1 to 65535"),
        ("FULGURITE_KAFKA__BOOTSTRAP_SERVERS", "a:9092,", r"must be host:port"),
        (
            "FULGURITE_KAFKA__SECURITY_PROTOCOL",
            "SASL_SSL",
            r"kafka\.sasl_username, not set in .*security_protocol is SASL",
        ),
        (
            "FULGURITE_KAFKA__SECURITY_PROTOCOL",
            "SASL_SSL",
            r"kafka\.sasl_password, not set in .*security_protocol is SASL",
        ),
        ("FULGURITE_KAFKA__SSL_CAFILE", "/no/such.pem", r"SSL_CAFILE = '/no/such.pem': .*PEM .*No such file"),
        ("FULGURITE_KAFKA__SSL_CAFILE", __file__, r"SSL_CAFILE = .*certificates in PEM form"),
        ("FULGURITE_FOLLOWER__SERVERS", "http://a", r"FULGURITE_FOLLOWER__SERVERS: must be JSON"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings(env(tmp_path, **{name: value}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"SASL_PASSWORD": "p"}, r"SASL_PASSWORD: has no effect when kafka\.security_protocol is PLAINTEXT"),
        ({"SECURITY_PROTOCOL": "SSL", "SASL_USERNAME": "u"}, r"SASL_USERNAME = 'u': has no effect .* SSL: set the"),
        ({"SECURITY_PROTOCOL": "SASL_SSL", "SASL_USERNAME": "u"}, r"kafka\.sasl_password, not set in .*SASL_SSL"),
        ({"SECURITY_PROTOCOL": "SSL", "SSL_KEYFILE": __file__}, r"SSL_KEYFILE = .*belong together: set both or none"),
        ({"SECURITY_PROTOCOL": "SSL", "SSL_CERTFILE": __file__}, r"kafka\.ssl_keyfile, not set .*belong together"),
        ({"SECURITY_PROTOCOL": "SSL", "SSL_CERTFILE": "/no/such"}, r"must be a readable file \(No such file"),
        ({"SECURITY_PROTOCOL": "SSL", "SSL_KEY_PASSWORD": "p"}, r"SSL_KEY_PASSWORD: has no effect without"),
        (
            {"SECURITY_PROTOCOL": "SSL", "SSL_CERTFILE": __file__, "SSL_KEYFILE": __file__},
            r"kafka\.ssl_key_password, .*cannot be used together",
        ),
        ({"SSL_KEY_PASSWORD": "p"}, r"SSL_KEY_PASSWORD: has no effect when .* PLAINTEXT"),
        ({"OAUTH_URL": "http://h/t"}, r"OAUTH_URL = .*has no effect when .* PLAINTEXT"),
        (
            {"SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "OAUTHBEARER"},
            r"kafka\.oauth_url, not set .*must be set for OAUTHBEARER, unless kafka\.oauth_token_file is",
        ),
        (
            {"SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "OAUTHBEARER", "OAUTH_URL": "http://h/t"},
            r"kafka\.oauth_client_secret, not set .*must be set for OAUTHBEARER",
        ),
        (
            {
                "SECURITY_PROTOCOL": "SASL_SSL",
                "SASL_MECHANISM": "OAUTHBEARER",
                "OAUTH_TOKEN_FILE": __file__,
                "OAUTH_URL": "http://h/t",
            },
            r"OAUTH_URL = .*has no effect beside kafka\.oauth_token_file",
        ),
        (
            {
                "SECURITY_PROTOCOL": "SASL_SSL",
                "SASL_MECHANISM": "OAUTHBEARER",
                "OAUTH_TOKEN_FILE": __file__,
                "SASL_USERNAME": "u",
            },
            r"SASL_USERNAME = 'u': has no effect when .* SASL_SSL with OAUTHBEARER",
        ),
    ],
)
def test_contradictions_in_security_are_named(tmp_path: Path, values: dict[str, str], words: str) -> None:
    named = {f"FULGURITE_KAFKA__{name}": value for name, value in values.items()}
    with pytest.raises(SettingsError, match=words):
        load_settings(env(tmp_path, **named))


def test_a_token_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t")
    settings = load_settings(
        env(
            tmp_path,
            FULGURITE_KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT",
            FULGURITE_KAFKA__SASL_MECHANISM="OAUTHBEARER",
            FULGURITE_KAFKA__OAUTH_TOKEN_FILE=str(tmp_path / "token"),
        )
    )
    assert settings.kafka.sasl_password is None


def test_all_that_is_misspelled_is_told_at_once_each_from_where_it_came(tmp_path: Path) -> None:
    path = tmp_path / "fulgurite.toml"
    path.write_text("[materialser]\nhost = 'a'\n[kafka]\npartition = 4\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(env(tmp_path, FULGURITE_MATERIALSER__PORT="1", FULGURITE_KAFKA__PARTITIONS="0"))
    lines = str(caught.value).splitlines()[1:]
    assert [line.partition(":")[0].strip() for line in lines] == [
        "FULGURITE_MATERIALSER__PORT",
        "FULGURITE_KAFKA__PARTITIONS = '0'",
        f"kafka.partition in {path}",
        f"materialser in {path}",
    ]
    assert "the nearest is kafka.partitions;" in lines[2]
    assert "the nearest is materialiser;" in lines[3]


def test_the_value_of_a_misspelled_setting_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(env(tmp_path, FULGURITE_CLICKHOUSE__PASSWRD="hunter2", FULGURITE_CLICKHOSE__PASSWORD="hunter2"))
    assert "hunter2" not in str(caught.value)


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


@pytest.mark.parametrize("wrong", ["[clickhouse]\npassword = 12345\n", 'clickhouse = "12345"\n'])
def test_passwords_are_not_shown_when_they_are_wrong(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "fulgurite.toml").write_text(wrong)
    with pytest.raises(SettingsError, match=r"clickhouse.* in .*fulgurite\.toml: ") as caught:
        load_settings(env(tmp_path))
    assert "12345" not in str(caught.value)


def test_good_addresses_and_logins_pass(tmp_path: Path) -> None:
    settings = load_settings(
        env(
            tmp_path,
            FULGURITE_KAFKA__BOOTSTRAP_SERVERS="kafka-1:9092, 10.0.0.1:9092,[::1]:9092",
            FULGURITE_KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT",
            FULGURITE_KAFKA__SASL_USERNAME="u",
            FULGURITE_KAFKA__SASL_PASSWORD="p",
            FULGURITE_CLICKHOUSE__URL="https://[::1]:8443",
        )
    )
    assert settings.kafka.sasl_username == "u"


def test_every_setting_says_what_it_means() -> None:
    for field in Settings.model_fields.values():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        for name, setting in section.model_fields.items():
            assert setting.description, f"{section.__name__}.{name}"
