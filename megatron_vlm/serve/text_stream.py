"""The text of an answer while its tokens come."""

from collections.abc import Callable, Sequence

_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character yet


class TextStream:
    """Text that is shown bit by bit and never taken back.

    Args:
        decode: ids of an answer -> its text.
        stop_words: none of them empty; the first one that appears ends the answer, and is not part of it.

    Attributes:
        ids: so far.
        text: of them, cut before a stop word.
        stopped: a stop word has appeared.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_words: Sequence[str] = ()):
        self._decode, self._stop_words = decode, stop_words
        self.ids: list[int] = []
        self.text, self.stopped = "", False
        self._shown = 0

    def add(self, token: int) -> str:
        """Takes a token; returns the text that is certain now and was not before."""
        self.ids.append(token)
        self.text = self._decode(self.ids)
        ends = [place for word in self._stop_words if (place := self.text.find(word)) >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)].rstrip(), True
            return self.rest()
        certain = len(self.text.rstrip(_HALF))
        begun = [
            certain - length
            for word in self._stop_words
            for length in range(1, len(word))
            if self.text[:certain].endswith(word[:length])
        ]
        return self._show(min([certain, *begun]))

    def rest(self) -> str:
        """Returns what was held back, at the end of the answer."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        new, self._shown = self.text[self._shown : end], max(self._shown, end)
        return new
