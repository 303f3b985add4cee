"""The text of one generation, read token by token, and the stop strings that may end it.

Promises: special tokens are not part of it; nothing is given out that later tokens change: a character whose bytes are
not complete, and as many characters as the longest stop string could still need, are held back; a stop string and
what follows it are never given out. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class GeneratedText:
    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        # The prompt goes in: some tokenizers write a word's leading space only behind another token.
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held_back = max((len(string) for string in stop), default=1) - 1
        self._text = ""
        self._given = 0

    def append(self, token: int) -> str | None:
        """Reads a token; gives the stop string that it completes, if it does."""
        before = len(self._text)
        self._text += self._decoded(token)
        ends: list[tuple[int, str]] = []
        for string in self._stop:
            at = self._text.find(string, max(0, before - len(string) + 1))
            if at >= 0:
                ends.append((at + len(string), string))
        if not ends:
            return None
        end, found = min(ends, key=lambda entry: entry[0])
        self._text = self._text[: end - len(found)]
        return found

    def take(self, finished: bool) -> str:
        """What is new since the last call and can be given out; all that is left when `finished`."""
        until = max(self._given, len(self._text) - (0 if finished else self._held_back))
        taken = self._text[self._given : until]
        self._given = until
        return taken

    def _decoded(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:
            # The library raises bare Exceptions; this one for bytes that are no text in any continuation.
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token) or ""
