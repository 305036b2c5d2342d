"""The sheet of backbones: every family's nano variant is held to the same contract; a family joins by being listed."""

import copy
import math
import pickle

import pytest
import timm.data
import timm.optim
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lynceus
from lynceus.backbones import FAMILIES
from lynceus.backbones._table import family_module
from lynceus.backbones.catalogue import describe
from lynceus.core.config import from_dict, to_dict
from lynceus.core.errors import AdviceError, OptionError

NAMES = lynceus.list_models("*nano*")
SIZES = [(64, 64), (225, 301), (64, 32), (37, 53), (3, 5), (1, 1)]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    """A nano variant with lively weights; tests leave it as they found it."""
    torch.manual_seed(0)
    model = lynceus.create_model(request.param, num_classes=10)
    enliven(model)
    return model


def enliven(model: nn.Module) -> None:
    """Fresh weights leave branches silent (layer scale near 0, biases 0); these do not."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
            if "gamma" in name:
                p.fill_(0.5)
        for name, b in model.named_buffers():
            if name.endswith("running_var"):
                b.add_(0.2 * torch.rand(b.shape, generator=generator))
            elif name.endswith("running_mean"):
                b.add_(0.1 * torch.randn(b.shape, generator=generator))


def images(*size, batch=2, seed=0, chans=3):
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    scale = b.float().std() if b.numel() > 1 else b.abs().max()
    assert (a.float() - b.float()).abs().max() <= tolerance * max(float(scale.detach()), 1e-6)


def test_every_family_has_a_nano():
    assert {n.removesuffix("_nano") for n in NAMES} >= set(FAMILIES)


def test_nano_is_small(model):
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000


def test_comes_in_eval_mode(model):
    assert not model.training


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size(model, size):
    batch = 1 if size == (225, 301) else 2
    x = images(*size, batch=batch)
    with torch.no_grad():
        maps, logits = model.forward_stages(x), model(x)
    assert logits.shape == (batch, 10)
    assert torch.isfinite(logits).all()
    assert len(maps) == len(model.stages)
    for m, s in zip(maps, model.stages):
        assert m.shape[:2] == (batch, s.channels)
        for got, side in zip(m.shape[2:], size):
            # floor (ConvNeXt) or ceiling (the others); what is smaller than the coarsest stride may be padded to it
            assert max(1, side // s.stride) <= got <= math.ceil(max(side, model.stages[-1].stride) / s.stride)
        assert torch.isfinite(m).all()


def test_stages_are_described(model):
    strides = [s.stride for s in model.stages]
    assert strides == sorted(strides)
    modules = dict(model.named_modules())
    assert all(s.name in modules for s in model.stages)
    assert model.num_features == model.stages[-1].channels


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    model = lynceus.create_model(name, num_classes=10).train()
    enliven(model)
    (model(images(48, 48, batch=4)) * torch.randn(4, 10)).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_eval_is_deterministic(model):
    x = images(48, 40)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


def test_batch_order_does_not_matter(model):
    x = images(48, 40, batch=5)
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        y = model(x)
        close(model(x[order]), y[order])
        close(model(x[2:3]), y[2:3])


def test_inference_kernels_agree_with_the_plain_modules(model):
    """Without gradients the network may take fused kernels; float64 never does."""
    x = images(61, 47, batch=3)
    plain = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        close(model(x), plain)
        for a, b in zip(model.forward_stages(x), copy.deepcopy(model).double().forward_stages(x.double())):
            close(a, b)
    with torch.inference_mode():
        close(model(x), plain)
    close(model(x), plain)


def test_weights_changed_in_place_are_seen(model):
    m, x = copy.deepcopy(model), images(32, 32)
    with torch.no_grad():
        before = m(x)
        for p in m.parameters():
            p.mul_(0.9)
        for b in m.buffers():
            if b.is_floating_point():
                b.mul_(1.1)
        after = m(x)
        close(after, copy.deepcopy(m).double()(x.double()))
        assert (after - before).abs().max() > 1e-3 * before.std()
        m.load_state_dict(model.state_dict())
        close(m(x), before, 1e-6)
        other = copy.deepcopy(model)
        nn.init.zeros_(next(p for p in other.parameters() if p.ndim == 4))
        m.load_state_dict(other.state_dict(), assign=True)
        close(m(x), other(x), 1e-6)


def test_hooks_hear_what_the_modules_say(model):
    """A listener on any module gets the values of the plain forward, and does not change the result."""
    m, x = copy.deepcopy(model), images(32, 32)
    leaves = [n for n, k in m.named_modules() if not list(k.children())]

    def listen(net, x):
        heard = {}

        def hear(name, out):
            heard.setdefault(name, out.detach().clone())

        handles = [net.get_submodule(n).register_forward_hook(lambda _m, _i, o, n=n: hear(n, o)) for n in leaves]
        out = net(x)
        for h in handles:
            h.remove()
        return out, heard

    with torch.no_grad():
        quiet = m(x)
        out, heard = listen(m, x)
        _, exact = listen(copy.deepcopy(model).double(), x.double())
        close(out, quiet)
        assert heard.keys() == exact.keys()
        for n, value in heard.items():
            close(value, exact[n], 1e-4)


def test_channels_last(model):
    x = images(61, 47)
    with torch.no_grad():
        y = model(x)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        close(last(x.to(memory_format=torch.channels_last)), y)
    close(last(x.to(memory_format=torch.channels_last)), y)


def test_bfloat16(model):
    x = images(48, 48, batch=4)
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        y, z = model(x), half(x.bfloat16())
        assert z.dtype == torch.bfloat16
        close(z, y, 0.15)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close(model(x), y, 0.15)


def test_config_round_trip(model):
    config = from_dict(type(model.config), to_dict(model.config))
    assert config == model.config
    family = next(f for f in FAMILIES if isinstance(model.config, type(next(iter(family_module(f).VARIANTS.values())))))
    again = family_module(family).build(config).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    x = images(40, 40)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_copies_and_pickles(model):
    x = images(40, 40)
    with torch.no_grad():
        y = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), y)


def test_a_misspelt_option_names_the_nearest(model):
    with pytest.raises(OptionError, match="num_classes"):
        lynceus.create_model(model.name, num_clases=3)


def test_channels_and_classes(model):
    x = images(32, 32, chans=1)
    grey = lynceus.create_model(model.name, in_chans=1, num_classes=0)
    with torch.no_grad():
        assert grey(x).shape == (2, grey.head_hidden_size)


def test_flop_counter_sees_the_work(model):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images(32, 32, batch=1))
    assert counter.get_total_flops() > 1e6


# timm's contract ------------------------------------------------------------------------------------
def test_feature_info(model):
    assert [f["num_chs"] for f in model.feature_info] == [s.channels for s in model.stages]
    assert [f["reduction"] for f in model.feature_info] == [s.stride for s in model.stages]
    assert [f["module"] for f in model.feature_info] == [s.name for s in model.stages]


def test_forward_intermediates(model):
    x, count = images(48, 64), len(model.stages)
    with torch.no_grad():
        maps = model.forward_stages(x)
        features, found = model.forward_intermediates(x)
        close(model.forward_head(features), model(x), 1e-6)
        assert len(found) == count
        for a, b in zip(found, maps):
            close(a, b, 1e-6)
        last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert [m.shape for m in last_two] == [m.shape for m in maps[-2:]]
        picked = model.forward_intermediates(x, indices=[0, -2], intermediates_only=True, output_fmt="NHWC")
        close(picked[0], maps[0].permute(0, 2, 3, 1), 1e-6)
        close(picked[1], maps[count - 2].permute(0, 2, 3, 1), 1e-6)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        close(early[0], maps[1], 1e-6)
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert [m.shape for m in normed] == [m.shape for m in maps]
    with pytest.raises(AdviceError, match=f"0 to {count - 1}"):
        model.forward_intermediates(x, indices=[count])
    with pytest.raises(AdviceError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="CHWN")


def test_classifier_is_replaced(model):
    m, x = copy.deepcopy(model), images(32, 32)
    with torch.no_grad():
        assert m.forward_head(m.forward_features(x), pre_logits=True).shape == (2, m.head_hidden_size)
        m.reset_classifier(7)
        assert m.num_classes == m.config.num_classes == 7
        assert m(x).shape == (2, 7)
        assert isinstance(m.get_classifier(), nn.Linear)
        m.reset_classifier(0)
        close(m(x), m.pool(m.forward_features(x)), 1e-6)


def test_pruning_keeps_the_maps(model):
    m, x = copy.deepcopy(model), images(48, 48)
    before = sum(p.numel() for p in m.parameters())
    with torch.no_grad():
        wanted = model.forward_stages(x)[:2]
        assert m.prune_intermediate_layers([0, 1]) == [0, 1]
        for a, b in zip(m.forward_intermediates(x, [0, 1], intermediates_only=True), wanted):
            close(a, b, 1e-6)
    assert sum(p.numel() for p in m.parameters()) < before


def test_gradient_checkpointing_changes_nothing(model):
    x = images(32, 32, batch=4)

    def gradients(checkpointing):
        m = copy.deepcopy(model).train()
        m.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        m(x).square().mean().backward()
        return [p.grad for p in m.parameters()]

    for a, b in zip(gradients(True), gradients(False)):
        close(a, b, 1e-4)


def test_layer_decay_groups(model):
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert len(scales) == len(list(model.parameters()))
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= {*names, "cls_token", "pos_embed", "dist_token", "reg_token"}
    first, last = next(iter(names)), list(names)[-1]
    assert scales[id(names[first])] < scales[id(names[last])] == 1.0
    assert len(set(scales.values())) > 3
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert not any(id(p) in decayed for p in names.values() if p.ndim <= 1)


def test_data_config(model):
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, *model.input_size)
    assert config["mean"] == model.mean


# export and compilation -----------------------------------------------------------------------------
# fewer layers of every kind, for the minutes that tracing takes; the whole nets are traced in the slow tests
SHALLOW = {
    "convit_nano": {"depth": 3, "local_layers": 2},
    "convnext_nano": {"depths": (1, 1, 1, 1)},
    "halonet_nano": {"layout": ("c", "aa"), "widths": (64, 128), "hidden": (48, 96), "strides": (1, 2)},
    "hornet_nano": {"depths": (1, 1, 1, 1)},
    "hornet_nano_gf": {"depths": (1, 1, 1, 1)},
    "hyena_vit_nano": {"depth": 1},
    "resnet_nano": {"depths": (1, 2, 1, 1)},
    "sam_vit_nano": {"depth": 3, "global_blocks": (0, 2)},
    "soft_nano": {"depths": (1, 1, 1, 1), "newton_iterations": 5},
    "spartan_nano": {"depths": (1, 0, 0, 1)},
    "swin_nano": {"depths": (2, 2), "num_heads": (2, 4)},
    "plain_mamba_nano": {"depth": 2},
    "vim_nano": {"depth": 2},
    "vit_nano": {"depth": 3},
    "volo_nano": {"layers": (1, 1, 1, 1)},
}
TRACED = [*SHALLOW, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in SHALLOW)]
TRACED += [pytest.param(f"whole {n}", marks=pytest.mark.slow) for n in SHALLOW]


@pytest.fixture(scope="module", params=TRACED)
def traced(request):
    torch.manual_seed(0)
    name = request.param.removeprefix("whole ")
    model = lynceus.create_model(name, num_classes=10, **SHALLOW.get(request.param, {}))
    enliven(model)
    return model


@pytest.fixture(scope="module")
def program(traced):
    """The network with free batch, height and width."""
    free = {0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=32), 3: torch.export.Dim("w", min=32)}
    with torch.no_grad():
        return torch.export.export(traced, (images(66, 92),), dynamic_shapes=(free,), strict=False)


def test_export_with_free_sizes(traced, program):
    run = program.module()
    for size, batch in [((64, 64), 3), ((225, 301), 1), ((64, 32), 3), ((37, 53), 2)]:
        x = images(*size, batch=batch)
        with torch.no_grad():
            close(run(x), traced(x))


def onnx_agrees(model, program, folder, *, optimize):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program, dynamo=True, verbose=False, optimize=optimize).save(str(folder / "model.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for size, batch in [((66, 92), 2), ((64, 32), 1), ((47, 61), 3)]:
        x = images(*size, batch=batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            close(torch.from_numpy(out), model(x))


def test_onnx_agrees(traced, program, tmp_path):
    onnx_agrees(traced, program, tmp_path, optimize=False)


@pytest.mark.slow
def test_optimized_onnx_agrees(traced, program, tmp_path):
    onnx_agrees(traced, program, tmp_path, optimize=True)


def compiled_agrees(model, backend):
    """One graph without gradients (fused kernels) and one with; outputs and gradients are the eager ones."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = images(48, 64)
    with torch.no_grad():
        close(compiled(x), model(x))
    gradients = []
    for f in (compiled, model):
        f(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    # a gradient that is 0 but for rounding, as of a bias under a softmax, is held to the scale of the others
    floor = 1e-6 * max(float(b.abs().max()) for b in gradients[1])
    for a, b in zip(*gradients):
        if (a - b).abs().max() > floor:
            close(a, b, 1e-3)
    torch._dynamo.reset()


def test_one_graph(traced):
    compiled_agrees(copy.deepcopy(traced), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(model, backend):
    compiled_agrees(copy.deepcopy(model), backend)


@pytest.mark.parametrize("name", NAMES)
def test_counts_on_shapes_alone(name):
    """`lynceus info` and `models` count without memory for weights, whatever the size."""
    report = describe(name)
    assert report.summary["MACs"] > 0
    assert report.summary["parameters"] == sum(p.numel() for p in lynceus.create_model(name).parameters())
