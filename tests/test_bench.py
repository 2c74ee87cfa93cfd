"""What bench.py measures, beside which limits, and what it prints of that."""

import json
import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

import bench
from dev.peers import PEERS, Model
from export import main as export
from helpers.models import BUNDLED, TINY, write_model, write_tables
from helpers.processes import error_line, run

ROWS = ["prompt of 16", "prompt of 128", "decode after 10", *(f"decode, batch of {n}" for n in (1, 4, 16, 64))]
ROWS += ["start-up, 1 token", "start-up, 8 tokens", "start-up, 40 tokens", "peak memory", "tokenizer"]


@pytest.fixture
def quick(monkeypatch):
    """Figures taken once, from next to nothing, without Numba."""
    for name, value in {"LEAST_SECONDS": 0, "PAUSE": 0, "N_DECODE": 2, "READ_SHAPE": (8, 8), "PRODUCT_SIZE": 8}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "numba" else find_spec(name))
    bench.large_matrix.cache_clear()
    yield
    bench.large_matrix.cache_clear()


def test_every_measure_has_a_row_with_figure_limit_and_ratio_and_a_line_in_the_table(quick, capsys):
    bench.main(model_size=str(BUNDLED), against="tiktoken", rounds=1, json=True)
    report = json.loads(capsys.readouterr().out)
    rows, machine = report["rows"], report["machine"]
    assert [row["name"] for row in rows] == ROWS
    for row in rows:
        sign = -1 if row["unit"] in ("s", "MB") else 1
        assert row["share_of_limit"] == pytest.approx((row["here"] / row["limit"]) ** sign)
        assert {"limit", "here"} <= row["figures"].keys()
        assert all(len(figures) == 1 and figures[0] > 0 for figures in row["figures"].values())
    tiktoken = rows[-1]["peers"]["tiktoken"]
    assert tiktoken["ratio"] == pytest.approx(rows[-1]["here"] / tiktoken["median"])
    assert machine["n_threads"] >= 1 and "tiktoken" in machine["versions"]

    rows[0]["unsteady"], report["peers"] = ["here"], list(PEERS)
    rows[0]["peers"] = {peer: {"median": 123456.7, "ratio": 12.34} for peer in PEERS}
    table = bench.format_table(report)
    for name in ROWS:
        assert sum(line.startswith(f"{name}  ") for line in table.splitlines()) == 1
    figures = [line for line in table.splitlines() if "tokens/s" in line or "MB" in line or "ratio" in line]
    assert max(map(len, figures)) <= 120
    assert figures[1].endswith(" ~")
    for text in (machine["processor"], "threads", "GFLOP/s", "GB/s", "123,457", "12.34"):
        assert text in table


def test_standard_output_is_json_and_nothing_else(tmp_path):
    (tmp_path / "text").write_text("To be, or not to be", encoding="utf-8")
    options = ("--only=tokenizer", "--rounds=1", f"--text={tmp_path / 'text'}", "--json")
    child = run("bench.py", f"--model_size={BUNDLED}", *options)
    assert child.returncode == 0, child.stderr
    assert [row["unit"] for row in json.loads(child.stdout)["rows"]] == ["MB/s"]


@pytest.mark.parametrize(("option", "problem"), [
    ("--against=pytorch", "not 'pytorch'"), ("--only=decode,everything", "not 'everything'"),
    ("--rounds=0", "rounds must be a whole number, 1 or more, not 0"), ("--text=not there", "not there"),
    ("--rounds=many", "rounds must be a whole number"), ("--model_size=not there", "no model 'not there'"),
])  # fmt: skip
def test_a_bad_option_is_one_line(option, problem):
    assert problem in error_line(run("bench.py", f"--model_size={BUNDLED}", option))


def test_a_peer_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("llama_cpp", "torch") else True)
    with pytest.raises(ImportError, match=r"^.*pip install torch llama-cpp-python, or.*\Z"):  # one line
        bench.main(against="transformers,llama_cpp")


def test_a_round_takes_every_measure_once_and_the_first_does_not_count(quick):
    taken = []

    def measure(name, **values):
        left = {party: iter(figures) for party, figures in values.items()}
        parties = {party: lambda party=party: taken.append(name + party) or next(left[party]) for party in values}
        return bench.Measure("decode", name, "tokens/s", parties)

    steady = measure("a ", limit=[1, 20, 20, 20], here=[1000, 8, 6, 7], peer=[1000, 3, 3.5, 4])
    disturbed = measure("b ", limit=[1, 20, 20, 20], here=[1, 6, 1, 6])
    row, other = rows = bench.take_all([steady, disturbed], 3)
    assert taken == ["a limit", "a here", "a peer", "b limit", "b here"] * 4
    assert (row["limit"], row["here"], row["share_of_limit"], row["unsteady"]) == (20, 7, 0.35, [])
    assert row["peers"] == {"peer": {"median": 3.5, "ratio": 2}}
    assert (other["here"], other["unsteady"]) == (6, ["here"])
    assert ["do not trust" in "\n".join(bench.notes([row | {"group": ""}])) for row in rows] == [False, True]


def test_a_limit_is_the_time_of_what_takes_longer(monkeypatch):
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 1000.0)
    monkeypatch.setattr(bench, "product_rate", lambda: 600.0)
    assert bench.token_limit({"bytes": 10}) == bench.token_limit({"operations": 6}) == 100
    assert bench.token_limit({"bytes": 10, "operations": 12}) == 50
    assert bench.token_limit({"bytes": 50, "operations": 12}) == 20


def test_what_a_token_costs_is_that_of_the_released_model(monkeypatch):
    """124M: 85 M weights in the blocks' matrices, 38.6 M in the vocabulary's, 498 MB in all; int8 where Numba is."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "engine.int8", SimpleNamespace(quantize=None))
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    measures = bench.engine_measures(Model(None, "", "", None, hparams, None), [], None)
    costs, n_matrices = {measure.name: measure.cost for measure in measures}, 84_934_656 + 38_597_376
    assert costs["prompt of 1,000"] == {"operations": 2 * 84_934_656}
    assert costs["decode after 1,000"] == {"bytes": 497_759_232}
    assert costs["decode after 10, int8"] == {"bytes": 497_759_232 - 4 * n_matrices + n_matrices}
    assert costs["decode, batch of 64"] == {"bytes": 497_759_232 / 64, "operations": 2 * n_matrices}


def test_a_released_model_that_is_not_there_is_not_downloaded_but_made(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"124M": (8, 2, 1)})
    monkeypatch.setattr("store.checkpoint.fetch_file", lambda *args, **options: pytest.fail("it downloads"))
    monkeypatch.setattr("store.models.PROJECT", tmp_path)
    (tmp_path / "models" / "124M").mkdir(parents=True)
    write_tables(tmp_path / "models" / "124M")
    model = bench.open_model("124M", "models", tmp_path / "temporary")
    assert (model.hparams["n_vocab"], len(model.encoder.encoder)) == (50257, TINY["n_vocab"])
    assert "random" in model.weights and model.tokenizer == str(tmp_path / "models" / "124M")
    assert model.directory == tmp_path / "temporary" / "124M"


def test_a_released_model_that_is_there_is_taken(tmp_path):
    write_model(tmp_path / "124M")
    model = bench.open_model("124M", str(tmp_path), tmp_path / "temporary")
    assert (model.directory, "random" in model.weights) == (tmp_path / "124M", False)
    assert not (tmp_path / "temporary").exists()


def test_a_process_is_measured_on_its_own():
    mine = np.ones(50_000_000)  # 400 MB, which by the system's count a child would begin with
    seconds, peak = bench.run_process("-c", "import time; x = bytearray(b'x') * 40_000_000; time.sleep(0.2)")
    assert mine.all()
    assert seconds > 0.2
    assert math.isnan(peak) or 40 < peak < 200


def test_a_process_that_fails_is_one_line():
    with pytest.raises(OSError, match=r"^.*failed: .*broken.*\Z"):
        bench.run_process("-c", "raise SystemExit('broken')")


def test_a_model_of_hugging_face_is_measured_by_its_name(tiny_model, tmp_path, monkeypatch):
    directory, fetched = tmp_path / "snapshot", []
    export(str(tiny_model), str(directory))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("store.hub.fetch_model", lambda name: directory)
    monkeypatch.setattr("store.hub.fetch_weights", lambda *arguments: fetched.append(arguments))
    model = bench.open_model("owner/model", "models", tmp_path)
    assert (fetched, model.directory) == ([("owner/model", directory)], directory.resolve())
