"""A model is a directory: find it by its name, download what it lacks, read what is in it, and verify it.

It has `encoder.json`, `vocab.bpe`, `hparams.json` and `model.safetensors`, which is memory-mapped, or OpenAI's
TensorFlow checkpoint, which `checkpoint.py` converts once. `huggingface.py` reads directories with a `config.json`.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from store import checkpoint, huggingface
from store.files import derived_file_directories, digest
from store.params import count_params, map_params, param_shapes
from store.tables import Tables, damaged, read_hparams, read_merges, read_vocabulary
from store.tensors import DIGEST, WEIGHTS, map_verified

PROJECT = Path(__file__).parents[1]
RELEASED = ("124M", "355M", "774M", "1558M")
HPARAMS, TOKENIZER_FILES = "hparams.json", ("encoder.json", "vocab.bpe")
SMALL_FILES = (*TOKENIZER_FILES, HPARAMS)
INT8_WEIGHTS = "model.int8.safetensors"
SHA256 = re.compile("[0-9a-f]{64}")
MODEL_FILES = (*SMALL_FILES, WEIGHTS, INT8_WEIGHTS)  # what a new model in the same directory replaces


def find_model(name: str, models_dir: str | None = None, files: Sequence[str] = ()) -> Path:
    """The directory of a model; a released model's missing `files` are downloaded. FileNotFoundError if there is none.

    `name` is a directory in one of the `model_homes`, a path, or owner/model at Hugging Face. A directory with hidden
    files only does not count: a failed download leaves its lock there.
    """
    found = None
    if Path(name).name == name and name not in ("", ".."):
        places = (home / name for home in model_homes(models_dir))
        found = next((place for place in places if place.is_dir() and any(place.glob("[!.]*"))), None)
    if name in RELEASED:
        if not found:
            here, beside, *data = model_homes(models_dir)
            is_writable = os.access(beside if beside.is_dir() else PROJECT, os.W_OK)
            found = (here if models_dir else beside if is_writable or not data else data[0]) / name
        checkpoint.fetch(found, files)
    elif not found and huggingface.is_on_hub(name):
        found = huggingface.fetch_model(name)
    if found or (name and Path(name).is_dir()):
        return found or Path(name)
    homes = list(model_homes(models_dir))
    known = {path.parent.name for home in homes for path in home.glob("[!.]*/[!.]*")}
    raise FileNotFoundError(
        f"there is no model {name!r}. Released models, downloaded when first used: {', '.join(RELEASED)}; models in "
        f"{', '.join(map(str, homes))}: {', '.join(sorted(known)) or 'none'}; or give the path of a model directory, "
        "or the name of a model of Hugging Face, such as distilbert/distilgpt2"
    )


def model_homes(models_dir: str | None) -> Iterator[Path]:
    """Where models are searched by name: `models_dir` here and beside the code; by default also the user's data."""
    yield from (Path(models_dir or "models"), PROJECT / (models_dir or "models"))
    if not models_dir:
        from platformdirs import user_data_path  # imported late: it takes 10 ms, and most models are in the first two

        with contextlib.suppress(RuntimeError):  # the user has no home directory; some versions return a relative path
            data = user_data_path("gpt2-numpy", appauthor=False) / "models"
            yield from [data] if data.is_absolute() else []


def load_tables(directory: Path) -> Tables:
    """The tables of a model directory's tokenizer; ValueError if its files are damaged."""
    if huggingface.has_layout(directory):
        return huggingface.load_tables(directory)
    vocabulary, merges = read_vocabulary(directory / "encoder.json"), read_merges(directory / "vocab.bpe")
    if len(set(merges)) < len(merges):
        raise damaged(directory / "vocab.bpe", "it has a merge twice")
    return Tables(vocabulary, merges, [], {}, f"{directory}: encoder.json and vocab.bpe do not fit together")


def load_hparams(directory: Path, n_tokens: int) -> dict[str, int]:
    """The hyperparameters of a model directory; ValueError if they do not fit a GPT-2 with n_tokens tokens."""
    if huggingface.has_layout(directory):
        hparams, setting = huggingface.load_hparams(directory), "vocab_size in config.json"
    else:
        hparams, setting = read_hparams(directory / HPARAMS), f"n_vocab in {HPARAMS}"
    if n_tokens > (most := hparams["n_vocab"]):
        raise ValueError(f"{directory}: the tokenizer has {n_tokens} tokens, but {setting} is {most}; get both again")
    return hparams


def load_params(name: str, directory: Path, hparams: dict[str, int]) -> dict:
    """The nested weights of a model, downloaded and converted if need be, some `Lazy`. See utils.py for the errors."""
    if huggingface.has_layout(directory):
        if huggingface.is_on_hub(name):
            huggingface.fetch_weights(name, directory)
        return huggingface.load_params(directory, hparams)
    shapes = param_shapes(hparams)
    path = checkpoint.find_weights(directory, 4 * count_params(shapes), released=name in RELEASED)
    return map_params(path, shapes)


def weight_files(directory: Path) -> list[Path]:
    """The files that decide what the weights of a model directory are."""
    if huggingface.has_layout(directory):
        return [directory / huggingface.CONFIG, *huggingface.weight_files(directory)]
    return [home / WEIGHTS for home in derived_file_directories(directory) if (home / WEIGHTS).is_file()][:1]


def verify_model(directory: Path) -> None:
    """Raise ValueError, which names a file, unless all files of the model in `directory` are as they were written.

    The metadata of weights have the SHA-256 of the weights and of the files beside them. In the cache of Hugging Face's
    hub, a file's name is its SHA-256.
    """
    weights = [path for path in weight_files(directory) if path.name != huggingface.CONFIG]
    int8_weights = [place / INT8_WEIGHTS for place in derived_file_directories(directory)]
    for path in (*weights, *filter(Path.is_file, int8_weights)):
        if SHA256.fullmatch(blob := path.resolve().name):
            recorded = {path.name: blob}
        elif path.suffix == ".safetensors":
            recorded = {name: text for name, text in map_verified(path)[1].items() if name != DIGEST}
        else:
            raise ValueError(f"{path} cannot be verified: its SHA-256 was not recorded")
        for file, text in recorded.items():
            if SHA256.fullmatch(text) and (directory / file).is_file() and digest(directory / file).hex() != text:
                raise ValueError(f"{directory / file} has changed since {path.name} was written: get both again")
    checkpoint_files = (directory / checkpoint.CHECKPOINT_INDEX, directory / checkpoint.CHECKPOINT_DATA)
    if weights and all(map(Path.is_file, checkpoint_files)):
        checkpoint.run_child("store.checkpoint", directory, weights[0], "compared")
    print(f"{directory}: verified", file=sys.stderr)
