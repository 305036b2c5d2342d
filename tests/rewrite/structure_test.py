"""What a network is made of, and networks built from plans: channel arithmetic of sequential, residual, depthwise and
concatenating networks."""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lynceus import create_model
from lynceus.core.errors import AdviceError
from lynceus.rewrite.restructure import Invalid, Restructure
from lynceus.rewrite.structure import layers_of, skeleton
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model


def vgg():
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 16, 32), nn.ReLU(), nn.Linear(32, 5))


class Branches(nn.Module):
    """A depthwise convolution, a concatenation and a sum with a projection."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 12, 1)
        self.mix, self.project = nn.Conv2d(20, 16, 1), nn.Conv2d(16, 24, 1)
        self.widen = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.depthwise(self.stem(x))
        x = self.mix(torch.cat([self.left(x), self.right(x)], 1))
        x = self.widen(x).relu() + self.project(x)
        return self.head(x.mean((2, 3)))


def test_layers_come_in_the_order_of_running_with_their_sizes():
    layers = layers_of(vgg(), (3, 16, 16))
    assert [l.kind for l in layers[:4]] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    assert (layers[4].kernel, layers[4].stride, layers[4].width, layers[4].padding, layers[4].inside) == (
        3,
        1,
        24,
        1,
        16,
    )
    assert layers[4].size == 16 * 24 * 9 + 24
    assert layers[-1].fixed
    assert not layers[4].fixed


def test_outputs_that_are_added_share_a_group_and_the_short_branch_is_a_shortcut():
    layers = {l.name: l for l in layers_of(torchvision.models.resnet18(num_classes=5), (3, 64, 64))}
    assert layers["layer2.0.conv2"].group == layers["layer2.0.downsample.0"].group == layers["layer2.1.conv2"].group
    assert layers["layer2.1.conv1"].group != layers["layer2.1.conv2"].group
    assert layers["layer2.0.downsample.0"].shortcut
    assert not layers["layer2.0.conv1"].shortcut
    assert layers["layer1.1.conv2"].fixed  # added to what the strided stem gives
    assert layers["layer2.1.conv1"].start == layers["layer2.1.conv2"].start > 0


def test_depthwise_follows_and_concatenation_is_fixed():
    layers = {l.name: l for l in layers_of(Branches(), (3, 8, 8))}
    assert layers["depthwise"].depthwise
    assert layers["depthwise"].group == layers["stem"].group
    assert layers["left"].fixed
    assert layers["right"].fixed
    assert layers["project"].shortcut
    assert layers["widen"].joins


@settings(max_examples=40, deadline=None)
@given(st.integers(10, 40), st.integers(1, 3), st.booleans())
def test_what_follows_a_changed_layer_takes_what_comes(width, kernel, drop):
    model = vgg()
    gone = ("1",) if drop else ()
    plan = Restructure(removed=gone, changed=(("0", kernel, 1, width, kernel // 2),), image=(3, 16, 16))
    made = plan(model)
    assert made[0].weight.shape == (width, 3, kernel, kernel)
    assert made[4].in_channels == width
    assert isinstance(made[1], nn.Identity) == drop
    assert made(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert sum(p.numel() for p in made.parameters()) == plan.parameters(model, plan.planned(model))


def test_depthwise_convolutions_follow_their_input():
    made = Restructure(changed=(("stem", 3, 1, 10, 1),), image=(3, 8, 8))(Branches())
    assert made.depthwise.weight.shape == (10, 1, 3, 3)
    assert made(torch.rand(2, 3, 8, 8)).shape == (2, 5)


def test_weights_are_fresh_and_the_model_is_untouched():
    model = vgg()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a, b = Restructure(image=(3, 16, 16))(model), Restructure(image=(3, 16, 16))(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(a[0].weight, model[0].weight)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    other = Restructure(image=(3, 16, 16), seed=1)(model)
    assert not torch.equal(a[0].weight, other[0].weight)


def test_nothing_in_place_reaches_a_shortcut():
    """With both layers before a ReLU gone, it reads the block's own input, which the sum still needs."""
    model = torchvision.models.resnet18(num_classes=5)
    made = Restructure(removed=("layer1.0.conv1", "layer1.0.bn1"), image=(3, 64, 64))(model)
    x = torch.randn(1, 64, 16, 16)
    block = made.layer1[0]
    want = (block.bn2(block.conv2(x.relu())) + x).relu()
    assert torch.allclose(block(x), want)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"changed": (("layer1.0.conv2", 3, 1, 32, 1),)}, "do not fit together"),
        ({"changed": (("layer1.0.conv1", 3, 1, 64, 0),)}, "do not fit together"),
        ({"removed": ("fc",)}, "instead of"),
    ],
)
def test_plans_of_which_no_network_comes_say_why(plan, says):
    with pytest.raises(Invalid, match=says):
        Restructure(**plan, image=(3, 64, 64)).planned(torchvision.models.resnet18(num_classes=5))


def test_linear_layers_that_would_read_too_little_are_invalid():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(Invalid, match="would read 8 numbers"):
        Restructure(image=(3, 8, 8)).planned(model)


def test_a_name_that_is_no_layer_is_said():
    with pytest.raises(AdviceError, match="no layer 'conv9'"):
        Restructure(removed=("conv9",), image=(3, 16, 16)).planned(vgg())


def test_a_network_that_does_not_run_on_the_images_is_said():
    with pytest.raises(AdviceError, match="does not run on images of 4x4"):
        layers_of(vgg(), (3, 4, 4))


def test_our_own_networks_are_rebuilt_from_their_file(tmp_path):
    torch.manual_seed(0)
    model = Classify(num_classes=4).build(create_model("resnet_nano"))
    name = "backbone.layer3."
    plan = Restructure(
        removed=("backbone.layer1.0.conv1", "backbone.layer1.0.bn1"),
        changed=(
            (f"{name}0.conv2", 3, 1, 40, 1),
            (f"{name}1.conv2", 3, 1, 40, 1),
            (f"{name}0.downsample.0", 1, 2, 40, 0),
        ),
    )
    made = plan(model)
    assert [s.channels for s in made.backbone.stages] == [16, 32, 40, 128]
    save_model(made, tmp_path)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path)(x), made(x))
    with torch.no_grad():  # the fused kernels see the layers as they are now
        assert torch.allclose(made(x).double(), made.double()(x.double()), atol=1e-5)


def test_a_skeleton_holds_no_numbers():
    assert all(p.is_meta for p in skeleton(vgg()).parameters())
