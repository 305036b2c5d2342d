"""Token labels: losses, label maps and their crops, and the recipe on VOLO, ViT, Swin and ConvNeXt."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import lynceus
from lynceus.core import rng
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.types import collate
from lynceus.data import open_dataset
from lynceus.recipes.supervised import SupervisedConfig
from lynceus.recipes.token_label import (
    TokenLabel,
    TokenLabelConfig,
    annotate,
    cropped_labels,
    dense_map,
    label_maps,
    largest,
    read_label_maps,
    save_label_maps,
    soft_cross_entropy,
    token_label_loss,
    token_targets,
)
from lynceus.tasks.classify import Classify

NONE = (0, 0, 0, 0)


def soft(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)


# losses -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_equal_labels_and_logits_weigh_the_plain_loss(weight):
    logits, label = torch.randn(4, 7, dtype=torch.float64), soft(4, 7)
    patches = logits[:, None].expand(-1, 9, -1)
    plain = F.cross_entropy(logits, label)
    target = torch.cat([torch.zeros(4, 7, 1), label[:, :, None].expand(-1, -1, 10)], 2)
    for t in (target, label):
        got = token_label_loss(logits, patches, NONE, t, dense_weight=weight)["loss"]
        assert got == pytest.approx(float((1 + weight) * plain))


def test_a_box_mixes_the_label_of_the_image():
    logits, patches, target = torch.randn(4, 7).double(), torch.randn(4, 12, 7).double(), soft(4, 7, 14)
    found = token_label_loss(logits, patches, (1, 0, 3, 2), target)
    kept = 1 - 4 / 12
    mixed = kept * target[:, :, 1] + (1 - kept) * target[:, :, 1].flip(0)
    assert found["class_loss"] == pytest.approx(float(soft_cross_entropy(logits, mixed)))
    assert found["token_loss"] == pytest.approx(float(F.cross_entropy(patches.transpose(1, 2), target[:, :, 2:])))


def test_ground_truth_counts_more_where_the_annotator_agrees():
    """The soft label keeps a share of 0.5 where it names the true class, 0.9 where it names another."""
    whole = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]], dtype=torch.float64)
    true = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]], dtype=torch.float64)
    target = torch.cat([true[:, :, None], whole[:, :, None], whole[:, :, None].expand(-1, -1, 4)], 2)
    logits, patches = torch.randn(2, 3).double(), torch.randn(2, 4, 3).double()
    found = token_label_loss(logits, patches, NONE, target, ground_truth=True)["class_loss"]
    want = torch.stack([0.5 * whole[0] + 0.5 * true[0], 0.9 * whole[1] + 0.1 * true[1]])
    assert found == pytest.approx(float(soft_cross_entropy(logits, want)))


def test_a_target_for_other_patches_is_refused():
    with pytest.raises(AdviceError, match="11 columns"):
        token_label_loss(torch.randn(2, 3), torch.randn(2, 9, 3), NONE, torch.rand(2, 3, 6))


# label maps -------------------------------------------------------------------------------------------
def test_largest_and_back():
    logits = torch.randn(2, 30, 4, 5)
    kept = largest(logits)
    assert kept.dtype == torch.float16
    assert kept.shape == (2, 2, 5, 4, 5)
    back = dense_map(kept, 30)
    top = logits.topk(5, 1).indices
    assert torch.allclose(back.gather(1, top), logits.gather(1, top), atol=2e-3)
    assert int((back != 0).sum()) <= 2 * 5 * 4 * 5
    with pytest.raises(AdviceError, match="2048"):
        largest(torch.empty(1, 2049, 1, 1))


def test_an_asymmetric_crop_reads_x_across_and_y_down():
    """Logits that grow by 1 per column in class 0 and by 1 per row in class 1, read off inside a wide low crop."""
    h, w = 8, 12
    across = torch.arange(w, dtype=torch.float64).expand(h, w)
    down = torch.arange(h, dtype=torch.float64)[:, None].expand(h, w)
    maps = torch.stack([across, down, torch.zeros(h, w, dtype=torch.float64)])[None]
    box = torch.tensor([[0.5, 0.25, 0.75, 0.75]], dtype=torch.float64)  # columns 6..9, rows 2..6 of 12 x 8
    size = (2, 3)
    got = cropped_labels(maps, box, size)
    assert got.shape == (1, 3, 7)
    logits = got.log()
    logits = logits - logits[:, 2:]  # the third class was 0
    x = torch.tensor([6.0, 7.0, 8.0], dtype=torch.float64) + 0.5 - 0.5
    y = torch.tensor([3.0, 5.0], dtype=torch.float64) - 0.5
    assert torch.allclose(logits[0, 0, 1:].view(2, 3), x.expand(2, 3))
    assert torch.allclose(logits[0, 1, 1:].view(2, 3), y[:, None].expand(2, 3))
    assert logits[0, :2, 0].tolist() == pytest.approx([7.0, 3.5])


def test_mirrored_crops_mirror_the_patches():
    maps, boxes = largest(torch.randn(2, 6, 5, 5)), torch.tensor([[0.1, 0.2, 0.9, 0.8]] * 2)
    options = {"num_classes": 6, "size": (2, 3), "smoothing": 0.1}
    plain = token_targets(maps, boxes, torch.tensor([1, 2]), **options)
    turned = token_targets(maps, boxes, torch.tensor([1, 2]), mirrored=torch.tensor([False, True]), **options)
    assert torch.equal(turned[0], plain[0])
    assert torch.equal(turned[1, :, :2], plain[1, :, :2])
    assert torch.equal(turned[1, :, 2:].view(6, 2, 3), plain[1, :, 2:].view(6, 2, 3).flip(-1))
    assert plain[0, 1, 0] == pytest.approx(0.9 + 0.1 / 6)


@pytest.mark.parametrize("name", ["vit_nano", "swin_nano", "convnext_nano", "resnet_nano", "volo_nano", "convit_nano"])
def test_every_place_is_seen_by_the_classifier(name):
    """The mean of a linear classifier's votes is its vote on the mean; nets with the norm before the mean show it."""
    torch.manual_seed(0)
    model = lynceus.create_model(name, num_classes=7, **({"dense": True} if name == "volo_nano" else {}))
    image = torch.randn(2, 3, 32, 48)
    maps = annotate(model, image, count=7)
    with torch.no_grad():
        last = model.forward_stages(image)[-1]
        assert maps.shape == (2, 2, 7, *last.shape[2:])
        assert sorted(maps[0, 1, :, 0, 0].tolist()) == list(range(7))
        if name in ("swin_nano", "resnet_nano"):
            assert torch.allclose(dense_map(maps, 7).mean((2, 3)), model(image), atol=2e-3)


def test_maps_of_a_data_set_are_kept_by_id(tmp_path):
    data = open_dataset("digits", size=32).subset(range(5))
    maps = label_maps(lynceus.create_model("resnet_nano", num_classes=10), data)
    path = save_label_maps(tmp_path / "maps.safetensors", maps)
    back = read_label_maps(path)
    assert set(back) == {s.id for s in data}
    assert all(torch.equal(back[k], maps[k]) for k in maps)
    with pytest.raises(MissingError, match="label_maps"):
        read_label_maps(tmp_path / "none")


# the recipe -------------------------------------------------------------------------------------------
SMALL = {
    "volo_nano": {"layers": (1, 1, 1, 1), "dense": True},
    "vit_nano": {"depth": 2},
    "swin_nano": {"depths": (2, 2), "num_heads": (2, 4)},
    "convnext_nano": {"depths": (1, 1, 1, 1)},
}


@pytest.fixture(scope="module")
def data():
    return open_dataset("digits", size=32).subset(range(24))


def made(name, **options):
    torch.manual_seed(0)
    return TokenLabel(Classify(num_classes=10), lynceus.create_model(name, **SMALL[name]), **options).train()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("source", ["maps", "annotator", "image"])
def test_every_backbone_learns_from_patches(name, source, data):
    annotator = lynceus.create_model("resnet_nano", num_classes=10)
    options = {
        "maps": {"labels": label_maps(annotator, data), "views": SupervisedConfig(view=32, flip=0.5)},
        "annotator": {"annotator": annotator},
        "image": {},
    }[source]
    recipe = made(name, **options)
    samples = [recipe.transform(data[i], rng.generator(0, i)) for i in range(6)]
    batch = recipe.augment(collate(samples), rng.generator(1))
    out = recipe(batch)
    assert torch.isfinite(out["loss"])
    out["loss"].backward()
    silent = [n for n, p in recipe.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    grouped = sorted(id(p) for g in recipe.param_groups() for p in g["params"])
    assert grouped == sorted(id(p) for p in recipe.parameters() if p.requires_grad)
    again = recipe.augment(collate(samples), rng.generator(1))
    assert [e["box"] for e in again.extra] == [e["box"] for e in batch.extra]
    assert recipe.export()(batch.image).shape == (6, 10)


def test_mixing_pixels_along_patches_is_mixing_their_embeddings():
    recipe = made("vit_nano").eval()
    net = copy.deepcopy(recipe.model.backbone).eval()
    x, box = torch.randn(2, 3, 32, 32), (2, 1, 6, 8)
    from lynceus.layers.token_mix import swap_box

    seen = {}
    net.patch_embed.register_forward_hook(lambda _m, _i, out: seen.update(out=out))
    with torch.no_grad():
        net(x)
        want = swap_box(seen["out"], box)
        net(swap_box(x.permute(0, 2, 3, 1), box, scale=4).permute(0, 3, 1, 2))
        assert torch.equal(seen["out"], want)


def test_the_annotator_is_not_part_of_the_recipe(data):
    annotator = lynceus.create_model("resnet_nano", num_classes=10)
    recipe = made("vit_nano", annotator=annotator)
    assert not any(p is q for p in recipe.parameters() for q in annotator.parameters())


def test_mistakes_are_explained(data):
    with pytest.raises(AdviceError, match="mixup=0"):
        made("vit_nano", views=SupervisedConfig(mixup=0.8))
    with pytest.raises(AdviceError, match="view"):
        made("vit_nano", labels={}, views=SupervisedConfig(crop=4))
    with pytest.raises(AdviceError, match="label_maps"):
        made("vit_nano", labels={}, views=SupervisedConfig(view=32)).transform(data[0], rng.generator(0))
    with pytest.raises(AdviceError, match="dense_weight"):
        TokenLabelConfig(dense_weight=-1)
    maps = {s.id: torch.rand(2, 5, 2 + i % 2, 2).half() for i, s in enumerate(data)}
    recipe = made("vit_nano", labels=maps, views=SupervisedConfig(view=32))
    with pytest.raises(AdviceError, match="several sizes"):
        recipe(collate([recipe.transform(data[i], rng.generator(0)) for i in range(2)]))
    unlabelled = replace(data[0], label=None)
    with pytest.raises(AdviceError, match="one label"):
        made("vit_nano")(collate([unlabelled, unlabelled]))
