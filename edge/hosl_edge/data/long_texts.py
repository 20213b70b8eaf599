"""Long texts, of which only what `max_length` keeps is tokenized, where that gives the same token ids.

Tokenizing takes about a hundred times the bytes of a text, and all but its first or last ids are thrown away. A text
may be cut before a space between two words: what stands on one side of it does not touch the ids of the other where

- the normalizer and the pre-tokenizer look no further than the next word, which is known of those named here alone;
- no piece that the model is given, or none of its tokens, reaches from a letter over the space behind it;
- nor does an added token.

Where that does not hold, and where a text has no such place, it is tokenized whole. And since this rests on what is
known of tokenizers, each cut is tried against a longer part of the text before it is believed.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer, models

_CHARACTERS_A_TOKEN = 16
"""Of the first window: few texts have longer tokens on average, and for them it grows."""
_SMALLEST_WINDOW = 2048

_LETTER = r"[^\W\d_]"
_WORDS = rf"(?<={_LETTER}) (?={_LETTER})"
"""A space between two words, as a text is cut before it."""
_SENTENCES = rf"(?<={_LETTER})[。！？，、；：](?={_LETTER})"
"""Punctuation of scripts that write no spaces."""

_LOCAL_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"),
    *("BertNormalizer", "Nmt", "Precompiled", "Strip", "Prepend"),
}
"""Whose output at a place is decided by the characters beside it, or by the text's ends alone."""
_WORD_SPLITTERS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_PUNCTUATION_SPLITTERS = {"Whitespace", "BertPreTokenizer"}
_CHARACTER_SPLITTERS = {"Digits", "Punctuation"}


class LongTexts:
    """What of a text must be tokenized for `keep` ids at its beginning, or with `keep_end` at its end."""

    def __init__(self, tokenizer: Tokenizer, keep: int, *, keep_end: bool, window: int = 0) -> None:
        """`window` characters are tried first; 0 takes as many as texts mostly need."""
        self._tokenizer, self._keep, self._keep_end = tokenizer, keep, keep_end
        self._first_window = window or max(_SMALLEST_WINDOW, _CHARACTERS_A_TOKEN * keep)

    @cached_property
    def _places(self) -> re.Pattern[str] | None:
        """Where texts may be cut for this tokenizer; worked out for the first text that is long."""
        return cut_places(self._tokenizer)

    def shorten(self, text: str) -> str:
        """Cut `text` to a part of which the same ids are kept; returns all of it where no cut is known to be right."""
        window = self._first_window
        while 4 * window < len(text) and self._places is not None:
            part = self._last(text, window) if self._keep_end else self._first(text, window)
            if part is not None:
                return part
            window *= 4
        return text

    def _first(self, text: str, window: int) -> str | None:
        """Cut at the first place behind `window` characters, where what is before it has ids enough."""
        end, beyond = self._place(text, window, 2 * window), self._place(text, 2 * window, 4 * window)
        if end is None or beyond is None or beyond == end:
            return None
        ids = self._ids(text[:end])
        is_right = len(ids) >= self._keep and self._ids(text[:beyond])[: len(ids)] == ids
        return text[:end] if is_right else None

    def _last(self, text: str, window: int) -> str | None:
        """Cut off the beginning; the ids before a second place, which the cut may have changed, must not count."""
        size = len(text)
        start, place = self._place(text, size - 3 * window, size), self._place(text, size - 2 * window, size)
        if start is None or place is None or place == start:
            return None
        before, ids = self._ids(text[start:place]), self._ids(text[start:])
        is_right = len(ids) - len(before) >= self._keep and ids[: len(before)] == before
        return text[start:] if is_right else None

    def _place(self, text: str, start: int, end: int) -> int | None:
        assert self._places is not None
        for found in self._places.finditer(text, start, end):
            beside = text[found.start() - 1], text[found.end()]
            # A letter for Unicode may become something else in a normalizer.
            if all(unicodedata.normalize("NFKC", letter).isalpha() for letter in beside):
                return found.start()
        return None

    def _ids(self, text: str) -> list[int]:
        """All ids of a text alone, without special tokens."""
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


def cut_places(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Find where a text may be cut, before what the pattern finds; None where nothing is known for certain."""
    normalizers, splitters = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)

    # What rules out every cut: chance, parts that are not known to look no further, tokens that reach over a space.
    if getattr(tokenizer.model, "dropout", None):
        return None
    if not all(map(_is_local_normalizer, normalizers)) or not all(map(_is_local_splitter, splitters)):
        return None
    if any(re.search(r"\S\s", token.content) for token in tokenizer.get_added_tokens_decoder().values()):
        return None

    if any(part["type"] == "Replace" and part["content"] == "▁" for part in normalizers):
        # There are no spaces any more, which others would split at.
        is_split = any(part["type"] == "Metaspace" and _splits_words(part) for part in splitters)
        return re.compile(_WORDS) if is_split or _has_tokens_of_single_words(tokenizer) else None
    if any(map(_splits_punctuation, splitters)):
        return re.compile(f"{_WORDS}|{_SENTENCES}")
    return re.compile(_WORDS) if any(map(_splits_words, splitters)) else None


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the parts of which it is made, in order."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__())))


def _flat(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if state["type"] != "Sequence":
        yield state
        return
    for part in state.get("normalizers") or state.get("pretokenizers") or ():
        yield from _flat(part)


def _is_local_normalizer(part: dict[str, Any]) -> bool:
    if part["type"] != "Replace":
        return part["type"] in _LOCAL_NORMALIZERS
    pattern, content = part["pattern"], part["content"]
    if pattern == {"String": " "}:
        return content in (" ", "▁")
    text = pattern.get("String", "a")
    return pattern == {"Regex": " {2,}"} or not any(each.isspace() or each.isalpha() for each in text + content)


def _is_local_splitter(part: dict[str, Any]) -> bool:
    kind = part["type"]
    if kind == "Split":
        return _pattern_of(part) == " " or _looks_no_further(part["pattern"].get("Regex", "."))
    return kind in _WORD_SPLITTERS | _CHARACTER_SPLITTERS | {"ByteLevel", "Metaspace"}


def _splits_words(part: dict[str, Any]) -> bool:
    """Whether a piece ends at a letter before a space."""
    kind = part["type"]
    if kind == "Split":
        if _pattern_of(part) == " ":
            return part["behavior"] != "MergedWithPrevious" and not part["invert"]
        # What else a pattern does with a space is seen at each cut, which is tried.
        finds_spaces = re.search(r" |\\s", re.sub(_NEGATED, "", part["pattern"].get("Regex", ""))) is not None
        return finds_spaces and part["behavior"] in ("Isolated", "Removed")
    if kind == "Metaspace":
        return part["replacement"] == "▁" and bool(part.get("split", True))
    return kind in _WORD_SPLITTERS or (kind == "ByteLevel" and bool(part["use_regex"]))


def _splits_punctuation(part: dict[str, Any]) -> bool:
    """Whether a piece ends at a letter before punctuation, too."""
    if part["type"] != "Split":
        return part["type"] in _PUNCTUATION_SPLITTERS or (part["type"] == "ByteLevel" and bool(part["use_regex"]))
    pattern = part["pattern"].get("Regex", "")
    return (
        _splits_words(part)
        and r"\p{L}" in pattern
        and r"\S" not in pattern.replace(r"(?!\S)", "")
        and all(r"\p{L}" in inside for inside, _ in re.findall(_NEGATED_RUN, pattern))
    )


def _pattern_of(part: dict[str, Any]) -> str:
    return str(part["pattern"].get("String", ""))


_NEGATED = r"\[\^((?:\\.|[^\]\\])*)\]"
_NEGATED_RUN = rf"{_NEGATED}([+*{{])"
_RUN = r"\[(?!\^)((?:\\.|[^\]\\])*)\]([+*{])"


def _looks_no_further(pattern: str) -> bool:
    """Whether a regular expression decides about a word by what stands before the next one."""
    bare = pattern.replace(r"(?!\S)", "")
    outside = re.sub(r"\[(?:\\.|[^\]\\])*\]", "", bare)
    if re.search(r"\(\?[=!<]|\\[PWDXROKkgbBAGzZ1-9]|(?<!\\)[.^$]", outside):
        return False
    if any(r"\s" not in inside for inside, _ in re.findall(_NEGATED_RUN, bare)):
        return False
    has_space, has_letter = re.compile(r" |\\s"), re.compile(r"\\p\{L|\\[wSPWD]|a-z|A-Z")
    return not any(has_space.search(run) and has_letter.search(run) for run, _ in re.findall(_RUN, bare))


def _has_tokens_of_single_words(tokenizer: Tokenizer) -> bool:
    """Whether a model that is given whole texts, with ▁ for spaces, has no token that reaches into the next word."""
    model = tokenizer.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return "▁" in vocabulary and not any(re.search("[^▁]▁", token) for token in vocabulary)
