"""Predictors on disk: what comes back, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lynceus import create_model
from lynceus.core.errors import AdviceError, MissingError
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, read_state, save_model, write_state

NANOS = ["vit_nano", "resnet_nano", "convnext_nano", "swin_nano"]


@pytest.fixture(scope="module")
def model():
    return (
        Classify(classes=["cat", "dog", "emu"], image_size=24, label_smoothing=0.1)
        .build(create_model("vit_nano", depth=2))
        .eval()
    )


def images(seed=0):
    return torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NANOS)
def test_a_predictor_comes_back_as_it_was(name, tmp_path):
    made = Classify(classes=["a", "b", "c"], image_size=(32, 40)).build(create_model(name)).eval()
    save_model(made, tmp_path)
    back = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(made(images()), back(images()))
    assert back.classes == ["a", "b", "c"]
    assert back.task == made.task
    assert back.backbone.config == made.backbone.config
    assert back.backbone.name == name
    assert not back.training


def test_changed_fields_and_preprocessing_travel_along(model, tmp_path):
    model.backbone.mean, model.backbone.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    rebuilt = model.task.build(model.backbone).eval()
    save_model(rebuilt, tmp_path / "m.safetensors")
    back = load_model(tmp_path / "m.safetensors")
    assert back.backbone.config.depth == 2
    assert back.normalise.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    with torch.no_grad():
        assert torch.equal(back(images()), rebuilt(images()))


def test_a_bare_backbone_comes_back(tmp_path):
    made = create_model("convnext_nano", num_classes=0)
    save_model(made, tmp_path)
    with torch.no_grad():
        assert torch.equal(made(images()), load_model(tmp_path)(images()))


def test_model_json_says_what_it_is(model, tmp_path):
    save_model(model, tmp_path)
    said = json.loads((tmp_path / "model.json").read_text())
    assert said["task"] == "classify"
    assert said["options"]["classes"] == ["cat", "dog", "emu"]
    assert said["backbone"]["name"] == "vit_nano"
    assert said["lynceus"]


def test_another_task_or_class_list_is_refused(model, tmp_path):
    save_model(model, tmp_path)
    assert load_model(tmp_path, task="classify", classes=["cat", "dog", "emu"])
    with pytest.raises(AdviceError, match="classify, not for detect"):
        load_model(tmp_path, task="detect")
    with pytest.raises(AdviceError, match="another order"):
        load_model(tmp_path, classes=["dog", "cat", "emu"])
    with pytest.raises(AdviceError, match=r"'cats'.*did you mean 'cat'"):
        load_model(tmp_path, classes=["cats", "dog", "emu"])


def test_what_is_not_there_is_said_with_the_path_tried(tmp_path):
    with pytest.raises(MissingError, match=str(tmp_path / "no")):
        load_model(tmp_path / "no")
    with pytest.raises(MissingError, match="looked for"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.pt").touch()
    with pytest.raises(MissingError, match="unfinished"):
        load_model(tmp_path)


def test_files_of_other_kinds_are_refused(model, tmp_path):
    (tmp_path / "a.pth").touch()
    with pytest.raises(AdviceError, match="create_model"):
        load_model(tmp_path / "a.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(AdviceError, match="without a description"):
        load_model(tmp_path / "bare.safetensors")
    whole = save_model(model, tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdviceError, match="truncated"):
        load_model(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused_by_name(model, tmp_path, change):
    file = save_model(model, tmp_path)
    state = load_file(file)
    if change == "missing":
        state.pop("backbone.head.weight")
    elif change == "extra":
        state["backbone.more"] = torch.zeros(1)
    else:
        state["backbone.head.weight"] = torch.zeros(5, 96)
    save_file(state, file)  # without the header: model.json beside it is read
    with pytest.raises(AdviceError, match="backbone.more" if change == "extra" else "backbone.head.weight"):
        load_model(tmp_path)


def test_a_backbone_of_ones_own_is_given_to_load(worker, tmp_path):
    toy = worker.Toy(worker.ToyConfig(num_classes=3))
    made = Classify(num_classes=3).build(toy).eval()
    save_model(made, tmp_path)
    with pytest.raises(AdviceError, match="backbone="):
        load_model(tmp_path)
    back = load_model(tmp_path, backbone=worker.Toy(worker.ToyConfig(num_classes=3)))
    with torch.no_grad():
        assert torch.equal(made(images()), back(images()))


def test_a_module_without_description_cannot_be_saved(tmp_path):
    with pytest.raises(AdviceError, match="state_dict"):
        save_model(torch.nn.Linear(2, 2), tmp_path)


def test_states_are_read_without_unpickling(tmp_path):
    write_state(tmp_path / "s.pt", {"a": torch.arange(3), "b": [1, "x"]})
    assert read_state(tmp_path / "s.pt")["b"] == [1, "x"]

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(AdviceError, match="no checkpoint"):
        read_state(tmp_path / "evil.pt")


def test_writing_leaves_the_old_file_when_it_fails(tmp_path):
    from lynceus.core.files import write_atomic

    write_atomic(tmp_path / "f", "old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomic(tmp_path / "f", fail)
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
