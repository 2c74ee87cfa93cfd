"""Small model directories in the layout of transformers, with the changes that a test asks for."""

import json

import pytest
from safetensors.numpy import save_file

from encoder import END_OF_TEXT
from helpers.models import assert_same_params, random_params, tiny_tables
from store.params import flatten, tensor_name
from utils import load_encoder_hparams_and_params

CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 300, "n_positions": 32, "n_embd": 48,
    "n_head": 4, "n_layer": 3, "bos_token_id": 299, "eos_token_id": 299,
}  # fmt: skip
EVERYTHING = {
    "layer_norm_epsilon": 0.1, "n_inner": 80, "tie_word_embeddings": False, "vocab_size": 320,
    "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
}  # fmt: skip
VARIANTS = {
    "plain": {}, "padded": {"vocab_size": 320}, "n_inner": {"n_inner": 80}, "no eps": {"layer_norm_epsilon": 0.0},
    "eps": {"layer_norm_epsilon": 0.1}, "small eps": {"layer_norm_epsilon": 1e-3},
    "not tied": {"tie_word_embeddings": False}, "not scaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "scaled by layer only": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "reordered": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "another name for gelu": {"activation_function": "gelu_pytorch_tanh"}, "everything": EVERYTHING,
}  # fmt: skip
TEXTS = ["def encode(self, text):", "  1 + 1 = 2\n\n日本語 ", "<|endoftext|> a <|endoftext|>", ""]


def added(i, content, **flags):
    """An added token as tokenizer.json has it, special unless `flags` say otherwise."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | flags
    return {"id": i, "content": content, **flags}


ADDED = [
    added(300, "<pad>"), added(301, "<mask>", lstrip=True), added(302, "<tool>", special=False),
    added(303, "[end]", special=False, rstrip=True), added(304, "yes", special=False, single_word=True),
    added(305, "( )", lstrip=True, rstrip=True), added(306, "«Ġ»", special=False, normalized=True),
    added(307, "ab", special=False), added(308, "abc", special=False),
    added(309, "<word>", single_word=True, lstrip=True), added(310, "<w>", single_word=True, rstrip=True),
]  # fmt: skip
# Texts, and how the tokens of ADDED split them: into ids of those tokens, and ordinary text between them.
SEGMENTS = [
    ("a<pad>b <pad>", ["a", 300, "b ", 300]), ("<|endoftext|><pad>\n", [299, 300, "\n"]),
    ("a  \n<mask> b", ["a", 301, " b"]), ("\t <mask><mask> <mask>", [301, 301, 301]),
    (" <tool> ", [" ", 302, " "]), ("a ( ) b", ["a", 305, "b"]), ("«Ġ»«Ġ", [306, "«Ġ"]),
    ("[end] \n b", [303, "b"]), ("x [end]", ["x ", 303]),
    ("yes eyes yes! yesterday yes_ (yes)", [304, " eyes ", 304, "! yesterday yes_ (", 304, ")"]),
    ("abcab", [308, 307]), ("aab c", ["a", 307, " c"]),
    ("a <word> <word>b", ["a", 309, " <word>b"]), ("<w> b <w>\n a<w> <w>b", [310, "b ", 310, "a<w> <w>b"]),
]  # fmt: skip


def tensors_for(config, seed=0):
    """Random weights for a config.json, by the names without a prefix."""
    hparams = {"n_vocab": config["vocab_size"], "n_ctx": config["n_positions"]}
    hparams |= {name: config[name] for name in ("n_embd", "n_head", "n_layer", "n_inner") if name in config}
    tensors = flatten(random_params(hparams, seed), tensor_name)
    if config.get("tie_word_embeddings") is False:
        tensors["lm_head.weight"] = random_params(hparams, seed + 1)["wte"]
    for name in tensors.keys() & {"wte.weight", "lm_head.weight"}:
        tensors[name][300:] *= 0.1  # so that greedy text has no token of the padding
    return tensors


TENSORS = tensors_for(CONFIG)


def prefixed(tensors):
    return {name if name.startswith("lm_head") else f"transformer.{name}": array for name, array in tensors.items()}


def tokenizer_json(entries=(), pairs=False, **model):
    vocabulary, merges = tiny_tables()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added(299, END_OF_TEXT), *entries],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": [list(pair) if pairs else " ".join(pair) for pair in merges], **model,
        },
    }  # fmt: skip


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write(directory, config=None, tensors=None, tokenizer=None):
    """A complete model directory, whose config.json is CONFIG updated with `config`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | (config or {})
    write_json(directory / "config.json", config)
    write_json(directory / "tokenizer.json", tokenizer or tokenizer_json())
    save_file(prefixed(tensors_for(config)) if tensors is None else tensors, directory / "model.safetensors")
    return directory


def write_older_tables(directory, vocabulary=None):
    """The older layout of a tokenizer, vocab.json and merges.txt, in the place of tokenizer.json."""
    (directory / "tokenizer.json").unlink(missing_ok=True)
    write_json(directory / "vocab.json", vocabulary or tiny_tables()[0])
    lines = ["#version: 0.2", *map(" ".join, tiny_tables()[1]), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return directory


def write_shards(directory, tensors, n=2, stem="model", suffix="safetensors", save=save_file):
    """Write the weights as `n` files and an index, in place of one file; return the path of the index."""
    (directory / f"{stem}.{suffix}").unlink(missing_ok=True)
    names, places = list(tensors), {}
    for i in range(n):
        file = f"{stem}-{i + 1:05}-of-{n:05}.{suffix}"
        save({name: tensors[name] for name in names[i::n]}, directory / file)
        places |= dict.fromkeys(names[i::n], file)
    index = directory / f"{stem}.{suffix}.index.json"
    write_json(index, {"metadata": {"total_size": 1}, "weight_map": places})
    return index


def load(directory):
    return load_encoder_hparams_and_params(str(directory))


def assert_tensors(directory, expected):
    """The directory loads as a model with just these tensors, and without an eps of its own."""
    assert_same_params(flatten(load(directory)[2], tensor_name), expected)


def assert_refused(directory, complaint, error=ValueError):
    """The directory does not load, and one line says why."""
    with pytest.raises(error, match=complaint) as raised:
        load(directory)
    assert "\n" not in str(raised.value)
