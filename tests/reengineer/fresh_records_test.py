"""Records made here and now on timm's and torchvision's own code, in forms that the stored records do not cover."""

import json

import pytest
import timm
import torch
import torchvision

from lynceus.reengineer import parity
from lynceus.reengineer.filling import filled, fingerprint, image


def fill(model):
    state = {n: list(t.shape) for n, t in model.state_dict().items() if t.is_floating_point()}
    with torch.no_grad():
        for name, t in model.double().eval().state_dict().items():
            if name in state:
                t.copy_(torch.from_numpy(filled(name, t.shape)))
    return state


def made(family, config, model, outputs, shape):
    state = fill(model)
    with torch.no_grad():
        out = outputs(model, torch.from_numpy(image(shape, 5)))
    return {
        "model": "fresh", "family": family, "reference": "made here", "config": config,
        "parameters": sum(p.numel() for p in model.parameters()), "inputs": {"image": {"shape": shape, "seed": 5}},
        "outputs": {k: fingerprint(v.numpy()) for k, v in out.items()}, "state": state,
    }  # fmt: skip


def resnet_outputs(m, x):
    x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
    out = {"stem": x}
    for i in range(1, 5):
        x = getattr(m, f"layer{i}")(x)
        out[f"stage{i}"] = x
    out["pooled"] = x.mean((2, 3))
    out["logits"] = m.fc(out["pooled"])
    return out


def vit_outputs(m, x):
    out = {}
    hooks = [
        b.register_forward_hook(lambda _m, _i, o, k=f"block{i}": out.__setitem__(k, o))
        for i, b in enumerate(m.blocks, 1)
    ]
    tokens = m.forward_features(x)
    for h in hooks:
        h.remove()
    kept = {k: out[k] for k in ("block1", "block6", "block12")}
    return kept | {
        "tokens": tokens,
        "features": m.forward_head(tokens, pre_logits=True),
        "logits": m.forward_head(tokens),
    }


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"factory": "resnet34"}, marks=pytest.mark.slow),
        {"factory": "resnet50", "replace_stride_with_dilation": [False, True, True], "num_classes": 7},
        pytest.param({"factory": "resnext50_32x4d", "num_classes": 5}, marks=pytest.mark.slow),
        pytest.param({"factory": "wide_resnet50_2", "num_classes": 5}, marks=pytest.mark.slow),
    ],
    ids=lambda c: c["factory"],
)
def test_resnet(tmp_path, config):
    options = {k: v for k, v in config.items() if k != "factory"}
    model = getattr(torchvision.models, config["factory"])(weights=None, **options)
    check(tmp_path, made("resnet", config, model, resnet_outputs, [2, 3, 65, 81]))


@pytest.mark.parametrize("change", [{"global_pool": "avg"}, {"num_classes": 21}, {"dynamic_img_size": True}], ids=str)
def test_vit(tmp_path, change):
    base = {
        "embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16, "mlp_ratio": 4.0, "qkv_bias": True,
        "num_classes": 1000, "global_pool": "token",
    } | {k: v for k, v in change.items() if k in ("global_pool", "num_classes")}  # fmt: skip
    arch = "vit_tiny_patch16_224"
    model = timm.create_model(arch, **change)
    config = {"arch": arch, **base, "layer_norm_eps": 1e-6, "build_img_size": [224, 224], **change}
    shape = [1, 3, 96, 208] if change.get("dynamic_img_size") else [1, 3, 224, 224]
    check(tmp_path, made("vit", config, model, vit_outputs, shape))


def check(tmp_path, record):
    path = tmp_path / "fresh.json"
    path.write_text(json.dumps(record))
    report = parity.parity(path)
    assert parity.exit_code(report) == 0, ([r for r in report.rows if r["verdict"] != "agrees"], report.notes)
