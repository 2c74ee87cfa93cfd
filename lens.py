"""Look inside a model: what one forward pass computes, and what can be read from it, as plain arrays.

The functions are composed of gpt2.py's own. The command line has a verb for each picture; `show` draws them.
"""

if __name__ == "__main__":
    from show.start import run  # first: Ctrl-C during the imports below ends without a traceback

import base64
import math
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

from encoder import Encoder
from gpt2 import causal_attention, check_ids, embed, gelu, hidden_states, layer_norm, linear, split_heads, to_logits
from sampling import check_count, check_finite, log_sum_exp, to_probabilities
from show.output import check_out, save_page
from show.pictures import attention_figure, check_picture, logit_lens_figure, save_figure, stage_names
from show.terminal import colour_console, print_surprise, print_table, prompt_ids, token_labels
from utils import load_encoder_hparams_and_params

N_LIKELIEST = 200  # next tokens that a report lists for each position; one row stands for all others
TEMPERATURES = np.arange(1, 41) / 20  # a report has the probability of that row for each of these
MOST_WEIGHTS = 20_000_000  # attention weights in a report: its file then has 28 MB


def trace(inputs: Array, params: dict, n_head: int) -> dict[str, Array]:
    """What one forward pass of token ids [..., n_seq] computes, by the names that gpt2.py has for it.

    ids            [..., n_seq]
    residual       [n_layer + 1, ..., n_seq, n_embd], the residual stream: residual[i] enters block i, residual[i + 1]
                   leaves it; between attention and MLP it is residual[i] + mha[i]
    q, k, v        [n_layer, ..., n_head, n_seq, n_embd/n_head]
    attention      [n_layer, ..., n_head, n_seq, n_seq], the weights: a row for each position, which adds up to 1
    heads          [n_layer, ..., n_head, n_seq, n_embd/n_head], the values that each head has gathered
    mha, ffn       [n_layer, ..., n_seq, n_embd], what attention and MLP add to the residual stream
    activations    [n_layer, ..., n_seq, 4*n_embd], of the MLP, after its gelu
    hidden_states  [..., n_seq, n_embd], after ln_f: the input for a classifier
    logits         [..., n_seq, n_vocab], exactly those of `gpt2`

    For 124M that is 42 MB for 64 tokens and 1.2 GB for 1,024, most of it attention weights. Raises what `gpt2` does.
    """
    x, _ = embed(inputs, **params)  # [..., n_seq] -> [..., n_seq, n_embd]
    n_layer = len(params["blocks"])
    residual = np.empty((n_layer + 1, *x.shape), x.dtype)
    residual[0] = x
    found = {"ids": np.asarray(inputs), "residual": residual}
    for i, block in enumerate(params["blocks"]):
        layer = trace_block(residual[i], **block, n_head=n_head)
        residual[i + 1] = residual[i] + layer["mha"] + layer["ffn"]
        for name, array in layer.items():
            found.setdefault(name, np.empty((n_layer, *array.shape), array.dtype))[i] = array
    found["hidden_states"] = layer_norm(residual[-1], **params["ln_f"])
    found["logits"] = to_logits(found["hidden_states"], **params)
    return found


def trace_block(x: Array, mlp: dict, attn: dict, ln_1: dict, ln_2: dict, n_head: int) -> dict[str, Array]:
    """`transformer_block`, taken apart: x [..., n_seq, n_embd] -> what `trace` has of one layer."""
    q, k, v = split_heads(layer_norm(x, **ln_1), attn["c_attn"], n_head)
    heads = causal_attention(q, k, v)  # -> [..., n_head, n_seq, n_embd/n_head]
    mha = linear(heads.swapaxes(-2, -3).reshape(x.shape), **attn["c_proj"])
    # Attention returns a weighted sum of the values. If they are the rows of the identity, that sum is the weights.
    weights = causal_attention(q, k, np.eye(x.shape[-2], dtype=x.dtype))  # -> [..., n_head, n_seq, n_seq]
    activations = gelu(linear(layer_norm(x + mha, **ln_2), **mlp["c_fc"]))  # -> [..., n_seq, 4*n_embd]
    return {
        "q": q, "k": k, "v": v, "attention": weights, "heads": heads, "mha": mha,
        "activations": activations, "ffn": linear(activations, **mlp["c_proj"]),
    }  # fmt: skip


def rank_of(logits: Array, ids: Array) -> Array:
    """The rank of a token among all, 1 for the likeliest: logits [..., n_vocab], ids [...] -> [...]."""
    return 1 + (logits > np.take_along_axis(logits, ids[..., None], axis=-1)).sum(axis=-1)


def next_tokens(logits: Array, k: int = 10) -> tuple[Array, Array]:
    """The k likeliest tokens, the likeliest first, and their probabilities: [..., n_vocab] -> two of [..., k]."""
    check_count("k", k, least=1)
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    return ids, np.take_along_axis(to_probabilities(logits), ids, axis=-1)


def logit_lens(trace: dict, params: dict) -> dict[str, Array]:
    """What each layer would predict if it were the last (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Three arrays [n_layer + 1, ..., n_seq], for the residual stream before block 0 and after each block: `ids`, the
    likeliest tokens; `probabilities`, theirs; `ranks`, from 1, of the token that the last layer finds likeliest.
    """
    answers = trace["logits"].argmax(axis=-1)
    found = {"ids": [], "probabilities": [], "ranks": []}
    for x in trace["residual"]:
        logits = to_logits(layer_norm(x, **params["ln_f"]), **params)  # -> [..., n_seq, n_vocab]
        found["ids"].append(logits.argmax(axis=-1))
        found["probabilities"].append(np.exp(logits.max(axis=-1) - log_sum_exp(logits)))
        found["ranks"].append(rank_of(logits, answers))
    return {name: np.stack(layers) for name, layers in found.items()}


def surprisal(inputs: Array, logits: Array) -> Array:
    """-log2 of the probability of each token but the first, which nothing predicts, in bits.

    [..., n_seq], [..., n_seq, n_vocab] -> [..., n_seq - 1]: element i belongs to the token at position i + 1, which the
    logits of position i predict. Raises ValueError if ids and logits do not fit.
    """
    ids = check_ids(inputs, logits.shape[-1], logits.shape[-2])
    if ids.shape != logits.shape[:-1]:
        raise ValueError(f"the inputs have the shape {ids.shape}, and the logits are of inputs of {logits.shape[:-1]}")
    logits = logits[..., :-1, :]
    return (log_sum_exp(logits) - np.take_along_axis(logits, ids[..., 1:, None], axis=-1)[..., 0]) / math.log(2)


def attribution(trace: dict, params: dict, position: int = -1, token: Array | int | None = None) -> dict[str, Array]:
    """The logit of `token` (else the predicted one) at a position, as a sum of what each part of the model adds to it.

    heads                 [n_layer, ..., n_head], each with the bias of its values
    attn_bias, mlp        [n_layer, ...], the bias of the attention's projection, and the MLP
    embedding, ln_f_bias  [...], the embedding of the token and of its position, and the bias of ln_f

    Direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"): if the scale of
    ln_f is frozen, the logit is linear in the residual stream. ValueError for a position or token that does not exist.
    """
    n_seq, n_vocab = trace["logits"].shape[-2:]
    check_count("position", position, -n_seq, n_seq - 1)
    ids = trace["logits"][..., position, :].argmax(axis=-1) if token is None else np.asarray(token)
    check_ids(np.atleast_1d(ids), n_vocab, ids.size)
    x = trace["residual"][-1][..., position, :].astype(np.float64)  # [..., n_embd]
    scale = params["ln_f"]["g"] / np.sqrt(x.var(axis=-1, keepdims=True) + params["ln_f"].get("eps", 1e-5))
    output = params.get("lm_head", params["wte"])[ids]  # [..., n_embd]
    direction = output * scale  # a part that adds y to the residual stream adds y @ direction to the logit
    direction -= direction.mean(axis=-1, keepdims=True)  # ln_f subtracts the mean, so the mean of y adds nothing
    heads = trace["heads"][..., position, :]  # [n_layer, ..., n_head, n_embd/n_head]
    projections = [block["attn"]["c_proj"] for block in params["blocks"]]
    # c_proj maps what the heads gather into the residual stream, so its transpose maps `direction` back to the heads.
    to_heads = np.stack([direction @ c_proj["w"].T for c_proj in projections])  # -> [n_layer, ..., n_embd]
    return {
        "embedding": np.vecdot(trace["residual"][0][..., position, :], direction),
        "heads": np.vecdot(heads, to_heads.reshape(heads.shape)),
        "attn_bias": np.stack([np.vecdot(c_proj["b"], direction) for c_proj in projections]),
        "mlp": np.vecdot(trace["ffn"][..., position, :], direction),
        "ln_f_bias": np.vecdot(output, params["ln_f"]["b"], dtype=np.float64),
    }


def ablate(params: dict, layer: int, head: int, n_head: int) -> dict:
    """`params` without one head: its rows of that layer's `c_proj` are 0. ValueError if there is no such head."""
    check_count("layer", layer, most=len(params["blocks"]) - 1)
    check_count("head", head, most=n_head - 1)
    n_embd = params["wpe"].shape[1]
    if n_embd % n_head:
        raise ValueError(f"n_head = {n_head} does not divide the model's n_embd = {n_embd}")
    blocks = list(params["blocks"])
    attn = blocks[layer]["attn"]
    w = np.array(attn["c_proj"]["w"])  # a copy that can be written to; int8 weights become float32
    w.reshape(n_head, -1, n_embd)[head] = 0  # these rows take what the head has gathered
    blocks[layer] = {**blocks[layer], "attn": {**attn, "c_proj": {**attn["c_proj"], "w": w}}}
    return {**params, "blocks": blocks}


def open_model(prompt: str, model_size: str, models_dir: str) -> tuple[Encoder, list[int], dict, int]:
    """The tokenizer of a model, the token ids of a prompt, the weights and n_head."""
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    for table in params.keys() & {"wte", "lm_head"}:
        params[table] = params[table][: len(encoder.encoder)]  # rows beyond are padding and stand for no token
    return encoder, prompt_ids(prompt, encoder), params, hparams["n_head"]


def show_next(prompt: str, k: int = 10, model_size: str = "124M", models_dir: str = "models") -> None:
    """Print the likeliest next tokens after PROMPT, `-` for standard input.

    --k 10                how many
    """
    check_count("k", k, least=1)
    encoder, ids, params, n_head = open_model(prompt, model_size, models_dir)
    last = hidden_states(ids, **params, n_head=n_head)[-1]
    likeliest = next_tokens(check_finite(to_logits(last, **params)), k)
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
    """
    check_picture(out)
    encoder, ids, params, n_head = open_model(prompt, model_size, models_dir)
    check_count("layer", layer, most=len(params["blocks"]) - 1)
    check_count("head", 0 if head is None else head, most=n_head - 1)
    heads = range(n_head) if head is None else [head]
    traced = trace(ids, params, n_head)
    check_finite(traced["logits"])
    weights = traced["attention"][layer, heads]  # [n_maps, n_seq, n_seq]
    labels = token_labels(ids, encoder)
    if out is not None:
        title = f"{Path(model_size).resolve().name}, layer {layer}, {'all heads' if head is None else f'head {head}'}"
        save_figure(attention_figure(weights, labels, title, heads), out)
        return
    rows = []
    for n, w in zip(heads, weights[:, -1], strict=True):
        strongest = np.argsort(-w, kind="stable")[:3]
        rows.append((str(n), "   ".join(f"{labels[j]}@{j} {w[j]:.1%}" for j in strongest)))
    last = f"{labels[-1]}@{len(ids) - 1}"
    print_table({"head": "right", f"where {last}, the last token, attends most (token@position weight)": "left"}, rows)


def show_logit_lens(prompt: str, out: str | None = None, model_size: str = "124M", models_dir: str = "models") -> None:
    """Draw what each layer would predict; without --out, print it for the last token.

    --out FILE            the picture to make: .png, .svg or .pdf
    """
    check_picture(out)
    encoder, ids, params, n_head = open_model(prompt, model_size, models_dir)
    traced = trace(ids, params, n_head)
    check_finite(traced["logits"])
    lens = logit_lens(traced, params)
    predictions = np.reshape(token_labels(lens["ids"].flat, encoder), lens["ids"].shape)
    if out is not None:
        title = f"logit lens, {Path(model_size).resolve().name}"
        save_figure(logit_lens_figure(lens, token_labels(ids, encoder), predictions, title), out)
        return
    last = (lens["probabilities"][:, -1], lens["ranks"][:, -1], predictions[:, -1])
    stages = zip(stage_names(len(params["blocks"])), *last, strict=True)
    rows = [(stage, f"{probability:.2%}", str(rank), token) for stage, probability, rank, token in stages]
    print_table({"": "left", "probability": "right", "rank of the answer": "right", "prediction": "left"}, rows)


def show_surprisal(prompt: str, model_size: str = "124M", models_dir: str = "models") -> None:
    """Print how much each token surprises the model: in colours, or without them in bits."""
    encoder, ids, params, n_head = open_model(prompt, model_size, models_dir)
    logits = check_finite(to_logits(hidden_states(ids, **params, n_head=n_head), **params))
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
    """The bytes of `array`, as `dtype`, in base64."""
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


def report_data(ids: list[int], params: dict, n_head: int, encoder: Encoder) -> dict:
    """What the page of a report shows. Arrays are in base64, little-endian, in the order of NumPy.

    Each position has its N_LIKELIEST next tokens, and for all others together the logarithm of their share, relative to
    the likeliest token's, at each of TEMPERATURES. Attention is in hundredths of a percent, as the page shows it.
    """
    n_seq, n_layer = len(ids), len(params["blocks"])
    check_ids(ids, params["wte"].shape[0], params["wpe"].shape[0])
    if n_layer * n_head * n_seq * (n_seq + 1) // 2 > MOST_WEIGHTS:
        most = int(math.sqrt(2 * MOST_WEIGHTS / (n_layer * n_head)))
        raise ValueError(f"the text is {n_seq:,} tokens long, and a report of this model holds {most:,}: shorten it")
    traced = trace(ids, params, n_head)
    logits = check_finite(traced["logits"])
    lens = logit_lens(traced, params)
    ordered = np.argsort(-logits, axis=-1, kind="stable")  # all ids, the likeliest first
    likeliest = ordered[:, :N_LIKELIEST]
    below_best = np.take_along_axis(logits, ordered, axis=-1) - logits.max(axis=-1, keepdims=True)
    rest = [log_sum_exp(below_best[:, N_LIKELIEST:] / np.float32(t)) for t in TEMPERATURES]
    shown = np.unique([*likeliest.flat, *lens["ids"].flat, *ids])
    return {
        "n_layer": n_layer, "n_head": n_head, "n_vocab": logits.shape[1], "stages": stage_names(n_layer),
        "ids": ids, "labels": dict(zip(shown.tolist(), token_labels(shown, encoder), strict=True)),
        "bits": surprisal(ids, logits).tolist(), "ranks": rank_of(logits[:-1], traced["ids"][1:]).tolist(),
        "likeliest": packed(likeliest, "<u4"), "below_best": packed(below_best[:, :N_LIKELIEST], "<f4"),
        "temperatures": TEMPERATURES.tolist(), "rest": packed(np.transpose(rest), "<f4"),
        "lens": {name: values.tolist() for name, values in lens.items()},
        "attention": packed(np.rint(10_000 * traced["attention"][..., np.tri(n_seq, dtype=bool)]), "<u2"),
    }  # fmt: skip


def write_report(prompt: str, out: str = "report.html", model_size: str = "124M", models_dir: str = "models") -> None:
    """Write a page for the browser that shows all of this for each token.

    --out report.html     the file to make; it needs no network and no other file
    """
    check_out(out)
    encoder, ids, params, n_head = open_model(prompt, model_size, models_dir)
    save_page({"model": Path(model_size).resolve().name, **report_data(ids, params, n_head, encoder)}, out)


if __name__ == "__main__":
    run({
        "next": show_next, "attention": show_attention, "logit_lens": show_logit_lens, "surprisal": show_surprisal,
        "report": write_report,
    })  # fmt: skip
