"""timm and torchvision checkpoints, wrapped as training scripts wrap them, load into our models with an account."""

import subprocess
import sys

import pytest
import timm
import torch
import torchvision

import lynceus
from lynceus.backbones._weights import load_weights, match_weights
from lynceus.core.errors import AdviceError
from lynceus.core.rules import Rule, apply_rules
from lynceus.reengineer import inspect, map_keys
from lynceus.reengineer.importer import load_rules, save_rules

PEERS = {
    "resnet18 of torchvision": ("resnet18", lambda: torchvision.models.resnet18(weights=None)),
    "resnet18 of timm": ("resnet18", lambda: timm.create_model("resnet18")),
    "vit_small of timm": ("vit_small", lambda: timm.create_model("vit_small_patch16_224")),
    "swin_tiny of timm": ("swin_tiny_patch4_window7_224", lambda: timm.create_model("swin_tiny_patch4_window7_224")),
    "swin_tiny of torchvision": ("swin_tiny_patch4_window7_224", lambda: torchvision.models.swin_t(weights=None)),
    "convnext_tiny of timm": ("convnext_tiny", lambda: timm.create_model("convnext_tiny")),
    "convnext_tiny of torchvision": ("convnext_tiny", lambda: torchvision.models.convnext_tiny(weights=None)),
}
WRAPS = {
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "state_dict": lambda s: {"epoch": 7, "state_dict": {f"module.{k}": v for k, v in s.items()}},
    "model_ema": lambda s: {"model_ema": s, "optimizer": {"state": {}, "param_groups": []}},
}


def peer(name):
    ours, make = PEERS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():  # values away from their neat initial ones, so that a swap shows
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return ours, model


@pytest.mark.parametrize(("name", "wrap"), list(zip(PEERS, [*WRAPS, *WRAPS, *WRAPS])))
def test_wrapped_checkpoints_load_and_agree(tmp_path, name, wrap):
    ours, model = peer(name)
    torch.save(WRAPS[wrap](model.state_dict()), tmp_path / "c.pth")
    mine = lynceus.create_model(ours)
    account = load_weights(mine, tmp_path / "c.pth")
    assert account.verdict == "complete", account.text()
    assert mine.weights_account.endswith("verdict: complete")
    assert ("module." in account.wrappers) == (wrap != "model_ema")
    size = 224 if "vit" in name or "swin" in name else 96
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = model.double()(x.double()), mine.double().eval()(x.double())
    assert (got - want).abs().max() / want.std() < 1e-6


@pytest.mark.parametrize(
    "name", ["resnet18 of torchvision", "vit_small of timm", "swin_tiny of torchvision", "convnext_tiny of timm"]
)
def test_three_planted_faults_are_named_and_nothing_else(tmp_path, name):
    ours, model = peer(name)
    state = dict(model.state_dict())
    mine = lynceus.create_model(ours)
    whole = load_account(state, mine)
    place = {a: b for a, b, *_ in [*whole.loaded, *whole.transformed]}
    floats = [n for n, t in state.items() if t.is_floating_point() and n in place]
    turned = next(n for n in floats if state[n].ndim == 2 and state[n].shape[0] != state[n].shape[1])
    renamed = next(n for n in floats if n.endswith("bias") and n != turned)
    gone = next(n for n in reversed(floats) if n.endswith("weight") and n not in (turned, renamed))
    state[turned] = state[turned].T.contiguous()
    state[f"{renamed}_old"] = state.pop(renamed)
    del state[gone]
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    with pytest.raises(AdviceError) as caught:
        lynceus.create_model(ours, weights=tmp_path / "c.pth")
    account = load_account(state, mine)
    found = account.findings()
    assert len(found) == 3, found
    assert any(f.startswith("renamed?") and place[renamed] in f and f"{renamed}_old" in f for f in found)
    assert any(f.startswith("missing") and place[gone] in f for f in found)
    assert any(f.startswith("wrong shape") and place[turned] in f and "transpose" in f for f in found)
    assert "INCOMPLETE" in str(caught.value)
    assert all(f in str(caught.value) for f in found)


def load_account(state, model):
    return match_weights(state, model).account


def test_an_incomplete_checkpoint_changes_nothing(tmp_path):
    model = lynceus.create_model("resnet18", num_classes=10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "c.pth")
    with pytest.raises(AdviceError, match="head='drop'"):
        load_weights(model, tmp_path / "c.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    account = load_weights(model, tmp_path / "c.pth", head="drop")
    assert account.verdict == "complete but 2 ignored (2 of ours left as initialised)"
    assert torch.equal(model.state_dict()["fc.weight"], before["fc.weight"])
    assert not torch.equal(model.state_dict()["conv1.weight"], before["conv1.weight"])


def test_positions_of_another_size_are_resized_and_said(tmp_path):
    peer_model = timm.create_model("vit_tiny_patch16_224")
    torch.save(peer_model.state_dict(), tmp_path / "c.pth")
    mine = lynceus.create_model("vit_tiny", image_size=(160, 256))
    account = load_weights(mine, tmp_path / "c.pth")
    assert [(b, w) for _, b, w in account.transformed] == [
        ("pos_embed", "resize_positions 14x14 -> 10x16 (bicubic, antialias, 1 extra tokens kept)")
    ]
    want = timm.layers.resample_abs_pos_embed(peer_model.pos_embed.data, [10, 16], num_prefix_tokens=1)
    assert (mine.pos_embed.data - want).abs().max() < 1e-6
    with pytest.raises(AdviceError, match="wrong shape"):
        load_weights(mine, tmp_path / "c.pth", resize=False)


def test_relative_tables_of_another_window_are_resized(tmp_path):
    torch.save(timm.create_model("swin_tiny_patch4_window7_224").state_dict(), tmp_path / "c.pth")
    mine = lynceus.create_model("swin_tiny_patch4_window7_224", window_size=8)
    account = load_weights(mine, tmp_path / "c.pth")
    assert sum("resize_rel_bias 13x13 -> 15x15" in what for _, _, what in account.transformed) == 10  # 7x7 maps keep 7


def test_half_precision_is_accepted_and_said(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {k: v.half() for k, v in timm.create_model("vit_tiny_patch16_224").state_dict().items()},
        tmp_path / "c.safetensors",
    )
    account = load_weights(lynceus.create_model("vit_tiny"), tmp_path / "c.safetensors")
    assert account.complete
    assert {(a, b) for _, a, b in account.dtype_changed} == {("float16", "float32")}


def test_which_weights_of_a_file_that_holds_several(tmp_path):
    raw, averaged = timm.create_model("resnet18").state_dict(), timm.create_model("resnet18").state_dict()
    torch.save({"state_dict": raw, "state_dict_ema": averaged, "epoch": 3}, tmp_path / "c.pth")
    model = lynceus.create_model("resnet18")
    account = load_weights(model, tmp_path / "c.pth")
    assert any("state_dict_ema" in n for n in account.notes)
    assert torch.equal(model.conv1.weight, raw["conv1.weight"])
    load_weights(model, tmp_path / "c.pth", entry="state_dict_ema")
    assert torch.equal(model.conv1.weight, averaged["conv1.weight"])
    with pytest.raises(AdviceError, match="Did you mean 'state_dict_ema'"):
        load_weights(model, tmp_path / "c.pth", entry="state_dict_em")


class Payload:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.flag}",)


@pytest.mark.parametrize("legacy", [False, True, "pickle"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, legacy):
    import pickle

    path, flag = tmp_path / "c.pth", tmp_path / "ran"
    content = {"model": {"w": torch.ones(3)}, "extra": Payload(flag)}
    if legacy == "pickle":
        path.write_bytes(pickle.dumps({"extra": Payload(flag)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for call in (inspect.inspect, lambda p: lynceus.create_model("resnet18", weights=p)):
        with pytest.raises(AdviceError, match=r"refused.*system.*Nothing of it was run"):
            call(path)
    assert not flag.exists()
    if legacy == "pickle":  # the payload is a real one
        subprocess.run([sys.executable, "-c", f"import pickle; pickle.load(open({str(path)!r}, 'rb'))"], check=True)
        assert flag.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "npz"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_said_with_its_bytes(tmp_path, form, part):
    import numpy as np
    from safetensors.torch import save_file

    state = torchvision.models.resnet18(weights=None).state_dict()
    path = tmp_path / {"zip": "c.pth", "legacy": "c.pth", "safetensors": "c.safetensors", "npz": "c.npz"}[form]
    if form == "safetensors":
        save_file(state, path)
    elif form == "npz":
        np.savez(path, **{k: v.numpy() for k, v in state.items()})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    keep = int(len(whole) * part)
    path.write_bytes(whole[:keep])
    with pytest.raises(AdviceError, match=rf"(?s)truncated|damaged|missing.*{keep}|{keep}.*missing") as caught:
        inspect.inspect(path)
    assert str(keep) in str(caught.value)


def test_other_files_get_their_own_message(tmp_path):
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html></html>")
    (tmp_path / "none.pth").write_bytes(b"")
    torch.save(torch.ones(3), tmp_path / "one.pth")
    torch.save(torchvision.models.resnet18(weights=None), tmp_path / "module.pth")
    for name, text in [
        ("lfs", "LFS pointer"),
        ("page", "web page"),
        ("none", "empty"),
        ("one", "one tensor"),
        ("module", "refused"),
    ]:
        with pytest.raises(AdviceError, match=text):
            inspect.inspect(tmp_path / f"{name}.pth")
    with pytest.raises(AdviceError, match="no checkpoint at"):
        inspect.inspect(tmp_path / "absent.pth")


# inspect --------------------------------------------------------------------------------------------------------------
def test_inspect_fits_on_a_screen_and_names_the_model():
    state = timm.create_model("swin_small_patch4_window7_224").state_dict()
    assert len(state) > 300
    report = inspect.inspect({f"module.{k}": v for k, v in state.items()})
    assert len(report.rows) <= 40
    assert any("layers.2.blocks.{0..17}" in r["name"] for r in report.rows)
    assert sum(r["numbers"] for r in report.rows) == sum(t.numel() for t in state.values())
    assert "wrappers taken off every name: module." in report.notes
    assert any("create_model('swin_small_patch4_window7_224', num_classes=1000" in n for n in report.notes)
    assert len(inspect.inspect(state, expand=True).rows) == len(state)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "h5", "pt", "zip"])
def test_inspect_reads_every_format(tmp_path, suffix):
    import zipfile

    import numpy as np
    from safetensors.torch import save_file

    state = {"layer.weight": torch.randn(4, 3), "layer.bias": torch.randn(4)}
    path = tmp_path / f"c.{suffix}"
    if suffix == "npz":
        np.savez(path, **{k: v.numpy() for k, v in state.items()})
    elif suffix == "safetensors":
        save_file(state, path)
    elif suffix == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as f:
            for k, v in state.items():
                f[k.replace(".", "/")] = v.numpy()
    elif suffix == "zip":
        torch.save({"teacher": state}, tmp_path / "inner.pth")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "inner.pth", "inner.pth")
    else:
        torch.save(
            {"params": {"layer": {"weight": state["layer.weight"], "bias": state["layer.bias"]}}, "lr": 0.1}, path
        )
    report = inspect.inspect(path)
    assert report.summary["tensors"] == 2
    assert report.rows[0]["name"] == "layer"


def test_optimiser_state_is_listed_not_loaded(tmp_path):
    model = torchvision.models.resnet18(weights=None)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimiser.step()
    torch.save({"model": model.state_dict(), "optimizer": optimiser.state_dict(), "epoch": 3}, tmp_path / "c.pth")
    report = inspect.inspect(tmp_path / "c.pth")
    assert "listed, not loaded: optimizer (optimiser state of 62 parameters)" in report.notes
    assert report.summary["tensors"] == 122


# map_keys -------------------------------------------------------------------------------------------------------------
def test_proposals_carry_reasons_and_make_a_deterministic_rules_file(tmp_path):
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.Linear(8, 5),
    )

    class Ours(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 3)
            self.norm_a = torch.nn.BatchNorm2d(8)
            self.body = torch.nn.Conv2d(8, 8, 3)
            self.norm_b = torch.nn.BatchNorm2d(8)
            self.out = torch.nn.Linear(8, 5)

    state = theirs.state_dict()
    state["4.weight"] = state["4.weight"].T.contiguous()
    found = map_keys(state, Ours())
    pairs = {b: (a, why) for a, b, why in found.account.guessed}
    assert pairs["stem.weight"] == ("0.weight", "the only entry of this shape")
    assert pairs["body.weight"][0] == "2.weight"
    assert pairs["out.weight"] == ("4.weight", "the only entry of this shape; transpose")
    # six vectors of eight numbers under names that say nothing: shown as ambiguous, not guessed
    assert not found.account.complete
    assert {o for o, _ in found.account.ambiguous} >= {"norm_a.bias", "norm_b.bias"}
    with pytest.raises(AdviceError, match="nothing was loaded"):
        found.load()
    places = ["stem.", "norm_a.", "body.", "norm_b.", "out."]
    named = [*found.rules, *(Rule(pattern=rf"^{i}\.", name=place) for i, place in enumerate(places))]
    again = map_keys(state, Ours(), save_rules(named, tmp_path / "r.yaml"), propose=False)
    assert again.verdict == "complete"
    assert not again.account.guessed
    assert load_rules(tmp_path / "r.yaml") == again.rules


def test_separate_q_k_v_are_joined_and_equal_blocks_keep_their_order():
    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            parts = ("query", "key", "value", "dense")
            self.layer = torch.nn.ModuleList(
                torch.nn.ModuleDict({p: torch.nn.Linear(6, 6) for p in parts}) for _ in range(3)
            )

    class Ours(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(
                torch.nn.ModuleDict({"qkv": torch.nn.Linear(6, 18), "proj": torch.nn.Linear(6, 6)}) for _ in range(3)
            )

    torch.manual_seed(0)
    theirs, ours = Theirs(), Ours()
    found = map_keys(theirs.state_dict(), ours)
    assert found.verdict == "complete", found.text(expand=True)
    found.load()
    for a, b in zip(theirs.layer, ours.blocks):
        assert torch.equal(b["qkv"].weight, torch.cat([a["query"].weight, a["key"].weight, a["value"].weight]))
        assert torch.equal(b["proj"].weight, a["dense"].weight)
    again = map_keys(theirs.state_dict(), Ours(), found.rules, propose=False)
    assert all(torch.equal(again.values[k], v) for k, v in found.values.items())


def test_the_rules_can_split_tie_and_drop():
    state = {"a.qkv.weight": torch.arange(12.0).view(6, 2), "emb.weight": torch.ones(2), "old": torch.zeros(1)}
    rules = [
        Rule(pattern=r"^(.*)\.qkv\.", name=r"\1.{q,k,v}.", transform="split_qkv"),
        Rule(pattern=r"^emb\.weight$", name="{emb.weight,head.weight}", transform="tie"),
        Rule(pattern=r"^old$", name=None),
    ]
    out = apply_rules(rules, state)
    assert list(out) == ["a.q.weight", "a.k.weight", "a.v.weight", "emb.weight", "head.weight"]
    assert torch.equal(out["a.k.weight"], state["a.qkv.weight"][2:4])
    assert out["head.weight"] is out["emb.weight"]


def test_tied_weights_that_the_file_holds_once_are_complete():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.emb.weight

    found = map_keys({"emb.weight": torch.ones(5, 3)}, Tied())
    assert found.verdict == "complete"
    assert found.account.tied == [("head.weight", "emb.weight")]


def test_a_bad_rules_file_advises(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("rules:\n- {pattern: '(', name: x}\n")
    with pytest.raises(AdviceError, match="is no rules file"):
        load_rules(path)
    path.write_text("rules:\n- {pattern: a, name: b, transform: transposed}\n")
    with pytest.raises(AdviceError, match="Did you mean 'transpose'"):
        load_rules(path)
    with pytest.raises(AdviceError, match="no rules file at"):
        load_rules(tmp_path / "none.yaml")
