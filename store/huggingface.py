"""Hugging Face's GPT-2 directories, read as they are.

They have `config.json`, the tokenizer in `tokenizer.json` or in `vocab.json` and `merges.txt`, and the weights in
`model.safetensors` or `pytorch_model.bin`, or in several such files with an index. What `config.json` says becomes part
of the parameters, so that the model needs no branch for it, or the directory is refused.
"""

import contextlib
import json
import math
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from store.files import open_regular
from store.params import nest_tensors, param_shapes
from store.tables import Tables, check_hparams, check_vocabulary, damaged, read_json, read_merges, read_vocabulary
from store.tensors import BFLOAT16, WEIGHTS, Lazy, map_tensors

CONFIG, TOKENIZER, PYTORCH_WEIGHTS = "config.json", "tokenizer.json", "pytorch_model.bin"
SMALL_FILES = (
    CONFIG, "generation_config.json", TOKENIZER, "tokenizer_config.json", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
WEIGHT_FILES = (WEIGHTS, f"{WEIGHTS}.index.json", PYTORCH_WEIGHTS, f"{PYTORCH_WEIGHTS}.index.json")
# What transformers' GPT2Config takes for what config.json leaves out, and the other names that it knows.
DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True, "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
ALIASES = {
    "n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}  # fmt: skip
NAMES = {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}
# Supported values, the default first: in config.json, in the parts of tokenizer.json, in tokenizer_config.json, and in
# the latter if there is no tokenizer.json.
ONLY = {
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "add_cross_attention": (False,),
    "is_encoder_decoder": (False,), "pruned_heads": (None, {}), "quantization_config": (None,),
}  # fmt: skip
ONLY_TOKENIZER = {
    "pre_tokenizer": {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)},
    "decoder": {"type": ("ByteLevel",)},
    "model": {
        "type": ("BPE",), "dropout": (None, 0, 0.0), "byte_fallback": (False,), "ignore_merges": (False,),
        "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
    },
}  # fmt: skip
ONLY_OPTIONS = {"add_prefix_space": (False,), "add_bos_token": (False,), "add_eos_token": (False,)}
ONLY_CLASS = {"tokenizer_class": ("GPT2Tokenizer", "GPT2TokenizerFast", None)}
# Settings that change greedy text unless they have this value or None. Other settings are options of gpt2.py.
PLAIN_GENERATION = {
    "num_beams": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None,
}  # fmt: skip
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # constants of transformers' causal mask: not parameters
PARAMETER = re.compile(r"(wte|wpe|h|ln_f|lm_head)\.")
FILE_NAME = re.compile(r"[.-]*\w[\w.-]*")  # of a file in the same directory


def is_huggingface(directory: Path) -> bool:
    """Whether a model directory is in Hugging Face's layout."""
    return (directory / CONFIG).is_file() and not (directory / "hparams.json").is_file()


def load_hparams(directory: Path) -> dict[str, int]:
    """The hyperparameters in `config.json`, by GPT-2's names, and `n_inner` if it is not 4 * n_embd."""
    config = read_config(directory / CONFIG)
    hparams = {ours: config[theirs] for ours, theirs in NAMES.items()}
    if config["n_inner"] not in (None, 4 * config["n_embd"]):
        hparams["n_inner"] = config["n_inner"]
    return hparams


def load_params(directory: Path, hparams: dict[str, int]) -> dict:
    """The weights in a directory, nested; they may have an `eps` in each norm and an `lm_head` [n_vocab, n_embd]."""
    config, tensors, shapes = read_config(directory / CONFIG), read_weights(directory), param_shapes(hparams)
    head = tensors.pop("lm_head.weight", None)
    if head is None and not config["tie_word_embeddings"]:
        raise ValueError(f"{directory}: {CONFIG} says tie_word_embeddings = false, but lm_head.weight is missing")
    if head is not None and not np.array_equal(head, tensors.get("wte.weight")):
        tensors["lm_head.weight"] = head
        shapes["lm_head"] = (hparams["n_vocab"], hparams["n_embd"])
    params = nest_tensors(directory, tensors, shapes, CONFIG)
    fold_attention_scale(params["blocks"], config)
    if config["layer_norm_epsilon"] != DEFAULTS["layer_norm_epsilon"]:
        for norm in (params["ln_f"], *(block[ln] for block in params["blocks"] for ln in ("ln_1", "ln_2"))):
            norm["eps"] = float(config["layer_norm_epsilon"])
    return params


def read_config(path: Path) -> dict:
    """`config.json` with the DEFAULTS; ValueError that names a setting and its value if it is not supported."""
    found = read_json(path)
    refuse_others(path, found, ONLY)
    config = DEFAULTS | found | {name: found[alias] for name, alias in ALIASES.items() if alias in found}
    inner = {} if config["n_inner"] is None else {"n_inner": config["n_inner"]}
    check_hparams(path, {name: config[theirs] for name, theirs in NAMES.items()} | inner, NAMES)
    for name, default in DEFAULTS.items():
        if type(default) is bool and type(config[name]) is not bool:
            raise ValueError(f"{path}: {name} must be true or false, not {config[name]!r}")
    eps = config["layer_norm_epsilon"]
    if type(eps) not in (int, float) or not 0 <= eps < 1e30:
        raise ValueError(f"{path}: layer_norm_epsilon must be a number from 0, not {eps!r}")
    return config


def refuse_others(path: Path, found: dict, only: dict[str, tuple], part: str = "") -> None:
    """Raise ValueError that names an entry of `found` and its value, if `only` does not allow that value."""
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {part[:-1]} is {json.dumps(found)[:80]}, which is not supported here")
    for name, values in only.items():
        value = found.get(name, values[0])
        if not any(value == allowed and type(value) is type(allowed) for allowed in values):
            wanted = " or ".join(map(json.dumps, values))
            raise ValueError(f"{path}: {part}{name} is {json.dumps(value)[:80]}: only {wanted} is supported here")


def fold_attention_scale(blocks: list[dict], config: dict) -> None:
    """Scale the queries so that attention, which divides by sqrt(n_embd/n_head), computes what `config` asks for."""
    for i, block in enumerate(blocks):
        factor = 1.0 if config["scale_attn_weights"] else math.sqrt(config["n_embd"] / config["n_head"])
        factor /= i + 1 if config["scale_attn_by_inverse_layer_idx"] else 1
        if factor != 1:
            scale = np.repeat(np.float32([factor, 1, 1]), config["n_embd"])  # of queries, keys and values
            c_attn = block["attn"]["c_attn"].items()
            block["attn"]["c_attn"] = {name: multiply_later(leaf, scale) for name, leaf in c_attn}


def multiply_later(leaf: np.ndarray | Lazy, scale: np.ndarray) -> Lazy:
    return Lazy(leaf.shape, lambda: np.asarray(leaf) * scale, getattr(leaf, "source", leaf))


def load_tables(directory: Path) -> Tables:
    """The tokenizer in a directory; ValueError for one that does not work as GPT-2's does, or is damaged."""
    config = read_config(directory / CONFIG)
    paths = [directory / file for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")]
    options, roles, older = (read_json(path) if path.is_file() else {} for path in paths)
    refuse_others(paths[0], options, ONLY_OPTIONS)
    path = directory / TOKENIZER
    if path.is_file():
        vocabulary, merges, entries = read_tokenizer(path)
    elif (path := directory / "vocab.json").is_file():
        refuse_others(paths[0], options, ONLY_CLASS)
        vocabulary, merges, entries = read_vocabulary(path), read_merges(directory / "merges.txt"), []
    else:
        raise FileNotFoundError(f"{directory} has no tokenizer of a GPT-2: neither {TOKENIZER} nor vocab.json is there")
    misfit = f"{path} does not fit its added tokens, or is damaged"
    with in_file(path, misfit):
        added = []
        for text, entry in added_tokens(vocabulary, entries, options | roles, older).items():
            if not text.encode():
                raise ValueError("an added token is empty")
            if type(entry["id"]) is not int or vocabulary.setdefault(text, entry["id"]) != entry["id"]:
                raise ValueError(f"{text[:80]!r} has the ids {vocabulary.get(text)} and {repr(entry['id'])[:80]}")
            flags = {flag: bool(entry.get(flag)) for flag in ("special", "lstrip", "rstrip", "single_word")}
            added.append({"text": text, **flags, "normalized": bool(entry.get("normalized", not flags["special"]))})
    ends = read_ends(directory, config, set(vocabulary.values()))
    return Tables(vocabulary, merges, added, ends, misfit)


def read_ends(directory: Path, config: dict, ids: set[int]) -> dict[str, int | None]:
    """Which of `ids` end and begin a text. Says which settings of generation are not supported."""
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else config
    for name, plain in PLAIN_GENERATION.items():
        if (value := generation.get(name)) not in (None, plain):
            print(f"{directory}: {name} = {json.dumps(value)[:80]} is not supported here", file=sys.stderr)
    eos, bos = generation.get("eos_token_id"), (config | generation)["bos_token_id"]
    if isinstance(eos, list) and len(eos) == 1:
        eos = eos[0]
    for name, value in (("eos_token_id", eos), ("bos_token_id", bos)):
        if value is not None and type(value) is not int:
            raise ValueError(f"{directory}: {name} is {json.dumps(value)[:80]}: only one token's id is supported here")
    begin = [i for i in (bos, eos) if i in ids]
    return {"eot_id": eos if eos in ids else None} | ({"bos_id": begin[0]} if begin else {})


@contextlib.contextmanager
def in_file(path: Path, misfit: str = "") -> Iterator[None]:
    """Begin a ValueError with `misfit` or the path; make one of the errors that JSON of another structure causes."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{misfit or path}: {error}") from error
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}, {error}") from error


def read_tokenizer(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[dict]]:
    """The vocabulary, the merges and the added tokens of a tokenizer.json."""
    found = read_json(path)
    refuse_others(path, found, {"normalizer": (None,)})
    for part, only in ONLY_TOKENIZER.items():
        refuse_others(path, found.get(part), only, f"{part}.")
    with in_file(path):
        if not adds_nothing(found.get("post_processor") or {"type": "ByteLevel"}):
            raise ValueError("post_processor adds tokens to a text, which is not supported here")
        vocabulary, merges = found["model"]["vocab"], found["model"]["merges"]
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
        if any(len(pair) != 2 or not all(isinstance(token, str) for token in pair) for pair in pairs):
            raise ValueError("model.merges must be pairs of tokens")
    return check_vocabulary(path, vocabulary), pairs, found.get("added_tokens") or []


def adds_nothing(processor: dict) -> bool:
    """Whether a post-processor of tokenizer.json leaves the tokens of a text as they are."""
    if processor["type"] == "Sequence":
        return all(map(adds_nothing, processor["processors"]))
    if processor["type"] == "TemplateProcessing":
        return all(piece.keys() == {"Sequence"} for piece in processor["single"])
    return processor["type"] == "ByteLevel"


def added_tokens(vocabulary: dict[str, int], entries: list[dict], options: dict, older: dict) -> dict[str, dict]:
    """The added tokens, by text: tokenizer.json's `entries`, its config's `options`, and those of `older` versions."""
    found = {token: {"id": i} for token, i in older.items()} | {entry["content"]: entry for entry in entries}
    for i, entry in options.get("added_tokens_decoder", {}).items():
        found[entry["content"]] = {**found.get(entry["content"], {}), **entry, "id": int(i)}
    roles = [value for name, value in options.items() if name.endswith("_token")]  # such as pad_token: special
    for role in (*roles, *(options.get("additional_special_tokens") or ())):
        entry = role if isinstance(role, dict) else {"content": role}
        token = entry.get("content")
        if isinstance(token, str) and (token in found or token in vocabulary):
            found[token] = {"id": vocabulary.get(token), **entry, **found.get(token, {}), "special": True}
    return found


def weight_files(directory: Path) -> list[Path]:
    """The paths of the weights that transformers would take, which need not all be there; none if there are none."""
    path = next(filter(Path.exists, map(directory.joinpath, WEIGHT_FILES)), None)
    if path is None or path.suffix != ".json":
        return [path] if path else []
    places = read_json(path).get("weight_map")
    files = list(places.values()) if isinstance(places, dict) else []
    if not files or not all(isinstance(file, str) and FILE_NAME.fullmatch(file) for file in files):
        raise damaged(path, "weight_map must name the file of each tensor")
    return [directory / file for file in sorted(set(files))]


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """The tensors in a directory, named without `transformer.`, and without the buffers of the causal mask."""
    paths, tensors, others = weight_files(directory), {}, []
    if not paths:
        raise FileNotFoundError(f"{directory} has no weights: neither {WEIGHTS} nor {PYTORCH_WEIGHTS} is there")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: a part of the weights; get it again")
        found = read_pytorch(path) if path.suffix == ".bin" else map_tensors(path)[0]
        for name, array in found.items():
            name = name.removeprefix("transformer.")
            if name in tensors:
                raise ValueError(f"{path}: {name} is there twice")
            if not PARAMETER.match(name):
                others.append(name)
            elif not BUFFER.fullmatch(name):
                tensors[name] = array
    if others:  # such as a classifier's
        print(f"{directory}: not used, as no part of a GPT-2: {', '.join(others)[:200]}", file=sys.stderr)
    return tensors


def read_pytorch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch file, which may hold nothing else. Those of a recent file stay on its own pages."""
    check_pytorch(path)
    import torch

    try:
        with open_regular(path) as file:
            is_zip, n_bytes = zipfile.is_zipfile(file), path.stat().st_size
            if is_zip and sum(item.file_size for item in zipfile.ZipFile(file).infolist()) > n_bytes:
                raise ValueError("it is compressed, or its parts overlap")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        if odd := [name for name in found if not isinstance(name, str) or not name.isprintable()]:
            raise ValueError(f"{odd[0]!r} is no name of a tensor")
        if sum(tensor.numel() * tensor.element_size() for tensor in found.values()) > 2 * n_bytes:  # wte may be twice
            raise ValueError("its tensors are larger than the file")
        tensors = {name: tensor.detach().contiguous() for name, tensor in found.items()}
        views = {torch.bfloat16: lambda tensor: tensor.view(torch.int16).numpy().view(BFLOAT16)}
        return {name: views.get(tensor.dtype, torch.Tensor.numpy)(tensor) for name, tensor in tensors.items()}
    except OSError:
        raise
    except Exception as error:  # pickle and PyTorch raise any kind; PyTorch's text would be advice to trust the file
        reason = str(error)[:200] if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is damaged, or holds other things than tensors: {reason}") from error


def check_pytorch(path: Path) -> None:
    """Raise ImportError unless there is a PyTorch that can read `path`."""
    try:
        import torch
    except ImportError as error:
        convert = f"python export.py {path.parent} OUT, where it is installed, makes a model that needs none"
        raise ImportError(f"PyTorch is needed to read {path}: pip install torch; or {convert}") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434
        raise ImportError(f"{path} could run code in PyTorch {torch.__version__}: pip install --upgrade torch")
