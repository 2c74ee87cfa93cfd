"""Load a model by its name, and save one. The package `store` defines the files of a model directory."""

import json
from collections.abc import Callable
from pathlib import Path

from encoder import Encoder, read_encoder
from store.files import replacing_directory, write_text
from store.models import HPARAMS, MODEL_FILES, SMALL_FILES, find_model, load_hparams, load_params, verify_model
from store.params import read_lazy, save_params
from store.tables import format_merges
from store.tensors import WEIGHTS


def load_encoder_hparams_and_params(
    model_size: str, models_dir: str | None = None, quantize: str | None = None, verify: bool = False
) -> tuple[Encoder, dict, dict]:
    """The tokenizer, the hyperparameters and the weights of a model.

    `model_size` is 124M, 355M, 774M or 1558M (downloaded once), another name in `models_dir` or the default places, a
    path, or a model of Hugging Face. `params` is nested like the checkpoint's names: {"wte", "wpe", "ln_f": {"g",
    "b"}, "blocks": [{"ln_1", "attn", "ln_2", "mlp"}, ...]}; its arrays are float32, read-only and, if the file allows,
    memory-mapped. `quantize="int8"` quantizes the matrices. `verify` compares each file with its digest. Raises
    ValueError for a damaged file, OSError if a file is missing or a download fails, ImportError for a missing package.
    """
    load: Callable = load_params
    if quantize == "int8":
        from engine.int8 import load_quantized as load  # imported late: Numba takes 0.3 s, and few runs need it
    elif quantize is not None:
        raise ValueError(f"quantize must be int8, not {quantize!r}")
    directory, encoder, hparams, params = open_model(model_size, models_dir, load)
    if verify:
        verify_model(directory)
    return encoder, hparams, read_lazy(params)


def open_model(
    model_size: str, models_dir: str | None = None, load: Callable = load_params
) -> tuple[Path, Encoder, dict, dict]:
    """The directory, the tokenizer, the hyperparameters and the weights of a model. Some weights may be `Lazy`."""
    directory = find_model(str(model_size), models_dir, SMALL_FILES)
    encoder = read_encoder(directory)
    hparams = load_hparams(directory, len(encoder.encoder))
    return directory, encoder, hparams, load(str(model_size), directory, hparams)


def write_model(directory: Path, encoder: Encoder, hparams: dict[str, int], params: dict) -> None:
    """Write a model to an empty directory: its tables, then its weights, which record the digests of the tables."""
    write_text(directory / "encoder.json", json.dumps(encoder.encoder, ensure_ascii=False))
    write_text(directory / "vocab.bpe", format_merges(encoder.bpe_ranks))
    write_text(directory / HPARAMS, json.dumps(hparams, indent=1))
    save_params(directory / WEIGHTS, params, SMALL_FILES)


def save_model(directory: Path, encoder: Encoder, hparams: dict[str, int], params: dict) -> None:
    """Write a model directory. It replaces an old model there once it is complete; other files stay."""
    with replacing_directory(directory, MODEL_FILES) as new:
        write_model(new, encoder, hparams, params)
