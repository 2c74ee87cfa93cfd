"""Released models are downloaded, converted and found again, whatever the state of their directory."""

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2 import generate
from helpers.faulty_server import Answer
from helpers.models import TINY, assert_same_params, flip_bit, write_checkpoint, write_model, write_tables
from helpers.processes import as_any_user, error_line, run, start
from store import checkpoint, download
from store.checkpoint import CHECKPOINT_DATA, CHECKPOINT_FILES, CHECKPOINT_INDEX, fetch, is_current, is_offline
from store.files import digest, temporary_of
from store.tensors import WEIGHTS, map_tensors, save_tensors
from utils import load_encoder_hparams_and_params

TABLES = ("encoder.json", "vocab.bpe")
ALL_FILES = (*TABLES, "hparams.json", *CHECKPOINT_FILES)
COMPLETE = {*ALL_FILES, WEIGHTS, ".lock"}
N_DATA_BYTES = 290_304
ARGUMENTS = ("Hello", "--n_tokens_to_generate=4", "--models_dir=models")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def mine(released, tmp_path):
    """A directory with a checkpoint that tests name by its path."""
    return shutil.copytree(released / "124M", tmp_path / "mine")


@pytest.fixture
def fetched(mirror, tmp_path):
    """The directory of a released model that was downloaded but not converted."""
    directory = tmp_path / "models" / "124M"
    fetch(directory, ALL_FILES, N_DATA_BYTES)
    mirror.requests.clear()
    return directory


def params_of(name, models_dir="models"):
    return load_encoder_hparams_and_params(str(name), str(models_dir))[2]


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_a_released_model_is_downloaded_converted_and_mapped(mirror, tmp_path, tiny_params, capfd):
    models = tmp_path / "a[x]*"  # which TensorFlow would take for a pattern
    encoder, hparams, params = load_encoder_hparams_and_params("124M", str(models))
    assert (hparams, encoder.decode(encoder.encode("héllo"))) == (TINY, "héllo")
    assert_same_params(params, tiny_params)
    assert sorted(mirror.paths()) == sorted(f"/124M/{file}" for file in ALL_FILES)
    assert names(models / "124M") == COMPLETE
    assert capfd.readouterr().err.count("would free") == 1, "how much space deleting the checkpoint frees"
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (models / "124M").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}, "those who can read new files can read these"

    for file in CHECKPOINT_FILES:
        (models / "124M" / file).unlink()
    assert_same_params(params_of("124M", models), params)
    assert len(mirror.paths()) == len(ALL_FILES), "with converted weights, no checkpoint files are needed"


def test_only_what_is_missing_or_cut_short_is_downloaded_again(mirror, fetched, tiny_params):
    (fetched / "vocab.bpe").unlink()
    (fetched / CHECKPOINT_INDEX).unlink()
    os.truncate(fetched / CHECKPOINT_DATA, 1000)
    assert_same_params(params_of("124M", fetched.parent), tiny_params)
    assert sorted(mirror.paths()) == [f"/124M/{CHECKPOINT_DATA}", f"/124M/{CHECKPOINT_INDEX}", "/124M/vocab.bpe"]


@pytest.mark.parametrize(("obstacle", "complaint"), [
    (lambda mine, _: os.truncate(mine / CHECKPOINT_DATA, 1000), "has 1,000 bytes, where hparams.json implies 290,304"),
    (lambda mine, _: (mine / WEIGHTS).mkdir(), f"mine/{WEIGHTS} is a directory, where a file belongs: remove it"),
    (lambda _, patch: patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1234)),
     "mine/model.safetensors needs 290,304 bytes, but there are only 1,234 free: make room"),
    (lambda _, patch: patch.setattr("importlib.util.find_spec", lambda name: None), "pip install tensorflow"),
])  # fmt: skip
def test_a_conversion_that_cannot_succeed_is_not_started(mine, monkeypatch, obstacle, complaint):
    obstacle(mine, monkeypatch)
    monkeypatch.setattr(checkpoint.subprocess, "run", lambda *args, **options: pytest.fail("it starts"))
    with pytest.raises((ValueError, OSError, ImportError), match=complaint):
        params_of(mine)
    assert not any(path.is_file() for path in mine.glob(f"{WEIGHTS}*"))


def test_without_tensorflow_no_weights_are_downloaded(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"pip install tensorflow, or copy {WEIGHTS} from a machine that"):
        params_of("124M", tmp_path)
    assert sorted(mirror.paths()) == ["/124M/encoder.json", "/124M/hparams.json", "/124M/vocab.bpe"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change", "complaint"), [
    ("model/wpe", lambda name, a: {name: a + np.float32([np.nan] + [0] * 47)}, "model/wpe holds numbers that are inf"),
    ("model/h1/mlp/c_fc/b", lambda name, a: {name: a + np.float32(np.inf)}, "model/h1/mlp/c_fc/b holds numbers"),
    ("model/h0/attn/c_attn/w", lambda name, a: {name: a.swapaxes(1, 2)},
     r"model/h0/attn/c_attn/w has the shape \[144, 48\]"),
    ("model/ln_f/g", lambda name, a: {name: a.view(np.int32)}, "model/ln_f/g has the type int32"),
    ("model/ln_f/b", lambda name, a: {"model/other": a}, "model/ln_f/b is missing; model/other is not part"),
])  # fmt: skip
def test_a_bad_tensor_in_a_checkpoint_is_named(tmp_path, tiny_tensors, name, change, complaint):
    others = {other: array for other, array in tiny_tensors.items() if other != name}
    directory = write_checkpoint(tmp_path / "bad", others | change(name, tiny_tensors[name]))
    with pytest.raises(ValueError, match=complaint):
        params_of(directory)
    assert not list(directory.glob("*safetensors*"))


def test_a_released_table_must_have_the_right_sha256(mirror, tmp_path, monkeypatch, capsys):
    """Always from the original server. A mirror may have its own tables, but not others of the released length."""
    tables = {name: mirror.files[f"/124M/{name}"] for name in TABLES}
    known = {name: (len(table), hashlib.sha256(table).hexdigest()) for name, table in tables.items()}
    monkeypatch.setattr(checkpoint, "RELEASED_TABLES", known)
    mirror.files["/124M/vocab.bpe"] = changed = tables["vocab.bpe"].replace(b"e r\n", b"r e\n")
    with pytest.raises(OSError, match=r"/124M/vocab.bpe: its SHA-256 is not that of the released file, twice"):
        fetch(tmp_path / "124M", TABLES)
    assert capsys.readouterr().err.count("removed and downloaded once more") == 1
    assert names(tmp_path / "124M") == {"encoder.json", ".lock"}

    mirror.files["/124M/vocab.bpe"] = changed + b"\n"
    fetch(tmp_path / "124M", TABLES)
    (tmp_path / "124M" / "vocab.bpe").unlink()
    monkeypatch.setattr(checkpoint, "BASE_URL", mirror.url)
    with pytest.raises(OSError, match="SHA-256"):
        fetch(tmp_path / "124M", TABLES)
    mirror.answers = [Answer(body=b"damaged"), Answer(body=tables["vocab.bpe"])]
    fetch(tmp_path / "124M", TABLES)
    assert (tmp_path / "124M" / "vocab.bpe").read_bytes() == tables["vocab.bpe"]


@pytest.mark.parametrize(("file", "body"), [
    *product(("encoder.json", "hparams.json"), (b"", b"{}", b"[1, 2]", b"<html>log in</html>", bytes(range(256)))),
    *product(("vocab.bpe",), (b"{}", b"a b c\n", b"\xff \xfe")),
])  # fmt: skip
def test_a_response_that_cannot_be_the_file_is_downloaded_once_more(mirror, tmp_path, file, body):
    mirror.answers = [Answer(body=body)]
    fetch(tmp_path / "124M", [file])
    assert ((tmp_path / "124M" / file).read_bytes(), len(mirror.requests)) == (mirror.files[f"/124M/{file}"], 2)


def test_weights_that_do_not_fit_a_damaged_hparams_name_it(mirror, tmp_path):
    directory = tmp_path / "124M"
    fetch(directory, [*TABLES, "hparams.json"])
    (directory / "hparams.json").write_text(json.dumps(TINY | {"n_layer": 3}))
    with pytest.raises(OSError, match=r"403,392 are expected, .* from .*124M/hparams.json: if that is damaged, delete"):
        params_of("124M", tmp_path)
    assert not (directory / CHECKPOINT_DATA).exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", [CHECKPOINT_DATA, CHECKPOINT_INDEX])
def test_a_download_that_tensorflow_finds_damaged_is_repeated(mirror, tmp_path, tiny_params, capfd, file):
    data = mirror.files[f"/124M/{file}"]
    bad = flip_bit(data, 4 * len(data))
    mirror.answers = [Answer(body=bad if name == file else None) for name in ALL_FILES]  # in the order they come in
    assert_same_params(params_of("124M", tmp_path), tiny_params)
    assert capfd.readouterr().err.count("is damaged: get both again: they are removed and downloaded once more") == 1
    assert Counter(mirror.paths())[f"/124M/{file}"] == 2


@pytest.mark.parametrize("why", ["offline", "read-only", "named by path", "named by path, a garbled index"])
def test_a_damaged_checkpoint_that_cannot_be_fetched_again_stays(mirror, tmp_path, fetched, cache, request, why):
    options, flags = {"cwd": tmp_path}, {"offline": ["--offline"], "read-only": []}
    file = CHECKPOINT_INDEX if why.endswith("index") else CHECKPOINT_DATA
    data = (fetched / file).read_bytes()
    (fetched / file).write_bytes(b"garbage" if why.endswith("index") else flip_bit(data, 4 * N_DATA_BYTES))
    before = {path.name: path.read_bytes() for path in fetched.iterdir()}
    if why == "read-only":
        request.getfixturevalue("permissions")
        fetched.chmod(0o555)
        options["preexec_fn"] = as_any_user
    result = run("gpt2.py", "Hello", *flags.get(why, [f"--model_size={fetched}"]), **options)
    assert (result.returncode, result.stdout) == (1, b"")
    progress, line = result.stderr.decode().splitlines()
    checksum = "" if why.endswith("index") else ".*[Cc]hecksum"
    damaged = f"{CHECKPOINT_INDEX} or {CHECKPOINT_DATA} is damaged: get both again"
    assert "converting" in progress
    assert re.match(rf"gpt2\.py: .*124M: the checkpoint could not be converted: {checksum}.*{damaged}$", line)
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == before
    assert mirror.requests == []


@pytest.mark.parametrize("failure", ["raise ImportError('another NumPy')", "raise TypeError('protobuf')", "1 / 0"])
def test_a_broken_tensorflow_is_no_reason_to_remove_the_checkpoint(mirror, tmp_path, fetched, failure):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(failure)
    result = run("gpt2.py", "Hello", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    *_, line = result.stderr.decode().splitlines()
    assert "could not be converted" in line and "damaged" not in line
    assert (result.returncode, mirror.requests) == (1, [])


@pytest.mark.parametrize("n_there", [0, 100_000])
def test_without_room_for_weights_and_conversion_nothing_is_downloaded(mirror, tmp_path, monkeypatch, n_there):
    directory, needed = tmp_path / "124M", 2 * N_DATA_BYTES - n_there
    write_tables(directory)
    (directory / f"{CHECKPOINT_DATA}.part").write_bytes(bytes(n_there))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match=f"needs {needed:,} bytes, but there are only {needed - 1:,} free: make room"):
        params_of("124M", tmp_path)
    assert mirror.requests == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    params_of("124M", tmp_path)


@pytest.mark.parametrize("switch", ["--offline", "1", "true"])
def test_offline_never_touches_the_network_and_names_the_missing_file(mirror, tmp_path, monkeypatch, switch):
    directory = write_model(tmp_path / "models" / "124M")
    arguments = [*ARGUMENTS, switch] if switch == "--offline" else ARGUMENTS
    monkeypatch.setenv("GPT2_OFFLINE", "" if switch == "--offline" else switch)
    assert run("gpt2.py", *arguments, cwd=tmp_path).returncode == 0
    for file, missing in ((WEIGHTS, "checkpoint"), ("vocab.bpe", "vocab.bpe")):
        (directory / file).unlink()
        line = error_line(run("gpt2.py", *arguments, cwd=tmp_path))
        assert f"124M/{missing} is missing or incomplete; this run is offline. The bundled model needs no netw" in line
    assert mirror.requests == []


def test_offline_can_be_switched_off(monkeypatch):
    for value in ("", "0", "false", "No", "off"):
        monkeypatch.setenv("GPT2_OFFLINE", value)
        assert not is_offline()


def test_processes_that_start_at_once_do_the_work_once(mirror, tmp_path, tiny_params, tiny_encoder):
    processes = [start("gpt2.py", *ARGUMENTS, cwd=tmp_path, text=True) for _ in range(4)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert sum("converting" in errors for _, errors in results) == 1
    assert "models/124M: waiting for another process, which is writing it ..." in str(results)
    again = run("gpt2.py", *ARGUMENTS, cwd=tmp_path, text=True)
    assert (again.stderr, set(Counter(mirror.paths()).values())) == ("", {1})
    ids = generate(tiny_encoder.encode("Hello"), tiny_params, TINY["n_head"], 4)
    expected = tiny_encoder.decode(ids) + "\n"
    assert {again.stdout, *(printed for printed, _ in results)} == {expected}


def test_weights_that_another_process_makes_meanwhile_are_used(mine, monkeypatch):
    monkeypatch.setattr(checkpoint, "convert_checkpoint", lambda *arguments: pytest.fail("it converts once more"))
    made = (mine / WEIGHTS, {"a": np.zeros(1, np.float32)}, {CHECKPOINT_INDEX: digest(mine / CHECKPOINT_INDEX).hex()})
    monkeypatch.setattr(checkpoint, "locked", lambda home: nullcontext(save_tensors(*made)))
    assert checkpoint.find_weights(mine, N_DATA_BYTES, released=False) == mine / WEIGHTS


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_process_that_is_killed_leaves_what_it_has_and_no_lock(mirror, tmp_path):
    n, part = download.CHUNK, tmp_path / "models" / "124M" / f"{CHECKPOINT_DATA}.part"
    mirror.answers = [Answer()] * 6 + [Answer(stop_after=n, then="stall")]
    first, deadline = start("gpt2.py", *ARGUMENTS, cwd=tmp_path), time.monotonic() + 60
    while not part.is_file() or part.stat().st_size < n:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = start("gpt2.py", *ARGUMENTS, cwd=tmp_path)
    assert b"waiting for another process" in second.stderr.readline()
    first.kill()
    printed, errors = second.communicate(timeout=60)
    first.communicate()
    assert (second.returncode, bool(printed)) == (0, True), errors
    assert mirror.ranges()[-1] == f"bytes={n}-"
    assert names(part.parent) == COMPLETE


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
def test_a_conversion_ends_with_the_process_that_waits_for_it(tmp_path):
    write_tables(tmp_path)
    (tmp_path / CHECKPOINT_INDEX).touch()
    (tmp_path / CHECKPOINT_DATA).write_bytes(bytes(N_DATA_BYTES))
    slow = f"import os, time; open({str(tmp_path / 'id')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    (tmp_path / "tensorflow.py").write_text(slow)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process, deadline = start("gpt2.py", "x", f"--model_size={tmp_path}", env=env), time.monotonic() + 60
    while not (tmp_path / "id").is_file() or not (tmp_path / "id").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    child = Path("/proc", (tmp_path / "id").read_text(), "cmdline")
    while child.is_file() and child.read_bytes():  # it is empty once the process has ended
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("seconds", [-100, 0, 100], ids=["older", "equal", "newer"])
@pytest.mark.parametrize("made_of", ["it", "another", "unknown"])
def test_weights_are_used_if_they_were_converted_from_the_present_checkpoint(tmp_path, seconds, made_of):
    index, weights = tmp_path / CHECKPOINT_INDEX, tmp_path / WEIGHTS
    index.write_bytes(b"an index")
    notes = {"it": {CHECKPOINT_INDEX: digest(index).hex()}, "another": {CHECKPOINT_INDEX: "0" * 64}}
    save_tensors(weights, {"a": np.zeros(1, np.float32)}, notes.get(made_of, {}))
    os.utime(weights, (0, index.stat().st_mtime + seconds))
    if made_of == "unknown" and seconds < 0:
        with pytest.raises(ValueError, match=rf"{WEIGHTS} is older .*{CHECKPOINT_INDEX} .*: delete one of the two"):
            is_current(weights, tmp_path)
    else:
        assert is_current(weights, tmp_path) is (made_of != "another")
    index.unlink()
    assert is_current(weights, tmp_path), "without an index there is nothing to compare"
    assert not is_current(weights, tmp_path / "another"), "weights in a cache need an index"


@pytest.mark.slow
def test_another_checkpoint_is_converted_again_and_leftovers_are_removed(tmp_path, tiny_tensors, tiny_params):
    changed = tiny_tensors | {"model/ln_f/b": tiny_tensors["model/ln_f/b"] + 1}
    directory = write_checkpoint(tmp_path / "mine", tiny_tensors)
    temporary_of(directory / WEIGHTS).write_bytes(b"half of it")
    assert_same_params(params_of(directory), tiny_params)
    assert names(directory) == COMPLETE
    write_checkpoint(directory, changed)
    os.utime(directory / CHECKPOINT_INDEX, (0, 0))
    np.testing.assert_array_equal(params_of(directory)["ln_f"]["b"], tiny_params["ln_f"]["b"] + 1)
    assert map_tensors(directory / WEIGHTS)[1]["format"] == "pt"


def test_a_checkpoint_in_a_read_only_directory_is_converted_into_the_users_cache(permissions, mine, cache):
    before = names(mine)
    mine.chmod(0o555)
    first, second = (run("gpt2.py", *ARGUMENTS, f"--model_size={mine}", preexec_fn=as_any_user) for _ in range(2))
    assert (first.returncode, second.returncode, second.stderr) == (0, 0, b""), first.stderr
    assert first.stdout == second.stdout
    assert names(mine) == before
    assert len(list(cache.glob(f"gpt2-numpy/*/{WEIGHTS}"))) == 1


@pytest.mark.parametrize(("file", "mode", "complaint"), [
    (".", 0o555, r"cache/gpt2-numpy\S* cannot be written \(Permission denied\)"),
    *((file, 0, f"{file} cannot be read: Permission denied") for file in (CHECKPOINT_INDEX, CHECKPOINT_DATA)),
])  # fmt: skip
def test_a_file_that_cannot_be_written_or_read_is_named(permissions, mine, cache, file, mode, complaint):
    cache.mkdir(mode=0o555)
    (mine / file).chmod(mode)
    assert re.search(complaint, error_line(run("gpt2.py", "x", f"--model_size={mine}", preexec_fn=as_any_user)))


def test_a_read_only_model_works_if_it_is_complete(permissions, mirror, tmp_path):
    directory = write_model(tmp_path / "models" / "124M")
    directory.chmod(0o555)
    result = run("gpt2.py", *ARGUMENTS, cwd=tmp_path, preexec_fn=as_any_user)
    assert (result.returncode, result.stderr) == (0, b"")
    directory.chmod(0o755)
    (directory / "vocab.bpe").unlink()
    directory.chmod(0o555)
    refused = run("gpt2.py", *ARGUMENTS, cwd=tmp_path, preexec_fn=as_any_user)
    assert "models/124M cannot be written (Permission denied)" in error_line(refused)


def test_dangling_links_of_a_released_model_become_files(mirror, tmp_path, tiny_params):
    (tmp_path / "124M").mkdir()
    for file in (*ALL_FILES, WEIGHTS):
        (tmp_path / "124M" / file).symlink_to(tmp_path / "nowhere" / file)
    assert_same_params(params_of("124M", tmp_path), tiny_params)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("place", "make", "complaint"), [
    ("models/124M", Path.touch, "124M is not a directory: remove it"),
    ("models/124M", lambda path: path.symlink_to("nowhere"), "124M is not a directory: remove it"),
    ("models", Path.touch, "models/124M cannot be written"),
    *((f"models/124M/{file}", Path.mkdir, f"124M/{file} is a directory, where a file belongs: remove it")
      for file in (*TABLES, "hparams.json", CHECKPOINT_INDEX, CHECKPOINT_DATA)),
])  # fmt: skip
def test_a_directory_in_the_place_of_a_file_or_a_file_in_its_place_is_named(mirror, tmp_path, place, make, complaint):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    make(tmp_path / place)
    with pytest.raises(OSError, match=complaint):
        params_of("124M", tmp_path / "models")
