"""Token pruning inside vision-language models: models of transformers built from tiny random configurations, caches,
batches; the kept sets against direct numpy; the plain decoder; files and errors."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench._scenes import Decoder
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.nouns import Rewrite, chain
from lynceus.rewrite.vlm_tokens import VlmTokens, prune, unpruned, watch
from lynceus.rewrite.vlm_tokens.choose import rotated
from lynceus.rewrite.vlm_tokens.passes import HELD
from lynceus.rewrite.vlm_tokens.saved import load, open_vlm, save

transformers = pytest.importorskip("transformers")
IMAGE, TOKENS, DEPTH = 199, 144, 8


def llava(text="Llama", *, attention="sdpa", layers=DEPTH, **changes):
    """The card's model: 84 pixels in patches of 7, a decoder of 8 layers 64 wide, 4 heads on 2: 0.35 M parameters."""
    torch.manual_seed(0)
    words = getattr(transformers, f"{text}Config")(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    sight = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=84, patch_size=7
    )
    config = transformers.LlavaConfig(vision_config=sight, text_config=words, image_token_id=IMAGE)
    config._attn_implementation = attention
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # sharper than at the usual deviation of .02, so that scores and words differ
        for name, p in model.named_parameters():
            if p.ndim > 1 and "language_model.layers" in name:
                p.mul_(6)
    return model


def prompt(before=(5,), after=(8,), *, seed=0):
    """One row per image, of random words before and after it, padded on the left."""
    draw = torch.Generator().manual_seed(seed)
    rows = [
        torch.cat(
            [
                torch.randint(3, 190, (b,), generator=draw),
                torch.full((TOKENS,), IMAGE),
                torch.randint(3, 190, (a,), generator=draw),
            ]
        )
        for b, a in zip(before, after)
    ]
    most = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(r, (most - len(r), 0)) for r in rows])
    pixels = torch.rand(len(rows), 3, 84, 84, generator=draw)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def row_of(inputs, i):
    keep = inputs["attention_mask"][i].bool()
    return {
        "input_ids": inputs["input_ids"][i : i + 1, keep],
        "attention_mask": inputs["attention_mask"][i : i + 1, keep],
        "pixel_values": inputs["pixel_values"][i : i + 1],
    }


def words(model, inputs, **options):
    made = model.generate(
        **inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True, **options
    )
    return made.sequences[:, -5:], made.past_key_values


@pytest.fixture(scope="module")
def model():
    return llava()


# ---- the models of transformers --------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["feather", "fastv", "fastv_norope", "uniform"])
def test_the_card_s_model_prunes_in_forward_and_generate(model, method):
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.35e6, rel=0.05)
    inputs = prompt()
    n = inputs["input_ids"].shape[1]
    pruned = prune(model, method=method)
    with watch() as seen:
        out = pruned(**inputs, use_cache=True)
    assert out.logits.shape == (1, n, 200)  # labels and slices still fit
    lengths = [out.past_key_values.get_seq_length(i) for i in range(DEPTH)]
    assert lengths == seen[0].counts(DEPTH)
    first = {"feather": 2}.get(method, 1)
    assert lengths[:first] == [n] * first
    assert lengths[first] < 0.5 * n
    a, cache = words(pruned, inputs)
    assert [cache.get_seq_length(i) - 4 for i in range(DEPTH)] == lengths
    b, _ = words(pruned, inputs, use_cache=False)
    assert a.shape == b.shape == (1, 5)
    assert a[0, 0] == b[0, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_rows_of_a_padded_batch_are_answered_as_alone(text, attention):
    """FEATHER's union keeps another number of tokens in each row, so short rows hold masked fillers."""
    inputs = prompt(before=(5, 2, 9), after=(8, 14, 3))
    pruned = prune(llava(text, attention=attention))
    with watch() as seen:
        got, _ = words(pruned, inputs)
        logits = pruned(**inputs).logits
    assert len({seen[0].counts(DEPTH, row)[2] - int(inputs["attention_mask"][row].sum()) for row in range(3)}) > 1
    for i in range(3):
        alone = row_of(inputs, i)
        with watch() as mine:
            assert torch.equal(words(pruned, alone)[0][0], got[i])
        for k in (2, 4):
            assert torch.equal(mine[0].picture(k), seen[0].picture(k, i))
        size = alone["input_ids"].shape[1]
        assert torch.allclose(pruned(**alone).logits[0], logits[i, -size:], atol=2e-4)


def test_padding_on_the_right_is_no_last_token(model):
    inputs = prompt()
    more = {k: nn.functional.pad(v, (0, 3)) if v.ndim == 2 else v for k, v in inputs.items()}
    pruned = prune(model)
    n = inputs["input_ids"].shape[1]
    assert torch.allclose(pruned(**more).logits[:, :n], pruned(**inputs).logits, atol=2e-5)


def test_beams_sampling_and_rows_without_an_image(model):
    pruned = prune(model)
    inputs = prompt(before=(5, 2), after=(8, 14))
    pruned.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    torch.manual_seed(0)
    pruned.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    mixed = prompt(before=(5, 2), after=(8, 14))
    mixed["input_ids"][1] = torch.where(mixed["input_ids"][1] == IMAGE, 7, mixed["input_ids"][1])
    mixed["pixel_values"] = mixed["pixel_values"][:1]
    out = pruned(**mixed).logits
    assert torch.allclose(out[0], pruned(**{k: v[:1] for k, v in mixed.items()}).logits[0], atol=1e-4)
    text = mixed["input_ids"][1:]
    want = model(input_ids=text, attention_mask=mixed["attention_mask"][1:]).logits[0]
    assert torch.allclose(out[1], want, atol=1e-4)  # its tokens are all text: nothing is dropped


def test_ratio_nought_is_the_plain_model_bit_by_bit(model):
    for inputs in (prompt(), prompt(before=(5, 2), after=(8, 14))):
        want = model(**inputs).logits
        for options in ({"method": "fastv", "layers": (1, 5)}, {"layers": (2, 4)}, {"method": "uniform", "stride": 1}):
            if options.get("method") != "uniform":
                options["ratio"] = 0.0
            assert torch.equal(prune(model, **options)(**inputs).logits, want)
            assert torch.equal(words(prune(model, **options), inputs)[0], words(model, inputs)[0])


@pytest.mark.parametrize("text", ["Llama", "Qwen2"])
@pytest.mark.parametrize("method", ["feather", "fastv", "fastv_norope"])
def test_kept_sets_equal_numpy_from_the_layers_own_q_and_k(text, method):
    """Dumps what q_proj and k_proj of layer K-1 gave while it ran, and repeats the choice in numpy."""
    model, inputs = llava(text), prompt(before=(6,), after=(9,))
    layers = (2, 5) if method == "feather" else (3,)
    pruned = prune(model, method=method, layers=layers, ratio=0.7)
    decoder, dumped = pruned.model.language_model, {}
    for k in layers:
        for name in ("q_proj", "k_proj"):
            part = getattr(decoder.layers[k - 1].self_attn, name)
            part.register_forward_hook(lambda m, a, out, key=(k, name): dumped.__setitem__(key, out.numpy(force=True)))
    with watch() as seen:
        pruned(**inputs)
    there = np.arange(6, 6 + TOKENS)
    for stage, k in enumerate(layers):
        q = dumped[k, "q_proj"][0, -1].reshape(4, 16).astype(np.float64)
        keys = dumped[k, "k_proj"][0].reshape(-1, 2, 16).astype(np.float64)
        keys = keys[6 : 6 + len(there)].repeat(2, axis=1)  # two query heads share a key head
        if method == "fastv":
            q, keys = turn(q, 6 + TOKENS + 8), np.stack([turn(key, p) for key, p in zip(keys, there)])
        logits = np.einsum("hd,nhd->hn", q, keys) / 4
        weights = np.exp(logits - logits.max(1, keepdims=True))
        scores = (weights / weights.sum(1, keepdims=True)).mean(0)
        share = 1 - 0.7 if stage == 0 else (1 - 0.7) ** 2
        best = np.argsort(-scores)[: int(len(there) * share)]
        keep = {int(i) for i in there[best]}
        if method == "feather" and stage == 0:
            keep |= {6 + 12 * r + c for r in range(0, 12, 3) for c in range(0, 12, 3)}
        there = np.array(sorted(keep))
        assert np.flatnonzero(seen[0].layers[k][0].numpy() & seen[0].image[0].numpy()).tolist() == there.tolist()


def turn(x, position):
    """RoPE of (heads, 16) at one position."""
    angle = position * 10_000.0 ** -(np.arange(8) / 8)
    cos, sin = np.cos(np.tile(angle, 2)), np.sin(np.tile(angle, 2))
    return x * cos + np.concatenate([-x[:, 8:], x[:, :8]], 1) * sin


def test_kept_tokens_keep_their_positions_and_their_order():
    model, inputs, full, got = llava(), prompt(before=(5, 2), after=(8, 14)), {}, {}

    def note(into):
        def hook(attention, args, kwargs):
            into[attention.layer_idx] = (kwargs["position_embeddings"], kwargs["position_ids"])

        return hook

    pruned = prune(model, layers=(2, 5))
    for net, into in ((model, full), (pruned, got)):
        for layer in net.model.language_model.layers:
            layer.self_attn.register_forward_pre_hook(note(into), with_kwargs=True)
    with watch() as seen, torch.no_grad():
        model(**inputs)
        pruned(**inputs)
    for i in range(DEPTH):
        cut = 5 if i >= 5 else 2
        for row in range(2):
            kept = seen[0].layers[cut][row].nonzero()[:, 0] if i >= 2 else torch.arange(inputs["input_ids"].shape[1])
            for a, b in zip(full[i][0], got[i][0]):
                assert torch.equal(a[row % len(a)][kept], b[row % len(b)][-len(kept) :])
            assert torch.equal(full[i][1][0][kept], got[i][1].expand(2, -1)[row, -len(kept) :])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
def test_cached_decoding_equals_uncached_over_the_same_kept_set(attention, rows):
    """The set is fixed by a criterion of our own; each step's logits are those of the whole prompt read anew."""
    fixed = torch.rand(400, generator=torch.Generator().manual_seed(3))
    pruned = prune(
        llava(attention=attention), layers=(2, 5), criterion=lambda look: fixed[look.columns - look.columns[:, :1]]
    )
    # columns count from the first token still there, which is text: the same scores with and without a cache
    inputs = prompt(before=(5,) * rows, after=(8, 6, 8)[:rows]) if rows == 1 else prompt((5, 7, 5), (8, 6, 8))
    made = pruned.generate(
        **inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True, output_logits=True
    )
    mask = nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    for step in range(5):
        n = inputs["input_ids"].shape[1] + step
        again = {"input_ids": made.sequences[:, :n], "attention_mask": mask[:, :n]}
        want = pruned(**again, pixel_values=inputs["pixel_values"], use_cache=False).logits[:, -1]
        assert torch.allclose(made.logits[step], want, atol=1e-4)


@torch.no_grad()
def test_a_second_turn_of_text_or_with_an_image_goes_on_from_the_cache(model):
    """Questions after the first, several tokens at once, see what each layer kept; a new image is pruned by itself."""
    pruned, inputs = prune(model, layers=(2, 5)), prompt()
    n = inputs["input_ids"].shape[1]
    more = torch.randint(3, 190, (1, 4), generator=torch.Generator().manual_seed(5))
    cache = transformers.DynamicCache(config=model.config)
    pruned(**inputs, past_key_values=cache, use_cache=True)
    before = [cache.get_seq_length(i) for i in range(DEPTH)]
    at_once = pruned(input_ids=more, past_key_values=copy.deepcopy(cache), use_cache=True).logits
    for i in range(4):
        one = pruned(input_ids=more[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        assert torch.allclose(one[0, 0], at_once[0, i], atol=1e-4)
    assert [cache.get_seq_length(i) for i in range(DEPTH)] == [b + 4 for b in before]
    cache.crop(-2)
    assert torch.allclose(
        pruned(input_ids=more[:, 2:3], past_key_values=cache, use_cache=True).logits[0, 0], at_once[0, 2], atol=1e-4
    )
    second = prompt(seed=9)
    pruned(input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length(0) == n + 3 + n
    assert cache.get_seq_length(7) < before[7] + 3 + n
    assert all(c.shape[1] == cache.get_seq_length(k) for c, k in zip(getattr(cache, HELD).columns, (2, 5)))


def test_a_sliding_window_counts_original_places(model):
    """Mistral's window masks by place in the prompt, not among the kept; its cache forgets the oldest entries."""
    for attention in ("sdpa", "eager"):
        net = llava("Mistral", attention=attention, sliding_window=60)
        wide = prune(net, method="fastv_norope", layers=(2,), ratio=0.0)
        inputs = prompt()
        assert torch.equal(wide(**inputs).logits, net(**inputs).logits)
        fixed = torch.rand(400, generator=torch.Generator().manual_seed(3))
        pruned = prune(net, layers=(2, 5), criterion=lambda look, f=fixed: f[look.columns])
        made = pruned.generate(
            **inputs, do_sample=False, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        for step in range(4):
            n = inputs["input_ids"].shape[1] + step
            want = pruned(input_ids=made.sequences[:, :n], pixel_values=inputs["pixel_values"], use_cache=False).logits[
                :, -1
            ]
            assert torch.allclose(made.logits[step], want, atol=1e-4)


def test_labels_train_and_gradients_reach_every_layer(model):
    made = VlmTokens()(model)
    inputs = prompt(before=(5, 2), after=(8, 14))
    labels = torch.where(inputs["input_ids"] == IMAGE, -100, inputs["input_ids"])
    made.train()
    made(**inputs, labels=labels).loss.backward()
    for layer in made.model.language_model.layers:
        assert layer.self_attn.v_proj.weight.grad.abs().sum() > 0
    assert model.lm_head.weight.grad is None


def test_the_old_model_is_untouched_and_weights_are_shared_or_copied(model):
    inputs = prompt()
    want, hooks = model(**inputs).logits, len(model.model._forward_pre_hooks)
    assert isinstance(VlmTokens(), Rewrite)
    shared, copied = prune(model), VlmTokens()(model)
    assert shared.lm_head.weight is model.lm_head.weight
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert torch.equal(shared(**inputs).logits, copied(**inputs).logits)
    assert torch.equal(model(**inputs).logits, want)
    assert len(model.model._forward_pre_hooks) == hooks
    assert torch.equal(unpruned(shared)(**inputs).logits, want)
    assert not torch.equal(shared(**inputs).logits, want)
    assert torch.equal(copy.deepcopy(shared)(**inputs).logits, shared(**inputs).logits)
    assert torch.equal(chain(VlmTokens())(model, None)(**inputs).logits, copied(**inputs).logits)
    assert shared.rewrite == VlmTokens(layers=(2, 4), ratio=0.7, stride=3)
    assert not any(m.training for m in copied.modules())


def test_two_threads_and_two_pruned_models_do_not_disturb_each_other(model):
    import threading

    nets = [prune(model), prune(model, method="fastv", ratio=0.5)]
    inputs = [prompt(seed=1), prompt(before=(3,), after=(4,), seed=2)]
    want = [words(net, x)[0] for net, x in zip(nets, inputs)]
    got = [None] * 4

    def work(i):
        got[i] = words(nets[i % 2], inputs[i % 2])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(g, want[i % 2]) for i, g in enumerate(got))


# ---- other kinds of models -------------------------------------------------------------------------------------------
def qwen2_vl():
    torch.manual_seed(0)
    sight = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 7, "mlp_ratio": 2}
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 200,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.Qwen2VLConfig(
        vision_config=sight, text_config=text, image_token_id=IMAGE, video_token_id=198, vision_start_token_id=197,
        vision_end_token_id=196,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def test_qwen2_vl_keeps_its_positions_of_rows_and_columns():
    model, rows, columns = qwen2_vl(), 6, 9
    n = rows * columns
    ids = torch.cat([torch.tensor([5, 6, 197]), torch.full((n,), IMAGE), torch.tensor([196, 9, 10])])[None]
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.rand(4 * n, 3 * 2 * 7 * 7, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "attention_mask": torch.ones_like(ids),
    }
    assert torch.equal(prune(model, layers=(2, 4), ratio=0.0)(**inputs).logits, model(**inputs).logits)
    for method in ("feather", "fastv"):
        pruned = prune(model, method=method, layers=(2, 4))
        with watch() as seen:
            pruned(**inputs)
        assert len(seen) == 1
        assert words(pruned, inputs)[0].shape == (1, 5)
    want = torch.zeros(rows, columns, dtype=torch.bool)
    want[::3, ::3] = True  # from image_grid_thw, or from the positions, not from the root of 54
    with watch() as seen:
        prune(model, method="uniform", stride=3)(**inputs)
        prune(model, method="uniform", stride=3).generate(**inputs, max_new_tokens=2)
    assert all(torch.equal(kept.picture(1), want.flatten()) for kept in seen)
    assert len(seen) == 2


def test_llava_next_lays_its_tiles_out_with_newlines():
    torch.manual_seed(0)
    sight = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=200
    )
    config = transformers.LlavaNextConfig(
        vision_config=sight, text_config=text, image_token_id=IMAGE, image_grid_pinpoints=[[28, 56], [56, 56]]
    )
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    # 28 x 56 pixels: 4 x 4 small, and 4 rows of 8 with a newline each
    count = 16 + 4 * 9
    ids = torch.cat([torch.tensor([5, 6]), torch.full((count,), IMAGE), torch.tensor([7, 8])])[None]
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 3, 28, 28), "image_sizes": torch.tensor([[28, 56]])}
    with watch() as seen:
        prune(model, method="uniform", stride=2)(**inputs)
        prune(model, method="uniform", stride=2, grid="4x4,4x8+1")(**inputs)
    small, large = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 9, dtype=torch.bool)
    small[::2, ::2] = True
    large[::2, :8:2] = True
    for kept in seen:
        assert torch.equal(kept.picture(1), torch.cat([small.flatten(), large.flatten()]))
    prune(model)(**inputs)
    with pytest.raises(AdviceError, match="grid="):
        prune(model, grid="5x5")(**inputs)
    with pytest.raises(AdviceError, match="grid='24x24,48x36"):  # generate() keeps image_sizes for itself
        prune(model).generate(**inputs, max_new_tokens=2)
    assert prune(model, grid="4x4,4x8+1").generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_llava_onevision_asks_for_the_layout():
    sight = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    text = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200,
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        vision_config=sight, text_config=text, image_token_id=IMAGE, image_grid_pinpoints=[[28, 28]]
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    count = 16 + 4 * 5
    ids = torch.cat([torch.tensor([5, 6]), torch.full((count,), IMAGE), torch.tensor([7, 8])])[None]
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}
    model(**inputs)
    with pytest.raises(AdviceError, match="grid='24x24'"):
        prune(model)(**inputs)
    prune(model, grid="4x4,4x4+1")(**inputs)
    prune(model, method="fastv")(**inputs)


# ---- plain decoders --------------------------------------------------------------------------------------------------
class Cache:
    """As little of a cache as a plain decoder needs."""

    def __init__(self):
        self.entries = {}

    def update(self, k, v, layer):
        if layer in self.entries:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.entries[layer], (k, v)))
        self.entries[layer] = (k, v)
        return k, v

    def get_seq_length(self, layer=0):
        return self.entries[layer][0].shape[2] if layer in self.entries else 0


@given(
    rows=st.integers(1, 3),
    side=st.integers(2, 6),
    before=st.integers(0, 4),
    after=st.integers(1, 5),
    first=st.integers(1, 3),
    second=st.integers(1, 2),
    ratio=st.floats(0, 1),
    stride=st.integers(1, 4),
    method=st.sampled_from(["feather", "fastv", "fastv_norope", "uniform"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_pruned_equals_masked(rows, side, before, after, first, second, ratio, stride, method, seed):
    """Dropping tokens is the same as letting nobody look at them: the plain decoder with those keys masked from layer K
    on gives the same outputs at all tokens that stay, and a cached step after it sees the same."""
    torch.manual_seed(seed)
    net = Decoder(32, 6, 2).eval()
    n = before + side * side + after
    x, step = torch.randn(rows, n, 32), torch.randn(rows, 1, 32)
    image = torch.zeros(rows, n, dtype=torch.bool)
    image[:, before : before + side * side] = True
    layers = (first,) if method == "uniform" else (first, first + second)
    options = {"ratio": None if method == "uniform" else ratio}
    if method in ("feather", "uniform"):
        options["stride"] = stride
    pruned = prune(net, method=method, layers=layers, **options)
    cache = Cache()
    with watch() as seen, torch.no_grad():
        got = pruned(x, image_tokens=image, past_key_values=cache)
        after_it = pruned(step, past_key_values=cache)
        kept = seen[0].layers
        want = masked(
            net, torch.cat([x, step], 1), {k: nn.functional.pad(v, (0, 1), value=True) for k, v in kept.items()}
        )
    assert got.shape == x.shape
    assert len(seen) == 1
    stays = kept[layers[-1]]
    assert torch.allclose(got[stays], want[:, :-1][stays], atol=1e-4)
    assert torch.allclose(after_it, want[:, -1:], atol=1e-4)
    assert (stays | image).all()
    assert all((kept[b] <= kept[a]).all() for a, b in pairwise(layers))


def masked(net, x, kept):
    """The decoder with a mask of its own in each layer."""
    n = x.shape[1]
    causal, mask = torch.ones(n, n, dtype=torch.bool).tril(), None
    angle = torch.arange(n)[:, None] * 10_000.0 ** -(torch.arange(net.angle) / net.angle)
    angle = torch.cat([angle, angle], 1)[None]
    for i, layer in enumerate(net.layers):
        if i in kept:
            mask = (causal & kept[i][:, None]) | torch.eye(n, dtype=torch.bool)
            mask = mask[:, None]
        x = layer(x, position_embeddings=(angle.cos(), angle.sin()), attention_mask=mask)
    return net.norm(x)


def test_a_criterion_is_a_function_of_what_the_layer_saw():
    """Any scores will do; here, how far a token's hidden state is from the last one's."""
    net, x = Decoder(32, 4, 2).eval(), torch.randn(2, 20, 32)
    image = torch.zeros(2, 20, dtype=torch.bool)
    image[:, 2:18] = True
    looks = []

    def far(look):
        looks.append(look)
        return (look.hidden - look.hidden[:, -1:]).norm(dim=-1)

    with watch() as seen:
        prune(net, method="fastv_norope", layers=(2,), ratio=0.5, criterion=far)(x, image_tokens=image)
    assert looks[0].index == 1
    assert looks[0].layer is not net.layers[1]  # of the pruned copy
    assert looks[0].hidden.shape == (2, 20, 32)
    want = (looks[0].hidden[0, 2:18] - looks[0].hidden[0, -1]).norm(dim=-1).topk(8).indices.sort().values
    assert torch.equal(seen[0].picture(2).nonzero()[:, 0], want)


def test_a_decoder_of_transformers_alone_is_told_its_image_tokens():
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=50
    )
    net = transformers.LlamaModel(text).eval()
    ids = torch.randint(3, 50, (1, 30))
    image = torch.zeros(1, 30, dtype=torch.bool)
    image[:, 4:20] = True
    with watch() as seen:
        out = prune(net)(input_ids=ids, image_tokens=image)
    assert out.last_hidden_state.shape == (1, 30, 64)
    assert (
        seen[0].counts(4)
        == [30, 18 + int(seen[0].picture(1).sum()) - 4, *[14 + int(seen[0].picture(2).sum())] * 2][:1]
        + [14 + int(seen[0].picture(1).sum())]
        + [14 + int(seen[0].picture(2).sum())] * 2
    )


def test_rotation_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, angle = torch.randn(2, 3, 7, 8), torch.rand(2, 7, 4).repeat(1, 1, 2)
    assert torch.allclose(rotated(q, angle.cos(), angle.sin()), apply_rotary_pos_emb(q, q, angle.cos(), angle.sin())[0])


# ---- files -----------------------------------------------------------------------------------------------------------
def test_saved_beside_the_user_s_folder_and_whole(model, tmp_path):
    inputs = prompt()
    theirs, ours, whole = tmp_path / "theirs", tmp_path / "out" / "pruned", tmp_path / "whole"
    model.save_pretrained(theirs)
    pruned = prune(model, layers=(2, 5), ratio=0.6)
    want = pruned(**inputs).logits
    file = save(pruned, ours, source=theirs)
    assert json.loads(file.read_text())["model"] == "../../theirs"
    assert [f.name for f in ours.iterdir()] == ["vlm_tokens.json"]
    save(pruned, whole)
    for folder in (ours, whole):
        made = load(folder)
        assert made.rewrite == pruned.rewrite
        assert torch.equal(made(**inputs).logits, want)
    assert torch.equal(open_vlm(whole)(**inputs).logits, model(**inputs).logits)


def test_files_that_cannot_be(model, tmp_path):
    with pytest.raises(AdviceError, match="was not pruned"):
        save(model, tmp_path)
    with pytest.raises(AdviceError, match="criterion"):
        save(prune(model, criterion=lambda look: look.hidden[..., 0]), tmp_path)
    with pytest.raises(MissingError, match=r"vlm_tokens\.json"):
        load(tmp_path)
    with pytest.raises(MissingError, match=r"config\.json"):
        open_vlm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(AdviceError, match="no vision-language model"):
        open_vlm(tmp_path)


# ---- errors that advise ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "feathers"}, "'feather'"),
        ({"layers": (8, 16)}, r"layers 0 to 7.*layers=\(2, 4\)"),
        ({"layers": (0, 3)}, "from 1 on"),
        ({"layers": (4, 2)}, "rising"),
        ({"layers": (1, 2, 3)}, "one or two layers"),
        ({"ratio": 1.5}, "ratio=1"),
        ({"ratio": -0.1}, "ratio=0"),
        ({"method": "uniform", "ratio": 0.5}, "stride="),
        ({"method": "fastv", "stride": 2}, "feather and uniform only"),
        ({"stride": 0}, "at least 1"),
        ({"last": 0.1}, "uniform only"),
        ({"grid": "24"}, "grid='24x24'"),
    ],
)
def test_options_out_of_range(model, options, says):
    with pytest.raises(AdviceError, match=says):
        prune(model, **options)


def test_models_and_prompts_that_cannot_be_pruned(model):
    inputs, pruned = prompt(), prune(model)
    text = torch.randint(3, 190, (1, 20))
    with pytest.raises(AdviceError, match=r"no image.*unpruned"):
        pruned(input_ids=text)
    with pytest.raises(AdviceError, match="no image"):
        pruned.generate(input_ids=text, max_new_tokens=2)
    with pytest.raises(AdviceError, match="prunes already"):
        prune(pruned)
    with pytest.raises(AdviceError, match="nothing to undo"):
        unpruned(model)
    with pytest.raises(AdviceError, match="cache_implementation='dynamic'"):
        pruned.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(AdviceError, match="no language_model"):
        prune(nn.Linear(2, 2))
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    with pytest.raises(AdviceError, match="image_tokens="):
        prune(transformers.LlamaForCausalLM(config))
    odd = copy.deepcopy(inputs)
    odd["input_ids"] = torch.cat([odd["input_ids"][:, :5], odd["input_ids"][:, 8:]], 1)
    del odd["attention_mask"]
    embeds = model.get_input_embeddings()(odd["input_ids"])
    with pytest.raises(AdviceError, match="141 tokens is no square"):
        pruned(inputs_embeds=embeds)
    prune(model, method="fastv")(inputs_embeds=embeds)
    cache = transformers.DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache, use_cache=True)
    with pytest.raises(AdviceError, match="empty cache"):
        pruned(input_ids=text, past_key_values=cache, use_cache=True)
    assert words(pruned, inputs)[0].shape == (1, 5)  # no error left anything behind


def test_models_that_read_images_both_ways_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.language_model = Decoder(8, 2, 1)
            self.config = transformers.PaliGemmaConfig()
            self.config.image_token_id = 3

    with pytest.raises(AdviceError, match="both ways"):
        prune(Odd())
