"""Twenty single faults planted in copies of library models: the module they sit in is named."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lynceus
from lynceus.core.errors import AdviceError
from lynceus.layers.window import relative_index
from lynceus.reengineer import diff
from lynceus.reengineer.gaps import compare

MODELS = {"vit": "vit_nano", "swin": "swin_nano", "convnext": "convnext_nano", "resnet": "resnet_nano"}


def filled_model(family):
    """A nano model whose numbers are away from their neat initial values, so that every part matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lynceus.create_model(MODELS[family])
        for name, p in model.named_parameters():
            p.data.add_(0.05 * torch.randn_like(p) if p.ndim < 2 else 0.02 * torch.randn_like(p))
            if name.endswith("gamma"):
                p.data.fill_(0.7)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(0, 0.1)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 1.5)
    return model


def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def first(model, kind, number=1):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kind)][number]


def eps(model):
    name, module = first(model, nn.LayerNorm, 2)
    module.eps = 1e-5 if module.eps != 1e-5 else 1e-6
    return name


def bn_eps(model):
    name, module = first(model, nn.BatchNorm2d, 3)
    module.eps = 1e-3
    return name


def tanh_gelu(model):
    name, module = first(model, nn.GELU)
    module.approximate = "tanh"
    return name


def relu_for_gelu(model):
    name, _ = first(model, nn.GELU)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ReLU())
    return name


def padding_mode(model):
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.padding == (1, 1))
    module.padding_mode = "reflect"
    module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in range(2)]
    return name


def dilation(model):
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.padding == (1, 1))
    module.dilation, module.padding = (2, 2), (2, 2)
    return name


def swapped_q_and_k(model):
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("attn.qkv"))
    a, b, c = module.weight.data.chunk(3)
    module.weight.data = torch.cat([b, a, c])
    return name


def bias_missing(model):
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("mlp.fc2"))
    module.bias = None
    return name


def bias_kept_out_of_attention(model):
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("attn.proj"))
    module.bias.data.zero_()
    return name


def missing_scale(model):
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("1.attn"))
    forward = module.forward

    def unscaled(*args, **kwargs):  # attention without 1/sqrt(d)
        plain = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda q, k, v, **kw: plain(q, k, v, **{**kw, "scale": 1.0})
        try:
            return forward(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = plain

    module.forward = unscaled
    return name


def wrong_head_order(model):
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("1.attn"))
    forward = module.forward

    def mixed(*args, **kwargs):  # queries of one head meet keys of another
        plain = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda q, k, v, **kw: plain(q, k.flip(1), v, **kw)
        try:
            return forward(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = plain

    module.forward = mixed
    return name


def post_norm(model):
    name, block = next((n, m) for n, m in model.named_modules() if n.endswith("blocks.1"))
    block.forward = lambda x, *size: block.norm2(block.mlp(block.norm1(block.attn(x) + x)) + x)
    return name


def skip_dropped(model):
    name, block = next((n, m) for n, m in model.named_modules() if n.endswith("blocks.1"))
    forward = block.forward
    block.forward = lambda x, *size: forward(x, *size) - x
    return name


def shift_off_by_one(model):
    name, module = next((n, m) for n, m in model.named_modules() if getattr(m, "shift", 0))
    module.shift += 1
    return name


def bias_table_transposed(model):
    name, module = next((n, m) for n, m in model.named_modules() if hasattr(m, "relative_position_bias_table"))
    side = 2 * module.window - 1
    table = module.relative_position_bias_table
    table.data = table.data.reshape(side, side, -1).transpose(0, 1).reshape(table.shape).contiguous()
    return name


def merging_order(model):
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("downsample"))
    forward = module.forward
    module.forward = lambda x: forward(x.transpose(1, 2)).transpose(1, 2)
    return name


def layer_scale_dropped(model):
    name, module = next((n, m) for n, m in model.named_modules() if getattr(m, "gamma", None) is not None)
    module.gamma.data.fill_(1.0)
    return name


def stride_moved(model):
    name, block = next((n, m) for n, m in model.named_modules() if n == "layer2.0")
    block.conv1.stride, block.conv2.stride = (1, 1), (2, 2)
    return f"{name}.conv1"


def relu_missing(model):
    name, block = next((n, m) for n, m in model.named_modules() if n == "layer1.0")
    block.relu = nn.Identity()
    return f"{name}.relu"


def pool_window(model):
    model.maxpool.kernel_size, model.maxpool.padding = 2, 0
    return "maxpool"


def class_order(model):
    head = model.get_classifier()
    head.weight.data, head.bias.data = head.weight.data.roll(1, 0), head.bias.data.roll(1, 0)
    return model.head_name


FAULTS = [
    ("vit", eps), ("swin", eps), ("convnext", eps), ("resnet", bn_eps), ("vit", tanh_gelu), ("convnext", tanh_gelu),
    ("swin", relu_for_gelu), ("resnet", padding_mode), ("resnet", dilation), ("vit", swapped_q_and_k),
    ("swin", swapped_q_and_k), ("vit", bias_missing), ("swin", bias_kept_out_of_attention), ("vit", missing_scale),
    ("vit", wrong_head_order), ("vit", post_norm), ("swin", skip_dropped), ("swin", shift_off_by_one),
    ("swin", bias_table_transposed), ("swin", merging_order), ("convnext", layer_scale_dropped),
    ("resnet", stride_moved), ("resnet", relu_missing), ("vit", class_order),
]  # fmt: skip


def planted(family, fault):
    good = filled_model(family)
    bad = copy.deepcopy(good)
    return good, bad, fault(bad)


@pytest.mark.parametrize(("family", "fault"), FAULTS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_planted_fault_is_named(family, fault):
    good, bad, where = planted(family, fault)
    report = diff(good, bad, image())
    assert report.summary["exit_code"] == 1
    assert report.culprit in (where, where.rpartition(".")[0]), (where, report.culprit, report.notes)


def momentum(model):
    first(model, nn.BatchNorm2d)[1].momentum = 0.3


def drop_rate(model):
    first(model, nn.Dropout)[1].p = 0.5


@pytest.mark.parametrize(("family", "fault", "option"), [("resnet", momentum, "momentum"), ("vit", drop_rate, "p")])
def test_what_does_not_matter_in_eval_is_said_apart(family, fault, option):
    good = filled_model(family)
    bad = copy.deepcopy(good)
    fault(bad)
    report = diff(good, bad, image())
    assert report.equal
    assert report.culprit is None
    assert report.verdict.startswith("equal in eval, differs in configuration")
    assert option in [k for _, k, _, _ in report.configuration]


def test_equal_models_are_equal_and_left_as_they_were():
    model = filled_model("swin").train()
    report = diff(model, copy.deepcopy(model), image(), gradients=True, float32=True)
    assert report.verdict == "equal"
    assert report.summary["gradient gap"] == 0
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_and_training_mode():
    class Stops(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    torch.manual_seed(0)
    good = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    bad = copy.deepcopy(good)
    bad[2].__class__ = Stops
    assert diff(good, bad, torch.randn(3, 4)).equal
    report = diff(good, bad, torch.randn(3, 4), gradients=True)
    assert not report.equal
    assert "0." in report.rows[-1]["name"]
    assert diff(good, copy.deepcopy(good), torch.randn(3, 4), training=True).equal  # dropout is off


def test_other_names_are_aligned_by_order_and_by_a_mapping():
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))

    class B(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(4, 6), nn.GELU(approximate="tanh"), nn.Linear(6, 3)

        def forward(self, x):
            return {"logits": self.down(self.act(self.up(x)))}

    b = B()
    b.up.load_state_dict(a[0].state_dict())
    b.down.load_state_dict(a[2].state_dict())
    for mapping in (None, {"0": "up", "1": "act", "2": "down"}):
        report = diff(a, b, torch.randn(5, 4), mapping)
        assert report.culprit == "1", report.notes
        assert "approximate" in " ".join(report.notes)
    with pytest.raises(AdviceError, match="do not exist: 7 -> up"):
        diff(a, b, torch.randn(5, 4), {"7": "up"})


def test_layouts_are_tried():
    x = torch.randn(2, 5, 3, 4)
    for turned, layout in [
        (x, ""),
        (x.permute(0, 2, 3, 1), "NHWC -> NCHW"),
        (x.flatten(2).transpose(1, 2), "tokens -> map NCHW"),
    ]:
        found = compare(x, turned)
        assert (found.largest, found.layout) == (0.0, layout)
    tokens = torch.randn(2, 7, 3)
    assert compare(tokens, tokens.roll(-1, 1)).layout == "extra token last -> first"
    assert compare(x, torch.randn(2, 5)).relative == float("inf")


def test_in_place_operations_do_not_reach_the_record():
    class InPlace(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.lin, self.act, self.slope = nn.Linear(4, 4), nn.ReLU(inplace=True), slope

        def forward(self, x):
            return self.act(self.lin(x)).mul_(self.slope)

    a = InPlace(1.0)
    b = copy.deepcopy(a)
    b.slope = 2.0
    report = diff(a, b, torch.randn(3, 4))
    assert report.culprit == ""
    assert "mul" in report.operation
    assert report.configuration == [("", "slope", 1.0, 2.0)]


def test_unfused_attention_agrees():
    model = filled_model("vit")
    assert diff(model, copy.deepcopy(model), image(), unfused=True).equal


def test_index_is_ours():  # the table that `bias_table_transposed` disturbs is really read through it
    assert relative_index(4).shape == (16, 16)
    assert dataclasses.is_dataclass(filled_model("swin").config)
