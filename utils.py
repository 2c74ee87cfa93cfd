"""A model is a directory: find it, complete it, check it, and map its weights into nested dicts of arrays.

It holds `encoder.json`, `vocab.bpe`, `hparams.json` and the weights: OpenAI's TensorFlow checkpoint, or
`model.safetensors` with Hugging Face's tensor names. TensorFlow makes the second of the first, once; from then on the
file is memory-mapped, so that nothing is copied and all processes share the same pages.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from encoder import Encoder

CODE = Path(__file__).parent
RELEASED = ("124M", "355M", "774M", "1558M")
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # GPT2_BASE_URL in the environment names a mirror
TOKENIZER_FILES = ("encoder.json", "vocab.bpe")
CHECKPOINT = "model.ckpt"
CHECKPOINT_INDEX, CHECKPOINT_DATA = f"{CHECKPOINT}.index", f"{CHECKPOINT}.data-00000-of-00001"
CHECKPOINT_FILES = ("checkpoint", CHECKPOINT_INDEX, f"{CHECKPOINT}.meta", CHECKPOINT_DATA)
WEIGHTS, SOURCE = "model.safetensors", "model.source.json"
DTYPES = {"F32": "<f4", "I8": "|i1"}  # safetensors' names of the types that are written here
BLOCK = 2**21  # bytes, of a huge page
OFFLINE = 'The bundled model needs no network: python gpt2.py "ROMEO:" --model_size shakespeare'


def load_encoder_hparams_and_params(model_size: str, models_dir: str = "models") -> tuple[Encoder, dict, dict]:
    """The tokenizer, the hyperparameters and the weights of a model, found as `find_model` does.

    What a released model lacks is downloaded, and its checkpoint converted. `params` is nested as the checkpoint's
    names are: {"wte", "wpe", "ln_f": {"g", "b"}, "blocks": [{"ln_1", "attn", "ln_2", "mlp"}, ...]}; its arrays are
    float32, memory-mapped and read-only. Raises FileNotFoundError for a model or file that is not there, ValueError for
    one that is damaged or does not fit the others, OSError for a failed download, ImportError if TensorFlow is missing.
    """
    directory = find_model(model_size, models_dir, (*TOKENIZER_FILES, "hparams.json"))
    encoder = read_encoder(directory)
    hparams = read_hparams(directory)
    n_tokens, n_vocab = len(encoder.encoder), hparams["n_vocab"]
    if n_tokens > n_vocab:
        raise ValueError(f"{directory}: encoder.json has {n_tokens} tokens, but n_vocab in hparams.json is {n_vocab}")
    shapes = param_shapes(hparams)
    if not (directory / WEIGHTS).is_file():
        if str(model_size) in RELEASED:
            fetch(directory, CHECKPOINT_FILES, n_data_bytes=count_bytes(shapes))
        convert_checkpoint(directory)
    return encoder, hparams, map_params(directory / WEIGHTS, shapes)


def find_model(model_size: str, models_dir: str = "models", files: Sequence[str] = ()) -> Path:
    """The directory of a model; of a released one, also download those of `files` that are missing.

    `model_size` is a name in `models_dir` (relative to the current directory, else to this file's) or the path of an
    existing directory. Raises FileNotFoundError if it is neither, nor a released model.
    """
    name = str(model_size)
    homes = [Path(models_dir), CODE / models_dir]
    places = []
    if Path(name).name == name and name not in ("", ".."):
        places = [home / name for home in homes]
    if name in RELEASED:
        directory = next(filter(Path.is_dir, places), places[0])
        fetch(directory, files)
        return directory
    if name:
        places.append(Path(name))
    for place in places:
        if place.is_dir():
            return place
    here = {path.name for home in homes for path in home.glob("*") if path.is_dir()}
    raise FileNotFoundError(
        f"there is no model {name!r}. Released models, downloaded when first used: {', '.join(RELEASED)}; "
        f"models in {models_dir}: {', '.join(sorted(here)) or 'none'}; or give the path of a model directory"
    )


def fetch(directory: Path, files: Sequence[str], n_data_bytes: int | None = None) -> None:
    """Download those of `files` that a released model's directory lacks; the weights also if their length is wrong."""
    for file in files:
        path, n_bytes = directory / file, n_data_bytes if file == CHECKPOINT_DATA else None
        if not path.is_file() or n_bytes not in (None, path.stat().st_size):
            from download import download  # late: most runs have every file

            url = f"{os.environ.get('GPT2_BASE_URL', BASE_URL).rstrip('/')}/{directory.name}/{file}"
            directory.mkdir(parents=True, exist_ok=True)
            try:
                download(url, path, n_bytes)
            except OSError as error:
                raise OSError(f"{error}. {OFFLINE}") from error


def read_encoder(directory: Path) -> Encoder:
    """The tokenizer of a model directory; ValueError if its two files are damaged or do not fit together."""
    encoder = read_json(directory / "encoder.json")
    lines = read_text(directory / "vocab.bpe").split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [tuple(line.split()) for line in lines if line]
    if odd := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"{directory / 'vocab.bpe'} is damaged: {' '.join(odd)[:40]!r} is not a merge of two tokens")
    if set(map(type, encoder.values())) != {int}:
        raise ValueError(f"{directory / 'encoder.json'} is damaged: it must map tokens to whole numbers")
    try:
        return Encoder(encoder, merges)
    except ValueError as error:
        raise ValueError(f"{directory}: encoder.json and vocab.bpe do not fit together: {error}") from error


def read_hparams(directory: Path) -> dict[str, int]:
    """The hyperparameters of a model directory; ValueError if they describe no GPT-2."""
    path = directory / "hparams.json"
    hparams = read_json(path)
    for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        value = hparams.get(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{path} is damaged: {name} must be a whole number above 0, not {value!r}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(f"{path}: n_embd = {hparams['n_embd']} is not a multiple of n_head = {hparams['n_head']}")
    return hparams


def read_json(path: Path) -> dict:
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}); delete it or get it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object, not {type(value).__name__}")
    return value


def read_text(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: every model directory has one")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not UTF-8 ({error}); delete it or get it again") from error


def param_shapes(hparams: dict[str, int]) -> dict:
    """The shapes of all parameters, nested as the parameters are."""
    n_embd = hparams["n_embd"]

    def norm() -> dict:
        return {"g": (n_embd,), "b": (n_embd,)}

    def dense(n_in: int, n_out: int) -> dict:
        return {"w": (n_in, n_out), "b": (n_out,)}

    block = {
        "ln_1": norm(),
        "attn": {"c_attn": dense(n_embd, 3 * n_embd), "c_proj": dense(n_embd, n_embd)},
        "ln_2": norm(),
        "mlp": {"c_fc": dense(n_embd, 4 * n_embd), "c_proj": dense(4 * n_embd, n_embd)},
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


def checkpoint_name(path: tuple) -> str:
    """("blocks", 0, "attn", "c_attn", "w") -> `model/h0/attn/c_attn/w`, as the released checkpoint names it."""
    return "/".join(["model", *map(str, path)]).replace("blocks/", "h")


def count_bytes(shapes: dict) -> int:
    """The length of all parameters in float32; of 124M's 497,759,232 bytes."""
    return 4 * sum(map(math.prod, flatten(shapes, tensor_name).values()))


def check_tensors(source: Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Raise ValueError, naming them, unless the tensors in `source` have the expected names and shapes."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of a GPT-2 of this size" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has the shape {list(found[name])}, not {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        more = f", and {len(problems) - 3} more such" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit hparams.json: {'; '.join(sorted(problems)[:3])}{more}")


def map_params(path: Path, shapes: dict) -> dict:
    """Map a safetensors file into `params`, nested as `shapes` is: read-only float32 arrays on the file's own pages.

    Raises ValueError if the file is damaged, or a tensor's name, shape or type is not what `shapes` asks for.
    """
    tensors, _ = map_tensors(path)
    for name, array in tensors.items():
        if array.dtype != DTYPES["F32"]:
            raise ValueError(f"{path}: {name} has the type {array.dtype}, not float32")
    check_tensors(path, {name: array.shape for name, array in tensors.items()}, flatten(shapes, tensor_name))
    return map_leaves(lambda path, shape: tensors[tensor_name(path)], shapes)


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file, as read-only arrays on its own pages, and its metadata.

    Raises ValueError if it is damaged or has tensors of a type that is not in DTYPES.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass  # it checks the header, and that the tensors fill the file exactly, but reading with it would copy
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and convert or get it again") from error
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of kernels without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    start = 8 + int.from_bytes(pages[:8], "little")
    header = json.loads(pages[8:start])
    metadata = header.pop("__metadata__", {})

    def view(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has the type {dtype}, not one of {', '.join(DTYPES)}")
        array = np.frombuffer(pages, DTYPES[dtype], math.prod(shape), start + data_offsets[0]).reshape(shape)
        return np.require(array, requirements="A")  # a copy, should a foreign file not be aligned to 4 bytes

    return {name: view(name, **tensor) for name, tensor in header.items()}, metadata


def save_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file of float32 and int8, which appears whole or not at all; OSError if it cannot be written.

    Unlike the library's its data begin on a page, and are written in blocks that Linux can later map as huge pages:
    with both, a token of mapped weights takes 7% less time.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, n_bytes = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        offsets = [n_bytes, n_bytes := n_bytes + array.nbytes]
        header[name] = {"dtype": names[array.dtype.str], "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    parts = [np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)]
    parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in tensors.values()]
    try:
        with replacing(path) as temporary, open(temporary, "wb", buffering=BLOCK) as file:
            for part in parts:
                while part.size:
                    n_room = BLOCK - file.tell() % BLOCK
                    file.write(part[:n_room])
                    part = part[n_room:]
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def save_params(path: Path, params: dict) -> None:
    """Write `params` as `model.safetensors` has them: with Hugging Face's tensor names."""
    save_tensors(path, flatten(params, tensor_name), {"format": "pt"})


def save_model(directory: Path, encoder: Encoder, hparams: dict[str, int], params: dict) -> None:
    """Write a model directory, its weights last: before they are there, the directory has none, and not others."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS).unlink(missing_ok=True)
    merges = ["#version: 0.2", *map(" ".join, encoder.bpe_ranks), ""]
    texts = (json.dumps(encoder.encoder, ensure_ascii=False), "\n".join(merges), json.dumps(hparams, indent=1))
    for file, text in zip((*TOKENIZER_FILES, "hparams.json"), texts, strict=True):
        with replacing(directory / file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    save_params(directory / WEIGHTS, params)


def convert_checkpoint(directory: Path) -> None:
    """Make `model.safetensors` of the TensorFlow checkpoint in a model directory, and keep a record of the source.

    This runs in a child process: TensorFlow's two seconds, its memory and its log lines stay out of this one.
    """
    data, index = directory / CHECKPOINT_DATA, directory / CHECKPOINT_INDEX
    n_bytes = count_bytes(param_shapes(read_hparams(directory)))
    for path in (data, index):
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no weights: neither {WEIGHTS} nor {path.name} is there")
    if data.stat().st_size != n_bytes:
        raise ValueError(f"{data} has {data.stat().st_size:,} bytes, where hparams.json implies {n_bytes:,}")
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(f"TensorFlow is needed once, to convert {data}: pip install tensorflow")
    print(f"{directory}: converting the checkpoint to {WEIGHTS} ...", file=sys.stderr)
    # The index holds the checksums of all tensors, so that its own stands for the whole checkpoint.
    source = {index.name: hashlib.sha256(index.read_bytes()).hexdigest(), "n_bytes": n_bytes}
    with replacing(directory / WEIGHTS) as temporary, replacing(directory / SOURCE) as record:
        record.write_text(json.dumps(source) + "\n", encoding="utf-8")
        command = [sys.executable, __file__, str(directory), str(temporary)]
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if child.returncode:
            reason = child.stdout.strip() or f"status {child.returncode}, {child.stderr.strip()[-200:]}"
            raise ValueError(f"{directory}: the checkpoint could not be converted: {reason}")
    freed = sum(path.stat().st_size for path in map(directory.joinpath, CHECKPOINT_FILES) if path.is_file())
    print(f"{directory}: done; deleting checkpoint, {CHECKPOINT}.* would free {freed / 1e6:,.0f} MB", file=sys.stderr)


def convert(directory: str, target: str) -> None:
    """The child's part: write the checkpoint in `directory` to `target`, having read and checked every tensor."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(os.path.join(directory, CHECKPOINT))
    shapes = param_shapes(read_hparams(Path(directory)))
    found = reader.get_variable_to_shape_map()
    # c_attn, c_fc and c_proj are convolutions of width 1 there, [1, n_in, n_out].
    squeezed = {name: shape[1:] if len(shape) == 3 and shape[0] == 1 else shape for name, shape in found.items()}
    check_tensors(Path(directory, CHECKPOINT), squeezed, flatten(shapes, checkpoint_name))

    def read(path: tuple, shape: tuple) -> np.ndarray:
        name = checkpoint_name(path)
        tensor = reader.get_tensor(name)  # TensorFlow compares its checksum
        if tensor.dtype != np.float32:
            raise ValueError(f"{name} has the type {tensor.dtype}, not float32")
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are infinite or NaN")
        return tensor.reshape(shape)

    save_params(Path(target), map_leaves(read, shapes))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`: it takes that name, complete, when the block ends, or is removed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # of any new file; some libraries write theirs for its owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the bytes do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        convert(*sys.argv[1:])
    except Exception as error:  # TensorFlow has many; standard error is full of its log, so the reason goes here
        print(" ".join(str(error).split()))
        sys.exit(1)
