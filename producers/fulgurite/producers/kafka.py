"""How every client of ours connects to Kafka, from one place. Knows settings, not topics or events."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

from aiokafka import AIOKafkaProducer

from fulgurite.schemas.errors import StartError
from fulgurite.schemas.kafka_settings import load_certificate
from fulgurite.schemas.settings import KafkaSettings


def connection_options(settings: KafkaSettings) -> dict[str, Any]:
    """Keyword arguments for any aiokafka client (producer, consumer, admin)."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": settings.security_protocol,
    }
    if settings.security_protocol in ("SSL", "SASL_SSL"):
        options["ssl_context"] = _ssl_context(settings)
    if settings.security_protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.sasl_mechanism
        if settings.sasl_mechanism == "OAUTHBEARER":
            from fulgurite.producers.oauth import token_provider  # httpx: not for those who need no token

            options["sasl_oauth_token_provider"] = token_provider(settings)
        else:
            password = settings.sasl_password
            options["sasl_plain_username"] = settings.sasl_username
            options["sasl_plain_password"] = password.get_secret_value() if password else None
    return options


def _ssl_context(settings: KafkaSettings) -> ssl.SSLContext:
    """Made anew for every client: certificates that were renewed on disk are used from the next client on.

    Raises StartError when they cannot be used now: they could at the start, so a restart may find them well again.
    """
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
        context.check_hostname = settings.ssl_check_hostname
        if settings.ssl_certfile is not None and settings.ssl_keyfile is not None:
            load_certificate(context, settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_key_password)
    except OSError as error:
        raise StartError(
            f"cannot use the certificates of kafka.ssl_cafile, ssl_certfile, ssl_keyfile: {error}"
        ) from error
    return context


def take_failure(producer: AIOKafkaProducer) -> BaseException | None:
    """What the background sender of a transactional producer failed with, None where it did not.

    To be asked before the producer is closed: aiokafka leaves it in a future of its own that nobody ever asks, so
    asyncio would complain of it in the log, at a moment of the garbage collector's choosing.
    """
    waiter = getattr(getattr(producer, "_txn_manager", None), "_transaction_waiter", None)
    if isinstance(waiter, asyncio.Future) and waiter.done() and not waiter.cancelled():
        return waiter.exception()
    return None
