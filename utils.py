"""The door to models: open one by its name, and save one. `store` knows what a model's directory is."""

import json
from pathlib import Path

from encoder import Encoder, read_encoder
from store.files import replacing
from store.models import HPARAMS, TOKENIZER_FILES, find_model, load_hparams, load_params
from store.params import save_params
from store.tables import format_merges
from store.tensors import WEIGHTS


def load_encoder_hparams_and_params(
    model_size: str, models_dir: str = "models", quantize: str | None = None
) -> tuple[Encoder, dict, dict]:
    """The tokenizer, the hyperparameters and the weights of a model.

    `model_size` is 124M, 355M, 774M or 1558M, downloaded once into `models_dir`; a name there; a path; or the name of a
    model of Hugging Face. `params` is nested as the checkpoint's names are: {"wte", "wpe", "ln_f": {"g", "b"},
    "blocks": [{"ln_1", "attn", "ln_2", "mlp"}, ...]}; its arrays are float32, read-only, and memory-mapped if the file
    has them so. With `quantize="int8"` its matrices are int8. Raises FileNotFoundError for a model or file that is not
    there, ValueError for one that is damaged, OSError for a failed download, ImportError for a missing package.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize must be int8, not {quantize!r}")
    if quantize:
        from engine.int8 import map_quantized  # imported late: Numba takes 0.3 s, and few runs need it

    directory = find_model(str(model_size), models_dir, (*TOKENIZER_FILES, HPARAMS))
    encoder = read_encoder(directory)
    hparams = load_hparams(directory, len(encoder.encoder))
    params = load_params(str(model_size), directory, hparams)
    return encoder, hparams, map_quantized(directory, params) if quantize else params


def save_model(directory: Path, encoder: Encoder, hparams: dict[str, int], params: dict) -> None:
    """Write a model directory, its weights last: before they are there, the directory has none, and not others."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS).unlink(missing_ok=True)
    tables = (json.dumps(encoder.encoder, ensure_ascii=False), format_merges(encoder.bpe_ranks))
    for file, text in zip((*TOKENIZER_FILES, HPARAMS), (*tables, json.dumps(hparams, indent=1)), strict=True):
        with replacing(directory / file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    save_params(directory / WEIGHTS, params)
