"""What store/huggingface.py reads and export.py writes has the same ids, logits and text in transformers."""

import pytest

from encoder import read_encoder
from export import main as export
from gpt2 import generate, gpt2
from helpers import huggingface_models as hf
from helpers.models import BUNDLED, assert_same_params, tiny_tables
from store import huggingface
from test_gpt2 import TOLERANCE, assert_close

pytestmark = pytest.mark.reference
CONFIG = hf.CONFIG | {"n_positions": 64}


@pytest.fixture(autouse=True)
def transformers():
    pytest.importorskip("torch").set_num_threads(1)  # small models are slower with more threads
    return pytest.importorskip("transformers", reason="transformers is not installed")


def reference_model(config):
    """transformers' GPT-2 with the weights of the tests."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**{k: v for k, v in config.items() if k != "model_type"})).eval()
    state = {name: torch.tensor(array) for name, array in hf.prefixed(hf.tensors_for(config)).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


def save_tokenizer(directory, layout, entries=()):
    """Write the tokenizer of the tests as transformers does, or only tokenizer.json, or only the two older tables."""
    from tokenizers import AddedToken
    from transformers import GPT2Tokenizer

    if layout == "tokenizer.json":
        hf.write_json(directory / "tokenizer.json", hf.tokenizer_json(entries))
        return
    hf.write_older_tables(directory)
    if layout == "transformers":
        tokenizer = GPT2Tokenizer.from_pretrained(directory)
        for entry in entries:
            options = {name: value for name, value in entry.items() if name != "id"}
            tokenizer.add_tokens(AddedToken(**options), special_tokens=entry["special"])
        tokenizer.save_pretrained(directory)


def assert_as_transformers(directory, prompts=("def encode(self, text):", "the tokens of <|endoftext|> a", " 1")):
    """The model in `directory` has the same token ids, logits and greedy text in transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    encoder, hparams, params = hf.load(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        assert encoder.encode(prompt, allow_special=True) == ids
        if "«" not in prompt:  # transformers reads « as a byte, even in an added token
            assert encoder.decode(ids) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        inputs = torch.tensor([ids])
        with torch.no_grad():
            expected = model(inputs).logits[0].numpy()
        assert_close(gpt2(ids, **params, n_head=hparams["n_head"]), expected, TOLERANCE)
        n = min(20, hparams["n_ctx"] - len(ids))
        options = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        made = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)[0, len(ids) :].tolist()
        assert generate(ids, params, hparams["n_head"], n, n_vocab=len(encoder.encoder)) == made


@pytest.mark.parametrize("variant", hf.VARIANTS)
def test_each_variant_and_its_export_match_transformers(tmp_path, variant):
    save_tokenizer(tmp_path, "transformers")
    reference_model(CONFIG | hf.VARIANTS[variant]).save_pretrained(tmp_path)
    assert_as_transformers(tmp_path)
    export(str(tmp_path), str(tmp_path / "out"))
    assert_same_params(hf.load(tmp_path / "out")[2], hf.load(tmp_path)[2])
    assert_as_transformers(tmp_path / "out")


@pytest.mark.parametrize("layout", ["transformers", "tokenizer.json", "tables"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("parts", ["whole", "shards", "no prefix"])
def test_each_layout_matches_transformers(tmp_path, layout, dtype, parts):
    import torch

    save_tokenizer(tmp_path, layout)
    model = reference_model(CONFIG).to(getattr(torch, dtype))
    model = model.transformer if parts == "no prefix" else model
    model.save_pretrained(tmp_path, max_shard_size="100KB" if parts == "shards" else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (parts == "shards")
    assert_as_transformers(tmp_path)


def test_the_exported_bundled_model_matches_transformers(tmp_path):
    export(str(BUNDLED), str(tmp_path / "out"))
    assert_as_transformers(tmp_path / "out", ["ROMEO:", "First Citizen:\nWe are <|endoftext|>", "\n"])


@pytest.mark.parametrize("layout", ["transformers", "tokenizer.json"])
def test_added_tokens_and_their_export_match_transformers(tmp_path, layout):
    save_tokenizer(tmp_path, layout, hf.ADDED)
    reference_model(CONFIG | {"vocab_size": 311}).save_pretrained(tmp_path)
    export(str(tmp_path), str(tmp_path / "out"))
    for directory in (tmp_path, tmp_path / "out"):
        assert_as_transformers(directory, [text for text, _ in hf.SEGMENTS])


@pytest.mark.parametrize("config", [
    {}, {"hidden_size": 96, "n_embd": 48}, {"layer_norm_epsilon": 0.5, "n_inner": 7},
    {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "max_position_embeddings": 16},
], ids=str)  # fmt: skip
def test_a_config_is_read_as_by_gpt2config(transformers, tmp_path, config):
    hf.write_json(tmp_path / "config.json", config)
    expected = transformers.GPT2Config.from_pretrained(tmp_path)
    found = huggingface.read_config(tmp_path / "config.json")
    for name in huggingface.DEFAULTS:
        assert found[name] == getattr(expected, name)


@pytest.mark.parametrize("layout", ["tables", "tokenizer.json"])
@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
def test_other_files_make_tokens_of_the_vocabulary_special(transformers, tmp_path, layout, file):
    vocabulary = tiny_tables()[0] | {"<pad>": 300}
    hf.write(tmp_path, tokenizer=hf.tokenizer_json(vocab=vocabulary))
    if layout == "tables":
        hf.write_older_tables(tmp_path, vocabulary)
    hf.write_json(tmp_path / file, {"pad_token": "<pad>"})
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("a <pad>")["input_ids"]
    assert read_encoder(tmp_path).encode("a <pad>", allow_special=True) == ids
