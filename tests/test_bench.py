import json
import math
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

import bench
from gpt2 import generate
from helpers import BUNDLED, TINY, run, write_model, write_tables
from huggingface import export
from utils import load_encoder_hparams_and_params, param_shapes

ROWS = [
    "prompt of 16", "prompt of 128", "decode after 10",
    "decode, batch of 1", "decode, batch of 4", "decode, batch of 16", "decode, batch of 64",
    "start-up, 1 token", "start-up, 8 tokens", "start-up, 40 tokens", "peak memory", "tokenizer",
]  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Figures taken once, from next to nothing, without Numba."""
    for name, value in {"LEAST_SECONDS": 0, "PAUSE": 0, "N_DECODE": 2, "READ_SHAPE": (8, 8), "PRODUCT_SIZE": 8}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "numba" else find_spec(name))
    bench.large_matrix.cache_clear()
    yield
    bench.large_matrix.cache_clear()


@pytest.fixture
def report(quick, capsys):
    """What the bundled model's measures are as JSON."""
    bench.main(model_size=str(BUNDLED), against="tiktoken", rounds=1, json=True)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def model(tiny_model):
    encoder, hparams, params = load_encoder_hparams_and_params(str(tiny_model))
    return SimpleNamespace(directory=tiny_model, encoder=encoder, hparams=hparams, params=params)


def test_every_measure_has_a_row_with_figure_limit_and_ratio(report):
    assert [row["name"] for row in report["rows"]] == ROWS
    for row in report["rows"]:
        sign = -1 if row["unit"] in ("s", "MB") else 1
        assert row["share_of_limit"] == pytest.approx((row["here"] / row["limit"]) ** sign)
        assert {"limit", "here"} <= row["figures"].keys()
        assert all(len(figures) == 1 and figures[0] > 0 for figures in row["figures"].values())
    peers = report["rows"][-1]["peers"]
    assert peers["tiktoken"]["ratio"] == pytest.approx(report["rows"][-1]["here"] / peers["tiktoken"]["median"])
    assert report["machine"]["n_threads"] >= 1
    assert "tiktoken" in report["machine"]["versions"]


def test_the_table_has_every_row_in_120_columns(report):
    report["peers"] = list(bench.PEERS)
    report["rows"][0]["unsteady"] = ["here"]
    report["rows"][0]["peers"] = {peer: {"median": 123456.7, "ratio": 12.34} for peer in bench.PEERS}
    table = bench.format_table(report)
    for name in ROWS:
        assert sum(line.startswith(f"{name}  ") for line in table.splitlines()) == 1
    figures = [line for line in table.splitlines() if "tokens/s" in line or "MB" in line or "ratio" in line]
    assert max(map(len, figures)) <= 120
    assert figures[1].endswith(" ~")
    for text in (report["machine"]["processor"], "threads", "GFLOP/s", "GB/s", "123,457", "12.34"):
        assert text in table


def test_standard_output_is_json_and_nothing_else(tmp_path):
    (tmp_path / "text").write_text("To be, or not to be", encoding="utf-8")
    options = ("--only", "tokenizer", "--rounds", "1", "--text", str(tmp_path / "text"), "--json")
    child = run("bench.py", "--model_size", str(BUNDLED), *options)
    assert child.returncode == 0, child.stderr
    [row] = json.loads(child.stdout)["rows"]
    assert row["unit"] == "MB/s"


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--against", "pytorch"], "not 'pytorch'"),
        (["--only", "decode,everything"], "not 'everything'"),
        (["--rounds", "0"], "rounds must be a whole number, 1 or more, not 0"),
        (["--rounds", "many"], "rounds must be a whole number"),
        (["--model_size", "not there"], "there is no model 'not there'"),
        (["--text", "not there"], "not there"),
    ],
)
def test_a_bad_option_is_one_line(options, problem):
    child = run("bench.py", "--model_size", str(BUNDLED), *options)
    [line] = child.stderr.decode().splitlines()
    assert child.returncode == 1
    assert problem in line


def test_a_peer_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("llama_cpp", "torch") else True)
    with pytest.raises(ImportError, match=r"pip install torch llama-cpp-python, or") as caught:
        bench.main(against="transformers,llama_cpp")
    assert "\n" not in str(caught.value)


def test_a_round_takes_every_measure_once_and_the_first_does_not_count(quick):
    taken = []

    def measure(name, **values):
        left = {party: iter(figures) for party, figures in values.items()}
        parties = {party: lambda party=party: taken.append(name + party) or next(left[party]) for party in values}
        return "decode", name, "tokens/s", {}, parties

    steady = measure("a ", limit=[1, 20, 20, 20], here=[1000, 8, 6, 7], peer=[1000, 3, 3.5, 4])
    disturbed = measure("b ", limit=[1, 20, 20, 20], here=[1, 6, 1, 6])
    row, other = bench.take_all([steady, disturbed], 3)
    assert taken == ["a limit", "a here", "a peer", "b limit", "b here"] * 4
    assert (row["limit"], row["here"], row["share_of_limit"]) == (20, 7, 0.35)
    assert row["peers"] == {"peer": {"median": 3.5, "ratio": 2}}
    assert row["unsteady"] == []
    assert (other["here"], other["unsteady"]) == (6, ["here"])
    assert not any("do not trust" in line for line in bench.notes([row | {"group": ""}]))
    assert any("do not trust" in line for line in bench.notes([other | {"group": ""}]))


def test_a_limit_is_the_time_of_what_takes_longer(monkeypatch):
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 1000.0)
    monkeypatch.setattr(bench, "product_rate", lambda: 600.0)
    assert bench.token_limit({"bytes": 10}) == 100
    assert bench.token_limit({"operations": 6}) == 100
    assert bench.token_limit({"bytes": 10, "operations": 12}) == 50
    assert bench.token_limit({"bytes": 50, "operations": 12}) == 20


def test_what_a_token_costs_is_that_of_the_released_model():
    """124M: 85 M weights in the blocks' matrices, 38.6 M in the vocabulary's, 498 MB in all."""
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    params = bench.view_as(param_shapes(hparams), np.broadcast_to(np.float32(0), 124_439_808))
    rows = bench.engine_measures(SimpleNamespace(hparams=hparams, params=params), [], None)
    costs = {name: cost for _, name, _, cost, _ in rows}
    assert costs["prompt of 1,000"] == {"operations": 2 * 84_934_656}
    assert costs["decode after 1,000"] == {"bytes": 497_759_232}
    assert costs["decode, batch of 64"] == {"bytes": 497_759_232 / 64, "operations": 2 * (84_934_656 + 38_597_376)}


def test_a_released_model_that_is_not_there_is_not_downloaded_but_made(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"124M": (8, 2, 1)})
    monkeypatch.setattr("checkpoint.fetch", lambda *args, **options: pytest.fail("it downloads"))
    monkeypatch.setattr("utils.CODE", tmp_path)
    (tmp_path / "models" / "124M").mkdir(parents=True)
    write_tables(tmp_path / "models" / "124M")
    model = bench.open_model("124M", "models", tmp_path / "temporary")
    assert model.hparams["n_vocab"] == 50257
    assert len(model.encoder.encoder) == TINY["n_vocab"]
    assert "random" in model.weights
    assert model.tokenizer == str(tmp_path / "models" / "124M")
    assert model.directory == tmp_path / "temporary" / "124M"


def test_a_released_model_that_is_there_is_taken(tmp_path):
    write_model(tmp_path / "124M")
    model = bench.open_model("124M", str(tmp_path), tmp_path / "temporary")
    assert model.directory == tmp_path / "124M"
    assert "random" not in model.weights
    assert not (tmp_path / "temporary").exists()


def test_a_process_is_measured_on_its_own():
    mine = np.ones(50_000_000)  # 400 MB, which by the system's count a child would begin with
    seconds, peak = bench.run_process("-c", "import time; x = bytearray(b'x') * 40_000_000; time.sleep(0.2)")
    assert mine.all()
    assert seconds > 0.2
    assert math.isnan(peak) or 40 < peak < 200


def test_a_process_that_fails_is_one_line():
    with pytest.raises(OSError, match=r"failed: .*broken") as caught:
        bench.run_process("-c", "raise SystemExit('broken')")
    assert "\n" not in str(caught.value)


def test_an_int8_model_is_measured_where_numba_is(quick, monkeypatch, model):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setitem(__import__("sys").modules, "quantize", SimpleNamespace(quantize=lambda params: params))
    names = {name: cost for _, name, _, cost, _ in bench.engine_measures(model, [], None)}
    n_bytes = names["decode after 10"]["bytes"]
    n_matrices = 2 * 12 * 48 * 48 + 300 * 48
    assert names["decode after 10, int8"] == {"bytes": n_bytes - 4 * n_matrices + n_matrices}


@pytest.mark.reference
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("kind", ["transformers", "f32", "q8_0"])
def test_peers_compute_the_same_model(kind, shakespeare, tmp_path, exported):
    for module in ("transformers",) if kind == "transformers" else ("llama_cpp", "gguf"):
        pytest.importorskip(module)
    if exported:
        directory = tmp_path / "exported"
        export(str(BUNDLED), str(directory))
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
        encoder, hparams, params = load_encoder_hparams_and_params(str(directory))
    else:
        directory, (encoder, hparams, params) = BUNDLED, shakespeare
    model = SimpleNamespace(directory=directory, encoder=encoder, hparams=hparams, params=params, remarks=[])
    engine = (
        bench.transformers_engine(model) if kind == "transformers" else bench.llama_cpp_engine(model, tmp_path, kind)
    )
    ids = np.array(encoder.encode("ROMEO:"))
    n_tokens = 1 if kind == "q8_0" else 8  # int8 weights soon prefer another token
    expected = generate(ids, params, hparams["n_head"], n_tokens)
    assert list(engine(ids, n_tokens)) == list(engine(ids, n_tokens)) == expected
    if kind == "transformers":
        batch = np.stack([ids, ids[::-1]])
        assert np.transpose(list(engine(batch, 8))).tolist() == generate(batch, params, hparams["n_head"], 8)


def test_a_model_of_hugging_face_is_measured_by_its_name(tiny_model, tmp_path, monkeypatch):
    directory, fetched = tmp_path / "snapshot", []
    export(str(tiny_model), str(directory))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface.fetch_model", lambda name: directory)
    monkeypatch.setattr("huggingface.fetch_weights", lambda *arguments: fetched.append(arguments))
    model = bench.open_model("owner/model", "models", tmp_path)
    assert fetched == [("owner/model", directory)]
    assert model.directory == directory.resolve()
