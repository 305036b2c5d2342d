"""What every task owes: a predictor on any backbone that owns its pixels, a falling loss, and a metric that is 1 when
everything is right."""

import pytest
import torch

from lynceus import create_model
from lynceus.core.nouns import Task
from lynceus.core.types import Batch
from lynceus.tasks import TASKS, task_class
from lynceus.tasks.classify import Classify

MEMBERS = {
    "classify": (Classify(num_classes=3), torch.tensor([0, 1, 2, 1])),
    "classify, smoothed": (Classify(num_classes=3, label_smoothing=0.1), torch.tensor([0, 1, 2, 1])),
    "classify, several labels": (
        Classify(num_classes=3, multi_label=True),
        torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1]]),
    ),
}
BACKBONES = ["vit_nano", "resnet_nano", "convnext_nano", "swin_nano"]


def batch(label):
    image = torch.rand(len(label), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(image=image, sizes=[(32, 32)] * len(label), label=label)


def test_every_task_of_the_table_is_here():
    assert {type(task) for task, _ in MEMBERS.values()} == {task_class(name) for name in TASKS}


@pytest.mark.parametrize("name", MEMBERS)
def test_it_is_a_task(name):
    task, _ = MEMBERS[name]
    assert isinstance(task, Task)
    assert task.name in TASKS


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", MEMBERS)
def test_the_loss_falls_on_one_batch(name, backbone):
    task, label = MEMBERS[name]
    torch.manual_seed(0)
    model = task.build(create_model(backbone)).train()
    assert model.owns_pixels
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = task.loss(model(batch(label).image), batch(label))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", MEMBERS)
def test_a_perfect_prediction_scores_one(name):
    task, label = MEMBERS[name]
    target = label if label.ndim == 2 else torch.nn.functional.one_hot(label, 3)
    raw = (target.float() - 0.5) * 60
    metric = task.metric()
    found = task.decode(raw, batch(label).sizes)
    assert len(found) == len(label)
    metric.update(found, batch(label))
    numbers = metric.compute()
    assert numbers["mAP" if label.ndim == 2 else "accuracy"] == 1
