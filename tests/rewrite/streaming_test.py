"""Streams of ordinary modules: step equals clip, states are values, what cannot be streamed is named."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming import EachFrame, Parallel, Residual, Streaming, WindowAttention, convert
from lynceus.train.checkpoint import load_model, save_model

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGE = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAXIMUM = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def settled(net, seed=0):
    """Eval mode, with running statistics that are not those of a fresh net."""
    torch.manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    return net.eval()


def frames_of(x, time=2):
    return x.unbind(time)


def through(stream, x, grad=False):
    """All outputs of a stream of the clip `x`, frame by frame."""
    state, outputs = stream.start(x.select(stream.time, 0)), []
    for frame in x.unbind(stream.time):
        y, state = stream.step(frame, state, grad=grad)
        outputs += [] if y is None else [y]
    return torch.stack(outputs, min(stream.time, outputs[0].ndim)) if outputs else None


def small():
    """Strided in time, padded, with two residuals, 3-D."""
    return settled(
        nn.Sequential(
            nn.Conv3d(2, 6, 3, stride=(1, 2, 2), padding=(0, 1, 1)),
            nn.BatchNorm3d(6),
            nn.ReLU(inplace=True),
            Residual(nn.Sequential(nn.Conv3d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm3d(6), nn.SiLU())),
            Residual(nn.Conv3d(6, 6, (5, 1, 1)), shrink="centred"),
            nn.Conv3d(6, 8, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)),
            nn.AvgPool3d((2, 2, 2), stride=(1, 2, 2)),
            nn.MaxPool3d((2, 1, 1), stride=1),
            nn.Conv3d(8, 4, 1),
        )
    )


def classifier():
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=(0, 1, 1)), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(4, 3), nn.Softmax(dim=-1),
    )  # fmt: skip
    return settled(net)


# the invariant -----------------------------------------------------------------------------------
@st.composite
def networks(draw):
    """(network, clip): layers of random kernels, strides and padding over time, of one to three dimensions."""
    dims = draw(st.integers(1, 3))
    channels = draw(st.integers(1, 3)) * 2
    torch.manual_seed(draw(st.integers(0, 99)))
    layers = [CONV[dims](channels, channels, 1)]

    def conv(stride):
        kernel = draw(st.integers(1, 4))
        dilation = draw(st.integers(1, 2))
        padding = draw(st.integers(0, dilation * (kernel - 1)))
        space = draw(st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1)]))
        return CONV[dims](
            channels,
            channels,
            (kernel, *[space[0]] * (dims - 1)),
            stride=(stride, *[space[1]] * (dims - 1)),
            padding=(padding, *[space[2]] * (dims - 1)),
            dilation=(dilation, *[1] * (dims - 1)),
            groups=draw(st.sampled_from([1, 2, channels])),
            bias=draw(st.booleans()),
        )

    def same(kernel):
        return CONV[dims](
            channels, channels, (kernel, *[1] * (dims - 1)), padding=(kernel // 2, *[0] * (dims - 1)), bias=False
        )

    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "average", "maximum", "residual", "cut", "parallel", "strided"]))
        kernel = draw(st.integers(1, 3))
        if kind == "conv":
            layers += [conv(draw(st.integers(1, 2))), BATCH_NORM[dims](channels), nn.ReLU()]
        elif kind == "average":
            count = draw(st.booleans())
            pad = draw(st.integers(0, kernel // 2))
            layers.append(
                AVERAGE[dims]((kernel, *[1] * (dims - 1)) if dims > 1 else kernel, 1,
                              (pad, *[0] * (dims - 1)) if dims > 1 else pad, count_include_pad=count)
            )  # fmt: skip
        elif kind == "maximum":
            layers.append(MAXIMUM[dims]((kernel, *[1] * (dims - 1)) if dims > 1 else kernel, draw(st.integers(1, 2))))
        elif kind == "residual":
            layers.append(Residual(nn.Sequential(same(2 * kernel - 1), nn.SiLU(), same(3))))
        elif kind == "cut":
            shrink = draw(st.sampled_from(["centred", "lagging", "leading"]))
            layers.append(Residual(CONV[dims](channels, channels, (5, *[1] * (dims - 1))), shrink=shrink))
        elif kind == "parallel":
            reduce = draw(st.sampled_from(["sum", "mul", "max"]))
            layers.append(Parallel(same(1), same(5), nn.Sequential(same(3), nn.Tanh(), same(3)), reduce=reduce))
        else:
            stride = (2, *[1] * (dims - 1))
            short = CONV[dims](channels, channels, 1, stride=stride)
            long = CONV[dims](channels, channels, (5, *[1] * (dims - 1)), stride=stride, padding=(2, *[0] * (dims - 1)))
            layers.append(Parallel(short, long))
    x = torch.randn(draw(st.integers(1, 2)), channels, draw(st.integers(30, 45)), *[6] * (dims - 1))
    return settled(nn.Sequential(*layers)), x


@settings(max_examples=60, deadline=None)
@given(networks())
def test_step_equals_clip(case):
    """Frame by frame, a stream gives what the clip model gives on all of it, but for what padding at its end adds."""
    net, x = case
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        stream = convert(net).to(dtype)
        with torch.no_grad():
            want = net.to(dtype)(x.to(dtype))
        got = through(stream, x.to(dtype))
        seen = x.shape[2] - 1 - stream.delay
        count = 0 if seen < 0 else seen // stream.stride + 1
        assert (0 if got is None else got.shape[2]) == count
        assert count >= want.shape[2] - stream.padding
        if got is not None:
            assert torch.allclose(got, want[:, :, :count], atol=tolerance * max(1, want.abs().max()), rtol=0)


@settings(max_examples=60, deadline=None)
@given(networks(), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_many_steps_at_once_equal_one_by_one(case, sizes):
    """In pieces of any size, mixed with single steps; and with the padding at the end, the whole clip."""
    net, x = case
    stream, x = convert(net.double()), x.double()
    want = through(stream, x)
    state, outputs, at = stream.start(x[:, :, 0]), [], 0
    for size in [*sizes, 1, x.shape[2]]:
        piece = x[:, :, at : at + size]
        if not piece.shape[2]:
            continue
        if size == 1:
            y, state = stream.step(piece[:, :, 0], state)
            y = None if y is None else y.unsqueeze(2)
        else:
            before = state
            y, state = stream.steps(piece, state)
            end, same = stream.steps(piece, before, pad_end=True)
            assert all(torch.equal(a, b) for a, b in zip(state.tensors, same.tensors))
            assert y is None or torch.allclose(end[:, :, : y.shape[2]], y, atol=1e-12)
        outputs += [] if y is None else [y]
        at += size
    assert state.frames == x.shape[2]
    got = torch.cat(outputs, 2) if outputs else None
    assert (got is None) == (want is None)
    assert got is None or (got.shape == want.shape and torch.allclose(got, want, atol=1e-10))
    with torch.no_grad():
        clip = net(x)
    whole, _ = stream.steps(x, stream.start(x[:, :, 0]), pad_end=True)
    assert whole.shape == clip.shape
    assert torch.allclose(whole, clip, atol=1e-10)


def test_delays_and_reach_follow_from_the_layers():
    stream = convert(small())
    assert (stream.receptive_field, stream.padding, stream.stride, stream.delay) == (3 + 2 + 4 + 2 + 2 + 2, 2, 2, 12)


def test_nothing_comes_before_the_delay_and_then_every_stride():
    stream, x = convert(small()), torch.randn(1, 2, 24, 8, 8)
    state, at = stream.start((1, 2, 8, 8)), []
    for t, frame in enumerate(frames_of(x)):
        y, state = stream.step(frame, state)
        if y is not None:
            at.append(t)
    assert at == [12, 14, 16, 18, 20, 22]


def test_a_pointwise_convolution_with_a_stride_keeps_its_phase():
    """It holds nothing, so there is no memory in which its phase could be kept."""
    net = settled(nn.Sequential(nn.Conv1d(2, 2, 1, stride=2), Residual(nn.Conv1d(2, 2, 3, padding=1))))
    x = torch.randn(1, 2, 20)
    assert torch.allclose(through(convert(net), x), net(x)[:, :, :9], atol=1e-6)


def test_fast_kernels_equal_the_plain_modules(monkeypatch):
    from lynceus.rewrite.streaming.kernels import Kernels

    net, x = small(), torch.randn(2, 2, 24, 10, 12)
    fast = through(convert(net), x)
    monkeypatch.setattr(Kernels, "run", lambda self, frames: None)
    plain = through(convert(net), x)
    assert torch.allclose(fast, plain, atol=1e-5)
    assert not torch.equal(fast, plain)  # they are two ways of computing


def test_folded_weights_follow_the_weights():
    stream, x = convert(small()), torch.randn(1, 2, 20, 8, 8)
    through(stream, x)
    with torch.no_grad():
        stream.model[0].weight.mul_(2)
        stream.model[1].running_mean.add_(1)
    assert torch.allclose(through(stream, x), stream(x)[:, :, :4], atol=1e-4)


def test_a_window_is_asked_for_and_used():
    net, x = classifier(), torch.randn(2, 1, 30, 6, 6)
    stream = convert(net, window=8)
    assert stream.delay == 7
    got = through(stream, x)
    with torch.no_grad():
        want = torch.stack([net(x[:, :, t : t + 8]) for t in range(23)], -1)
    assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(AdviceError, match=r"AdaptiveAvgPool3d \(3\).*window=16"):
        convert(net)
    with pytest.raises(AdviceError, match="leaves nothing"):
        convert(net, window=2)


def test_a_long_window_is_one_ring():
    net = settled(nn.Sequential(nn.Conv1d(2, 3, 3), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(3, 2)))
    x = torch.randn(2, 2, 60)
    stream = convert(net, window=30)
    assert len(stream.start((2, 2)).tensors) == 3
    with torch.no_grad():
        want = torch.stack([net(x[:, :, t : t + 30]) for t in range(31)], -1)
    assert torch.allclose(through(stream, x), want, atol=1e-5)


def test_replicated_frames_before_the_first():
    net, x = settled(nn.Sequential(nn.Conv1d(2, 2, 3, padding=1))), torch.randn(1, 2, 9)
    got = through(convert(net, fill="replicate"), x)
    padded = torch.cat([x[:, :, :1], x], 2)
    want = nn.functional.conv1d(padded, net[0].weight, net[0].bias)
    assert torch.allclose(got, want, atol=1e-6)
    assert not torch.allclose(got[:, :, 0], net(x)[:, :, 0])


def test_frames_of_your_own_modules():
    net = settled(nn.Sequential(EachFrame(nn.GroupNorm(2, 4)), nn.Conv3d(4, 4, 3), EachFrame(nn.LayerNorm((6, 6)))))
    x = torch.randn(2, 4, 12, 8, 8)
    assert torch.allclose(through(convert(net), x), net(x), atol=1e-5)


# transformers ------------------------------------------------------------------------------------
def encoder(layers, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(16), enable_nested_tensor=False).eval()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}], ids=str)
def test_an_encoder_over_the_last_tokens(layers, options):
    """The reference goes wrong after 2 n - 1 tokens with two layers, cannot do three, and takes relu for gelu."""
    net, n = encoder(layers, **options), 7
    x = 2 * torch.randn(2, 50, 16)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        net = net.to(dtype)
        got = through(convert(net, window=n), x.to(dtype))
        with torch.no_grad():
            want = torch.stack([net(x[:, t : t + n].to(dtype))[:, -1] for t in range(44)], 1)
        assert got.shape == want.shape
        assert (got - want).abs().max() < tolerance


def test_an_encoder_layer_alone_and_time_first():
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(8, 2, 16).eval(), torch.randn(20, 3, 8)
    got = through(convert(net, window=5), x)
    with torch.no_grad():
        want = torch.stack([net(x[t : t + 5])[-1] for t in range(16)])
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("query", [None, -1, 0, 3])
def test_attention_over_a_window(query):
    torch.manual_seed(0)
    n = 6
    net, x = WindowAttention(8, 2, window=n, query=query).eval().double(), torch.randn(2, 40, 8).double()
    stream, outputs = convert(net), []
    state = stream.start((2, 8))
    for token in x.unbind(1):
        y, state = stream.step(token, state)
        outputs += [] if y is None else [y]
    with torch.no_grad():
        windows = [net(x[:, t : t + n]) for t in range(35)]
    want = torch.stack(windows if query is None else [w[:, query] for w in windows])
    assert torch.stack(outputs).shape == want.shape
    assert (torch.stack(outputs) - want).abs().max() < 1e-10


def loud_stream(steps, n=16, dim=8):
    """Largest relative error of retroactive attention in float32, with scores that overflow exp now and then."""
    torch.manual_seed(0)
    net = WindowAttention(dim, 2, window=n, query=None).eval()
    stream = convert(net)
    state, past, worst, loudest = stream.start((1, dim)), [], 0.0, 0.0
    for t in range(steps):
        x = (60.0 if t % 100 < 2 else 1.0) * torch.randn(1, dim)
        past = [*past[-n + 1 :], x]
        y, state = stream.step(x, state)
        if y is not None and (t % 100 < 20 or t > steps - 50):
            with torch.no_grad():
                clip = torch.stack(past, 1)
                want = net(clip)
                q, k, _ = stream._node.heads.project(clip)
            loudest = max(loudest, float((q @ k.transpose(-1, -2)).abs().max() * stream._node.heads.scale))
            worst = max(worst, float((y - want).abs().max() / want.abs().max()))
    assert loudest > 100  # exp of it is no float32
    return worst


def test_retroactive_sums_do_not_drift_or_overflow():
    assert loud_stream(1500) < 1e-4


@pytest.mark.slow
def test_retroactive_sums_after_100_000_steps():
    assert loud_stream(100_000) < 1e-4


# states ------------------------------------------------------------------------------------------
def test_a_step_leaves_the_state_as_it_was():
    stream, x = convert(small()), torch.randn(1, 2, 20, 8, 8)
    state = stream.start((1, 2, 8, 8))
    for frame in frames_of(x):
        before = [t.clone() for t in state.tensors]
        y, after = stream.step(frame, state)
        z, again = stream.step(frame, state)
        assert all(torch.equal(a, b) for a, b in zip(before, state.tensors))
        assert all(torch.equal(a, b) for a, b in zip(after.tensors, again.tensors))
        assert (y is None and z is None) or torch.equal(y, z)
        state = after


def test_the_frame_may_be_overwritten_afterwards():
    stream, x = convert(nn.Sequential(nn.Conv1d(2, 2, 3))), torch.randn(1, 2, 9)
    buffer, state, outputs = torch.empty(1, 2), stream.start((1, 2)), []
    for frame in frames_of(x):
        y, state = stream.step(buffer.copy_(frame), state)
        outputs += [] if y is None else [y]
    assert torch.allclose(torch.stack(outputs, 2), stream(x), atol=1e-6)


@pytest.mark.parametrize("make", [small, lambda: encoder(2)], ids=["convolutions", "encoder"])
def test_streams_in_turns_equal_streams_apart(make):
    net = make()
    stream = convert(net, window=7 if isinstance(net, nn.TransformerEncoder) else None)
    shape = (1, 16) if stream.time == 1 else (1, 2, 8, 8)
    a, b = (torch.randn(30, *shape) for _ in range(2))
    apart = []
    for x in (a, b):
        holder = stream.stream(shape)
        apart.append([holder.step(f) for f in x])
    holder = stream.stream(shape)
    states, together = [holder.get_state()] * 2, ([], [])
    for pair in zip(a, b):
        for i, frame in enumerate(pair):
            holder.set_state(states[i])
            together[i].append(holder.step(frame))
            states[i] = holder.get_state()
    for want, got in zip(apart, together):
        assert all((w is None and g is None) or torch.equal(w, g) for w, g in zip(want, got))
    holder.clean_state()
    assert all((w is None) == ((y := holder.step(f)) is None) and (w is None or torch.equal(w, y))
               for w, f in zip(apart[0], a))  # fmt: skip


def test_update_state_false_is_as_if_nothing_had_been():
    stream, x = convert(small()), torch.randn(20, 1, 2, 8, 8)
    holder = stream.stream(x[0])
    for frame in x:
        first = holder.get_state()
        y = holder.step(frame, update_state=False)
        assert holder.get_state() is first
        z = holder.step(frame)
        assert (y is None and z is None) or torch.equal(y, z)


def test_states_of_others_are_refused():
    stream, other = convert(classifier(), window=8), convert(classifier(), window=9)
    frame = torch.randn(2, 1, 6, 6)
    state = stream.start(frame)
    with pytest.raises(AdviceError, match="belongs to another model"):
        other.step(frame, state)
    with pytest.raises(AdviceError, match=r"batch makes them \(3, 1, 6, 6\)"):
        stream.step(torch.randn(3, 1, 6, 6), state)
    with pytest.raises(AdviceError, match="frame makes them"):
        stream.step(torch.randn(2, 1, 7, 6), state)
    with pytest.raises(AdviceError, match="float64"):
        stream.step(frame.double(), state)
    with pytest.raises(AdviceError, match="of another model"):
        other.stream(frame).set_state(state)
    with pytest.raises(AdviceError, match="another batch"):
        stream.stream((1, 1, 6, 6)).set_state(state)


def test_training_mode_is_refused():
    stream = convert(classifier(), window=8)
    state = stream.start((1, 1, 6, 6))
    stream.train()
    for go in (lambda: stream.step(torch.randn(1, 1, 6, 6), state), lambda: stream.start((1, 1, 6, 6))):
        with pytest.raises(AdviceError, match="training mode"):
            go()


def test_frames_of_the_wrong_kind():
    with pytest.raises(AdviceError, match="takes no frames of shape"):
        convert(small()).start((1, 5, 8, 8))


def test_gradients_flow_through_steps_when_asked_for():
    net, x = small().double(), torch.randn(1, 2, 16, 8, 8).double()
    stream = convert(net)
    y = through(stream, x, grad=True)
    y.square().sum().backward()
    net(x)[:, :, : y.shape[2]].square().sum().backward()
    for p, q in zip(stream.parameters(), net.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-9)
    assert not stream.steps(x, stream.start(x[:, :, 0]))[0].requires_grad


# graphs and files --------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [small, lambda: classifier(), lambda: encoder(1), lambda: encoder(2)])
def test_an_exported_step(make):
    net = make()
    window = 7 if isinstance(net, nn.TransformerEncoder) else 8
    stream = convert(net, window=window)
    shape = {1: (2, 16)}.get(stream.time) or ((2, 2, 8, 8) if len(net) == 9 else (2, 1, 6, 6))
    x, state = torch.randn(30, *shape), stream.start(shape)
    module = stream.step_module()
    run = torch.export.export(module, module.inputs(x[0], state)).module()
    held = module.inputs(x[0], state)[1:]
    seen = 0
    for frame in x:
        want, state = stream.step(frame, state)
        y, ready, *held = run(frame, *held)
        assert bool(ready) == (want is not None)
        if want is not None:
            assert torch.allclose(y, want, atol=1e-4)
            seen += 1
    assert seen >= 9


@pytest.mark.slow
def test_a_compiled_step():
    stream, x = convert(small()), torch.randn(30, 1, 2, 8, 8)
    holder = stream.stream(x[0])
    want = [holder.step(f) for f in x]
    holder = stream.compile_step().stream(x[0])
    for w, f in zip(want, x):
        y = holder.step(f)
        assert (y is None) == (w is None)
        assert y is None or torch.allclose(y, w, atol=1e-4)


def test_saved_and_loaded(tmp_path):
    from lynceus.rewrite.streaming.names import create

    for name, shape in (("x3d_nano", (1, 3, 32, 32)), ("st_gcn_nano", (1, 3, 25, 2)), ("encoder_nano", (1, 8))):
        stream = convert(create(name))
        save_model(stream, tmp_path / name)
        back = load_model(tmp_path / name)
        x = torch.randn(stream.delay + 3, *shape)
        a, b = stream.stream(shape), back.stream(shape)
        for frame in x:
            y, z = a.step(frame), b.step(frame)
        assert torch.equal(y, z)
        assert back.rewrite == stream.rewrite
        state = a.get_state()
        back.step(x[0], state)  # a state is of a structure, not of one object


def test_your_own_module_is_loaded_into_itself(tmp_path):
    net, x = classifier(), torch.randn(1, 1, 12, 6, 6)
    stream = convert(net, window=8)
    save_model(stream, tmp_path)
    fresh = classifier()
    nn.init.zeros_(fresh[0].weight)
    back = load_model(tmp_path, backbone=fresh)
    assert torch.equal(through(back, x), through(stream, x))
    with pytest.raises(AdviceError, match="backbone="):
        load_model(tmp_path)


def test_the_rewrite_leaves_the_model_alone():
    net = small().train()
    before = copy.deepcopy(net.state_dict())
    stream = Streaming()(net, torch.randn(1, 2, 24, 8, 8))
    assert net.training
    assert net[2].inplace
    for p in stream.parameters():
        p.data.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_copies_step_alike():
    stream, x = convert(small()), torch.randn(1, 2, 20, 8, 8)
    twin = copy.deepcopy(stream)
    want = through(stream, x)
    assert torch.equal(through(twin, x), want)
    with torch.no_grad():
        twin.model[0].weight.zero_()
    assert torch.equal(through(stream, x), want)
    assert torch.allclose(through(twin, x), twin(x)[:, :, : want.shape[2]], atol=1e-5)


# what cannot be streamed -------------------------------------------------------------------------
class Own(nn.Module):
    def forward(self, x):
        return x - x.mean(2, keepdim=True)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([nn.Conv1d(2, 2, 3), nn.GroupNorm(1, 2)], r"GroupNorm \(1\).*all time steps"),
        ([nn.Conv1d(2, 2, 3), nn.Sequential(nn.InstanceNorm1d(2))], r"InstanceNorm1d \(1\.0\)"),
        ([nn.Conv1d(2, 2, 3), nn.LSTM(2, 2)], r"LSTM \(1\)"),
        ([nn.Conv1d(2, 2, 3), Own()], r"Own \(1\) cannot be converted.*EachFrame"),
        ([nn.Conv1d(2, 2, 3), nn.Flatten()], r"Flatten \(1\) flattens time"),
        ([nn.Conv1d(2, 2, 3), nn.Linear(8, 2)], r"Linear \(1\) works along time"),
        ([nn.Conv1d(2, 2, 3), nn.LayerNorm(8)], r"LayerNorm \(1\) works along time"),
        ([nn.Conv1d(2, 2, 3), nn.Softmax(dim=-1)], r"Softmax \(1\) works along time"),
        ([nn.Conv1d(2, 2, 3), nn.Upsample(scale_factor=2)], r"Upsample \(1\)"),
        ([nn.Conv1d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3)], r"ConvTranspose1d \(1\)"),
        ([nn.Conv1d(2, 2, 3), nn.Conv3d(2, 2, 3)], r"Conv3d \(1\) takes 5 axes"),
        ([nn.Conv1d(2, 2, 3), nn.AdaptiveAvgPool1d(4)], "makes 4 time steps"),
        ([nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")], "pads with 'circular'"),
        ([nn.Conv1d(2, 2, 3, padding=4)], "pads 4 time steps"),
        ([nn.Conv1d(2, 2, 4, padding="same")], "even size"),
        ([nn.Conv1d(2, 2, 3), nn.AvgPool1d(2, ceil_mode=True)], "ceil_mode"),
        ([nn.Conv1d(2, 2, 3), nn.BatchNorm1d(2, track_running_stats=False)], "track_running_stats"),
        ([Residual(nn.Conv1d(2, 2, 3))], "shrink time by different amounts"),
        ([Residual(nn.Conv1d(2, 2, 4), shrink="centred")], "no middle"),
        ([Residual(nn.Conv1d(2, 2, 3, stride=2, padding=1))], "temporal strides"),
        ([nn.Conv1d(2, 2, 1), nn.TransformerEncoderLayer(2, 1)], "window=64"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_streamed_is_named(layers, words):
    with pytest.raises(AdviceError, match=words):
        convert(nn.Sequential(*layers))


def test_options_out_of_range():
    for options, words in (({"window": 0}, "at least 1"), ({"fill": "ones"}, "'zeros' or 'replicate'")):
        with pytest.raises(AdviceError, match=words):
            Streaming(**options)
    with pytest.raises(AdviceError, match="converted already"):
        convert(convert(small()))
    with pytest.raises(AdviceError, match="way to join"):
        Parallel(nn.Identity(), nn.Identity(), reduce="add")
    with pytest.raises(AdviceError, match="time steps"):
        Residual(nn.Conv1d(2, 2, 3))(torch.randn(1, 2, 9))
