"""Export a model for other programs: a directory that transformers, and all that reads its files, can open."""

if __name__ == "__main__":
    from show.start import run  # first: Ctrl-C during the imports below ends without a traceback

import json
import os
from pathlib import Path

from encoder import Encoder
from store.files import digests, replacing_directory, write_text
from store.huggingface import CONFIG, DEFAULTS, NAMES, TOKENIZER
from store.params import tensors_of
from store.tables import format_merges
from store.tensors import WEIGHTS, save_tensors
from utils import open_model


def describe_config(encoder: Encoder, hparams: dict, params: dict) -> dict:
    """The contents of config.json. Other scales of attention are in the weights."""
    return DEFAULTS | {theirs: hparams[ours] for ours, theirs in NAMES.items()} | {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "dtype": "float32",
        "n_ctx": hparams["n_ctx"],  # an old name of n_positions, which llama.cpp's converter asks for
        "n_inner": hparams.get("n_inner"), "tie_word_embeddings": "lm_head" not in params,
        "layer_norm_epsilon": params["ln_f"].get("eps", DEFAULTS["layer_norm_epsilon"]),
        "bos_token_id": encoder.bos_id, "eos_token_id": encoder.eot_id,
    }  # fmt: skip


def describe_tokenizer(encoder: Encoder) -> dict:
    """The contents of tokenizer.json."""
    added = []
    for text, token in sorted(encoder.added_tokens.items(), key=lambda item: encoder.encoder[item[0]]):
        flags = {name: flag for name, flag in vars(token).items() if name != "text"}
        added.append({"id": encoder.encoder[text], "content": text, **flags})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "vocab": encoder.encoder, "merges": [" ".join(pair) for pair in encoder.bpe_ranks],
        },
    }  # fmt: skip


def describe_options(encoder: Encoder, n_ctx: int) -> dict:
    """The contents of tokenizer_config.json."""
    # A token that is named here becomes special, so only tokens that are special are named.
    special = {encoder.encoder[text]: text for text, token in encoder.added_tokens.items() if token.special}
    bos, eos = special.get(encoder.bos_id), special.get(encoder.eot_id)
    return {
        "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": n_ctx, "bos_token": bos,
        "eos_token": eos, "unk_token": eos, "clean_up_tokenization_spaces": False,
    }  # fmt: skip


def export_model(encoder: Encoder, hparams: dict, params: dict, directory: Path) -> None:
    """Fill an empty directory with the files of a model in transformers' layout."""
    contents = {
        CONFIG: describe_config(encoder, hparams, params),
        TOKENIZER: describe_tokenizer(encoder),
        "tokenizer_config.json": describe_options(encoder, hparams["n_ctx"]),
        "vocab.json": encoder.encoder,
    }
    for file, value in contents.items():
        write_text(directory / file, json.dumps(value, ensure_ascii=False, indent=2))
    write_text(directory / "merges.txt", format_merges(encoder.bpe_ranks))
    tensors = {f"transformer.{name}": array for name, array in tensors_of(params).items()}
    if "lm_head" in params:
        tensors["lm_head.weight"] = tensors.pop("transformer.lm_head.weight")
    save_tensors(directory / WEIGHTS, tensors, {"format": "pt", **digests(directory, (*contents, "merges.txt"))})


def main(model_size: str, out: str, models_dir: str = "models") -> None:
    """Write the model MODEL_SIZE to a new directory OUT, for transformers and all that reads its files."""
    directory = Path(os.path.abspath(out))
    if not out:
        raise ValueError("OUT is empty: it is the directory to make")
    if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
        raise FileExistsError(f"{out} is there already: choose another name")
    _, encoder, hparams, params = open_model(model_size, models_dir)
    try:
        with replacing_directory(directory) as new:
            export_model(encoder, hparams, params, new)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}") from error
    print(f"{out}: written; in transformers: AutoModelForCausalLM.from_pretrained({out!r})")


if __name__ == "__main__":
    run(main)
