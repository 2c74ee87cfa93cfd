"""Look inside a model: functions that return what a forward pass computes, and commands that print or draw it."""

if __name__ == "__main__":
    from show.start import run  # imported first, so that Ctrl-C during the slow imports below prints no traceback

from pathlib import Path

import numpy as np
from numpy import ndarray as Array

import gpt2
from encoder import Encoder
from sampling import check_count, check_finite, log_sum_exp, to_probabilities
from show.output import check_out, save_page
from show.pictures import attention_figure, check_picture, logit_lens_figure, save_figure, stage_names
from show.terminal import has_colours, print_surprise, print_table, prompt_ids, token_labels
from utils import load_encoder_hparams_and_params

N_LISTED = 200  # next tokens that a report lists at each position; one more row stands for all others
TEMPERATURES = np.arange(1, 41) / 20  # the positions of a report's temperature slider
MOST_WEIGHTS = 20_000_000  # the most attention weights that a report may have; its file is then 61 MB


def trace(inputs: Array, params: dict, n_head: int) -> dict[str, Array]:
    """The token `ids` [..., n_seq], and everything that one forward pass computes, under the names in gpt2.py.

    residual       [n_layer + 1, ..., n_seq, n_embd], the residual stream before block 0 and after each block
    q, k, v        [n_layer, ..., n_head, n_seq, n_embd/n_head]
    attention      [n_layer, ..., n_head, n_seq, n_seq], the weights: the row of each position adds up to 1
    heads          [n_layer, ..., n_head, n_seq, n_embd/n_head], the values that each head has gathered
    mha, ffn       [n_layer, ..., n_seq, n_embd], what attention and MLP add to the residual stream
    activations    [n_layer, ..., n_seq, 4*n_embd], inside the MLP, after gelu
    hidden_states  [..., n_seq, n_embd], after ln_f: the input for a classifier
    logits         [..., n_seq, n_vocab], exactly those of `gpt2`

    For 124M, this takes 42 MB for 64 tokens and 1.2 GB for 1,024, most of it attention weights. Raises as `gpt2` does.
    """
    x, _ = gpt2.embed(inputs, **params)  # [..., n_seq] -> [..., n_seq, n_embd]
    n_layer, identity = len(params["blocks"]), np.eye(x.shape[-2], dtype=x.dtype)
    found = {"ids": np.asarray(inputs), "residual": np.empty((n_layer + 1, *x.shape), x.dtype)}
    found["residual"][0] = x
    for i, block in enumerate(params["blocks"]):  # `transformer_block` step by step
        attn, mlp = block["attn"], block["mlp"]
        q, k, v = gpt2.split_heads(gpt2.layer_norm(x, **block["ln_1"]), attn["c_attn"], n_head)
        heads = gpt2.causal_attention(q, k, v)  # -> [..., n_head, n_seq, n_embd/n_head]
        # Attention returns a weighted sum of the values. If the values are the identity matrix, the sum is the weights.
        weights = gpt2.causal_attention(q, k, identity)  # -> [..., n_head, n_seq, n_seq]
        mha = gpt2.linear(heads.swapaxes(-2, -3).reshape(x.shape), **attn["c_proj"])
        a = gpt2.gelu(gpt2.linear(gpt2.layer_norm(x + mha, **block["ln_2"]), **mlp["c_fc"]))
        ffn = gpt2.linear(a, **mlp["c_proj"])
        x = found["residual"][i + 1] = x + mha + ffn
        layer = {"q": q, "k": k, "v": v, "attention": weights, "heads": heads, "mha": mha, "activations": a, "ffn": ffn}
        for name, array in layer.items():
            found.setdefault(name, np.empty((n_layer, *array.shape), array.dtype))[i] = array
    found["hidden_states"] = gpt2.layer_norm(x, **params["ln_f"])
    found["logits"] = gpt2.to_logits(found["hidden_states"], **params)
    return found


def rank_of(logits: Array, ids: Array) -> Array:
    """The rank of a token, 1 for the most likely one: logits [..., n_vocab], ids [...] -> [...]."""
    return 1 + (logits > np.take_along_axis(logits, ids[..., None], axis=-1)).sum(axis=-1)


def next_tokens(logits: Array, k: int = 10) -> tuple[Array, Array]:
    """The k most likely tokens in order, and their probabilities: [..., n_vocab] -> two arrays [..., k]."""
    check_count("k", k, least=1)
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    return ids, np.take_along_axis(to_probabilities(logits), ids, axis=-1)


def logit_lens(trace: dict, params: dict) -> dict[str, Array]:
    """What each layer would predict if it were the last (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Returns three arrays [n_layer + 1, ..., n_seq], for the residual stream before block 0 and after each block: `ids`
    and `probabilities` of the most likely tokens, and `ranks`, from 1, of the token that the last layer predicts.
    """
    answers, layers = trace["logits"].argmax(axis=-1), []
    for x in trace["residual"]:
        logits = gpt2.to_logits(gpt2.layer_norm(x, **params["ln_f"]), **params)  # -> [..., n_seq, n_vocab]
        probabilities = np.exp(logits.max(axis=-1) - log_sum_exp(logits))
        layers.append((logits.argmax(axis=-1), probabilities, rank_of(logits, answers)))
    return dict(zip(("ids", "probabilities", "ranks"), map(np.stack, zip(*layers, strict=True)), strict=True))


def surprisal(inputs: Array, logits: Array) -> Array:
    """-log2 of the probability of each token except the first, which nothing predicts, in bits.

    [..., n_seq], [..., n_seq, n_vocab] -> [..., n_seq - 1]. Raises ValueError if ids and logits do not fit.
    """
    ids = gpt2.check_ids(inputs, logits.shape[-1], logits.shape[-2])
    if ids.shape != logits.shape[:-1]:
        raise ValueError(f"the inputs have the shape {ids.shape}, but the logits are for the shape {logits.shape[:-1]}")
    logits = logits[..., :-1, :]  # the logits at a position predict the token at the next one
    return (log_sum_exp(logits) - np.take_along_axis(logits, ids[..., 1:, None], axis=-1)[..., 0]) / np.log(2)


def attribution(trace: dict, params: dict, position: int = -1, token: Array | int | None = None) -> dict[str, Array]:
    """Direct logit attribution: what each part adds to the logit of `token` (None: the predicted one) at a position.

    heads                 [n_layer, ..., n_head], each including the bias of its values
    attn_bias, mlp        [n_layer, ...], the bias of the attention's projection, and the MLP
    embedding, ln_f_bias  [...], the embedding of the token and of its position, and the bias of ln_f

    The parts add up to the logit: with ln_f's scale frozen, it is linear in the residual stream (Elhage et al. 2021,
    "A Mathematical Framework for Transformer Circuits"). Raises ValueError for a position or token that does not exist.
    """
    n_seq, n_vocab = trace["logits"].shape[-2:]
    check_count("position", position, -n_seq, n_seq - 1)
    ids = trace["logits"][..., position, :].argmax(axis=-1) if token is None else np.asarray(token)
    gpt2.check_ids(np.atleast_1d(ids), n_vocab, ids.size)
    x = trace["residual"][-1][..., position, :].astype(np.float64)  # [..., n_embd]
    scale = params["ln_f"]["g"] / np.sqrt(x.var(axis=-1, keepdims=True) + params["ln_f"].get("eps", 1e-5))
    output = params.get("lm_head", params["wte"])[ids]  # [..., n_embd]
    direction = output * scale  # a part that adds y to the residual stream adds y @ direction to the logit
    direction -= direction.mean(axis=-1, keepdims=True)  # ln_f subtracts the mean, so the mean of y adds nothing
    heads = trace["heads"][..., position, :]  # [n_layer, ..., n_head, n_embd/n_head]
    projections = [block["attn"]["c_proj"] for block in params["blocks"]]
    # c_proj maps what the heads gather to the residual stream, so its transpose maps `direction` back to the heads.
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
    n_embd = params["wpe"].shape[1]
    gpt2.check_heads(n_head, n_embd)
    check_count("layer", layer, most=len(params["blocks"]) - 1)
    check_count("head", head, most=n_head - 1)
    blocks = list(params["blocks"])
    attn = blocks[layer]["attn"]
    w = np.array(attn["c_proj"]["w"])  # a writable copy; int8 weights become float32
    w.reshape(n_head, -1, n_embd)[head] = 0  # these rows multiply what the head has gathered
    blocks[layer] = {**blocks[layer], "attn": {**attn, "c_proj": {**attn["c_proj"], "w": w}}}
    return {**params, "blocks": blocks}


def open_prompt(prompt: str, model_size: str, models_dir: str | None) -> tuple[str, Encoder, Array, dict, int]:
    """Open a model. Return its name, its tokenizer, the prompt's token ids, the weights and n_head."""
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    for table in params.keys() & {"wte", "lm_head"}:
        params[table] = params[table][: len(encoder.encoder)]  # the rows beyond are padding and stand for no token
    ids = np.array(prompt_ids(prompt, encoder))
    return Path(model_size).resolve().name, encoder, ids, params, hparams["n_head"]


def show_next(prompt: str, k: int = 10, model_size: str = "124M", models_dir: str | None = None) -> None:
    """Print the most likely next tokens after PROMPT; `-` reads it from standard input.

    --k 10                how many tokens to print
    """
    check_count("k", k, least=1)
    _, encoder, ids, params, n_head = open_prompt(prompt, model_size, models_dir)
    last = gpt2.hidden_states(ids, **params, n_head=n_head)[-1]
    best, probabilities = next_tokens(check_finite(gpt2.to_logits(last, **params)), k)
    bars = ["█" * round(40 * p) for p in probabilities]
    rows = zip(probabilities, bars, best, token_labels(best, encoder), strict=True)
    print_table({"probability": ".2%", "": "s", "id": "d", "token": "s"}, rows)


def show_attention(
    prompt: str, layer: int = 0, head: int | None = None, out: str | None = None, model_size: str = "124M",
    models_dir: str | None = None,
) -> None:  # fmt: skip
    """Draw where the heads of a layer attend; without --out, print it for the last token only.

    --layer 0             which layer, counted from 0
    --head N              draw only this head, counted from 0; by default all heads of the layer
    --out FILE            the picture to write: .png, .svg or .pdf
    """
    check_picture(out)
    name, encoder, ids, params, n_head = open_prompt(prompt, model_size, models_dir)
    check_count("layer", layer, most=len(params["blocks"]) - 1)
    check_count("head", 0 if head is None else head, most=n_head - 1)
    heads = range(n_head) if head is None else [head]
    traced = trace(ids, params, n_head)
    check_finite(traced["logits"])
    weights, labels = traced["attention"][layer, heads], token_labels(ids, encoder)  # [n_maps, n_seq, n_seq]
    if out is not None:
        title = f"{name}, layer {layer}, {'all heads' if head is None else f'head {head}'}"
        save_figure(attention_figure(weights, labels, title, heads), out)
        return
    rows = []
    for n, w in zip(heads, weights[:, -1], strict=True):
        strongest = np.argsort(-w, kind="stable")[:3]
        rows.append((n, "   ".join(f"{labels[j]}@{j} {w[j]:.1%}" for j in strongest)))
    last = f"{labels[-1]}@{len(ids) - 1}"
    print_table({"head": "d", f"where {last}, the last token, attends most (token@position weight)": "s"}, rows)


def show_logit_lens(
    prompt: str, out: str | None = None, model_size: str = "124M", models_dir: str | None = None
) -> None:
    """Draw what each layer would predict; without --out, print it for the last token only.

    --out FILE            the picture to write: .png, .svg or .pdf
    """
    check_picture(out)
    name, encoder, ids, params, n_head = open_prompt(prompt, model_size, models_dir)
    traced = trace(ids, params, n_head)
    check_finite(traced["logits"])
    lens = logit_lens(traced, params)
    predictions = np.reshape(token_labels(lens["ids"].flat, encoder), lens["ids"].shape)
    if out is not None:
        save_figure(logit_lens_figure(lens, token_labels(ids, encoder), predictions, f"logit lens, {name}"), out)
        return
    last = (values[:, -1] for values in (lens["probabilities"], lens["ranks"], predictions))
    rows = zip(stage_names(len(params["blocks"])), *last, strict=True)
    print_table({"": "s", "probability": ".2%", "rank of the answer": "d", "prediction": "s"}, rows)


def show_surprisal(prompt: str, model_size: str = "124M", models_dir: str | None = None) -> None:
    """Print how much each token surprises the model: as colours, or in bits if the terminal has no colours."""
    _, encoder, ids, params, n_head = open_prompt(prompt, model_size, models_dir)
    logits = check_finite(gpt2.gpt2(ids, **params, n_head=n_head))
    bits, labels = surprisal(ids, logits), token_labels(ids, encoder)
    if len(ids) == 1:
        print(f"the text is one token, {labels[0]}: nothing comes before it that could predict it")
        return
    predictions = token_labels(logits[:-1].argmax(axis=-1), encoder)
    rows = [*zip(range(1, len(ids)), bits, labels[1:], predictions, strict=True)]
    if has_colours():
        print_surprise(encoder.decode_stream(ids), bits)
        print("\nthe most surprising tokens:")
        rows = sorted(rows, key=lambda row: -row[1])[:5]
    print_table({"position": "d", "bits": ".2f", "token": "s", "most likely": "s"}, rows)
    print(f"\n{bits.mean():.2f} bits a token on average, perplexity {2 ** bits.mean():.1f}")


def report_data(ids: Array, params: dict, n_head: int, encoder: Encoder) -> dict:
    """The data of a report's page. At each position, it lists the N_LISTED most likely next tokens.

    `rest` is the log of the probability of all other tokens, relative to the most likely one, at each of TEMPERATURES.
    """
    n_layer, seen = len(params["blocks"]), np.tri(len(ids), dtype=bool)
    most = int(np.sqrt(2 * MOST_WEIGHTS / (n_layer * n_head) + 0.25) - 0.5)  # n (n + 1) / 2 weights per head
    if len(ids) > most:
        raise ValueError(f"the text is {len(ids):,} tokens long, but a report of this model holds {most:,}: shorten it")
    traced = trace(ids, params, n_head)
    logits = check_finite(traced["logits"])
    lens = logit_lens(traced, params)
    ordered = np.argsort(-logits, axis=-1, kind="stable")  # all ids, the most likely first
    below_best = np.take_along_axis(logits, ordered, axis=-1) - logits.max(axis=-1, keepdims=True).astype(float)
    rest = [log_sum_exp(below_best[:, N_LISTED:] / t) for t in TEMPERATURES]
    labelled = np.unique([*ordered[:, :N_LISTED].flat, *lens["ids"].flat, *ids])
    return {
        "n_layer": n_layer, "n_head": n_head, "n_vocab": logits.shape[1], "stages": stage_names(n_layer), "ids": ids,
        "labels": dict(zip(labelled.tolist(), token_labels(labelled, encoder), strict=True)),
        "bits": surprisal(ids, logits), "ranks": rank_of(logits[:-1], traced["ids"][1:]), "lens": lens,
        "listed": ordered[:, :N_LISTED], "below_best": below_best[:, :N_LISTED].round(6),
        "temperatures": TEMPERATURES, "rest": np.transpose(rest).round(6),
        "attention": np.rint(10_000 * traced["attention"][..., seen]).astype(int),  # in hundredths of a percent
    }  # fmt: skip


def show_report(prompt: str, out: str = "report.html", model_size: str = "124M", models_dir: str | None = None) -> None:
    """Write a page for the browser with predictions, surprisal, logit lens and attention at each token.

    --out report.html     the file to write; it needs no network and no other file
    """
    check_out(out)
    name, encoder, ids, params, n_head = open_prompt(prompt, model_size, models_dir)
    save_page({"model": name, **report_data(ids, params, n_head, encoder)}, out)


if __name__ == "__main__":
    run({
        "next": show_next, "attention": show_attention, "logit_lens": show_logit_lens, "surprisal": show_surprisal,
        "report": show_report,
    })  # fmt: skip
