"""The small files of a model: JSON, hyperparameters and the tables of a tokenizer, read and checked."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from store.files import MOST_BYTES, open_regular

MOST_BYTES_OF_SETTINGS = 2**20
# Larger numbers are damage, and could take all memory before another check finds them.
LARGEST = {"n_vocab": 10**7, "n_ctx": 10**7, "n_embd": 10**6, "n_head": 10**6, "n_layer": 10**4}


class Tables(NamedTuple):
    """What a model directory says of its tokenizer; `encoder.Encoder` is made of the first three."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    added_tokens: list[dict]  # each with the fields of an `encoder.AddedToken`
    ends: dict[str, int | None]  # eot_id and bos_id, where they are others than that of <|endoftext|>
    misfit: str  # the beginning of the error message if vocabulary, merges and added tokens do not fit together


def damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} is damaged: {problem}; delete it, and get it again")


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    try:
        with open_regular(path, most) as file:
            return file.read(most).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: every model directory needs one") from error
    except UnicodeDecodeError as error:
        raise damaged(path, f"it is not UTF-8 ({error})") from error


def read_json(path: Path, most: int = MOST_BYTES) -> dict:
    text = read_text(path, most)
    try:
        value = json.loads(text, object_pairs_hook=reject_duplicate_keys)
    except RecursionError as error:
        raise damaged(path, "it is nested too deep") from error
    except ValueError as error:
        raise damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(path, f"it must hold a JSON object, not {type(value).__name__}")
    return value


def reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError if it has a name twice, of which different readers may take different values."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name is there twice")
    return value


def check_hparams(path: Path, hparams: dict[str, int], names: dict[str, str] | None = None) -> dict[str, int]:
    """`hparams`, if they describe a GPT-2; else ValueError. `names` are their names in the file, if it has others."""
    for name, most in LARGEST.items():
        value = hparams.get(name)
        if type(value) is not int or not 1 <= value <= most:
            shown = "missing" if value is None else repr(value)[:40]
            name = (names or {}).get(name, name)
            raise damaged(path, f"{name} must be a whole number from 1 to {most:,}, and is {shown}")
    n_inner = hparams.get("n_inner", 1)
    if type(n_inner) is not int or not 1 <= n_inner <= LARGEST["n_vocab"]:
        raise damaged(path, f"n_inner must be a whole number from 1 to 10,000,000, and is {repr(n_inner)[:40]}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise damaged(path, f"n_embd = {hparams['n_embd']} is not a multiple of n_head = {hparams['n_head']}")
    return hparams


def read_hparams(path: Path) -> dict[str, int]:
    """The hyperparameters in `hparams.json`; ValueError if they describe no GPT-2."""
    return check_hparams(path, read_json(path, MOST_BYTES_OF_SETTINGS))


def check_vocabulary(path: Path, vocabulary: object) -> dict[str, int]:
    """`vocabulary`, if it maps tokens to whole numbers; else ValueError."""
    if not isinstance(vocabulary, dict) or set(map(type, vocabulary.values())) != {int}:
        raise damaged(path, "the vocabulary must map tokens to whole numbers")
    return vocabulary


def read_vocabulary(path: Path) -> dict[str, int]:
    """The token ids in `encoder.json` or `vocab.json`; ValueError if it is damaged."""
    return check_vocabulary(path, read_json(path))


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges in `vocab.bpe` or `merges.txt`, in the order of their ranks; ValueError if it is damaged."""
    lines = read_text(path).split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [tuple(line.split()) for line in lines if line]
    if odd := [merge for merge in merges if len(merge) != 2]:
        raise damaged(path, f"{' '.join(odd[0])[:40]!r} is not a merge of two tokens")
    return merges


def format_merges(merges: Iterable[tuple[str, str]]) -> str:
    """The contents of `vocab.bpe`, which `read_merges` reads."""
    return "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
