"""The networks that streams come with: X3D, ST-GCN, encoders. Step equals clip for hundreds of frames."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lynceus.core.errors import AdviceError, OptionError
from lynceus.rewrite.streaming import convert
from lynceus.rewrite.streaming.encoder import EncoderConfig
from lynceus.rewrite.streaming.encoder import build as build_encoder
from lynceus.rewrite.streaming.names import create, frame_shape, variants
from lynceus.rewrite.streaming.st_gcn import KINETICS, STGCNConfig, partitions
from lynceus.rewrite.streaming.x3d import X3DConfig

TOLERANCES = ((torch.float64, 1e-10), (torch.float32, 1e-4))


def settled(net, seed=0):
    """Fresh weights whose batch norms do something."""
    torch.manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.running_mean, 0, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    return net.eval()


def whole_stream(net, x, dtype, tolerance):
    """Every step's output beside the clip model on the whole stream; how many there were."""
    net, x = net.to(dtype), x.to(dtype)
    stream = convert(net)
    state, outputs = stream.start(x.select(2, 0)), []
    for frame in x.unbind(2):
        y, state = stream.step(frame, state)
        outputs += [] if y is None else [y]
    got = torch.stack(outputs, 2)
    with torch.no_grad():
        want = net(x)[:, :, : got.shape[2]]
    assert got.shape[2] == (x.shape[2] - 1 - stream.delay) // stream.stride + 1
    assert (got - want).abs().max() < tolerance * max(1, want.abs().max())
    return stream, got


def test_a_stream_can_begin_with_a_clip():
    """Its first frames at once, the rest one by one; and padded at its end it is the clip."""
    for name, shape in (("x3d_nano", (2, 3, 30, 32, 32)), ("st_gcn_nano", (2, 3, 50, 25, 2))):
        net, x = settled(create(name)).double(), torch.randn(shape).double()
        stream = convert(net)
        first, state = stream.steps(x[:, :, :25], stream.start(x[:, :, 0]))
        rest = []
        for frame in x[:, :, 25:].unbind(2):
            y, state = stream.step(frame, state)
            rest += [] if y is None else [y]
        got = torch.cat([*([] if first is None else [first]), torch.stack(rest, 2)], 2)
        whole, _ = stream.steps(x, stream.start(x[:, :, 0]), pad_end=True)
        with torch.no_grad():
            want = net(x)
        assert whole.shape == want.shape
        assert torch.allclose(whole, want, atol=1e-10)
        assert torch.allclose(got, want[:, :, : got.shape[2]], atol=1e-10)


def x3d_xs(frames):
    net = settled(create("x3d_xs", num_classes=20, image_size=32, activation="none"))
    return net, torch.randn(1, 3, frames, 32, 32)


def star(frames):
    net = settled(create("st_gcn_star_ntu", num_classes=20, frames=90))
    return net, torch.randn(1, 3, frames, 25, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("make", [x3d_xs, star], ids=["x3d_xs", "st_gcn_star"])
def test_a_stream_equals_the_clip(make, dtype, tolerance):
    net, x = make(110)
    whole_stream(net, x, dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("make", [x3d_xs, star], ids=["x3d_xs", "st_gcn_star"])
def test_a_stream_of_500_frames_equals_the_clip(make, dtype, tolerance):
    net, x = make(560)
    _, got = whole_stream(net, x, dtype, tolerance)
    assert got.shape[2] > 470


def test_without_padding_each_window_is_the_clip():
    net, x = star(100)
    _, got = whole_stream(net, x, torch.float32, 1e-4)
    with torch.no_grad():
        for t in (0, 5, 10):
            want = net(x[:, :, t : t + 90])
            assert want.shape == (1, 20, 1)
            assert torch.allclose(got[:, :, t], want[:, :, 0], atol=1e-4 * want.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("layers", [1, 2])
def test_an_encoder_with_positions_for_500_tokens(layers, dtype, tolerance):
    """Each window sees the positions of its tokens in the stream, which go round the table."""
    torch.manual_seed(0)
    net = build_encoder(
        EncoderConfig(num_classes=5, inputs=12, dim=16, heads=2, feedforward=24, layers=layers, window=9)
    )
    net, x = net.eval().to(dtype), torch.randn(2, 510, 12).to(dtype)
    nn.init.normal_(net.positions.table)
    stream = convert(net)
    got = stream.steps(x, stream.start((2, 12)))[0]
    with torch.no_grad():
        want = torch.stack([net(x[:, t : t + 9], t) for t in range(502)], 1)
    assert got.shape == want.shape
    assert (got - want).abs().max() < tolerance
    with torch.no_grad():
        assert (net(x[:, 5:14], 5) - net(x[:, 5:14], 6)).abs().max() > 1e-3


def test_the_padded_variant_keeps_the_phase_of_its_strides():
    """The reference forgets it in a convolution of kernel 1, so that its residuals are of other frames."""
    net = settled(create("st_gcn_ntu", num_classes=6, widths=(8, 8, 16, 32), frames=60))
    stream, _ = whole_stream(net, torch.randn(2, 3, 200, 25, 2), torch.float64, 1e-10)
    assert stream.stride == 4


def test_a_gate_over_the_clip_or_the_frame():
    """Over the clip, clip and stream differ by design; a stream then looks at the last frames for its gate."""
    x = torch.randn(1, 3, 40, 32, 32).double()
    frame = settled(create("x3d_nano", squeeze="frame", activation="none"))
    clip = settled(create("x3d_nano", squeeze="clip", activation="none"))
    whole_stream(frame, x, torch.float64, 1e-10)
    clip.load_state_dict(frame.state_dict())
    clip = clip.double()
    a, b = convert(frame), convert(clip)
    assert b.delay > a.delay
    y, z = (s.steps(torch.cat([x, x], 2), s.start(x[:, :, 0]))[0] for s in (a, b))
    assert y.shape[2] > z.shape[2] > 0
    # frames that are all alike have one gate, whatever it is averaged over
    still = x[:, :, :1].expand(-1, -1, 300, -1, -1)
    y, z = (s.steps(still, s.start(x[:, :, 0]))[0][:, :, -1] for s in (a, b))
    assert torch.allclose(y, z, atol=1e-8)


def test_facts_of_the_papers():
    count = {n: sum(p.numel() for p in create(n).parameters()) for n in ("x3d_s", "x3d_l", "st_gcn_ntu")}
    assert count["x3d_s"] == 3_794_322
    assert round(count["x3d_l"] / 1e6, 2) == 6.15
    net = create("st_gcn_ntu")
    assert round(sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6, 2) == 3.14
    assert convert(create("st_gcn_star_ntu")).receptive_field == 300
    xs, s, m, large = (variants()[n].VARIANTS[n] for n in ("x3d_xs", "x3d_s", "x3d_m", "x3d_l"))
    assert [(c.frames, c.image_size) for c in (xs, s, m, large)] == [(4, 160), (13, 160), (16, 224), (16, 312)]
    blocks = [[len(getattr(create(n), f"s{i}")) for i in range(2, 6)] for n in ("x3d_s", "x3d_l")]
    assert blocks == [[3, 5, 11, 7], [5, 10, 25, 15]]


def test_the_graphs_columns_sum_to_one():
    for edges, joints in ((STGCNConfig().edges, 25), (KINETICS, 18)):
        parts = partitions(edges, joints)
        assert torch.equal(parts[0], torch.eye(joints))
        assert set(parts.sum(1).round(decimals=5).flatten().tolist()) <= {0.0, 1.0}
        assert torch.equal(parts[1] > 0, (parts[2] > 0).T)


def flops(run):
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter, torch.no_grad():
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def test_flops_of_a_step_and_of_the_clip():
    """What the speed rests on, as torch counts it; times are in bench/streaming.py."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 8, 256, batch_first=True), 1).eval()
    cases = [
        (create("x3d_s"), (1, 3, 160, 160), create("x3d_s"), (1, 3, 13, 160, 160), None, 11.5),
        (create("st_gcn_star_ntu"), (1, 3, 25, 2), create("st_gcn_ntu"), (1, 3, 300, 25, 2), None, 60),
        (encoder, (1, 256), encoder, (1, 64, 256), 64, 40),
    ]
    for net, frame, whole, clip, window, least in cases:
        stream = convert(net, window=window)
        state = stream.start(frame)
        state = type(state)(state.tensors, stream.delay, state.of, state.like)  # as if warmed up
        x, y = torch.zeros(frame), torch.zeros(clip)
        assert flops(lambda: whole(y)) > least * flops(lambda: stream.step(x, state))  # noqa: B023


def test_a_window_of_the_head_costs_no_flops():
    short, long = (convert(create("x3d_nano", pool_frames=n)) for n in (4, 64))
    assert long.delay == short.delay + 60
    counts = []
    for stream in (short, long):
        state = stream.start((1, 3, 32, 32))
        state = type(state)(state.tensors, stream.delay, state.of, state.like)
        counts.append(flops(lambda: stream.step(torch.zeros(1, 3, 32, 32), state)))  # noqa: B023
    assert counts[0] == counts[1]


def test_names():
    assert create("cox3d_nano").name == "x3d_nano"
    assert create("cost_gcn_nano").name == "st_gcn_nano"
    assert frame_shape(create("x3d_nano")) == (3, 32, 32)
    assert frame_shape(nn.Linear(1, 1)) is None
    with pytest.raises(OptionError, match="x3d_s"):
        create("x3d_ss")
    with pytest.raises(OptionError, match="num_classes"):
        create("x3d_nano", num_clases=3)
    for bad in (
        lambda: X3DConfig(squeeze="both"),
        lambda: STGCNConfig(kernel=4),
        lambda: STGCNConfig(joints=5),
        lambda: create("st_gcn_star_ntu", frames=60),
        lambda: EncoderConfig(dim=10, heads=3),
        lambda: EncoderConfig(window=8, positions=4),
    ):
        with pytest.raises(AdviceError):
            bad()


@pytest.mark.skipif(importlib.util.find_spec("bench") is None, reason="the benches are not beside the tests")
@pytest.mark.slow
def test_moving_digits():
    """Three minutes of training; frame by frame a long stream is read as well as through a sliding window."""
    from bench._moving_digits import trial

    torch.set_num_threads(1)
    got = trial(0, 180.0)
    assert abs(got["accuracy, frame by frame"] - got["accuracy, sliding window"]) <= 0.1
    assert got["accuracy, sliding window"] > 50  # chance is 12.5; how far 3 minutes lead is the machine's
    assert got["largest difference"] < 1e-4
