"""Export a model as a directory that transformers, and every program that reads the same files, can open."""

if __name__ == "__main__":
    from show.start import run  # imported first, so that Ctrl-C during the slow imports below prints no traceback

import json
import os
from pathlib import Path

from encoder import Encoder
from store.files import digests, replacing_directory, write_text
from store.huggingface import CONFIG, DEFAULTS, NAMES, TOKENIZER, TOKENIZER_CONFIG
from store.params import tensors_of
from store.tables import format_merges
from store.tensors import WEIGHTS, save_tensors
from utils import open_model


def describe_tokenizer(encoder: Encoder) -> dict:
    """The contents of tokenizer.json."""
    added = []
    for token in sorted(encoder.added_tokens.values(), key=lambda token: encoder.encoder[token.text]):
        flags = {name: flag for name, flag in vars(token).items() if name != "text"}
        added.append({"id": encoder.encoder[token.text], "content": token.text, **flags})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "added_tokens": added,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "vocab": encoder.encoder, "merges": [" ".join(pair) for pair in encoder.bpe_ranks],
        },
    }  # fmt: skip


def export_model(encoder: Encoder, hparams: dict, params: dict, directory: Path) -> None:
    """Fill an empty directory with the files of a model in transformers' layout."""
    # Settings that scale attention keep their defaults, because `params` is already scaled.
    config = DEFAULTS | {theirs: hparams.get(ours) for ours, theirs in NAMES.items()} | {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "dtype": "float32", "tie_word_embeddings": "lm_head" not in params, "bos_token_id": encoder.bos_id,
        "n_ctx": hparams["n_ctx"],  # an old name of n_positions that llama.cpp's converter needs
        "layer_norm_epsilon": params["ln_f"].get("eps", DEFAULTS["layer_norm_epsilon"]), "eos_token_id": encoder.eot_id,
    }  # fmt: skip
    # transformers makes the tokens that are named in tokenizer_config.json special, so name only special tokens.
    special = {encoder.encoder[text]: text for text, token in encoder.added_tokens.items() if token.special}
    bos, eos = (None if i is None else special.get(i) for i in (encoder.bos_id, encoder.eot_id))
    contents = {
        CONFIG: config,
        TOKENIZER: describe_tokenizer(encoder),
        TOKENIZER_CONFIG: {
            "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": hparams["n_ctx"],
            "bos_token": bos, "eos_token": eos, "unk_token": eos, "clean_up_tokenization_spaces": False,
        },
        "vocab.json": encoder.encoder,
    }  # fmt: skip
    for file, value in contents.items():
        write_text(directory / file, json.dumps(value, ensure_ascii=False, indent=2))
    write_text(directory / "merges.txt", format_merges(encoder.bpe_ranks))
    tensors = {name if name == "lm_head.weight" else f"transformer.{name}": a for name, a in tensors_of(params).items()}
    save_tensors(directory / WEIGHTS, tensors, {"format": "pt", **digests(directory, (*contents, "merges.txt"))})


def main(model_size: str, out: str, models_dir: str | None = None) -> None:
    """Write the model MODEL_SIZE to a new directory OUT, for transformers and programs that read the same files."""
    path = Path(os.path.abspath(out))
    if not out or path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise FileExistsError(f"{out!r} is not a new or empty directory: choose another name")
    _, encoder, hparams, params = open_model(model_size, models_dir)
    try:
        with replacing_directory(path) as new:
            export_model(encoder, hparams, params, new)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}") from error
    print(f"{out} is written. Open it in transformers with AutoModelForCausalLM.from_pretrained({out!r})")


if __name__ == "__main__":
    run(main)
