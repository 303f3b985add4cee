"""The rules of `redaction` as ClickHouse expressions: what `producers.redaction` does to a span, in SQL.

    text_sql(rules, "input")                 an expression for a String column
    attributes_sql(rules, "attributes")      for a Map(String, String), or one with LowCardinality keys
    redacted_select(rules, select, columns)  a view's SELECT with the named columns redacted
    derived_select(rules, select)            parse_otlp's SELECT, whose columns are made of redacted attributes

Expressions, not SQL functions: ClickHouse puts the body of a function into a view when the view is created, so a view
would not follow a function that is replaced (tried on 26.9); and functions belong to a server, rules to a database.
Without rules every function returns what it was given, which costs nothing. A test holds both sides to the same
results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from fulgurite.schemas.nested_keys import FIRST, MARK, Form, field_names, forms
from fulgurite.schemas.redaction import (
    HASH_DIGITS,
    HASH_PREFIX,
    HASHED,
    MASK,
    PROTECTED_NAMES,
    PROTECTED_PREFIXES,
    KeyRule,
    RedactionSettings,
)

Kind = Literal["text", "original", "letter", "attributes", "attributes and left_out", "events", "links"]
"""What a column holds. `original`: bytes kept to be looked at, of which only parts are taken out, nothing cut;
`letter`: those of a dead letter, of which keys are searched, too; `left_out`: a field of ours among attributes."""

_Of = Callable[[KeyRule], str]

SPAN_COLUMNS: Mapping[str, Kind] = {
    "name": "original",
    "status_message": "text",
    "service": "original",
    "agent": "original",
    "operation": "original",
    "model": "original",
    "endpoint": "original",
    "finish_reason": "original",
    "input": "text",
    "output": "text",
    "attributes": "attributes",
    "resource_attributes": "attributes",
    "state": "attributes",
    "extra": "attributes",
    "events": "events",
    "links": "links",
}
REWARD_COLUMNS: Mapping[str, Kind] = {"metadata": "attributes", "extra": "attributes"}
ROLLOUT_COLUMNS: Mapping[str, Kind] = {
    "error": "text",
    "reason": "text",
    "metadata": "attributes",
    "extra": "attributes",
}
TRAJECTORY_COLUMNS: Mapping[str, Kind] = {
    "error": "text",
    "metadata": "attributes",
    # The table has `left_out` in `extra`: names of agents and resources, as in columns that no rule is for.
    "extra": "attributes and left_out",
}
DEAD_LETTER_COLUMNS: Mapping[str, Kind] = {"value": "letter", "message": "original"}

_ATTRIBUTES_TABLE = "FROM otlp_rows AS o"
"""Where parse_otlp finds a span's attributes, as the arrays `names`, `texts` and `bits`."""
_NO_TEXTS = sum(1 << place for place in (*range(10), *range(42, 48), *range(49, 58)))
"""Bits of the names, by their places in explode_otlp, that become ids, counts, tokens, logprobs and versions."""


def redacted_select(rules: RedactionSettings, select: str, columns: Mapping[str, Kind]) -> str:
    """`select`, which gives `columns` among others, with these redacted."""
    changed = {name: column_sql(rules, kind, name) for name, kind in columns.items()}
    replaced = [f"{sql} AS {name}" for name, sql in changed.items() if sql != name]
    if not replaced:
        return select
    listed = ",\n    ".join(replaced)
    return f"SELECT * REPLACE (\n    {listed}\n)\nFROM (\n{select}\n)"


def derived_select(rules: RedactionSettings, select: str) -> str:
    """`select` of parse_otlp with the rules of `keys` applied to attributes before columns are made of them: one that
    is dropped was never there. Not to those of ids and counts. What `values` match is taken out of the columns."""
    if not rules.keys:
        return select
    start, found, end = select.rpartition(_ATTRIBUTES_TABLE)
    assert found, "parse_otlp reads another table"
    kept = f"({_is_protected()} OR bitAnd(b, {_NO_TEXTS}) != 0)"
    there = _by_rule(rules, lambda rule: "0" if rule.action == "drop" else "1", "1", "1", kept)
    cut = {rule: _cut("t", str(_least(rule.chars, rules.max_value_chars))) for rule in rules.keys if rule.chars}
    actions = {"drop": "v", "mask": _string(MASK), "hash": _hash(rules, "v")}
    nested = nested_sql(rules, "v")
    text = _by_rule(
        rules,
        lambda rule: (
            f"arrayMap(t -> {cut[rule]}, [{nested_sql(rules, parts_sql(rules, 'v'))}])[1]"
            if rule in cut
            else actions[rule.action]
        ),
        "v",
        nested,
        kept,
    )
    redacted = f"""FROM (
    SELECT * EXCEPT (attribute) REPLACE (
        attribute.1 AS names,
        arrayMap((k, v, b) -> {text}, attribute.1, attribute.2, attribute.3) AS texts,
        attribute.3 AS bits,
        arrayReduce('groupBitOr', attribute.3) AS mask,
        {attributes_sql(rules, "resource_attributes")} AS resource_attributes
    )
    FROM (
        SELECT *, arrayFilter((a, k, b) -> {there}, arrayZip(names, texts, bits), names, bits) AS attribute
        FROM otlp_rows
    )
) AS o"""
    return f"{start}{redacted}{end}"


def column_sql(rules: RedactionSettings, kind: Kind, expression: str) -> str:
    """The redacted form of one column."""
    if kind == "text":
        return text_sql(rules, expression)
    if kind == "original":
        return parts_sql(rules, expression)
    if kind == "letter":
        return nested_sql(rules, parts_sql(rules, expression), of_letter=True)
    if kind == "attributes":
        return attributes_sql(rules, expression)
    if kind == "attributes and left_out":
        return attributes_sql(rules, expression, f"({_is_protected()} OR k = 'left_out')")
    attributes = attributes_sql(rules, "e.3")
    first = parts_sql(rules, "e.1") if kind == "events" else "e.1"
    if (first, attributes) == ("e.1", "e.3"):
        return expression
    names = ("name", "time_ns") if kind == "events" else ("trace_id", "span_id")
    kinds = ("String", "Int64") if kind == "events" else ("String", "String")
    row = f"Tuple({names[0]} {kinds[0]}, {names[1]} {kinds[1]}, attributes Map(String, String))"
    return f"CAST(arrayMap(e -> ({first}, e.2, {attributes}), {expression}), 'Array({row})')"


def text_sql(rules: RedactionSettings, expression: str) -> str:
    """Parts taken out, then cut to max_text_chars."""
    parts = parts_sql(rules, expression)
    if not rules.max_text_chars:
        return parts
    # Through an array, so that the replacing is written once: an insert analyses the view anew.
    return f"arrayMap(t -> {_cut('t', str(rules.max_text_chars))}, [{parts}])[1]"


def parts_sql(rules: RedactionSettings, expression: str) -> str:
    """What value rules match is replaced, nothing else."""
    for rule in rules.values:
        expression = f"replaceRegexpAll({expression}, {_string(rule.pattern.re2)}, {_string(rule.mark)})"
    return expression


def attributes_sql(rules: RedactionSettings, expression: str, kept: str = "") -> str:
    """A map without what is dropped, with what remains masked, hashed, replaced in parts, or cut. `kept`: which names
    `k` no rule is for, where that is not as everywhere."""
    if any(rule.action == "drop" for rule in rules.keys):
        there = _by_rule(rules, lambda rule: "0" if rule.action == "drop" else "1", "1", "1", kept)
        expression = f"mapFilter((k, v) -> {there}, {expression})"
    parts = nested_sql(rules, parts_sql(rules, "v"))
    actions = {"drop": "v", "mask": _string(MASK), "hash": _hash(rules, "v"), "cut": parts}
    changed = _by_rule(rules, lambda rule: actions[rule.action], "v", parts, kept)
    if changed != "v":
        expression = f"mapApply((k, v) -> (k, {changed}), {expression})"
    most = rules.max_value_chars
    bound = _by_rule(rules, lambda rule: str(_least(rule.chars, most)), "0", str(most), kept)
    if bound != "0":
        expression = f"mapApply((k, v) -> (k, {_cut('v', bound)}), {expression})"
    return expression


def nested_sql(rules: RedactionSettings, expression: str, *, of_letter: bool = False) -> str:
    """JSON text with the values of keys masked that a rule takes away (schemas/nested_keys.py). What costs is asked
    only of what needs it, by arrays without others: ClickHouse may evaluate both branches of an `if` for every row."""
    hit = _by_rule(rules, lambda rule: "0" if rule.action == "cut" else "1", "0", "0")
    if hit == "0":
        return expression
    otlp, plain = forms(python=False)
    if not of_letter:
        begins = ", ".join(_string(character) for character in FIRST)
        return _masked_sql(plain, hit, expression, f"substring(t, 1, 1) IN ({begins})")
    names = ", ".join(_string(name) for name in sorted(field_names()))
    return _masked_sql(plain, f"({hit} AND k NOT IN ({names}))", _masked_sql(otlp, hit, expression, "1"), "1")


def _masked_sql(form: Form, hit: str, expression: str, condition: str) -> str:
    """One form of a key with its value; `hit`: whether the name `k` is masked; `condition`: whether the text `t` is
    searched. As short as can be: every insert analyses it anew."""
    key, mark = _string(form.key), _string(MARK)
    # Text, a key, text, a key, …
    around = _string(f"{MARK}\\0{MARK}")
    parts = f"splitByString({mark}, replaceRegexpAll(replaceAll(t, {mark}, ''), {key}, {around}))"
    chosen = f"arrayMap(t -> {parts}, arrayFilter(t -> {condition}, [s]))"
    hits = f"arrayMap((p, i) -> i % 2 = 0 AND arrayExists(k -> {hit}, [extract(p, {key})]), ps, arrayEnumerate(ps))"
    found = f"arrayFilter(x -> has(x.2, 1), arrayMap(ps -> (ps, {hits}), {chosen}))"
    marked = f"toValidUTF8(arrayStringConcat(arrayMap((p, h) -> if(h, concat(p, {mark}), p), x.1, x.2)))"
    done = f"replaceAll(replaceRegexpAll({marked}, {_string(form.value)}, {_string(form.masked)}), {mark}, '')"
    return f"arrayMap(s -> arrayConcat(arrayMap(x -> {done}, {found}), [s])[1], [{expression}])[1]"


def _by_rule(rules: RedactionSettings, of: _Of, protected: str, otherwise: str, kept: str = "") -> str:
    """The value of the first rule that matches the name `k`; `protected` where no rule applies to it (`kept`)."""
    values = [of(rule) for rule in rules.keys]
    if all(value == otherwise for value in (protected, *values)):
        return otherwise
    branches = [f"{kept or _is_protected()}, {protected}"]
    branches += [f"{_matches(rule)}, {value}" for rule, value in zip(rules.keys, values, strict=True)]
    return f"multiIf({', '.join(branches)}, {otherwise})"


def _matches(rule: KeyRule) -> str:
    """Whether the rule is for the name `k`: most globs need no expression, which is several times as quick."""
    start = rule.name.removesuffix("*")
    if rule.name and not any(wild in start for wild in "*?"):
        return f"k = {_string(start)}" if start == rule.name else f"startsWith(k, {_string(start)})"
    return f"match(k, {_string(rule.pattern.re2)})"


def _least(chars: int, most: int) -> int:
    """The smaller bound, where 0 is none."""
    return min(chars, most) if chars and most else chars or most


def _is_protected() -> str:
    prefixes = [f"startsWith(k, {_string(prefix)})" for prefix in PROTECTED_PREFIXES]
    names = [f"k = {_string(name)}" for name in PROTECTED_NAMES]
    return f"({' OR '.join(prefixes + names)})"


def _cut(expression: str, bound: str) -> str:
    """`bound` may be 0: none. Bytes are compared first: they are never fewer than characters, and known."""
    characters = f"lengthUTF8({expression})"
    mark = f"concat('… (', toString({characters}), ' characters)')"
    cut = f"concat(leftUTF8({expression}, toInt64({bound}) - toInt64(lengthUTF8({mark}))), {mark})"
    is_longer = f"length({expression}) > {bound} AND {characters} > {bound}"
    return f"if({'' if bound.isdigit() else f'{bound} > 0 AND '}{is_longer}, {cut}, {expression})"


def _hash(rules: RedactionSettings, expression: str) -> str:
    salted = f"concat({_string(rules.hash_salt.get_secret_value())}, {expression})"
    hashed = f"concat('{HASH_PREFIX}', lower(substring(hex(SHA256({salted})), 1, {HASH_DIGITS})))"
    return f"if(match({expression}, {_string(HASHED)}), {expression}, {hashed})"


def _string(text: str) -> str:
    """A ClickHouse literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
