"""Long texts: what is tokenized of them gives the ids that the whole text has, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from hosl_edge.data.long_texts import LongTexts, cut_places
from hosl_edge.data.texts import tokenize

TEXT = "the film is great good, fine terrible! bad dull. it was a scene cast story and of end don't naïve 12 1990s"
WORDS = TEXT.split()
LINES = [TEXT, "".join(WORDS), "这部电影很好。我喜欢它，非常好！", "\n\n  the film", "  " * 3 + "x"] * 5
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA_3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train(tokenizer: Tokenizer, trainer: object) -> Tokenizer:
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))],
    )
    return tokenizer


def split_by_pattern() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(tokenizer, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet))


def sentence_piece() -> Tokenizer:
    """As Llama-2's: the model is given the whole text at once."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = train(trained, trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    train(tokenizer, trainers.WordPieceTrainer(vocab_size=120, show_progress=False, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def unigrams() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return train(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=90, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"),
    )


def whole_words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return train(tokenizer, trainers.WordLevelTrainer(show_progress=False, special_tokens=["<unk>"]))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    each.__name__: cache(each)
    for each in (byte_level, split_by_pattern, sentence_piece, word_pieces, unigrams, whole_words)
}

pieces = st.one_of(
    st.sampled_from(
        [
            *WORDS,
            "这部电影很好",
            "我喜欢它",
            "<s>",
            "[MASK]",
            "</s>",
            "é",
            "e\u0301",
            "ﬁlm",
            "\u00a0",
            "▁",
            "Ġ",
            "'s",
            "👩‍💻",
        ]
    ),
    st.text(max_size=6),
)
joins = st.sampled_from([" "] * 8 + ["", "  ", "\n", " \n ", "\n\n", "\t", "。", "，", ", ", "-", "\u3000"])
texts = st.lists(st.tuples(pieces, joins), max_size=80).map(lambda parts: "".join(map("".join, parts)))


@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=texts, keep=st.integers(3, 12))
def test_a_part_of_a_long_text_gives_the_ids_of_the_whole(kind: str, keep_end: bool, text: str, keep: int) -> None:
    tokenizer = KINDS[kind]()
    part = LongTexts(tokenizer, keep, keep_end=keep_end, window=8).shorten(text)
    tokenizer.enable_truncation(keep, direction="left" if keep_end else "right")
    assert tokenizer.encode(part).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_long_text_a_small_part_is_tokenized(kind: str, keep_end: bool) -> None:
    text = "start " + " ".join(f"film number {place} was good and bad" for place in range(3_000)) + " end"
    tokenizer = KINDS[kind]()
    assert len(LongTexts(tokenizer, 32, keep_end=keep_end).shorten(text)) < 10_000
    (short, ids), cut = tokenize(tokenizer, ["a film", text], 32, keep_end=keep_end)
    assert cut == [1]
    assert short.size < 32
    tokenizer.enable_truncation(32, direction="left" if keep_end else "right")
    assert ids.tolist() == tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", ["byte_level", "split_by_pattern", "word_pieces", "whole_words"])
def test_a_long_text_of_a_script_without_spaces_is_cut_at_its_punctuation(kind: str) -> None:
    text = "这部电影很好。我喜欢它，非常好！" * 5_000
    assert len(LongTexts(KINDS[kind](), 32, keep_end=True).shorten(text)) < 10_000


@pytest.mark.parametrize("text", ["a" * 30_000, "1 2 3 4 " * 10_000, "." * 30_000])
def test_a_text_without_a_place_to_cut_stays_whole(text: str) -> None:
    assert LongTexts(byte_level(), 8, keep_end=False).shorten(text) == text


def test_a_tokenizer_that_may_look_further_is_given_whole_texts() -> None:
    tokenizer = byte_level()
    assert cut_places(tokenizer) is not None
    for splitter in (
        pre_tokenizers.Split(Regex(r".+?and"), "isolated"),
        pre_tokenizers.Split(Regex(r"(?<=good )\p{L}+"), "isolated"),
        pre_tokenizers.Split(Regex(r"[\p{L} ]+"), "isolated"),
        pre_tokenizers.Split(Regex(r"[^,]+"), "isolated"),
        pre_tokenizers.Split(Regex(r"\n"), "isolated"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        pre_tokenizers.UnicodeScripts(),
        pre_tokenizers.Digits(),
    ):
        tokenizer.pre_tokenizer = splitter
        assert cut_places(tokenizer) is None
    marked = whole_words()
    marked.normalizer = normalizers.Replace(" ", "▁")
    assert cut_places(marked) is None
    joined = byte_level()
    joined.normalizer = normalizers.Replace(" ", "")
    assert cut_places(joined) is None
    added = byte_level()
    added.add_tokens([AddedToken("good film")])
    assert cut_places(added) is None
    reaching = sentence_piece()
    reaching.model = models.BPE({"a": 0, "▁": 1, "a▁": 2}, [("a", "▁")])
    assert cut_places(reaching) is None
