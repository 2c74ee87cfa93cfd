"""The small files of a model: JSON, hyperparameters and the tables of a tokenizer, read and checked."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from store.files import MAX_TABLE_BYTES, open_regular

# Larger numbers are damage, and could take all memory before another check finds them.
LARGEST = {"n_vocab": 10**7, "n_ctx": 10**7, "n_embd": 10**6, "n_head": 10**6, "n_layer": 10**4, "n_inner": 10**7}


class Tables(NamedTuple):
    """A tokenizer as it is in a model directory; `encoder.Encoder` is made of the first three fields."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    added_tokens: list[dict]  # each with the fields of an `encoder.AddedToken`
    ends: dict[str, int | None]  # eot_id and bos_id, where they differ from the id of <|endoftext|>
    mismatch: str  # how an error starts if vocabulary, merges and added tokens do not fit together


def damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} is damaged: {problem}; delete it, and get it again")


def read_text(path: Path) -> str:
    try:
        with open_regular(path, MAX_TABLE_BYTES) as file:
            return file.read(MAX_TABLE_BYTES).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: every model directory needs one") from error
    except UnicodeDecodeError as error:
        raise damaged(path, f"it is not UTF-8 ({error})") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if it is damaged."""
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(path, f"it must hold a JSON object, not {type(value).__name__}")
    return value


def reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError if a key occurs twice, because readers differ in which value they take."""
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def check_hparams(path: Path, hparams: dict[str, int], names: dict[str, str] | None = None) -> dict[str, int]:
    """Return `hparams`; ValueError if they do not describe a GPT-2. `names` are their names in the file."""
    for name, most in LARGEST.items():
        value = hparams.get(name, 1 if name == "n_inner" else None)
        if type(value) is not int or not 1 <= value <= most:
            shown = repr(value)[:40] if name in hparams else "missing"
            name = (names or {}).get(name, name)
            raise damaged(path, f"{name} must be a whole number from 1 to {most:,}, and is {shown}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise damaged(path, f"n_embd = {hparams['n_embd']} is not a multiple of n_head = {hparams['n_head']}")
    return hparams


def read_hparams(path: Path) -> dict[str, int]:
    """The hyperparameters in `hparams.json`; ValueError if they do not describe a GPT-2."""
    return check_hparams(path, read_json(path))


def check_vocabulary(path: Path, vocabulary: object) -> dict[str, int]:
    """Return `vocabulary`; ValueError if it does not map tokens to whole numbers."""
    if not isinstance(vocabulary, dict) or set(map(type, vocabulary.values())) != {int}:
        raise damaged(path, "the vocabulary must map tokens to whole numbers")
    return vocabulary


def read_vocabulary(path: Path) -> dict[str, int]:
    """The token ids in `encoder.json` or `vocab.json`; ValueError if it is damaged."""
    return check_vocabulary(path, read_json(path))


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges in `vocab.bpe` or `merges.txt`, in the order of their ranks; ValueError if it is damaged."""
    lines, merges = read_text(path).split("\n"), []
    for line in lines[1:] if lines[0].startswith("#version") else lines:
        if len(pair := line.split()) == 2:
            merges.append((pair[0], pair[1]))
        elif line:
            raise damaged(path, f"{' '.join(pair)[:40]!r} is not a merge of two tokens")
    return merges


def format_merges(merges: Iterable[tuple[str, str]]) -> str:
    """The contents of `vocab.bpe`, which `read_merges` reads."""
    return "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
