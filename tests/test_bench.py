"""bench.py measures every figure beside its limit, and prints a table or JSON."""

import json
import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

import bench
from dev import measures
from dev.machine import run_process, token_limit
from dev.peers import PEERS, Model, open_model
from export import main as export
from helpers.models import BUNDLED, TINY, write_model, write_tables
from helpers.processes import error_line, run

ROWS = ["prompt of 16", "prompt of 128", "decode after 10", *(f"decode, batch of {n}" for n in (1, 4, 16, 64))]
ROWS += ["start-up, 1 token", "start-up, 8 tokens", "start-up, 40 tokens", "peak memory", "tokenizer"]


@pytest.fixture
def quick(monkeypatch):
    """Make the measurements short, and hide Numba."""
    short = {
        "dev.measures.PAUSE": 0,
        "dev.measures.N_DECODE": 2,
        "dev.machine.READ_SHAPE": (8, 8),
        "dev.machine.PRODUCT_SIZE": 8,
    }
    for name, value in short.items():
        monkeypatch.setattr(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "numba" else find_spec(name))


def test_the_report_has_a_row_for_every_measure(quick, capsys):
    bench.main(model_size=str(BUNDLED), against="tiktoken", rounds=1, json=True)
    report = json.loads(capsys.readouterr().out)
    rows = report["rows"]
    assert [row["name"] for row in rows] == ROWS
    for row in rows:
        sign = -1 if row["unit"] in ("s", "MB") else 1
        assert row["ratios"]["limit"] == pytest.approx((row["medians"]["here"] / row["medians"]["limit"]) ** sign)
        assert all(len(figures) == 1 and figures[0] > 0 for figures in row["figures"].values())
    medians = rows[-1]["medians"]
    assert rows[-1]["ratios"]["tiktoken"] == pytest.approx(medians["here"] / medians["tiktoken"])
    assert report["machine"]["n_threads"] >= 1 and "tiktoken" in report["machine"]["versions"]

    rows[0]["unsteady"], report["peers"] = ["here"], list(PEERS)
    rows[0]["medians"] |= dict.fromkeys(PEERS, 123456.7)
    rows[0]["ratios"] |= dict.fromkeys(PEERS, 12.34)
    bench.print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if "tokens/s" in line or "  s  " in line or "MB" in line] == ROWS
    (row,) = (line for line in lines if line.startswith(f"{ROWS[0]}  "))
    assert row.split().count("123,457") == row.split().count("(12.34x)") == len(PEERS)
    assert row.endswith("  ~")
    assert max(map(len, lines)) <= 120
    for text in (report["machine"]["processor"], "threads", "GFLOP/s", "GB/s", "~: rounds differ"):
        assert text in "\n".join(lines)


def test_standard_output_is_only_json(tmp_path):
    (tmp_path / "text").write_text("To be, or not to be", encoding="utf-8")
    options = ("--only=tokenizer", "--rounds=1", f"--text={tmp_path / 'text'}", "--json")
    child = run("bench.py", f"--model_size={BUNDLED}", *options)
    assert child.returncode == 0, child.stderr
    assert [row["unit"] for row in json.loads(child.stdout)["rows"]] == ["MB/s"]


@pytest.mark.parametrize(("option", "problem"), [
    ("--against=pytorch", "not 'pytorch'"), ("--only=decode,everything", "not 'everything'"),
    ("--rounds=0", "rounds must be a whole number, 1 or more, not 0"), ("--text=not there", "not there"),
    ("--model_size=not there", "no model 'not there'"),
])  # fmt: skip
def test_a_bad_option_is_one_line(option, problem):
    assert problem in error_line(run("bench.py", f"--model_size={BUNDLED}", option))


def test_a_missing_peer_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("llama_cpp", "torch") else True)
    with pytest.raises(ImportError, match=r"^.*pip install torch llama-cpp-python, or.*\Z"):  # one line
        bench.main(against="transformers,llama_cpp")


def test_a_round_takes_every_measure_once_and_the_first_round_warms_up(quick):
    taken = []

    def measure(name, **values):
        left = {party: iter(figures) for party, figures in values.items()}
        parties = {party: lambda party=party: taken.append(name + party) or next(left[party]) for party in values}
        return measures.Measure("decode", name, "tokens/s", parties)

    steady = measure("a ", limit=[1, 20, 20, 20], here=[1000, 8, 6, 7], peer=[1000, 3, 3.5, 4])
    disturbed = measure("b ", limit=[1, 20, 20, 20], here=[1, 6, 1, 6])
    row, other = measures.measure_rows([steady, disturbed], 3)
    assert taken == ["a limit", "a here", "a peer", "b limit", "b here"] * 4
    assert row["medians"] == {"limit": 20, "here": 7, "peer": 3.5}
    assert row["ratios"] == {"limit": 0.35, "here": 1, "peer": 2}
    assert (row["unsteady"], other["unsteady"], other["medians"]["here"]) == ([], ["here"], 6)


def test_the_slower_resource_limits_the_tokens(monkeypatch):
    monkeypatch.setattr("dev.machine.read_bandwidth", lambda: 1000.0)
    monkeypatch.setattr("dev.machine.product_rate", lambda: 600.0)
    assert token_limit({"bytes": 10}) == token_limit({"operations": 6}) == 100
    assert token_limit({"bytes": 10, "operations": 12}) == 50
    assert token_limit({"bytes": 50, "operations": 12}) == 20


def test_the_cost_of_a_token_of_the_released_model(monkeypatch):
    """124M: 85 M weights in the blocks' matrices, 38.6 M in the vocabulary's, 498 MB in all."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "engine.int8", SimpleNamespace(quantize=None))
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    found = measures.engine_measures(Model(None, "", "", None, hparams, None), [], None)
    costs, n_matrices = {measure.name: measure.cost for measure in found}, 84_934_656 + 38_597_376
    assert costs["prompt of 1,000"] == {"operations": 2 * 84_934_656}
    assert costs["decode after 1,000"] == {"bytes": 497_759_232}
    assert costs["decode after 10, int8"] == {"bytes": 497_759_232 - 4 * n_matrices + n_matrices}
    assert costs["decode, batch of 64"] == {"bytes": 497_759_232 / 64, "operations": 2 * n_matrices}


def test_a_missing_released_model_gets_random_weights_and_no_download(tmp_path, monkeypatch):
    monkeypatch.setattr("dev.peers.SHAPES", {"124M": (8, 2, 1)})
    monkeypatch.setattr("store.download.download", lambda *args, **options: pytest.fail("a download"))
    monkeypatch.setattr("store.models.PROJECT", tmp_path)
    (tmp_path / "models" / "124M").mkdir(parents=True)
    write_tables(tmp_path / "models" / "124M")
    model = open_model("124M", "models", tmp_path / "temporary")
    assert (model.hparams["n_vocab"], len(model.encoder.encoder)) == (50257, TINY["n_vocab"])
    assert "random" in model.weights and model.tokenizer == str(tmp_path / "models" / "124M")
    assert model.directory == tmp_path / "temporary" / "124M"


def test_a_released_model_on_disk_is_used(tmp_path):
    write_model(tmp_path / "124M")
    model = open_model("124M", str(tmp_path), tmp_path / "temporary")
    assert (model.directory, "random" in model.weights) == (tmp_path / "124M", False)
    assert not (tmp_path / "temporary").exists()


def test_the_memory_of_a_process_is_its_own():
    mine = np.ones(50_000_000)  # 400 MB that Linux would count for a child process
    seconds, peak = run_process("-c", "import time; x = bytearray(b'x') * 40_000_000; time.sleep(0.2)")
    assert mine.all()
    assert seconds > 0.2
    assert math.isnan(peak) or 40 < peak < 200


def test_a_failed_process_is_one_line():
    with pytest.raises(OSError, match=r"^.*failed: .*broken.*\Z"):
        run_process("-c", "raise SystemExit('broken')")


def test_a_hugging_face_model_is_opened_by_its_name(tiny_model, tmp_path, monkeypatch):
    directory, fetched = tmp_path / "snapshot", []
    export(str(tiny_model), str(directory))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("store.huggingface.fetch_model", lambda name: directory)
    monkeypatch.setattr("store.huggingface.fetch_weights", lambda *arguments: fetched.append(arguments))
    model = open_model("owner/model", "models", tmp_path)
    assert (fetched, model.directory) == ([("owner/model", directory)], directory.resolve())
