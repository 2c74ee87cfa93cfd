"""Byte-level BPE, GPT-2's tokenizer: text to token ids and back, and the training that makes its two tables.

Text is cut into words, each word into its UTF-8 bytes, and neighbouring parts are merged, the pair that training found
most often first (Sennrich et al. 2016; GPT-2 paper, section 2.2). Any string has an encoding, and it decodes to itself.
"""

if __name__ == "__main__":
    from show.start import run  # first: Ctrl-C during the imports below ends without a traceback

import codecs
import heapq
import os
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, count, pairwise
from pathlib import Path

import regex

from store.models import TOKENIZER_FILES, find_model, load_tables

END_OF_TEXT = "<|endoftext|>"
# Contractions; letters, digits or other signs with one space before; white space, whose last space goes with a word.
WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
WORD_END = regex.compile(r"(?r)\S\s")  # the last in a text: no word goes on with white space after something else
SPACE, SPACE_BEFORE, LETTER = regex.compile(r"\s*"), regex.compile(r"(?r)\s*"), regex.compile(r"\w")
SPECIAL = regex.compile(r"<\P{Cs}*>")  # any token in angle brackets that has no lone surrogates
N_CACHED_WORDS, SHORT = 65_536, 64  # each of at most 64 characters
LONGEST_WORD = 2**24  # characters in a document


def bytes_to_unicode() -> dict[int, str]:
    """The tables' alphabet, each byte as a visible character (a space is Ġ), in the order of GPT-2's first 256 ids."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


BYTE_ENCODER = bytes_to_unicode()
BYTE_DECODER = {character: byte for byte, character in BYTE_ENCODER.items()}


def split_words(text: str) -> list[str]:
    """Cut text into what is merged on its own. Lone surrogates, which UTF-8 cannot hold, are read as U+FFFD."""
    if not text.isascii():
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return WORD.findall(text)


def whole_words(pieces: Iterable[str]) -> Iterator[str]:
    """Yield a text that comes in `pieces`, cut anew where white space begins: no word is cut there."""
    held = ""
    for piece in pieces:
        n_searched = max(len(held) - 1, 0)
        held += piece
        if end := WORD_END.search(held, n_searched):
            yield held[: end.start() + 1]
            held = held[end.start() + 1 :]
        if len(held) > LONGEST_WORD:
            raise ValueError(f"the text has more than {LONGEST_WORD:,} characters without white space: it is none")
    yield held


def split_bytes(word: str) -> list[str]:
    """The UTF-8 bytes of `word` (Latin-1 makes each a character), in the alphabet."""
    return list(word.encode().decode("latin-1").translate(BYTE_ENCODER))


@dataclass(frozen=True)
class AddedToken:
    """A token that no merge makes: it is found in a text before the text is cut into words.

    A `special` token is found only when asked for. `lstrip` and `rstrip` take along the white space before and after.
    A `single_word` has no letter or digit next to it. `normalized` tokens are sought in what the others leave.
    """

    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


def prefixes_of(text: str, tokens: list[AddedToken], start: int = 0) -> list[AddedToken]:
    """Those of `tokens`, each of which begins the next one, that begin `text` at `start`."""
    return tokens[: bisect(tokens, False, key=lambda token: not text.startswith(token.text, start))]


def index(tokens: Iterable[AddedToken]) -> list[tuple]:
    """What `find` needs, for tokens that are not `normalized`, and then for those that are.

    It is a pattern of how they all begin, their texts in order, the length of the longest, and `prefixes`: first none,
    then for each text the tokens that begin it, the last of which is its own.
    """
    indexes, tokens = [], sorted(tokens, key=lambda token: token.text)
    for normalized in (False, True):
        if group := [token for token in tokens if token.normalized == normalized]:
            prefixes = accumulate(group, lambda last, token: [*prefixes_of(token.text, last), token], initial=[])
            texts = [token.text for token in group]
            common = os.path.commonprefix(texts)  # noqa: RUF071 (these are no paths)
            beginning = regex.compile("|".join({regex.escape(common or text[:1]) for text in texts}))
            indexes.append((beginning, texts, max(map(len, texts)), list(prefixes)))
    return indexes


def find(
    text: str, beginning: regex.Pattern, texts: list[str], longest: int, prefixes: list[list[AddedToken]]
) -> Iterator[tuple[int, int, str]]:
    """Yield the start and end of each added token in `text`, with the white space that it takes along, and its text.

    Of those at one place the longest is found: all of them begin one text, the last that is not greater than what is
    there. In a token that should be a single word and is not, nothing is found, as in the tokenizers library.
    """
    end = taken = 0
    for match in beginning.finditer(text, overlapped=True):
        if (start := match.start()) < end:
            continue
        if found := prefixes_of(text, prefixes[bisect(texts, text[start : start + longest])], start):
            token = found[-1]
            end = start + len(token.text)
            if not (token.single_word and (LETTER.match(text[start - 1 : start]) or LETTER.match(text, end))):
                if token.lstrip:
                    start = max(SPACE_BEFORE.match(text, min(taken, start), start).start(), taken)
                taken = SPACE.match(text, end).end() if token.rstrip else end
                if start < taken:  # else it is white space that the token before has taken
                    yield start, taken, token.text


class Encoder:
    """The tokenizer of one model.

    `encoder` maps tokens, in the alphabet of `bytes_to_unicode`, to ids from 0 to n - 1. `bpe_merges` are pairs of
    tokens, the first to merge first. `added_tokens` are in `encoder` too, in their own characters. Tables that do not
    fit raise ValueError. `eot_id` ends a text and `bos_id` begins an empty one: <|endoftext|>, or None without it.
    """

    def __init__(
        self, encoder: dict[str, int], bpe_merges: Iterable[tuple[str, str]], added_tokens: Iterable[AddedToken] = ()
    ) -> None:
        self.encoder = encoder
        self.decoder = {i: token for token, i in encoder.items()}
        self.bpe_ranks = dict(zip(bpe_merges, count()))
        self.eot_id = self.bos_id = encoder.get(END_OF_TEXT)
        self.added_tokens = {token.text: token for token in added_tokens}
        if END_OF_TEXT in encoder:
            self.added_tokens.setdefault(END_OF_TEXT, AddedToken(END_OF_TEXT, special=True))
        self._all_added = index(self.added_tokens.values())
        self._ordinary_added = index(token for token in self.added_tokens.values() if not token.special)
        self._cache: dict[str, list[int]] = {}  # the ids of words
        if self.decoder.keys() != set(range(len(encoder))):
            raise ValueError("the vocabulary's ids must be 0, 1, 2 and so on, each once")
        if odd := [text for text in self.added_tokens if not text.encode() or text not in encoder]:
            raise ValueError(f"the added token {odd[0]!r} is empty, or not in the vocabulary")
        made = set(map("".join, self.bpe_ranks))
        if missing := made.union(*self.bpe_ranks) - encoder.keys():
            raise ValueError(f"the merges name {min(missing)!r}, which is not in the vocabulary")
        orphans = encoder.keys() - made - BYTE_DECODER.keys() - self.added_tokens.keys()
        if orphans := [token for token in orphans if not SPECIAL.fullmatch(token)]:
            raise ValueError(f"no merge makes {min(orphans)!r}, which is in the vocabulary and no special token")
        if missing := BYTE_DECODER.keys() - encoder.keys():
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 single bytes: {''.join(sorted(missing))}")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The token ids of `text`. `<|endoftext|>` is ordinary text in it, or with `allow_special` the one token."""
        return self._encode_between(text, self._all_added if allow_special else self._ordinary_added)

    def pieces(self, text: Iterable[str]) -> Iterator[str]:
        """Yield a text that comes in pieces, cut anew so that `encode` makes of them what it makes of the whole."""
        tokens = self.added_tokens.values()
        goes_on = any(token.lstrip or token.rstrip or regex.search(r"\s", token.text) for token in tokens)
        return iter(["".join(text)]) if goes_on else whole_words(text)

    def _encode_between(self, text: str, indexes: list[tuple]) -> list[int]:
        """The ids of `text`: of the added tokens that `indexes` find, and of the words between them."""
        ids, cache, end = [], self._cache, 0
        if indexes:
            for start, stop, token in find(text, *indexes[0]):
                ids += [*self._encode_between(text[end:start], indexes[1:]), self.encoder[token]]
                end = stop
            ids += self._encode_between(text[end:], indexes[1:])
        else:
            for word in split_words(text):
                if (word_ids := cache.get(word)) is None:
                    word_ids = self._encode_word(word)
                    if len(word) <= SHORT and len(cache) < N_CACHED_WORDS:
                        cache[word] = word_ids
                ids += word_ids
        return ids

    def _encode_word(self, word: str) -> list[int]:
        """Merge the bytes of `word`: of all pairs of neighbours the lowest rank first, everywhere from left to right.

        The parts are a linked list and the pairs wait in a heap, so that n bytes take O(n log n) and not O(n^2).
        """
        parts = [*split_bytes(word), None]  # None at the end, and where a part has joined the one to its left
        previous, following = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
        ranks = self.bpe_ranks
        heap = sorted((ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks)
        while heap:
            rank, merged = heap[0][0], []
            while heap and heap[0][0] == rank:
                i = heapq.heappop(heap)[1]
                j = following[i]
                if ranks.get((parts[i], parts[j])) != rank:
                    continue  # stale: a merge since then took one of the two
                parts[i], parts[j] = parts[i] + parts[j], None
                following[i], previous[following[j]] = following[j], i
                merged.append(i)
            for i in merged:
                for left, right in ((previous[i], i), (i, following[i])):  # before the first is -1: the None at the end
                    if (pair := (parts[left], parts[right])) in ranks:
                        heapq.heappush(heap, (ranks[pair], left))
        return [self.encoder[part] for part in parts if part is not None]

    def token_bytes(self, i: int) -> bytes:
        """The bytes that the token with id `i` stands for; ValueError if there is none."""
        if i not in self.decoder:
            raise ValueError(f"token id {i} is not in the vocabulary, whose ids are 0 to {len(self.decoder) - 1}")
        token = self.decoder[i]
        if token in self.added_tokens:
            return token.encode()
        # A special token that is not among the added ones may have characters outside of the alphabet.
        return b"".join(bytes([BYTE_DECODER[c]]) if c in BYTE_DECODER else c.encode() for c in token)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of `ids`, `errors` as in `bytes.decode`; ValueError for an id that is not in the vocabulary."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` in pieces: each character as soon as its last byte is there."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.token_bytes(i))
        yield decoder.decode(b"", final=True)


def read_encoder(directory: Path) -> Encoder:
    """The tokenizer of a model directory; ValueError if its files are damaged or do not fit together."""
    tables = load_tables(directory)
    try:
        tokenizer = Encoder(tables.vocabulary, tables.merges, [AddedToken(**entry) for entry in tables.added_tokens])
    except ValueError as error:
        raise ValueError(f"{tables.misfit}: {error}; get them again") from error
    vars(tokenizer).update(tables.ends)  # eot_id and bos_id
    return tokenizer


def get_encoder(model_name: str, models_dir: str = "models") -> Encoder:
    """The tokenizer of a model, found as `store.models.find_model` does; that of a released one is downloaded."""
    return read_encoder(find_model(model_name, models_dir, TOKENIZER_FILES))


def train_bpe(text: str | Iterable[str], n_vocab: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn the tables of `Encoder` from `text`: 256 bytes, n_vocab - 257 merges in rank order, then `<|endoftext|>`.

    The text may come in pieces. Each merge is of the most frequent pair, of several the alphabetically first. Raises
    ValueError if the text has too few pairs.
    """
    if n_vocab < 257:
        raise ValueError(f"n_vocab must be at least 257 (256 bytes and {END_OF_TEXT}), not {n_vocab}")
    pieces = [text] if isinstance(text, str) else text
    found = Counter(chain.from_iterable(map(split_words, whole_words(pieces))))
    words, frequencies = [split_bytes(word) for word in found], list(found.values())
    counts = Counter()  # pair -> how often the text has it
    places = defaultdict(set)  # pair -> the words that have, or once had, it
    for i, pair in ((i, pair) for i, word in enumerate(words) for pair in pairwise(word)):
        counts[pair] += frequencies[i]
        places[pair].add(i)
    heap = sorted((-count, pair) for pair, count in counts.items())
    merges = []
    while len(merges) < n_vocab - 257:
        if not heap:
            most = 257 + len(merges)
            raise ValueError(f"the text has pairs for {most} tokens, not for n_vocab = {n_vocab}: give at most {most}")
        count, pair = heapq.heappop(heap)
        if -count != counts[pair] or not count:
            continue  # stale: the count has changed since, and the heap has the pair with its new one too
        merges.append(pair)
        changed = set()
        for i in places.pop(pair):
            old, words[i] = words[i], merge_pair(words[i], pair)
            for parts, change in ((old, -frequencies[i]), (words[i], frequencies[i])):
                for near in pairwise(parts):
                    counts[near] += change
                    places[near].add(i)
                    changed.add(near)
        for near in changed:
            heapq.heappush(heap, (-counts[near], near))
    tokens = [*BYTE_DECODER, *(a + b for a, b in merges), END_OF_TEXT]
    return {token: i for i, token in enumerate(tokens)}, merges


def merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """`parts` with each occurrence of `pair`, from left to right, as one."""
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:  # a part that was merged is longer than pair[0], so not again
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def main(text: str, model_size: str = "124M", models_dir: str = "models") -> None:
    """Show the tokens of TEXT, one a line: its id, then its text in quotes."""
    encoder = get_encoder(model_size, models_dir)
    for i in encoder.encode(text):
        part = encoder.token_bytes(i)
        whole = part.decode("utf-8", "replace")
        print(f"{i:6} {(whole if whole.encode() == part else part)!r}")


if __name__ == "__main__":
    run(main)
