"""The parameters of a GPT-2: their shapes, their names in files, and the nesting of a file's tensors as `params`."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from store.files import digests
from store.tensors import BFLOAT16, Lazy, map_tensors, save_tensors


def param_shapes(hparams: dict[str, int]) -> dict:
    """The shapes of all parameters, nested as the parameters are. The MLP is n_inner wide, without it 4 * n_embd."""
    n_embd = hparams["n_embd"]
    n_inner = hparams.get("n_inner", 4 * n_embd)
    norm = {"g": (n_embd,), "b": (n_embd,)}

    def dense(n_in: int, n_out: int) -> dict:
        return {"w": (n_in, n_out), "b": (n_out,)}

    block = {
        "ln_1": norm,
        "attn": {"c_attn": dense(n_embd, 3 * n_embd), "c_proj": dense(n_embd, n_embd)},
        "ln_2": norm,
        "mlp": {"c_fc": dense(n_embd, n_inner), "c_proj": dense(n_inner, n_embd)},
    }
    tables = {"wte": (hparams["n_vocab"], n_embd), "wpe": (hparams["n_ctx"], n_embd)}
    return {**tables, "blocks": [block] * hparams["n_layer"], "ln_f": norm}


def map_leaves(function: Callable, tree: dict | list, path: tuple = ()) -> dict | list:
    """A copy of `tree`, nested dicts and lists, with function(path, leaf) in the place of each leaf."""
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


def tensors_of(params: dict) -> dict[str, np.ndarray]:
    """The arrays in `params` by Hugging Face's names; not the `eps` of norms."""
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
    """Raise ValueError with some of the differences, unless the tensors of `source` are those that `config` implies."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of a GPT-2 of this size" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if list(found[name]) != list(expected[name]):
            problems.append(f"{name} has the shape {list(found[name])}, not {list(expected[name])}")
    if problems:
        more = f", and {len(problems) - 3} more such" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit {config}: {'; '.join(sorted(problems)[:3])}{more}; get both again")


def nest_tensors(source: Path, tensors: dict[str, np.ndarray], shapes: dict, config: str) -> dict:
    """The `tensors` of `source` as read-only float32, nested as the `shapes` that `config` implies.

    float16 and bfloat16 become `Lazy`: they are widened when they are needed, which changes no number. Raises
    ValueError for another name, shape or type.
    """
    check_tensors(source, {name: array.shape for name, array in tensors.items()}, flatten(shapes, tensor_name), config)

    def find(path: tuple, shape: tuple) -> np.ndarray | Lazy:
        array = tensors[name := tensor_name(path)]
        if array.dtype == BFLOAT16:
            return Lazy(array.shape, lambda: (array["bfloat16"].astype(np.uint32) << 16).view(np.float32), array)
        if array.dtype == np.float16:
            return Lazy(array.shape, lambda: array.astype(np.float32), array)
        if array.dtype != np.float32:
            raise ValueError(f"{source}: {name} has the type {array.dtype}, not float32, float16 or bfloat16")
        array.flags.writeable = False
        return array

    return map_leaves(find, shapes)


def read_lazy(params: dict) -> dict:
    """`params` with read-only arrays in the place of what is `Lazy`."""

    def read(path: tuple, leaf: np.ndarray | Lazy | float) -> np.ndarray | float:
        if isinstance(leaf, Lazy):
            leaf = np.asarray(leaf)
            leaf.flags.writeable = False
        return leaf

    return map_leaves(read, params)


def map_params(path: Path, shapes: dict) -> dict:
    """Map a safetensors file into `params`, nested as `shapes`; ValueError if it is damaged or does not fit them."""
    return nest_tensors(path, map_tensors(path)[0], shapes, "hparams.json")


def save_params(path: Path, params: dict, beside: Iterable[str] = ()) -> None:
    """Write `params` as a `model.safetensors` with Hugging Face's names, and the digests of the files `beside` it."""
    save_tensors(path, tensors_of(params), {"format": "pt", **digests(path.parent, beside)})
