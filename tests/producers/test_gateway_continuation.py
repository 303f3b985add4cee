"""Prompts that begin with exactly the earlier tokens, where writing the conversation again gives others.

A byte-level BPE and responses of arbitrary tokens: decoded and encoded again they are hardly ever what they were, as
with a policy that does not write a text the tokenizer's way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fulgurite.producers.gateway.continuation import Closing, NotContinued, Turn, splice, tokens
from fulgurite.producers.gateway.conversations import MAX_TURNS, OF_A_TURN, OF_AN_ATTEMPT, Conversations
from fulgurite.schemas.spans import Span
from fulgurite.streams.assembler.join import merge_calls

END_TEXT = "<|end|>"
END, FIRST_PLAIN = 0, 4
ATTEMPT = ("rollout-1", "attempt-1", "policy")
CLOSING = Closing(END, own=True)


@cache
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[END_TEXT, "<|user|>", "<|assistant|>", "<|tool|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    made.train_from_iterator(["the tool answers with numbers\n\n", "why not, 12 + 34 = 46\n", "<| end |>"], trainer)
    return made


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def decode(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=False)


def written(messages: list[dict[str, Any]]) -> str:
    """The chat template."""
    return "".join(f"<|{message['role']}|>\n{message['content']}{END_TEXT}" for message in messages)


def render(messages: list[dict[str, Any]]) -> list[int]:
    return encode(written(messages) + "<|assistant|>\n")


def said(response: list[int]) -> str:
    """The answer's text, as servers give it: without the token that ends it."""
    return decode(response[:-1] if response[-1] == END else response)


PLAIN = st.lists(st.integers(FIRST_PLAIN, 320), min_size=1, max_size=12)
RESPONSES = st.lists(
    st.one_of(PLAIN, PLAIN.map(lambda ids: [*ids, END]), st.just([END]), st.just([*encode("\n\n"), END])),
    min_size=1,
    max_size=5,
)


class Exchange:
    """An agent that goes on with every answer, and a gateway that remembers."""

    def __init__(self) -> None:
        self.conversations = Conversations()
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": "what is 12 + 34?"}]
        self.calls: list[Span] = []
        self.naive: list[Span] = []
        self.continued = 0

    def turn(self, response: list[int], result: str) -> None:
        rendered = render(self.messages)
        found = self.conversations.find(ATTEMPT, self.messages)
        prompt, answers = rendered, ()
        if found:
            spliced = splice(found.turn, tokens(rendered), CLOSING)
            prompt, answers = spliced.prompt.tolist(), spliced.answers
            self.continued += 1
        self.calls.append(span(len(self.calls), prompt, response))
        self.naive.append(span(len(self.calls), rendered, response))
        answer = {"role": "assistant", "content": said(response), "refusal": None}
        end_text = END_TEXT if response[-1] == END else None
        self.conversations.remember(
            ATTEMPT,
            self.messages,
            answer,
            rendered=rendered,
            prompt=prompt,
            response=response,
            end_text=end_text,
            answers=answers,
        )
        self.messages = [*self.messages, answer, {"role": "tool", "content": result}]


def span(number: int, prompt: list[int], response: list[int]) -> Span:
    return Span(
        rollout_id="rollout-1",
        attempt_id="attempt-1",
        sequence_id=number + 1,
        trace_id="1" * 32,
        span_id=f"{number + 1:016x}",
        name="chat",
        kind="client",
        status="ok",
        start_ns=number + 1,
        end_ns=number + 2,
        operation="chat",
        prompt_token_ids=prompt,
        response_token_ids=response,
        logprobs=[-1.0] * len(response),
    )


@settings(max_examples=200, deadline=None)
@given(RESPONSES, st.text(max_size=20))
def test_a_prompt_begins_with_the_tokens_of_the_turn_before_and_goes_on_as_the_template_says(
    responses: list[list[int]], result: str
):
    exchange = Exchange()
    exchange.turn([*encode("46"), END], result)  # one that ended by itself: the end-of-turn token is known from here
    for response in responses:
        exchange.turn(response, result)
    for earlier, later in zip(exchange.calls, exchange.calls[1:], strict=False):
        before = [*earlier.prompt_token_ids, *earlier.response_token_ids]
        if END_TEXT in said(earlier.response_token_ids):
            continue  # never remembered, see below
        assert later.prompt_token_ids[: len(before)] == before
        closing = "" if before[-1] == END else END_TEXT
        tail = f"{closing}{written([{'role': 'tool', 'content': result}])}<|assistant|>\n"
        assert decode(later.prompt_token_ids[len(before) :]) == decode(encode(tail))


def test_tokens_drift_when_the_conversation_is_written_again_and_do_not_when_continued():
    numbers, other = encode(" numbers"), [encode(letter)[0] for letter in "numbers"]
    exchange = Exchange()
    exchange.turn([*encode("the tool"), *other, END], "12")
    exchange.turn([*numbers, END], "34")
    exchange.turn([*other, END], "46")
    exchange.turn([*encode("46"), END], "")
    assert exchange.continued == 3
    (sequence,) = merge_calls(exchange.calls)
    assert sum(sequence.loss_mask) == sum(len(call.response_token_ids) for call in exchange.calls)
    assert len(merge_calls(exchange.naive)) > 1  # the drift: what was sampled is not in the next prompt


def test_an_answer_that_spells_out_the_end_of_turn_is_written_again_and_those_before_it_are_kept():
    exchange = Exchange()
    first = [*encode("4"), *encode("6"), END]
    spelled = [*(encode(letter)[0] for letter in END_TEXT), *encode("more"), END]
    assert END not in spelled[:-1]
    exchange.turn(first, "ok")
    exchange.turn(spelled, "ok")
    exchange.turn([*encode("46"), END], "ok")
    one, two, three = (call.prompt_token_ids for call in exchange.calls)
    assert three[: len(two)] == two == [*one, *first, *two[len(one) + len(first) :]]
    assert three[: len(two) + len(spelled)] != [*two, *spelled]
    assert decode(three) == decode(exchange.naive[2].prompt_token_ids)


def a_turn(rendered: list[int], response: list[int], ends: set[int], finished: bool = True) -> Turn:
    before = tokens(rendered)
    return Turn(before, before, tokens(response), finished, frozenset(ends))


def test_a_history_that_is_written_differently_is_not_continued():
    turn = a_turn([9, 9, END, 2, 5], [8, 8, END], {END})
    assert splice(turn, tokens([9, 9, END, 2, 5, 7, END, 3]), CLOSING).prompt.tolist() == [
        9,
        9,
        END,
        2,
        5,
        8,
        8,
        END,
        3,
    ]
    assert splice(turn, tokens([9, 9, END, 2, 6, 7, END, 3]), CLOSING).prompt.tolist() == [
        9,
        9,
        END,
        2,
        5,
        8,
        8,
        END,
        3,
    ]  # merged
    for rendered in ([9, 1, END, 2, 5, 7, END, 3], [9, 9, END, 1, 5, 7, END, 3], [9, 9, 9, END, 2, 5, 7, END], [9]):
        with pytest.raises(NotContinued) as caught:
            splice(turn, tokens(rendered), CLOSING)
        assert caught.value.reason == "history"


def test_without_an_end_of_turn_there_is_nothing_to_hold_on_to():
    for turn in (a_turn([9, 2], [8], set(), finished=False), a_turn([9, 2], [8, END], {END})):
        with pytest.raises(NotContinued) as caught:
            splice(turn, tokens([9, 2, 7, 7, 7]), CLOSING)
        assert caught.value.reason == "end_of_turn"


def test_any_known_end_of_turn_closes_an_answer():
    """A policy may end a turn with another token than the template closes it with: what it sampled stays."""
    turn = a_turn([9, END, 2], [8, 1], {END, 1})
    assert splice(turn, tokens([9, END, 2, 8, END, 3]), CLOSING).prompt.tolist() == [9, END, 2, 8, 1, 3]
    cut = a_turn([9, END, 2], [8], {END, 1}, finished=False)
    assert splice(cut, tokens([9, END, 2, 8, END, 3]), CLOSING).prompt.tolist() == [9, END, 2, 8, END, 3]


def test_where_the_closing_of_an_answer_is_in_doubt_it_is_not_continued():
    finished = a_turn([9, END, 2], [60, 61, END], {END})
    with pytest.raises(NotContinued) as caught:  # text and tool call closed each: the form has no closing
        splice(finished, tokens([9, END, 2, 60, END, 2, 61, END, 3]), None)
    assert caught.value.reason == "form"
    with pytest.raises(NotContinued) as caught:  # the template closes with a token that is not known
        splice(a_turn([9, END, 2], [60, 1], {1}), tokens([9, END, 2, 60, END, 7, 33, END, 2, 61, 1, 3]), CLOSING)
    assert caught.value.reason == "end_of_turn"
    with pytest.raises(NotContinued) as caught:  # another end comes before
        splice(a_turn([9, END, 2], [60, END], {END, 1}), tokens([9, END, 2, 60, 1, 7, 33, END, 3]), CLOSING)
    assert caught.value.reason == "end_of_turn"


def test_what_only_a_generation_prompt_has_may_be_left_out_of_the_history():
    turn = a_turn([9, END, 2, 5, 6], [8, END], {END})
    thinking = Closing(END, own=True, dropped=(5, 6))
    for rendered in ([9, END, 2, 7, END, 3], [9, END, 2, 5, 6, 7, END, 3]):
        assert splice(turn, tokens(rendered), thinking).prompt.tolist() == [9, END, 2, 5, 6, 8, END, 3]
    for closing in (CLOSING, Closing(END, own=True, dropped=(4, 6))):  # not the end of that prompt
        with pytest.raises(NotContinued, match="history"):
            splice(turn, tokens([9, END, 2, 7, END, 3]), closing)
    with pytest.raises(NotContinued, match="history"):
        splice(turn, tokens([9, 1, 2, 7, END, 3]), thinking)
    closing_question = a_turn(
        [9, END, 2, 5], [8, END], {END}
    )  # the prompt that begins answers closes the question, too
    with pytest.raises(NotContinued, match="history"):
        splice(closing_question, tokens([9, 2, 7, END, 3]), Closing(END, own=True, dropped=(END, 2, 5)))


def test_earlier_answers_may_be_written_otherwise_and_what_stands_around_them_may_not():
    first = a_turn([9, END, 2], [8, END], {END})
    second = splice(first, tokens([9, END, 2, 50, 51, END, 3, END, 2]), CLOSING)
    assert second.prompt.tolist() == [9, END, 2, 8, END, 3, END, 2]
    assert second.answers == ((2, 5),)
    rendered = tokens([9, END, 2, 50, 51, END, 3, END, 2])
    turn = Turn(rendered, second.prompt, tokens([7, END]), True, frozenset({END}), second.answers)
    third = splice(turn, tokens([9, END, 2, 51, END, 3, END, 2, 52, END, 4, END, 2]), CLOSING)
    assert third.prompt.tolist() == [9, END, 2, 8, END, 3, END, 2, 7, END, 4, END, 2]
    assert third.answers == ((2, 4), (7, 9))
    for other in (
        [9, END, 2, 51, END, 6, END, 2, 52, END, 4, END, 2],  # what came after the first answer
        [6, END, 2, 51, END, 3, END, 2, 52, END, 4, END, 2],  # what came before
        [9, END, 2, 51, END, END, 3, END, 2, 52, END, 4],  # an end more
        [9, END, 2, 51],
    ):
        with pytest.raises(NotContinued, match="history"):
            splice(turn, tokens(other), CLOSING)


def test_a_token_that_opens_what_comes_next_is_never_lost():
    role, other = 3, 1
    after = tokens([9, 2, 60, role, 30, 2])
    opens = Closing(role, own=False)
    ends = {role, other}
    assert splice(a_turn([9, 2], [8, role], ends), after, opens).prompt.tolist() == [9, 2, 8, role, 30, 2]
    assert splice(a_turn([9, 2], [8, other], ends), after, opens).prompt.tolist() == [9, 2, 8, other, role, 30, 2]
    assert splice(a_turn([9, 2], [8], ends, finished=False), after, opens).prompt.tolist() == [9, 2, 8, role, 30, 2]
    unknown = Closing(role, own=None)
    assert splice(a_turn([9, 2], [8, role], ends), after, unknown).prompt.tolist() == [9, 2, 8, role, 30, 2]
    with pytest.raises(NotContinued, match="end_of_turn"):
        splice(a_turn([9, 2], [8, other], ends), after, unknown)


QUESTION = {"role": "user", "content": "2 + 2?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2,"b":2}'}}
ANSWER = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": None}


def remembering(answer: dict[str, Any], **more: Any) -> Conversations:
    conversations = Conversations()
    ids: dict[str, Any] = {"rendered": [9, 2], "prompt": [9, 2], "response": [8, END], "end_text": END_TEXT} | more
    conversations.remember(ATTEMPT, [QUESTION], answer, **ids)
    return conversations


@pytest.mark.parametrize(
    "sent_back",
    [
        ANSWER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL], "refusal": None, "audio": None},
        ANSWER | {"tool_calls": [CALL | {"function": {"name": "add", "arguments": '{"b": 2, "a": 2}'}}]},
    ],
)
def test_an_answer_is_recognised_whatever_its_way_through_a_framework(sent_back: dict[str, Any]):
    tool = {"role": "tool", "content": "4", "tool_call_id": "c1"}
    assert remembering(ANSWER).find(ATTEMPT, [QUESTION, sent_back, tool])


@pytest.mark.parametrize(
    "messages",
    [
        [QUESTION],
        [QUESTION | {"content": "2 + 3?"}, ANSWER],
        [QUESTION, ANSWER | {"content": "so"}],
        [QUESTION, ANSWER | {"tool_calls": []}],
        [QUESTION, ANSWER | {"tool_calls": [CALL | {"function": {"name": "add", "arguments": '{"a": 2}'}}]}],
        [QUESTION, ANSWER | {"reasoning": "hm"}],
        [{"role": "system", "content": "be brief"}, QUESTION, ANSWER],
        ["no message"],
        [],
    ],
)
def test_what_is_not_the_answer_is_not_found(messages: list[Any]):
    assert remembering(ANSWER).find(ATTEMPT, messages) is None


THOUGHT = ANSWER | {"reasoning": "two and two"}


def test_an_answer_is_recognised_with_its_reasoning_or_without():
    conversations = remembering(THOUGHT)
    for sent_back, reasons in ((ANSWER, False), (ANSWER | {"reasoning_content": "two and two"}, True)):
        found = conversations.find(ATTEMPT, [QUESTION, sent_back])
        assert found
        assert found.form == (False, 1, reasons)
    assert conversations.find(ATTEMPT, [QUESTION, ANSWER | {"reasoning": "three and one"}]) is None


def test_reasoning_may_go_missing_later_with_all_that_was_before():
    conversations = remembering(THOUGHT)
    more = [QUESTION, THOUGHT, {"role": "tool", "content": "4", "tool_call_id": "c1"}]
    then = {"role": "assistant", "content": "four", "reasoning": "it says four"}
    conversations.remember(ATTEMPT, more, then, rendered=[9, 3], prompt=[9, 3], response=[7, END], end_text=END_TEXT)
    silent = [message | {"reasoning": None} for message in [*more, then]]
    for messages in ([*more, then], silent):
        found = conversations.find(ATTEMPT, [*messages, QUESTION])
        assert found
        assert (found.turn.response.tolist(), found.follows) == ([7, END], "user")


def test_without_reasoning_an_answer_that_may_be_one_of_several_is_not_found():
    conversations = remembering(THOUGHT)
    other = ANSWER | {"reasoning": "three and one"}
    conversations.remember(ATTEMPT, [QUESTION], other, rendered=[9], prompt=[9], response=[6, END], end_text=END_TEXT)
    assert conversations.find(ATTEMPT, [QUESTION, ANSWER]) is None
    for sent_back, response in ((THOUGHT, [8, END]), (other, [6, END])):
        found = conversations.find(ATTEMPT, [QUESTION, sent_back])
        assert found
        assert found.turn.response.tolist() == response


def test_attempts_and_models_are_strangers_to_each_other():
    assert remembering(ANSWER).find(("rollout-1", "attempt-2", "policy"), [QUESTION, ANSWER]) is None
    assert remembering(ANSWER).find(("rollout-1", "attempt-1", "other"), [QUESTION, ANSWER]) is None


def test_memory_is_bounded_and_the_attempt_silent_for_longest_goes_first():
    most = 4 * (OF_AN_ATTEMPT + OF_A_TURN + 9)
    conversations = Conversations(max_tokens=most)
    for number in range(50):
        conversations.remember(
            (str(number),), [QUESTION], ANSWER, rendered=[9] * 8, prompt=[9] * 8, response=[END], end_text=END_TEXT
        )
        assert conversations.tokens <= most
        assert conversations.find(("0",), [QUESTION, ANSWER]), number  # asked for, so not silent
    assert conversations.find(("1",), [QUESTION, ANSWER]) is None
    for number in range(2_000):
        conversations.remember(
            ("0",), [QUESTION], {"content": number}, rendered=[9], prompt=[9], response=[8], end_text=None
        )
    assert conversations.tokens <= OF_AN_ATTEMPT + MAX_TURNS * (OF_A_TURN + 2)
    for number in range(50):  # attempts of which no turn can be remembered count, too
        spelled = {"role": "assistant", "content": f"so {END_TEXT}"}
        conversations.remember(
            (f"spelled-{number}",), [QUESTION], spelled, rendered=[9], prompt=[9], response=[END], end_text=END_TEXT
        )
        assert conversations.tokens <= most
