"""The losses that evaluate.py reports, held to float64 loops over gpt2()'s logits and to PyTorch."""

import copy
import math
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

import evaluate as module
from encoder import END_OF_TEXT, Encoder
from evaluate import last_words, loss, measures, option_scores, text_losses, token_losses, windows
from gpt2 import generate, gpt2
from helpers import (
    BUNDLED,
    ROOT,
    SHAKESPEARE,
    TINY,
    interrupt,
    random_params,
    run,
    tiny_tables,
    write_model,
    write_tables,
)
from utils import load_encoder_hparams_and_params

N_HEAD, N_CTX, N_VOCAB = TINY["n_head"], TINY["n_ctx"], TINY["n_vocab"]


def random_ids(*shape):
    return np.random.default_rng(0).integers(0, N_VOCAB, shape)


def reference_losses(ids, params):
    """-log softmax of gpt2's logits, in float64, with nothing taken from evaluate.py."""
    logits = gpt2(ids[:-1], **params, n_head=N_HEAD).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -log_p[np.arange(len(ids) - 1), ids[1:]]


def with_head(params):
    return params | {"lm_head": random_params(TINY, seed=5)["wte"]}


# The loss of one window


@pytest.mark.parametrize("block", [1, 7, 299, 300, 1024])
@pytest.mark.parametrize("change", [lambda params: params, with_head], ids=["tied", "lm_head"])
def test_token_losses_are_those_of_the_logits(tiny_params, monkeypatch, block, change):
    monkeypatch.setattr(module, "VOCABULARY_BLOCK", block)
    params, ids = change(tiny_params), random_ids(20)
    found = token_losses(ids, params, N_HEAD)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, reference_losses(ids, params), rtol=1e-5)


def test_the_last_losses_are_the_last_of_all(tiny_params):
    ids = random_ids(20)
    np.testing.assert_allclose(token_losses(ids, tiny_params, N_HEAD, 5), token_losses(ids, tiny_params, N_HEAD)[-5:])


def test_leading_axes_broadcast(tiny_params):
    ids = random_ids(2, 3, 10)
    found = token_losses(ids, tiny_params, N_HEAD)
    assert found.shape == (2, 3, 9)
    np.testing.assert_allclose(found[1, 2], reference_losses(ids[1, 2], tiny_params), rtol=1e-5)


def test_loss_is_the_mean_and_a_python_float(tiny_params):
    ids = random_ids(N_CTX + 1)
    found = loss(ids.tolist(), tiny_params, N_HEAD)
    assert type(found) is float
    assert found == pytest.approx(reference_losses(ids, tiny_params).mean(), rel=1e-6)


@pytest.mark.parametrize("factor", [200, -200])
def test_logits_of_thousands_do_not_overflow(tiny_params, factor):
    params, ids = tiny_params | {"wte": tiny_params["wte"] * np.float32(factor)}, random_ids(12)
    found = token_losses(ids, params, N_HEAD)
    assert found.max() > 1000
    np.testing.assert_allclose(found, reference_losses(ids, params), rtol=1e-4, atol=1e-2)


def test_logits_that_grow_and_fall_from_block_to_block_make_no_difference(tiny_params, monkeypatch):
    monkeypatch.setattr(module, "VOCABULARY_BLOCK", 3)
    ids = random_ids(12)
    for order in (1, -1):
        scale = np.linspace(0, 30, N_VOCAB, dtype=np.float32)[::order, None]
        params = tiny_params | {"lm_head": tiny_params["wte"] * scale}
        np.testing.assert_allclose(
            token_losses(ids, params, N_HEAD), reference_losses(ids, params), rtol=1e-4, atol=1e-4
        )


def test_int8_weights_are_measured_too(tiny_params):
    quantize = pytest.importorskip("quantize", reason="Numba is not installed", exc_type=ImportError).quantize
    ids, params = random_ids(20), quantize(tiny_params)
    np.testing.assert_allclose(token_losses(ids, params, N_HEAD), reference_losses(ids, params), rtol=1e-4)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([5], "one token has no loss"),
        ([], "token ids"),
        ([[1], [2]], "one token has no loss"),
        ([1.5, 2.5], "whole numbers"),
        ([1, N_VOCAB], f"from 0 to {N_VOCAB - 1}"),
        ([-1, 2], f"from 0 to {N_VOCAB - 1}"),
        ([1] * (N_CTX + 2), "shorten it"),
    ],
)
def test_what_has_no_loss_is_refused(tiny_params, ids, complaint):
    with pytest.raises(ValueError, match=complaint):
        loss(ids, tiny_params, N_HEAD)


def test_never_more_than_a_block_of_the_logits_is_held():
    hparams = {"n_vocab": 20_000, "n_ctx": 512, "n_embd": 8, "n_head": 2, "n_layer": 1}
    params = random_params(hparams)
    ids = np.random.default_rng(0).integers(0, 20_000, 513)
    tracemalloc.start()
    token_losses(ids, params, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 512 * 20_000 * 4 / 3, "all logits would be 41 MB"


# The windows of a long text


def guide(n_tokens, n_ctx, stride):
    """The windows of Hugging Face's guide, and the tokens that are scored in each."""
    previous = 0
    for start in range(0, n_tokens, stride):
        end = min(start + n_ctx, n_tokens)
        yield start, end, [i for i in range(previous, end) if i > start]
        previous = end
        if end == n_tokens:
            break


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 15, 16, 17, 40])
def test_windows_that_overlap_are_those_of_the_guide(n_tokens, stride):
    found = [(start, end, list(range(end - n, end))) for start, end, n in windows(n_tokens, 8, stride)]
    assert found == list(guide(n_tokens, 8, stride))


@pytest.mark.parametrize("stride", range(1, 9))
@pytest.mark.parametrize("n_tokens", [*range(2, 20), 40])
def test_each_token_but_the_first_is_scored_once_with_enough_context(n_tokens, stride):
    scored, contexts = [], []
    for start, end, n in windows(n_tokens, 8, stride):
        assert 0 < n < end - start <= 9
        scored += range(end - n, end)
        contexts += [i - start for i in range(end - n, end) if start > 0]
    assert scored == list(range(1, n_tokens))
    assert min(contexts, default=8) >= max(1, 8 - stride)


@pytest.mark.parametrize("rows", [1, 100, 4096])
@pytest.mark.parametrize("stride", [None, 1, 10, 31, 32])
def test_the_losses_of_a_long_text_are_those_of_its_windows_in_order(tiny_params, monkeypatch, stride, rows):
    monkeypatch.setattr(module, "ROWS", rows)
    ids = random_ids(90 if stride == 1 else 333)
    expected = [
        reference_losses(ids[start:end], tiny_params)[-n:]
        for start, end, n in windows(len(ids), N_CTX, stride or N_CTX)
    ]
    np.testing.assert_allclose(
        text_losses(ids.tolist(), tiny_params, N_HEAD, stride), np.concatenate(expected), rtol=1e-5
    )


@pytest.mark.parametrize("stride", [0, -1, 33, 1.5, "8", True])
def test_a_stride_outside_the_context_is_refused_with_the_range(tiny_params, stride):
    with pytest.raises(ValueError, match="from 1 to the model's context of 32"):
        text_losses(random_ids(50), tiny_params, N_HEAD, stride)


def test_a_text_is_one_row(tiny_params):
    with pytest.raises(ValueError, match=r"one row of token ids, not an array of the shape \(2, 30\)"):
        text_losses(random_ids(2, 30), tiny_params, N_HEAD)


def test_a_text_of_one_token_has_no_loss(tiny_params):
    with pytest.raises(ValueError, match="one token has no loss"):
        text_losses([5], tiny_params, N_HEAD)


def test_matrix_products_have_their_threads_back_afterwards(tiny_params):
    before = module.n_blas_threads()
    text_losses(random_ids(100), tiny_params, N_HEAD)
    with pytest.raises(ValueError, match="token ids must be"):
        text_losses([*random_ids(100), N_VOCAB], tiny_params, N_HEAD)
    assert module.n_blas_threads() == before


@pytest.mark.slow
def test_the_held_out_loss_of_the_bundled_model_is_what_its_training_said(shakespeare):
    if not SHAKESPEARE.is_file():
        pytest.skip("Shakespeare's text is not here")
    encoder, hparams, params = shakespeare
    text = SHAKESPEARE.read_text(encoding="utf-8")
    text = text[len(text) * 9 // 10 :]
    found = measures(text, text_losses(encoder.encode(text), params, hparams["n_head"]))
    assert found["nats per token"] == pytest.approx(3.3839, abs=1e-4)
    assert found["bits per character"] * math.log(2) == pytest.approx(1.4991, abs=1e-4)


# What a loss comes to


def test_measures_are_per_token_byte_character_and_word():
    text = "née  sans\nmot "  # 14 characters, 15 bytes, 3 words
    found = measures(text, np.array([1.0, 2.0, 3.0, 4.0]))
    assert found == {
        "nats per token": 2.5,
        "perplexity": pytest.approx(math.exp(2.5)),
        "bits per byte": pytest.approx(10 / math.log(2) / 15),
        "bits per character": pytest.approx(10 / math.log(2) / 14),
        "perplexity per word": pytest.approx(math.exp(10 / 3)),
    }


def test_measures_of_white_space_and_of_huge_losses_are_numbers():
    assert measures(" \n", np.array([2.0]))["perplexity per word"] == pytest.approx(math.exp(2))
    assert measures("a b", np.array([5000.0]))["perplexity"] == math.inf


# Multiple choice


@pytest.fixture(scope="module")
def tiny(tiny_encoder):
    """A model whose tokenizer has <|endoftext|> and whose merges cross no space."""
    return tiny_encoder, random_params(TINY, seed=2)


def log_probability(ids, n_scored, params):
    return -reference_losses(np.array(ids), params)[-n_scored:].sum()


def test_an_option_is_scored_after_the_context_and_a_space(tiny):
    encoder, params = tiny
    context, option = encoder.encode("if it"), encoder.encode(" is not")
    found = option_scores("if it", ["is not", " is not", "\nis not"], encoder, params, N_HEAD)
    assert found[0] == pytest.approx(log_probability(context + option, len(option), params), rel=1e-5)
    assert found[1] == found[0]
    newline = encoder.encode("\nis not")
    assert found[2] == pytest.approx(log_probability(context + newline, len(newline), params), rel=1e-5)


def test_a_space_at_the_end_of_the_context_belongs_to_the_options(tiny):
    encoder, params = tiny
    assert encoder.encode("if it is") == encoder.encode("if it") + encoder.encode(" is"), "else this tests nothing"
    found = option_scores("if it ", ["is", "not"], encoder, params, N_HEAD)
    np.testing.assert_allclose(found, option_scores("if it", ["is", "not"], encoder, params, N_HEAD))


def test_without_context_the_options_begin_a_text(tiny):
    encoder, params = tiny
    ids = encoder.encode("not")
    (found,) = option_scores("", ["not"], encoder, params, N_HEAD)
    assert found == pytest.approx(log_probability([encoder.eot_id, *ids], len(ids), params), rel=1e-5)


def test_all_options_are_scored_after_the_same_tokens():
    """Where a merge joins the end of the context and one option, the other one is scored from there too."""
    alphabet = {character: i for character, i in tiny_tables()[0].items() if len(character) == 1}
    encoder = Encoder(alphabet | {"ab": 256, END_OF_TEXT: 257}, [("a", "b")])
    pairs = module.continuations(encoder, "xa", ["xab", "xac"])
    assert pairs == [
        ([alphabet["x"], 256], 1),
        ([alphabet["x"], alphabet["a"], alphabet["c"]], 2),
    ]


def test_what_begins_a_text_need_not_be_what_ends_it(tiny):
    encoder, params = copy.copy(tiny[0]), tiny[1]
    encoder.bos_id, ids = 7, encoder.encode("not")
    (found,) = option_scores("", ["not"], encoder, params, N_HEAD)
    assert found == pytest.approx(log_probability([7, *ids], len(ids), params), rel=1e-5)


@pytest.mark.parametrize(("options", "complaint"), [(["a", ""], "empty"), ([" "], "white space")])
def test_an_empty_option_is_refused(tiny, options, complaint):
    with pytest.raises(ValueError, match=f"an option is .*{complaint}"):
        option_scores("if", options, *tiny, N_HEAD)


def test_no_context_and_nothing_to_begin_with_is_refused(tiny):
    tokens, merges = tiny_tables()
    encoder = Encoder({token: i for token, i in tokens.items() if token != END_OF_TEXT}, merges)
    with pytest.raises(ValueError, match="no context"):
        option_scores("", ["a"], encoder, tiny[1], N_HEAD)


# The last word


def test_a_last_word_is_right_if_greedy_generation_makes_all_its_tokens(shakespeare):
    encoder, hparams, params = shakespeare
    before = "ROMEO:\nI will not"
    text = before + encoder.decode(generate(encoder.encode(before), params, hparams["n_head"], 30))
    passages = [text[: space.start()] for space in re.finditer(r"(?<=[a-z]) ", text) if space.start() > len(before)]
    passages += [f"{passage}ness" for passage in passages]  # of which the first tokens are right
    is_right, log_p = last_words([f"{passage}\n" for passage in passages], encoder, params, hparams["n_head"])
    assert len(passages) > 8
    assert not is_right[len(passages) // 2 :].any()
    for passage, right, found in zip(passages, is_right, log_p, strict=True):
        context, space, word = re.fullmatch(r"(.*\S)(\s+)(\S+)", passage, re.DOTALL).groups()
        expected = encoder.encode(space + word)
        assert right == (generate(encoder.encode(context), params, hparams["n_head"], len(expected)) == expected)
        assert found == pytest.approx(option_scores(context, [space + word], encoder, params, hparams["n_head"])[0])
    assert is_right[: len(passages) // 2].all()


def test_of_a_passage_longer_than_the_context_the_end_counts(tiny):
    encoder, params = tiny
    text = "if not self and other in the list of things is it so " * 8 + "if not"
    ids = encoder.encode(text)
    n_scored = len(encoder.encode(" not"))
    assert len(ids) > N_CTX + 1
    _, (found,) = last_words([text], encoder, params, N_HEAD)
    assert found == pytest.approx(log_probability(ids[-N_CTX - 1 :], n_scored, params), rel=1e-5)


def test_padding_of_the_vocabulary_is_no_likelier_word(tiny_params):
    alphabet = {character: i for character, i in tiny_tables()[0].items() if len(character) == 1}
    encoder = Encoder(alphabet | {"Ġa": 256}, [("Ġ", "a")])
    state = module.hidden_states([alphabet["x"]], **tiny_params, n_head=N_HEAD)[-1]
    table = np.zeros((N_VOCAB, len(state)), np.float32)
    table[256], table[257:] = state, 2 * state  # the word is likeliest, but for padding
    assert last_words(["x a"], encoder, tiny_params | {"lm_head": table}, N_HEAD)[0].all()


def test_a_passage_may_have_a_unicode_line_separator(tmp_path):
    (tmp_path / "passages.jsonl").write_text('{"text": "one\u2028two"}', encoding="utf-8")
    assert module.read_passages(str(tmp_path / "passages.jsonl")) == ["one\u2028two"]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ('{"text": "one two"}\n{"text": "one"}', "line 2: its text has no word before the last one"),
        ('\n{"text": ""}', "line 2: its text"),
        ("not JSON", "line 1: it is not JSON like"),
        ('{"txt": "one two"}', "line 1: it is not JSON like"),
        ('["one two"]', "line 1: it is not JSON like"),
        ('{"text": 5}', "line 1: it is not JSON like"),
        ("[" * 100_000, "line 1: it is not JSON like"),
        ("\n\n", "no passages"),
    ],
)
def test_a_line_that_is_no_passage_is_named(tmp_path, lines, complaint):
    (tmp_path / "passages.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=complaint):
        module.read_passages(str(tmp_path / "passages.jsonl"))


# From the command line


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("My lord, I will not speak to thee.\n" * 20, encoding="utf-8")
    return tmp_path / "text.txt"


def evaluate(*arguments, **options):
    result = run("evaluate.py", *map(str, arguments), **options)
    assert b"Traceback" not in result.stderr
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def test_a_text_is_measured(text, shakespeare):
    encoder, hparams, params = shakespeare
    status, out, err = evaluate(text, "--model_size", BUNDLED, "--stride", 100)
    content = text.read_text()
    losses = text_losses(encoder.encode(content), params, hparams["n_head"], 100)
    sizes, *lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 5)
    assert sizes == f"{len(losses) + 1:,} tokens, {len(content)} bytes, {len(content)} characters, 160 words"
    for line, (name, value) in zip(lines, measures(content, losses).items(), strict=True):
        assert line.startswith(name)
        assert float(line[len(name) :].replace(",", "")) == pytest.approx(value, abs=6e-4)


def test_standard_input_and_lines_of_windows_are_the_same_text(text):
    expected = evaluate(text, "--model_size", BUNDLED)
    data = b"\xef\xbb\xbf" + text.read_bytes().replace(b"\n", b"\r\n")
    assert evaluate("-", "--model_size", BUNDLED, stdin=None, input=data) == expected


def test_documents_are_separated_by_the_end_of_text(tmp_path, shakespeare):
    encoder = shakespeare[0]
    (tmp_path / "two.txt").write_text(f"My lord.{END_OF_TEXT}My lord.")
    _, out, _ = evaluate(tmp_path / "two.txt", "--model_size", BUNDLED)
    assert out.startswith(f"{2 * len(encoder.encode('My lord.')) + 1} tokens")


def test_bytes_that_are_no_text_are_placed_and_replaced_on_demand(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\ntwo caf" + b"\xe9 three")
    status, out, err = evaluate(path, "--model_size", BUNDLED)
    assert (status, out) == (1, "")
    assert "byte 0xe9 at offset 11, in line 2" in err
    assert "--errors replace" in err
    status, out, _ = evaluate(path, "--model_size", BUNDLED, "--errors", "replace")
    assert (status, "18 characters" in out) == (0, True)


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        ("", [], "is empty"),
        ("a", [], "one token has no loss"),
        ("abc", ["--stride", "0"], "a whole number from 1 on, not 0"),
        ("abc", ["--stride", "257"], "from 1 to the model's context of 256"),
        ("abc", ["--stride", "much"], "a whole number from 1 on, not 'much'"),
        ("abc", ["--stride=nan"], "a whole number from 1 on, not nan"),
        ("abc", ["--errors", "ignore"], "errors must be strict or replace"),
        ("abc", ["--model_size", "nothing"], "there is no model 'nothing'"),
        (None, [], "No such file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, content, options, complaint):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    model = [] if "--model_size" in options else ["--model_size", BUNDLED]
    status, out, err = evaluate(path, *options, *model)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert complaint in err


def test_a_vocabulary_that_does_not_fit_its_tokenizer_is_refused(tmp_path, text):
    directory = write_model(tmp_path / "odd", {**TINY, "n_vocab": 290}, n_tokens=300)
    status, _, err = evaluate(text, "--model_size", directory)
    assert (status, "encoder.json has 300 tokens, but n_vocab in hparams.json is 290" in err) == (1, True)


def test_weights_that_are_no_numbers_are_said_to_be_damaged(tmp_path, text, tiny_params):
    params = tiny_params | {"wpe": np.full_like(tiny_params["wpe"], np.nan)}
    directory = write_model(tmp_path / "nan", TINY, params)
    (tmp_path / "passages.jsonl").write_text('{"text": "one two"}')
    for arguments in ([text], ["choose", "a", "b"], ["last_word", tmp_path / "passages.jsonl"]):
        status, out, err = evaluate(*arguments, "--model_size", directory)
        assert (status, out) == (1, "")
        assert "not finite" in err.splitlines()[-1]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_ctrl_c_ends_an_evaluation_of_many_windows(tmp_path):
    (tmp_path / "long.txt").write_text("My lord, I will not speak to thee.\n" * 10_000)
    with subprocess.Popen(
        [sys.executable, ROOT / "evaluate.py", tmp_path / "long.txt", f"--model_size={BUNDLED}", "--stride=1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        time.sleep(3)
        out, err = interrupt(process)
    assert (process.returncode, out.strip(), err) == (130, b"", b"")


def test_choose_sorts_the_options_and_shows_them_as_they_were_scored(shakespeare):
    encoder, hparams, params = shakespeare
    options = ["not", "2019", "--hello", " be", "not speak to thée my lord"]
    status, out, err = evaluate("choose", "My lord, I will", *options, "--model_size", BUNDLED)
    rows = [line.split(maxsplit=2) for line in out.splitlines()[1:]]
    assert (status, err) == (0, "")
    scores = option_scores("My lord, I will", options, encoder, params, hparams["n_head"])
    assert [float(row[0]) for row in rows] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)
    assert {row[2][1:-1] for row in rows} == {" not", " 2019", " --hello", " be", " not speak to thée my lord"}
    for total, per_byte, option in rows:
        assert float(per_byte) == pytest.approx(float(total) / len(option[1:-1].encode()), abs=1e-4)
    assert [row[1] for row in rows] != sorted((row[1] for row in rows), key=float, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a"], "OPTIONS is missing"),
        (["a", "b", ""], "an option is empty"),
        (["a", "b", "--model_siz", "x"], "did you mean --model_size?"),
        (["a", "many words " * 300], "shorten it"),
    ],
)
def test_choose_refuses_bad_input_in_a_line(arguments, complaint):
    status, out, err = evaluate("choose", *arguments, "--model_size", BUNDLED)
    assert (status, out, complaint in err.splitlines()[0]) == (1, "", True)


def test_last_word_counts_what_is_right(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text('{"text": "My lord, I will not"}\n\n{"text": "My lord, I will xylophone"}\n')
    status, out, err = evaluate("last_word", path, "--model_size", BUNDLED)
    assert (status, err) == (0, "")
    assert "50.00%  (1 of 2 last words)" in out


def test_help_shows_the_verbs_and_the_flags_of_the_first():
    status, out, _ = evaluate("--help")
    assert status == 0
    for word in ("evaluate.py FILE", "evaluate.py choose", "evaluate.py last_word", "--stride N", "--errors strict"):
        assert word in out
    assert "CONTEXT OPTIONS ..." in evaluate("choose", "--help")[1]


# PyTorch


@pytest.mark.reference
@pytest.mark.parametrize("stride", [1, 7, 16, 31])
def test_perplexity_is_that_of_the_guides_loop_over_transformers(tmp_path, stride):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": N_VOCAB, "n_positions": N_CTX, "n_embd": 48, "n_head": 4, "n_layer": 2}
    config = transformers.GPT2Config(**shape, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = random_ids(150)
    tokens, total, n_scored = torch.from_numpy(ids)[None], 0.0, 0
    for start, end, scored in guide(len(ids), N_CTX, stride):
        labels = tokens[:, start:end].clone()
        labels[:, : -len(scored)] = -100
        with torch.inference_mode():
            total += model(tokens[:, start:end], labels=labels).loss.item() * len(scored)
        n_scored += len(scored)
    model.save_pretrained(tmp_path)
    write_tables(tmp_path)
    (tmp_path / "encoder.json").rename(tmp_path / "vocab.json")
    (tmp_path / "vocab.bpe").rename(tmp_path / "merges.txt")
    found = text_losses(ids, load_encoder_hparams_and_params(str(tmp_path))[2], N_HEAD, stride)
    assert len(found) == n_scored
    assert found.mean() == pytest.approx(total / n_scored, rel=1e-5)
