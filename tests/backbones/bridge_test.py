"""Ours taken by others by name, and theirs in our contract: built and run."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2

from lynceus.backbones import create_model, list_models, timm_bridge
from lynceus.backbones.from_timm import create_timm, list_timm
from lynceus.backbones.pyramid import Pyramid, as_pyramid
from lynceus.core.errors import AdviceError, OptionError

NANO = ["convnext_nano", "halonet_nano", "resnet_nano", "soft_nano", "swin_nano", "vit_nano"]
PYRAMIDS = ["convnext_nano", "halonet_nano", "resnet_nano", "soft_nano", "swin_nano", "vit_nano_pyramid"]


@pytest.fixture(scope="module", autouse=True)
def registered():
    return timm_bridge.register()


def grads(model):
    return [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


# ours for them -----------------------------------------------------------------------------------
def test_every_model_is_known_to_timm(registered):
    assert set(registered) >= {f"lynceus_{n}" for n in list_models()}
    assert set(timm.list_models("lynceus_*")) == set(registered)
    assert timm_bridge.register() == registered


def test_importing_registers_nothing(python):
    code = "import lynceus.backbones.timm_bridge, timm; print(timm.list_models('lynceus_*'))"
    assert python(code).strip() == "[]"


@pytest.fixture
def python():
    import subprocess
    import sys

    return lambda code: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", NANO)
def test_timm_classifies(name):
    model = timm.create_model(f"lynceus_{name}", num_classes=7, in_chans=1)
    assert model.training
    out = model(torch.rand(2, 1, 40, 33))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert grads(model) == []
    assert model.get_classifier().out_features == 7
    model.reset_classifier(3)
    assert model.eval()(torch.rand(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("name", [*NANO, "vit_nano_pyramid"])
@pytest.mark.parametrize("indices", [None, (1, 2), (-1,)])
def test_timm_features_only(name, indices):
    options = {} if indices is None else {"out_indices": indices}
    model = timm.create_model(f"lynceus_{name}", features_only=True, **options)
    h, w = 64, 96
    maps = model(torch.rand(2, 3, h, w))
    strides, channels = model.feature_info.reduction(), model.feature_info.channels()
    assert len(maps) == len(strides) == (len(indices) if indices else len(model.feature_info.info))
    for m, s, c in zip(maps, strides, channels):
        assert m.shape == (2, c, h // s, w // s)
    sum(m.sum() for m in maps).backward()


@pytest.mark.parametrize("name", [*NANO, "vit_nano_pyramid"])
def test_timm_s_data_config_and_optimizer(name):
    model = timm.create_model(f"lynceus_{name}")
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, *model.input_size)
    assert tuple(config["mean"]) == model.mean
    assert tuple(config["std"]) == model.std
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    covered = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert covered == {id(p) for p in model.parameters()}
    assert len({g["lr_scale"] for g in optimizer.param_groups}) > 2


@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("decoder", ["Unet", "UPerNet"])
def test_segmentation_models_take_ours(name, decoder):
    levels = timm.create_model(f"lynceus_{name}", features_only=True).feature_info.reduction()
    depth = len(levels) - (levels[0] == 1) + (levels[0] == 4)
    options = {"decoder_channels": (64, 32, 16, 16, 16)[:depth]} if decoder == "Unet" else {"decoder_channels": 32}
    model = getattr(smp, decoder)(f"tu-lynceus_{name}", encoder_weights=None, encoder_depth=depth, classes=4, **options)
    out = model(torch.rand(2, 3, 64, 96))
    assert out.shape == (2, 4, 64, 96)
    out.square().mean().backward()
    unused = grads(model.decoder) + grads(model.segmentation_head)
    assert unused == []
    first = next(p for p in model.encoder.parameters() if p.requires_grad)
    assert first.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_tiny", "resnet50", "swin_tiny", "vit_tiny_pyramid"])
@pytest.mark.parametrize("decoder", ["Unet", "UPerNet"])
def test_segmentation_models_take_full_sizes_with_their_defaults(name, decoder):
    model = getattr(smp, decoder)(f"tu-lynceus_{name}", encoder_weights=None, classes=4)
    out = model(torch.rand(2, 3, 128, 64))
    assert out.shape == (2, 4, 128, 64)
    out.square().mean().backward()


@pytest.mark.parametrize("name", NANO)
def test_faster_rcnn_trains_and_predicts(name):
    torch.manual_seed(0)
    model = timm_bridge.faster_rcnn(name, num_classes=3, out_channels=16, min_size=64, max_size=96)
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 44.0]]), "labels": torch.tensor([1])}] * 2
    losses = model(images, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    first = next(p for p in model.backbone.body.parameters() if p.requires_grad)
    assert first.grad.abs().sum() > 0
    found = model.eval()(images)
    assert [set(f) for f in found] == [{"boxes", "labels", "scores"}] * 2


@pytest.mark.parametrize("name", NANO)
def test_fpn_maps_have_the_strides_they_tell(name):
    backbone = timm_bridge.fpn_backbone(name, out_channels=8)
    maps = list(backbone(torch.rand(1, 3, 64, 96)).values())
    assert [tuple(m.shape) for m in maps] == [(1, 8, -(-64 // s), -(-96 // s)) for s in backbone.strides]


def test_asking_timm_for_what_we_do_not_have_advises():
    with pytest.raises(AdviceError, match="no weights"):
        timm.create_model("lynceus_resnet_nano", pretrained=True)
    with pytest.raises(OptionError, match="drop_rate"):
        timm.create_model("lynceus_resnet_nano", dorp_rate=0.1)
    with pytest.raises(AdviceError, match="levels 0 to"):
        timm.create_model("lynceus_resnet_nano", features_only=True, out_indices=(0, 9))
    with pytest.raises(OptionError, match="strides"):
        timm.create_model("lynceus_resnet_nano", features_only=True, output_stride=16)


def test_a_pyramid_classifies_as_its_trunk():
    trunk = create_model("vit_nano", num_classes=5)
    image = torch.rand(2, 3, 33, 50)
    with torch.no_grad():
        want = trunk(image)
        pyramid = Pyramid(trunk).eval()
        assert torch.equal(pyramid(image), want)
        assert torch.equal(pyramid.forward_stages(image)[2], trunk.forward_stages(image)[-1])
    convolutional = create_model("convnext_nano")
    assert as_pyramid(convolutional) is convolutional
    with pytest.raises(AdviceError, match="several strides"):
        Pyramid(convolutional)


# theirs for us -----------------------------------------------------------------------------------
THEIRS = ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
MORE = [
    "efficientnet_b0",
    "vgg11",
    "xcit_nano_12_p8_224",
    "swinv2_tiny_window8_256",
    "densenet121",
    "mvitv2_tiny",
]


@pytest.mark.parametrize("name", [*THEIRS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_a_timm_model_keeps_the_contract(name):
    with torch.device("meta"):
        model = create_model(f"timm:{name}", num_classes=7)
    assert model.name == f"timm:{name}"
    assert not model.training
    for h, w in (model.input_size, (225, 301), (64, 32)):
        image = torch.empty(2, 3, h, w, device="meta")
        with torch.no_grad():
            features, maps = model.features_and_stages(image)
            assert model(image).shape == model.forward_head(features).shape == (2, 7)
            assert model.pool(features).shape == (2, model.head_hidden_size)
        for m, s in zip(maps, model.stages):
            assert m.shape[1] == s.channels
            assert abs(m.shape[2] * s.stride - h) < 2 * s.stride + (model.sizes == "padded") * model.multiple
    model.reset_classifier(3)
    assert model(torch.empty(1, 3, *model.input_size, device="meta")).shape == (1, 3)
    assert model.config.num_classes == 3


def test_a_wrapped_model_computes_what_timm_computes():
    model = create_timm("resnet18", num_classes=10, in_chans=1)
    image = torch.rand(2, 1, 65, 47)
    theirs = timm.create_model("resnet18", num_classes=10, in_chans=1).eval()
    theirs.load_state_dict(model.model.state_dict())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(image), theirs(image))
        assert torch.equal(model.forward_head(model.forward_features(image)), theirs(image))
        for a, b in zip(model.forward_stages(image), theirs.forward_intermediates(image, intermediates_only=True)):
            assert torch.equal(a, b)
        listened = model._listened(image)
    assert torch.equal(listened[0], theirs.forward_features(image))
    assert [m.shape[1] for m in listened[1]] == [s.channels for s in model.stages]
    assert len(model.mean) == len(model.std) == 1


def test_weights_of_timm_and_of_ours_load_into_a_wrapped_model(tmp_path):
    theirs = timm.create_model("resnet10t", num_classes=3).eval()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    image = torch.rand(1, 3, 64, 64)
    model = create_model("timm:resnet10t", num_classes=3, weights=tmp_path / "theirs.safetensors")
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    again = create_model("timm:resnet10t", num_classes=3, weights=tmp_path / "ours.safetensors")
    with torch.no_grad():
        assert torch.equal(model(image), theirs(image))
        assert torch.equal(again(image), theirs(image))


def test_free_sizes_equal_timm_at_its_own_size():
    torch.manual_seed(0)
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        model = create_timm(name, num_classes=4).eval()
        theirs = timm.create_model(name, num_classes=4).eval()
        theirs.load_state_dict(model.model.state_dict(), strict=False)
        image = torch.rand(1, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(model(image), theirs(image))


def test_a_model_of_one_size_says_so():
    with torch.device("meta"):
        model = create_model("timm:mixer_s16_224")
        assert model.sizes == "fixed"
        with pytest.raises(AdviceError, match=r"image_size=\(64, 64\)"):
            model(torch.empty(1, 3, 64, 64))
        model = create_model("timm:mixer_s16_224", image_size=(64, 64))
        assert model(torch.empty(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_layer_decay_reaches_every_parameter(name):
    with torch.device("meta"):
        model = create_timm(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    scales = {
        n: g["lr_scale"]
        for g in optimizer.param_groups
        for p in g["params"]
        for n, q in model.named_parameters()
        if p is q
    }
    assert len(scales) == len(list(model.parameters()))
    assert scales[f"{model.head_name}.weight"] == 1
    assert min(scales.values()) < 0.3
    assert all(n.startswith("model.") for n in model.no_weight_decay())


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("timm:resnet5", {}, "resnet50"),
        ("timm:resnet18", {"blok": 1}, "block"),
        ("timm:resnet18", {"drop_pathrate": 0.1}, "drop_path_rate"),
        ("timm:vgg11", {"drop_path_rate": 0.1}, "no drop_path_rate"),
    ],
)
def test_mistakes_name_the_nearest(name, options, match):
    with pytest.raises(OptionError, match=match):
        create_model(name, **options)


def test_lists():
    assert "resnet50" in list_timm("resnet5*")
    assert len(list_timm()) > 1000
