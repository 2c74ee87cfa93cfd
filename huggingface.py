"""Hugging Face's GPT-2 directories, in and out: read as they are, downloaded by their name, and written.

Such a directory has `config.json`, the tokenizer in `tokenizer.json` or in `vocab.json` and `merges.txt`, and the
weights in `model.safetensors` or `pytorch_model.bin`, or in several such files with an index. What `config.json` says
becomes part of the parameters, so that the model needs no branch for it, or the directory is refused.
"""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import regex

from checkpoint import is_offline
from encoder import Encoder
from utils import (
    WEIGHTS,
    check_hparams,
    check_vocabulary,
    format_merges,
    is_on_hub,
    load_encoder_hparams_and_params,
    map_tensors,
    nest_tensors,
    param_shapes,
    read_json,
    read_merges,
    read_vocabulary,
    save_tensors,
    tensors_of,
)

CONFIG, TOKENIZER, PYTORCH_WEIGHTS = "config.json", "tokenizer.json", "pytorch_model.bin"
SMALL_FILES = (
    CONFIG, "generation_config.json", TOKENIZER, "tokenizer_config.json", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
WEIGHT_FILES = (WEIGHTS, f"{WEIGHTS}.index.json", PYTORCH_WEIGHTS, f"{PYTORCH_WEIGHTS}.index.json")
# What transformers' GPT2Config takes for what config.json leaves out, and other names that it knows some of it by.
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
# What may be in config.json, and in the two of the tokenizer, and with which values, of which the first is the default.
ONLY = {
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "add_cross_attention": (False,),
    "is_encoder_decoder": (False,), "pruned_heads": (None, {}), "quantization_config": (None,),
}  # fmt: skip
ONLY_TOKENIZER = {"normalizer": (None,)}
ONLY_BPE = {
    "type": ("BPE",), "dropout": (None, 0, 0.0), "byte_fallback": (False,), "ignore_merges": (False,),
    "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
}  # fmt: skip
ONLY_BYTE_LEVEL = {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)}
ONLY_TOKENIZER_CONFIG = {"add_prefix_space": (False,), "add_bos_token": (False,), "add_eos_token": (False,)}
CLASSES = {"tokenizer_class": ("GPT2Tokenizer", "GPT2TokenizerFast", None)}  # where there is no tokenizer.json
# What would change greedy text where it is not as here; other settings of generation are options of gpt2.py.
PLAIN_GENERATION = {
    "num_beams": (None, 1), "repetition_penalty": (None, 1), "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0), "min_new_tokens": (None, 0), "bad_words_ids": (None,), "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,), "sequence_bias": (None,), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "exponential_decay_length_penalty": (None,),
}  # fmt: skip
FLAGS = ("lstrip", "rstrip", "single_word")  # of an added token
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # constants of transformers' causal mask: not parameters
PARAMETER = re.compile(r"(wte|wpe|h|ln_f|lm_head)\.")
PLAIN_NAME = re.compile(r"[\w.-]+")


def load_model(directory: Path, name: str) -> tuple[Encoder, dict, dict]:
    """The tokenizer, the hyperparameters and the weights in `directory`; if `name` is that of a hub, fetch the latter.

    `params` may have, beside what a GPT-2 has, `eps` in its norms and an `lm_head` [n_vocab, n_embd]. Raises ValueError
    for a model that is not computed here as transformers does, or is damaged; FileNotFoundError, OSError, ImportError.
    """
    config = read_config(directory / CONFIG)
    encoder = read_tokenizer(directory, config)
    hparams = {ours: config[theirs] for ours, theirs in NAMES.items()}
    if config["n_inner"] not in (None, 4 * config["n_embd"]):
        hparams["n_inner"] = config["n_inner"]
    check_vocabulary(directory, encoder, hparams["n_vocab"], "the tokenizer", f"vocab_size in {CONFIG}")
    if is_on_hub(name):
        fetch_weights(name, directory)
    tensors = read_weights(directory)
    shapes, head = param_shapes(hparams), tensors.pop("lm_head.weight", None)
    if head is None and not config["tie_word_embeddings"]:
        raise ValueError(f"{directory}: {CONFIG} says tie_word_embeddings = false, but lm_head.weight is missing")
    if head is not None and not np.array_equal(head, tensors.get("wte.weight")):
        tensors["lm_head.weight"] = head
        shapes["lm_head"] = (hparams["n_vocab"], hparams["n_embd"])
    params = nest_tensors(directory, tensors, shapes, CONFIG)
    fold_attention_scale(params["blocks"], config)
    if config["layer_norm_epsilon"] != DEFAULTS["layer_norm_epsilon"]:
        blocks = params["blocks"]
        for norm in (params["ln_f"], *(block[ln] for block in blocks for ln in ("ln_1", "ln_2"))):
            norm["eps"] = float(config["layer_norm_epsilon"])
    return encoder, hparams, params


def read_config(path: Path) -> dict:
    """`config.json` with its defaults; ValueError, with its name and value, for what cannot be honoured."""
    found = read_json(path)
    with in_file(path):
        refuse_others(found, ONLY)
    config = DEFAULTS | found | {name: found[alias] for name, alias in ALIASES.items() if alias in found}
    check_hparams(path, {name: config[theirs] for name, theirs in NAMES.items()}, NAMES)
    for name, default in DEFAULTS.items():
        if type(default) is bool and type(config[name]) is not bool:
            raise ValueError(f"{path}: {name} must be true or false, not {config[name]!r}")
    n_inner, eps = config["n_inner"], config["layer_norm_epsilon"]
    if n_inner is not None and (type(n_inner) is not int or not 1 <= n_inner <= 10**7):
        raise ValueError(f"{path}: n_inner must be a whole number from 1 to 10,000,000, or null, not {n_inner!r}")
    if type(eps) not in (int, float) or not 0 <= eps < 1e30:
        raise ValueError(f"{path}: layer_norm_epsilon must be a number from 0, not {eps!r}")
    return config


def refuse_others(found: dict, only: dict[str, tuple], part: str = "") -> None:
    """Raise ValueError, with its name and value, for an entry of `found` that has another value than `only` allows."""
    if not isinstance(found, dict):
        raise ValueError(f"{part.rstrip('.')} is {json.dumps(found)[:80]}, which is not supported here")
    for name, values in only.items():
        value = found.get(name, values[0])
        if not any(value == allowed and type(value) is type(allowed) for allowed in values):
            wanted = " or ".join(map(json.dumps, values))
            raise ValueError(f"{part}{name} is {json.dumps(value)[:80]}: only {wanted} is supported here")


def fold_attention_scale(blocks: list[dict], config: dict) -> None:
    """Have the queries scaled so that attention, dividing by sqrt(n_embd/n_head), comes out as `config` asks."""
    for i, block in enumerate(blocks):
        factor = 1.0 if config["scale_attn_weights"] else math.sqrt(config["n_embd"] / config["n_head"])
        factor /= i + 1 if config["scale_attn_by_inverse_layer_idx"] else 1
        if factor != 1:
            scale = np.ones(3 * config["n_embd"], np.float32)
            scale[: config["n_embd"]] = factor
            c_attn = {name: array * scale for name, array in block["attn"]["c_attn"].items()}
            for array in c_attn.values():
                array.flags.writeable = False
            block["attn"]["c_attn"] = c_attn


def read_tokenizer(directory: Path, config: dict) -> Encoder:
    """The tokenizer in a directory; ValueError for one that cuts text otherwise than GPT-2's, or is damaged."""
    options, roles = (read_if_there(directory / file) for file in ("tokenizer_config.json", "special_tokens_map.json"))
    with in_file(directory / "tokenizer_config.json"):
        refuse_others(options, ONLY_TOKENIZER_CONFIG)
    path = directory / TOKENIZER
    if path.is_file():
        found = read_json(path)
        with in_file(path):
            vocabulary, merges, entries = parse_tokenizer(found)
    elif (path := directory / "vocab.json").is_file():
        with in_file(directory / "tokenizer_config.json"):
            refuse_others(options, CLASSES)
        vocabulary, merges, entries = read_vocabulary(path), read_merges(directory / "merges.txt"), []
    else:
        raise FileNotFoundError(f"{directory} has no tokenizer of a GPT-2: neither {TOKENIZER} nor vocab.json is there")
    older = read_if_there(directory / "added_tokens.json")
    with in_file(path, " does not fit its added tokens, or is damaged"):
        added, special, later = {}, {}, []
        for token, entry in added_tokens(vocabulary, entries, options | roles, older).items():
            if vocabulary.setdefault(token, entry["id"]) != entry["id"]:
                raise ValueError(f"{token!r} has the ids {vocabulary[token]} and {entry['id']}")
            (special if entry.get("special") else added)[token] = pattern_of(token, *map(entry.get, FLAGS))
            if entry.get("normalized", not entry.get("special")):
                later.append(token)
        encoder = Encoder(vocabulary, merges, added=added, special=special, later=later)
    set_ends(encoder, directory, config)
    return encoder


def set_ends(encoder: Encoder, directory: Path, config: dict) -> None:
    """Give `encoder` the ids that end and begin a text; say which settings of generation are not followed here."""
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else config
    for name, values in PLAIN_GENERATION.items():
        if (value := generation.get(name)) not in values:
            asked = f"{directory}: generation there has {name} = {json.dumps(value)[:80]}"
            print(f"{asked}, which is not done here", file=sys.stderr)
    eos, bos = generation.get("eos_token_id"), (config | generation)["bos_token_id"]
    if isinstance(eos, list) and len(eos) == 1:
        eos = eos[0]
    for name, value in (("eos_token_id", eos), ("bos_token_id", bos)):
        if value is not None and type(value) is not int:
            raise ValueError(f"{directory}: {name} is {json.dumps(value)[:80]}: only one token's id is supported here")
    encoder.eot_id = eos if eos in encoder.decoder else None
    encoder.bos_id = next((i for i in (bos, eos) if i in encoder.decoder), encoder.bos_id)


def read_if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


@contextlib.contextmanager
def in_file(path: Path, verdict: str = "") -> Iterator[None]:
    """Say of a ValueError in which file the reason is, and raise one for JSON of another structure."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}{verdict}: {error}") from error
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}, {error}; get it again") from error


def parse_tokenizer(found: dict) -> tuple[dict[str, int], list[tuple[str, str]], list[dict]]:
    """The vocabulary, the merges and the added tokens of what the tokenizers library writes as tokenizer.json."""
    refuse_others(found, ONLY_TOKENIZER)
    refuse_others(found.get("pre_tokenizer"), ONLY_BYTE_LEVEL, "pre_tokenizer.")
    refuse_others(found.get("decoder"), {"type": ("ByteLevel",)}, "decoder.")
    refuse_others(found.get("model"), ONLY_BPE, "model.")
    if not adds_nothing(found.get("post_processor") or {"type": "ByteLevel"}):
        raise ValueError("post_processor adds tokens to a text, which is not supported here")
    vocabulary, merges = found["model"]["vocab"], found["model"]["merges"]
    if not isinstance(vocabulary, dict) or not {int}.issuperset(map(type, vocabulary.values())):
        raise ValueError("model.vocab must map tokens to whole numbers")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    if any(len(pair) != 2 or not all(isinstance(token, str) for token in pair) for pair in pairs):
        raise ValueError("model.merges must be pairs of tokens")
    return vocabulary, pairs, found.get("added_tokens") or []


def adds_nothing(processor: dict) -> bool:
    """Whether a post-processor of tokenizer.json leaves the tokens of a text as they are."""
    if processor["type"] == "Sequence":
        return all(map(adds_nothing, processor["processors"]))
    if processor["type"] == "TemplateProcessing":
        return all(piece.keys() == {"Sequence"} for piece in processor["single"])
    return processor["type"] == "ByteLevel"


def added_tokens(vocabulary: dict[str, int], entries: list[dict], options: dict, older: dict) -> dict[str, dict]:
    """The tokens that are found before a text is cut, as tokenizer.json has its `entries`, by their text.

    tokenizer_config.json (`options`) and added_tokens.json (`older`) may have more; a token with a role, such as
    `pad_token`, is special.
    """
    found = {entry["content"]: entry for entry in entries}
    for i, entry in options.get("added_tokens_decoder", {}).items():
        found[entry["content"]] = {**found.get(entry["content"], {}), **entry, "id": int(i)}
    for token, i in older.items():
        found.setdefault(token, {"content": token, "id": i})
    roles = [value for name, value in options.items() if name.endswith("_token")]
    roles += options.get("additional_special_tokens") or []
    for role in roles:
        entry = role if isinstance(role, dict) else {"content": role}
        token = entry.get("content")
        if isinstance(token, str) and token in found.keys() | vocabulary.keys():
            found[token] = {"id": vocabulary.get(token), **entry, **found.get(token, {}), "special": True}
    return found


def pattern_of(token: str, lstrip: bool | None, rstrip: bool | None, single_word: bool | None) -> str:
    """What finds an added token in a text: with the white space before or after it, or only where no letter is."""
    if not token.encode():
        raise ValueError("an added token is empty")
    before = r"(?:(?<!\s)\s++)?" if lstrip else ""  # from the first white space, or many would be tried from each
    word = rf"(?<!\w)({regex.escape(token)})(?!\w)" if single_word else f"({regex.escape(token)})"
    return before + word + (r"\s*+" if rstrip else "")


def weight_files(directory: Path) -> list[Path]:
    """The paths of the weights, those that transformers would take; none if there are none."""
    path = next(filter(Path.is_file, map(directory.joinpath, WEIGHT_FILES)), None)
    if path is None or path.suffix != ".json":
        return [path] if path else []
    places = read_json(path).get("weight_map")
    files = sorted(set(places.values())) if isinstance(places, dict) and all(map(is_plain, places.values())) else []
    if not files:
        raise ValueError(f"{path} is damaged: weight_map must name the file of each tensor; get it again")
    return [directory / file for file in files]


def has_weights(directory: Path) -> bool:
    paths = weight_files(directory)
    return bool(paths) and all(map(Path.is_file, paths))


def is_plain(name: object) -> bool:
    """Whether `name` is that of a file, and not of one elsewhere."""
    return isinstance(name, str) and bool(PLAIN_NAME.fullmatch(name)) and name not in (".", "..")


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """The tensors in a directory, named without `transformer.`, and without the buffers of the causal mask."""
    paths, tensors, others = weight_files(directory), {}, []
    if not paths:
        raise FileNotFoundError(f"{directory} has no weights: neither {WEIGHTS} nor {PYTORCH_WEIGHTS} is there")
    for path in paths:
        if not path.is_file():
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
    if others:  # as those of a classifier
        print(f"{directory}: not used, as no part of a GPT-2: {', '.join(others)[:200]}", file=sys.stderr)
    return tensors


def read_pytorch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file of PyTorch's, which may hold nothing else; of a recent one on the file's own pages."""
    check_pytorch(path)
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if odd := [name for name in found if not isinstance(name, str) or not name.isprintable()]:
            raise ValueError(f"{odd[0]!r} is no name of a tensor")
        return {name: (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy() for name, t in found.items()}
    except Exception as error:  # there is no end to those of pickle and PyTorch
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} is damaged, or holds other things than tensors: {reason}") from error


def check_pytorch(path: Path) -> None:
    """Raise ImportError unless there is a PyTorch that can read `path`."""
    try:
        import torch
    except ImportError as error:
        convert = (
            f"python huggingface.py export {path.parent} OUT, where it is installed, makes a model that needs none"
        )
        raise ImportError(f"PyTorch is needed to read {path}: pip install torch; or {convert}") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434
        raise ImportError(f"{path} could run code in PyTorch {torch.__version__}: pip install --upgrade torch")


def fetch_model(name: str) -> Path:
    """The directory, in huggingface_hub's cache, of a model with all but its weights.

    What is there is asked about, as other programs may have left a part of it, or a new version may have come, and used
    as it is where the network cannot be.
    """
    with hub_errors(name):
        if not (sys.stderr and sys.stderr.isatty()):
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as with all other bars here
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(name, allow_patterns=SMALL_FILES, local_files_only=is_offline()))
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{name} at Hugging Face is no model of transformers: it has no {CONFIG}")
    return directory


def fetch_weights(name: str, directory: Path) -> None:
    """Download the weights of `fetch_model(name)` into its `directory`, if they are not there."""
    if has_weights(directory):
        return
    with hub_errors(name):
        from huggingface_hub import HfApi, snapshot_download

        def fetch(files: Sequence[str]) -> None:  # of the same version, which the directory is named after
            snapshot_download(name, revision=directory.name, allow_patterns=files, local_files_only=is_offline())

        there = [] if is_offline() else HfApi().list_repo_files(name, revision=directory.name)
        file = next((file for file in WEIGHT_FILES if file in there), WEIGHTS)
        if file.startswith(PYTORCH_WEIGHTS):
            check_pytorch(directory / file)
        fetch([file])
        fetch([path.name for path in weight_files(directory)])
    if is_offline() and not has_weights(directory):
        # huggingface_hub says so from 1.22 on
        raise FileNotFoundError(
            f"there is no directory {name}; its weights are not in the cache, and this run is offline"
        )


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Say in a line why the model `name` did not come."""
    problem = f"there is no directory {name}, and no model of that name came from Hugging Face"
    try:
        yield
    except ImportError as error:
        if error.name != "huggingface_hub":
            raise
        raise ImportError(f"there is no directory {name}; to download it: pip install huggingface_hub") from error
    except Exception as error:  # those of huggingface_hub, and of the two libraries for HTTP that it has had
        if isinstance(error, FileNotFoundError):  # it is not in the cache, and this is why it was not downloaded
            error = error.__cause__ or error
        reason = {
            "RepositoryNotFoundError": "there is none, or it is private: give a token that may read it in HF_TOKEN",
            "GatedRepoError": "accept its terms on its page there, and give a token in HF_TOKEN",
            "LocalEntryNotFoundError": "it is not in the cache, and this run is offline",
            "IncompleteSnapshotError": "parts of it are not in the cache, and this run is offline",
            "OfflineModeIsEnabled": "it is not in the cache, and this run is offline",
        }.get(type(error).__name__, " ".join(f"{type(error).__name__}: {error}".split())[:300])
        raise OSError(f"{problem}: {reason}") from error


def export(model_size: str, out: str, models_dir: str = "models") -> None:
    """Write the model MODEL_SIZE to a new directory OUT, for transformers and all that reads its files.

    --models_dir models   where the models are
    """
    directory = Path(os.path.abspath(out))
    if not out:
        raise ValueError("OUT is empty: it is the directory to make")
    if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
        raise FileExistsError(f"{out} is there already: choose another name")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}") from error
    try:
        contents = {
            CONFIG: describe_config(encoder, hparams, params),
            TOKENIZER: describe_tokenizer(encoder),
            "tokenizer_config.json": describe_options(encoder, hparams["n_ctx"]),
            "vocab.json": encoder.encoder,
        }
        for file, value in contents.items():
            (temporary / file).write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")
        (temporary / "merges.txt").write_text(format_merges(encoder), encoding="utf-8", newline="\n")
        tensors = {
            name if name.startswith("lm_head") else f"transformer.{name}": a for name, a in tensors_of(params).items()
        }
        (temporary / WEIGHTS).touch()
        save_tensors(temporary / WEIGHTS, tensors, {"format": "pt"})
        if directory.is_dir():
            directory.rmdir()  # it is empty
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: written; in transformers: AutoModelForCausalLM.from_pretrained({out!r})")


def describe_config(encoder: Encoder, hparams: dict, params: dict) -> dict:
    """The contents of config.json; the scale of attention is in the weights."""
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
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "vocab": encoder.encoder,
        "merges": [" ".join(pair) for pair in encoder.bpe_ranks],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": describe_added_tokens(encoder),
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": model,
    }  # fmt: skip


def describe_added_tokens(encoder: Encoder) -> list[dict]:
    """The added tokens as tokenizer.json has them, in the order of their ids."""
    entries = []
    for token, pattern in (encoder.added | encoder.special).items():
        # The pattern is all that an Encoder knows of the flags: these are the ones that it was made of.
        flags = next(f for f in itertools.product((False, True), repeat=3) if pattern_of(token, *f) == pattern)
        entry = {"id": encoder.encoder[token], "content": token, **dict(zip(FLAGS, flags, strict=True))}
        entries.append({**entry, "normalized": token in encoder.later, "special": token in encoder.special})
    return sorted(entries, key=lambda entry: entry["id"])


def describe_options(encoder: Encoder, n_ctx: int) -> dict:
    """The contents of tokenizer_config.json."""
    # What has a role there becomes special, so that no other token may be named.
    eos, bos = (encoder.decoder.get(i) for i in (encoder.eot_id, encoder.bos_id))
    roles = {"bos_token": bos, "eos_token": eos, "unk_token": eos}
    roles = {role: token if token in encoder.special else None for role, token in roles.items()}
    options = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": n_ctx}
    return options | roles | {"clean_up_tokenization_spaces": False}


if __name__ == "__main__":
    from cli import run

    run({"export": export})
