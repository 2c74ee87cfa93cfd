"""The tokenizer gives the same ids as tiktoken, follows any table of merges, and learns its tables from a text."""

import ast
import pickle
import random
from collections import Counter
from itertools import pairwise

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from encoder import BYTE_DECODER, END_OF_TEXT, WORD, AddedToken, Encoder, split_bytes, split_words, train_bpe
from helpers.models import data_file, tiny_tables
from helpers.processes import run

HARD_STRINGS = [
    "", " ", " \n \t x", "hello world", "a" * 1000, " " * 1000, "ab" * 500 + "ba" * 500, "".join(map(chr, range(256))),
    "I'm you've he'll she'd it's we're can't 'tis I'M YOU'VE O''Neil 's",
    "   three spaces, and more    \t\ttabs \n\n\nnewlines \r\n carriage  ",
    "no\u00a0break\u2003em\u3000ideographic\u200bzero\x1c\x85separators",
    "0000000000000000 1234567890 3.14 ½ ² Ⅷ ٣ १२३", "!!!??? #$%&'()*+,-./:;<=>?@[\\]^_`{|}~ …—“”",
    "日本語のテキスト、中文字符。 한국어 텍스트", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 😀😀😀",
    "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343 क्षि นี้", "אבגד שלום عربي مرحبا ١٢٣ \u202eabc\u202c",
    "ĠĊŃ the alphabet of the tables itself", "\ufeff\ufffe\uffff\U0010ffff\x00",
    "<|endoftext|> <|endoftext|><|endoftext|>", "antidisestablishmentarianism Llanfairpwllgwyngyll",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment\n",
]  # fmt: skip
# Unassigned code points are left out, because the two libraries may know different releases of Unicode.
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cn", "Cs"]))


@pytest.fixture(scope="module", params=["gpt2_encoder", "shakespeare"])
def encoder(request):
    found = request.getfixturevalue(request.param)
    return found if request.param == "gpt2_encoder" else found[0]


@pytest.fixture(scope="module")
def reference(encoder):
    """OpenAI's tiktoken on the same tables."""
    ranks = {bytes(BYTE_DECODER[c] for c in token): i for token, i in encoder.encoder.items() if token != END_OF_TEXT}
    special = {END_OF_TEXT: encoder.eot_id}
    return tiktoken.Encoding("gpt2", pat_str=WORD.pattern, mergeable_ranks=ranks, special_tokens=special)


def assert_as_tiktoken(encoder, reference, text):
    ids = encoder.encode(text)
    assert ids == reference.encode(text, disallowed_special=())
    assert encoder.decode(ids) == text


def test_the_alphabet_is_256_different_visible_characters():
    assert sorted(BYTE_DECODER.values()) == list(range(256))
    assert all(character.isprintable() and not character.isspace() for character in BYTE_DECODER)


def test_texts_and_words_are_split_as_in_the_docstrings(tiny_encoder):
    assert split_words("I'm 25 now") == ["I", "'m", " 25", " now"]
    assert split_bytes(" né") == ["Ġ", "n", "Ã", "©"]
    assert list(tiny_encoder.pieces(["ab c", "d e"])) == ["ab", " cd", " e"]
    assert list(tiny_encoder.pieces(["ab c", "d", " ", " e", "", " f\n g"])) == ["ab", " cd", "  e f", "\n g"]


def test_hard_strings_and_shakespeare_have_the_same_ids_as_tiktoken_and_decode_to_themselves(encoder, reference):
    for text in [*HARD_STRINGS, data_file("tinyshakespeare/input.txt").read_text(encoding="utf-8")]:
        assert_as_tiktoken(encoder, reference, text)


@given(text=TEXT)
def test_any_text_has_the_same_ids_as_tiktoken_and_decodes_to_itself(encoder, reference, text):
    assert_as_tiktoken(encoder, reference, text)


def test_known_encodings_of_gpt2(gpt2_encoder):
    assert repr(gpt2_encoder) == "Encoder(50,257 tokens, 50,000 merges, end of text 50256)"
    text = "Alan Turing theorized that computers would one day become"
    assert gpt2_encoder.encode(text) == [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]
    assert [gpt2_encoder.encode("0" * n) for n in (16, 17)] == [[25645], [8269, 10535, 830]]


def test_end_of_text_is_ordinary_text_unless_allowed(gpt2_encoder):
    assert gpt2_encoder.encode("hello <|endoftext|>", allow_special=True) == [31373, 220, 50256]
    assert gpt2_encoder.encode("<|endoftext|>a<|endoftext|>", allow_special=True) == [50256, 64, 50256]
    assert gpt2_encoder.decode([31373, 50256]) == "hello<|endoftext|>"
    found_always = Encoder(gpt2_encoder.encoder, gpt2_encoder.bpe_ranks, [AddedToken(END_OF_TEXT)])
    assert found_always.encode("hello <|endoftext|>") == [31373, 220, 50256]


@pytest.mark.parametrize("text", ["\ud800", "a\udc80b", "\udcff\udcfe", "\ud83d\ude00", "\ude00\ud83d"])
def test_lone_surrogates_become_replacement_characters(encoder, reference, text):
    assert encoder.encode(text) == reference.encode(text)
    assert encoder.decode(encoder.encode(text)) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def merge_by_rank(parts, ranks):
    """The published algorithm: find the pair with the lowest rank, merge it everywhere, repeat."""
    while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
        best, merged = min(pairs, key=ranks.get), []
        for part in parts:
            if merged and (merged[-1], part) == best:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged
    return parts


@given(st.integers(0, 10**9), st.text("abcd", max_size=40))
def test_any_table_of_merges_is_applied_like_the_published_algorithm(seed, word):
    """Also if two merges make the same token, or if a merge is followed by one with a lower rank."""
    rng = random.Random(seed)
    tokens, merges = list("abcd"), []
    for _ in range(rng.randint(0, 25)):
        pair = rng.choice(tokens), rng.choice(tokens)
        if pair not in merges:
            merges.append(pair)
            tokens.append("".join(pair))
    rng.shuffle(merges)
    vocabulary = dict.fromkeys([*BYTE_DECODER, *map("".join, merges)])
    encoder = Encoder({token: i for i, token in enumerate(vocabulary)}, merges)
    expected = merge_by_rank(list(word), encoder.bpe_ranks) if word else []
    assert encoder.encode(word) == [encoder.encoder[part] for part in expected]


def test_a_long_word_does_not_take_quadratic_time(encoder):
    lookups = []

    class CountedRanks(dict):
        def get(self, pair):
            lookups.append(pair)
            return super().get(pair)

        def __contains__(self, pair):
            return self.get(pair) is not None

    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    encoder = Encoder(encoder.encoder, encoder.bpe_ranks)
    encoder.bpe_ranks = CountedRanks(encoder.bpe_ranks)
    assert encoder.decode(encoder.encode(letters)) == letters
    assert 0 < len(lookups) < 10 * len(letters)


def test_an_encoder_can_be_pickled(tiny_encoder):
    ids, copy = tiny_encoder.encode(text := "words in the cache"), pickle.loads(pickle.dumps(tiny_encoder))
    assert (copy.encode(text), copy.eot_id) == (ids, tiny_encoder.eot_id)


def test_the_word_cache_is_bounded_and_has_no_long_words(tiny_encoder, monkeypatch):
    monkeypatch.setattr("encoder.MAX_CACHED_WORDS", 10)
    encoder = Encoder(tiny_encoder.encoder, tiny_encoder.bpe_ranks)
    for text, n_words in (("x" * 1000, 0), (" ".join(map(str, range(1000))), 10)):
        assert encoder.encode(text) == tiny_encoder.encode(text)
        assert len(encoder._cache) == n_words


@given(text=st.text())
def test_any_text_is_streamed_in_whole_characters(encoder, text):
    pieces = list(encoder.decode_stream(encoder.encode(text)))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 299)))
def test_any_ids_decode_and_stream_alike(tiny_encoder, ids):
    text = b"".join(map(tiny_encoder.token_bytes, ids)).decode("utf-8", "replace")
    assert tiny_encoder.decode(ids) == "".join(tiny_encoder.decode_stream(ids)) == text


def test_a_stream_that_ends_inside_a_character_ends_like_decode(tiny_encoder):
    ids = [tiny_encoder.encoder[c] for c in split_bytes("a你")[:-1]]
    assert list(tiny_encoder.decode_stream(ids)) == ["a", "", "", "\ufffd"]
    assert tiny_encoder.decode(ids) == "a\ufffd"
    assert tiny_encoder.decode(ids, errors="ignore") == "a"


@pytest.mark.parametrize("i", [-1, 300, 10**9])
def test_ids_outside_the_vocabulary_are_rejected(tiny_encoder, i):
    with pytest.raises(ValueError, match=rf"{i} .* 0 to 299"):
        tiny_encoder.decode([0, i])


@pytest.mark.parametrize(("tables", "complaint"), [
    (lambda encoder, merges: (encoder, [*merges, ("Ġ", "never")]), "not in the vocabulary"),
    (lambda encoder, merges: (encoder | {"one more": 7}, merges), "0, 1, 2"),
    (lambda encoder, merges: ({"a": 0, "b": 1}, []), "single bytes"),
    (lambda encoder, merges: (encoder, merges, [AddedToken("x y")]), "token 'x y' is empty, or not in the vocabulary"),
    (lambda encoder, merges: (encoder | {"": 300}, merges, [AddedToken("")]), "the added token '' is empty"),
])  # fmt: skip
def test_tables_that_do_not_fit_together_are_rejected(tables, complaint):
    with pytest.raises(ValueError, match=complaint):
        Encoder(*tables(*tiny_tables()))


@given(pieces=st.lists(TEXT | st.sampled_from([*" \n\t'sa1", "\x1c", "\u00a0 ", "'l", "  "])))
def test_pieces_of_a_text_are_cut_again_between_words(tiny_encoder, pieces):
    whole, words = "".join(pieces), list(tiny_encoder.pieces(pieces))
    assert "".join(words) == whole
    assert [i for piece in words for i in tiny_encoder.encode(piece)] == tiny_encoder.encode(whole)
    assert [word for piece in words for word in piece.split()] == whole.split()


def test_training_learns_the_most_frequent_pairs_first():
    encoder, merges = train_bpe("aaab aaab aaab cb cb", 261)
    assert merges == [("a", "a"), ("a", "b"), ("aa", "ab"), ("c", "b")]
    assert encoder == {token: i for i, token in enumerate([*BYTE_DECODER, "aa", "ab", "aaab", "cb", END_OF_TEXT])}


def recount_training(words, n_merges):
    """Byte-pair training without bookkeeping: count all pairs, merge the most frequent one, repeat."""
    merges = []
    for _ in range(n_merges):
        counts = Counter(pair for word in words for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [merge_by_rank(word, {best: 0}) for word in words]
    return merges


@given(st.text("ab ", min_size=30, max_size=200))
def test_training_equals_recounting_all_pairs_for_each_merge(text):
    words = [split_bytes(word) for word in WORD.findall(text)]
    n_merges = 0
    try:
        train_bpe(text, 10_000)
    except ValueError as error:  # it says how many tokens there can be
        n_merges = int(str(error).split()[5]) - 257
    encoder, merges = train_bpe(text, 257 + n_merges)
    assert merges == recount_training(words, n_merges)
    assert train_bpe(iter(text), 257 + n_merges) == (encoder, merges), "from pieces"
    assert len(encoder) == 257 + n_merges
    assert Encoder(encoder, merges).decode(Encoder(encoder, merges).encode(text)) == text


def test_training_rejects_more_tokens_than_the_text_has_pairs_for():
    assert len(train_bpe("", 257)[0]) == 257
    for n, complaint in ((300, "pairs for 258 tokens, not for n_vocab = 300: give at most 258$"), (256, "least 257")):
        with pytest.raises(ValueError, match=complaint):
            train_bpe("ab", n)


def test_the_command_line_shows_tokens_beside_their_ids(tiny_model, tiny_encoder):
    text, model = "def é\n", ("--model_size=tiny", f"--models_dir={tiny_model.parent}")
    result = run("encoder.py", text, *model, env={"PYTHONIOENCODING": "utf-8"})
    ids, shown = zip(*(line.split(maxsplit=1) for line in result.stdout.decode().splitlines()), strict=True)
    assert list(map(int, ids)) == tiny_encoder.encode(text)
    assert shown[-3:] == (r"b'\xc3'", r"b'\xa9'", r"'\n'")
    parts = map(ast.literal_eval, shown)
    assert b"".join(part if isinstance(part, bytes) else part.encode() for part in parts) == text.encode()
