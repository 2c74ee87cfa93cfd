"""lens.py: its numbers against gpt2.py, PyTorch and plain definitions, and its command line as a user types it."""

import math
import os
import re

import numpy as np
import pytest

import lens
from gpt2 import generate, gpt2, hidden_states, transformer_block
from helpers import TINY, as_any_user, random_params, run, write_model
from lens import ablate, attribution, logit_lens, next_tokens, report_data, surprisal, trace
from make_golden import TRACED, golden, inputs_of, reference_trace
from pictures import token_labels
from sampling import to_probabilities

N_HEAD, N_VOCAB = TINY["n_head"], TINY["n_vocab"]
LAYERED = {"residual", "q", "k", "v", "attention", "heads", "mha", "activations", "ffn"}


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, N_VOCAB, 20)


@pytest.fixture(scope="module")
def traced(tiny_params, ids):
    return trace(ids, tiny_params, N_HEAD)


@pytest.fixture(scope="module")
def lens_py(tiny_model):
    """Run lens.py on the tiny model."""

    def call(*arguments, **options):
        return run("lens.py", *arguments, f"--model_size={tiny_model}", **options)

    return call


def logit_of(parts):
    return sum(np.sum(part) for part in parts.values())


# The trace


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (63,), (64,), (65,), (130,), (256,), (3, 1), (2, 70), (2, 2, 4)])
def test_a_trace_has_exactly_the_logits_and_hidden_states_of_the_model(shakespeare, shape):
    _, hparams, params = shakespeare
    ids = np.random.default_rng(len(shape)).integers(0, hparams["n_vocab"], shape)
    traced = trace(ids, params, hparams["n_head"])
    np.testing.assert_array_equal(traced["logits"], gpt2(ids, **params, n_head=hparams["n_head"]))
    np.testing.assert_array_equal(traced["hidden_states"], hidden_states(ids, **params, n_head=hparams["n_head"]))


def test_a_trace_follows_the_residual_stream_from_block_to_block(traced, tiny_params, ids):
    residual = traced["residual"]
    np.testing.assert_array_equal(residual[0], tiny_params["wte"][ids] + tiny_params["wpe"][: len(ids)])
    for i, block in enumerate(tiny_params["blocks"]):
        np.testing.assert_array_equal(residual[i + 1], residual[i] + traced["mha"][i] + traced["ffn"][i])
        np.testing.assert_array_equal(residual[i + 1], transformer_block(residual[i], **block, n_head=N_HEAD))


@pytest.mark.parametrize("n_seq", [1, 5, 130])
def test_the_attention_weights_are_those_that_were_used(shakespeare, n_seq):
    _, hparams, params = shakespeare
    traced = trace(np.arange(n_seq), params, hparams["n_head"])
    weights, d = traced["attention"], hparams["n_embd"] // hparams["n_head"]
    scores = traced["q"].astype(float) @ traced["k"].swapaxes(-1, -2) / math.sqrt(d)
    exp = np.tril(np.exp(scores - scores.max(axis=-1, keepdims=True)))
    np.testing.assert_allclose(weights, exp / exp.sum(axis=-1, keepdims=True), atol=1e-5)
    assert (weights[..., ~np.tri(n_seq, dtype=bool)] == 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(weights @ traced["v"], traced["heads"], atol=1e-5)


def test_the_shapes_of_a_trace_are_those_that_are_promised(tiny_params):
    n_embd, n_layer = TINY["n_embd"], TINY["n_layer"]
    d = n_embd // N_HEAD
    for batch in ((), (3,)):
        found = {name: array.shape for name, array in trace(np.ones((*batch, 7), int), tiny_params, N_HEAD).items()}
        assert found == {
            "ids": (*batch, 7),
            "residual": (n_layer + 1, *batch, 7, n_embd),
            "q": (n_layer, *batch, N_HEAD, 7, d),
            "k": (n_layer, *batch, N_HEAD, 7, d),
            "v": (n_layer, *batch, N_HEAD, 7, d),
            "attention": (n_layer, *batch, N_HEAD, 7, 7),
            "heads": (n_layer, *batch, N_HEAD, 7, d),
            "mha": (n_layer, *batch, 7, n_embd),
            "activations": (n_layer, *batch, 7, 4 * n_embd),
            "ffn": (n_layer, *batch, 7, n_embd),
            "hidden_states": (*batch, 7, n_embd),
            "logits": (*batch, 7, N_VOCAB),
        }


def test_a_trace_stays_float32(traced):
    assert {array.dtype for name, array in traced.items() if name != "ids"} == {np.dtype(np.float32)}


def test_a_batch_is_traced_as_its_rows_are(tiny_params):
    batch = np.random.default_rng(1).integers(0, N_VOCAB, (3, 9))
    whole = trace(batch, tiny_params, N_HEAD)
    for i, row in enumerate(batch):
        for name, array in trace(row, tiny_params, N_HEAD).items():
            np.testing.assert_allclose(whole[name][:, i] if name in LAYERED else whole[name][i], array, atol=1e-4)


def assert_traces_close(found, expected):
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-4 * max(1, np.abs(array).max()), err_msg=name)


def test_a_trace_is_that_of_the_golden_files():
    expected = {name[6:]: array for name, array in golden().items() if name.startswith("trace-")}
    assert expected.keys() == {"mha", "ffn", "activations", "attention", "residual", "hidden_states", "logits"}
    params = random_params(TRACED.hparams, TRACED.seed)
    assert_traces_close(trace(inputs_of(TRACED), params, TRACED.n_head), expected)


@pytest.mark.reference
@pytest.mark.parametrize("shape", [{}, {"n_layer": 12, "n_head": 6, "n_embd": 96}, {"n_ctx": 200, "n_seq": 200}])
def test_a_trace_is_that_of_transformers(shape):
    case = TRACED._replace(**shape)
    params = random_params(case.hparams, case.seed)
    assert_traces_close(trace(inputs_of(case), params, case.n_head), reference_trace(case, params))


@pytest.mark.parametrize("bad", [[], [N_VOCAB], [-1], [0] * (TINY["n_ctx"] + 1), "text"])
def test_what_the_model_refuses_a_trace_refuses_with_the_same_words(tiny_params, bad):
    with pytest.raises(ValueError) as expected:
        gpt2(bad, **tiny_params, n_head=N_HEAD)
    with pytest.raises(ValueError) as found:
        trace(bad, tiny_params, N_HEAD)
    assert str(found.value) == str(expected.value)


def test_int8_weights_can_be_looked_into(tiny_params, ids):
    pytest.importorskip("numba", reason="Numba is not installed")
    from quantize import quantize

    params = quantize(tiny_params)
    traced = trace(ids, params, N_HEAD)
    np.testing.assert_array_equal(traced["logits"], gpt2(ids, **params, n_head=N_HEAD))
    assert logit_of(attribution(traced, params)) == pytest.approx(traced["logits"][-1].max(), rel=1e-3)
    assert (logit_lens(traced, params)["ranks"][-1] == 1).all()
    ablated = ablate(params, 0, 1, N_HEAD)
    without = trace(ids, ablated, N_HEAD)
    assert attribution(without, ablated)["heads"][0, 1] == 0
    assert not np.allclose(without["logits"], traced["logits"])


# What is read off it


def test_next_tokens_are_the_likeliest_in_order_and_equal_ones_by_id():
    logits = np.log(np.array([[0.1, 0.4, 0.1, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=np.float32))
    ids, probabilities = next_tokens(logits, 3)
    assert ids.tolist() == [[1, 3, 0], [0, 1, 2]]
    np.testing.assert_allclose(probabilities, [[0.4, 0.4, 0.1], [0.7, 0.1, 0.1]], rtol=1e-6)


def test_as_many_next_tokens_as_the_vocabulary_has_add_up_to_one(traced):
    ids, probabilities = next_tokens(traced["logits"], 10**6)
    assert ids.shape == traced["logits"].shape
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1)
    assert (np.diff(probabilities) <= 0).all()


@pytest.mark.parametrize("k", [0, -1, 1.5, "3", True])
def test_a_number_of_next_tokens_that_makes_no_sense_is_refused(traced, k):
    with pytest.raises(ValueError, match="k must be a whole number, 1 or more"):
        next_tokens(traced["logits"], k)


def test_the_logit_lens_is_what_the_model_cut_off_after_each_layer_predicts(traced, tiny_params, ids):
    found = logit_lens(traced, tiny_params)
    answers = traced["logits"].argmax(axis=-1)
    for n_blocks in range(TINY["n_layer"] + 1):
        logits = gpt2(ids, **{**tiny_params, "blocks": tiny_params["blocks"][:n_blocks]}, n_head=N_HEAD)
        np.testing.assert_array_equal(found["ids"][n_blocks], logits.argmax(axis=-1))
        np.testing.assert_allclose(found["probabilities"][n_blocks], to_probabilities(logits).max(axis=-1))
        order = np.argsort(-logits, axis=-1).tolist()
        assert found["ranks"][n_blocks].tolist() == [1 + row.index(i) for row, i in zip(order, answers, strict=True)]
    assert (found["ranks"][-1] == 1).all()
    assert (found["ranks"][0] > 1).any()


def test_surprisal_is_minus_log2_of_each_tokens_probability(traced, ids):
    bits = surprisal(ids, traced["logits"])
    assert bits.shape == (len(ids) - 1,)
    probabilities = to_probabilities(traced["logits"])
    np.testing.assert_allclose(bits, [-math.log2(probabilities[i, ids[i + 1]]) for i in range(len(ids) - 1)])


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 3, 4], [1, 2, -1], [1, 2, N_VOCAB], [[1, 2, 3]], "abc"])
def test_ids_and_logits_that_do_not_fit_have_no_surprisal(tiny_params, ids):
    logits = gpt2([1, 2, 3], **tiny_params, n_head=N_HEAD)
    with pytest.raises(ValueError, match=r"^(token ids must|the input)"):
        surprisal(ids, logits)


def test_surprisal_of_the_impossible_is_finite_and_of_one_token_empty():
    logits = np.array([[0, 3e4], [0, 0]], dtype=np.float32)
    assert surprisal([0, 0], logits) == pytest.approx([3e4 / math.log(2)])
    assert surprisal([0], logits[:1]).shape == (0,)
    assert surprisal([[0], [1]], logits[:, None]).shape == (2, 0)


@pytest.mark.reference
def test_surprisal_is_the_cross_entropy_of_pytorch(traced, ids):
    import torch

    loss = torch.nn.functional.cross_entropy(torch.tensor(traced["logits"][:-1]), torch.tensor(ids[1:]))
    assert surprisal(ids, traced["logits"]).mean() * math.log(2) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("token", [None, 7])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_the_parts_of_an_attribution_add_up_to_the_logit(traced, tiny_params, position, token):
    parts = attribution(traced, tiny_params, position, token)
    logits = traced["logits"][position]
    assert parts["heads"].shape == (TINY["n_layer"], N_HEAD)
    assert parts["mlp"].shape == parts["attn_bias"].shape == (TINY["n_layer"],)
    assert logit_of(parts) == pytest.approx(logits.max() if token is None else logits[token], abs=1e-4)


def test_each_part_of_an_attribution_is_that_of_its_definition(traced, tiny_params):
    x, token = traced["residual"][-1, 5].astype(float), 11
    deviation = math.sqrt(x.var() + 1e-5)

    def part(contribution):
        normalized = (contribution - contribution.mean()) / deviation
        return (normalized * tiny_params["ln_f"]["g"]) @ tiny_params["wte"][token]

    found = attribution(traced, tiny_params, 5, token)
    assert found["embedding"] == pytest.approx(part(traced["residual"][0, 5]), abs=1e-5)
    assert found["ln_f_bias"] == pytest.approx(tiny_params["ln_f"]["b"] @ tiny_params["wte"][token], abs=1e-5)
    for layer, block in enumerate(tiny_params["blocks"]):
        c_proj = block["attn"]["c_proj"]
        for head, w in enumerate(np.split(c_proj["w"], N_HEAD)):
            gathered = traced["attention"][layer, head, 5] @ traced["v"][layer, head]
            assert found["heads"][layer, head] == pytest.approx(part(gathered @ w), abs=1e-4)
        assert found["attn_bias"][layer] == pytest.approx(part(c_proj["b"]), abs=1e-4)
        assert found["mlp"][layer] == pytest.approx(part(traced["ffn"][layer, 5]), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": 20}, "position must be from -20 to 19, not 20"),
        ({"position": -21}, "position must be from -20 to 19, not -21"),
        ({"token": -1}, "token ids must be from 0 to 299, not -1"),
        ({"token": N_VOCAB}, "token ids must be from 0 to 299, not 300"),
    ],
)
def test_an_attribution_of_what_is_not_there_is_refused(traced, tiny_params, options, message):
    with pytest.raises(ValueError, match=message):
        attribution(traced, tiny_params, **options)


def test_a_batch_is_attributed_as_its_rows_are(tiny_params):
    batch = np.random.default_rng(2).integers(0, N_VOCAB, (3, 6))
    whole = attribution(trace(batch, tiny_params, N_HEAD), tiny_params)
    for i, row in enumerate(batch):
        for name, part in attribution(trace(row, tiny_params, N_HEAD), tiny_params).items():
            found = whole[name][:, i] if name in ("heads", "mlp", "attn_bias") else whole[name][i]
            np.testing.assert_allclose(found, part, atol=1e-3)


def test_an_attribution_of_the_bundled_model_adds_up_at_every_position(shakespeare):
    encoder, hparams, params = shakespeare
    traced = trace(encoder.encode("To be, or not to be, that is the question"), params, hparams["n_head"])
    for position, logits in enumerate(traced["logits"]):
        assert logit_of(attribution(traced, params, position)) == pytest.approx(logits.max(), abs=1e-4)


# Without a head


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 3), (np.int64(1), np.int64(2))])
def test_an_ablated_head_adds_nothing_and_all_else_stays(tiny_params, traced, ids, layer, head):
    without = trace(ids, ablate(tiny_params, layer, head, N_HEAD), N_HEAD)
    d = TINY["n_embd"] // N_HEAD
    heads = traced["heads"][layer].copy()
    heads[head] = 0
    c_proj = tiny_params["blocks"][layer]["attn"]["c_proj"]
    merged = heads.swapaxes(0, 1).reshape(len(ids), N_HEAD * d)
    np.testing.assert_allclose(without["mha"][layer], merged @ c_proj["w"] + c_proj["b"], atol=1e-5)
    np.testing.assert_array_equal(without["attention"][layer], traced["attention"][layer])
    np.testing.assert_array_equal(without["residual"][: layer + 1], traced["residual"][: layer + 1])
    assert not np.allclose(without["logits"], traced["logits"])


def test_an_ablation_leaves_the_weights_alone_and_shares_them(shakespeare):
    _, hparams, params = shakespeare
    before = params["blocks"][1]["attn"]["c_proj"]["w"].copy()
    ablated = ablate(params, 1, 2, hparams["n_head"])
    np.testing.assert_array_equal(params["blocks"][1]["attn"]["c_proj"]["w"], before)
    assert ablated["wte"] is params["wte"]
    assert ablated["blocks"][0] is params["blocks"][0]
    assert ablated["blocks"][1]["mlp"] is params["blocks"][1]["mlp"]
    assert ablated.keys() == params.keys()


def test_without_all_its_heads_a_layer_adds_the_bias_only(tiny_params, ids):
    params = tiny_params
    for head in range(N_HEAD):
        params = ablate(params, 0, head, N_HEAD)
    bias = tiny_params["blocks"][0]["attn"]["c_proj"]["b"]
    np.testing.assert_array_equal(trace(ids, params, N_HEAD)["mha"][0], np.broadcast_to(bias, (len(ids), len(bias))))
    assert len(generate(ids, params, N_HEAD, 5)) == 5


@pytest.mark.parametrize(
    ("layer", "head", "message"),
    [
        (2, 0, "layer must be from 0 to 1, not 2"),
        (-1, 0, "layer must be from 0 to 1, not -1"),
        (0, 4, "head must be from 0 to 3, not 4"),
        (0, 1.0, "head must be from 0 to 3, not 1.0"),
        ("0", 0, "layer must be from 0 to 1, not '0'"),
        (True, 0, "layer must be from 0 to 1, not True"),
    ],
)
def test_a_layer_or_head_that_does_not_exist_is_refused_with_the_range(tiny_params, layer, head, message):
    with pytest.raises(ValueError, match=message):
        ablate(tiny_params, layer, head, N_HEAD)


def test_a_number_of_heads_that_the_width_cannot_have_is_refused(tiny_params):
    with pytest.raises(ValueError, match="n_head = 5 does not divide the model's n_embd = 48"):
        ablate(tiny_params, 0, 1, 5)


# The command line


def lines_of(done):
    assert done.stderr == b""
    assert done.returncode == 0
    return done.stdout.decode().splitlines()


def failure_of(done):
    assert done.returncode == 1
    assert done.stdout == b""
    message = done.stderr.decode()
    assert "Traceback" not in message
    return message


def test_next_prints_the_likeliest_tokens(lens_py, tiny_params, tiny_encoder):
    logits = gpt2(tiny_encoder.encode("def main"), **tiny_params, n_head=N_HEAD)[-1]
    ids, probabilities = next_tokens(logits, 4)
    header, *lines = lines_of(lens_py("next", "def main", "--k", "4"))
    assert header.split() == ["probability", "id", "token"]
    expected = [
        " ".join(f"{p:.2%} {'█' * round(40 * p)} {i} {token_labels([i], tiny_encoder)[0]}".split())
        for i, p in zip(ids, probabilities, strict=True)
    ]
    assert [" ".join(line.split()) for line in lines] == expected


def test_attention_prints_where_each_head_of_the_last_token_attends(lens_py, tiny_params, tiny_encoder):
    ids = tiny_encoder.encode("def main")
    weights = trace(ids, tiny_params, N_HEAD)["attention"][1]
    header, *lines = lines_of(lens_py("attention", "def main", "--layer", "1"))
    assert token_labels(ids, tiny_encoder)[-1] in header
    assert len(lines) == N_HEAD
    for head, line in enumerate(lines):
        cells = [str(head)]
        for best in np.argsort(-weights[head, -1])[:3]:
            cells += [f"{token_labels(ids, tiny_encoder)[best]}@{best}", f"{weights[head, -1, best]:.1%}"]
        assert line.split() == cells
    assert lines_of(lens_py("attention", "def main", "--layer=1", "--head=2"))[1:] == [lines[2]]


def test_logit_lens_prints_the_prediction_after_each_block(lens_py, tiny_params, tiny_encoder):
    found = logit_lens(trace(tiny_encoder.encode("def main"), tiny_params, N_HEAD), tiny_params)
    _, *lines = lines_of(lens_py("logit_lens", "def main"))
    assert [line.split()[-4:-1] for line in lines[1:]] == [
        [str(i), f"{found['probabilities'][i + 1, -1]:.2%}", str(found["ranks"][i + 1, -1])] for i in range(2)
    ]
    assert lines[0].split()[0] == "embedding"


def test_surprisal_prints_the_bits_of_each_token_where_there_are_no_colours(lens_py, tiny_params, tiny_encoder):
    ids = tiny_encoder.encode("def main")
    bits = surprisal(ids, gpt2(ids, **tiny_params, n_head=N_HEAD))
    _, *lines, empty, summary = lines_of(lens_py("surprisal", "def main"))
    expected = gpt2(ids, **tiny_params, n_head=N_HEAD).argmax(axis=-1)
    labels, likeliest = token_labels(ids, tiny_encoder), token_labels(expected, tiny_encoder)
    rows = [[str(i + 1), f"{n:.2f}", labels[i + 1], likeliest[i]] for i, n in enumerate(bits)]
    assert [line.split() for line in lines] == rows
    assert not empty
    assert summary == f"{bits.mean():.2f} bits a token on average, perplexity {2 ** bits.mean():.1f}"


def colours(lens_py, **environment):
    pytest.importorskip("rich", reason="rich is not installed")
    unset = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    done = lens_py("surprisal", "def main\n[red]\x1b[31m", env={**unset, "TERM": "xterm-256color", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_text_is_coloured_on_a_terminal_only_and_not_with_no_color(lens_py):
    coloured = colours(lens_py, FORCE_COLOR="1")  # rich takes that for a terminal
    assert b"\x1b[30;48;5;" in coloured
    assert b"\n[red]\\x1b[31m\n" in re.sub(rb"\x1b\[[\d;]*m", b"", coloured)  # neither markup nor a control sequence
    for environment in ({}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, {"FORCE_COLOR": "1", "TERM": "dumb"}):
        assert b"\x1b" not in colours(lens_py, **environment)


def test_on_a_terminal_the_most_surprising_tokens_are_listed(lens_py, tiny_params, tiny_encoder):
    ids = tiny_encoder.encode("def main\n[red]\x1b[31m")
    bits = surprisal(ids, gpt2(ids, **tiny_params, n_head=N_HEAD))
    text = re.sub(rb"\x1b\[[\d;]*m", b"", colours(lens_py, FORCE_COLOR="1")).decode()
    rows = [line.split()[:2] for line in text.partition("the most surprising:\n")[2].splitlines()[1:6]]
    assert rows == [[str(i + 1), f"{bits[i]:.2f}"] for i in np.argsort(-bits)[:5]]


@pytest.mark.parametrize("verb", ["next", "attention", "logit_lens", "surprisal"])
def test_one_token_and_half_a_character_can_be_looked_at(lens_py, verb):
    assert lines_of(lens_py(verb, "a"))
    assert "\\x" in "\n".join(lines_of(lens_py("surprisal", "日 é\x01")))
    assert lines_of(lens_py(verb, ""))  # that is <|endoftext|>


def test_a_prompt_can_come_from_standard_input(tiny_model):
    lines = run("lens.py", "next", "-", f"--model_size={tiny_model}", input=b"def main", stdin=None)
    assert lines.stdout == run("lens.py", "next", "def main", f"--model_size={tiny_model}").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "a", "--layer", "2"], "lens.py attention: layer must be from 0 to 1, not 2\n"),
        (["attention", "a", "--layer", "x"], "lens.py attention: layer must be from 0 to 1, not 'x'\n"),
        (["attention", "a", "--head=4", "--out=a.png"], "lens.py attention: head must be from 0 to 3, not 4\n"),
        (["next", "a", "--k", "0"], "lens.py next: k must be a whole number, 1 or more, not 0\n"),
    ],
)
def test_a_bad_option_is_one_line_with_the_range(lens_py, arguments, message):
    assert failure_of(lens_py(*arguments)) == message


@pytest.mark.parametrize("verb", ["next", "attention", "logit_lens", "surprisal", "report"])
def test_a_prompt_longer_than_the_context_is_one_line(lens_py, verb, tmp_path):
    message = failure_of(lens_py(verb, "? " * 40, cwd=tmp_path))
    assert "there is room for 32: shorten it" in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["attention", "logit_lens"])
def test_pictures_without_matplotlib_are_one_line_that_says_what_to_install(lens_py, verb, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    done = lens_py(verb, "a", "--out=a.png", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert failure_of(done) == f"lens.py {verb}: pictures need matplotlib: pip install matplotlib (not here)\n"
    assert not (tmp_path / "a.png").exists()
    assert lines_of(lens_py(verb, "a", env={"PYTHONPATH": str(tmp_path)}))


@pytest.mark.parametrize("verb", ["next", "surprisal"])
def test_without_rich_it_is_plain_text(lens_py, verb, tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('not here')")
    done = lens_py(verb, "def main", env={"PYTHONPATH": str(tmp_path), "FORCE_COLOR": "1", "TERM": "xterm"})
    assert lines_of(done) == lines_of(lens_py(verb, "def main"))


@pytest.mark.parametrize("error", ["ImportError", "SyntaxError", "AttributeError"])
def test_a_broken_rich_is_as_good_as_none(lens_py, error, tmp_path):
    (tmp_path / "rich.py").write_text(f"raise {error}('broken')")
    assert lines_of(lens_py("next", "def main", env={"PYTHONPATH": str(tmp_path), "FORCE_COLOR": "1", "TERM": "xterm"}))


def test_the_picture_of_a_head_is_that_of_this_head(tiny_model, tiny_params, tiny_encoder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(lens, "attention_figure", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(lens, "save_figure", lambda figure, out: None)
    lens.show_attention("def main", 1, out=f"{tmp_path}/a.png", model_size=str(tiny_model))
    lens.show_attention("def main", 1, 2, f"{tmp_path}/a.png", str(tiny_model))
    weights = trace(tiny_encoder.encode("def main"), tiny_params, N_HEAD)["attention"][1]
    for (found, labels, title, heads), expected in zip(seen, (range(N_HEAD), [2]), strict=True):
        np.testing.assert_array_equal(found, weights[list(expected)])
        assert labels == token_labels(tiny_encoder.encode("def main"), tiny_encoder)
        assert list(heads) == list(expected)
        assert title == f"tiny, layer 1, {'head 2' if len(heads) == 1 else 'all heads'}"


@pytest.mark.parametrize("verb", ["attention", "logit_lens", "report"])
def test_a_file_that_cannot_be_written_is_one_line_and_nothing_is_left(lens_py, verb, tmp_path, permissions):
    tmp_path.chmod(0o555)
    message = failure_of(lens_py(verb, "ab", f"--out={tmp_path}/there.png", preexec_fn=as_any_user))
    assert message == f"lens.py {verb}: {tmp_path}/there.png could not be written: Permission denied\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["attention", "logit_lens", "report"])
@pytest.mark.parametrize("out", ["no/such/directory/a.png", "directory.png", "", "x" * 300 + ".png"])
def test_a_place_that_cannot_be_is_one_line(lens_py, verb, out, tmp_path):
    (tmp_path / "directory.png").mkdir()
    message = failure_of(lens_py(verb, "ab", f"--out={out}", cwd=tmp_path))
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["directory.png"]


def test_a_place_that_cannot_be_is_told_before_the_work(lens_py):
    for verb in ("attention", "logit_lens", "report"):
        assert "there is no directory" in failure_of(lens_py(verb, "? " * 40, "--out=no/such/directory/a.png"))


def test_weights_that_are_damaged_are_one_line(tmp_path):
    params = random_params(TINY)
    params["blocks"][1]["mlp"]["c_fc"]["w"][0, 0] = np.nan
    model = write_model(tmp_path / "model", params=params)
    for verb in ("next", "attention", "logit_lens", "surprisal", "report"):
        message = failure_of(run("lens.py", verb, "ab", f"--model_size={model}", cwd=tmp_path))
        assert message.startswith(f"lens.py {verb}: the model's logits are not finite numbers")


def test_padding_of_the_vocabulary_is_never_shown(tmp_path):
    params = random_params({**TINY, "n_vocab": 310})
    params["wte"][300:] *= 50
    model = write_model(tmp_path / "model", {**TINY, "n_vocab": 310}, params, n_tokens=300)
    for verb in ("next", "logit_lens", "surprisal"):
        assert lines_of(run("lens.py", verb, "def main", f"--model_size={model}"))


def test_each_verb_has_a_help_and_a_list_of_them_too():
    overview = run("lens.py", "--help")
    assert overview.returncode == 0
    for verb in ("next", "attention", "logit_lens", "surprisal", "report"):
        assert f"lens.py {verb}" in overview.stdout.decode()
        text = run("lens.py", verb, "--help").stdout.decode()
        assert f"usage: python lens.py {verb} PROMPT" in text
        assert "--model_size" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what to do is missing"),
        (["nxt", "a"], "did you mean next?"),
        (
            ["a prompt"],
            "there is no 'a prompt': the first argument is one of next, attention, logit_lens, surprisal, report",
        ),
        (["next"], "PROMPT is missing"),
        (["next", "a", "--layer=1"], "unknown flag --layer"),
    ],
)
def test_a_command_that_makes_no_sense_says_what_would(arguments, message):
    assert message in failure_of(run("lens.py", *arguments))


# The data of a report


def test_a_report_that_no_browser_could_open_is_refused_with_what_would_fit(tiny_params, tiny_encoder, monkeypatch):
    monkeypatch.setattr(lens, "MOST_WEIGHTS", 8 * 10 * 11 // 2)
    with pytest.raises(ValueError, match="11 tokens long, and a report of this model holds 10"):
        report_data([1] * 11, tiny_params, N_HEAD, tiny_encoder)
    assert report_data([1] * 10, tiny_params, N_HEAD, tiny_encoder)["ids"] == [1] * 10
