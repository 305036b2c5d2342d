"""The super-network: masks equal extraction, several networks share a backward pass, sorting changes nothing."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lynceus.backbones.resnas import Reduction, ResNASConfig
from lynceus.backbones.resnas_definition import parse
from lynceus.backbones.resnas_supernet import (
    SPACES,
    BlockSpace,
    Space,
    SuperNet,
    allowed,
    draw,
    extract,
    importance,
    kept,
    leading,
    masked_norm,
    sort_channels,
)
from lynceus.core.errors import AdviceError
from lynceus.layers.block import MixerBlock

FULL = parse("C 32,64,128: 4x8|96 4x8|96 4x8|96 // 4x16|192 4x16|192 // 4x16|384")


def block(products, hidden, layer=None):
    return {"attn": products, "mlp": hidden, "layer": layer}


FIRST, SECOND = ([32, 24, 16], [96, 72, 48]), ([64, 48, 32], [192, 160, 128])
KEEP = [
    *([32, 24, 20], block(*FIRST), block(*FIRST, [32, 0]), block(*FIRST, [32, 0])),
    *([64, 56, 48], block(*SECOND, [64, 0]), block(*SECOND)),
    *([128, 112, 96], block([64, 48], [384, 256])),
    None,
]
SPACE = Space.of(FULL, KEEP)


def supernet(**options):
    torch.manual_seed(0)
    net = SuperNet(SPACE, ResNASConfig(image_size=(56, 56), num_classes=10, **options)).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def images(batch=4, side=56):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("options", [{}, {"distilled": True}], ids=str)
def test_masked_equals_extracted(options):
    net, x, generator = supernet(**options), images(), seeded()
    for side in (56, 70):
        x = images(2, side)
        for _ in range(25):
            definition = SPACE.sample(generator)
            with torch.no_grad():
                masked = net(x, kept(SPACE, [definition], 2))
                cut, short = extract(net, definition), extract(net, definition, listed=False)
                assert (cut(x) - masked).abs().max() < 1e-9
                assert (short(x) - masked).abs().max() < 1e-9
            assert all(m.width == w.width for m, w in zip(cut.plan.stages, definition.stages))
            assert cut.plan == SPACE.resolved(definition)


def test_the_full_choice_is_the_full_network():
    net, x = supernet(), images()
    with torch.no_grad():
        assert (net(x, kept(SPACE, [FULL], 4)) - net(x)).abs().max() < 1e-9


def test_networks_of_a_batch_do_not_touch_each_other():
    net, x, generator = supernet(), images(6), seeded()
    chosen = [SPACE.sample(generator) for _ in range(3)]
    with torch.no_grad():
        together = net(x, kept(SPACE, chosen, 6))
        for i, definition in enumerate(chosen):
            assert (together[i::3] - net(x[i::3], kept(SPACE, [definition], 2))).abs().max() < 1e-9


def test_one_backward_pass_averages_the_gradients():
    """Dropout off and batch norms frozen, a pass with k networks has the mean of the k gradients."""
    net, x, generator = supernet(patch_output=True).train(), images(6), seeded()
    label = torch.arange(6)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    chosen = [SPACE.sample(generator) for _ in range(3)]

    def loss(rows, choice):
        logits, patches = net(x[rows], choice)
        return F.cross_entropy(logits, label[rows]) + patches.square().mean()

    loss(torch.arange(6), kept(SPACE, chosen, 6)).backward()
    together = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for i, definition in enumerate(chosen):
        (loss(torch.arange(6)[i::3], kept(SPACE, [definition], 2)) / 3).backward()
    for a, p in zip(together, net.parameters()):
        assert (a - p.grad).abs().max() < 1e-9


def test_channels_outside_a_network_get_no_gradient():
    net, x = supernet(), images()
    small = parse("C 20,48,96: 2x8|48 (2x8|48) (2x8|48) // (2x16|128) 2x16|128 // 3x16|256")
    net(x, kept(SPACE, [small], 4)).square().sum().backward()
    first = net.blocks[0]
    assert first.mlp.fc1.weight.grad[48:].abs().max() == 0
    assert first.mlp.fc1.weight.grad[:48, :20].abs().min() > 0
    assert first.attn.proj.weight.grad[:, 16:].abs().max() == 0
    assert net.blocks[1].mlp.fc2.weight.grad.abs().max() == 0
    assert net.tokens.grad[..., 20:].abs().max() == 0


def test_a_dropped_block_takes_the_next_droppable_ones_with_it():
    text = "C 32,64,128: 4x8|96 (4x8|96) 4x8|96 // 4x16|192 4x16|192 // 4x16|384"
    resolved = SPACE.resolved(parse(text))
    assert [b.exists for _, b in resolved.blocks()] == [True, False, False, True, True, True]
    net, x = supernet(), images()
    both = parse(text.replace("(4x8|96) 4x8|96", "(4x8|96) (4x8|96)"))
    with torch.no_grad():
        assert torch.equal(net(x, kept(SPACE, [parse(text)], 4)), net(x, kept(SPACE, [both], 4)))
    choice = draw(SPACE, 512, seeded(), per_network=1)
    second, third, fourth = (choice.blocks[i].there for i in (1, 2, 3))
    assert not (third & ~second).any()  # in one stage
    assert (fourth & ~third).any()  # a reduction stands between


def test_sorting_changes_no_output_and_orders_importance():
    net, x = supernet(), images()
    with torch.no_grad():
        before = net(x)
        sums = [importance(b)[1].sum() for b in net.blocks if isinstance(b, MixerBlock)]
        sort_channels(net)
        assert (net(x) - before).abs().max() < 1e-10
    for total, part in zip(sums, (b for b in net.blocks if isinstance(b, MixerBlock))):
        heads, hidden = importance(part)
        assert (heads.diff() <= 1e-12).all()
        assert (hidden.diff() <= 1e-12).all()
        assert hidden.sum() == pytest.approx(float(total))


def test_importance_counts_a_head_and_a_channel_once():
    part = next(b for b in supernet().blocks if isinstance(b, MixerBlock))
    heads, hidden = importance(part)
    attn, mlp = part.attn, part.mlp
    with torch.no_grad():
        rows = [slice(j * 32 + 8, j * 32 + 16) for j in range(3)]
        want = sum(attn.qkv.weight[r].abs().sum() + attn.qkv.bias[r].abs().sum() for r in rows)
        assert heads[1] == pytest.approx(float(want + attn.proj.weight[:, 8:16].abs().sum()))
        want = mlp.fc1.weight[5].abs().sum() + mlp.fc1.bias[5].abs() + mlp.fc2.weight[:, 5].abs().sum()
        assert hidden[5] == pytest.approx(float(want))


def test_masked_norm_is_the_norm_of_what_is_kept():
    norm = nn.LayerNorm(12, eps=1e-6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, count = torch.randn(3, 5, 12, dtype=torch.float64), torch.tensor([12, 7, 1])
    mask = leading(count, x)
    y = masked_norm(norm, x * mask, mask)
    for i, k in enumerate(count.tolist()):
        want = F.layer_norm(x[i, :, :k], (k,), norm.weight[:k], norm.bias[:k], 1e-6)
        assert (y[i, :, :k] - want).abs().max() < 1e-12
        assert y[i, :, k:].abs().max() == 0 if k < 12 else True


# drawing ------------------------------------------------------------------------------------------------
def test_draws_are_balanced_repeated_and_independent():
    choice = draw(SPACE, 24, seeded(), per_network=4)
    assert choice.batch == 24
    for column in [*choice.widths, *(b.hidden for b in choice.blocks)]:
        assert torch.equal(column, column[:6].repeat(4))
        assert set(Counter(column[:6].tolist()).values()) <= {2, 3}  # six networks, two or three options
    single = draw(SPACE, 8, seeded(), single=True)
    assert all(len(set(c.tolist())) == 1 for c in single.widths)
    pairs = {(int(a), int(b)) for s in range(20) for a, b in zip(*draw(SPACE, 6, seeded(s), per_network=2).widths[:2])}
    assert len(pairs) == 9
    with pytest.raises(AdviceError, match="no multiple"):
        draw(SPACE, 10, seeded(), per_network=4)
    assert torch.equal(
        draw(SPACE, 8, seeded(3), per_network=2).widths[0], draw(SPACE, 8, seeded(3), per_network=2).widths[0]
    )


def test_the_warm_up_opens_the_options_one_by_one():
    options = (5, 4, 3, 2, 1)
    assert [len(allowed(options, epoch, 30)) for epoch in (0, 7, 8, 15, 22, 23, 30, 99)] == [1, 1, 2, 3, 3, 4, 5, 5]
    assert allowed(options, None, 30) == options == allowed(options, 0, 0)
    first = draw(SPACE, 8, seeded(), per_network=1, epoch=0)
    assert [int(w.min()) for w in first.widths] == [32, 64, 128]
    assert all(b.there.all() for b in first.blocks)


def test_the_authors_spaces():
    tiny, small = SPACES["tiny"], SPACES["small"]
    assert tiny.full.items()[1] == (1, (256, 6, 32), (256, 768), 1)
    assert tiny.stages[1].widths == (512, 448, 384, 352, 320)
    assert tiny.stages[1].blocks[0] == BlockSpace(heads=(12, 10, 8, 6), hidden=(1536, 1408, 1280, 1152, 1024, 896, 768))
    assert tiny.stages[2].blocks[1].there == (True, True, False, False)
    assert [len(s.blocks) for s in small.stages] == [7, 7, 7]
    assert small.stages[2].blocks[0].heads == (16, 14, 12, 10)
    assert small.stages[0].blocks[6].hidden == (960, 880, 800, 720, 640, 560, 480)
    generator = seeded()
    for space in (tiny, small):
        for _ in range(20):
            definition = space.sample(generator)
            space.check(definition)
            assert definition.macs() <= space.full.macs()


def test_the_found_medium_network_lies_in_its_space():
    """As the authors' file lists it, with its absent block."""
    medium = parse(
        "C 240,640,880: 7|960 6|960 7|800 8|960 7|880 8|880 6|800 // 10|1120 14|1760 14|1920 16|1760 14|1440 16|1760 "
        "16|1920 // 16|3200 10|3840 16|3840 (12|3840) 12|3200 16|3520 14|3520"
    )
    SPACES["medium"].check(medium)
    assert [s.width in o.widths for s, o in zip(medium.stages, SPACES["medium"].stages)] == [True] * 3
    for (_, b), o in zip(medium.blocks(), (o for s in SPACES["medium"].stages for o in s.blocks)):
        assert b.heads in o.heads
        assert b.hidden in o.hidden


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("C 32,64: 4x8|96", "stages"),
        ("C 32,64,128: 4x8|96 4x8|96 // 4x16|192 4x16|192 // 4x16|384", "blocks in its stages"),
        ("C 32,64,128: 4x4|96 4x8|96 4x8|96 // 4x16|192 4x16|192 // 4x16|384", "8 wide here"),
        ("C 32,64,128: 5x8|96 4x8|96 4x8|96 // 4x16|192 4x16|192 // 4x16|384", "larger than"),
        ("C 32,64,128: (4x8|96) 4x8|96 4x8|96 // 4x16|192 4x16|192 // 4x16|384", "never drops"),
        ("P C 32,64,128: 4x8|96 4x8|96 4x8|96 // 4x16|192 4x16|192 // 4x16|384", "embedding"),
    ],
)
def test_what_a_space_does_not_contain_is_told(text, words):
    with pytest.raises(AdviceError, match=words):
        SPACE.check(parse(text))


def test_wrong_batches_are_told():
    net = supernet()
    with pytest.raises(AdviceError, match="equally"):
        kept(SPACE, [FULL] * 3, 4)
    with pytest.raises(AdviceError, match="has 4 images"):
        net(images(), kept(SPACE, [FULL], 2))
    with pytest.raises(AdviceError, match="must fall from"):
        replace(SPACE, stages=(replace(SPACE.stages[0], widths=(24, 20)), *SPACE.stages[1:]))


def test_reductions_may_not_lose_channels():
    """Drawn widths never shrink from stage to stage, so every drawn network can be cut out."""
    wide = replace(SPACE, stages=(SPACE.stages[0], replace(SPACE.stages[1], widths=(64, 16)), SPACE.stages[2]))
    choice = draw(wide, 64, seeded(), per_network=1)
    assert (choice.widths[1] >= choice.widths[0]).all()
    assert isinstance(supernet().blocks[3], Reduction)
