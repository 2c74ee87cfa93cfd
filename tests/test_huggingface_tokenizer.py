"""The tokenizer in a directory of transformers: its tables, its added tokens, and which tokens end and start a text."""

import json
import re

import pytest

from encoder import END_OF_TEXT, read_encoder
from gpt2 import generate
from helpers import huggingface_models as hf
from helpers.huggingface_models import ADDED, CONFIG, TEXTS, added, assert_refused, tokenizer_json
from helpers.processes import run


@pytest.mark.parametrize(("config", "generation", "eot_id", "bos_id"), [
    ({"eos_token_id": None, "bos_token_id": None}, None, None, 299), ({"eos_token_id": 5}, {"eos_token_id": 9}, 9, 299),
    ({"eos_token_id": 300, "bos_token_id": 300}, None, None, 299), ({"eos_token_id": 5, "bos_token_id": 7}, None, 5, 7),
    ({"eos_token_id": 5}, {"eos_token_id": None}, None, 299), ({"eos_token_id": 5, "bos_token_id": 50256}, None, 5, 5),
    ({"eos_token_id": 0, "bos_token_id": 0}, None, 0, 0), ({"eos_token_id": 5}, {"eos_token_id": [9]}, 9, 299),
    ({"eos_token_id": 5}, {"bos_token_id": 9}, None, 9), ({"eos_token_id": -1}, None, None, 299), ({}, None, 299, 299),
    ({"eos_token_id": [5]}, None, 5, 299), ({"eos_token_id": 5}, {}, None, 299),
])  # fmt: skip
def test_ids_that_end_and_start_a_text(tmp_path, config, generation, eot_id, bos_id):
    hf.write(tmp_path, config)
    if generation is not None:
        hf.write_json(tmp_path / "generation_config.json", generation)
    encoder = read_encoder(tmp_path)
    assert (encoder.eot_id, encoder.bos_id) == (eot_id, bos_id)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(("name", "value", "is_plain"), [
    ("repetition_penalty", 1.5, False), ("repetition_penalty", 1.0, True), ("no_repeat_ngram_size", 3, False),
    ("num_beams", 4, False), ("min_length", 5, False), ("min_new_tokens", 5, False), ("bad_words_ids", [[1]], False),
    ("bad_words_ids", None, True), ("suppress_tokens", [1], False), ("begin_suppress_tokens", [1], False),
    ("sequence_bias", [[[1], 2.0]], False), ("forced_bos_token_id", 1, False), ("forced_eos_token_id", 1, False),
    ("exponential_decay_length_penalty", [1, 1.5], False), ("temperature", 0.7, True),
])  # fmt: skip
def test_unsupported_generation_settings_are_printed(tmp_path, capsys, file, name, value, is_plain):
    hf.write(tmp_path)
    hf.write_json(tmp_path / file, (CONFIG if file == "config.json" else {}) | {name: value})
    read_encoder(tmp_path)
    said = capsys.readouterr().err
    assert said == "" if is_plain else f"{name} = {json.dumps(value)}" in said


@pytest.mark.parametrize("value", [[5, 6], [], "299", 1.5, True, {}, [True], ["5"]], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_text_must_end_with_a_single_token(tmp_path, file, value):
    hf.write(tmp_path)
    hf.write_json(tmp_path / file, (CONFIG if file == "config.json" else {}) | {"eos_token_id": value})
    assert_refused(tmp_path, r"eos_token_id is .*: only one token's id is supported")


def test_an_empty_prompt_starts_with_bos(tmp_path):
    encoder, hparams, params = hf.load(hf.write(tmp_path, {"bos_token_id": 7, "eos_token_id": None}))
    shown = run("gpt2.py", "", f"--model_size={tmp_path}", "--n_tokens_to_generate=4")
    expected = encoder.decode(generate([7], params, hparams["n_head"], 4))
    assert (shown.returncode, shown.stderr, shown.stdout) == (0, b"", f"{expected}\n".encode())


@pytest.mark.parametrize("layout", ["strings", "pairs", "tables", "tables and tokenizer.json"])
def test_every_layout_gives_the_same_ids(tmp_path, tiny_encoder, layout):
    if "tables" in layout:
        hf.write_older_tables(tmp_path)
    hf.write(tmp_path, tokenizer=tokenizer_json(pairs=layout == "pairs"))
    if layout == "tables":
        (tmp_path / "tokenizer.json").unlink()
    encoder = read_encoder(tmp_path)
    for text in TEXTS:
        for allow_special in (False, True):
            ids = encoder.encode(text, allow_special)
            assert ids == tiny_encoder.encode(text, allow_special)
            assert encoder.decode(ids) == text


def change_at(value, path, change):
    """`value` with another one at the dotted `path`."""
    name, _, rest = path.partition(".")
    return value | {name: change_at(value[name], rest, change) if rest else change}


def in_sequence(*processors):
    return {"type": "Sequence", "processors": list(processors)}


TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
WITH_BOS = TEMPLATE | {"single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, *TEMPLATE["single"]]}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}
BERT = {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 0]}
NESTED = in_sequence(BYTE_LEVEL, in_sequence(WITH_BOS))


@pytest.mark.parametrize(("path", "value"), [
    ("normalizer", {"type": "NFC"}), ("pre_tokenizer.add_prefix_space", True), ("pre_tokenizer.use_regex", False),
    ("pre_tokenizer.type", "Whitespace"), ("pre_tokenizer", None), ("pre_tokenizer", [1]),
    ("decoder.type", "WordPiece"), ("decoder", None), ("model.type", "WordPiece"), ("model.type", "Unigram"),
    ("model.dropout", 0.1), ("model.continuing_subword_prefix", "##"), ("model.end_of_word_suffix", "</w>"),
    ("model.byte_fallback", True), ("model.ignore_merges", True),
    *(("post_processor", value) for value in (WITH_BOS, ROBERTA, BERT, in_sequence(BYTE_LEVEL, WITH_BOS), NESTED)),
])  # fmt: skip
def test_an_error_names_unsupported_tokenizer_settings(tmp_path, path, value):
    hf.write(tmp_path, tokenizer=change_at(tokenizer_json(), path, value))
    complaint = f"{path} is {json.dumps(value)}" if path != "post_processor" else "post_processor adds tokens"
    assert_refused(tmp_path, rf"tokenizer\.json: {re.escape(complaint)}")


@pytest.mark.parametrize("dropout", [None, 0, 0.0])
@pytest.mark.parametrize("processor", ["absent", None, BYTE_LEVEL, TEMPLATE, in_sequence(BYTE_LEVEL, TEMPLATE)])
def test_every_post_processor_that_adds_nothing_is_accepted(tmp_path, tiny_encoder, dropout, processor):
    tokenizer = tokenizer_json(dropout=dropout, continuing_subword_prefix=None, end_of_word_suffix=None)
    for name in ("byte_fallback", "ignore_merges", "fuse_unk", "unk_token"):
        del tokenizer["model"][name]
    del tokenizer["normalizer"], tokenizer["post_processor"]
    hf.write(tmp_path, tokenizer=tokenizer | ({} if processor == "absent" else {"post_processor": processor}))
    assert read_encoder(tmp_path).encode(TEXTS[0]) == tiny_encoder.encode(TEXTS[0])


@pytest.mark.parametrize(("name", "good", "bad"), [
    *((name, [False], True) for name in ("add_prefix_space", "add_bos_token", "add_eos_token")),
    ("tokenizer_class", ["GPT2Tokenizer", "GPT2TokenizerFast"], "CLIPTokenizer"),
])  # fmt: skip
def test_an_error_names_unsupported_options_and_tokenizer_classes(tmp_path, name, good, bad):
    hf.write_older_tables(hf.write(tmp_path))
    for value in good:
        hf.write_json(tmp_path / "tokenizer_config.json", {name: value, "model_max_length": 1024})
        read_encoder(tmp_path)
    hf.write_json(tmp_path / "tokenizer_config.json", {name: bad})
    assert_refused(tmp_path, rf"tokenizer_config\.json: {name} is {json.dumps(bad)}: only")


def test_an_error_names_missing_tokenizer_files(tmp_path):
    (hf.write_older_tables(hf.write(tmp_path)) / "merges.txt").unlink()
    assert_refused(tmp_path, r"merges\.txt is missing", FileNotFoundError)
    (tmp_path / "vocab.json").unlink()
    assert_refused(tmp_path, r"neither tokenizer\.json nor vocab\.json exists", FileNotFoundError)


DAMAGE = {
    "model.vocab": [None, [], {"a": "0"}, {"a": True}, {"a": 0}],
    "model.merges": [["a b c"], [["a"]], [["a", 1]], ["Ġ never"], [5], 5, None],
    "added_tokens": [5, ["<pad>"], [{"content": "<pad>"}], [{"id": 300}], [added(300, 5)], [added(300, None)],
                     [added("300", "<pad>")], [added(300, "")], [added(301, "<pad>")], [added(298, END_OF_TEXT)],
                     [added(5, "<pad>")], [added(300, "\ud800")]],
    "post_processor": [[1], "ByteLevel", {"type": "Sequence"}, {"type": "Sequence", "processors": 5}, in_sequence(5),
                       *({"type": "TemplateProcessing", "single": value} for value in (None, [5]))],
}  # fmt: skip


@pytest.mark.parametrize(("path", "value"), [(path, value) for path in DAMAGE for value in DAMAGE[path]], ids=repr)
def test_an_error_names_a_damaged_tokenizer_file(tmp_path, path, value):
    tokenizer = change_at(tokenizer_json(), path, value)
    (hf.write(tmp_path) / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert_refused(tmp_path, r"tokenizer\.json")


def test_embeddings_may_be_padded_but_not_too_few(tmp_path):
    encoder, hparams, params = hf.load(hf.write(tmp_path, {"vocab_size": 320}))
    assert (len(encoder.encoder), hparams["n_vocab"], len(params["wte"])) == (300, 320, 320)
    assert_refused(hf.write(tmp_path, {"vocab_size": 299}), r"300 tokens, but vocab_size in config\.json is 299")


@pytest.mark.parametrize("layout", ["tokenizer.json", "tables"])
def test_added_tokens_keep_their_flags(tmp_path, layout):
    hf.write(tmp_path, tokenizer=tokenizer_json(ADDED))
    if layout == "tables":
        hf.write_older_tables(tmp_path)
        entries = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in ADDED}
        hf.write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": entries})
    encoder = read_encoder(tmp_path)
    tokens = {text: vars(token) for text, token in encoder.added_tokens.items() if text != END_OF_TEXT}
    found = [{"id": encoder.encoder[text], "content": text} | token for text, token in tokens.items()]
    assert [{name: entry[name] for name in ADDED[0]} for entry in found] == ADDED


@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
def test_other_files_make_added_tokens_special(tmp_path, tiny_encoder, file):
    hf.write_older_tables(hf.write(tmp_path))
    hf.write_json(tmp_path / "added_tokens.json", {"<tool>": 300, "<pad>": 301, "<x>": 302})
    hf.write_json(tmp_path / file, {"pad_token": "<pad>", "additional_special_tokens": [{"content": "<x>"}]})
    encoder = read_encoder(tmp_path)
    assert encoder.encode("<tool><pad><x>") == [300, *tiny_encoder.encode("<pad><x>")]
    assert encoder.encode("<tool><pad><x>", True) == [300, 301, 302]
    assert [encoder.added_tokens[text].normalized for text in ("<tool>", "<pad>", "<x>")] == [True, False, False]


@pytest.mark.parametrize(("file", "value"), [
    *(("added_tokens.json", value) for value in ({"<pad>": "300"}, {"<pad>": None}, {"": 300}, {"<pad>": 301})),
    *(("tokenizer_config.json", {"added_tokens_decoder": value}) for value in (
        [], {"x": {"content": "<pad>"}}, {"300": "<pad>"}, {"300": {}}, {"300": {"content": 5}})),
], ids=str)  # fmt: skip
def test_damaged_added_tokens_are_refused(tmp_path, file, value):
    hf.write_json(hf.write_older_tables(hf.write(tmp_path)) / file, value)
    assert_refused(tmp_path, rf"{re.escape(str(tmp_path))}.* is damaged")
