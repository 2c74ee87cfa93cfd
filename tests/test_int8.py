"""int8 weights act like the float32 arrays they replace, and are mapped from a file that is never out of date."""

import json
import os
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2 import generate, gpt2, new_cache
from helpers.models import BUNDLED, TINY, assert_same_params, random_params, write_model
from helpers.processes import as_any_user, error_line, run, run_code
from store.checkpoint import CHECKPOINT_INDEX
from store.params import flatten, map_leaves
from store.tensors import WEIGHTS
from test_shakespeare import HELD_OUT_LOSS, PARAGRAPH, PARAGRAPH_LOSS, nats_per_character, shakespeare_text
from test_utils import STATES
from utils import load_encoder_hparams_and_params

pytest.importorskip("numba", reason="Numba is not installed: pip install -r requirements-fast.txt")

from engine import int8 as module
from engine.int8 import INT8_WEIGHTS, MAX_ROWS, Int8, map_quantized, quantize, quantize_rows

N_HEAD = TINY["n_head"]


@pytest.fixture
def tiny(tmp_path):
    """A model directory to write to, and its weights."""
    directory = write_model(tmp_path / "tiny")
    return directory, load_encoder_hparams_and_params(str(directory))[2]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_row_is_rounded_to_multiples_of_a_127th_of_its_largest_number():
    rows = normal(2000, 30)
    rows[5], rows[6] = 0, 1e-44
    quantized, scale = quantize_rows(rows)
    assert (quantized.dtype, scale.dtype) == (np.int8, np.float32)
    error = np.abs(quantized * scale[:, None] - rows)
    assert np.all(error <= scale[:, None] * 0.5001)
    assert np.array_equal(np.abs(quantized).max(axis=1), np.where(np.isin(np.arange(2000), (5, 6)), 0, 127))
    for rows[1, 2] in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="infinite or NaN"):
            quantize_rows(rows)


@pytest.mark.parametrize("n_out", [1, 7, 8, 300, 1605])
@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (MAX_ROWS,), (MAX_ROWS + 1,), (2, 40)], ids=str)
def test_products_equal_those_of_the_float32_array(n_out, leading):
    w = Int8(*quantize_rows(normal(n_out, 70)), transposed=True)
    x = normal(*leading, 70, seed=1)
    expected = x @ np.asarray(w)
    assert w.shape == (70, n_out)
    assert (x @ w).dtype == np.float32
    np.testing.assert_allclose(x @ w, expected, rtol=0, atol=1e-5 * np.abs(expected).max(initial=0))
    np.testing.assert_allclose(x @ w.T.T, x @ w)


def test_an_embedding_table_can_be_indexed_and_transposed():
    table = normal(300, 48)
    wte = Int8(*quantize_rows(table))
    assert (wte.shape, wte.T.shape, wte.ndim) == ((300, 48), (48, 300), 2)
    ids = np.array([[3, 299], [0, 3]])
    assert (wte[ids].shape, wte[ids].dtype) == ((2, 2, 48), np.float32)
    np.testing.assert_array_equal(wte[ids], np.asarray(wte)[ids])
    np.testing.assert_array_equal(wte.T[2], np.asarray(wte)[:, 2])
    np.testing.assert_allclose(wte[ids], table[ids], atol=np.abs(table).max() / 127)
    np.testing.assert_allclose(normal(2, 300) @ wte, normal(2, 300) @ np.asarray(wte))
    with pytest.raises(ValueError, match="cannot be multiplied"):
        normal(2, 47) @ wte.T


def test_the_model_computes_with_int8_weights(tiny_params):
    quantized = quantize(tiny_params)
    ids = np.random.default_rng(0).integers(0, TINY["n_vocab"], 20)
    assert sum(isinstance(leaf, Int8) for leaf in flatten(quantized, str).values()) == 1 + 4 * TINY["n_layer"]
    logits, expected = (gpt2(ids, **params, n_head=N_HEAD) for params in (quantized, tiny_params))
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - expected).max() < 0.05 * np.ptp(expected)
    cache = new_cache(quantized, N_HEAD, 20)
    steps = [gpt2(ids[i : i + 4], **quantized, n_head=N_HEAD, cache=cache) for i in range(0, 20, 4)]
    np.testing.assert_allclose(np.concatenate(steps), logits, rtol=0, atol=2e-5 * np.ptp(logits))
    assert generate([1, 2], quantized, N_HEAD, 40, n_samples=2) == [generate([1, 2], quantized, N_HEAD, 40)] * 2


@pytest.mark.parametrize(("read", "expected"), [
    (lambda: PARAGRAPH, PARAGRAPH_LOSS),
    pytest.param(lambda: (text := shakespeare_text())[len(text) * 9 // 10 :], HELD_OUT_LOSS, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_loss_of_the_bundled_model_changes_by_less_than_half_a_percent(shakespeare, read, expected):
    encoder, hparams, params = shakespeare
    assert nats_per_character(read(), encoder, hparams, quantize(params)) == pytest.approx(expected, rel=0.005)


def test_the_file_is_written_once_and_then_mapped(tiny, monkeypatch):
    directory, params = tiny
    assert_same_params(map_quantized(directory, params), quantize(params))
    monkeypatch.setattr(module, "save_tensors", lambda *args: pytest.fail("the file is written again"))
    mapped = map_quantized(directory, params)
    assert_same_params(mapped, quantize(params))
    with pytest.raises(ValueError, match="read-only"):
        mapped["wte"].rows[0] = 0


@pytest.mark.parametrize("time_before", [1, 2])
def test_other_weights_replace_the_file_even_if_they_have_the_same_size_and_time(tiny, time_before):
    directory, params = tiny
    os.utime(directory / WEIGHTS, (1, time_before))
    map_quantized(directory, params)
    for changed in flatten(params, str):  # one tensor after another changes its sign, but not its norm
        params = map_leaves(lambda path, array, changed=changed: -array if str(path) == changed else array, params)
        write_model(directory, params=params)
        os.utime(directory / WEIGHTS, (1, 1))
        _, _, mapped = load_encoder_hparams_and_params(str(directory))
        assert_same_params(map_quantized(directory, mapped), quantize(params))


def test_functions_are_compiled_even_without_a_cache_directory(monkeypatch):
    original = module.njit

    def without_cache(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return original(**options | {"parallel": False})  # the function below has no loop to run in parallel

    monkeypatch.setattr(module, "njit", without_cache)
    assert module.compiled(lambda x: x + 1)(2) == 3


def change_tensor(name, change, path):
    tensors, metadata = module.map_tensors(path)
    module.save_tensors(path, tensors | {name: change(tensors[name])}, metadata)


@pytest.mark.parametrize("damage", [
    *(damage for state, damage in STATES.items() if state != "a directory"),
    partial(change_tensor, "wte.weight", lambda rows: rows[:-1]),
    partial(change_tensor, "wte.weight.scale", lambda scale: scale[0]),
    partial(change_tensor, "wte.weight.scale", lambda scale: scale[:, None]),
    partial(change_tensor, "ln_f.bias", lambda bias: bias[:0]),
])  # fmt: skip
def test_a_file_that_is_damaged_or_does_not_fit_is_rebuilt(tiny, damage):
    directory, params = tiny
    map_quantized(directory, params)
    damage(directory / INT8_WEIGHTS)
    assert_same_params(map_quantized(directory, params), quantize(params))
    assert_same_params(module.from_tensors(params, module.map_tensors(directory / INT8_WEIGHTS)[0]), quantize(params))


def test_weights_stay_in_memory_if_the_file_cannot_be_written(tiny, capsys):
    (tiny[0] / INT8_WEIGHTS).mkdir()
    assert_same_params(map_quantized(*tiny), quantize(tiny[1]))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{INT8_WEIGHTS} could not be written" in line


def test_a_file_that_another_process_made_meanwhile_is_used(tiny, monkeypatch):
    directory, params = tiny
    expected = map_quantized(directory, params)
    hidden = (directory / INT8_WEIGHTS).rename(directory / "hidden")
    monkeypatch.setattr(module, "locked", lambda home: nullcontext(hidden.rename(home / INT8_WEIGHTS)))
    monkeypatch.setattr(module, "save_tensors", lambda *args: pytest.fail("the file is written again"))
    assert_same_params(map_quantized(directory, params), expected)


def test_the_file_for_a_read_only_directory_goes_to_the_users_cache(permissions, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    model = write_model(tmp_path / "mine")
    model.chmod(0o555)
    arguments = ("a", f"--model_size={model}", "--quantize=int8", "--n_tokens_to_generate=2")
    times = set()
    for _ in range(2):
        shown = run("gpt2.py", *arguments, preexec_fn=as_any_user)
        assert (shown.returncode, shown.stderr) == (0, b"")
        (path,) = tmp_path.glob(f"cache/gpt2-numpy/*/{INT8_WEIGHTS}")
        times.add(path.stat().st_mtime_ns)
    assert len(times) == 1, "the second process maps the file of the first one"


def test_the_command_line_generates_with_int8(tmp_path, shakespeare):
    model = shutil.copytree(BUNDLED, tmp_path / "shakespeare")
    encoder, hparams, params = shakespeare
    ids = generate(encoder.encode("ROMEO:"), quantize(params), hparams["n_head"], 20)
    for _ in range(2):
        shown = run("gpt2.py", "ROMEO:", f"--model_size={model}", "--n_tokens_to_generate=20", "--quantize=int8")
        assert (shown.returncode, shown.stdout.decode()) == (0, encoder.decode(ids) + "\n")
        assert (model / INT8_WEIGHTS).is_file()


@pytest.mark.parametrize(("kind", "complaint"), [
    ("int4", "quantize must be int8, not 'int4'"), ("int8", "pip install -r requirements-fast.txt"),
])  # fmt: skip
def test_another_kind_or_a_missing_numba_is_explained_in_one_line(tmp_path, kind, complaint):
    (tmp_path / "numba.py").write_text("raise ImportError('not here')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert complaint in error_line(run("gpt2.py", "a", "--model_size=shakespeare", f"--quantize={kind}", env=env))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on POSIX only")
def test_a_process_forked_after_a_product_computes_the_same(tiny_model):
    code = """if True:
        import os, sys, gpt2, utils, numpy as np
        params = utils.load_encoder_hparams_and_params(sys.argv[1], quantize="int8")[2]
        compute = lambda: np.concatenate([gpt2.gpt2(range(n), **params, n_head=4) for n in (1, 20)])
        expected = compute()
        child = os.fork()
        np.testing.assert_allclose(compute(), expected, atol=1e-4)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)
    """
    run_code(code, str(tiny_model), timeout=60)


@pytest.mark.slow
def test_ctrl_c_while_numba_compiles_ends_the_run(tmp_path):
    code = """if True:
        import os, signal, threading, numpy as np
        from engine.int8 import Int8, quantize_rows
        w = Int8(*quantize_rows(np.ones((300, 48), np.float32)), transposed=True)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            np.ones((1, 48), np.float32) @ w
        except KeyboardInterrupt:
            print("stopped")
    """
    assert run_code(code, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}, timeout=60) == "stopped\n"


@pytest.mark.slow
def test_a_checkpoint_becomes_int8_directly_if_the_disk_has_no_room_for_float32(released, tmp_path, monkeypatch, capfd):
    directory = shutil.copytree(released / "124M", tmp_path / "mine")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000))
    for n_made in (1, 0):
        params = load_encoder_hparams_and_params(str(directory), quantize="int8", verify=True)[2]
        assert_same_params(params, quantize(random_params(TINY)))
        assert capfd.readouterr().err.count("only int8 weights are made, because the disk has no room for") == n_made
    assert not (directory / WEIGHTS).exists()
    (directory / "hparams.json").write_text(json.dumps(TINY | {"n_layer": 3}))
    (directory / CHECKPOINT_INDEX).unlink()
    result = run("gpt2.py", "x", f"--model_size={directory}", "--quantize=int8")
    assert f"{INT8_WEIGHTS} does not fit" in error_line(result)
