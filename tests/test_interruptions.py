"""The whole program: interrupted at any moment, on a full disk, for a long time, and many at once."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gpt2 import generate
from helpers import huggingface_models as hf
from helpers.models import LARGE, ROOT, TINY, random_params, write_checkpoint, write_model
from helpers.processes import run, run_code, start
from store.checkpoint import CHECKPOINT_FILES
from store.huggingface import NAMES
from store.params import checkpoint_name, flatten, map_leaves, param_shapes, tensor_name
from store.tensors import WEIGHTS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals and tmpfs are POSIX")]

FILES = {"encoder.json", "vocab.bpe", "hparams.json", *CHECKPOINT_FILES, WEIGHTS}
ARGUMENTS = ("Hello", "--n_tokens_to_generate=24", "--ignore_eot", "--models_dir=models")
ONE_THREAD = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture
def expected(tiny_params, tiny_encoder):
    """What gpt2.py with ARGUMENTS prints."""
    ids = generate(tiny_encoder.encode("Hello"), tiny_params, TINY["n_head"], 24, n_vocab=TINY["n_vocab"])
    return tiny_encoder.decode(ids) + "\n"


def names(directory):
    return {path.name for path in (directory / "models" / "124M").glob("*")}


@pytest.mark.parametrize(("sent", "to_all"), [(signal.SIGINT, True), (signal.SIGKILL, False)])
def test_whenever_it_is_stopped_the_same_command_resumes(mirror, tmp_path, expected, sent, to_all):
    """gpt2.py is stopped fifty times: while it starts, downloads, converts, computes the prompt and decodes."""
    mirror.pause = 0.1
    rng, n_stopped, longest = random.Random(0), 0, 6.0
    while n_stopped < 50:
        # In a session of its own, so that Ctrl-C reaches the conversion too, as it does at a terminal.
        process = start("gpt2.py", *ARGUMENTS, cwd=tmp_path, start_new_session=True)
        began, moment = time.monotonic(), rng.uniform(0, longest) * rng.random()  # earlier moments are more likely
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            (os.killpg if to_all else os.kill)(process.pid, sent)
            n_stopped += 1
        printed, errors = process.communicate(timeout=60)
        whole = {name for name in names(tmp_path) if not re.search(r"\.(part|part\.json|tmp|lock)$", name)}
        assert whole <= FILES
        if process.returncode == 0:
            assert printed.decode() == expected
            longest = time.monotonic() - began
            assert names(tmp_path) == FILES | {".lock"}
            shutil.rmtree(tmp_path / "models")  # start from the beginning
        else:
            before_the_script = errors.startswith(b"Fatal Python error: init_import_site")  # Python itself was starting
            assert process.returncode in (130, -sent) or before_the_script, errors
            assert moment <= 0.5 or b"Traceback" not in errors  # earlier, Python itself may be starting
    last = run("gpt2.py", *ARGUMENTS, cwd=tmp_path)
    assert (last.returncode, last.stdout.decode()) == (0, expected), last.stderr
    assert names(tmp_path) == FILES | {".lock"}


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes or resizes a file system of `n_bytes`, and returns its path."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(n_bytes: int) -> Path:
        remount = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={n_bytes}", "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no small file system can be mounted here")
        return place

    yield resize
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kilobytes", [8, 16, 32, 320, 584, 592, 596, 604])
def test_after_a_full_disk_the_same_command_resumes_with_more_room(mirror, small_disk, expected, kilobytes):
    disk = small_disk(kilobytes * 1024)
    result = run("gpt2.py", *ARGUMENTS, cwd=disk)
    if result.returncode:
        *_, line = result.stderr.decode().splitlines()
        assert (result.returncode, result.stdout) == (1, b"")
        assert re.search("No space left on device|bytes, but there are only [0-9,]+ free", line), line
        assert b"Traceback" not in result.stderr
        assert {name for name in names(disk) if not re.search(r"\.(part|part\.json|lock)$", name)} <= FILES
    else:
        assert result.stdout.decode() == expected
    small_disk(8 * 2**20)
    again = run("gpt2.py", *ARGUMENTS, cwd=disk)
    assert (again.returncode, again.stdout.decode()) == (0, expected), again.stderr
    assert names(disk) == FILES | {".lock"}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_ten_thousand_generations_take_no_more_memory_than_one_thousand(tiny_model):
    code = """if True:
        import os, sys, gpt2, utils
        encoder, hparams, params = utils.load_encoder_hparams_and_params(sys.argv[1])
        for n in range(10_001):
            prompt = encoder.encode(f"Say it for the {n}th time")
            gpt2.generate(prompt, params, hparams["n_head"], 4, temperature=1, seed=n, n_samples=1 + n % 3)
            if n in (1_000, 10_000):
                print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    """
    early, late = map(int, run_code(code, str(tiny_model)).split())
    assert late - early < 3e6, "the memory of words alone may grow by some of that"


WORK = {  # on a LARGE model: its layout, and megabytes for a tensor, the libraries' buffers and threads
    "int8 of float32": ("ours", 60, 'load(source, quantize="int8")'),
    "int8 of float16": ("hugging face", 60, 'load(source, quantize="int8")'),
    "an export": ("ours", 60, "export.main(source, target)"),
    "an export of float16": ("hugging face", 60, "export.main(source, target)"),
    "a conversion": ("checkpoint", 120, "os.chdir(source); checkpoint.convert(Path(target))"),
    "a conversion to int8": ("checkpoint", 120, "os.chdir(source); engine.int8.convert_to_int8(Path(target))"),
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("work", WORK)
def test_memory_holds_a_tensor_at_a_time_and_not_all_weights(tmp_path, work):
    pytest.importorskip("numba", reason="Numba is not installed")
    layout, megabytes, code = WORK[work]
    zeros = map_leaves(lambda path, shape: np.zeros(shape, np.float32), param_shapes(LARGE))
    if layout == "checkpoint":
        write_checkpoint(tmp_path / "source", flatten(zeros, checkpoint_name), LARGE)
        (tmp_path / "target").touch()
    elif layout == "ours":
        write_model(tmp_path / "source", LARGE, zeros)
    else:
        config = {NAMES[name]: n for name, n in LARGE.items()} | {"scale_attn_by_inverse_layer_idx": True}
        halves = map_leaves(lambda path, array: array.astype(np.float16), zeros)
        hf.write(tmp_path / "source", config, hf.prefixed(flatten(halves, tensor_name)))
    code = f"""if True:
        import os, re, resource, sys, engine.int8, export, safetensors
        from pathlib import Path
        from store import checkpoint
        from utils import load_encoder_hparams_and_params as load
        {"import tensorflow.compat.v1.train" * (layout == "checkpoint")}
        source, target = sys.argv[1:]
        kilobytes = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * kilobytes + {megabytes} * 10**6,) * 2)
        {code}
    """
    run_code(code, str(tmp_path / "source"), str(tmp_path / "target"), env=ONE_THREAD, timeout=300)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="shared pages are read from /proc")
def test_thirty_processes_share_the_pages_of_one_model(tmp_path):
    hparams = {"n_vocab": 300, "n_ctx": 64, "n_embd": 768, "n_head": 12, "n_layer": 8}
    model = write_model(tmp_path / "large", hparams, random_params(hparams))
    n_bytes = (model / WEIGHTS).stat().st_size
    code = """if True:
        import sys, gpt2, utils
        encoder, hparams, params = utils.load_encoder_hparams_and_params(sys.argv[1])
        gpt2.generate(encoder.encode("Hello there"), params, hparams["n_head"], 2)
        print("ready", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", code, str(model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, **pipes) for _ in range(30)]
    try:
        assert all(process.stdout.readline() == b"ready\n" for process in processes)
        kilobytes = Counter()
        for process in processes:
            for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{process.pid}/smaps").read_text()):
                if mapping.split("\n")[0].endswith(str(model / WEIGHTS)):
                    kilobytes.update({name: int(n) for name, n in re.findall(r"(\w+): +(\d+) kB", mapping)})
    finally:
        for process in processes:
            process.communicate()
    assert 1024 * kilobytes["Rss"] > 25 * n_bytes, "each has read all of it"
    assert 1024 * kilobytes["Pss"] < 1.1 * n_bytes, "and together they have it once"
    assert kilobytes["Private_Dirty"] == 0
