"""A tokenizer.json as llama.cpp has it: tokens, their kinds, merges or scores, the pre-tokenizer's name, the template.

llama.cpp has pre-tokenizers built in, each with a name. Its own converter knows them by what they make of one text with
known vocabularies; here they are known by what tokenizer.json says that they do, whatever the vocabulary.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosl_export.exceptions import ModelError
from hosl_export.formats.architectures import FIELD

_REMEDY = "use the folder that merge --out writes"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class _PreTokenizer:
    """What tokenizer.json says of one, as far as it changes how a text is divided."""

    steps: tuple[str, ...]
    has_nfc: bool = False
    ignores_merges: bool = False


_KNOWN = {
    _PreTokenizer(("bytes with gpt-2's pattern",)): "gpt-2",
    _PreTokenizer(("each digit", "bytes with gpt-2's pattern")): "smollm",
    _PreTokenizer((_LLAMA3, "bytes"), ignores_merges=True): "llama-bpe",
    _PreTokenizer((_LLAMA3, "bytes")): "smaug-bpe",
    _PreTokenizer((_QWEN2, "bytes"), has_nfc=True): "qwen2",
    _PreTokenizer((_QWEN2, "bytes")): "qwen2",
}
"""llama.cpp's names. It has no NFC: a text that is not so written has other tokens there."""


class TokenizerFacts:
    """The tokenizer of a folder, read once. Raises ModelError where llama.cpp would make other tokens of a text."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._json: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = self._json["model"]
        if model["type"] != "BPE":
            raise ModelError(FIELD, model["type"], f"llama.cpp reads tokenizers of kind BPE here; {_REMEDY}")
        self._added: dict[int, dict[str, Any]] = {each["id"]: each for each in self._json["added_tokens"]}
        self.is_sentencepiece = bool(model.get("byte_fallback")) or "<0x00>" in model["vocab"]
        self.pre = "default" if self.is_sentencepiece else self._find_pre()

    def _find_pre(self) -> str:
        found = _PreTokenizer(
            tuple(_describe(step) for step in _steps(self._json["pre_tokenizer"], "pretokenizers")),
            has_nfc=any(step["type"] == "NFC" for step in _steps(self._json["normalizer"], "normalizers")),
            ignores_merges=bool(self._json["model"].get("ignore_merges")),
        )
        if found not in _KNOWN:
            shown = ", then ".join(found.steps) or "none"
            raise ModelError(FIELD, shown, f"llama.cpp has no pre-tokenizer that is known to do this; {_REMEDY}")
        return _KNOWN[found]

    def add(self, writer: Any, rows: int) -> None:
        """Add all of it to a GGUFWriter. `rows` are those of the embedding: llama.cpp needs a token for each."""
        import gguf

        tokens, kinds = self._tokens(rows)
        writer.add_tokenizer_model("llama" if self.is_sentencepiece else "gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        if self.is_sentencepiece:
            writer.add_token_scores(self._scores(rows))
            writer.add_add_space_prefix(self._has_space_prefix())

        logging.getLogger("gguf").setLevel(logging.ERROR)  # it tells of every token that it adds
        special = gguf.SpecialVocab(self._folder, load_merges=not self.is_sentencepiece, n_vocab=rows)
        # Where nothing puts one in front, llama.cpp would, for some pre-tokenizers.
        special.add_special_token.setdefault("bos", False)
        special.add_to_gguf(writer, quiet=True)

    def _tokens(self, rows: int) -> tuple[list[str], list[int]]:
        from gguf import TokenType

        texts = {place: text for text, place in self._json["model"]["vocab"].items()}
        unknown = self._json["model"].get("unk_token")
        tokens, kinds = [], []
        for place in range(rows):
            added, text = self._added.get(place), texts.get(place)
            if added is not None:
                text = str(added["content"])
                kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
                if not added["special"] and self.is_sentencepiece:
                    text = text.replace("\u2581", " ")
                kind = TokenType.UNKNOWN if self.is_sentencepiece and text == unknown else kind
            elif text is None:
                text, kind = f"[PAD{place}]", TokenType.UNUSED
            else:
                kind = TokenType.BYTE if self.is_sentencepiece and _is_byte(text) else TokenType.NORMAL
            tokens.append(text)
            kinds.append(int(kind))
        return tokens, kinds

    def _scores(self, rows: int) -> list[float]:
        """Scores that join in the order of the merges: a token that an earlier one makes has a higher score."""
        vocabulary, scores = self._json["model"]["vocab"], [-1e6] * rows
        for rank, merge in enumerate(self._json["model"]["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            place = vocabulary.get(left + right)
            if place is not None and place < rows and scores[place] == -1e6:
                scores[place] = -float(rank)
        return scores

    def _has_space_prefix(self) -> bool:
        """Whether a text begins as if there were a blank before it."""
        steps = _steps(self._json["normalizer"], "normalizers") + _steps(self._json["pre_tokenizer"], "pretokenizers")
        return any(
            step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )


def _steps(found: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, be it none, one or a sequence."""
    if found is None:
        return []
    return list(found[inside]) if found["type"] == "Sequence" else [found]


def _describe(step: dict[str, Any]) -> str:
    """Say what a step of a pre-tokenizer does, in the words of _KNOWN where it is there."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes with gpt-2's pattern" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "each digit"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step["pattern"]
        return str(pattern.get("Regex", pattern))
    return json.dumps(step, sort_keys=True)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")
