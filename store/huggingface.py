"""Read Hugging Face's GPT-2 directories as they are, and download models from its hub.

They have `config.json`, a tokenizer, and weights in one file or in several with an index. The settings become part of
the parameters, so that the model needs no branch for them; a setting that is not supported is an error.
"""

import contextlib
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from store.checkpoint import is_offline
from store.files import open_regular
from store.params import nest_tensors, param_shapes
from store.tables import Tables, check_hparams, check_vocabulary, damaged, read_json, read_merges, read_vocabulary
from store.tensors import BFLOAT16, WEIGHTS, Lazy, map_tensors

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
GENERATION, ROLES, OLDER_TOKENS = "generation_config.json", "special_tokens_map.json", "added_tokens.json"
ALL_BUT_WEIGHTS = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION, ROLES, OLDER_TOKENS, "vocab.json", "merges.txt")
PYTORCH_WEIGHTS = "pytorch_model.bin"
WEIGHT_FILES = (WEIGHTS, f"{WEIGHTS}.index.json", PYTORCH_WEIGHTS, f"{PYTORCH_WEIGHTS}.index.json")
# The defaults of transformers' GPT2Config, its other names for some settings, and our names for the hyperparameters.
DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True, "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
ALIASES = {
    "n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}  # fmt: skip
NAMES = {"n_vocab": "vocab_size", "n_ctx": "n_positions"} | {n: n for n in ("n_embd", "n_head", "n_layer", "n_inner")}
# The supported values of settings in each file, the default first. Other settings do not change what is computed.
SUPPORTED: dict[str, dict[str, tuple]] = {
    CONFIG: {
        "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "pruned_heads": (None, {}),
        "add_cross_attention": (False,), "is_encoder_decoder": (False,), "quantization_config": (None,),
        "scale_attn_weights": (True, False), "scale_attn_by_inverse_layer_idx": (False, True),
        "tie_word_embeddings": (True, False),
    },
    TOKENIZER: {
        "normalizer": (None,), "pre_tokenizer.type": ("ByteLevel",), "pre_tokenizer.add_prefix_space": (False,),
        "pre_tokenizer.use_regex": (True,), "decoder.type": ("ByteLevel",), "model.type": ("BPE",),
        "model.dropout": (None, 0, 0.0), "model.byte_fallback": (False,), "model.ignore_merges": (False,),
        "model.continuing_subword_prefix": (None, ""), "model.end_of_word_suffix": (None, ""),
    },
    TOKENIZER_CONFIG: {"add_prefix_space": (False,), "add_bos_token": (False,), "add_eos_token": (False,)},
    "vocab.json": {"tokenizer_class": ("GPT2Tokenizer", "GPT2TokenizerFast", None)},  # without a TOKENIZER
}  # fmt: skip
# Settings that change greedy text unless they have this value or None. Other settings are options of gpt2.py.
PLAIN_GENERATION = {
    "num_beams": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None,
}  # fmt: skip
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # constants of transformers' causal mask: not parameters
PARAMETER = re.compile(r"(wte|wpe|h|ln_f|lm_head)\.")


def has_layout(directory: Path) -> bool:
    """Whether a model directory is one of Hugging Face's."""
    return (directory / CONFIG).is_file() and not (directory / "hparams.json").is_file()


def check_supported(path: Path, found: dict, file: str = "") -> None:
    """Raise ValueError, with the name and value of a setting, if `SUPPORTED` does not allow that value."""
    for name, values in SUPPORTED[file or path.name].items():
        part, _, setting = name.rpartition(".")
        settings = found.get(part) if part else found
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: {part} is {json.dumps(settings)[:80]}, which is not supported")
        value, allowed = json.dumps(settings.get(setting, values[0])), list(map(json.dumps, values))
        if value not in allowed:
            raise ValueError(f"{path}: {name} is {value[:80]}: only {' or '.join(allowed)} is supported")


def read_config(path: Path) -> dict:
    """`config.json`, completed with DEFAULTS; a ValueError names a setting that is not supported, and its value."""
    found = read_json(path)
    check_supported(path, found)
    config = DEFAULTS | found | {name: found[alias] for name, alias in ALIASES.items() if alias in found}
    eps = config["layer_norm_epsilon"]
    if type(eps) not in (int, float) or not 0 <= eps < 1e30:
        raise ValueError(f"{path}: layer_norm_epsilon must be a number, 0 or more, not {eps!r}")
    return config


def load_hparams(directory: Path) -> dict[str, int]:
    """The hyperparameters in `config.json`, by GPT-2's names, and `n_inner` if it is not 4 * n_embd."""
    config = read_config(directory / CONFIG)
    hparams = {ours: config[theirs] for ours, theirs in NAMES.items() if config[theirs] is not None}
    check_hparams(directory / CONFIG, hparams, NAMES)
    if hparams.get("n_inner") == 4 * hparams["n_embd"]:
        del hparams["n_inner"]
    return hparams


def load_params(directory: Path, hparams: dict[str, int]) -> dict:
    """The weights in a directory, nested. Norms may have an `eps`, and there may be an `lm_head` [n_vocab, n_embd]."""
    config, tensors, shapes = read_config(directory / CONFIG), read_weights(directory), param_shapes(hparams)
    head = tensors.pop("lm_head.weight", None)
    if head is None and not config["tie_word_embeddings"]:
        raise ValueError(f"{directory}: {CONFIG} says tie_word_embeddings = false, but lm_head.weight is missing")
    if head is not None and not np.array_equal(head, tensors.get("wte.weight", [])):
        tensors["lm_head.weight"] = head
        shapes["lm_head"] = (hparams["n_vocab"], hparams["n_embd"])
    params = nest_tensors(directory, tensors, shapes, CONFIG)
    if config["layer_norm_epsilon"] != DEFAULTS["layer_norm_epsilon"]:
        for norm in (params["ln_f"], *(block[ln] for block in params["blocks"] for ln in ("ln_1", "ln_2"))):
            norm["eps"] = float(config["layer_norm_epsilon"])
    for i, block in enumerate(params["blocks"]):
        # attention() divides by sqrt(n_embd/n_head). If the config asks for another scale, the queries make up for it.
        factor = 1.0 if config["scale_attn_weights"] else math.sqrt(hparams["n_embd"] / hparams["n_head"])
        factor /= i + 1 if config["scale_attn_by_inverse_layer_idx"] else 1
        if factor != 1:
            scale = np.repeat(np.array([factor, 1, 1], np.float32), hparams["n_embd"])  # of queries, keys and values
            for name, leaf in block["attn"]["c_attn"].items():
                source = leaf.source if isinstance(leaf, Lazy) else leaf
                block["attn"]["c_attn"][name] = Lazy(leaf.shape, partial(np.multiply, leaf, scale), source)
    return params


def load_tables(directory: Path) -> Tables:
    """The tokenizer in a directory; ValueError if it is damaged, or does not work as GPT-2's does."""
    config = read_config(directory / CONFIG)
    paths = [directory / file for file in (TOKENIZER_CONFIG, ROLES, OLDER_TOKENS)]
    options, roles, older = (read_json(path) if path.is_file() else {} for path in paths)
    check_supported(paths[0], options)
    path = directory / TOKENIZER
    if not path.is_file() and not (path := directory / "vocab.json").is_file():
        raise FileNotFoundError(f"{directory} has no GPT-2 tokenizer: neither {TOKENIZER} nor vocab.json exists")
    mismatch = f"{path} does not fit its added tokens, or is damaged"
    try:
        if path.name == TOKENIZER:
            tokenizer = read_json(path)
            check_supported(path, tokenizer)
            if not adds_nothing(tokenizer.get("post_processor") or {"type": "ByteLevel"}):
                raise ValueError(f"{path}: post_processor adds tokens to a text, which is not supported")
            model, entries = tokenizer["model"], tokenizer.get("added_tokens") or []
            vocabulary = check_vocabulary(path, model["vocab"])
            merges: Any = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
            if any(len(pair) != 2 or set(map(type, pair)) != {str} for pair in merges):
                raise damaged(path, "model.merges must be pairs of tokens")
        else:
            check_supported(paths[0], options, path.name)
            vocabulary, merges, entries = read_vocabulary(path), read_merges(directory / "merges.txt"), []
        added = []
        for text, entry in find_added_tokens(vocabulary, entries, options | roles, older).items():
            i = entry["id"]
            if not isinstance(text, str) or type(i) is not int or vocabulary.setdefault(text, i) != i:
                raise ValueError(f"{mismatch}: {repr(text)[:80]} has the ids {vocabulary.get(text)} and {repr(i)[:80]}")
            flags = {flag: bool(entry.get(flag)) for flag in ("special", "lstrip", "rstrip", "single_word")}
            added.append({"text": text, **flags, "normalized": bool(entry.get("normalized", not flags["special"]))})
    except (TypeError, KeyError, AttributeError, RecursionError) as error:  # the JSON has another structure
        raise damaged(path, f"{type(error).__name__}, {error}") from error
    return Tables(vocabulary, merges, added, read_ends(directory, config, set(vocabulary.values())), mismatch)


def adds_nothing(processor: dict) -> bool:
    """Whether a post-processor of tokenizer.json leaves the tokens of a text as they are."""
    if processor["type"] == "Sequence":
        return all(map(adds_nothing, processor["processors"]))
    if processor["type"] == "TemplateProcessing":
        return all(piece.keys() == {"Sequence"} for piece in processor["single"])
    return processor["type"] == "ByteLevel"


def find_added_tokens(vocabulary: dict[str, int], entries: list[dict], options: dict, older: dict) -> dict[str, dict]:
    """The added tokens by text: tokenizer.json's `entries`, those in the `options`, and those of `older` versions."""
    found = {token: {"id": i} for token, i in older.items()} | {entry["content"]: entry for entry in entries}
    for i, entry in options.get("added_tokens_decoder", {}).items():
        entry = {**entry, "id": int(i) if i.isdecimal() and len(i) < 10 else i}
        found[entry["content"]] = found.get(entry["content"], {}) | entry
    roles = [value for name, value in options.items() if name.endswith("_token")]  # such as pad_token: special
    for role in (*roles, *(options.get("additional_special_tokens") or ())):
        entry = role if isinstance(role, dict) else {"content": role}
        token = entry.get("content")
        if isinstance(token, str) and (token in found or token in vocabulary):
            found[token] = {"id": vocabulary.get(token), **entry, **found.get(token, {}), "special": True}
    return found


def read_ends(directory: Path, config: dict, ids: set[int]) -> dict[str, int | None]:
    """Which of `ids` end and start a text. Prints the settings of text generation that are not supported."""
    path = directory / GENERATION
    generation = read_json(path) if path.is_file() else config
    for name, plain in PLAIN_GENERATION.items():
        if (value := generation.get(name)) not in (None, plain):
            print(f"{directory}: {name} = {json.dumps(value)[:80]} is not supported", file=sys.stderr)
    eos, bos = generation.get("eos_token_id"), (config | generation)["bos_token_id"]
    eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
    for name, value in (("eos_token_id", eos), ("bos_token_id", bos)):
        if value is not None and type(value) is not int:
            raise ValueError(f"{directory}: {name} is {json.dumps(value)[:80]}: only one token's id is supported")
    starts = [i for i in (bos, eos) if i in ids]
    return {"eot_id": eos if eos in ids else None} | ({"bos_id": starts[0]} if starts else {})


def weight_files(directory: Path) -> list[Path]:
    """The paths of the weights that transformers would read, [] if there are none. Parts of them may be missing."""
    path = next(filter(Path.exists, map(directory.joinpath, WEIGHT_FILES)), None)
    if path is None or path.suffix != ".json":
        return [path] if path else []
    places = read_json(path).get("weight_map")
    files = list(places.values()) if isinstance(places, dict) else []
    if not files or not all(isinstance(file, str) and re.fullmatch(r"[.-]*\w[\w.-]*", file) for file in files):
        raise damaged(path, "weight_map must name a file beside it for each tensor")
    return [directory / file for file in sorted(set(files))]


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """The tensors in a directory, named without `transformer.`, and without the buffers of the causal mask."""
    paths, tensors = weight_files(directory), {}
    if not paths:
        raise FileNotFoundError(f"{directory} has no weights: neither {WEIGHTS} nor {PYTORCH_WEIGHTS} exists")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: it has a part of the weights; get it again")
        found = read_pytorch(path) if path.suffix == ".bin" else map_tensors(path)[0]
        for name, array in found.items():
            name = name.removeprefix("transformer.")
            if name in tensors:
                raise ValueError(f"{path}: {name} occurs twice")
            if not BUFFER.fullmatch(name):
                tensors[name] = array
    if others := [name for name in tensors if not PARAMETER.match(name)]:  # such as a classifier's
        print(f"{directory}: ignored, as they are not part of a GPT-2: {', '.join(others)[:200]}", file=sys.stderr)
    return {name: array for name, array in tensors.items() if PARAMETER.match(name)}


def read_pytorch(path: Path) -> dict[str, np.ndarray]:
    """The tensors in a PyTorch file, which may hold nothing else. Files of recent versions are memory-mapped."""
    torch = check_pytorch(path)
    try:
        with open_regular(path) as file:
            is_zip, n_bytes = zipfile.is_zipfile(file), path.stat().st_size
            if is_zip and sum(item.file_size for item in zipfile.ZipFile(file).infolist()) > n_bytes:
                raise ValueError("it is compressed, or its parts overlap")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        if odd := [name for name in found if not isinstance(name, str) or not name.isprintable()]:
            raise ValueError(f"{odd[0]!r} is not a valid name of a tensor")
        if sum(tensor.numel() * tensor.element_size() for tensor in found.values()) > 2 * n_bytes:  # wte may be twice
            raise ValueError("its tensors are larger than the file")
        tensors = {name: tensor.detach().contiguous() for name, tensor in found.items()}
        views = {torch.bfloat16: lambda tensor: tensor.view(torch.int16).numpy().view(BFLOAT16)}
        return {name: views.get(tensor.dtype, torch.Tensor.numpy)(tensor) for name, tensor in tensors.items()}
    except OSError:
        raise
    except Exception as error:  # pickle and PyTorch raise any kind; PyTorch's text would advise to trust the file
        reason = str(error)[:200] if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is damaged, or holds other things than tensors: {reason}") from error


def check_pytorch(path: Path) -> Any:
    """The module `torch`; ImportError if there is none that can read `path` safely."""
    try:
        import torch
    except ImportError as error:
        convert = f"python export.py {path.parent} OUT, where PyTorch is installed, makes a model that works without it"
        raise ImportError(f"PyTorch is needed to read {path}: pip install torch; or {convert}") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434
        raise ImportError(f"{path} could run code in PyTorch {torch.__version__}: pip install --upgrade torch")
    return torch


def is_on_hub(name: str) -> bool:
    """Whether `name` looks like owner/model, and is not a directory."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)) and not Path(name).is_dir()


def fetch_model(name: str) -> Path:
    """Download a new version of a model, or its missing files, but not its weights; return its directory."""
    with open_hub(name) as hub:
        directory = Path(hub.snapshot_download(name, allow_patterns=ALL_BUT_WEIGHTS, local_files_only=is_offline()))
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{name} at Hugging Face is not a transformers model: it has no {CONFIG}")
    return directory


def fetch_weights(name: str, directory: Path) -> None:
    """Download the weights of the model in `directory`, which `fetch_model(name)` returned, if any are missing."""
    if (paths := weight_files(directory)) and all(map(Path.is_file, paths)):
        return
    if is_offline():
        raise FileNotFoundError(f"there is no directory {name}; this run is offline, and the cache lacks its weights")
    with open_hub(name) as hub:
        revision = directory.name  # the version that `fetch_model` found
        available = hub.HfApi().list_repo_files(name, revision=revision)
        file = next((file for file in WEIGHT_FILES if file in available), CONFIG)
        if file.startswith(PYTORCH_WEIGHTS):
            check_pytorch(directory / file)
        hub.snapshot_download(name, revision=revision, allow_patterns=[file])
        hub.snapshot_download(name, revision=revision, allow_patterns=[path.name for path in weight_files(directory)])


@contextlib.contextmanager
def open_hub(name: str) -> Iterator[ModuleType]:
    """Yield huggingface_hub, and turn its errors into one line that says why the model `name` was not downloaded."""
    if not (sys.stderr and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # progress bars are for terminals only
    try:
        import huggingface_hub  # imported late: it is optional, and must find that setting

        yield huggingface_hub
    except ImportError as error:
        if error.name != "huggingface_hub":
            raise
        raise ImportError(f"there is no directory {name}; to download it: pip install huggingface_hub") from error
    except Exception as error:  # from huggingface_hub, or from the HTTP library that its version uses
        cause = (isinstance(error, FileNotFoundError) and error.__cause__) or error  # why it is not in the cache
        missing = "it is not complete in the cache, and this run is offline"
        reason = {
            "RepositoryNotFoundError": "it does not exist or is private: give a token that may read it in HF_TOKEN",
            "GatedRepoError": "accept its terms on its page there, and give a token in HF_TOKEN",
            **dict.fromkeys(("LocalEntryNotFoundError", "IncompleteSnapshotError", "OfflineModeIsEnabled"), missing),
        }.get(type(cause).__name__, " ".join(f"{type(cause).__name__}: {cause}".split())[:300])
        raise OSError(f"there is no directory {name}, and Hugging Face did not provide that model: {reason}") from error
