"""Byte-level BPE, GPT-2's tokenizer: turns text into token ids and back, and learns its tables.

A text is split into words, and a word into its UTF-8 bytes. Then neighbouring parts are merged, starting with the pair
that was most frequent in training (Sennrich et al. 2016; GPT-2 paper, section 2.2). Any text can be encoded this way.
"""

if __name__ == "__main__":
    from show.start import run  # imported first, so that Ctrl-C during the slow imports below prints no traceback

import codecs
import heapq
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from pathlib import Path

import regex

from store.models import TOKENIZER_FILES, find_model, load_tables

Pair = tuple[str, str]  # two neighbouring parts of a word
END_OF_TEXT = "<|endoftext|>"
# A word is the end of a contraction, or letters, digits or other signs after at most one space, or white space.
WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
WORD_END = regex.compile(r"(?r)\S\s")  # finds the last place where white space starts: a word ends before it
SPACE, SPACE_BEFORE, LETTER = regex.compile(r"\s*"), regex.compile(r"(?r)\s*"), regex.compile(r"\w")
SPECIAL = regex.compile(r"<\P{Cs}*>")  # the form of special tokens; they have no lone surrogates
# The alphabet of the tables: a visible character for each byte, in the order of GPT-2's first 256 ids. A space is "Ġ".
VISIBLE = [byte for byte in range(ord("!"), 256) if chr(byte).isprintable()]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_ENCODER = {byte: chr(byte) for byte in VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}
BYTE_DECODER = {character: byte for byte, character in BYTE_ENCODER.items()}
MAX_CACHED_WORDS, MAX_CACHED_LENGTH, MAX_WORD_LENGTH = 65_536, 64, 2**24  # lengths in characters


def split_words(text: str) -> list[str]:
    """Split a text into words, which are encoded one by one: "I'm 25 now" -> ["I", "'m", " 25", " now"]."""
    if not text.isascii():  # then it may have lone surrogates, which UTF-8 cannot hold: they become U+FFFD
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return WORD.findall(text)


def split_bytes(word: str) -> list[str]:
    """Split a word into its UTF-8 bytes, written in the alphabet of the tables: " né" -> ["Ġ", "n", "Ã", "©"]."""
    return list(word.encode().decode("latin-1").translate(BYTE_ENCODER))  # Latin-1 makes each byte a character


def whole_words(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the same text, cut only between words: "ab c", "d e" -> "ab", " cd", " e"."""
    held = ""
    for piece in pieces:
        held += piece
        if end := WORD_END.search(held, max(len(held) - len(piece) - 1, 0)):
            yield held[: end.start() + 1]
            held = held[end.start() + 1 :]
        if len(held) > MAX_WORD_LENGTH:
            raise ValueError(f"{MAX_WORD_LENGTH:,} characters have no white space between them: is this really a text?")
    yield held


def train_bpe(text: str | Iterable[str], n_vocab: int) -> tuple[dict[str, int], list[Pair]]:
    """Learn n_vocab tokens (256 bytes, merged pairs and `<|endoftext|>`) and their merges from a text or its pieces.

    Each step merges the most frequent pair; of several, the alphabetically first. ValueError if pairs run out.
    """
    if n_vocab < 257:
        raise ValueError(f"n_vocab must be at least 257 (256 bytes and {END_OF_TEXT}), not {n_vocab}")
    pieces = [text] if isinstance(text, str) else text
    found = Counter(chain.from_iterable(map(split_words, whole_words(pieces))))
    frequencies = list(found.values())
    words = ["".join(f" {byte} " for byte in split_bytes(word)) for word in found]  # "aab" -> " a  a  b "
    counts: Counter[Pair] = Counter()  # how often the text has a pair
    places = defaultdict(set)  # which words have a pair, or had it before a merge
    changed = set()  # the pairs whose counts have changed

    def count_pairs(i: int, sign: int) -> None:
        for pair in pairwise(words[i].split()):
            counts[pair] += sign * frequencies[i]
            places[pair].add(i)
            changed.add(pair)

    for i in range(len(words)):
        count_pairs(i, 1)
    heap: list[tuple[int, Pair]] = []
    merges: list[Pair] = []
    while len(merges) < n_vocab - 257:
        while changed:
            heapq.heappush(heap, (-counts[pair := changed.pop()], pair))
        if not heap:
            most = 257 + len(merges)
            raise ValueError(f"the text has pairs for {most} tokens, not for n_vocab = {n_vocab}: give at most {most}")
        count, pair = heapq.heappop(heap)
        if -count != counts[pair] or not count:
            continue  # the count has changed since, and the heap also has the pair with its new count
        merges.append(pair)
        left, right = pair
        for i in places.pop(pair):
            count_pairs(i, -1)
            words[i] = words[i].replace(f" {left}  {right} ", f" {left}{right} ")  # " a  a  b " -> " a  ab "
            count_pairs(i, 1)
    return {token: i for i, token in enumerate([*BYTE_DECODER, *map("".join, merges), END_OF_TEXT])}, merges


@dataclass(frozen=True)
class AddedToken:
    """A token that is not built by merges, such as `<|endoftext|>`. It is found before the text is split into words."""

    text: str
    special: bool = False  # ordinary text unless special tokens are allowed
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # takes the white space after it
    single_word: bool = False  # not found beside a letter or digit
    normalized: bool = False  # found only after all tokens that are not normalized


def index_added_tokens(tokens: Iterable[AddedToken]) -> list[tuple[regex.Pattern, list[list[AddedToken]]]]:
    """An index of the tokens that are not `normalized`, and one of those that are: first characters, and `chains`."""
    indexes = []
    in_order = sorted(tokens, key=lambda token: (token.normalized, token.text))
    for _, group in groupby(in_order, lambda token: token.normalized):
        chains: list[list[AddedToken]] = []  # for each token: the tokens that it starts with, shortest first; itself
        for token in group:
            chains.append([*tokens_at(token.text, 0, chains), token])
        indexes.append((regex.compile(r"\L<first>", first={chain[0].text[0] for chain in chains}), chains))
    return indexes


def tokens_at(text: str, start: int, chains: list[list[AddedToken]]) -> list[AddedToken]:
    """The added tokens that `text` has at `start`, shortest first. 3,000 added tokens take hardly longer than one."""
    n = bisect(chains, False, key=lambda chain: text[start : start + len(chain[-1].text)] < chain[-1].text)
    chain = chains[n - 1] if n else []  # all matches are in the chain of the last token that sorts before the text
    return chain[: bisect(chain, False, key=lambda token: not text.startswith(token.text, start))]


def find_added_tokens(text: str, first_characters: regex.Pattern, chains: list) -> Iterator[tuple[int, int, str]]:
    """Yield the start and the end of each added token, including the white space that it takes, and the token's text.

    As in the tokenizers library, the longest token hides others at its place, even if it is not found (`single_word`).
    """
    end = taken = 0
    for match in first_characters.finditer(text):
        if (start := match.start()) < end or not (found := tokens_at(text, start, chains)):
            continue
        token = found[-1]
        end = start + len(token.text)
        if token.single_word and LETTER.search(text[max(start - 1, 0) : start] + text[end : end + 1]):
            continue
        if token.lstrip:
            start = max(SPACE_BEFORE.match(text, min(taken, start), start).start(), taken)
        taken = SPACE.match(text, end).end() if token.rstrip else end
        if start < taken:  # else it is white space that the previous token has taken
            yield start, taken, token.text


class Encoder:
    """The tokenizer of a model. Raises ValueError if its tables do not fit together.

    `encoder` maps each token, written in the alphabet above, to its id, 0 to n - 1. `bpe_merges` are pairs of tokens;
    the first pair is merged first. `added_tokens` are in `encoder` too, written as in a text. `eot_id` ends a text and
    `bos_id` starts an empty text: both are the id of <|endoftext|>, or None if there is none.
    """

    def __init__(self, encoder: dict[str, int], bpe_merges: Iterable[Pair], added_tokens: Iterable[AddedToken] = ()):
        self.encoder = encoder
        self.decoder = {i: token for token, i in encoder.items()}
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(bpe_merges)}
        self.eot_id = self.bos_id = encoder.get(END_OF_TEXT)
        end_of_text = [AddedToken(END_OF_TEXT, special=True)] if END_OF_TEXT in encoder else []
        self.added_tokens = {token.text: token for token in (*end_of_text, *added_tokens)}
        self._check_tables()
        ordinary = (token for token in self.added_tokens.values() if not token.special)
        self._indexes = {True: index_added_tokens(self.added_tokens.values()), False: index_added_tokens(ordinary)}
        self._cache: dict[str, list[int]] = {}  # word -> ids

    def __repr__(self) -> str:
        return f"Encoder({len(self.encoder):,} tokens, {len(self.bpe_ranks):,} merges, end of text {self.eot_id})"

    def _check_tables(self) -> None:
        if self.decoder.keys() != set(range(len(self.encoder))):
            raise ValueError("the vocabulary's ids must be 0, 1, 2 and so on, each once")
        if wrong := [text for text in self.added_tokens if not text.encode() or text not in self.encoder]:
            raise ValueError(f"the added token {wrong[0]!r} is empty, or not in the vocabulary")
        vocabulary, made = self.encoder.keys(), set(map("".join, self.bpe_ranks))
        if missing := made.union(*self.bpe_ranks) - vocabulary:
            raise ValueError(f"the merges name {min(missing)!r}, which is not in the vocabulary")
        not_made = vocabulary - made - BYTE_DECODER.keys() - self.added_tokens.keys()
        if orphans := [token for token in not_made if not SPECIAL.fullmatch(token)]:
            raise ValueError(f"no merge makes {min(orphans)!r}, which is in the vocabulary and is not a special token")
        if missing := BYTE_DECODER.keys() - vocabulary:
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 single bytes: {''.join(sorted(missing))}")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The token ids of `text`. Special tokens in it, such as <|endoftext|>, are ordinary text unless allowed."""
        return self._encode(text, self._indexes[allow_special])

    def _encode(self, text: str, indexes: list[tuple]) -> list[int]:
        """The ids of `text`: find the added tokens of the first index, and between them those of the next one."""
        ids, cache, end = [], self._cache, 0
        if indexes:
            for start, stop, token in find_added_tokens(text, *indexes[0]):
                ids += [*self._encode(text[end:start], indexes[1:]), self.encoder[token]]
                end = stop
            return ids + self._encode(text[end:], indexes[1:])
        for word in split_words(text):
            if (word_ids := cache.get(word)) is None:
                word_ids = self._encode_word(word)
                if len(word) <= MAX_CACHED_LENGTH and len(cache) < MAX_CACHED_WORDS:
                    cache[word] = word_ids
            ids += word_ids
        return ids

    def _encode_word(self, word: str) -> list[int]:
        """The ids of a word: as long as a pair has a rank, merge the lowest-ranked one everywhere, left to right."""
        ranks = self.bpe_ranks
        parts: list = [*split_bytes(word), None]  # None at the end, and where a part was joined to the one on its left
        left, right = [*range(-1, len(parts) - 1)], [*range(1, len(parts)), -1]  # a linked list, for O(n log n) time
        heap = sorted((ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks)
        while heap:
            rank, merged = heap[0][0], []
            while heap and heap[0][0] == rank:
                _, i = heapq.heappop(heap)
                j = right[i]
                if ranks.get((parts[i], parts[j])) == rank:  # else an earlier merge took one of the two
                    parts[i], parts[j] = parts[i] + parts[j], None
                    right[i], left[right[j]] = right[j], i
                    merged.append(i)
            for i in merged:
                for first in (left[i], i):  # left of the first part is -1, the None at the end
                    if (pair := (parts[first], parts[right[first]])) in ranks:
                        heapq.heappush(heap, (ranks[pair], first))
        return [self.encoder[part] for part in parts if part is not None]

    def pieces(self, text: Iterable[str]) -> Iterator[str]:
        """Yield a text in other pieces, which have the ids of the whole text when they are encoded one by one."""
        reach_across = any(t.lstrip or t.rstrip or regex.search(r"\s", t.text) for t in self.added_tokens.values())
        return iter(["".join(text)]) if reach_across else whole_words(text)

    def token_bytes(self, i: int) -> bytes:
        """The bytes that the token with id `i` stands for; ValueError if there is no such id."""
        if (token := self.decoder.get(i)) is None:
            raise ValueError(f"token id {i} is not in the vocabulary, whose ids are 0 to {len(self.decoder) - 1}")
        if token in self.added_tokens:
            return token.encode()
        # Special tokens that are not in `added_tokens` may have characters outside of the alphabet.
        return b"".join(bytes([BYTE_DECODER[c]]) if c in BYTE_DECODER else c.encode() for c in token)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of `ids`; ValueError for an id that is not in the vocabulary. `errors` is as in `bytes.decode`."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield a piece of text for each id, then one for the rest. A character is in the piece of its last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        yield from map(decoder.decode, map(self.token_bytes, ids))
        yield decoder.decode(b"", final=True)


def read_encoder(directory: Path) -> Encoder:
    """The tokenizer of a model directory; ValueError if its files are damaged or do not fit together."""
    tables = load_tables(directory)
    try:
        tokenizer = Encoder(tables.vocabulary, tables.merges, [AddedToken(**entry) for entry in tables.added_tokens])
    except ValueError as error:
        raise ValueError(f"{tables.mismatch}: {error}; get them again") from error
    vars(tokenizer).update(tables.ends)  # eot_id and bos_id
    return tokenizer


def get_encoder(model_name: str, models_dir: str | None = None) -> Encoder:
    """The tokenizer of a model by its name or path, as in `find_model`; a released model's tables are downloaded."""
    return read_encoder(find_model(model_name, models_dir, TOKENIZER_FILES))


def main(text: str, model_size: str = "124M", models_dir: str | None = None) -> None:
    """Show the tokens of TEXT, one per line: the id, then the text in quotes."""
    encoder = get_encoder(model_size, models_dir)
    for i in encoder.encode(text):
        part, whole = encoder.token_bytes(i), encoder.decode([i])
        print(f"{i:6} {(whole if whole.encode() == part else part)!r}")  # bytes, if the token cuts a character


if __name__ == "__main__":
    run(main)
