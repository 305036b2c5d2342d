"""Backbones as folders and hub repositories: written, read back, never executed, no network unless told."""

import json
import os
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from lynceus.backbones import Backbone, create_model
from lynceus.backbones._hub import load_pretrained, local_folder, push_folder, save_pretrained
from lynceus.backbones.pyramid import Pyramid
from lynceus.core.errors import AdviceError, MissingError, OptionError

NANO = ["convnext_nano", "resnet_nano", "swin_nano", "vit_nano"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return create_model("resnet_nano", num_classes=7, in_chans=1).save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", [*NANO, "timm:resnet10t"])
def test_a_folder_gives_back_the_same_model(name, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, in_chans=1)
    model.mean, model.std = (0.25,), (0.5,)
    model.save_pretrained(tmp_path / "m", licence="apache-2.0", text="Trained on nothing.")
    back = Backbone.from_pretrained(tmp_path / "m")
    image = torch.rand(2, 1, 48, 40)
    with torch.no_grad():
        assert torch.equal(back(image), model(image))
    assert (back.name, back.mean, back.std) == (name, (0.25,), (0.5,))
    assert back.config == model.config
    assert not back.training
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lynceus")
    assert "license: apache-2.0" in card
    assert "Trained on nothing." in card
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_changed_options_and_dtype_travel(tmp_path):
    model = create_model("vit_nano", drop_path_rate=0.1, depth=2, levels=(0, 1)).to(torch.bfloat16)
    back = load_pretrained(save_pretrained(model, tmp_path / "m"))
    assert back.config == model.config
    assert next(back.parameters()).dtype == torch.bfloat16


def test_the_weights_are_safetensors_that_others_read(folder):
    state = load_file(folder / "model.safetensors")
    assert set(state) == set(create_model("resnet_nano", num_classes=7, in_chans=1).state_dict())


def test_training_s_loader_reads_the_same_file(folder):
    from lynceus.train.checkpoint import load_model

    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model(folder)(image), load_pretrained(folder)(image))


def test_what_is_not_here_is_told_and_not_fetched(tmp_path):
    with pytest.raises(MissingError, match="no folder"):
        load_pretrained(tmp_path / "nothing")
    with pytest.raises(MissingError, match="download=True"):
        load_pretrained("someone/some-model")
    with pytest.raises(MissingError, match=r"no config\.json"):
        load_pretrained(tmp_path)


def test_a_repository_in_the_local_cache_needs_no_network(folder, tmp_path):
    repo = tmp_path / "cache" / "models--someone--some-model"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    folder.rename(snapshot)
    assert load_pretrained("someone/some-model").name == "resnet_nano"


def test_a_broken_connection_is_an_advising_error(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(name, *, local_files_only=False, **more):
        raise LocalEntryNotFoundError("no way to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(MissingError, match="no way to the hub"):
        local_folder("someone/some-model", download=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(library_name="timm"), "not written by lynceus"),
        (lambda c: c.update(format=99), "newer"),
        (lambda c: c.pop("format"), "broken"),
        (lambda c: c["backbone"].update(name="resnet_nanno"), "resnet_nano"),
        (lambda c: c["backbone"]["config"].update(dimz=3), "dimz"),
        (lambda c: c.update(task="classify"), "load_model"),
        (lambda c: c["backbone"]["config"].update(num_classes=9), "does not fit"),
    ],
)
def test_a_strange_configuration_advises(folder, change, match):
    path = folder / "config.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    with pytest.raises(AdviceError, match=match):
        load_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_a_broken_configuration_advises(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(AdviceError, match="broken"):
        load_pretrained(folder)


def test_broken_weights_advise(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdviceError, match="not a whole"):
        load_pretrained(folder)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(AdviceError, match="does not fit"):
        load_pretrained(folder)
    path.unlink()
    with pytest.raises(MissingError, match="not finished"):
        load_pretrained(folder)


def test_a_pickle_is_never_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MissingError):
        load_pretrained(folder)


def test_a_failed_write_leaves_the_old_model(folder, monkeypatch):
    before = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        create_model("resnet_nano", num_classes=3).save_pretrained(folder)
    assert ((folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()) == before
    assert not [p for p in folder.iterdir() if p.name.endswith(".part")]


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    with pytest.raises(AdviceError, match="save its weights alone"):
        Pyramid(create_model("vit_nano")).save_pretrained(tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdviceError, match="cannot be written"):
        create_model("resnet_nano").save_pretrained(tmp_path / "file")
    assert not (tmp_path / "m").exists()


class Api:
    calls: list = []

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))
        return f"https://hub.example/{name}"

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        from pathlib import Path

        self.calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))


def test_push(monkeypatch, folder):
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    Api.calls.clear()
    address = create_model("resnet_nano").push_to_hub("me/mine", licence="mit", private=True)
    assert address == "https://hub.example/me/mine"
    assert Api.calls == [
        ("create", "me/mine", {"private": True, "exist_ok": True}),
        ("upload", "me/mine", ["README.md", "config.json", "model.safetensors"]),
    ]
    assert push_folder(folder, "me/other") == "https://hub.example/me/other"
    for wrong in ("mine", "me/my model", "../x", "a/b/c"):
        with pytest.raises(AdviceError, match="OWNER/NAME"):
            push_folder(folder, wrong)


def test_an_unknown_option_is_an_option_error(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"drop_rate"', '"dorp_rate"'))
    with pytest.raises(OptionError, match="drop_rate"):
        load_pretrained(folder)
