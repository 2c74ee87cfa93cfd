"""The model: each function, the whole against transformers, the cache, batches and generation."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gpt2 as module
from gpt2 import attention, gelu, generate, gpt2, hidden_states, layer_norm, linear, mha, new_cache, softmax, stream
from helpers.golden import CASES, golden, inputs_of, reference_model
from helpers.models import TINY, random_params
from helpers.processes import run_code
from store.params import map_leaves

N_HEAD, N_VOCAB, N_CTX, N_EMBD = (TINY[name] for name in ("n_head", "n_vocab", "n_ctx", "n_embd"))
TOLERANCE = 1e-4  # a share of the range of the logits: the project promises this bound


def assert_close(found, expected, tolerance=1e-5):
    """Assert that two arrays are equal up to a share of the expected range."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.ptp(expected)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, N_VOCAB, 20).tolist()


@pytest.fixture(scope="module")
def logits(ids, tiny_params):
    return gpt2(ids, **tiny_params, n_head=N_HEAD)


def test_gelu_is_the_tanh_form():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = [0.5 * t * (1 + math.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))) for t in x.tolist()]
    np.testing.assert_allclose(gelu(x), expected, atol=1e-6)


def test_softmax_sums_to_1_even_where_exp_would_overflow():
    x = np.array([[1000.0, 1000.0, 0.0], [-1000.0, 0.0, math.log(3)]], dtype=np.float32)
    np.testing.assert_allclose(softmax(x), [[0.5, 0.5, 0], [0, 0.25, 0.75]], atol=1e-7)
    np.testing.assert_allclose(softmax([0, math.log(3)]), [0.25, 0.75])  # the blog post's softmax takes lists too


def test_layer_norm_has_mean_b_and_deviation_g():
    x = np.random.default_rng(0).normal(5, 3, (4, 200)).astype(np.float32)
    normed = layer_norm(x, g=np.float32(2) * np.ones(200, np.float32), b=np.ones(200, np.float32))
    np.testing.assert_allclose(normed.mean(-1), 1, atol=1e-5)
    np.testing.assert_allclose(normed.std(-1), 2, atol=1e-4)
    # A constant row has no deviation. eps, which is inside the root, prevents a division by zero.
    assert layer_norm(np.full((1, 2), 7, np.float32), g=1, b=0).tolist() == [[0, 0]]
    assert layer_norm(np.array([[-1.0, 1.0]]), g=1, b=0, eps=3)[0, 1] == 0.5
    assert layer_norm(np.array([[-1e-3, 1e-3]]), g=1, b=0)[0, 1] == pytest.approx(1e-3 / math.sqrt(1e-6 + 1e-5))


def test_linear_is_one_product_for_all_leading_axes():
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 5)), rng.normal(size=5)
    np.testing.assert_allclose(linear(x, w, b), np.einsum("bsi,io->bso", x, w) + b)
    np.testing.assert_allclose(linear(x[0, 0], w, b), x[0, 0] @ w + b)


@pytest.mark.parametrize("mask", [(1 - np.tri(6)) * -1e10, module.causal_mask(6, np.dtype(float))], ids=["1e10", "inf"])
def test_attention_sees_no_position_after_its_own(mask):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 6, 8))
    whole = attention(q, k, v, mask)
    for i in range(6):
        weights = np.exp(q[i] @ k[: i + 1].T / math.sqrt(8))
        np.testing.assert_allclose(whole[i], weights / weights.sum() @ v[: i + 1])


@pytest.mark.parametrize(("n_q", "n_past"), [(1, 0), (1, 9), (2, 5), (63, 0), (64, 3), (65, 0), (200, 40)])
def test_causal_attention_in_blocks_is_attention_with_a_mask(n_q, n_past):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 8)).astype(np.float32) for n in (n_q, n_past + n_q, n_past + n_q))
    mask = np.where(np.tri(n_q, n_past + n_q, n_past, dtype=bool), 0, -1e10).astype(np.float32)
    assert_close(module.causal_attention(q, k, v), attention(q, k, v, mask))


@pytest.mark.parametrize("n_rows", [1, 2, 4, 5, 16])
def test_products_of_few_and_of_many_rows_agree(n_rows):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(n_rows, 30)), rng.normal(size=(30, 7))
    assert_close(module.matmul(x, w), x @ w)
    assert module.matmul(x[:, None], w).shape == (n_rows, 1, 7)


@pytest.mark.parametrize("function", [softmax, gelu, partial(layer_norm, g=1, b=0)])
def test_functions_accept_whole_numbers_as_in_the_blog_post(function):
    x = np.array([[2, 100], [-5, 0]])
    np.testing.assert_allclose(function(x), function(x.astype(float)))


def test_mha_equals_its_heads_computed_one_by_one(tiny_params):
    x = np.random.default_rng(0).normal(size=(7, N_EMBD)).astype(np.float32)
    attn = tiny_params["blocks"][0]["attn"]
    q, k, v = (np.split(part, N_HEAD, axis=-1) for part in np.split(linear(x, **attn["c_attn"]), 3, axis=-1))
    mask = (1 - np.tri(7, dtype=np.float32)) * -1e10
    heads = np.hstack([attention(q[i], k[i], v[i], mask) for i in range(N_HEAD)])
    assert_close(mha(x, **attn, n_head=N_HEAD), linear(heads, **attn["c_proj"]))


def test_code_of_the_blog_post_runs_unchanged(tiny_params, ids, logits):
    """The parameters have the names, the order and the meaning of the post's own gpt2 and generate."""
    wte, wpe, blocks, ln_f = (tiny_params[name] for name in ("wte", "wpe", "blocks", "ln_f"))
    x = wte[ids] + wpe[range(len(ids))]
    for block in blocks:
        x = module.transformer_block(x, **block, n_head=N_HEAD)
    assert_close(layer_norm(x, **ln_f) @ wte.T, logits)
    assert_close(gpt2(ids, wte, wpe, blocks, ln_f, N_HEAD), logits)
    inputs = list(ids)
    for _ in range(5):
        inputs.append(int(np.argmax(gpt2(inputs, **tiny_params, n_head=N_HEAD)[-1])))
    assert generate(ids, tiny_params, N_HEAD, 5) == inputs[-5:]


def test_float32_stays_float32_in_every_function(tiny_params, ids):
    x = np.random.default_rng(0).normal(size=(5, N_EMBD)).astype(np.float32)
    block = tiny_params["blocks"][0]
    cache = new_cache(tiny_params, N_HEAD, 8)
    results = {
        "gelu": gelu(x), "softmax": softmax(x), "layer_norm": layer_norm(x, **block["ln_1"]),
        "linear": linear(x, **block["mlp"]["c_fc"]), "matmul": module.matmul(x, block["mlp"]["c_fc"]["w"]),
        "ffn": module.ffn(x, **block["mlp"]), "attention": attention(x, x, x, np.zeros((5, 5), np.float32)),
        "causal_attention": module.causal_attention(x, x, x), "mha": mha(x, **block["attn"], n_head=N_HEAD),
        "split_heads": module.split_heads(x, block["attn"]["c_attn"], N_HEAD)[0],
        "transformer_block": module.transformer_block(x, **block, n_head=N_HEAD),
        "embed": module.embed(ids, **tiny_params)[0], "apply_blocks": module.apply_blocks(x, [block], N_HEAD, [None]),
        "hidden_states": hidden_states(ids, **tiny_params, n_head=N_HEAD),
        "prefill": module.prefill(ids[:8], tiny_params, N_HEAD, cache), "new_cache": cache["kv"],
        "to_logits": module.to_logits(x, **tiny_params), "gpt2": gpt2(ids, **tiny_params, n_head=N_HEAD),
        "causal_mask": module.causal_mask(5, x.dtype),  # functools.cache wraps it: not in `functions` below
    }  # fmt: skip
    not_arrays = {"check_ids", "check_heads", "stream", "generate", "main"}
    functions = {name for name, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == "gpt2"}
    assert functions - not_arrays == results.keys() - {"causal_mask"}, "a function that this test does not know"
    assert {name: array.dtype for name, array in results.items()} == dict.fromkeys(results, np.dtype(np.float32))


def test_float64_weights_give_float64_logits(ids, logits):
    params = random_params(TINY, dtype=np.float64)
    precise = gpt2(ids, **params, n_head=N_HEAD)
    assert precise.dtype == np.float64
    assert_close(logits, precise)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_the_golden_files(case):
    ids = inputs_of(case)
    logits = gpt2(ids, **random_params(case.hparams, case.seed), n_head=case.n_head)
    assert_close(logits[case.positions], golden()[str(case)], TOLERANCE)


@pytest.mark.reference
@pytest.mark.parametrize(("n_layer", "n_embd", "n_head", "n_ctx", "n_seq"), [
    (1, 48, 1, 16, 1), (1, 48, 3, 16, 16), (2, 48, 12, 64, 33), (3, 96, 4, 128, 128), (12, 96, 6, 64, 64),
    (4, 384, 8, 256, 200), (2, 768, 12, 1024, 1024), (12, 768, 12, 256, 100),
])  # fmt: skip
def test_logits_and_greedy_ids_equal_those_of_transformers(n_layer, n_embd, n_head, n_ctx, n_seq):
    import torch

    hparams = {"n_vocab": 500, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    params = random_params(hparams, seed=n_seq)
    model = reference_model(hparams, params)
    ids = np.random.default_rng(n_seq).integers(0, 500, n_seq)
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits[0].numpy()
    found = gpt2(ids, **params, n_head=n_head)
    assert_close(found, expected, TOLERANCE)
    second, best = np.sort(expected, axis=-1)[:, -2:].T
    clear = best - second > 2 * TOLERANCE * np.ptp(expected)
    assert clear.mean() > 0.9
    assert (found.argmax(-1) == expected.argmax(-1))[clear].all()


@pytest.mark.reference
def test_greedy_text_equals_that_of_transformers(tiny_params, ids):
    import torch

    model = reference_model(TINY, tiny_params)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    assert generate(ids, tiny_params, N_HEAD, 12) == expected


@settings(max_examples=80)
@given(st.data())
def test_cached_equals_uncached_for_any_shape_length_and_batch(data):
    n_head, d_head, n_layer, n_ctx = (data.draw(st.integers(1, most)) for most in (5, 9, 3, 150))
    assume(n_head * d_head not in (2, 3))  # 2 or 3 numbers can be nearly equal, and layer_norm then magnifies rounding
    hparams = {"n_vocab": 40, "n_ctx": n_ctx, "n_embd": n_head * d_head, "n_head": n_head, "n_layer": n_layer}
    params = random_params(hparams, seed=data.draw(st.integers(0, 99)))
    batch = data.draw(st.sampled_from([(), (1,), (2,), (5,)]))
    n_seq = data.draw(st.integers(1, n_ctx))
    ids = np.random.default_rng(n_seq).integers(0, 40, (*batch, n_seq))
    whole = gpt2(ids, **params, n_head=n_head)
    cache, parts = new_cache(params, n_head, data.draw(st.integers(n_seq, n_ctx)), *batch), []
    while cache["n_past"] < n_seq:
        end = cache["n_past"] + data.draw(st.integers(1, n_seq - cache["n_past"]))
        parts.append(gpt2(ids[..., cache["n_past"] : end], **params, n_head=n_head, cache=cache))
        assert cache["n_past"] == end
    assert_close(np.concatenate(parts, axis=-2), whole)
    several = np.stack([ids, ids[..., ::-1]])[:, None]  # any batch axes work without a cache
    alone = [gpt2(row, **params, n_head=n_head) for row in several.reshape(-1, n_seq)]
    assert_close(gpt2(several, **params, n_head=n_head), np.reshape(alone, (*several.shape, 40)))


def test_a_separate_lm_head_computes_the_logits_in_generation_too(tiny_params, ids):
    params = tiny_params | {"lm_head": random_params(TINY, seed=5)["wte"]}
    states = hidden_states(ids, **params, n_head=N_HEAD)
    assert_close(gpt2(ids, **params, n_head=N_HEAD), states @ params["lm_head"].T)
    expected, context = [], list(ids)
    for _ in range(5):
        expected.append(int((hidden_states(context, **params, n_head=N_HEAD)[-1] @ params["lm_head"].T).argmax()))
        context.append(expected[-1])
    assert generate(ids, params, N_HEAD, 5) == expected != generate(ids, tiny_params, N_HEAD, 5)


def test_a_full_cache_refuses_more(tiny_params):
    cache = new_cache(tiny_params, N_HEAD, 4)
    gpt2([1, 2, 3], **tiny_params, n_head=N_HEAD, cache=cache)
    for compute in (partial(gpt2, **tiny_params), partial(module.prefill, params=tiny_params)):
        with pytest.raises(ValueError, match="room for 1"):
            compute([4, 5], n_head=N_HEAD, cache=cache)
    assert cache["n_past"] == 3


@pytest.mark.parametrize("n_past", [-3, -1, 3, 32, 40, 2.0, None, True, "1"])
def test_a_cache_with_an_n_past_beyond_what_was_filled_is_refused(tiny_params, n_past):
    cache = new_cache(tiny_params, N_HEAD, N_CTX)
    gpt2([1, 2], **tiny_params, n_head=N_HEAD, cache=cache)
    cache["n_past"] = n_past
    for compute in (partial(gpt2, **tiny_params), partial(module.prefill, params=tiny_params)):
        with pytest.raises(ValueError, match=f"the cache's n_past must be a whole number from 0 to 2, not {n_past!r}"):
            compute([3, 4], n_head=N_HEAD, cache=cache)


@pytest.mark.parametrize(("options", "complaint"), [
    *(({"n_head": n_head}, "n_head must be") for n_head in (0, -4, 4.0, None, True, "4", 49)),
    ({"n_head": 5}, "n_head = 5 does not divide the model's n_embd = 48"),
    *(({"n_batch": n_batch}, "n_batch must be") for n_batch in (0, -1, 1.0, True)),
    *(({"n_positions": n_positions}, "n_positions must be") for n_positions in (0, 1.5, N_CTX + 1)),
    ({"n_batch": 10**30}, "n_batch = 1000.* takes [0-9,.]+ GB of memory, and this machine has [0-9,.]+: choose less"),
])  # fmt: skip
def test_a_cache_that_fits_no_model_is_refused(tiny_params, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        new_cache(tiny_params, **{"n_head": N_HEAD, "n_positions": 8} | options)
    if "n_head" in options:
        with pytest.raises(ValueError, match=complaint):
            gpt2([1], **tiny_params, **options)


def test_logits_do_not_depend_on_later_tokens_however_large_the_scores(tiny_params, ids):
    params = map_leaves(lambda path, array: array * np.float32(1e6 if "c_attn" in path else 1), tiny_params)
    whole, changed = (gpt2(inputs, **params, n_head=N_HEAD) for inputs in (ids, [*ids[:10], *ids[:9:-1]]))
    assert np.isfinite(whole).all() and not np.array_equal(whole[10:], changed[10:])
    np.testing.assert_array_equal(whole[:10], changed[:10])
    cache = new_cache(params, N_HEAD, N_CTX)
    steps = [gpt2(ids[i : i + 4], **params, n_head=N_HEAD, cache=cache) for i in range(0, 20, 4)]
    assert_close(np.concatenate(steps), whole)


def test_weights_and_inputs_are_never_changed(tiny_params, ids):
    frozen, inputs, before = map_leaves(lambda path, array: array.copy(), tiny_params), np.array(ids), list(ids)
    map_leaves(lambda path, array: array.setflags(write=False), {"inputs": inputs, **frozen})
    assert generate(inputs, frozen, N_HEAD, 3) == generate(ids, tiny_params, N_HEAD, 3)
    generate(ids, tiny_params, N_HEAD, 3, temperature=1)
    assert ids == before


NO_IDS = [[], [0.5], 3, [-1], [N_VOCAB], ["a"], [None], [[]], [True], range(N_CTX + 1), [10**30]]


@pytest.mark.parametrize("inputs", NO_IDS, ids=str)
@pytest.mark.parametrize("function", [gpt2, hidden_states])
def test_inputs_that_are_not_token_ids_are_refused(tiny_params, function, inputs):
    with pytest.raises(ValueError, match=r"token"):
        function(inputs, **tiny_params, n_head=N_HEAD)


def test_stream_yields_what_generate_returns_one_at_a_time(tiny_params, ids):
    steps = stream(ids, tiny_params, N_HEAD, 6)
    first = next(steps)
    assert isinstance(first, int)
    assert [first, *steps] == generate(ids, tiny_params, N_HEAD, 6)


@pytest.mark.parametrize("n_ctx", [1, 2, 5, 8])
def test_past_the_context_the_older_half_is_dropped(n_ctx):
    hparams = TINY | {"n_ctx": n_ctx}
    params = random_params(hparams, seed=3)
    prompt = [5, 6, 7][:n_ctx]
    context, expected = list(prompt), []
    for _ in range(20):
        if len(context) > n_ctx:
            del context[: max(n_ctx // 2, 1)]
        expected.append(int(gpt2(context, **params, n_head=N_HEAD)[-1].argmax()))
        context.append(expected[-1])
    assert generate(prompt, params, N_HEAD, 20) == expected
    assert generate([prompt, prompt], params, N_HEAD, 20) == [expected, expected]
    assert generate(prompt, params, N_HEAD, 20, n_samples=2) == [expected, expected]


@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "i8", "u8"])
def test_a_prompt_may_have_any_type_of_whole_number(tiny_params, dtype):
    prompt = [5, 6, 7]
    assert generate(np.array(prompt, dtype), tiny_params, N_HEAD, 40) == generate(prompt, tiny_params, N_HEAD, 40)


def test_a_step_past_the_context_reuses_the_cache(tiny_params, ids, monkeypatch):
    lengths, fill = [], module.prefill
    monkeypatch.setattr(module, "prefill", lambda ids, *args: (lengths.append(np.shape(ids)[-1]), fill(ids, *args))[1])
    generate(ids, tiny_params, N_HEAD, N_CTX)
    n_after_drop = N_CTX + 1 - N_CTX // 2
    assert lengths[: N_CTX - 20 + 2] == [20] + [1] * (N_CTX - 20) + [n_after_drop]
    assert set(lengths) == {20, 1, n_after_drop}


def test_generation_stops_early_only_at_an_eot_id(tiny_params, ids):
    made = generate(ids, tiny_params, N_HEAD, 10)
    assert (len(made), generate(ids, tiny_params, N_HEAD, 0)) == (10, [])
    assert generate(ids, tiny_params, N_HEAD, 10, eot_id=made[4]) == made[: made.index(made[4])]


def test_each_sequence_of_a_batch_ends_on_its_own(tiny_params):
    prompts = np.random.default_rng(0).integers(0, N_VOCAB, (4, 6))
    alone = [generate(prompt, tiny_params, N_HEAD, 8) for prompt in prompts]
    assert generate(prompts, tiny_params, N_HEAD, 8) == alone
    end = alone[0][3]
    expected = [made[: made.index(end)] if end in made else made for made in alone]
    assert generate(prompts, tiny_params, N_HEAD, 8, eot_id=end) == expected
    assert generate(prompts, tiny_params, N_HEAD, 0) == [[], [], [], []]
    steps = list(stream(prompts, tiny_params, N_HEAD, 8, eot_id=end))
    assert {row[0] for row in steps[alone[0].index(end) :]} <= {end}


def test_samples_of_one_prompt_equal_a_batch_of_copies(tiny_params, ids):
    options = {"temperature": 1.0, "seed": 5, "top_k": 20}
    samples = generate(ids, tiny_params, N_HEAD, 6, n_samples=3, **options)
    assert samples == generate([ids] * 3, tiny_params, N_HEAD, 6, **options)
    assert len({tuple(sample) for sample in samples}) == 3
    assert generate(ids, tiny_params, N_HEAD, 6, n_samples=1) == [generate(ids, tiny_params, N_HEAD, 6)]


def test_padding_of_the_vocabulary_is_never_chosen(tiny_params, ids):
    params = tiny_params | {"wte": tiny_params["wte"].copy()}
    params["wte"][257:] *= 100  # the padding would win otherwise
    assert max(generate(ids, params, N_HEAD, 8)) >= 257
    assert max(generate(ids, params, N_HEAD, 8, n_vocab=257)) < 257
    assert max(generate(ids, params, N_HEAD, 8, n_vocab=257, temperature=2, seed=0)) < 257


@pytest.mark.parametrize(("inputs", "options"), [
    ([1], {"n_tokens_to_generate": -1}), ([1], {"n_tokens_to_generate": 1.5}), ([1], {"n_tokens_to_generate": "3"}),
    ([1], {"temperature": -1}), ([1], {"top_p": 0}), ([1], {"n_samples": 0}), ([1], {"n_samples": 1.5}),
    ([1], {"n_vocab": 0}), ([1], {"n_vocab": -1}), ([[1]], {"n_samples": 2}), ([[[1]]], {}),
    (range(N_CTX + 1), {}), ([1], {"n_samples": 10**30}),
])  # fmt: skip
def test_generation_refuses_invalid_options(tiny_params, inputs, options):
    with pytest.raises(ValueError):
        generate(inputs, tiny_params, N_HEAD, **{"n_tokens_to_generate": 2} | options)


def test_a_short_prompt_imports_nothing_that_it_does_not_need(tiny_model):
    code = """if True:
        import runpy, sys
        sys.argv = ["gpt2.py", "Hello", "--n_tokens_to_generate=2", f"--model_size={sys.argv[1]}"]
        runpy.run_path("gpt2.py", run_name="__main__")
        assert "utils" in sys.modules and not {"gpt2", "threadpoolctl"} & set(sys.modules)
    """
    assert run_code(code, str(tiny_model))
