"""A model is a directory: find it by its name, complete it, and read what is in it.

It has `encoder.json`, `vocab.bpe`, `hparams.json` and `model.safetensors`, which is memory-mapped, or OpenAI's
TensorFlow checkpoint, which `checkpoint.py` converts once. `huggingface.py` reads directories with a `config.json`.
"""

from collections.abc import Sequence
from pathlib import Path

from store import checkpoint, hub, huggingface
from store.files import homes_of
from store.huggingface import is_huggingface
from store.params import count_params, map_params, param_shapes
from store.tables import Tables, damaged, read_hparams, read_merges, read_vocabulary
from store.tensors import WEIGHTS

PROJECT = Path(__file__).parents[1]
RELEASED = ("124M", "355M", "774M", "1558M")
HPARAMS, TOKENIZER_FILES = "hparams.json", ("encoder.json", "vocab.bpe")
TABLES = (*TOKENIZER_FILES, HPARAMS)
INT8_WEIGHTS = "model.int8.safetensors"
MODEL_FILES = (*TABLES, WEIGHTS, INT8_WEIGHTS)  # what a new model in the same directory replaces


def find_model(name: str, models_dir: str = "models", files: Sequence[str] = ()) -> Path:
    """The directory of a model, in which those of `files` that a released one lacks are downloaded.

    `name` is that of a directory in `models_dir` (of the current directory, else of the project's), the path of one, or
    a model of Hugging Face, owner/model, of which all but the weights is downloaded. Else raises FileNotFoundError.
    """
    homes = [Path(models_dir), PROJECT / models_dir]
    places = [home / name for home in homes] if Path(name).name == name and name not in ("", "..") else []
    if name in RELEASED:
        directory = next(filter(Path.is_dir, places), places[0])
        checkpoint.fetch(directory, files)
        return directory
    for place in (*places, Path(name)):
        if name and place.is_dir():
            return place
    if hub.is_on_hub(name):
        return hub.fetch_model(name)
    here = {path.name for home in homes for path in home.glob("*") if path.is_dir()}
    raise FileNotFoundError(
        f"there is no model {name!r}. Released models, downloaded when first used: {', '.join(RELEASED)}; "
        f"models in {models_dir}: {', '.join(sorted(here)) or 'none'}; or give the path of a model directory, or the "
        "name of a model of Hugging Face, such as distilbert/distilgpt2"
    )


def load_tables(directory: Path) -> Tables:
    """The tables of a model directory's tokenizer; ValueError if its files are damaged."""
    if is_huggingface(directory):
        return huggingface.load_tables(directory)
    vocabulary, merges = read_vocabulary(directory / "encoder.json"), read_merges(directory / "vocab.bpe")
    if len(set(merges)) < len(merges):
        raise damaged(directory / "vocab.bpe", "it has a merge twice")
    return Tables(vocabulary, merges, [], {}, f"{directory}: encoder.json and vocab.bpe do not fit together")


def load_hparams(directory: Path, n_tokens: int) -> dict[str, int]:
    """The hyperparameters of a model directory; ValueError if they describe no GPT-2, or n_vocab is below n_tokens."""
    if is_huggingface(directory):
        hparams, setting = huggingface.load_hparams(directory), "vocab_size in config.json"
    else:
        hparams, setting = read_hparams(directory / HPARAMS), f"n_vocab in {HPARAMS}"
    if n_tokens > hparams["n_vocab"]:
        sizes = f"the tokenizer has {n_tokens} tokens, but {setting} is {hparams['n_vocab']}"
        raise ValueError(f"{directory}: {sizes}; get both again")
    return hparams


def load_params(name: str, directory: Path, hparams: dict[str, int]) -> dict:
    """The weights of the model `name` in `directory`, nested; downloaded and converted if they are not there.

    What is not float32 in its file is `Lazy`. Raises ValueError for weights that are damaged or do not fit `hparams`,
    OSError, ImportError for a missing package.
    """
    if is_huggingface(directory):
        if hub.is_on_hub(name):
            hub.fetch_weights(name, directory)
        return huggingface.load_params(directory, hparams)
    shapes = param_shapes(hparams)
    weights = checkpoint.find_weights(directory, 4 * count_params(shapes), released=name in RELEASED)
    return map_params(weights, shapes)


def weight_files(directory: Path) -> list[Path]:
    """The files that decide what the weights of a model directory are."""
    if is_huggingface(directory):
        return [directory / huggingface.CONFIG, *huggingface.weight_files(directory)]
    return [home / WEIGHTS for home in homes_of(directory) if (home / WEIGHTS).is_file()][:1]
