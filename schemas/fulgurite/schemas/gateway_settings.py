"""The section `gateway`: who may ask, who is asked, and the bounds between.

`backend_url` is the short form for one policy server; `backends` is the long form for any number of servers and models.
Lists are TOML tables, or JSON in the environment:

    [[gateway.backends]]
    url = "http://10.0.0.5:8000"        # vLLM; serves what its /v1/models lists, adapters included

    [[gateway.backends]]
    url = "https://provider.example"    # any OpenAI-compatible server, as OPENAI_BASE_URL: traced, never trained on
    kind = "openai"
    models = ["judge-large"]
    api_key_file = "/run/secrets/judge"

    [[gateway.api_keys]]                # both values come from `fulgurite gateway-key team-a`
    name = "team-a"
    hash = "sha256:…:…"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator

from fulgurite.schemas.ids import Id
from fulgurite.schemas.sections import Port, Seconds, Section, Url

KEY_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""Of an API key: it is a part of the key."""

KEY_HASH = r"^sha256:[0-9a-f]{32}:[0-9a-f]{64}$"
"""sha256:<salt>:<SHA-256 of salt and key>. A key is 256 random bits, so a slow hash would add nothing."""

_MAX_NAMED = 64
"""Backends and keys: whoever has more of them has an inventory, which is no setting."""

Name = Annotated[str, Field(min_length=1, max_length=512)]


class BackendSettings(Section):
    """One server. Several that serve the same model are its replicas."""

    kind: Literal["vllm", "openai"] = "vllm"
    """vllm: serves the policy, gives token ids and logprobs, is asked for its health and its version. openai: an
    external provider, asked what the agent asked, streams also for their usage."""
    url: Url
    """Of a vllm, without the /v1 that routes begin with; one at the end is taken off. Of kind openai, what its clients
    take as OPENAI_BASE_URL: what comes after the path is /chat/completions, and where there is no path, it is /v1."""
    models: Annotated[list[Name], Field(max_length=1_024)] = Field(default_factory=list[str])
    """Names it serves, beside those that a vllm lists itself; empty: any that no other backend names."""
    resource: Id = "policy"
    """Which resource's versions it serves; means nothing for kind openai."""
    api_key: SecretStr = SecretStr("")
    """Sent to it as bearer token."""
    api_key_file: Path | None = None
    """The same in a file, which is read again while the gateway runs."""
    forward_authorization: bool = False
    """Whether it gets the agent's own bearer token, less the ids in it."""
    max_concurrent_requests: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Requests it is asked at once; more go to another replica or wait. 0: only the gateway's bound."""
    max_queued_requests: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Requests that may wait for it; replicas add up. 0: only the gateway's bound."""

    @field_validator("url")
    @classmethod
    def _url_is_a_base(cls, url: str, info: ValidationInfo) -> str:
        try:
            parts = urlsplit(url)
            usable = bool(parts.hostname) and parts.port != 0 and not parts.query and not parts.fragment
            has_login = parts.username is not None
        except ValueError:
            usable = has_login = False
        if not usable:
            raise ValueError("must be http://host:port or https://host:port, with a path if need be, and nothing after")
        if has_login:
            raise ValueError("must not have a login in it, since it is recorded: use api_key or api_key_file")
        return _base(url, of_openai=info.data.get("kind") == "openai")

    @property
    def routes_begin_with_v1(self) -> bool:
        """Whether routes below the URL do; else its path says all that comes before /chat/completions."""
        return self.kind == "vllm" or not urlsplit(self.url).path

    @field_validator("api_key")
    @classmethod
    def _key_fits_a_header(cls, key: SecretStr) -> SecretStr:
        text = key.get_secret_value()
        if text and not (text.isascii() and text.isprintable() and " " not in text):
            raise ValueError("must be printable ASCII without spaces")
        return key

    @field_validator("api_key_file")
    @classmethod
    def _file_is_readable(cls, path: Path | None) -> Path | None:
        if path is not None:
            try:
                path.read_bytes()
            except OSError as error:
                raise ValueError(f"must be a readable file ({error.strerror})") from None
        return path

    @model_validator(mode="after")
    def _one_authorization(self) -> Self:
        said = [bool(self.api_key.get_secret_value()), self.api_key_file is not None, self.forward_authorization]
        if sum(said) > 1:
            raise ValueError("api_key, api_key_file and forward_authorization exclude each other: set one of them")
        return self


class ApiKeySettings(Section):
    """One key that agents may show. Only its hash is known here."""

    name: Annotated[str, Field(pattern=KEY_NAME)]
    """Who it was given to; part of the key, stands in logs and metrics."""
    hash: Annotated[str, Field(pattern=KEY_HASH)]
    """As `fulgurite gateway-key` prints it."""
    requests_per_minute: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Beyond it: 429. A tenth of them may come at once. 0: no bound."""
    max_concurrent_requests: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Beyond it: 429. 0: no bound."""


class GatewaySettings(Section):
    host: str = "127.0.0.1"
    """Address to listen on; another than loopback needs gateway.api_keys."""
    port: Port = 4750
    """Port to listen on."""
    url: Url = "http://127.0.0.1:4750"
    """Where agents find it."""
    insecure: bool = False
    """Whether it may listen beyond loopback without API keys: anybody who reaches it may then ask."""
    metrics_host: str = "127.0.0.1"
    """Where /metrics listens: it names backends and keys, so not where agents are."""
    metrics_port: Annotated[int, Field(ge=0, lt=65_536)] = 0
    """Port of /metrics; 0: nowhere."""
    api_keys: Annotated[list[ApiKeySettings], Field(max_length=_MAX_NAMED)] = Field(
        default_factory=list[ApiKeySettings]
    )
    """Who may ask: {name, hash, requests_per_minute, max_concurrent_requests}, from `fulgurite gateway-key`. Empty:
    everybody."""
    backend_url: Url = "http://127.0.0.1:4760"
    """The policy server: vLLM or the embedded one. Where there are several, see gateway.backends."""
    resource: Id = "policy"
    """Name of the resource that backend_url serves; recorded on every call."""
    backends: Annotated[list[BackendSettings], Field(max_length=_MAX_NAMED)] = Field(
        default_factory=list[BackendSettings]
    )
    """Every server, in place of backend_url: {url, kind, models, resource, api_key, api_key_file,
    forward_authorization, max_concurrent_requests, max_queued_requests}; kind is vllm or openai (an external provider).
    A vllm also serves what it lists, adapters included; one without models serves what no other names."""
    max_connections: Annotated[int, Field(ge=16, le=1_000_000)] = 4_096
    """Connections of agents at once, idle ones included, or as many as the process may open files for (two each).
    Beyond it a new one takes the place of the longest idle; where all are busy it is refused with 503."""
    max_body_bytes: Annotated[int, Field(ge=1_024, le=1 << 30)] = 4 * 1024 * 1024
    """Largest request an agent may send."""
    max_answer_bytes: Annotated[int, Field(ge=1_024, le=1 << 30)] = 64 * 1024 * 1024
    """Largest answer a backend may give: a million tokens with their logprobs."""
    max_concurrent_requests: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Requests on their way to backends at once; more wait."""
    max_queued_requests: Annotated[int, Field(ge=0, le=100_000)] = 1_024
    """Requests that may wait for a backend; more are refused with 429."""
    max_rollout_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens, prompts included, that one rollout may use over all its attempts and calls, as this gateway counts; then
    429. 0: no bound."""
    queue_seconds: Seconds = 60.0
    """Longest that a request waits for room at a busy backend; then 503. One that is away is waited for longer."""
    backend_seconds: Seconds = 120.0
    """Longest that a call waits for the first byte of its answer: its own body, queue, retries and a weight swap
    included. An answer that comes whole, its first byte with its end, may take answer_seconds where a backend that is
    well works on it by then. An agent may ask for less by the header x-request-timeout; OpenAI's clients say theirs."""
    silence_seconds: Seconds = 120.0
    """Longest pause within an answer, a weight swap included; comments within a stream do not end one."""
    answer_seconds: Seconds = 3_600.0
    """Longest that an answer takes from its first byte to its end, however steadily it comes, and one that comes whole
    from the call to its first byte; then 504."""
    exact_prompts: bool = True
    """Whether a conversation goes on with exactly the tokens it was sampled with, where a backend takes token ids (vLLM
    with --enable-scale-out, the embedded server); off: each prompt is tokenised anew, in one request instead of two.
    Whether it holds tool calls to a grammar a server is asked all the same."""
    publish_seconds: Seconds = 30.0
    """Longest that an answer waits for the broker to acknowledge its span; then 503."""
    answer_unrecorded: bool = False
    """Whether an agent gets its answer although Kafka did not take its call within publish_seconds: for agents in
    service that must go on. Off: 503."""
    health_seconds: Seconds = 2.0
    """How often a vllm is asked whether it is well, and which models it serves."""
    breaker_failures: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Failures in a row after which a backend is left alone for a while."""
    breaker_seconds: Seconds = 0.1
    """For how long it is left alone at first; doubled while it goes on failing."""
    max_breaker_seconds: Seconds = 5.0
    """For how long it is left alone at most."""

    @field_validator("api_keys")
    @classmethod
    def _names_differ(cls, keys: list[ApiKeySettings]) -> list[ApiKeySettings]:
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("two keys have the same name")
        return keys

    @field_validator("backends")
    @classmethod
    def _urls_differ(cls, backends: list[BackendSettings]) -> list[BackendSettings]:
        if len({backend.url for backend in backends}) < len(backends):
            raise ValueError("two backends have the same url: name its models in one of them")
        return backends

    @field_validator("backends")
    @classmethod
    def _keys_stay_here(cls, backends: list[BackendSettings], info: ValidationInfo) -> list[BackendSettings]:
        if info.data.get("api_keys") and any(backend.forward_authorization for backend in backends):
            raise ValueError("forward_authorization would hand on the keys of gateway.api_keys: use api_key_file")
        return backends

    def all_backends(self) -> list[BackendSettings]:
        """`backends`, or the one of the short form: that gets the agent's token, unless tokens are our own keys."""
        if self.backends:
            return self.backends
        # Constructed, not validated: what backend_url may be, its own field says.
        return [
            BackendSettings.model_construct(
                url=_base(self.backend_url),
                resource=self.resource,
                forward_authorization=not self.api_keys,
            )
        ]


def _base(url: str, *, of_openai: bool = False) -> str:
    """One spelling a server: it is recorded."""
    if of_openai and urlsplit(url).path.rstrip("/") != "/v1":
        return url.rstrip("/")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
