"""The section `kafka`: where the brokers are and how they know us. Contradictions are errors here, before anything
connects: a password that would not be sent, a certificate without its key, a file that is not there.

| security_protocol | encrypted | we prove who we are by |
|---|---|---|
| PLAINTEXT | no | nothing |
| SSL | yes | ssl_certfile and ssl_keyfile, where the brokers ask for them |
| SASL_PLAINTEXT | no | sasl_mechanism |
| SASL_SSL | yes | sasl_mechanism, and a certificate where the brokers ask for one |
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from fulgurite.schemas.codec import MAX_RECORD_BYTES
from fulgurite.schemas.sections import Section, Url
from fulgurite.schemas.topics import Topic

_SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+):(?P<port>[0-9]{1,5})")

_PASSWORD_FIELDS = ("sasl_username", "sasl_password")
_OAUTH_NEEDED = ("oauth_url", "oauth_client_id", "oauth_client_secret")
_OAUTH_FIELDS = ("oauth_token_file", *_OAUTH_NEEDED, "oauth_scope", "oauth_cafile")
_SSL_FIELDS = ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_key_password")

SECURITY_FIELDS = ("security_protocol", "sasl_mechanism", *_PASSWORD_FIELDS, *_OAUTH_FIELDS, *_SSL_FIELDS)
"""Of the fields below; they belong together. Beside them only ssl_check_hostname."""


class KafkaSettings(Section):
    bootstrap_servers: str = "127.0.0.1:9092"
    """Comma-separated host:port of the brokers."""
    topic_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=64)] = "fulgurite."
    """Put before every topic's name: one prefix is one namespace."""
    otlp_topic: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=249)] = "otlp_spans"
    """Where Collectors write: their own default, without our prefix. Two installations on one cluster need two."""
    partitions: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Partitions of rollouts, spans, rewards and trajectories. Fixed once the topics exist."""
    replication_factor: Annotated[int, Field(ge=1, le=16)] = 1
    """Copies of every partition; 3 in production."""
    min_insync_replicas: Annotated[int, Field(ge=1, le=16)] = 1
    """Copies that must have a record before it is acknowledged; 2 in production."""
    fsync: bool = False
    """Embedded broker only: whether a record is on disk before it is acknowledged. Brokers of your own survive a power
    failure by replication_factor 3 and min_insync_replicas 2."""
    max_record_bytes: Annotated[int, Field(ge=1_024, le=1 << 30)] = MAX_RECORD_BYTES
    """Largest record a producer sends and a topic takes."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How to talk to the brokers."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = "PLAIN"
    """Used when security_protocol says SASL."""
    sasl_username: Annotated[str | None, Field(validate_default=True)] = None
    """User for PLAIN and SCRAM."""
    sasl_password: Annotated[SecretStr | None, Field(validate_default=True)] = None
    """Password for PLAIN and SCRAM."""
    oauth_token_file: Path | None = None
    """For OAUTHBEARER: a file with the token, read anew for every connection (somebody else keeps it fresh)."""
    oauth_url: Annotated[Url | None, Field(validate_default=True)] = None
    """For OAUTHBEARER without such a file: the token endpoint to ask, by client credentials."""
    oauth_client_id: Annotated[str | None, Field(validate_default=True)] = None
    """Client id for the token endpoint."""
    oauth_client_secret: Annotated[SecretStr | None, Field(validate_default=True)] = None
    """Client secret for the token endpoint."""
    oauth_scope: str | None = None
    """Scope to ask the token endpoint for."""
    oauth_cafile: Path | None = None
    """Certificate authority of the token endpoint; the system's when empty."""
    ssl_cafile: Path | None = None
    """Certificate authority to trust; the system's when empty."""
    ssl_certfile: Path | None = None
    """Our own certificate (PEM, with its chain), for brokers that ask for one."""
    ssl_keyfile: Annotated[Path | None, Field(validate_default=True)] = None
    """The private key of ssl_certfile (PEM)."""
    ssl_key_password: Annotated[SecretStr | None, Field(validate_default=True)] = None
    """Password of ssl_keyfile, where it has one."""
    ssl_check_hostname: bool = True
    """Whether the brokers' certificates must name the host we connect to. They must be trusted in any case."""

    @field_validator("bootstrap_servers")
    @classmethod
    def _servers_have_ports(cls, servers: str) -> str:
        for server in servers.split(","):
            found = _SERVER.fullmatch(server.strip())
            if found is None or not 1 <= int(found["port"]) <= 65_535:
                raise ValueError("must be host:port[,host:port...] with ports from 1 to 65535")
        return servers

    @field_validator("oauth_cafile", "ssl_cafile")
    @classmethod
    def _authority_is_readable(cls, path: Path | None) -> Path | None:
        if path is not None:
            try:
                ssl.create_default_context(cafile=path)
            except OSError as error:
                why = error.strerror or str(error)
                raise ValueError(f"must be a readable file of certificates in PEM form ({why})") from None
        return path

    @field_validator("oauth_token_file", "ssl_certfile", "ssl_keyfile")
    @classmethod
    def _file_is_readable(cls, path: Path | None) -> Path | None:
        if path is not None:
            try:
                path.read_bytes()
            except OSError as error:
                raise ValueError(f"must be a readable file ({error.strerror})") from None
        return path

    @field_validator(*_PASSWORD_FIELDS)
    @classmethod
    def _passwords_have_both(cls, value: str | SecretStr | None, info: ValidationInfo) -> str | SecretStr | None:
        protocol, mechanism = _how(info)
        if protocol.startswith("SASL") and mechanism not in ("", "OAUTHBEARER"):
            if not _text(value):
                raise ValueError(f"must be set when kafka.security_protocol is {protocol}")
        elif value is not None and protocol and mechanism:
            raise ValueError(_unused(f"{protocol} with {mechanism}" if protocol.startswith("SASL") else protocol))
        return value

    @field_validator(*_OAUTH_FIELDS)
    @classmethod
    def _tokens_have_one_source(cls, value: Any, info: ValidationInfo) -> Any:
        protocol, mechanism = _how(info)
        if not protocol or not mechanism:
            return value  # wrong themselves, and told
        if not (protocol.startswith("SASL") and mechanism == "OAUTHBEARER"):
            if value is not None:
                raise ValueError(_unused(f"{protocol} with {mechanism}" if protocol.startswith("SASL") else protocol))
            return value
        if info.field_name == "oauth_token_file":
            return value
        has_file = info.data.get("oauth_token_file") is not None
        if has_file and value is not None:
            raise ValueError("has no effect beside kafka.oauth_token_file: remove one of them")
        is_needed = not has_file and "oauth_token_file" in info.data and info.field_name in _OAUTH_NEEDED
        if is_needed and not _text(value):
            raise ValueError("must be set for OAUTHBEARER, unless kafka.oauth_token_file is")
        return value

    @field_validator(*_SSL_FIELDS)
    @classmethod
    def _certificates_are_used(cls, value: Any, info: ValidationInfo) -> Any:
        protocol = str(info.data.get("security_protocol", ""))
        if value is not None and protocol and not protocol.endswith("SSL"):
            raise ValueError(_unused(protocol))
        return value

    @field_validator("ssl_keyfile")
    @classmethod
    def _certificate_has_a_key(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "ssl_certfile" in info.data and (value is None) != (info.data["ssl_certfile"] is None):
            raise ValueError("kafka.ssl_certfile and kafka.ssl_keyfile belong together: set both or none")
        return value

    @field_validator("ssl_key_password")
    @classmethod
    def _key_can_be_used(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        certificate, key = info.data.get("ssl_certfile"), info.data.get("ssl_keyfile")
        if certificate is None or key is None:
            if value is not None and {"ssl_certfile", "ssl_keyfile"} <= info.data.keys():
                raise ValueError("has no effect without kafka.ssl_keyfile")
            return value
        try:
            load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, value)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{certificate} and {key} cannot be used together ({error}): is it this certificate's key, both in PEM "
                "form, and kafka.ssl_key_password its password?"
            ) from None
        return value

    def topic(self, topic: Topic) -> str:
        """The topic's full name on the broker."""
        return f"{self.topic_prefix}{topic.name}" if topic.prefixed else self.otlp_topic


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path, password: SecretStr | None) -> None:
    """Raises ssl.SSLError or OSError. Always with a password: without one OpenSSL would ask the terminal for it."""
    context.load_cert_chain(certificate, key, password=lambda: password.get_secret_value() if password else "")


def _how(info: ValidationInfo) -> tuple[str, str]:
    """Protocol and mechanism; empty where they are wrong themselves."""
    return str(info.data.get("security_protocol", "")), str(info.data.get("sasl_mechanism", ""))


def _text(value: str | SecretStr | None) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else value or ""


def _unused(how: str) -> str:
    return f"has no effect when kafka.security_protocol is {how}: set the protocol that uses it, or remove it"
