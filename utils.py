"""A model is a directory: find it, complete it, check it, and map its weights into nested dicts of arrays.

It holds `encoder.json`, `vocab.bpe`, `hparams.json` and the weights: `model.safetensors`, with Hugging Face's tensor
names, or OpenAI's TensorFlow checkpoint, of which `checkpoint.py` makes the former, once. From then on that file is
memory-mapped, so that nothing is copied and all processes share the same pages. Or it is as Hugging Face has them, with
a `config.json`: those are read by `huggingface.py`.
"""

import contextlib
import json
import math
import mmap
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from encoder import Encoder
from files import replacing

CODE = Path(__file__).parent
RELEASED = ("124M", "355M", "774M", "1558M")
TOKENIZER_FILES = ("encoder.json", "vocab.bpe")
WEIGHTS, CHECKPOINT_INDEX = "model.safetensors", "model.ckpt.index"
# Safetensors' names of types. NumPy has no bfloat16: it is two bytes by that name, the upper half of a float32.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": BFLOAT16, "I64": "<i8", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
WRITTEN = {"<f4": "F32", "|i1": "I8"}
BLOCK = 2**21  # bytes, of a huge page
# Numbers beyond these are damage, and could take all memory before anything else tells.
LARGEST = {"n_vocab": 10**7, "n_ctx": 10**7, "n_embd": 10**6, "n_head": 10**6, "n_layer": 10**4}
HUB_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*"  # of a model of Hugging Face
MEND = "delete it, and get it again"


def load_encoder_hparams_and_params(model_size: str, models_dir: str = "models") -> tuple[Encoder, dict, dict]:
    """The tokenizer, the hyperparameters and the weights of a model, found as `find_model` does.

    What a released model lacks is downloaded, and its checkpoint converted. `params` is nested as the checkpoint's
    names are: {"wte", "wpe", "ln_f": {"g", "b"}, "blocks": [{"ln_1", "attn", "ln_2", "mlp"}, ...]}; its arrays are
    float32, read-only, and memory-mapped if the file has them so. Raises FileNotFoundError for a model or file that is
    not there, ValueError for one that is damaged or does not fit the others, OSError for a failed download, ImportError
    if TensorFlow, or what Hugging Face's models need, is missing.
    """
    directory = find_model(model_size, models_dir, (*TOKENIZER_FILES, "hparams.json"))
    if is_huggingface(directory):
        from huggingface import load_model  # late, as `find_weights`: most runs need neither

        return load_model(directory, str(model_size))
    encoder = read_encoder(directory)
    hparams = read_hparams(directory / "hparams.json")
    check_vocabulary(directory, encoder, hparams["n_vocab"], "encoder.json", "n_vocab in hparams.json")
    shapes = param_shapes(hparams)
    weights = directory / WEIGHTS
    if not weights.is_file() or (directory / CHECKPOINT_INDEX).exists():
        from checkpoint import find_weights

        weights = find_weights(directory, count_bytes(shapes), released=str(model_size) in RELEASED)
    return encoder, hparams, map_params(weights, shapes)


def find_model(model_size: str, models_dir: str = "models", files: Sequence[str] = ()) -> Path:
    """The directory of a model; of a released one, also download those of `files` that are missing.

    `model_size` is a name in `models_dir` (relative to the current directory, else to this file's), the path of an
    existing directory, or else the name of a model of Hugging Face, owner/model, of which all but the weights is
    downloaded. Raises FileNotFoundError if it is none of these, nor a released model.
    """
    name = str(model_size)
    homes = [Path(models_dir), CODE / models_dir]
    places = []
    if Path(name).name == name and name not in ("", ".."):
        places = [home / name for home in homes]
    if name in RELEASED:
        directory = next(filter(Path.is_dir, places), places[0])
        if not all((directory / file).is_file() for file in files):
            from checkpoint import fetch

            fetch(directory, files)
        return directory
    if name:
        places.append(Path(name))
    for place in places:
        if place.is_dir():
            return place
    if is_on_hub(name):
        from huggingface import fetch_model

        return fetch_model(name)
    here = {path.name for home in homes for path in home.glob("*") if path.is_dir()}
    raise FileNotFoundError(
        f"there is no model {name!r}. Released models, downloaded when first used: {', '.join(RELEASED)}; "
        f"models in {models_dir}: {', '.join(sorted(here)) or 'none'}; or give the path of a model directory, or the "
        "name of a model of Hugging Face, such as distilbert/distilgpt2"
    )


def is_on_hub(name: str) -> bool:
    """Whether `name` is that of a model of Hugging Face, and not of a directory."""
    return bool(re.fullmatch(HUB_NAME, name)) and not Path(name).is_dir()


def is_huggingface(directory: Path) -> bool:
    """Whether a model directory is as Hugging Face has them."""
    return (directory / "config.json").is_file() and not (directory / "hparams.json").is_file()


def read_encoder(directory: Path) -> Encoder:
    """The tokenizer of a model directory; ValueError if its files are damaged or do not fit together."""
    if is_huggingface(directory):
        from huggingface import CONFIG, read_config, read_tokenizer

        return read_tokenizer(directory, read_config(directory / CONFIG))
    encoder, merges = read_vocabulary(directory / "encoder.json"), read_merges(directory / "vocab.bpe")
    try:
        tokenizer = Encoder(encoder, merges)
    except ValueError as error:
        raise ValueError(
            f"{directory}: encoder.json and vocab.bpe do not fit together: {error}; get both again"
        ) from error
    if len(tokenizer.bpe_ranks) < len(merges):
        raise ValueError(f"{directory / 'vocab.bpe'} is damaged: it has a merge twice; {MEND}")
    return tokenizer


def read_vocabulary(path: Path) -> dict[str, int]:
    encoder = read_json(path)
    if set(map(type, encoder.values())) != {int}:
        raise ValueError(f"{path} is damaged: it must map tokens to whole numbers; {MEND}")
    return encoder


def read_merges(path: Path) -> list[tuple[str, str]]:
    lines = read_text(path).split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [tuple(line.split()) for line in lines if line]
    if (odd := next((merge for merge in merges if len(merge) != 2), None)) is not None:
        raise ValueError(f"{path} is damaged: {' '.join(odd)[:40]!r} is not a merge of two tokens; {MEND}")
    return merges


def read_hparams(path: Path) -> dict[str, int]:
    """The hyperparameters in `hparams.json`; ValueError if they describe no GPT-2."""
    return check_hparams(path, read_json(path))


def check_hparams(path: Path, hparams: dict[str, int], names: dict[str, str] | None = None) -> dict[str, int]:
    """`hparams`, if they describe a GPT-2, else ValueError with the `names` that they have in the file at `path`."""
    for name, most in LARGEST.items():
        value = hparams.get(name)
        if type(value) is not int or not 1 <= value <= most:
            shown = "missing" if value is None else repr(value)[:40]
            name = (names or {}).get(name, name)
            raise ValueError(
                f"{path} is damaged: {name} must be a whole number from 1 to {most:,}, and is {shown}; {MEND}"
            )
    if hparams["n_embd"] % hparams["n_head"]:
        sizes = f"n_embd = {hparams['n_embd']} is not a multiple of n_head = {hparams['n_head']}"
        raise ValueError(f"{path} is damaged: {sizes}; {MEND}")
    return hparams


def read_json(path: Path) -> dict:
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deep; {MEND}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}); {MEND}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object, not {type(value).__name__}; {MEND}")
    return value


def read_text(path: Path) -> str:
    if path.exists() and not path.is_file():  # to read a pipe would wait for its other end
        raise OSError(f"{path} cannot be read: it is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: every model directory needs one") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not UTF-8 ({error}); {MEND}") from error


def check_vocabulary(directory: Path, encoder: Encoder, n_vocab: int, tokenizer: str, setting: str) -> None:
    """Raise ValueError if the `tokenizer` in `directory` has tokens that the embedding, by `setting`, does not."""
    if len(encoder.encoder) > n_vocab:
        sizes = f"{tokenizer} has {len(encoder.encoder)} tokens, but {setting} is {n_vocab}"
        raise ValueError(f"{directory}: {sizes}; get both again")


def param_shapes(hparams: dict[str, int]) -> dict:
    """The shapes of all parameters, nested as the parameters are; the MLP is 4 * n_embd wide, or n_inner."""
    n_embd = hparams["n_embd"]
    n_inner = hparams.get("n_inner", 4 * n_embd)

    def norm() -> dict:
        return {"g": (n_embd,), "b": (n_embd,)}

    def dense(n_in: int, n_out: int) -> dict:
        return {"w": (n_in, n_out), "b": (n_out,)}

    block = {
        "ln_1": norm(),
        "attn": {"c_attn": dense(n_embd, 3 * n_embd), "c_proj": dense(n_embd, n_embd)},
        "ln_2": norm(),
        "mlp": {"c_fc": dense(n_embd, n_inner), "c_proj": dense(n_inner, n_embd)},
    }
    return {
        "wte": (hparams["n_vocab"], n_embd),
        "wpe": (hparams["n_ctx"], n_embd),
        "blocks": [block] * hparams["n_layer"],
        "ln_f": norm(),
    }


def map_leaves(function: Callable, tree: dict | list, path: tuple = ()) -> dict | list:
    """`tree`, of nested dicts and lists, with function(path, leaf) in the place of each leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, value, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_leaves(function, value, (*path, i)) for i, value in enumerate(tree)]
    return function(path, tree)


def flatten(tree: dict | list, name: Callable[[tuple], str]) -> dict:
    """The leaves of `tree` by the `name` of their path."""
    leaves = {}
    map_leaves(lambda path, leaf: leaves.update({name(path): leaf}), tree)
    return leaves


def tensor_name(path: tuple) -> str:
    """("blocks", 0, "attn", "c_attn", "w") -> `h.0.attn.c_attn.weight`, as Hugging Face names it."""
    parts = {"blocks": "h", "g": "weight", "w": "weight", "b": "bias"}
    return ".".join(parts.get(part, str(part)) for part in path) + (".weight" if len(path) == 1 else "")


def count_bytes(shapes: dict) -> int:
    """The length of all parameters in float32; of 124M's 497,759,232 bytes."""
    return 4 * sum(map(math.prod, flatten(shapes, tensor_name).values()))


def tensors_of(params: dict) -> dict[str, np.ndarray]:
    """The arrays in `params`, by Hugging Face's names; an `eps` is no tensor."""
    return {name: leaf for name, leaf in flatten(params, tensor_name).items() if not isinstance(leaf, float)}


def check_tensors(source: Path, found: dict[str, tuple], expected: dict[str, tuple], config: str) -> None:
    """Raise ValueError, naming them, unless the tensors in `source` have the names and shapes that `config` implies."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of a GPT-2 of this size" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has the shape {list(found[name])}, not {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        more = f", and {len(problems) - 3} more such" if len(problems) > 3 else ""
        problem = f"{'; '.join(sorted(problems)[:3])}{more}"
        raise ValueError(f"{source} does not fit {config}: {problem}; get both again")


def map_params(path: Path, shapes: dict) -> dict:
    """Map a safetensors file into `params`, nested as `shapes` is: read-only float32 arrays on the file's own pages.

    Raises ValueError if the file is damaged, or a tensor's name, shape or type is not what `shapes` asks for.
    """
    return nest_tensors(path, map_tensors(path)[0], shapes, "hparams.json")


def nest_tensors(source: Path, tensors: dict[str, np.ndarray], shapes: dict, config: str) -> dict:
    """`tensors`, that were found in `source`, as read-only float32 and nested as `shapes`, which `config` implies."""
    check_tensors(source, {name: array.shape for name, array in tensors.items()}, flatten(shapes, tensor_name), config)

    def find(path: tuple, shape: tuple) -> np.ndarray:
        name = tensor_name(path)
        array = to_float32(tensors[name])
        if array is None:
            raise ValueError(f"{source}: {name} has the type {tensors[name].dtype}, not float32, float16 or bfloat16")
        array.flags.writeable = False
        return array

    return map_leaves(find, shapes)


def to_float32(array: np.ndarray) -> np.ndarray | None:
    """A float32 array as it is, one of float16 or bfloat16 widened, which changes no number; None for other types."""
    if array.dtype == BFLOAT16:
        return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False) if array.dtype in (np.float32, np.float16) else None


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file, as read-only arrays on its own pages, and its metadata.

    Raises ValueError if it is damaged or has tensors of a type that is not in DTYPES.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        if pages[:23] == b"version https://git-lfs":
            raise FileNotFoundError(0, "it is only git's note of the file: git lfs pull")
        with safe_open(path, framework="numpy"):
            pass  # it checks the header, and that the tensors fill the file exactly, but reading with it would copy
        start = 8 + int.from_bytes(pages[:8], "little")
        header = json.loads(pages[8:start], object_pairs_hook=unique)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: view_tensor(pages, start, name, **tensor) for name, tensor in header.items()}
    except (SafetensorError, ValueError, TypeError) as error:  # TypeError: the library takes a list for an object
        reason = repr(str(error))[1:-1]  # in one line, whatever names the file has
        raise ValueError(f"{path} cannot be used ({reason}): delete it, and convert or get it again") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of kernels without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return tensors, metadata


def view_tensor(
    pages: mmap.mmap, start: int, name: str, dtype: str, shape: list[int], data_offsets: list[int], **_: object
) -> np.ndarray:
    """One tensor of a safetensors file whose data begin at `start`; ValueError or TypeError if it cannot be used."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} has the type {dtype}, not one of {', '.join(DTYPES)}")
    if not name.isprintable():
        raise ValueError(f"{name} is no name of a tensor")
    array = np.frombuffer(pages, DTYPES[dtype], math.prod(shape), start + data_offsets[0]).reshape(shape)
    array = np.require(array, requirements="A")  # a copy, should a foreign file not be aligned to 4 bytes
    array.flags.writeable = False
    return array


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError if it has a name twice, of which the library and Python might take different ones."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Fill an empty file, such as `replacing` makes, with float32 and int8 tensors in the safetensors format.

    Unlike the library's its data begin on a page, and are written in blocks that Linux can later map as huge pages:
    with both, a token of mapped weights takes 7% less time.
    """
    header, n_bytes = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        offsets = [n_bytes, n_bytes := n_bytes + array.nbytes]
        header[name] = {"dtype": WRITTEN[array.dtype.str], "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    parts = [np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)]
    parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in tensors.values()]
    with open(path, "rb+", buffering=BLOCK) as file:
        for part in parts:
            while part.size:
                n_room = BLOCK - file.tell() % BLOCK
                file.write(part[:n_room])
                part = part[n_room:]


def save_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """`write_tensors` to a file that appears whole or not at all; OSError, with its name, if it cannot be written."""
    try:
        with replacing(path) as temporary:
            write_tensors(temporary, tensors, metadata)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def save_params(path: Path, params: dict) -> None:
    """Write `params` as `model.safetensors` has them: with Hugging Face's tensor names."""
    save_tensors(path, tensors_of(params), {"format": "pt"})


def format_merges(encoder: Encoder) -> str:
    """The contents of `vocab.bpe`, which `read_merges` reads."""
    return "\n".join(["#version: 0.2", *map(" ".join, encoder.bpe_ranks), ""])


def save_model(directory: Path, encoder: Encoder, hparams: dict[str, int], params: dict) -> None:
    """Write a model directory, its weights last: before they are there, the directory has none, and not others."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS).unlink(missing_ok=True)
    texts = (json.dumps(encoder.encoder, ensure_ascii=False), format_merges(encoder), json.dumps(hparams, indent=1))
    for file, text in zip((*TOKENIZER_FILES, "hparams.json"), texts, strict=True):
        with replacing(directory / file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    save_params(directory / WEIGHTS, params)
