"""Released models: downloaded, converted and found again, in whatever state their directory is."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import checkpoint
import download
import utils
from checkpoint import CHECKPOINT_DATA, CHECKPOINT_FILES, fetch, find_weights, identify, is_current
from faulty_server import Answer
from files import homes_of, locked
from helpers import ROOT, TINY, as_any_user, assert_same_params, run, write_checkpoint, write_model
from utils import CHECKPOINT_INDEX, WEIGHTS, find_model, load_encoder_hparams_and_params, map_tensors, save_tensors

TABLES = ("encoder.json", "vocab.bpe")
ALL_FILES = {*TABLES, "hparams.json", *CHECKPOINT_FILES}
N_DATA_BYTES = 290_304


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / "gpt2.py"), "Hello", "--n_tokens_to_generate=4", *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# The whole path of a released model


def test_a_released_model_is_downloaded_converted_and_mapped(mirror, tmp_path, tiny_params, capfd):
    encoder, hparams, params = load_encoder_hparams_and_params("124M", str(tmp_path / "models"))
    directory = tmp_path / "models" / "124M"
    assert hparams == TINY
    assert encoder.decode(encoder.encode("héllo")) == "héllo"
    assert_same_params(params, tiny_params)
    assert sorted(mirror.paths()) == sorted(f"/124M/{file}" for file in ALL_FILES)
    assert {path.name for path in directory.iterdir()} == ALL_FILES | {"model.safetensors", ".lock"}
    assert capfd.readouterr().err.count("would free") == 1, "how much space deleting the checkpoint frees"

    for file in CHECKPOINT_FILES:
        (directory / file).unlink()
    again = load_encoder_hparams_and_params("124M", str(tmp_path / "models"))[2]
    assert_same_params(again, params)
    assert len(mirror.paths()) == len(ALL_FILES), "checkpoint files are not missed where converted weights are there"


def test_the_converted_file_has_hugging_faces_names_and_shapes(mirror, tmp_path):
    load_encoder_hparams_and_params("124M", str(tmp_path))
    shapes = {name: array.shape for name, array in load_file(tmp_path / "124M" / "model.safetensors").items()}
    assert shapes["wte.weight"] == (300, 48)
    assert shapes["h.1.attn.c_attn.weight"] == (48, 144)
    assert shapes["h.0.mlp.c_proj.bias"] == (48,)
    assert shapes["ln_f.weight"] == (48,)
    assert len(shapes) == 2 + 12 * TINY["n_layer"] + 2


def test_only_what_is_missing_is_downloaded(mirror, tmp_path):
    load_encoder_hparams_and_params("124M", str(tmp_path))
    for file in ("vocab.bpe", "model.safetensors", "model.ckpt.index"):
        (tmp_path / "124M" / file).unlink()
    mirror.requests.clear()
    load_encoder_hparams_and_params("124M", str(tmp_path))
    assert sorted(mirror.paths()) == ["/124M/model.ckpt.index", "/124M/vocab.bpe"]


def test_weights_that_were_cut_short_are_downloaded_again(mirror, tmp_path, tiny_params):
    load_encoder_hparams_and_params("124M", str(tmp_path))
    (tmp_path / "124M" / "model.safetensors").unlink()
    os.truncate(tmp_path / "124M" / CHECKPOINT_DATA, 1000)
    assert_same_params(load_encoder_hparams_and_params("124M", str(tmp_path))[2], tiny_params)


def test_tensorflow_is_not_imported_by_the_program(mirror, tmp_path):
    code = """if True:
        import sys, utils
        utils.load_encoder_hparams_and_params("124M", sys.argv[1])
        assert "tensorflow" not in sys.modules, "while converting"
        if "--converted" in sys.argv:
            late = {"tensorflow", "requests", "tqdm", "fire", "download", "safetensors.numpy"}
            late |= {"filelock", "platformdirs"}
            assert not late & set(sys.modules), late & set(sys.modules)
    """
    for flags in ([], ["--converted"]):
        command = [sys.executable, "-c", code, str(tmp_path), *flags]
        subprocess.run(command, check=True, cwd=Path(utils.__file__).parent)


# Converting


def test_without_tensorflow_one_line_says_what_to_install(released, monkeypatch):
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tensorflow"):
        load_encoder_hparams_and_params(str(released / "124M"))
    assert not (released / "124M" / "model.safetensors").exists()


def test_without_tensorflow_no_weights_are_downloaded(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"pip install tensorflow, or copy {WEIGHTS} from where it was converted"):
        load_encoder_hparams_and_params("124M", str(tmp_path))
    assert sorted(mirror.paths()) == ["/124M/encoder.json", "/124M/hparams.json", "/124M/vocab.bpe"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        (
            "model/wpe",
            lambda a: np.where(np.arange(48) == 7, np.float32(np.nan), a),
            "model/wpe holds numbers that are infinite",
        ),
        ("model/h1/mlp/c_fc/b", lambda a: a + np.float32(np.inf), "model/h1/mlp/c_fc/b holds numbers"),
        ("model/h0/attn/c_attn/w", lambda a: a.swapaxes(1, 2), r"model/h0/attn/c_attn/w has the shape \[144, 48\]"),
        ("model/ln_f/g", lambda a: a.view(np.int32), "model/ln_f/g has the type int32"),
    ],
)
def test_a_bad_tensor_in_a_checkpoint_is_named(tmp_path, tiny_tensors, name, change, complaint):
    directory = write_checkpoint(tmp_path / "bad", tiny_tensors | {name: change(tiny_tensors[name])})
    with pytest.raises(ValueError, match=complaint):
        load_encoder_hparams_and_params(str(directory))
    assert not list(directory.glob("*safetensors*"))


@pytest.mark.slow
def test_missing_and_surplus_tensors_in_a_checkpoint_are_named(tmp_path, tiny_tensors):
    tensors = dict(tiny_tensors)
    tensors["model/other"] = tensors.pop("model/ln_f/b")
    directory = write_checkpoint(tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match=r"model/ln_f/b is missing; model/other is not part"):
        load_encoder_hparams_and_params(str(directory))


def test_a_checkpoint_of_the_wrong_length_is_refused_before_tensorflow_starts(tmp_path, released):
    directory = shutil.copytree(released / "124M", tmp_path / "cut")
    os.truncate(directory / CHECKPOINT_DATA, 1000)
    with pytest.raises(ValueError, match=r"1,000 bytes, where hparams.json implies 290,304"):
        load_encoder_hparams_and_params(str(directory))


def test_nothing_is_downloaded_into_a_directory_that_was_named_by_path(mirror, tmp_path):
    (tmp_path / "124M").mkdir()
    with pytest.raises(FileNotFoundError, match=r"encoder\.json is missing"):
        load_encoder_hparams_and_params(str(tmp_path / "124M"))
    assert mirror.requests == []


@pytest.mark.skipif(os.name != "posix", reason="the permissions of files are POSIX")
def test_converted_weights_can_be_read_by_those_who_can_read_new_files(mirror, tmp_path):
    load_encoder_hparams_and_params("124M", str(tmp_path))
    (tmp_path / "new").touch()
    mode = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    for path in (tmp_path / "124M").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == mode, path.name


# Verified before it is believed


def test_a_table_is_the_released_one_by_its_sha256(mirror, tmp_path, monkeypatch, capsys):
    """From the original server always; from a mirror if it has that length, as it may have tables of its own."""
    tables = {name: mirror.files[f"/124M/{name}"] for name in TABLES}
    known = {name: (len(table), checkpoint.hashlib.sha256(table).hexdigest()) for name, table in tables.items()}
    monkeypatch.setattr(checkpoint, "TABLES", known)
    changed = tables["vocab.bpe"].replace(b"e r\n", b"r e\n")
    assert changed != tables["vocab.bpe"]
    mirror.files["/124M/vocab.bpe"] = changed
    with pytest.raises(OSError, match=r"/124M/vocab.bpe: its SHA-256 is not that of the released one, twice"):
        fetch(tmp_path / "124M", TABLES)
    assert capsys.readouterr().err.count("removed, and downloaded once more") == 1
    assert {path.name for path in (tmp_path / "124M").iterdir()} == {"encoder.json", ".lock"}

    mirror.files["/124M/vocab.bpe"] = changed + b"\n"
    fetch(tmp_path / "124M", TABLES)
    (tmp_path / "124M" / "vocab.bpe").unlink()
    monkeypatch.setattr(checkpoint, "BASE_URL", mirror.url)
    with pytest.raises(OSError, match="SHA-256"):
        fetch(tmp_path / "124M", TABLES)
    mirror.answers = [Answer(body=b"damaged"), Answer(body=tables["vocab.bpe"])]
    fetch(tmp_path / "124M", TABLES)
    assert (tmp_path / "124M" / "vocab.bpe").read_bytes() == tables["vocab.bpe"]


BODIES = [b"", b"{}", b"[1, 2]", b"<html>log in</html>", bytes(range(256))]


@pytest.mark.parametrize(
    ("file", "body"),
    [(file, body) for file in ("encoder.json", "hparams.json") for body in BODIES]
    + [("vocab.bpe", b"{}"), ("vocab.bpe", b"a b c\n"), ("vocab.bpe", b"\xff \xfe")],
)
def test_what_cannot_be_the_file_is_fetched_once_more(mirror, tmp_path, file, body):
    mirror.answers = [Answer(body=body)]
    fetch(tmp_path / "124M", [file])
    assert (tmp_path / "124M" / file).read_bytes() == mirror.files[f"/124M/{file}"]
    assert len(mirror.requests) == 2


def test_weights_of_another_length_than_the_hyperparameters_imply_are_refused(mirror, tmp_path):
    mirror.files[f"/124M/{CHECKPOINT_DATA}"] = bytes(1000)
    with pytest.raises(OSError, match=rf"{CHECKPOINT_DATA}: it has 1,000 bytes, where 290,304 are expected, twice"):
        fetch(tmp_path / "124M", CHECKPOINT_FILES, N_DATA_BYTES)
    assert not (tmp_path / "124M" / CHECKPOINT_DATA).exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", [CHECKPOINT_DATA, CHECKPOINT_INDEX])
def test_a_download_that_tensorflow_finds_damaged_is_removed_and_fetched_once_more(
    mirror, tmp_path, tiny_params, capfd, file
):
    good = mirror.files[f"/124M/{file}"]
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    mirror.files[f"/124M/{file}"] = bytes(bad)

    class Mending(dict):
        def get(self, path):
            body = super().get(path)
            self[f"/124M/{file}"] = good if path == f"/124M/{file}" else self[f"/124M/{file}"]
            return body

    mirror.files = Mending(mirror.files)
    assert_same_params(load_encoder_hparams_and_params("124M", str(tmp_path))[2], tiny_params)
    assert capfd.readouterr().err.count("is damaged: get both again: they are removed, and downloaded once more") == 1
    assert Counter(mirror.paths())[f"/124M/{file}"] == 2


def test_a_damaged_checkpoint_that_was_named_by_path_is_refused_and_stays(tmp_path, released):
    directory = shutil.copytree(released / "124M", tmp_path / "bad")
    flip_a_bit(directory / CHECKPOINT_DATA)
    data = (directory / CHECKPOINT_DATA).read_bytes()
    with pytest.raises(ValueError, match=rf"could not be conv.*[Cc]hecksum.*{CHECKPOINT_DATA} is damaged: get both"):
        load_encoder_hparams_and_params(str(directory))
    assert (directory / CHECKPOINT_DATA).read_bytes() == data
    assert not list(directory.glob("*safetensors*"))


@pytest.mark.parametrize("obstacle", ["offline", "read-only"])
def test_a_damaged_checkpoint_that_cannot_be_fetched_again_stays(mirror, tmp_path, permissions, cache, obstacle):
    directory = tmp_path / "models" / "124M"
    fetch(directory, [*TABLES, "hparams.json", *CHECKPOINT_FILES], N_DATA_BYTES)
    flip_a_bit(directory / CHECKPOINT_DATA)
    mirror.requests.clear()
    arguments = ["--offline"] if obstacle == "offline" else []
    if obstacle == "read-only":
        directory.chmod(0o555)
    result = run("gpt2.py", "Hello", *arguments, cwd=tmp_path, preexec_fn=as_any_user)
    *_, line = result.stderr.decode().splitlines()
    assert result.returncode == 1
    assert f"{CHECKPOINT_INDEX} or {CHECKPOINT_DATA} is damaged: get both again" in line
    assert {path.name for path in directory.iterdir()} == ALL_FILES | {".lock"}
    assert mirror.requests == []


@pytest.mark.slow
def test_processes_that_find_a_checkpoint_damaged_fetch_it_once_more_together(mirror, tmp_path):
    directory = tmp_path / "models" / "124M"
    fetch(directory, [*TABLES, "hparams.json", *CHECKPOINT_FILES], N_DATA_BYTES)
    flip_a_bit(directory / CHECKPOINT_DATA)
    mirror.requests.clear()
    processes = [start(tmp_path) for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, results
    assert sorted(mirror.paths()) == [f"/124M/{CHECKPOINT_DATA}", f"/124M/{CHECKPOINT_INDEX}"]


@pytest.mark.parametrize("failure", ["raise ImportError('another NumPy')", "raise TypeError('protobuf')", "1 / 0"])
def test_a_broken_tensorflow_is_no_reason_to_remove_the_checkpoint(mirror, tmp_path, failure):
    fetch(tmp_path / "models" / "124M", [*TABLES, "hparams.json", *CHECKPOINT_FILES], N_DATA_BYTES)
    mirror.requests.clear()
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(failure)
    result = run("gpt2.py", "Hello", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    *_, line = result.stderr.decode().splitlines()
    assert result.returncode == 1
    assert "could not be converted" in line
    assert "damaged" not in line
    assert mirror.requests == []


def test_the_path_of_a_model_is_no_pattern(mirror, tmp_path, tiny_params):
    assert_same_params(load_encoder_hparams_and_params("124M", str(tmp_path / "a[x]*"))[2], tiny_params)


def test_weights_that_do_not_fit_a_damaged_hparams_name_it(mirror, tmp_path):
    directory = tmp_path / "124M"
    fetch(directory, [*TABLES, "hparams.json", *CHECKPOINT_FILES], N_DATA_BYTES)
    (directory / "hparams.json").write_text(json.dumps(TINY | {"n_layer": 3}))
    with pytest.raises(
        OSError, match=r"403,392 are expected, .* from .*124M/hparams.json: if that is damaged, delete it"
    ):
        load_encoder_hparams_and_params("124M", str(tmp_path))


# Room


@pytest.mark.parametrize("n_there", [0, 100_000])
def test_without_room_for_the_weights_and_their_conversion_nothing_is_downloaded(
    mirror, tmp_path, monkeypatch, n_there
):
    part = download.part_of(tmp_path / "124M" / CHECKPOINT_DATA)
    part.parent.mkdir()
    part.write_bytes(bytes(n_there))
    needed = 2 * N_DATA_BYTES - n_there
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(OSError, match=f"need {needed:,} bytes, and this disk has {needed - 1:,} free"):
        fetch(tmp_path / "124M", [CHECKPOINT_DATA], N_DATA_BYTES)
    assert mirror.requests == []
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(needed))
    fetch(tmp_path / "124M", [CHECKPOINT_DATA], N_DATA_BYTES)


def test_without_room_for_the_conversion_it_is_not_begun(released, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1234))
    with pytest.raises(OSError, match="need 290,304 bytes, and this disk has 1,234 free"):
        load_encoder_hparams_and_params(str(released / "124M"))


# Without the network


@pytest.mark.parametrize("switch", ["--offline", "1", "true"])
def test_offline_never_touches_the_network_and_names_the_missing_file(mirror, tmp_path, monkeypatch, switch):
    directory = tmp_path / "models" / "124M"
    shutil.copytree(write_model(tmp_path / "complete"), directory)
    arguments = ["x", "--n_tokens_to_generate=2"]
    if switch == "--offline":
        arguments.append(switch)
    else:
        monkeypatch.setenv("GPT2_OFFLINE", switch)
    assert run("gpt2.py", *arguments, cwd=tmp_path).returncode == 0
    for file in ("model.safetensors", "vocab.bpe"):
        (directory / file).unlink()
        result = run("gpt2.py", *arguments, cwd=tmp_path)
        (line,) = result.stderr.decode().splitlines()
        missing = {"model.safetensors": "checkpoint"}.get(file, file)
        assert (result.returncode, result.stdout) == (1, b"")
        assert f"124M/{missing} is not there whole, and this run is offline. The bundled model needs no network" in line
    assert mirror.requests == []


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_the_switch_can_be_off(mirror, tmp_path, monkeypatch, value):
    monkeypatch.setenv("GPT2_OFFLINE", value)
    fetch(tmp_path / "124M", TABLES)
    assert len(mirror.requests) == 2


# Several processes


def test_processes_that_start_at_once_do_the_work_once(mirror, tmp_path):
    processes = [start(tmp_path) for _ in range(4)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert len({printed for printed, _ in results}) == 1
    assert set(Counter(mirror.paths()).values()) == {1}
    assert sum("converting" in errors for _, errors in results) == 1
    assert "models/124M: waiting for another process that downloads or converts it ..." in str(results)


def test_weights_that_another_process_makes_meanwhile_are_taken(tmp_path, released, monkeypatch, capsys):
    directory = shutil.copytree(released / "124M", tmp_path / "mine")
    monkeypatch.setattr(checkpoint, "convert_checkpoint", lambda *arguments: pytest.fail("it converts once more"))
    has_lock = threading.Event()

    def other():
        with locked(directory):
            has_lock.set()
            time.sleep(0.3)
            note = {CHECKPOINT_INDEX: identify(directory / CHECKPOINT_INDEX)}
            save_tensors(directory / WEIGHTS, {"a": np.zeros(1, np.float32)}, note)

    thread = threading.Thread(target=other)
    thread.start()
    assert has_lock.wait(20)
    assert find_weights(directory, N_DATA_BYTES, released=False) == directory / WEIGHTS
    thread.join()
    assert "mine: waiting for another process that downloads or converts it" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_process_that_is_killed_leaves_what_it_has_and_no_lock(mirror, tmp_path):
    (tmp_path / "models" / "124M").mkdir(parents=True)
    n = download.CHUNK
    mirror.answers = [Answer()] * 6 + [Answer(stop_after=n, then="stall")]
    first = start(tmp_path)
    part = tmp_path / "models" / "124M" / f"{CHECKPOINT_DATA}.part"
    wait_for(lambda: part.is_file() and part.stat().st_size == n)
    second = start(tmp_path)
    assert "waiting for another process" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    printed, errors = second.communicate(timeout=60)
    first.communicate()
    assert (second.returncode, bool(printed)) == (0, True), errors
    assert mirror.ranges()[-1] == f"bytes={n}-"
    assert {path.name for path in part.parent.iterdir()} == ALL_FILES | {WEIGHTS, ".lock"}


# Weights and checkpoints that may not belong together


def with_checkpoint(directory, note=None):
    """A directory with an index and weights, which say that they are made of it, of another, or (None) nothing."""
    directory.mkdir()
    index, weights = directory / CHECKPOINT_INDEX, directory / WEIGHTS
    index.write_bytes(b"an index")
    metadata = {} if note is None else {CHECKPOINT_INDEX: note or identify(index)}
    save_tensors(weights, {"a": np.zeros(1, np.float32)}, metadata)
    return directory, index, weights


@pytest.mark.parametrize("seconds", [-100, 0, 100], ids=["older", "equal", "newer"])
def test_weights_are_taken_if_they_are_made_of_the_checkpoint_that_is_there(tmp_path, seconds):
    for name, note, expected in (("right", "", True), ("other", "0" * 64, False)):
        directory, index, weights = with_checkpoint(tmp_path / name, note)
        os.utime(weights, (0, index.stat().st_mtime + seconds))
        assert is_current(weights, directory) is expected


def test_weights_that_do_not_say_are_taken_unless_they_are_the_older(tmp_path):
    directory, index, weights = with_checkpoint(tmp_path / "x")
    assert is_current(weights, directory)
    os.utime(weights, (0, index.stat().st_mtime - 100))
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is older than .*{CHECKPOINT_INDEX} .*: delete one of the two"):
        is_current(weights, directory)
    index.unlink()
    assert is_current(weights, directory), "there is nothing to compare them to"
    assert not is_current(weights, tmp_path / "another"), "in a cache there must be"


@pytest.mark.slow
def test_another_checkpoint_is_converted_anew_and_what_a_killed_process_left_is_removed(
    tmp_path, tiny_tensors, tiny_params
):
    changed = tiny_tensors | {"model/ln_f/b": tiny_tensors["model/ln_f/b"] + 1}
    directory = write_checkpoint(tmp_path / "mine", tiny_tensors)
    (directory / f"{WEIGHTS}.123.tmp").write_bytes(b"half of it")
    assert_same_params(load_encoder_hparams_and_params(str(directory))[2], tiny_params)
    assert sorted(path.name for path in directory.iterdir()) == sorted([*ALL_FILES, WEIGHTS, ".lock"])
    write_checkpoint(directory, changed)
    os.utime(directory / CHECKPOINT_INDEX, (0, 0))
    params = load_encoder_hparams_and_params(str(directory))[2]
    np.testing.assert_array_equal(params["ln_f"]["b"], tiny_params["ln_f"]["b"] + 1)
    assert map_tensors(directory / WEIGHTS)[1]["format"] == "pt"


# Directories that cannot be written, or are not what they should be


def test_a_checkpoint_that_cannot_be_written_beside_is_converted_into_the_users_cache(
    permissions, released, tmp_path, cache
):
    directory = shutil.copytree(released / "124M", tmp_path / "mine")
    before = sorted(directory.iterdir())
    directory.chmod(0o555)
    arguments = ("Hello", f"--model_size={directory}", "--n_tokens_to_generate=4")
    first, second = (run("gpt2.py", *arguments, preexec_fn=as_any_user) for _ in range(2))
    assert (first.returncode, second.returncode, second.stderr) == (0, 0, b""), first.stderr
    assert first.stdout == second.stdout
    assert sorted(directory.iterdir()) == before
    assert len(list(cache.glob(f"gpt2-numpy/*/{WEIGHTS}"))) == 1


def no_home(*arguments, **options):
    raise RuntimeError("could not determine the home directory")


@pytest.mark.parametrize("find_cache", [no_home, lambda *arguments, **options: Path("~/.cache/gpt2-numpy")])
def test_a_user_without_a_home_directory_has_no_cache(tmp_path, monkeypatch, find_cache):
    monkeypatch.setattr("platformdirs.user_cache_path", find_cache)
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert homes_of(tmp_path) == [tmp_path]


def test_where_nothing_can_be_written_it_says_what_it_needs(permissions, released, tmp_path, cache):
    directory = shutil.copytree(released / "124M", tmp_path / "mine")
    cache.mkdir()
    for path in (directory, cache):
        path.chmod(0o555)
    result = run("gpt2.py", "Hello", f"--model_size={directory}", preexec_fn=as_any_user)
    (line,) = result.stderr.decode().splitlines()
    assert (result.returncode, result.stdout) == (1, b"")
    assert f"{cache}/gpt2-numpy" in line
    assert "cannot be written (Permission denied)" in line


def test_a_complete_model_needs_no_permission_to_write(permissions, tmp_path):
    directory = write_model(tmp_path / "models" / "124M")
    directory.chmod(0o555)
    result = run("gpt2.py", "x", "--n_tokens_to_generate=2", cwd=tmp_path, preexec_fn=as_any_user)
    assert (result.returncode, result.stderr) == (0, b"")


def test_what_a_read_only_directory_lacks_is_one_line(permissions, mirror, tmp_path):
    directory = write_model(tmp_path / "models" / "124M")
    (directory / "vocab.bpe").unlink()
    directory.chmod(0o555)
    result = run("gpt2.py", "x", cwd=tmp_path, preexec_fn=as_any_user)
    (line,) = result.stderr.decode().splitlines()
    assert result.returncode == 1
    assert "models/124M cannot be written (Permission denied)" in line


@pytest.mark.parametrize("file", [*TABLES, "hparams.json", CHECKPOINT_INDEX, CHECKPOINT_DATA])
def test_a_directory_in_the_place_of_a_file_is_named(mirror, tmp_path, file):
    (tmp_path / "124M" / file).mkdir(parents=True)
    with pytest.raises(OSError, match=f"124M/{file} is a directory, where a file belongs: remove it"):
        load_encoder_hparams_and_params("124M", str(tmp_path))


def test_a_directory_in_the_place_of_the_weights_is_named(tmp_path, released):
    directory = shutil.copytree(released / "124M", tmp_path / "mine")
    (directory / WEIGHTS).mkdir()
    with pytest.raises(OSError, match=f"mine/{WEIGHTS} is a directory, where a file belongs: remove it"):
        load_encoder_hparams_and_params(str(directory))


def test_dangling_links_of_a_released_model_become_files(mirror, tmp_path, tiny_params):
    (tmp_path / "124M").mkdir()
    for file in (*ALL_FILES, WEIGHTS):
        (tmp_path / "124M" / file).symlink_to(tmp_path / "nowhere" / file)
    assert_same_params(load_encoder_hparams_and_params("124M", str(tmp_path))[2], tiny_params)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("file", [CHECKPOINT_INDEX, CHECKPOINT_DATA])
def test_a_checkpoint_file_that_cannot_be_read_is_named(permissions, tmp_path, released, file):
    directory = shutil.copytree(released / "124M", tmp_path / "mine")
    (directory / file).chmod(0)
    result = run("gpt2.py", "x", f"--model_size={directory}", preexec_fn=as_any_user)
    (line,) = result.stderr.decode().splitlines()
    assert f"{file} cannot be read: Permission denied" in line


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_file_in_the_place_of_a_model_is_named(mirror, tmp_path, make):
    make(tmp_path / "124M")
    with pytest.raises(NotADirectoryError, match=r"124M is not a directory: remove it"):
        load_encoder_hparams_and_params("124M", str(tmp_path))


def test_models_dir_may_be_a_file(mirror, tmp_path):
    (tmp_path / "models").write_text("not a directory")
    result = run("gpt2.py", "x", cwd=tmp_path)
    (line,) = result.stderr.decode().splitlines()
    assert (result.returncode, "models/124M cannot be written" in line) == (1, True)


@pytest.mark.parametrize("name", ["../124M", "124M/../124M", "124M\0", "models/124M", "./124M"])
def test_a_name_never_leads_a_download_out_of_models_dir(mirror, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface.fetch_model", lambda name: find_model("nothing"))
    with pytest.raises(FileNotFoundError, match="there is no model"):
        load_encoder_hparams_and_params(name, "models")
    assert mirror.requests == []
    assert list(tmp_path.iterdir()) == []


# From the command line


def test_the_command_line_generates_from_a_checkpoint_that_it_downloads_converts_and_maps(
    mirror, tmp_path, tiny_params
):
    from gpt2 import generate

    arguments = ("Hello there", "--n_tokens_to_generate", "8")
    first = run("gpt2.py", *arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    encoder, hparams, _ = load_encoder_hparams_and_params("124M", str(tmp_path / "models"))
    ids = generate(encoder.encode("Hello there"), tiny_params, hparams["n_head"], 8)
    assert first.stdout.decode() == encoder.decode(ids) + "\n"
    n_requests = len(mirror.requests)
    second = run("gpt2.py", *arguments, cwd=tmp_path)
    assert (second.stdout, second.stderr) == (first.stdout, b"")
    assert len(mirror.paths()) == n_requests


def test_a_failed_conversion_is_one_line_and_status_1(tmp_path, released):
    directory = shutil.copytree(released / "124M", tmp_path / "bad")
    (directory / "model.ckpt.index").write_bytes(b"garbage")
    result = run("gpt2.py", "x", "--model_size", str(directory))
    assert result.returncode == 1
    assert result.stdout == b""
    *progress, error = result.stderr.decode().splitlines()
    assert error.startswith("gpt2.py: ")
    assert "could not be converted" in error
    assert len(progress) == 1
