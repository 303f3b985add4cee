"""Settings of the algorithms that follow the log: a user's own, the rewards' pipeline, rules, the search for prompts.

Knows nothing of their code. What cannot go together is refused here, with its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from fulgurite.schemas.patterns import portable
from fulgurite.schemas.sections import Seconds, Section, Url

MAX_SOURCES = 60
MAX_RULES = 1_000
MAX_TOOLS = 1_000
RESERVED_SOURCES = frozenset({"reward", "agent", "compliance"})
"""The sum's own parts, and the sum."""

SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Concurrency = Annotated[int, Field(ge=1, le=1_024)]
Tries = Annotated[int, Field(ge=1, le=100)]
Temperature = Annotated[float, Field(ge=0, le=2)] | Literal["default"]
"""default: the model's own, the field is not sent at all; reasoning models of some providers refuse any value."""


class AlgorithmSettings(Section):
    tries: Tries = 3
    """How often a function that raises is tried with the same input."""
    on_error: Literal["dead_letter", "stop"] = "dead_letter"
    """After the last try. dead_letter: the input is one, with the reason, and the next one's turn comes; stop: the
    process ends, and a restart begins with this input."""
    timeout_seconds: Seconds = 600.0
    """Longest one try may take. A plain function's thread cannot be ended: it goes on, unheard; with 256 of them the
    process ends."""
    concurrency: Concurrency = 16
    """Inputs at work at once; what they yield is published in the order of the log all the same."""
    max_open_groups: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Incomplete groups in memory; beyond it the oldest is closed as its deadline would. Also how many are remembered,
    with those that were given incomplete."""
    group_deadline_seconds: Seconds = 600.0
    """After its first trajectory a group waits so long for the rest; then it is given as it is, if it has two."""


class RewardSource(Section):
    """One part of a reward: a Python function, or a model that is asked over OpenAI's API."""

    name: SourceName
    """Of the reward it gives, as it stands on `rewards` and in the trajectory."""
    function: str = ""
    """module:function; function(attempt) gives a number, names with numbers, or None for none."""
    url: Url | None = None
    """The judge's base URL, for example http://127.0.0.1:8000/v1."""
    model: str = ""
    """The judge's `model`."""
    api_key: SecretStr = SecretStr("")
    """The judge's."""
    temperature: Temperature = 0.0
    """The judge's. default: it is not sent, for models that refuse any (o3, gpt-5)."""
    template: Path | None = None
    """File with what the judge is asked: text with {input}, {output} or {transcript}, and {agent} and {status}."""
    answer: str = r"-?[0-9]+(?:\.[0-9]+)?"
    """What a number is in the judge's answer; which of several is the reward must be clear, see docs/algorithms.md. Of
    an expression with words, such as (?i)points: *[0-9]+, it is the last match, by the number at its end."""
    weight: float = 1.0
    """Of this part in the sum."""
    low: float | None = None
    """Smaller values count as this one."""
    high: float | None = None
    """Larger values count as this one."""
    agent: str = ""
    """Only for rollouts of this agent; empty: of all."""
    required: bool = True
    """Whether an attempt without this part has no reward at all."""

    @field_validator("answer")
    @classmethod
    def _is_portable(cls, answer: str) -> str:
        portable(answer)
        return answer

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if bool(self.function) == bool(self.url):
            raise ValueError(f"{self.name}: needs a function (module:function) or a judge's url, not both")
        if self.url and not (self.model and self.template):
            raise ValueError(f"{self.name}: a judge needs model and template too")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"{self.name}: low = {self.low:g} is not below high = {self.high:g}")
        return self


class AggregatorSettings(Section):
    sources: Annotated[list[RewardSource], Field(max_length=MAX_SOURCES)] = Field(default_factory=list[RewardSource])
    """The parts of the reward, each a table [[aggregator.sources]]: see docs/algorithms.md."""
    agent_weight: float = 1.0
    """Of the reward that the agent itself gave; 0: it does not count and need not be there; then a source or
    a rule must."""
    low: float | None = None
    """Smaller sums count as this one."""
    high: float | None = None
    """Larger sums count as this one."""
    timeout_seconds: Seconds = 60.0
    """Longest one answer of a judge, or one call of a function, may take. A plain function's thread cannot be ended: it
    goes on, unheard; with 256 of them the process ends."""
    tries: Tries = 3
    """How often a part is tried that fails, gives no number, or takes too long. A judge that is away (no connection,
    429, 502, 503, 504), or does not know the key or the model (401, 402, 404), is waited for, for ever."""
    concurrency: Concurrency = 16
    """Attempts at work at once."""
    max_judge_calls: Concurrency = 32
    """Questions to judges at once, over all attempts."""
    max_transcript_chars: Annotated[int, Field(ge=1_000, le=4_000_000)] = 200_000
    """Of what {input}, {output} and {transcript} each put into a question; the middle of longer ones is left out."""
    cache: Path | None = None
    """SQLite file with verdicts by question, so that no judge is asked the same twice; empty: in memory."""
    cache_entries: Annotated[int, Field(ge=1, le=100_000_000)] = 1_000_000
    """Verdicts kept, newest first."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"sources of the same name: {', '.join(sorted(doubled))}")
        if taken := RESERVED_SOURCES & set(names):
            raise ValueError(
                f"a source cannot be named {', '.join(sorted(taken))}: reward is the sum, agent what the agent itself "
                "gave, compliance what violations cost; choose another name"
            )
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        return self


Operation = Literal["eq", "ne", "lt", "le", "gt", "ge", "in", "contains", "matches", "exists"]
_SPAN_TEXTS = ("name", "kind", "status", "status_message", "agent", "operation", "resource", "model", "finish_reason")
_SPAN_FIELDS = (*_SPAN_TEXTS, "input", "output", "input_tokens", "output_tokens", "duration_seconds", "tool")


def _check_field(field: str) -> str:
    if field not in _SPAN_FIELDS and not field.startswith(("attributes.", "state.")):
        raise ValueError(f"{field!r}: one of {', '.join(_SPAN_FIELDS)}, or attributes.NAME, or state.NAME")
    return field


class Predicate(Section):
    """A condition on one field of a span."""

    field: str
    """A field of the span, `tool`, `duration_seconds`, attributes.NAME or state.NAME."""
    op: Operation = "eq"
    """eq ne lt le gt ge: compared with value; in: value has it; contains: it has value; matches: value is an
    expression found in it; exists: it is there (value = false: it is not)."""
    value: Any = True
    """What it is compared with."""

    @field_validator("field")
    @classmethod
    def _is_known(cls, field: str) -> str:
        return _check_field(field)

    @model_validator(mode="after")
    def _value_fits(self) -> Self:
        value = self.value
        if self.op in ("lt", "le", "gt", "ge") and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{self.field} {self.op} needs a number")
        if self.op == "in" and not isinstance(value, list):
            raise ValueError(f"{self.field} in needs a list")
        if self.op in ("contains", "matches") and not (isinstance(value, str) and value):
            raise ValueError(f"{self.field} {self.op} needs a text")
        if self.op == "matches":
            portable(str(value))
        if self.op == "exists" and not isinstance(value, bool):
            raise ValueError(f"{self.field} exists needs true or false")
        return self


ToolGlobs = Annotated[list[Annotated[str, Field(min_length=1, max_length=512)]], Field(max_length=MAX_TOOLS)]


class ComplianceRule(Section):
    """What must not be: spans chosen by agent, operation, tool and `when`, and one check of them."""

    name: SourceName
    """Stands in the audit."""
    agent: str = ""
    """Only spans of agents like this (* and ?); empty: all."""
    operation: str = ""
    """Only spans of this operation (chat, execute_tool, …); empty: all."""
    tool: str = ""
    """Only calls of tools like this (* and ?); empty: all spans."""
    when: Annotated[list[Predicate], Field(max_length=32)] = Field(default_factory=list[Predicate])
    """Only spans for which all of these hold."""
    pattern: str = ""
    """Check: each place where this expression is found in `field` is a violation."""
    field: str = "output"
    """Where the pattern is looked for."""
    deny_tools: ToolGlobs = Field(default_factory=list[str])
    """Check: each call of a tool like one of these is a violation."""
    allow_tools: ToolGlobs = Field(default_factory=list[str])
    """Check: each call of a tool like none of these is a violation."""
    max_calls: Annotated[int, Field(ge=0)] | None = None
    """Check: each span chosen beyond so many is a violation."""
    forbid: bool = False
    """Check: each span chosen is a violation."""
    cost: Annotated[float, Field(gt=0)] = 1.0
    """Of one violation."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """Most that an attempt loses by this rule; not set: no bound."""

    @field_validator("field")
    @classmethod
    def _is_known(cls, field: str) -> str:
        return _check_field(field)

    @field_validator("pattern")
    @classmethod
    def _is_portable(cls, pattern: str) -> str:
        if pattern:
            portable(pattern)
        return pattern

    @model_validator(mode="after")
    def _one_check(self) -> Self:
        checks = {
            "pattern": bool(self.pattern),
            "deny_tools": bool(self.deny_tools),
            "allow_tools": bool(self.allow_tools),
            "max_calls": self.max_calls is not None,
            "forbid": self.forbid,
        }
        if sum(checks.values()) != 1:
            raise ValueError(f"{self.name}: needs exactly one of {', '.join(checks)}")
        return self


class ComplianceSettings(Section):
    version: SourceName = "1"
    """Of the rules, for the audit: change it when they change."""
    rules: Annotated[list[ComplianceRule], Field(max_length=MAX_RULES)] = Field(default_factory=list[ComplianceRule])
    """Each a table [[compliance.rules]]: see docs/algorithms.md. The aggregator applies them."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of their cost in the reward's sum; 0: violations are only recorded."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [rule.name for rule in self.rules]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"rules of the same name: {', '.join(sorted(doubled))}")
        return self


class PromptSettings(Section):
    run_id: str = ""
    """Name of the search; a restart with the same name goes on where it stood. Required."""
    resource: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "prompt"
    """Which prompt template it makes versions of."""
    seed: Path | None = None
    """File with the template to begin with; empty: the newest version there is."""
    tasks: str = ""
    """Where tasks come from, as module:function; function(index) gives the task's input. The first val_batch of them
    compare candidates. Required."""
    agent: str = ""
    """Recorded on its rollouts, for streams with several agents."""
    critic_url: Url = "http://127.0.0.1:8000/v1"
    """Base URL of the critic, any server with OpenAI's chat completions."""
    critic_model: str = ""
    """Its `model`. Required."""
    critic_api_key: SecretStr = SecretStr("")
    """Its key."""
    critic_temperature: Temperature = 1.0
    """Its temperature: not 0, as several edits of one template shall differ. default: it is not sent, for models that
    refuse any."""
    critic_timeout_seconds: Seconds = 120.0
    """Longest one answer may take, from the connection to its last byte."""
    gradient_template: Path | None = None
    """File with the question what is wrong with a prompt: needs {template} and {examples}. Not set: one of our own."""
    edit_template: Path | None = None
    """File with the order to write a better one: needs {template} and {critique}. Not set: one of our own."""
    must_contain: Annotated[list[str], Field(max_length=64)] = Field(default_factory=list[str])
    """What every template must have in it, such as "{question}"; edits without it are thrown away. Empty: all
    {places} of the first template."""
    rounds: Annotated[int, Field(ge=1, le=1_000)] = 3
    """Rounds of critique and edit."""
    beam_width: Annotated[int, Field(ge=1, le=64)] = 4
    """Best candidates that each round goes on from."""
    branch_factor: Annotated[int, Field(ge=1, le=64)] = 4
    """Edits of each of them."""
    gradient_batch: Annotated[int, Field(ge=1, le=64)] = 4
    """Rollouts, the worst ones first, that the critic is shown."""
    val_batch: Annotated[int, Field(ge=1, le=1_024)] = 16
    """Tasks that every candidate is tried on, the same for all."""
    max_rollouts: Annotated[int, Field(ge=1)] = 2_000
    """Budget: no candidate is tried that would need more."""
    max_critic_calls: Annotated[int, Field(ge=1)] = 200
    """Budget: no edit is asked for that would need more."""
    max_template_chars: Annotated[int, Field(ge=1, le=1_000_000)] = 20_000
    """Longer edits are thrown away."""
    rollout_timeout_seconds: Seconds = 600.0
    """Longest one attempt may take."""
    candidate_deadline_seconds: Annotated[float, Field(gt=0, le=604_800)] = 3_600.0
    """Longest that a round waits for its rollouts; those missing then have no reward: each counts as the lowest
    reward that the search has seen."""
    min_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of a candidate's rollouts that must have a reward; with less it is out. Above it, a rollout without
    one counts as the lowest reward that the search has seen."""
