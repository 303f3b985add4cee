"""Whether the brokers let us in, and if not, what to do about it.

aiokafka says "unable to bootstrap" whether a broker is away or has refused our password, so we ask it ourselves, once.

| what | at the start of a service or publisher | later |
|---|---|---|
| no broker answers | waited for, for ever | waited for |
| all brokers that answer refuse us | after REFUSALS in a row SettingsError: exit 2, for a person | waited for |

Later it is waited for, because a process that was let in once has good credentials: they are being rotated, or a broker
is still reading its users. `ConnectionProblems` lets the log say so, in any process, whichever client it was.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from dataclasses import dataclass
from typing import Any

from aiokafka.conn import AIOKafkaConnection, collect_hosts
from aiokafka.errors import (
    AuthenticationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.metadata import MetadataRequest

from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.errors import SettingsError
from fulgurite.schemas.settings import KafkaSettings

REFUSALS = 3
"""A broker that has just started may refuse a user it has not read yet: not at three tries over two seconds."""

PAUSE_SECONDS = 1.0
_PROBE_MS = 5_000
_CLOSE_SECONDS = 0.5

_REFUSED = (
    AuthenticationFailedError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
    IllegalSaslStateError,
    ssl.SSLError,
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no connection."""

    text: str
    refused: bool
    """A broker answered and will not have us: waiting does not help."""


async def connection_problem(settings: KafkaSettings) -> Problem | None:
    """One try at every broker; None as soon as one lets us in. A refusal says more than silence."""
    problem = Problem(f"Kafka at {settings.bootstrap_servers} does not answer", refused=False)
    options = connection_options(settings)
    del options["bootstrap_servers"]
    for host, port, _ in collect_hosts(settings.bootstrap_servers):
        connection = AIOKafkaConnection(host, port, request_timeout_ms=_PROBE_MS, **options)
        spoke = False
        try:
            await connection.connect()
            spoke = True
            answer: Any = await connection.send(MetadataRequest([]))
            if not answer.brokers and "sasl_oauth_token_provider" in options:
                # aiokafka 0.14 does not read the broker's answer to a token; a refused one gets nothing else either.
                raise SaslAuthenticationFailed("invalid token")
        except (KafkaError, OSError, TimeoutError) as error:
            found = _explained(f"{host}:{port}", settings, error, spoke=spoke)
            if found.refused or not problem.refused:
                problem = found
        else:
            return None
        finally:
            await _closed(connection)
    return problem


async def _closed(connection: AIOKafkaConnection) -> None:
    """The socket is closed by the loop a little later: a loop that ended before would leave it open."""
    if (closing := connection.close()) is not None:
        await asyncio.wait({closing}, timeout=_CLOSE_SECONDS)


async def ensure_accepted(settings: KafkaSettings) -> Problem | None:
    """None when a broker lets us in; a problem that may pass. Raises SettingsError when they refuse us, repeatedly."""
    for _ in range(REFUSALS - 1):
        problem = await connection_problem(settings)
        if problem is None or not problem.refused:
            return problem
        await asyncio.sleep(PAUSE_SECONDS)
    problem = await connection_problem(settings)
    if problem is not None and problem.refused:
        raise SettingsError(problem.text)
    return problem


def _explained(at: str, settings: KafkaSettings, error: BaseException, *, spoke: bool) -> Problem:
    cause = error.__cause__ if isinstance(error, KafkaConnectionError) and error.__cause__ else error
    if isinstance(cause, _REFUSED):
        return Problem(f"Kafka at {at} refused us: {_advice(settings, cause)}", refused=True)
    if spoke or isinstance(error, KafkaConnectionError):
        protocol = settings.security_protocol
        return Problem(
            f"Kafka at {at} closed the connection when we spoke {protocol} ({cause}): it is ending, or it wants "
            "another kafka.security_protocol, or a certificate of ours",
            refused=False,
        )
    return Problem(f"Kafka at {at} does not answer: {error!r}", refused=False)


def _advice(settings: KafkaSettings, error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            return (
                f"its certificate is another host's ({error.verify_message}): name the broker in "
                "kafka.bootstrap_servers as its certificate does, or set kafka.ssl_check_hostname to false"
            )
        return (
            f"its certificate is not trusted ({error.verify_message}): set kafka.ssl_cafile to the certificate of the "
            "authority that signed it"
        )
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        if "WRONG_VERSION_NUMBER" in reason or "RECORD" in reason:
            return f"it does not speak TLS there ({reason}): check the port, or kafka.security_protocol"
        return (
            f"TLS failed ({reason}): if it asks for our certificate, set kafka.ssl_certfile and kafka.ssl_keyfile to "
            "one it trusts"
        )
    if isinstance(error, UnsupportedSaslMechanismError | IllegalSaslStateError):
        return f"{error}: set kafka.sasl_mechanism and kafka.security_protocol to what it offers"
    if isinstance(error, AuthenticationFailedError):
        return str(error)
    if settings.sasl_mechanism == "OAUTHBEARER":
        return f"it does not take our token ({error}): check kafka.oauth_token_file, or oauth_client_id and oauth_scope"
    return (
        f"user {settings.sasl_username!r} by {settings.sasl_mechanism} ({error}): check kafka.sasl_username and "
        "kafka.sasl_password"
    )


class ConnectionProblems(logging.Filter):
    """On aiokafka's client logger: lets only refusals through, one per LOG_SECONDS. Its other lines repeat ours."""

    LOG_SECONDS = 5.0

    def __init__(self) -> None:
        super().__init__()
        self._logged = -self.LOG_SECONDS

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args if isinstance(record.args, tuple) else ()
        error = arguments[-1] if arguments else None
        if not isinstance(error, _REFUSED) or time.monotonic() - self._logged < self.LOG_SECONDS:
            return False
        self._logged = time.monotonic()
        record.msg = "Kafka refused our connection (%s): are credentials or certificates being changed? trying again"
        record.args = (error,)
        return True


def log_only_refusals() -> None:
    """Silences aiokafka but for refusals. Its client logs as `aiokafka` itself, its other parts below that."""
    for part in ("admin", "cluster", "conn", "consumer", "coordinator", "helpers", "producer"):
        logging.getLogger(f"aiokafka.{part}").setLevel(logging.CRITICAL)
    client = logging.getLogger("aiokafka")
    client.setLevel(logging.ERROR)
    if not any(isinstance(known, ConnectionProblems) for known in client.filters):
        client.addFilter(ConnectionProblems())
