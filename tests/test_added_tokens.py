"""Added tokens: `Encoder` finds them in a text before the text is split into words."""

import json
import time
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder import END_OF_TEXT, AddedToken, Encoder
from helpers.huggingface_models import ADDED, SEGMENTS, added, tokenizer_json
from helpers.models import tiny_tables

PIECES = [entry["content"] for entry in ADDED]
PIECES += ["a", "b", "c", " ", "  ", "\n", "\t", "\u00a0", "_", "é", "1", "<", ">", "[", "«", "Ġ", END_OF_TEXT]
CONTENTS = ["ab", "<a>", "-é", "( )", "abc", "bc", "éa", " bc", "bc ", "\n", "  "]  # others are random
SHORT = [*"abc <>-\n_é", "ab", "<a>", "-é"]


def with_tokens(entries):
    """The tests' tokenizer with added tokens, given as the `entries` of tokenizer.json."""
    vocabulary, merges = tiny_tables()
    tokens = [AddedToken(e["content"], **{k: e[k] for k in e.keys() - {"id", "content"}}) for e in entries]
    return Encoder(vocabulary | {entry["content"]: entry["id"] for entry in entries}, merges, tokens)


@pytest.fixture(scope="module")
def encoder():
    return with_tokens(ADDED)


@pytest.mark.parametrize(("text", "segments"), SEGMENTS)
def test_added_tokens_take_the_white_space_around_them(encoder, tiny_encoder, text, segments):
    expected = [[segment] if isinstance(segment, int) else tiny_encoder.encode(segment) for segment in segments]
    assert encoder.encode(text, allow_special=True) == list(chain(*expected))


def test_special_tokens_are_text_unless_allowed_and_other_added_tokens_never_are(encoder, tiny_encoder):
    text, words = "<pad> <tool><|endoftext|> <mask>", tiny_encoder.encode
    assert encoder.encode(text) == [*words("<pad> "), 302, *words("<|endoftext|> <mask>")]
    assert encoder.encode(text, True) == [300, *words(" "), 302, 299, 301]
    for allow_special in (False, True):
        assert encoder.decode(encoder.encode("<pad>«Ġ»<tool>yes( )", allow_special)) == "<pad>«Ġ»<tool>yes( )"


def test_the_longest_added_token_wins_and_normalized_tokens_come_last():
    encoder = with_tokens([added(300, "ab"), added(301, "abc"), added(302, "c<", normalized=True), added(303, "<s>")])
    assert [encoder.decoder[i] for i in encoder.encode("abcc<<s>c<s>", True)] == ["abc", "c<", "<s>", "c", "<s>"]


def test_100_000_spaces_without_a_token_take_little_time(encoder, tiny_encoder):
    for space in (" " * 100_000, "\n" * 100_000):
        assert encoder.encode(space, True) == tiny_encoder.encode(space)
        assert encoder.encode(f"a{space}<mask>", True) == [*tiny_encoder.encode("a"), 301]
        assert encoder.encode(f"[end]{space}<mas", True) == [303, *tiny_encoder.encode("<mas")]


@pytest.mark.parametrize(("names", "text"), [
    ([f"<|reserved_{i}|>" for i in range(3000)], "<|reserved_" * 10_000),
    ([f"{'_' * 999}{i}" for i in range(3000)], "_" * 100_000), (["_" * i for i in range(2, 3000)], "_!" * 50_000),
    ([f"{'_' * i}!" for i in range(1, 3000)], "_" * 100_000),
])  # fmt: skip
def test_3000_tokens_that_start_alike_take_little_time(tiny_encoder, names, text):
    encoder, before = with_tokens([added(300 + i, name) for i, name in enumerate(names)]), time.process_time()
    assert encoder.encode(f"{text} {names[7]}", True) == [*tiny_encoder.encode(f"{text} "), 307]
    assert time.process_time() - before < 10


@st.composite
def tokens_and_texts(draw):
    """ADDED, or random tokens with random flags, which may overlap or start alike; and texts that contain them."""
    entries, pieces = ADDED, PIECES
    if draw(st.booleans()):
        contents = st.sampled_from(CONTENTS) | st.text("ab<é", min_size=2, max_size=5).map(lambda text: f"<{text}")
        contents = draw(st.lists(contents, unique=True, min_size=1))
        names = ("single_word", "special", "lstrip", "rstrip", "normalized")
        entries = [added(300 + i, c, **{name: draw(st.booleans()) for name in names}) for i, c in enumerate(contents)]
        pieces = SHORT + contents
    return entries, draw(st.lists(st.lists(st.sampled_from(pieces), max_size=12).map("".join), min_size=1, max_size=6))


@given(tokens_and_texts())
def test_pieces_of_a_text_have_the_same_ids_as_the_whole_text(case):
    entries, pieces = case
    whole = "".join(pieces)
    can_be_cut = [e for e in entries if not (e["lstrip"] or e["rstrip"] or set(e["content"]) & set(" \n"))]
    for tokens in (entries, [{**e, "id": 300 + i} for i, e in enumerate(can_be_cut)]):
        encoder = with_tokens(tokens)
        ids = [encoder.encode(piece, True) for piece in encoder.pieces(pieces)]
        assert list(chain(*ids)) == encoder.encode(whole, True)


@pytest.mark.reference
@settings(max_examples=1500)
@given(tokens_and_texts())
def test_added_tokens_are_found_as_in_the_tokenizers_library(case):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    entries, texts = case
    encoder, library = with_tokens(entries), tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(entries)))
    for text in texts:
        try:
            expected = library.encode(text).ids
        except BaseException as error:  # the library's bug, if two tokens take the same space
            assert type(error).__name__ == "PanicException", error
        else:
            assert encoder.encode(text, allow_special=True) == expected
        if not any(entry["content"] in text for entry in entries if entry["lstrip"] or entry["rstrip"]):
            assert encoder.decode(encoder.encode(text)) == text
