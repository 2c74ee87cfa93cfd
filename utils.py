"""The door to models: open one by its name, and save one. `store` knows what a model's directory is."""

import json
from collections.abc import Callable
from pathlib import Path

from encoder import Encoder, read_encoder
from store.files import replacing_directory, write_text
from store.models import HPARAMS, MODEL_FILES, TABLES, find_model, load_hparams, load_params
from store.params import read_lazy, save_params
from store.tables import format_merges
from store.tensors import WEIGHTS


def load_encoder_hparams_and_params(
    model_size: str, models_dir: str = "models", quantize: str | None = None, verify: bool = False
) -> tuple[Encoder, dict, dict]:
    """The tokenizer, the hyperparameters and the weights of a model.

    `model_size` is 124M, 355M, 774M or 1558M, downloaded once into `models_dir`; a name there; a path; or the name of a
    model of Hugging Face. `params` is nested as the checkpoint's names are: {"wte", "wpe", "ln_f": {"g", "b"},
    "blocks": [{"ln_1", "attn", "ln_2", "mlp"}, ...]}; its arrays are float32, read-only, and memory-mapped if the file
    has them so. With `quantize="int8"` its matrices are int8. With `verify` each file is compared with the digest that
    was written with the weights. Raises FileNotFoundError for a model or file that is not there, ValueError for one
    that is damaged, OSError for a failed download, ImportError for a missing package.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize must be int8, not {quantize!r}")
    if quantize:
        from engine.int8 import load_quantized  # imported late: Numba takes 0.3 s, and few runs need it

    directory, encoder, hparams, params = open_model(
        model_size, models_dir, load_quantized if quantize else load_params
    )
    if verify:
        from store.verify import verify_model  # imported late: few runs ask for it

        verify_model(directory)
    return encoder, hparams, read_lazy(params)


def open_model(
    model_size: str, models_dir: str = "models", load: Callable = load_params
) -> tuple[Path, Encoder, dict, dict]:
    """The directory, the tokenizer, the hyperparameters and the weights, of which some may be `Lazy`."""
    directory = find_model(str(model_size), models_dir, TABLES)
    encoder = read_encoder(directory)
    hparams = load_hparams(directory, len(encoder.encoder))
    return directory, encoder, hparams, load(str(model_size), directory, hparams)


def write_model(directory: Path, encoder: Encoder, hparams: dict[str, int], params: dict) -> None:
    """Fill an empty directory with a model: its tables, then its weights, which have the digests of the tables."""
    write_text(directory / "encoder.json", json.dumps(encoder.encoder, ensure_ascii=False))
    write_text(directory / "vocab.bpe", format_merges(encoder.bpe_ranks))
    write_text(directory / HPARAMS, json.dumps(hparams, indent=1))
    save_params(directory / WEIGHTS, params, TABLES)


def save_model(directory: Path, encoder: Encoder, hparams: dict[str, int], params: dict) -> None:
    """Write a model directory. A model that is there is replaced when the new one is whole; other files stay."""
    with replacing_directory(directory, MODEL_FILES) as new:
        write_model(new, encoder, hparams, params)
