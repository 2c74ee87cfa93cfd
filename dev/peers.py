"""The models that bench.py measures, and the programs that run them: this project, transformers, llama.cpp, tiktoken.

Each library is loaded when it is first used.
"""

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from numpy import ndarray as Array

from encoder import Encoder, read_encoder
from engine.threads import n_blas_threads
from export import export_model
from gpt2 import stream
from optimizer import initialize
from store.models import PROJECT, RELEASED, SMALL_FILES, TOKENIZER_FILES, find_model
from store.params import count_params, param_shapes, tensors_of, view_as
from store.tensors import WEIGHTS
from utils import load_encoder_hparams_and_params, save_model

SHAPES = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}
PEERS = {  # the modules that a peer needs, and the packages that contain them
    "transformers": {"torch": "torch", "transformers": "transformers"},
    "llama_cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    "tiktoken": {"tiktoken": "tiktoken"},
}
PROBE = "import llama_cpp, sys; llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False).eval([0] * 8)"

Engine = Callable[[Array, int], Iterator]  # like gpt2.stream: ids [n_seq] or [n_batch, n_seq], n_tokens -> new ids


@dataclass
class Model:
    """A model, where its weights and its tokenizer come from, and remarks for the report."""

    directory: Path
    weights: str
    tokenizer: str
    encoder: Encoder
    hparams: dict
    params: dict
    remarks: list[str] = field(default_factory=list)

    @property
    def n_weights(self) -> int:
        return count_params(param_shapes(self.hparams))


def open_model(name: str, models_dir: str | None, temporary: Path) -> Model:
    """The model `name`. A released model that is not on disk is not downloaded: its shape gets random weights."""
    directory = tokenizer = find_model(name, models_dir)
    missing = [file for file in (*SMALL_FILES, WEIGHTS) if not (directory / file).is_file()]
    weights = WEIGHTS
    if name in RELEASED and missing:
        weights = f"random, because {directory / WEIGHTS} does not exist"
        if missing[0] in TOKENIZER_FILES:
            tokenizer = PROJECT / "models" / "shakespeare"
        directory = temporary / name
        n_embd, n_head, n_layer = SHAPES[name]
        hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
        shapes = param_shapes(hparams)
        params = view_as(shapes, np.empty(count_params(shapes), np.float32))
        initialize(params, np.random.default_rng(0))
        save_model(directory, read_encoder(tokenizer), hparams, params)
    directory = directory.resolve()
    source = str(directory) if name in RELEASED else name  # opened by name, a Hugging Face model gets its weights
    return Model(directory, weights, str(tokenizer), *load_encoder_hparams_and_params(source, models_dir))


def check_installed(names: Iterable[str]) -> list[str]:
    """The packages that these peers need. Raises ImportError, with what to install, if one is missing."""
    packages = {module: package for name in names for module, package in PEERS[name].items()}
    if missing := [package for module, package in packages.items() if not importlib.util.find_spec(module)]:
        raise ImportError(f"not installed: pip install {' '.join(missing)}, or leave it out of --against")
    return list(packages.values())


def transformers_engine(model: Model, temporary: Path) -> Engine:
    """Hugging Face transformers on PyTorch, with float32 weights."""

    @functools.cache
    def load():
        import torch
        from transformers import GPT2LMHeadModel, logging

        logging.disable_progress_bar()
        torch.set_num_threads(n_blas_threads())
        directory = temporary / "transformers"
        directory.mkdir()
        export_model(model.encoder, model.hparams, model.params, directory)
        return GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()

    def run(ids: Array, n_tokens: int) -> Iterator:
        gpt2 = load()
        import torch

        new, past = torch.from_numpy(np.atleast_2d(ids)), None
        for _ in range(n_tokens):
            with torch.inference_mode():
                output = gpt2(new, past_key_values=past, use_cache=True, logits_to_keep=1)
                new, past = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            yield new[:, 0].tolist() if ids.ndim == 2 else new.item()

    return run


def write_gguf(path: Path, model: Model, kind: str) -> None:
    """Write the weights in llama.cpp's format. `kind` is f32, or q8_0 for int8 matrices."""
    import gguf

    dtype, writer = gguf.GGMLQuantizationType[kind.upper()], gguf.GGUFWriter(path, "gpt2")
    fields = {"block_count": "n_layer", "context_length": "n_ctx", "embedding_length": "n_embd"}
    for key, name in {**fields, "head_count": "n_head", "vocab_size": "n_vocab"}.items():
        getattr(writer, f"add_{key}")(model.hparams[name])
    writer.add_feed_forward_length(model.params["blocks"][0]["mlp"]["c_fc"]["b"].size)
    writer.add_layer_norm_eps(model.params["ln_f"].get("eps", 1e-5))
    writer.add_tokenizer_model("no_vocab")  # llama.cpp gets ids and returns ids
    names = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "h.": "blk."}
    names |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    names |= {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
    for name, array in tensors_of(model.params).items():
        array = np.asarray(array)
        is_matrix = array.ndim == 2 and name != "wpe.weight"
        array = np.ascontiguousarray(array.T) if is_matrix and name not in ("wte.weight", "lm_head.weight") else array
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if is_matrix:
            writer.add_tensor(name, gguf.quants.quantize(array, dtype), raw_dtype=dtype)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_engine(model: Model, temporary: Path, kind: str) -> Engine:
    """llama.cpp, one sequence at a time, with weights of the `kind` that `write_gguf` writes."""

    @functools.cache
    def load():
        import llama_cpp

        path, params = temporary / f"{kind}.gguf", llama_cpp.llama_model_default_params()
        write_gguf(path, model, kind)
        if subprocess.run([sys.executable, "-c", PROBE, str(path)], capture_output=True).returncode:
            # This happens where the processor has AMX and the system does not allow it.
            model.remarks.append(f"llama.cpp crashes with {kind} weights, so it is measured without repacking them")
            params.use_extra_bufts = False
        options = {"n_ctx": model.hparams["n_ctx"], "n_threads": n_blas_threads(), "n_threads_batch": n_blas_threads()}
        with mock.patch("llama_cpp.llama_cpp.llama_model_default_params", lambda: params):  # Llama has no option for it
            return llama_cpp.Llama(str(path), **options, verbose=False)

    def run(ids: Array, n_tokens: int) -> Iterator:
        llama = load()
        import llama_cpp

        llama.reset()
        new = ids.tolist()
        for _ in range(n_tokens):
            llama.eval(new)
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)  # the library's own sampler is slower
            new = [int(np.ctypeslib.as_array(logits, (model.hparams["n_vocab"],)).argmax())]
            yield new[0]

    return run


def engines(model: Model, names: Iterable[str], temporary: Path) -> tuple[dict[str, Engine], dict[str, Engine]]:
    """This project (`here`) and the peers that generate text: first with float32 weights, then with int8 weights."""
    n_head = model.hparams["n_head"]
    float32: dict[str, Engine] = {"here": lambda ids, n_tokens: stream(ids, model.params, n_head, n_tokens)}
    int8: dict[str, Engine] = {}
    if importlib.util.find_spec("numba"):
        from engine.int8 import quantize  # imported late: it needs Numba

        quantized = functools.cache(lambda: quantize(model.params))
        int8["here"] = lambda ids, n_tokens: stream(ids, quantized(), n_head, n_tokens)
    if "transformers" in names:
        float32["transformers"] = transformers_engine(model, temporary)
    if "llama_cpp" in names:
        float32["llama_cpp"] = llama_cpp_engine(model, temporary, "f32")
        if int8 and model.hparams["n_embd"] % 32 == 0:  # q8_0 stores blocks of 32 numbers
            int8["llama_cpp"] = llama_cpp_engine(model, temporary, "q8_0")
    return float32, int8


def tiktoken_encode(encoder: Encoder, word_pattern: str) -> Callable[[str], list[int]]:
    """OpenAI's tiktoken with the tables of `encoder`. `word_pattern` is the pattern of the words in a text."""
    import tiktoken

    special = {text: encoder.encoder[text] for text, token in encoder.added_tokens.items() if token.special}
    plain = encoder.encoder.keys() - encoder.added_tokens.keys()
    ranks = {encoder.token_bytes(encoder.encoder[token]): encoder.encoder[token] for token in plain}
    return tiktoken.Encoding("", pat_str=word_pattern, mergeable_ranks=ranks, special_tokens=special).encode_ordinary
