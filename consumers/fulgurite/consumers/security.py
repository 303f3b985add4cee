"""FastStream's form of what `connection_options` says, so that its brokers connect exactly as our other clients do.

FastStream knows no token provider in its SASLOAuthBearer, and passes on whatever is a BaseSecurity only in parts; its
KafkaBroker takes the provider as an argument of its own.
"""

from __future__ import annotations

from typing import Any

from faststream.security import BaseSecurity, SASLOAuthBearer, SASLPlaintext, SASLScram256, SASLScram512

from fulgurite.producers.kafka import connection_options
from fulgurite.schemas.settings import KafkaSettings

_BY_PASSWORD = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}


def broker_options(settings: KafkaSettings) -> dict[str, Any]:
    """Keyword arguments for FastStream's KafkaBroker, beside the addresses."""
    options = connection_options(settings)
    context = options.get("ssl_context")
    tls: dict[str, Any] = {"ssl_context": context, "use_ssl": context is not None}
    if not settings.security_protocol.startswith("SASL"):
        return {"security": BaseSecurity(**tls)}
    if settings.sasl_mechanism == "OAUTHBEARER":
        return {
            "security": SASLOAuthBearer(**tls),
            "sasl_oauth_token_provider": options["sasl_oauth_token_provider"],
        }
    by_password = _BY_PASSWORD[settings.sasl_mechanism]
    return {"security": by_password(options["sasl_plain_username"], options["sasl_plain_password"], **tls)}
