"""Models by name from a stand-in for Hugging Face's hub are downloaded once, and only if they can be used."""

import json
import os
import shutil

import pytest

from gpt2 import generate
from helpers import huggingface_models as hf
from helpers.hub_server import Hub, make_handler
from helpers.processes import error_line, run, run_code, serving
from store.huggingface import is_on_hub

NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}, {"GPT2_OFFLINE": "1"}


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    hub = Hub(tmp_path)
    with serving(make_handler(hub)) as hub.url:
        yield hub


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with all that config.json can ask for, and added tokens; for reading only."""
    return hf.write(tmp_path_factory.mktemp("hub") / "model", hf.EVERYTHING, tokenizer=hf.tokenizer_json(hf.ADDED))


def continuation(directory):
    """What `Hub.run` prints with the model in `directory`."""
    encoder, hparams, params = hf.load(directory)
    ids = generate(encoder.encode("def"), params, hparams["n_head"], 5, eot_id=encoder.eot_id, n_vocab=300)
    return f"{encoder.decode(ids)}\n"


def test_a_model_is_downloaded_once_and_then_needs_no_network(hub, model):
    hub.add(model)
    others = ("README.md", "pytorch_model.bin", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack")
    hub.files |= dict.fromkeys(others, b"not wanted")
    shown = hub.run()
    assert (shown.returncode, shown.stdout.decode()) == (0, continuation(model)), shown.stderr.decode()
    assert sorted(hub.fetched()) == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.requests.clear()
    for env in ({}, NOWHERE, *(NOWHERE | offline for offline in OFFLINE)):
        shown = hub.run(env=env)
        assert (shown.returncode, shown.stdout.decode(), shown.stderr) == (0, continuation(model), b"")
    assert hub.fetched() == []


def test_files_that_other_programs_left_out_are_downloaded(hub, model):
    hub.add(model)
    download = "from huggingface_hub import hf_hub_download as f; [f('owner/model', n) for n in FILES]"
    run_code(f"FILES = ['config.json', 'tokenizer.json']; {download}", env=hub.env | {"HF_ENDPOINT": hub.url})
    hub.files["tokenizer_config.json"] = b'{"add_prefix_space": true}'
    assert "add_prefix_space is true" in error_line(hub.run())


def test_weights_in_parts_are_downloaded_part_by_part(hub, tmp_path):
    directory = hf.write(tmp_path / "model")
    hf.write_shards(directory, hf.TENSORS, 3)
    hub.add(directory)
    shown = hub.run()
    assert (shown.returncode, shown.stdout.decode()) == (0, continuation(directory)), shown.stderr.decode()
    assert len(hub.fetched()) == len(set(hub.fetched())) == 6
    assert (hub.run().stdout, len(hub.fetched())) == (shown.stdout, 6)
    (part,) = tmp_path.glob("hf/hub/*/snapshots/*/model-00002-of-00003.safetensors")
    part.unlink()
    assert hub.run().stdout == shown.stdout, "a missing part is downloaded again"


@pytest.mark.parametrize("cached", [False, True], ids=["empty cache", "all but the weights"])
def test_offline_with_a_cache_that_lacks_the_model_or_its_weights_is_one_line(hub, model, cached):
    hub.add(model)
    if cached:
        assert hub.run("def", script="encoder.py").returncode == 0
    hub.requests.clear()
    for flags, env in ((("--offline",), {}), *(((), offline) for offline in OFFLINE)):
        line = error_line(hub.run("def", *flags, env=env))
        assert line.startswith("gpt2.py: there is no directory owner/model") and "cache" in line
    assert hub.requests == []


PROBLEM = "there is no directory owner/model, and Hugging Face did not provide that model"


@pytest.mark.parametrize(("answer", "env", "problem"), [
    ({"status": 401, "code": "RepoNotFound"}, {}, f"{PROBLEM}: it does not exist or is private"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ({"status": 403, "code": "GatedRepo"}, {}, f"{PROBLEM}: accept its terms"),
        ({"files": {"vocab.json": b"{}"}}, {}, "owner/model at Hugging Face is not a transformers model: it has no c"),
        ({}, NOWHERE, f"{PROBLEM}: "),
    ]),
])  # fmt: skip
def test_a_model_that_cannot_be_downloaded_is_one_line(hub, answer, env, problem):
    vars(hub).update(answer)
    line = error_line(hub.run(env={"HF_HUB_DOWNLOAD_TIMEOUT": "1"} | env))
    assert line.startswith(f"gpt2.py: {problem}") and len(line) < 600 and "offline" not in line


@pytest.mark.parametrize(("file", "change"), [
    ("config.json", {"activation_function": "relu"}), ("tokenizer.json", {"normalizer": {"type": "NFC"}}),
])  # fmt: skip
def test_a_model_that_is_refused_does_not_download_its_weights(hub, model, file, change):
    hub.add(model)
    hub.files[file] = json.dumps(json.loads(hub.files[file]) | change).encode()
    assert f"{next(iter(change))} is" in error_line(hub.run())
    assert sorted(hub.fetched()) == ["config.json", "tokenizer.json"]


def test_pytorch_weights_are_not_downloaded_if_they_cannot_be_read(hub, model, tmp_path):
    hub.add(model)
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    assert "pip install torch" in error_line(hub.run(env={"PYTHONPATH": str(tmp_path)}))
    assert "pytorch_model.bin" not in hub.fetched()


def test_showing_tokens_sends_the_users_key_and_downloads_no_weights(hub, model, tiny_encoder):
    hub.add(model)
    shown = hub.run("def x", script="encoder.py", env={"HF_TOKEN": "hf_secret"})
    assert [int(line.split()[0]) for line in shown.stdout.decode().splitlines()] == tiny_encoder.encode("def x")
    assert sorted(hub.fetched()) == ["config.json", "tokenizer.json"]
    assert {token for _, path, token in hub.requests if "/owner/model" in path} == {"Bearer hf_secret"}


def test_a_directory_of_that_name_is_used_before_the_hub_and_not_completed_from_it(hub, model, tmp_path):
    hub.add(model)
    shutil.copytree(model, tmp_path / "owner" / "model")
    shown = hub.run(cwd=tmp_path)
    assert (shown.returncode, shown.stdout.decode(), shown.stderr) == (0, continuation(model), b"")
    (tmp_path / "owner" / "model" / "model.safetensors").unlink()
    assert "has no weights" in error_line(hub.run(cwd=tmp_path))
    assert hub.requests == []


@pytest.mark.parametrize("name", ["../model", "./model", "model/..", "a/b/c", "a/", "/a", "a b/c", "owner/.."])
def test_a_path_is_not_a_name_on_the_hub(name):
    assert not is_on_hub(name)


def test_without_huggingface_hub_one_line_says_what_to_install(tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not here', name='huggingface_hub')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    line = error_line(run("gpt2.py", "a", "--model_size=owner/model", env=env, cwd=tmp_path))
    assert line == "gpt2.py: there is no directory owner/model; to download it: pip install huggingface_hub"
