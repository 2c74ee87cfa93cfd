"""lens.py: its numbers against gpt2.py, PyTorch and plain definitions, and its command line as a user types it."""

import io
import math
import re
import runpy
import sys

import numpy as np
import pytest

import lens
from gpt2 import gpt2, hidden_states
from helpers.golden import TRACED, golden, inputs_of, reference_trace
from helpers.models import ROOT, TINY, random_params, write_model
from lens import ablate, attribution, logit_lens, next_tokens, report_data, surprisal, trace
from sampling import to_probabilities
from show.terminal import token_labels
from store.params import tensors_of

N_HEAD, N_VOCAB = TINY["n_head"], TINY["n_vocab"]
LAYERED = {"residual", "q", "k", "v", "attention", "heads", "mha", "activations", "ffn", "mlp", "attn_bias"}
NO_PLACE = "could not be written: there is no directory "
PROMPT = "def main\n[red]\x1b[31m"
SHAPES = ({}, {"n_layer": 12, "n_head": 6, "n_embd": 96}, {"n_ctx": 200, "n_seq": 200})
VERBS, DRAWING = ("next", "attention", "logit_lens", "surprisal", "report"), ("attention", "logit_lens", "report")


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, N_VOCAB, 20)


@pytest.fixture(scope="module")
def traced(tiny_params, ids):
    found = trace(ids, tiny_params, N_HEAD)
    assert {array.dtype for name, array in found.items() if name != "ids"} == {np.dtype(np.float32)}
    return found


@pytest.fixture
def lens_py(monkeypatch, capsys, tmp_path, tiny_model):
    """Run lens.py on the tiny model, in this process and in an empty directory; returns the lines that it prints."""

    def call(*arguments, model=tiny_model):
        monkeypatch.setattr(sys, "argv", ["lens.py", *arguments, f"--model_size={model}"])
        runpy.run_path(str(ROOT / "lens.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    for name in ("signal.signal", "_signal.signal"):  # a script changes what Ctrl-C does
        monkeypatch.setattr(name, lambda *_: None)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return call


def logit_of(parts):
    return sum(np.sum(part) for part in parts.values())


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (63,), (64,), (65,), (130,), (256,), (3, 1), (2, 70), (2, 2, 4)])
def test_a_trace_has_exactly_the_models_logits_and_hidden_states(shakespeare, shape):
    _, hparams, params = shakespeare
    ids = np.random.default_rng(len(shape)).integers(0, hparams["n_vocab"], shape)
    traced = trace(ids, params, hparams["n_head"])
    np.testing.assert_array_equal(traced["logits"], gpt2(ids, **params, n_head=hparams["n_head"]))
    np.testing.assert_array_equal(traced["hidden_states"], hidden_states(ids, **params, n_head=hparams["n_head"]))


@pytest.mark.parametrize("n_seq", [1, 5, 130])
def test_attention_weights_times_values_are_the_heads(shakespeare, n_seq):
    _, hparams, params = shakespeare
    traced = trace(np.arange(n_seq), params, hparams["n_head"])
    weights, d = traced["attention"], hparams["n_embd"] // hparams["n_head"]
    scores = traced["q"].astype(float) @ traced["k"].swapaxes(-1, -2) / math.sqrt(d)
    exp = np.tril(np.exp(scores - scores.max(axis=-1, keepdims=True)))
    np.testing.assert_allclose(weights, exp / exp.sum(axis=-1, keepdims=True), atol=1e-5)
    assert (weights[..., ~np.tri(n_seq, dtype=bool)] == 0).all()
    np.testing.assert_allclose(weights @ traced["v"], traced["heads"], atol=1e-5)


@pytest.mark.parametrize(("analyse", "atol"), [(lambda traced, params: traced, 1e-4), (attribution, 1e-3)])
def test_a_batch_gives_the_same_trace_and_attribution_as_its_rows(tiny_params, analyse, atol):
    batch = np.random.default_rng(1).integers(0, N_VOCAB, (3, 9))
    whole = analyse(trace(batch, tiny_params, N_HEAD), tiny_params)
    for i, row in enumerate(batch):
        for name, array in analyse(trace(row, tiny_params, N_HEAD), tiny_params).items():
            found = whole[name][:, i] if name in LAYERED else whole[name][i]
            np.testing.assert_allclose(found, array, atol=atol, err_msg=name)


@pytest.mark.parametrize("shape", [None, *(pytest.param(shape, marks=pytest.mark.reference) for shape in SHAPES)])
def test_a_trace_equals_the_golden_files_and_transformers(shape):
    case = TRACED._replace(**shape or {})
    params = random_params(case.hparams, case.seed)
    found = trace(inputs_of(case), params, case.n_head)
    if shape is None:
        expected = {name[6:]: array for name, array in golden().items() if name.startswith("trace-")}
        assert expected.keys() == {"mha", "ffn", "activations", "attention", "residual", "hidden_states", "logits"}
    else:
        expected = reference_trace(case, params)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-4 * max(1, np.abs(array).max()), err_msg=name)


@pytest.mark.parametrize("bad", [[], [N_VOCAB], [-1], [0] * (TINY["n_ctx"] + 1), "text"])
def test_a_trace_refuses_bad_inputs_with_the_same_words_as_the_model(tiny_params, bad):
    with pytest.raises(ValueError) as expected:
        gpt2(bad, **tiny_params, n_head=N_HEAD)
    with pytest.raises(ValueError) as found:
        trace(bad, tiny_params, N_HEAD)
    assert str(found.value) == str(expected.value)


def test_every_analysis_works_on_int8_weights(tiny_params, ids):
    pytest.importorskip("numba", reason="Numba is not installed")
    from engine.int8 import quantize

    params = quantize(tiny_params)
    traced = trace(ids, params, N_HEAD)
    np.testing.assert_array_equal(traced["logits"], gpt2(ids, **params, n_head=N_HEAD))
    assert logit_of(attribution(traced, params)) == pytest.approx(traced["logits"][-1].max(), rel=1e-3)
    assert (logit_lens(traced, params)["ranks"][-1] == 1).all()
    ablated = ablate(params, 0, 1, N_HEAD)
    without = trace(ids, ablated, N_HEAD)
    assert attribution(without, ablated)["heads"][0, 1] == 0
    assert not np.allclose(without["logits"], traced["logits"])


def test_next_tokens_are_sorted_by_probability_then_by_id(traced):
    logits = np.log(np.array([[0.1, 0.4, 0.1, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=np.float32))
    ids, probabilities = next_tokens(logits, 3)
    assert ids.tolist() == [[1, 3, 0], [0, 1, 2]]
    np.testing.assert_allclose(probabilities, [[0.4, 0.4, 0.1], [0.7, 0.1, 0.1]], rtol=1e-6)
    assert next_tokens(np.tile([0, 0, 1], 100), 5)[0].tolist() == [2, 5, 8, 11, 14]
    ids, probabilities = next_tokens(traced["logits"], 10**6)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1)
    assert ids.shape == traced["logits"].shape and (np.diff(probabilities) <= 0).all()


def test_the_logit_lens_predicts_like_the_model_cut_off_after_each_layer(traced, tiny_params, ids):
    found = logit_lens(traced, tiny_params)
    answers = traced["logits"].argmax(axis=-1)
    for n_blocks in range(TINY["n_layer"] + 1):
        logits = gpt2(ids, **{**tiny_params, "blocks": tiny_params["blocks"][:n_blocks]}, n_head=N_HEAD)
        np.testing.assert_array_equal(found["ids"][n_blocks], logits.argmax(axis=-1))
        np.testing.assert_allclose(found["probabilities"][n_blocks], to_probabilities(logits).max(axis=-1))
        order = np.argsort(-logits, axis=-1).tolist()
        assert found["ranks"][n_blocks].tolist() == [1 + row.index(i) for row, i in zip(order, answers, strict=True)]
    assert (found["ranks"][-1] == 1).all() and (found["ranks"][0] > 1).any()


def test_surprisal_is_minus_log2_of_each_tokens_probability_and_finite(traced, ids):
    bits = surprisal(ids, traced["logits"])
    assert bits.shape == (len(ids) - 1,)
    probabilities = to_probabilities(traced["logits"])
    np.testing.assert_allclose(bits, [-math.log2(probabilities[i, ids[i + 1]]) for i in range(len(ids) - 1)])
    impossible = np.array([[0, 3e4], [0, 0]], dtype=np.float32)
    assert surprisal([0, 0], impossible) == pytest.approx([3e4 / math.log(2)])
    assert surprisal([0], impossible[:1]).shape == (0,)
    assert surprisal([[0], [1]], impossible[:, None]).shape == (2, 0)


@pytest.mark.parametrize("token", [None, 7])
def test_the_parts_of_an_attribution_add_up_to_the_logit_at_every_position(shakespeare, token):
    encoder, hparams, params = shakespeare
    traced = trace(encoder.encode("To be, or not to be, that is the question"), params, hparams["n_head"])
    for position in range(-1, len(traced["ids"])):
        parts, logits = attribution(traced, params, position, token), traced["logits"][position]
        assert parts["heads"].shape == (hparams["n_layer"], hparams["n_head"])
        assert parts["mlp"].shape == parts["attn_bias"].shape == (hparams["n_layer"],)
        assert logit_of(parts) == pytest.approx(logits.max() if token is None else logits[token], abs=1e-4)


def test_each_part_of_an_attribution_equals_its_definition(traced, tiny_params):
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


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 3), (np.int64(1), np.int64(2))])
def test_an_ablated_head_adds_nothing_and_nothing_else_changes(tiny_params, traced, ids, layer, head):
    c_proj = tiny_params["blocks"][layer]["attn"]["c_proj"]
    before = c_proj["w"].copy()
    ablated = ablate(tiny_params, layer, head, N_HEAD)
    without = trace(ids, ablated, N_HEAD)
    heads = traced["heads"][layer] * (np.arange(N_HEAD) != head)[:, None, None]
    merged = heads.swapaxes(0, 1).reshape(len(ids), -1)
    np.testing.assert_allclose(without["mha"][layer], merged @ c_proj["w"] + c_proj["b"], atol=1e-5)
    np.testing.assert_array_equal(without["attention"][layer], traced["attention"][layer])
    np.testing.assert_array_equal(without["residual"][: layer + 1], traced["residual"][: layer + 1])
    assert not np.allclose(without["logits"], traced["logits"])
    np.testing.assert_array_equal(c_proj["w"], before)  # all but the new c_proj is shared
    new, shared = ({id(a) for a in tensors_of(params).values()} for params in (ablated, tiny_params))
    assert (len(new), len(new - shared)) == (len(shared), 1)


@pytest.mark.parametrize(("analyse", "arguments", "message"), [
    *((next_tokens, (k,), "k must be a whole number, 1 or more") for k in (0, -1, 1.5, "3", True)),
    *((attribution, (i,), f"position must be a whole number from -20 to 19, not {i}") for i in (20, -21)),
    *((attribution, (0, i), f"token ids must be from 0 to 299, not {i}") for i in (-1, N_VOCAB)),
    *((ablate, (i, 0, N_HEAD), f"layer must be a whole number from 0 to 1, not {i!r}") for i in (2, -1, "0", True)),
    *((ablate, (0, i, N_HEAD), f"head must be a whole number from 0 to 3, not {i!r}") for i in (4, 1.0)),
    (ablate, (0, 1, 5), "n_head = 5 does not divide the model's n_embd = 48"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused_with_the_range(traced, tiny_params, analyse, arguments, message):
    data = {next_tokens: [traced["logits"]], attribution: [traced, tiny_params], ablate: [tiny_params]}
    with pytest.raises(ValueError, match=f"^{message}"):
        analyse(*data[analyse], *arguments)


@pytest.mark.parametrize("bad", [[1], [1] * 21, [-1] * 20, [N_VOCAB] * 20, [[1] * 20], "abc"])
def test_surprisal_refuses_ids_and_logits_that_do_not_fit(traced, bad):
    with pytest.raises(ValueError, match=r"^(token ids must|the input)"):
        surprisal(bad, traced["logits"])


def test_next_prints_the_most_likely_tokens(lens_py, tiny_params, tiny_encoder):
    logits = gpt2(tiny_encoder.encode("def main"), **tiny_params, n_head=N_HEAD)[-1]
    ids, probabilities = next_tokens(logits, 4)
    header, *lines = lens_py("next", "def main", "--k", "4")
    assert header.split() == ["probability", "id", "token"]
    cells = zip(probabilities, ids, token_labels(ids, tiny_encoder), strict=True)
    expected = [f"{p:.2%} {'█' * round(40 * p)} {i} {label}".split() for p, i, label in cells]
    assert [line.split() for line in lines] == expected


def test_attention_prints_where_each_head_of_the_last_token_attends(lens_py, tiny_params, tiny_encoder):
    ids = tiny_encoder.encode("def main")
    labels, weights = token_labels(ids, tiny_encoder), trace(ids, tiny_params, N_HEAD)["attention"][1, :, -1]
    header, *lines = lens_py("attention", "def main", "--layer", "1")
    assert labels[-1] in header
    best = [[f"{labels[i]}@{i} {row[i]:.1%}" for i in np.argsort(-row)[:3]] for row in weights]
    assert [line.split() for line in lines] == [" ".join([str(n), *row]).split() for n, row in enumerate(best)]
    assert lens_py("attention", "def main", "--layer=1", "--head=2")[1:] == [lines[2]]


def test_logit_lens_prints_the_prediction_after_each_block(lens_py, tiny_params, tiny_encoder):
    found = logit_lens(trace(tiny_encoder.encode("def main"), tiny_params, N_HEAD), tiny_params)
    _, *lines = lens_py("logit_lens", "def main")
    assert [line.split()[-4:-1] for line in lines[1:]] == [
        [str(i), f"{found['probabilities'][i + 1, -1]:.2%}", str(found["ranks"][i + 1, -1])] for i in range(2)
    ]
    assert lines[0].split()[0] == "embedding"


def test_surprisal_prints_the_bits_of_each_token_without_colours(lens_py, tiny_params, tiny_encoder):
    ids = tiny_encoder.encode("def main")
    logits = gpt2(ids, **tiny_params, n_head=N_HEAD)
    bits, expected = surprisal(ids, logits), token_labels(logits.argmax(axis=-1), tiny_encoder)
    _, *lines, summary = lens_py("surprisal", "def main")
    rows = [(i + 1, f"{n:.2f}", token_labels(ids, tiny_encoder)[i + 1], expected[i]) for i, n in enumerate(bits)]
    assert [line.split() for line in lines] == [*("{} {} {} {}".format(*row).split() for row in rows), []]
    numbers = re.fullmatch(r"(\d+\.\d\d) bits a token on average, perplexity (\d+\.\d)", summary).groups()
    np.testing.assert_allclose([float(n) for n in numbers], [bits.mean(), 2 ** bits.mean()], rtol=1e-3)


def test_surprisal_prints_coloured_text_and_the_most_surprising_tokens(lens_py, monkeypatch, tiny_params, tiny_encoder):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR")
    coloured = "\n".join(lens_py("surprisal", PROMPT))
    assert "\x1b[30;48;5;" in coloured
    text, table = re.sub(r"\x1b\[[\d;]*m", "", coloured).split("the most surprising tokens:\n")
    assert text.startswith("def main⏎\n[red]\\x1b[31m\n")  # without its control sequence
    ids = tiny_encoder.encode(PROMPT)
    bits = surprisal(ids, gpt2(ids, **tiny_params, n_head=N_HEAD))
    rows = [line.split()[:2] for line in table.splitlines()[1:6]]
    assert rows == [[str(i + 1), f"{bits[i]:.2f}"] for i in np.argsort(-bits)[:5]]


@pytest.mark.parametrize("verb", VERBS[:4])
def test_the_verbs_take_any_prompt_also_from_standard_input(lens_py, monkeypatch, verb):
    assert lens_py(verb, "a")
    assert lens_py(verb, "")  # that is <|endoftext|>
    assert "\\x" in "\n".join(lens_py("surprisal", "日 é\x01"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def main")))
    assert lens_py(verb, "-") == lens_py(verb, "def main")


@pytest.mark.parametrize(("arguments", "message"), [
    (["attention", "a", "--layer", "2"], "layer must be a whole number from 0 to 1, not 2"),
    (["attention", "a", "--head=4", "--out=a.png"], "head must be a whole number from 0 to 3, not 4"),
    (["next", "a", "--k", "0"], "k must be a whole number, 1 or more, not 0"),
    *(([verb, "? " * 40], "the input is 80 tokens long, but there is room for 32: shorten it") for verb in VERBS),
    *(([verb, "? " * 40, "--out=no/a.png"], f"no/a.png {NO_PLACE}") for verb in DRAWING),  # checked before the work
])  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(lens_py, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as raised:
        lens_py(*arguments)
    assert raised.value.code.startswith(f"lens.py {arguments[0]}: {message}")
    assert (*capsys.readouterr(), *tmp_path.iterdir()) == ("", "")


@pytest.mark.parametrize("verb", ["attention", "logit_lens"])
def test_pictures_need_matplotlib_and_the_tables_do_not(lens_py, verb, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert lens_py(verb, "a", "--out=a.png") == ["wrote a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=rf"^lens.py {verb}: pictures need matplotlib: pip install matplotlib \(.*\)$"):
        lens_py(verb, "a", "--out=b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert lens_py(verb, "a")


def test_a_picture_shows_the_heads_that_were_asked_for(tiny_model, tiny_params, tiny_encoder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(lens, "attention_figure", lambda *arguments: arguments)
    monkeypatch.setattr(lens, "save_figure", lambda figure, out: drawn.append(figure))
    ids, drawn = tiny_encoder.encode("def main"), []
    weights = trace(ids, tiny_params, N_HEAD)["attention"][1]
    for head, heads, name in ((None, [0, 1, 2, 3], "all heads"), (2, [2], "head 2")):
        lens.show_attention("def main", 1, head, f"{tmp_path}/a.png", model_size=str(tiny_model))
        found, labels, title, shown = drawn.pop()
        np.testing.assert_array_equal(found, weights[heads])
        assert (labels, title) == (token_labels(ids, tiny_encoder), f"tiny, layer 1, {name}")
        assert list(shown) == heads


def test_damaged_weights_are_a_one_line_error(lens_py, tmp_path):
    params = random_params(TINY)
    params["blocks"][1]["mlp"]["c_fc"]["w"][0, 0] = np.nan
    model = write_model(tmp_path / "model", params=params)
    for verb in VERBS:
        with pytest.raises(SystemExit, match=rf"^lens.py {verb}: the model's logits are not finite numbers.*$"):
            lens_py(verb, "ab", model=model)


def test_padding_of_the_vocabulary_is_never_shown(lens_py, tmp_path):
    params = random_params({**TINY, "n_vocab": 310})
    params["wte"][300:] *= 50
    model = write_model(tmp_path / "model", {**TINY, "n_vocab": 310}, params, n_tokens=300)
    for verb in VERBS[:4]:
        assert lens_py(verb, "def main", model=model)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_each_verb_has_a_help_and_the_script_lists_the_verbs(lens_py, capsys, verb):
    with pytest.raises(SystemExit) as raised:
        lens_py(*verb.split(), "--help")
    text = capsys.readouterr().out
    assert not raised.value.code
    assert all(f"python lens.py {other} " in text for other in ([verb] if verb else VERBS))
    assert not verb or (text.startswith(f"usage: python lens.py {verb} PROMPT") and " --model_size 124M " in text)


def test_a_report_that_is_too_large_is_refused_with_the_size_that_fits(tiny_params, tiny_encoder, monkeypatch):
    monkeypatch.setattr(lens, "MOST_WEIGHTS", 8 * 10 * 11 // 2)
    with pytest.raises(ValueError, match="11 tokens long, but a report of this model holds 10"):
        report_data([1] * 11, tiny_params, N_HEAD, tiny_encoder)
    assert report_data([1] * 10, tiny_params, N_HEAD, tiny_encoder)["ids"] == [1] * 10
