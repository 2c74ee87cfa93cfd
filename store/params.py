"""The parameters of a GPT-2: their shapes, their names in files, and how a file's tensors are nested as `params`."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from store.files import digests
from store.tensors import BFLOAT16, Lazy, map_tensors, save_tensors


def param_shapes(hparams: dict[str, int]) -> dict:
    """The shapes of all parameters, nested as the parameters are. The MLP is n_inner wide, by default 4 * n_embd."""
    n_embd = hparams["n_embd"]
    n_inner = hparams.get("n_inner", 4 * n_embd)
    norm = {"g": (n_embd,), "b": (n_embd,)}
    c_attn = {"w": (n_embd, 3 * n_embd), "b": (3 * n_embd,)}
    attn = {"c_attn": c_attn, "c_proj": {"w": (n_embd, n_embd), "b": (n_embd,)}}
    mlp = {"c_fc": {"w": (n_embd, n_inner), "b": (n_inner,)}, "c_proj": {"w": (n_inner, n_embd), "b": (n_embd,)}}
    blocks = [{"ln_1": norm, "attn": attn, "ln_2": norm, "mlp": mlp}] * hparams["n_layer"]
    return {"wte": (hparams["n_vocab"], n_embd), "wpe": (hparams["n_ctx"], n_embd), "blocks": blocks, "ln_f": norm}


def map_leaves(function: Callable, tree: Any, path: tuple = ()) -> Any:
    """A copy of `tree`, nested dicts and lists, in which function(path, leaf) replaces each leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, value, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_leaves(function, value, (*path, i)) for i, value in enumerate(tree)]
    return function(path, tree)


def flatten(tree: dict, name: Callable[[tuple], Any]) -> dict:
    """All leaves of `tree` in one dict. The key of a leaf is name(path)."""
    leaves: dict = {}
    map_leaves(lambda path, leaf: leaves.update({name(path): leaf}), tree)
    return leaves


def tensor_name(path: tuple) -> str:
    """("blocks", 0, "attn", "c_attn", "w") -> `h.0.attn.c_attn.weight`, the name at Hugging Face."""
    parts = {"blocks": "h", "g": "weight", "w": "weight", "b": "bias"}
    return ".".join(parts.get(part, str(part)) for part in path) + (".weight" if len(path) == 1 else "")


def checkpoint_name(path: tuple) -> str:
    """("blocks", 0, "attn", "c_attn", "w") -> `model/h0/attn/c_attn/w`, the name in the released checkpoint."""
    return "/".join(["model", *map(str, path)]).replace("blocks/", "h")


def tensors_of(params: dict) -> dict[str, np.ndarray | Lazy]:
    """The arrays in `params` by Hugging Face's names, without the `eps` of norms."""
    return {name: leaf for name, leaf in flatten(params, tensor_name).items() if not isinstance(leaf, float)}


def count_params(shapes: dict) -> int:
    """The number of parameters; 124,439,808 for 124M."""
    return sum(map(math.prod, flatten(shapes, tensor_name).values()))


def view_as(shapes: dict, vector: np.ndarray) -> dict:
    """Consecutive parts of `vector` as arrays of `shapes`, nested as those are. They share the memory of `vector`."""
    ends = np.cumsum([math.prod(shape) for shape in flatten(shapes, tensor_name).values()])
    parts = iter(np.split(vector, ends))
    return map_leaves(lambda path, shape: next(parts).reshape(shape), shapes)


def check_tensors(source: Path, found: dict[str, tuple], expected: dict[str, tuple], config: str) -> None:
    """Raise ValueError with some of the differences if `source` has other tensors or shapes than `config` implies."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of a GPT-2 of this size" for name in found.keys() - expected.keys()]
    shapes = [(name, list(found[name]), list(expected[name])) for name in expected.keys() & found.keys()]
    problems += [f"{name} has the shape {shape}, not {right}" for name, shape, right in shapes if shape != right]
    if problems:
        more = f", and {len(problems) - 3} more such" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit {config}: {'; '.join(sorted(problems)[:3])}{more}; get both again")


def nest_tensors(source: Path, tensors: dict[str, np.ndarray], shapes: dict, config: str) -> dict:
    """The `tensors` of `source`, read-only, nested as the `shapes` that `config` implies; or ValueError."""
    check_tensors(source, {name: array.shape for name, array in tensors.items()}, flatten(shapes, tensor_name), config)

    def convert(path: tuple, shape: tuple) -> np.ndarray | Lazy:
        array = tensors[name := tensor_name(path)]
        if array.dtype == BFLOAT16:  # 16 bits become float32 when the tensor is used; no number changes
            return Lazy(shape, lambda: (array["bfloat16"].astype(np.uint32) << 16).view(np.float32), array)
        if array.dtype == np.float16:
            return Lazy(shape, lambda: array.astype(np.float32), array)
        if array.dtype != np.float32:
            raise ValueError(f"{source}: {name} has the type {array.dtype}, not float32, float16 or bfloat16")
        array.flags.writeable = False
        return array

    return map_leaves(convert, shapes)


def read_lazy(params: dict) -> dict:
    """`params` with arrays in place of `Lazy` tensors. `np.broadcast_to` makes them read-only, as the others are."""
    return map_leaves(lambda _, leaf: np.broadcast_to(leaf, leaf.shape) if isinstance(leaf, Lazy) else leaf, params)


def map_params(path: Path, shapes: dict) -> dict:
    """Map a safetensors file into `params`, nested as `shapes`; ValueError if it is damaged or does not fit them."""
    return nest_tensors(path, map_tensors(path)[0], shapes, "hparams.json")


def save_params(path: Path, params: dict, beside: Iterable[str]) -> None:
    """Write `params` as a `model.safetensors` with Hugging Face's names, and the digests of the files `beside` it."""
    save_tensors(path, tensors_of(params), {"format": "pt", **digests(path.parent, beside)})
