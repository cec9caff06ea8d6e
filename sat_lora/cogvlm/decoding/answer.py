"""The answer of one row while it grows: where it ends, and how much of its text is sure."""

from collections.abc import Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of a character whose bytes are not all there


class Answer:
    """The answer of one row, which takes its tokens one by one.

    tokens: those before the end, which is a token of `eos`, or the one with which a stop string begins. With a
    tokenizer, `take` and `finish` return text that is new; put together it is the text of all tokens, without special
    ones and up to the stop string. A piece never ends within a character, nor in what may become a stop string.
    limit: after so many tokens it ends, too. taken: how many there were, the last one of the end among them. is_whole:
    False where it is the limit that has ended it.
    """

    def __init__(self, eos: frozenset[int], stop: Sequence[str] = (), tokenizer=None, *, limit: int | None = None):
        self.tokens: list[int] = []
        self.taken = 0
        self.limit = limit
        self.is_whole = True
        self.is_finished = False
        self._eos = eos
        self._stop = stop
        self._tokenizer = tokenizer
        self._text = ""  # of what was returned

    def take(self, token: int) -> str:
        """Take a token and return the text that is sure with it; nothing after the end."""
        if self.is_finished:
            return ""
        self.taken += 1
        piece = self._taken(token)
        if self.taken == self.limit and not self.is_finished:
            self.is_whole = False
            piece += self.finish()
        return piece

    def _taken(self, token: int) -> str:
        """Take a token and return the text that is sure with it."""
        if token in self._eos:
            return self.finish()
        self.tokens.append(token)
        if self._tokenizer is None:
            return ""
        text = self._decode(self.tokens)
        end = min((place for place in map(text.find, self._stop) if place >= 0), default=None)
        if end is None:
            return self._return(text[: self._sure_length(text)])
        while len(self._decode(self.tokens)) > end:
            self.tokens.pop()
        self.is_finished = True
        return self._return(text[:end])

    def finish(self) -> str:
        """Return the rest of the text, for no token comes any more."""
        if self.is_finished:
            return ""
        self.is_finished = True
        return "" if self._tokenizer is None else self._return(self._decode(self.tokens))

    def _decode(self, tokens: list[int]) -> str:
        # As it stands: a tokenizer that cleans up takes back a space that was there before the full stop came.
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _sure_length(self, text: str) -> int:
        """Return how many characters of the text no later token changes, and begin no stop string."""
        length = len(text.rstrip(REPLACEMENT))
        starts = (
            length - size
            for stop in self._stop
            for size in range(1, min(len(stop), length + 1))
            if text.startswith(stop[:size], length - size)
        )
        return min(starts, default=length)

    def _return(self, text: str) -> str:
        # A tokenizer may read bytes that came before anew; what it says now is held back until it agrees again.
        if not text.startswith(self._text):
            return ""
        new = text[len(self._text) :]
        self._text = text
        return new
