"""SAM's image encoder, beside timm's; other sizes; checkpoints of other sizes; its place in the table of families."""

import pytest
import timm
import torch
from torch import nn

import lynceus
from lynceus.backbones.sam_vit import VARIANTS, SamViT, SamViTConfig, relative
from lynceus.core.errors import AdviceError
from lynceus.rewrite.expedite import Expedite
from lynceus.train.checkpoint import load_model, save_model

SMALL = {"image_size": (64, 64), "patch_size": 8, "dim": 48, "depth": 4, "heads": 3, "out": 32, "window": 3}


def small(**changes):
    torch.manual_seed(0)
    made = SamViT(SamViTConfig(**{**SMALL, "global_blocks": (1, 3), **changes})).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return made


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def test_it_is_timms_network_under_timms_names():
    theirs = timm.models.vision_transformer_sam.VisionTransformerSAM(
        img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, neck_chans=32, num_classes=0,
        use_abs_pos=True, use_rel_pos=True, window_size=3, global_attn_indexes=(1, 3),
    ).double().eval()  # fmt: skip
    ours = small(norm_eps=1e-5).double()  # theirs in blocks; the authors build with 1e-6
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = images(64, 64).double()
    with torch.no_grad():
        maps = ours.forward_stages(x)
        assert torch.allclose(maps[-1], theirs.forward_features(x), atol=1e-10)
        found = theirs.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(maps, found, strict=False))


@pytest.mark.parametrize(("name", "count"), [("b", 89_670_912), ("l", 308_278_272), ("h", 637_026_048)])
def test_sizes(name, count):
    with torch.device("meta"):
        model = SamViT(VARIANTS[f"sam_vit_{name}"])
    assert sum(p.numel() for p in model.parameters()) == count
    assert [s.channels for s in model.stages] == [model.config.dim] * 4 + [256]
    assert model.config.global_blocks[-1] == model.config.depth - 1


def test_the_authors_names(tmp_path):
    model = small()
    state = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in model.state_dict().items()}
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 8)
    torch.save(state, tmp_path / "sam.pth")
    fields = {**SMALL, "global_blocks": (1, 3), "num_classes": 0, "init": "small"}
    again = lynceus.create_model("sam_vit_b", weights=tmp_path / "sam.pth", **fields)
    x = images(64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_checkpoint_of_another_size(tmp_path):
    """Tables of relative places are resized when loading as they would be when running."""
    model = small(absolute=False)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    fields = {**SMALL, "global_blocks": (1, 3), "absolute": False, "image_size": (40, 96), "num_classes": 0}
    again = lynceus.create_model("sam_vit_b", weights=tmp_path / "weights.pth", **fields)
    x = images(40, 96)
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), atol=1e-5)
    with_table = small()
    torch.save(with_table.state_dict(), tmp_path / "table.pth")
    again = lynceus.create_model(
        "sam_vit_b",
        weights=tmp_path / "table.pth",
        **{**SMALL, "global_blocks": (1, 3), "image_size": (40, 96), "num_classes": 0},
    )
    with torch.no_grad():
        assert torch.allclose(again(x), with_table(x), atol=1e-4)


def test_relative_places():
    table = torch.arange(7.0)[:, None]
    found = relative(table, 4)[..., 0]
    assert all(found[q, k] == q - k + 3 for q in range(4) for k in range(4))


def test_windows_do_not_see_each_other_and_global_blocks_do():
    x = images(64, 64, batch=1)
    y = x.clone()
    y[..., -8:, -8:] += 1  # the last patch
    for blocks, seen in (((), False), ((3,), True)):
        net = small(global_blocks=blocks, levels=(0, 1, 2, 3))
        with torch.no_grad():
            a, b = net.forward_stages(x)[3], net.forward_stages(y)[3]
        assert bool((a[..., :3, :3] != b[..., :3, :3]).any()) == seen


def test_a_rewritten_encoder_is_rebuilt_from_its_file(tmp_path):
    model = lynceus.create_model("sam_vit_nano", num_classes=0)
    fast = Expedite(alpha=1, clusters=(3, 3))(model)
    save_model(fast, tmp_path)
    again, x = load_model(tmp_path), images(37, 53)
    assert again.rewrite == fast.rewrite
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again.forward_stages(x), fast.forward_stages(x), strict=True))


def test_what_makes_no_sense():
    with pytest.raises(AdviceError, match="blocks from 0 to 3"):
        small(global_blocks=(4,))
    with pytest.raises(AdviceError, match="blocks from 0 to 3"):
        small(levels=(9,))
    with pytest.raises(AdviceError, match="'small' or 'scratch'"):
        small(init="large")
    with pytest.raises(AdviceError, match="multiple of 5"):
        small(heads=5)
    assert isinstance(small().head, nn.Identity)
