"""Who may connect to the embedded broker, and how it says so in server.properties.

Everything that connects proves who it is, the broker itself and its controller included: no listener is open. One user
(`fulgurite`), by PLAIN, which needs nothing but this configuration, so that a data folder that was open before works
on. Tests switch on more: TLS, certificates of clients, SCRAM, OAUTHBEARER. It listens on loopback in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr

from fulgurite.infra.settings_file import write_private
from fulgurite.schemas.kafka_settings import SECURITY_FIELDS

USER = "fulgurite"

_MODULES = "org.apache.kafka.common.security"
_PLAIN = f"{_MODULES}.plain.PlainLoginModule"
_SCRAM = f"{_MODULES}.scram.ScramLoginModule"
_OAUTH = f"{_MODULES}.oauthbearer.OAuthBearerLoginModule"


@dataclass(frozen=True, slots=True)
class BrokerTls:
    """Files in PEM form."""

    keystore: Path
    """The broker's private key (PKCS 8, without a password) and its certificate."""
    authority: Path
    """What it trusts."""
    client_certificate: Path | None = None
    client_key: Path | None = None
    """Given: clients must have a certificate that `authority` signed, as this one, which we ourselves show."""


@dataclass(frozen=True, slots=True)
class BrokerSecurity:
    """`password` is the user's by PLAIN and, where they are on, by SCRAM (set when the folder is formatted)."""

    password: SecretStr
    scram: tuple[Literal["SCRAM-SHA-256", "SCRAM-SHA-512"], ...] = ()
    oauth: Mapping[str, str] | None = None
    """Properties of OAUTHBEARER beyond its login module; None: not offered."""
    tls: BrokerTls | None = field(default=None)

    @property
    def protocol(self) -> str:
        return "SASL_PLAINTEXT" if self.tls is None else "SASL_SSL"

    def properties(self) -> dict[str, str]:
        """Beside the listeners BROKER and CONTROLLER themselves."""
        mechanisms = ["PLAIN", *self.scram, *(["OAUTHBEARER"] if self.oauth is not None else [])]
        found = {
            "listener.security.protocol.map": f"BROKER:{self.protocol},CONTROLLER:SASL_PLAINTEXT",
            "sasl.mechanism.inter.broker.protocol": "PLAIN",
            "sasl.mechanism.controller.protocol": "PLAIN",
            "listener.name.broker.sasl.enabled.mechanisms": ",".join(mechanisms),
            "listener.name.controller.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.broker.plain.sasl.jaas.config": self._plain(),
            "listener.name.controller.plain.sasl.jaas.config": self._plain(),
        }
        for mechanism in self.scram:
            found[f"listener.name.broker.{mechanism.lower()}.sasl.jaas.config"] = f"{_SCRAM} required;"
        if self.oauth is not None:
            found["listener.name.broker.oauthbearer.sasl.jaas.config"] = f"{_OAUTH} required;"
            found |= self.oauth
        return found | self._tls()

    def format_arguments(self) -> list[str]:
        """For the storage tool: SCRAM's users are part of the cluster's metadata."""
        password = self.password.get_secret_value()
        return [part for name in self.scram for part in ("--add-scram", f"{name}=[name={USER},password={password}]")]

    def client_settings(self) -> dict[str, Any]:
        """Fields of KafkaSettings for our clients; what else a file may say of security does not hold here."""
        mine = {
            "security_protocol": self.protocol,
            "sasl_mechanism": "PLAIN",
            "sasl_username": USER,
            "sasl_password": self.password,
            "ssl_cafile": self.tls.authority if self.tls else None,
            "ssl_certfile": self.tls.client_certificate if self.tls else None,
            "ssl_keyfile": self.tls.client_key if self.tls else None,
        }
        return dict.fromkeys(SECURITY_FIELDS) | {"ssl_check_hostname": True} | mine

    def write_client_files(self, folder: Path) -> None:
        """For other people's clients: `client.properties` (Java) and `kcat.conf` (librdkafka). Readable by us only."""
        password = self.password.get_secret_value()
        jaas = f'{_PLAIN} required username="{USER}" password="{password}";'
        common = f"security.protocol={self.protocol}\n"
        java = f"{common}sasl.mechanism=PLAIN\nsasl.jaas.config={jaas}\n"
        kcat = f"{common}sasl.mechanism=PLAIN\nsasl.username={USER}\nsasl.password={password}\n"
        if self.tls is not None:
            java += f"ssl.truststore.type=PEM\nssl.truststore.location={self.tls.authority}\n"
            kcat += f"ssl.ca.location={self.tls.authority}\n"
        write_private(folder / "client.properties", java)
        write_private(folder / "kcat.conf", kcat)

    def _plain(self) -> str:
        """The user whom the broker knows, and as whom it connects to itself."""
        password = self.password.get_secret_value()
        return f'{_PLAIN} required username="{USER}" password="{password}" user_{USER}="{password}";'

    def _tls(self) -> dict[str, str]:
        if self.tls is None:
            return {}
        return {
            "listener.name.broker.ssl.keystore.type": "PEM",
            "listener.name.broker.ssl.keystore.location": str(self.tls.keystore),
            "listener.name.broker.ssl.truststore.type": "PEM",
            "listener.name.broker.ssl.truststore.location": str(self.tls.authority),
            "listener.name.broker.ssl.client.auth": "required" if self.tls.client_certificate else "none",
        }
