"""Look inside a model: what one forward pass computes, and what can be read off it, as plain arrays.

First the functions, composed of gpt2.py's own: the model has no hooks and no flags for this. Then the command line,
with a verb for each picture; pictures.py draws them.
"""

import base64
import math
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from encoder import Encoder
from gpt2 import (
    causal_attention,
    check_ids,
    gelu,
    gpt2,
    hidden_states,
    layer_norm,
    linear,
    matmul,
    split_heads,
    to_logits,
)
from pictures import (
    attention_figure,
    check_out,
    check_picture,
    colour_console,
    logit_lens_figure,
    print_surprise,
    print_table,
    save_figure,
    save_page,
    stage_names,
    token_labels,
)
from sampling import check_count, log_sum_exp, to_probabilities
from utils import load_encoder_hparams_and_params

N_LIKELIEST = 200  # tokens of each position in a report; the others are one row
TEMPERATURES = np.arange(1, 41) / 20  # for which a report has the probability of that row
MOST_WEIGHTS = 20_000_000  # of attention in a report, which is a file of 28 MB then


def trace(inputs: Array, params: dict, n_head: int) -> dict[str, Array]:
    """What one forward pass of token ids [..., n_seq] computes, by the names that gpt2.py has for it.

    ids            [..., n_seq]
    residual       [n_layer + 1, ..., n_seq, n_embd], the residual stream: residual[i] enters block i, residual[i + 1]
                   leaves it; between its attention and its MLP it is residual[i] + mha[i]
    q, k, v        [n_layer, ..., n_head, n_seq, n_embd/n_head]
    attention      [n_layer, ..., n_head, n_seq, n_seq], the weights; each position has a row, adding up to 1
    heads          [n_layer, ..., n_head, n_seq, n_embd/n_head], the values that each head has gathered
    mha, ffn       [n_layer, ..., n_seq, n_embd], what attention and MLP add to the residual stream
    activations    [n_layer, ..., n_seq, 4*n_embd], of the MLP, after its gelu
    hidden_states  [..., n_seq, n_embd], after ln_f: what one puts a classifier on
    logits         [..., n_seq, n_vocab], exactly those of `gpt2`

    Of 124M that is 42 MB for 64 tokens and 1.2 GB for 1,024, most of it attention weights. Raises what `gpt2` does:
    ValueError for ids outside the vocabulary, and for more positions than the model has.
    """
    wte, wpe = params["wte"], params["wpe"]
    ids = check_ids(inputs, wte.shape[0], wpe.shape[0])
    x = wte[ids] + wpe[: ids.shape[-1]]  # [..., n_seq] -> [..., n_seq, n_embd]
    n_layer = len(params["blocks"])
    found = {"ids": ids, "residual": np.empty((n_layer + 1, *x.shape), x.dtype)}
    found["residual"][0] = x
    for i, block in enumerate(params["blocks"]):
        layer = trace_block(x, **block, n_head=n_head)
        x = x + layer["mha"] + layer["ffn"]
        found["residual"][i + 1] = x
        for name, array in layer.items():
            found.setdefault(name, np.empty((n_layer, *array.shape), array.dtype))[i] = array
    found["hidden_states"] = layer_norm(x, **params["ln_f"])
    found["logits"] = to_logits(found["hidden_states"], **params)
    return found


def trace_block(x: Array, mlp: dict, attn: dict, ln_1: dict, ln_2: dict, n_head: int) -> dict[str, Array]:
    """`transformer_block`, taken apart: x [..., n_seq, n_embd] -> what `trace` has of one layer."""
    q, k, v = split_heads(layer_norm(x, **ln_1), attn["c_attn"], n_head)
    heads = causal_attention(q, k, v)  # -> [..., n_head, n_seq, n_embd/n_head]
    mha = linear(heads.swapaxes(-2, -3).reshape(x.shape), **attn["c_proj"])
    # Attention answers with a weighted sum of values. Where those are the rows of the identity, it is the weights.
    weights = causal_attention(q, k, np.eye(x.shape[-2], dtype=x.dtype))  # -> [..., n_head, n_seq, n_seq]
    activations = gelu(linear(layer_norm(x + mha, **ln_2), **mlp["c_fc"]))  # -> [..., n_seq, 4*n_embd]
    return {
        "q": q, "k": k, "v": v, "attention": weights, "heads": heads, "mha": mha,
        "activations": activations, "ffn": linear(activations, **mlp["c_proj"]),
    }  # fmt: skip


def rank_of(logits: Array, ids: Array) -> Array:
    """The place of a token among all by their logits, 1 for the likeliest: [..., n_vocab], ids [...] -> [...]."""
    return 1 + (logits > np.take_along_axis(logits, ids[..., None], axis=-1)).sum(axis=-1)


def next_tokens(logits: Array, k: int = 10) -> tuple[Array, Array]:
    """The k likeliest tokens, the likeliest first, and their probabilities: [..., n_vocab] -> two of [..., k]."""
    check_count("k", k, least=1)
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    return ids, np.take_along_axis(to_probabilities(logits), ids, axis=-1)


def logit_lens(trace: dict[str, Array], params: dict) -> dict[str, Array]:
    """What each layer would predict if it were the last (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Three arrays [n_layer + 1, ..., n_seq], of the residual stream before block 0, then after each block: `ids`, the
    likeliest tokens, `probabilities`, theirs, and `ranks`, from 1, of the token that the last layer finds likeliest.
    """
    answers = trace["logits"].argmax(axis=-1)
    ids, probabilities, ranks = [], [], []
    for x in trace["residual"]:
        logits = to_logits(layer_norm(x, **params["ln_f"]), **params)  # -> [..., n_seq, n_vocab]
        ids.append(logits.argmax(axis=-1))
        probabilities.append(np.exp(logits.max(axis=-1) - log_sum_exp(logits)))
        ranks.append(rank_of(logits, answers))
    return {"ids": np.stack(ids), "probabilities": np.stack(probabilities), "ranks": np.stack(ranks)}


def surprisal(inputs: Array, logits: Array) -> Array:
    """-log2 of the probability of each token but the first, in bits.

    [..., n_seq], [..., n_seq, n_vocab] -> [..., n_seq - 1]: element i is of the token at position i + 1, which the
    logits of position i predict. Nothing predicts the first. Raises ValueError where ids and logits do not fit.
    """
    ids = check_ids(inputs, logits.shape[-1], logits.shape[-2])
    if ids.shape != logits.shape[:-1]:
        raise ValueError(f"the inputs have the shape {ids.shape}, and the logits are of inputs of {logits.shape[:-1]}")
    logits = logits[..., :-1, :]
    return (log_sum_exp(logits) - np.take_along_axis(logits, ids[..., 1:, None], axis=-1)[..., 0]) / math.log(2)


def attribution(
    trace: dict[str, Array], params: dict, position: int = -1, token: Array | int | None = None
) -> dict[str, Array]:
    """The logit of `token` (else the predicted one) at a position, as a sum of what each part of the model adds to it.

    embedding  [...], the token's and the position's
    heads      [n_layer, ..., n_head], each with the bias of its values
    attn_bias  [n_layer, ...], of the attention's projection
    mlp        [n_layer, ...]
    ln_f_bias  [...]

    Direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"): with its scale
    frozen at what it is here, ln_f is linear, and so is all from the residual stream to the logit. Raises ValueError
    for a position or token that is not there.
    """
    n_seq, n_vocab = trace["logits"].shape[-2:]
    check_index("position", position, n_seq, first=-n_seq)
    ids = trace["logits"][..., position, :].argmax(axis=-1) if token is None else np.asarray(token)
    check_ids(np.atleast_1d(ids), n_vocab, ids.size)
    x = trace["residual"][-1][..., position, :].astype(np.float64)  # [..., n_embd]
    scale = params["ln_f"]["g"] / np.sqrt(x.var(axis=-1, keepdims=True) + params["ln_f"].get("eps", 1e-5))
    output = params.get("lm_head", params["wte"])[ids]  # [..., n_embd]
    direction = output * scale  # [..., n_embd]
    direction -= direction.mean(axis=-1, keepdims=True)  # so that the mean, which ln_f takes from x, adds nothing

    def part(contribution: Array) -> Array:
        return (contribution * direction).sum(axis=-1)

    heads = trace["heads"][..., position, :]  # [n_layer, ..., n_head, n_embd/n_head]
    n_head = heads.shape[-2]
    # Each head's values among zeros for the others, as c_proj takes them.
    alone = heads[..., None, :] * np.eye(n_head, dtype=heads.dtype)[..., None]
    alone = alone.reshape(*heads.shape[:-1], -1)  # -> [n_layer, ..., n_head, n_embd]
    projections = [block["attn"]["c_proj"] for block in params["blocks"]]
    projected = np.stack([matmul(x, c_proj["w"]) for x, c_proj in zip(alone, projections, strict=True)])
    return {
        "embedding": part(trace["residual"][0][..., position, :]),
        "heads": (projected * direction[..., None, :]).sum(axis=-1),
        "attn_bias": np.stack([part(c_proj["b"]) for c_proj in projections]),
        "mlp": part(trace["ffn"][..., position, :]),
        "ln_f_bias": (output * params["ln_f"]["b"]).sum(axis=-1, dtype=np.float64),
    }


def ablate(params: dict, layer: int, head: int, n_head: int) -> dict:
    """The same model without one head: `params`, of which only that layer's `c_proj` is new, with zeros for the head.

    The weights do not tell n_head, so that it is needed here as everywhere. Raises ValueError for a layer or head that
    does not exist, and for an n_head that no model of this width can have.
    """
    check_index("layer", layer, len(params["blocks"]))
    check_index("head", head, n_head)
    n_embd = params["wpe"].shape[1]
    if n_embd % n_head:
        raise ValueError(f"n_head = {n_head} does not divide the model's n_embd = {n_embd}")
    blocks = list(params["blocks"])
    attn = blocks[layer]["attn"]
    w = np.array(attn["c_proj"]["w"])  # a copy that can be written to; of int8 weights, in float32
    w.reshape(n_head, -1, w.shape[-1])[head] = 0  # its rows take what the heads have gathered, head after head
    blocks[layer] = {**blocks[layer], "attn": {**attn, "c_proj": {**attn["c_proj"], "w": w}}}
    return {**params, "blocks": blocks}


def check_index(name: str, value: int, n: int, first: int = 0) -> None:
    """Raise ValueError, with the range, unless `value` is a whole number from `first` to n - 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not first <= value < n:
        raise ValueError(f"{name} must be from {first} to {n - 1}, not {value!r}")


def name_of(model_size: str) -> str:
    """What pictures call a model: its name, or that of its directory."""
    return Path(model_size).resolve().name


def look(prompt: str, model_size: str, models_dir: str) -> tuple[Encoder, list[int], dict, int]:
    """The tokenizer of a model, the token ids of a prompt, the weights and n_head."""
    from cli import prompt_ids  # late: who only calls the functions needs no command line

    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    for table in params.keys() & {"wte", "lm_head"}:
        params[table] = params[table][: len(encoder.encoder)]  # without padding, which stands for no token
    return encoder, prompt_ids(prompt, encoder), params, hparams["n_head"]


def check_logits(logits: Array) -> Array:
    if not np.isfinite(logits).all():
        raise ValueError("the model's logits are not finite numbers: its weights are damaged, or not a GPT-2's")
    return logits


def show_next(prompt: str, k: int = 10, model_size: str = "124M", models_dir: str = "models") -> None:
    """Print the likeliest next tokens after PROMPT, `-` for standard input.

    --k 10                how many
    --model_size 124M     the model: a released one, a name in models_dir, a directory, or one of Hugging Face
    --models_dir models   where the models are
    """
    check_count("k", k, least=1)
    encoder, ids, params, n_head = look(prompt, model_size, models_dir)
    states = hidden_states(ids, **params, n_head=n_head)
    likeliest = next_tokens(check_logits(to_logits(states[-1:], **params)[0]), k)
    labels = token_labels(likeliest[0], encoder)
    rows = [(f"{p:.2%}", "█" * round(40 * p), str(i), label) for i, p, label in zip(*likeliest, labels, strict=True)]
    print_table({"probability": "right", "": "left", "id": "right", "token": "left"}, rows)


def show_attention(
    prompt: str, layer: int = 0, head: int | None = None, out: str | None = None, model_size: str = "124M",
    models_dir: str = "models",
) -> None:  # fmt: skip
    """Draw where the heads of a layer attend; without --out, print it for the last token.

    --layer 0             which layer, from 0
    --head N              one head, from 0, drawn large; without it, all of the layer
    --out FILE            the picture to make: .png, .svg or .pdf
    --model_size 124M     the model: a released one, a name in models_dir, a directory, or one of Hugging Face
    --models_dir models   where the models are
    """
    if out is not None:
        check_picture(out)
    encoder, ids, params, n_head = look(prompt, model_size, models_dir)
    check_index("layer", layer, len(params["blocks"]))
    if head is not None:
        check_index("head", head, n_head)
    heads = range(n_head) if head is None else [head]
    traced = trace(ids, params, n_head)
    check_logits(traced["logits"])
    weights = traced["attention"][layer, heads]  # [n_maps, n_seq, n_seq]
    labels = token_labels(ids, encoder)
    if out is not None:
        title = f"{name_of(model_size)}, layer {layer}, {'all heads' if head is None else f'head {head}'}"
        save_figure(attention_figure(weights, labels, title, heads), out)
        return
    strongest = np.argsort(-weights[:, -1], axis=-1, kind="stable")[:, :3]
    cells = [[f"{labels[j]}@{j} {w[-1, j]:.1%}" for j in row] for w, row in zip(weights, strongest, strict=True)]
    rows = [(str(n), "   ".join(row)) for n, row in zip(heads, cells, strict=True)]
    last = f"{labels[-1]}@{len(ids) - 1}"
    print_table({"head": "right", f"where {last}, the last token, attends most (token@position weight)": "left"}, rows)


def show_logit_lens(prompt: str, out: str | None = None, model_size: str = "124M", models_dir: str = "models") -> None:
    """Draw what each layer would predict; without --out, print it for the last token.

    --out FILE            the picture to make: .png, .svg or .pdf
    --model_size 124M     the model: a released one, a name in models_dir, a directory, or one of Hugging Face
    --models_dir models   where the models are
    """
    if out is not None:
        check_picture(out)
    encoder, ids, params, n_head = look(prompt, model_size, models_dir)
    traced = trace(ids, params, n_head)
    check_logits(traced["logits"])
    lens = logit_lens(traced, params)
    predictions = np.reshape(token_labels(lens["ids"].flat, encoder), lens["ids"].shape)
    if out is not None:
        title = f"logit lens, {name_of(model_size)}"
        save_figure(logit_lens_figure(lens, token_labels(ids, encoder), predictions, title), out)
        return
    names = stage_names(len(params["blocks"]))
    columns = zip(names, lens["probabilities"][:, -1], lens["ranks"][:, -1], predictions[:, -1], strict=True)
    rows = [(name, f"{probability:.2%}", str(rank), token) for name, probability, rank, token in columns]
    print_table({"": "left", "probability": "right", "rank of the answer": "right", "prediction": "left"}, rows)


def show_surprisal(prompt: str, model_size: str = "124M", models_dir: str = "models") -> None:
    """Print the text, coloured by how much each token surprises the model; or the bits of each.

    --model_size 124M     the model: a released one, a name in models_dir, a directory, or one of Hugging Face
    --models_dir models   where the models are
    """
    encoder, ids, params, n_head = look(prompt, model_size, models_dir)
    logits = check_logits(gpt2(ids, **params, n_head=n_head))
    bits, labels = surprisal(ids, logits), token_labels(ids, encoder)
    if len(ids) == 1:
        print(f"the text is one token, {labels[0]}: nothing comes before it that could predict it")
        return
    shown = range(len(bits))
    if console := colour_console():
        print_surprise(console, encoder.decode_stream(ids), bits)
        shown = np.argsort(-bits, kind="stable")[:5]
        print("\nthe most surprising:")
    expected = token_labels(logits.argmax(axis=-1), encoder)
    rows = [(str(i + 1), f"{bits[i]:.2f}", labels[i + 1], expected[i]) for i in shown]
    print_table({"position": "right", "bits": "right", "token": "left", "the likeliest was": "left"}, rows)
    print(f"\n{bits.mean():.2f} bits a token on average, perplexity {2 ** bits.mean():.1f}")


def packed(array: Array, dtype: str) -> str:
    """The bytes of `array`, as `dtype`, in the letters of base64."""
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


def report_data(ids: list[int], params: dict, n_head: int, encoder: Encoder) -> dict:
    """What the page of a report shows. Arrays are in base64, little-endian, in the order of NumPy.

    Of each position it has the N_LIKELIEST likeliest next tokens, and for the rest of the vocabulary the logarithm of
    its share, relative to the likeliest token's, at each of TEMPERATURES: so what the page computes is exact. Attention
    is in hundredths of a percent, the precision that the page shows, without what a position cannot see.
    """
    n_seq, n_layer = len(ids), len(params["blocks"])
    check_ids(ids, params["wte"].shape[0], params["wpe"].shape[0])
    if n_layer * n_head * n_seq * (n_seq + 1) // 2 > MOST_WEIGHTS:
        most = int(math.sqrt(2 * MOST_WEIGHTS / (n_layer * n_head)))
        raise ValueError(f"the text is {n_seq:,} tokens long, and a report of this model holds {most:,}: shorten it")
    traced = trace(ids, params, n_head)
    logits = check_logits(traced["logits"])
    lens = logit_lens(traced, params)
    ordered, _ = next_tokens(logits, logits.shape[1])  # all ids, the likeliest first
    likeliest = ordered[:, :N_LIKELIEST]
    below_best = np.take_along_axis(logits, ordered, axis=-1) - logits.max(axis=-1, keepdims=True)
    rest = [log_sum_exp(below_best[:, N_LIKELIEST:] / np.float32(t)) for t in TEMPERATURES]
    past = np.tril(np.ones((n_seq, n_seq), bool))
    shown = np.unique([*likeliest.flat, *lens["ids"].flat, *ids])
    return {
        "n_layer": n_layer,
        "n_head": n_head,
        "ids": ids,
        "labels": dict(zip(shown.tolist(), token_labels(shown, encoder), strict=True)),
        "bits": surprisal(ids, logits).tolist(),
        "ranks": rank_of(logits[:-1], traced["ids"][1:]).tolist(),
        "n_vocab": logits.shape[1],
        "likeliest": packed(likeliest, "<u4"),
        "temperatures": TEMPERATURES.tolist(),
        "below_best": packed(below_best[:, :N_LIKELIEST], "<f4"),
        "rest": packed(np.transpose(rest), "<f4"),
        "stages": stage_names(n_layer),
        "lens": {name: values.tolist() for name, values in lens.items()},
        "attention": packed(np.rint(10_000 * traced["attention"][..., past]), "<u2"),
    }


def write_report(prompt: str, out: str = "report.html", model_size: str = "124M", models_dir: str = "models") -> None:
    """Write a page for the browser that shows all of this at each token.

    --out report.html     the file to make; it needs no network and no other file
    --model_size 124M     the model: a released one, a name in models_dir, a directory, or one of Hugging Face
    --models_dir models   where the models are
    """
    check_out(out)
    encoder, ids, params, n_head = look(prompt, model_size, models_dir)
    save_page({"model": name_of(model_size), **report_data(ids, params, n_head, encoder)}, out)


if __name__ == "__main__":
    from cli import run

    run(
        {
            "next": show_next,
            "attention": show_attention,
            "logit_lens": show_logit_lens,
            "surprisal": show_surprisal,
            "report": write_report,
        }
    )
