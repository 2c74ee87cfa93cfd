"""The losses that evaluate.py reports agree with float64 loops over gpt2()'s logits, and with PyTorch."""

import copy
import math
import os
import re
import subprocess
import time
import tracemalloc

import numpy as np
import pytest

import evaluate as module
from encoder import END_OF_TEXT, Encoder
from engine.threads import blas
from evaluate import last_words, loss, measures, option_scores, split_windows, text_losses, token_losses
from gpt2 import generate
from helpers.golden import reference_model
from helpers.models import BUNDLED, TINY, random_params, reference_losses, tiny_tables, write_model
from helpers.processes import error_line, interrupt, run, start
from show import terminal

N_HEAD, N_CTX, N_VOCAB = TINY["n_head"], TINY["n_ctx"], TINY["n_vocab"]
LETTERS = {token: i for token, i in tiny_tables()[0].items() if len(token) == 1}


def random_ids(*shape):
    return np.random.default_rng(0).integers(0, N_VOCAB, shape)


RISING = np.linspace(0, 30, N_VOCAB, dtype=np.float32)[:, None]
CHANGES = {
    "none": lambda params: params,
    "a head": lambda params: params | {"lm_head": random_params(TINY, seed=5)["wte"]},
    "logits of thousands": lambda params: params | {"wte": params["wte"] * np.float32(200)},
    "logits of minus thousands": lambda params: params | {"wte": params["wte"] * np.float32(-200)},
    "logits that grow from block to block": lambda params: params | {"lm_head": params["wte"] * RISING},
    "logits that fall from block to block": lambda params: params | {"lm_head": params["wte"] * RISING[::-1]},
    "int8": lambda params: pytest.importorskip("engine.int8", exc_type=ImportError).quantize(params),
}


@pytest.mark.parametrize("block", [1, 3, 7, 299, 300, 1024])
@pytest.mark.parametrize("change", CHANGES)
def test_token_losses_agree_with_the_logits(tiny_params, monkeypatch, block, change):
    monkeypatch.setattr(module, "VOCABULARY_BLOCK", block)
    params, ids = CHANGES[change](tiny_params), random_ids(20)
    found, expected = token_losses(ids, params, N_HEAD), reference_losses(ids, params, N_HEAD)
    assert found.dtype == np.float64
    assert expected.max() > (1000 if "thousands" in change else 15)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * expected.max())


@pytest.mark.parametrize("n_scored", [None, 4])
def test_losses_keep_leading_axes_and_loss_is_their_mean(tiny_params, n_scored):
    ids = random_ids(2, 3, N_CTX + 1)
    found, mean = token_losses(ids, tiny_params, N_HEAD, n_scored), loss(ids.tolist(), tiny_params, N_HEAD)
    expected = np.array([[reference_losses(row, tiny_params, N_HEAD) for row in rows] for rows in ids])
    np.testing.assert_allclose(found, expected[..., -n_scored:] if n_scored else expected, rtol=1e-5)
    assert (type(mean), mean) == (float, pytest.approx(expected.mean(), rel=1e-6))


@pytest.mark.parametrize(("ids", "complaint"), [
    ([5], "one token has no loss"), ([[1], [2]], "one token has no loss"), ([], "token ids"),
    ([1.5, 2.5], "whole numbers"), ([1] * (N_CTX + 2), "shorten it"),
    ([1, N_VOCAB], f"from 0 to {N_VOCAB - 1}"), ([-1, 2], f"from 0 to {N_VOCAB - 1}"),
])  # fmt: skip
def test_ids_without_a_loss_are_refused(tiny_params, ids, complaint):
    with pytest.raises(ValueError, match=complaint):
        loss(ids, tiny_params, N_HEAD)


def test_the_logits_are_never_held_all_at_once():
    hparams = {"n_vocab": 20_000, "n_ctx": 512, "n_embd": 8, "n_head": 2, "n_layer": 1}
    params = random_params(hparams)
    ids = np.random.default_rng(0).integers(0, 20_000, 513)
    tracemalloc.start()
    token_losses(ids, params, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 512 * 20_000 * 4 / 3, "all logits would be 41 MB"


def guide(n_tokens, n_ctx, stride):
    """Yield the windows of Hugging Face's guide, each with the tokens that it scores."""
    previous = 0
    for first in range(0, n_tokens, stride):
        end = min(first + n_ctx, n_tokens)
        yield first, end, [i for i in range(previous, end) if i > first]
        previous = end
        if end == n_tokens:
            break


@pytest.mark.parametrize("n_pieces", [1, 2, 40])
@pytest.mark.parametrize("stride", range(1, 9))
@pytest.mark.parametrize("n_tokens", [*range(2, 20), 40])
def test_windows_score_each_token_once_and_overlap_as_in_the_guide(n_tokens, stride, n_pieces):
    windows = split_windows(np.array_split(np.arange(n_tokens), n_pieces), 8, stride)
    found = [(ids[0], ids[-1] + 1, list(ids[-n_scored:])) for ids, n_scored in windows]
    if stride < 8:
        assert found == list(guide(n_tokens, 8, stride))
    assert [i for *_, scored in found for i in scored] == list(range(1, n_tokens))
    for first, end, scored in found:
        assert 0 < len(scored) < end - first <= 9
        assert first == 0 or scored[0] - first >= max(1, 8 - stride), "as much context as the stride leaves"


@pytest.mark.parametrize("stride", [None, 1, 10, 31, 32])
def test_text_losses_are_the_losses_of_all_windows_in_order(tiny_params, stride):
    ids = random_ids(90 if stride == 1 else 333)
    windows = split_windows([ids], N_CTX, stride)
    expected = [reference_losses(window, tiny_params, N_HEAD)[-n_scored:] for window, n_scored in windows]
    found = text_losses(ids.tolist(), tiny_params, N_HEAD, stride)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5)
    in_parts = module.losses_in_parts(np.array_split(ids, 7), tiny_params, N_HEAD, stride)
    assert np.array_equal(np.concatenate(list(in_parts)), found), "bit for bit"


@pytest.mark.parametrize(("ids", "stride", "complaint"), [
    *((range(50), stride, "from 1 to 32") for stride in (0, -1, 33, 1.5, "8", True)),
    (np.ones((2, 30), int), None, "same number of dimensions"), ([], None, "token ids"),
    ([5], None, "one token has no loss"), ([*range(50), N_VOCAB], None, "token ids must be"),
])  # fmt: skip
def test_a_text_without_losses_or_a_wrong_stride_is_refused(tiny_params, ids, stride, complaint):
    before = blas().info()
    with pytest.raises(ValueError, match=complaint):
        text_losses(ids, tiny_params, N_HEAD, stride)
    assert blas().info() == before, "BLAS has its threads back"


def test_measures_are_per_token_byte_character_and_word():
    assert measures(10.0, n_tokens=4, n_bytes=15, n_characters=14, n_words=3) == {
        "nats per token": 2.5, "perplexity": pytest.approx(math.exp(2.5)),
        "bits per byte": pytest.approx(10 / math.log(2) / 15), "perplexity per word": pytest.approx(math.exp(10 / 3)),
        "bits per character": pytest.approx(10 / math.log(2) / 14),
    }  # fmt: skip
    assert measures(2.0, 1, 2, 2, 0)["perplexity per word"] == pytest.approx(math.exp(2)), "white space has no words"
    assert measures(5000.0, 1, 3, 3, 2)["perplexity"] == math.inf, "of a huge loss"


def log_probability(ids, n_scored, params):
    return -reference_losses(np.array(ids), params, N_HEAD)[-n_scored:].sum()


@pytest.mark.parametrize(("context", "option", "scored"), [
    ("if it", "is not", " is not"), ("if it", "\nis not", "\nis not"), ("if it ", "is", " is"),
])  # fmt: skip
def test_an_option_is_scored_with_the_space_before_it(tiny_encoder, tiny_params, context, option, scored):
    before, ids = tiny_encoder.encode("if it"), tiny_encoder.encode(scored)
    (found,) = option_scores(context, [option], tiny_encoder, tiny_params, N_HEAD)
    assert found == pytest.approx(log_probability(before + ids, len(ids), tiny_params), rel=1e-5)


@pytest.mark.parametrize("bos_id", [None, 7])
def test_without_context_options_follow_the_first_token_of_a_text(tiny_encoder, tiny_params, bos_id):
    encoder, ids = copy.copy(tiny_encoder), tiny_encoder.encode("not")
    if bos_id is not None:  # otherwise bos_id is <|endoftext|>
        encoder.bos_id = bos_id
    (found,) = option_scores("", ["not"], encoder, tiny_params, N_HEAD)
    assert found == pytest.approx(log_probability([bos_id or encoder.eot_id, *ids], len(ids), tiny_params), rel=1e-5)


def test_all_options_are_scored_after_the_same_tokens():
    """A merge joins the end of the context and one option, so the other option is scored from there too."""
    encoder = Encoder(LETTERS | {"ab": 256, END_OF_TEXT: 257}, [("a", "b")])
    pairs = [(ids.tolist(), n_scored) for ids, n_scored in module.encode_after("xa", ["xab", "xac"], encoder)]
    assert pairs == [([LETTERS["x"], 256], 1), ([LETTERS["x"], LETTERS["a"], LETTERS["c"]], 2)]


@pytest.mark.parametrize(("context", "options", "complaint"), [
    ("if", ["a", ""], "an option is empty"), ("if", [" "], "an option is nothing but white space"),
    ("", ["a"], "there is no context, and this model has no <|endoftext|>"),
])  # fmt: skip
def test_options_that_cannot_be_scored_are_refused(tiny_params, context, options, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        option_scores(context, options, Encoder(LETTERS, []), tiny_params, N_HEAD)


def test_a_last_word_is_right_if_greedy_generation_generates_it(shakespeare):
    encoder, hparams, params = shakespeare
    before = "ROMEO:\nI will not"
    text = before + encoder.decode(generate(encoder.encode(before), params, hparams["n_head"], 30))
    passages = [text[: space.start()] for space in re.finditer(r"(?<=[a-z]) ", text) if space.start() > len(before)]
    n_right = len(passages)
    passages += [re.sub(r"(\S+)$", word, passage) for word in (r"\1ness", r"x\1") for passage in passages]
    is_right, log_p = last_words([f"{passage}\n" for passage in passages], encoder, params, hparams["n_head"])
    assert n_right > 4
    assert is_right.tolist() == n_right * [True] + 2 * n_right * [False]  # some tokens of the wrong words are right
    for passage, right, found in zip(passages, is_right, log_p, strict=True):
        context, space, word = re.fullmatch(r"(.*\S)(\s+)(\S+)", passage, re.DOTALL).groups()
        expected = encoder.encode(space + word)
        assert right == (generate(encoder.encode(context), params, hparams["n_head"], len(expected)) == expected)
        assert found == pytest.approx(option_scores(context, [space + word], encoder, params, hparams["n_head"])[0])


def test_only_the_end_of_a_text_longer_than_the_context_counts(tiny_encoder, tiny_params):
    text = "if not self and other in the list of things is it so " * 8 + "if not"
    ids, n_scored = tiny_encoder.encode(text), len(tiny_encoder.encode(" not"))
    assert len(ids) > N_CTX + 1
    _, (found,) = last_words([text], tiny_encoder, tiny_params, N_HEAD)
    assert found == pytest.approx(log_probability(ids[-N_CTX - 1 :], n_scored, tiny_params), rel=1e-5)


def test_padding_of_the_vocabulary_is_never_the_predicted_word(tiny_params):
    encoder = Encoder(LETTERS | {"Ġa": 256}, [("Ġ", "a")])
    state = module.hidden_states([LETTERS["x"]], **tiny_params, n_head=N_HEAD)[-1]
    table = np.zeros((N_VOCAB, len(state)), np.float32)
    table[256], table[257:] = state, 2 * state  # only padding is more likely than the word
    assert last_words(["x a"], encoder, tiny_params | {"lm_head": table}, N_HEAD)[0].all()


@pytest.mark.parametrize(("lines", "number"), [
    ('{"text": "one two"}\n{"text": "one"}', 2), ('\n{"text": ""}', 2), ("[" * 100_000, 1), ("not JSON", 1),
    ('{"txt": "one two"}', 1), ('["one two"]', 1), ('{"text": 5}', 1),
])  # fmt: skip
def test_a_line_without_a_passage_is_named(tmp_path, lines, number):
    (tmp_path / "passages.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=f"passages.jsonl, line {number} must be JSON like .* two or more words"):
        module.show_last_words(str(tmp_path / "passages.jsonl"))


@pytest.mark.parametrize("texts", [[], ["one two", "one"]])
def test_texts_without_a_last_word_are_refused(tiny_encoder, tiny_params, texts):
    with pytest.raises(ValueError, match="at least one text, and two or more words in each text"):
        last_words(texts, tiny_encoder, tiny_params, N_HEAD)


LINE = "My lord, I will not speak to thee.\n"


def evaluate(*arguments, model=BUNDLED, **options):
    result = run("evaluate.py", *map(str, arguments), f"--model_size={model}", **options)
    assert b"Traceback" not in result.stderr
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def test_a_text_of_two_documents_is_measured(shakespeare):
    encoder, hparams, params = shakespeare
    content = f"{10 * LINE}{END_OF_TEXT}\n{10 * LINE}né\n"
    data = b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode()
    status, out, err = evaluate("-", "--stride", 100, stdin=None, input=data)
    ids = [*encoder.encode(10 * LINE), encoder.eot_id, *encoder.encode(f"\n{10 * LINE}né\n")]
    losses = text_losses(ids, params, hparams["n_head"], 100)
    expected = measures(losses.sum(), len(losses), len(content) + 1, len(content), 162)
    sizes, *lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 5)
    assert sizes == f"{len(ids):,} tokens, {len(content) + 1} bytes, {len(content)} characters, 162 words"
    for line, (name, value) in zip(lines, expected.items(), strict=True):
        assert line.startswith(name)
        assert float(line[len(name) :].replace(",", "")) == pytest.approx(value, abs=6e-4)


def test_bytes_that_are_not_utf8_are_replaced_on_request(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo caf\xe9 three")
    status, out, err = evaluate(tmp_path / "latin.txt", model="no model: the text is read first")
    assert (status, out, "; or use --errors replace" in err) == (1, "", True)
    status, out, _ = evaluate(tmp_path / "latin.txt", "--errors", "replace")
    assert (status, "18 characters" in out) == (0, True)


def test_a_text_of_any_size_takes_the_same_memory(tmp_path, monkeypatch, capsys, shakespeare):
    monkeypatch.setattr(terminal, "PIECE", 2**16)
    monkeypatch.setattr(module, "token_losses", lambda ids, params, n_head, n_scored: np.ones(n_scored))
    monkeypatch.setattr(module, "load_encoder_hparams_and_params", lambda *_: shakespeare)
    (tmp_path / "text").write_text(LINE * 50_000)
    tracemalloc.start()
    module.show_text(str(tmp_path / "text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6, "the ids of the whole text would be 4 MB as a list, its words 20"
    assert "1,750,000 bytes, 1,750,000 characters, 400,000 words" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["text"], "one token has no loss"), (["text", "--errors=ignore"], "errors must be strict or replace"),
    (["text", "--stride=0"], "1 or more, not 0"), (["text", "--stride=257"], "from 1 to 256, not 257"),
    (["choose", "a", "b", ""], "an option is empty"), (["choose", "a", "many words " * 300], "shorten it"),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path, arguments, complaint):
    (tmp_path / "text").write_text("a")
    assert complaint in error_line(run("evaluate.py", *arguments, f"--model_size={BUNDLED}", cwd=tmp_path))


def test_weights_that_are_not_finite_are_reported(tmp_path, tiny_params):
    directory = write_model(tmp_path / "nan", params=tiny_params | {"wpe": np.full_like(tiny_params["wpe"], np.nan)})
    passages = tmp_path / "passages.jsonl"  # also works as a text
    passages.write_text('{"text": "one two"}')
    for arguments in ([passages], ["choose", "a", "b"], ["last_word", passages]):
        status, out, err = evaluate(*arguments, model=directory)
        assert (status, out, "not finite" in err.splitlines()[-1]) == (1, "", True)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_ctrl_c_ends_an_evaluation():
    with start("evaluate.py", "-", f"--model_size={BUNDLED}", "--stride=1", stdin=subprocess.PIPE) as process:
        process.stdin.write(10_000 * LINE.encode())  # more than a pipe holds, so reading has started
        process.stdin.close()
        process.stdin = None
        time.sleep(1)
        out, err = interrupt(process)
    assert (process.returncode, out.strip(), err) == (130, b"", b"")


def test_choose_sorts_the_options_and_shows_their_spaces(shakespeare):
    encoder, hparams, params = shakespeare
    options = ["not", "2019", " --hello", " be", "not speak to thée my lord"]
    status, out, err = evaluate("choose", "My lord, I will", *options)
    rows = [line.split(maxsplit=2) for line in out.splitlines()[1:]]
    scores = option_scores("My lord, I will", options, encoder, params, hparams["n_head"])
    assert (status, err) == (0, "")
    assert [float(row[0]) for row in rows] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)
    assert {row[2][1:-1] for row in rows} == {" not", " 2019", " --hello", " be", " not speak to thée my lord"}
    for total, per_byte, option in rows:
        assert float(per_byte) == pytest.approx(float(total) / len(option[1:-1].encode()), abs=1e-4)
    assert [row[1] for row in rows] != sorted((row[1] for row in rows), key=float, reverse=True)


def test_last_word_counts_right_words(tmp_path):
    path = tmp_path / "passages.jsonl"  # U+2028 does not end a line
    lines = '{"text": "My lord, I will not"}\n\n{"text": "My lord,\u2028I will xylophone"}\n'
    path.write_text(lines, encoding="utf-8")
    status, out, err = evaluate("last_word", path)
    assert (status, err, "50.00%  (1 of 2 last words)" in out) == (0, "", True)


def test_help_shows_the_verbs_and_their_flags():
    out = evaluate("--help")[1]
    for word in ("evaluate.py FILE", "evaluate.py choose", "evaluate.py last_word", "--stride N", "--errors strict"):
        assert word in out


@pytest.mark.reference
@pytest.mark.parametrize("stride", [1, 7, 16, 31])
def test_losses_agree_with_the_guides_loop_over_transformers(tiny_params, stride):
    torch = pytest.importorskip("torch")
    ids, model, total = random_ids(150), reference_model(TINY, tiny_params), 0.0
    tokens = torch.from_numpy(ids)[None]
    for first, end, scored in guide(len(ids), N_CTX, stride):
        labels = tokens[:, first:end].clone()
        labels[:, : -len(scored)] = -100
        with torch.inference_mode():
            total += model(tokens[:, first:end], labels=labels).loss.item() * len(scored)
    assert text_losses(ids, tiny_params, N_HEAD, stride).sum() == pytest.approx(total, rel=1e-5)
