"""The text of a generation against decoding it at once, whatever the tokens and the stop strings are."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fulgurite.streams.policy_server.text import GeneratedText


def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that most characters take several; and a special one, the last."""
    vocabulary = {text: at for at, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


TOKENIZER = byte_tokenizer()
END = len(TOKENIZER.get_vocab()) - 1


def read(text: GeneratedText, tokens: list[int]) -> tuple[str, str | None, int]:
    """What was given out in pieces, the stop string found, and how many tokens were read until then."""
    given_out: list[str] = []
    for count, token in enumerate(tokens, start=1):
        found = text.append(token)
        given_out.append(text.take(finished=found is not None))
        if found is not None:
            return "".join(given_out), found, count
    return "".join([*given_out, text.take(finished=True)]), None, len(tokens)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def test_characters_of_several_tokens_come_out_whole() -> None:
    text = GeneratedText(TOKENIZER, ids("before"))
    taken: list[str] = []
    for token in ids("aé😀"):
        text.append(token)
        taken.append(text.take(finished=False))
    assert taken == ["a", "", "é", "", "", "", "😀"]


def test_special_tokens_and_half_characters_at_the_end_are_no_text() -> None:
    assert read(GeneratedText(TOKENIZER, [END]), [*ids("ab"), END, *ids("c"), *ids("😀")[:2]]) == ("abc", None, 6)


def test_bytes_that_are_no_text_do_not_end_it() -> None:
    broken = ids("😀")[:3]
    given_out, _, _ = read(GeneratedText(TOKENIZER, []), [*ids("a"), *broken, *broken, *ids("bc")])
    assert given_out.startswith("a")
    assert given_out.endswith("bc")


def test_a_stop_string_over_several_tokens_is_never_given_out() -> None:
    text = GeneratedText(TOKENIZER, [], stop=["\n\nUser:", "</tool>"])
    taken: list[str] = []
    for token in ids("Hello.\n\nUse"):
        assert text.append(token) is None
        taken.append(text.take(finished=False))
    assert "".join(taken) == "Hello"
    assert [text.append(token) for token in ids("r:")] == [None, "\n\nUser:"]
    assert text.take(finished=True) == "."


any_ids = st.lists(st.integers(0, END), max_size=12)


@settings(max_examples=500, deadline=None)
@given(any_ids, any_ids)
def test_no_tokens_behind_any_prompt_are_an_error(prompt: list[int], tokens: list[int]) -> None:
    given_out, _, _ = read(GeneratedText(TOKENIZER, prompt), [*tokens, *ids("\n the end")])
    assert given_out.endswith("the end")


@settings(max_examples=300, deadline=None)
@given(st.text("ab é😀\n", max_size=60), st.lists(st.text("ab é\n", min_size=1, max_size=4), max_size=4))
def test_pieces_make_what_decoding_at_once_and_cutting_makes(whole: str, stop: list[str]) -> None:
    ends = [(whole.find(string) + len(string), string) for string in stop if string in whole]
    given_out, found, count = read(GeneratedText(TOKENIZER, [], stop), ids(whole))
    if not ends:
        assert (given_out, found) == (whole, None)
        return
    end = min(end for end, _ in ends)
    assert found in [string for at, string in ends if at == end]
    assert found is not None
    assert given_out == whole[: end - len(found)]
    assert count == len(ids(whole[:end]))
