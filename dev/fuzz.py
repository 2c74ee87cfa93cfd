"""Damage the files of a tiny model, guided by code coverage, and check that they are read or refused properly.

    pip install atheris && python dev/fuzz.py    # ends after 200,000 inputs, ten minutes, or one finding
    python dev/fuzz.py -runs=1 FILE              # repeats a finding; libFuzzer documents more options

A file must be refused by a ValueError or OSError of one line that starts with its path, or what is read from it must
work. Anything else is a finding: another error, a crash, or ten seconds or two gigabytes spent on one input.
"""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

try:
    import atheris
except ImportError:
    sys.exit("the fuzzer needs atheris: pip install atheris")

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
with atheris.instrument_imports(include=["encoder", "store"]):
    from encoder import BYTE_DECODER, read_encoder
    from helpers.models import random_params
    from store import huggingface
    from store.params import count_params, flatten, map_params, param_shapes, tensor_name
    from store.tables import check_hparams, read_hparams
    from store.tensors import WEIGHTS, map_tensors, save_tensors
    from store.training import Settings, load_state

HPARAMS = {"n_vocab": 3, "n_ctx": 1, "n_embd": 2, "n_head": 1, "n_layer": 1}
BYTES = json.dumps({character: i for i, character in enumerate(BYTE_DECODER)})[:-1].encode()  # starts encoder.json
ALL_BYTES = b'"BYTES":0'  # stands for all of BYTES in the vocabulary of an input
TEXT = "Hëllo, it's 2 o'clock \U0001f44b\0\r\n\t <|endoftext|>\u2028" + "".join(map(chr, range(256)))
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[^\s",:{}\[\]]+|\s|.', re.DOTALL)  # a token of JSON
CONFIG = {
    "model_type": "gpt2", "vocab_size": 3, "n_positions": 1, "n_embd": 2, "n_head": 1, "n_layer": 1, "n_inner": None,
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "activation_function": "gelu_new", "tie_word_embeddings": True, "bos_token_id": 258, "eos_token_id": 258,
}  # fmt: skip
HUGGINGFACE_FILES = {b"5": "config.json", b"6": "tokenizer.json", b"7": f"{WEIGHTS}.index.json"}
HUGGINGFACE = {
    "config.json": json.dumps(CONFIG).encode(), "vocab.json": BYTES + b',"ll":256,"<|endoftext|>":257}',
    "merges.txt": b"l l\n", "part.safetensors": save(flatten(random_params(HPARAMS), tensor_name)),
}  # fmt: skip
ODD = rb"""null true NaN -Infinity 1e400 -1 -0 0.5 0 4 255 4611686018427387904 9223372036854775808 18446744073709551615
"" "\ud800" "<\ud800>" "\n" "\u001b" "a" "F32" "I8" "n_ctx" "__metadata__" {} [] {"F32":null} ["F32",[6],[0,24]]
""".split()
ODD += [b" ", b"\n", b",", b":", "\ufeff".encode(), "\u2028".encode(), b"9" * 5000, b"1," * 70, b"[" * 2000]


def undamaged() -> list[bytes]:
    """The first inputs: a digit that says which file it is, its JSON, and for some a zero byte and more bytes."""
    tables = b'1,"ll":256,"ell":257,"<|endoftext|>":258}\0#version: 0.2\nl l\ne ll\n'
    mixed = b"""3{"__metadata__":{"a":"b"},"x":{"dtype":"I8","shape":[1,3],"data_offsets":[0,3]},
        "y":{"dtype":"F32","shape":[],"data_offsets":[3,7]}}\0weights"""
    weights = save(flatten(random_params(HPARAMS), tensor_name))
    start = 8 + int.from_bytes(weights[:8], "little")
    gpt2 = b"3" + weights[8:start] + b"\0" + weights[start:]
    record = {
        "text": "0" * 64, "step": 2, "seconds": 1.5, "best_step": 1, "best_loss": 4.5, "saved_step": 2,
        "tables": {"hparams.json": "0" * 64}, "rows": [[1, None, 4.5, 1e-3, None]], "losses": [4.25],
        "settings": {**dataclasses.asdict(Settings()), **HPARAMS},
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    vocab = {"BYTES": 0, "ll": 256, "ell": 257, "<|endoftext|>": 258, "<a>": 259}
    flags = {"special": False, "lstrip": True, "rstrip": False, "single_word": False, "normalized": True}
    tokenizer = {
        "added_tokens": [{"id": 258, "content": "<|endoftext|>"}, {"id": 259, "content": "<a>", **flags}],
        "normalizer": None, "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]},
        "model": {"type": "BPE", "dropout": None, "vocab": vocab, "merges": ["l l", ["e", "ll"]]},
    }  # fmt: skip
    files = dict.fromkeys(flatten(random_params(HPARAMS), tensor_name), "part.safetensors")
    objects = {b"0": HPARAMS, b"4": record, b"5": CONFIG, b"6": tokenizer, b"7": {"metadata": {}, "weight_map": files}}
    whole = [kind + json.dumps(value, separators=(",", ":")).encode() for kind, value in objects.items()]
    return [*whole, tables, b"2" + weights, mixed, gpt2]


INPUTS = undamaged()


def check(directory: Path, data: bytes) -> None:
    """Write the file that an input describes, and read it."""
    kind, (text, _, rest) = data[:1], data[1:].partition(b"\0")
    try:
        if kind == b"0":
            (directory / "hparams.json").write_bytes(text)
            check_sizes(read_hparams(directory / "hparams.json"))
        elif kind == b"1":
            (directory / "encoder.json").write_bytes(BYTES + text)
            (directory / "vocab.bpe").write_bytes(rest)
            check_tables(directory)
        elif kind == b"4":
            check_state(directory / "state", text.decode("utf-8", "replace"))
        elif kind in (b"5", b"6", b"7"):
            check_huggingface(directory / "huggingface", HUGGINGFACE_FILES[kind], text)
        else:  # 2 is a whole file, so that the length of its header is damaged too, and 3 is a header and its data
            whole = data[1:] if kind == b"2" else len(text).to_bytes(8, "little") + text + rest
            (directory / WEIGHTS).write_bytes(whole)
            check_weights(directory / WEIGHTS)
    except (ValueError, OSError) as error:
        if not (str(error).startswith(str(directory)) and str(error).isprintable()):
            raise


def check_sizes(hparams: dict) -> None:
    hparams["n_layer"] = min(hparams["n_layer"], 100)  # 10,000 layers are allowed, but take half a second
    assert 0 < count_params(param_shapes(hparams)) < 2**63


def check_tables(directory: Path) -> None:
    tokenizer = read_encoder(directory)
    assert all(len(pair) == 2 for pair in tokenizer.bpe_ranks)
    text = TEXT + tokenizer.decode(range(len(tokenizer.encoder)))
    loses_space = any(token.lstrip or token.rstrip for token in tokenizer.added_tokens.values())
    for allow_special in (False, True):
        ids = tokenizer.encode(text, allow_special)
        decoded = tokenizer.decode(ids)
        assert decoded == "".join(tokenizer.decode_stream(ids))
        assert decoded == text or loses_space


def check_state(path: Path, record: str) -> None:
    """Check that a training with this record is refused, or consistent."""
    vectors = {name: np.zeros(count_params(param_shapes(HPARAMS)), np.float32) for name in ("weights", "m", "v")}
    save_tensors(path, vectors, {"record": record})
    training = load_state(path)
    check_hparams(path, training.settings.hparams)
    assert training.vectors["m"].size == count_params(param_shapes(training.settings.hparams))
    assert training.step >= training.best_step >= 0
    assert all(len(row) == 5 for row in training.rows)
    assert json.loads(json.dumps(dataclasses.asdict(training.settings)))


def check_huggingface(directory: Path, damaged: str, text: bytes) -> None:
    """Check a model in Hugging Face's layout, in which the file `damaged` has this text."""
    directory.mkdir(exist_ok=True)
    for file, content in HUGGINGFACE.items():
        (directory / file).write_bytes(content)
    (directory / damaged).write_bytes(text.replace(ALL_BYTES, BYTES[1:]))
    try:
        hparams = huggingface.load_hparams(directory)
        check_sizes(dict(hparams))
        check_tables(directory)
        if hparams == {**HPARAMS, "n_vocab": hparams["n_vocab"]}:
            params = huggingface.load_params(directory, hparams)
            assert flatten(params, tensor_name).keys() >= flatten(random_params(HPARAMS), tensor_name).keys()
    finally:
        (directory / damaged).unlink()


def check_weights(path: Path) -> None:
    tensors, metadata = map_tensors(path)
    assert all(isinstance(text, str) for item in metadata.items() for text in item)
    expected = load_file(path)  # the library makes copies
    assert tensors.keys() == expected.keys()
    for name, array in tensors.items():
        assert not array.flags.writeable
        assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype)
        assert array.tobytes() == expected[name].tobytes()
    shapes = param_shapes(HPARAMS)
    arrays, wanted = (flatten(tree, tensor_name) for tree in (map_params(path, shapes), shapes))
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {n: (s, "<f4") for n, s in wanted.items()}


def end_of_value(tokens: list[bytes], start: int) -> int:
    """The end of the JSON value that starts at `start`: after its closing bracket, or after one token."""
    depth = 0
    for i, token in enumerate(tokens[start:], start + 1):
        depth += (token in b"{[") - (token in b"}]")
        if depth <= 0:
            return i
    return len(tokens)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Make another input: change bytes, replace values, or remove or repeat members of lists and objects."""
    draw = random.Random(seed)
    data = draw.choice((data, draw.choice(INPUTS)))  # otherwise most inputs would be damaged in several places
    tokens = TOKEN.findall(data[1:])
    if draw.random() < 0.3 or not tokens:
        return atheris.Mutate(data, max_size)
    for _ in range(draw.choice((1, 1, 2))):
        starts = [i for i, token in enumerate(tokens) if token not in b",:}]"] or [0]
        i, k = draw.choice(starts), draw.choice(starts)
        j = end_of_value(tokens, i)
        if draw.random() < 0.6:
            tokens[i:j] = draw.choice(([draw.choice(ODD)], tokens[k : end_of_value(tokens, k)]))
        else:
            j = end_of_value(tokens, j + 1) if tokens[j : j + 1] == [b":"] else j  # a name with its value
            tokens[i : j + 1] = draw.choice(([], 2 * tokens[i : j + 1]))  # including the comma
    return (data[:1] + b"".join(tokens))[:max_size]


def fuzz(directory: Path, options: list[str]) -> None:
    paths = [directory / str(i) for i in range(len(INPUTS))]
    for path, data in zip(paths, INPUTS, strict=True):
        path.write_bytes(data)
    limits = ["-runs=200000", "-max_total_time=600", "-timeout=10", "-rss_limit_mb=2048", "-max_len=16384"]
    places = [f"-seed_inputs={','.join(map(str, paths))}", f"-artifact_prefix={tempfile.gettempdir()}/fuzz-"]
    arguments = [sys.argv[0], *limits, *places, "-cross_over=0", "-print_final_stats=1", *options]
    atheris.Setup(arguments, lambda data: check(directory, data), custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        fuzz(Path(sys.argv[2]), sys.argv[3:])
    else:  # libFuzzer exits without cleaning up, so this process removes the files
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
            status = subprocess.call([sys.executable, __file__, "--in", directory, *sys.argv[1:]])
        sys.exit(status)
