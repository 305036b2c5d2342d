"""One model through a chain of rewrites: after every link it trains, exports, saves, loads and is served."""

import pytest
import torch
from torch.nn import functional as F

from lynceus import create_model
from lynceus.core.nouns import chain
from lynceus.rewrite.adapters import Adapt, Fuse, PruneChannels
from lynceus.rewrite.block_prune import BlockPrune
from lynceus.rewrite.deploy import Deploy, Deployed
from lynceus.rewrite.expedite import Expedite
from lynceus.rewrite.export import export
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model

X = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4

ADAPT = (Adapt(rank=2, full="head"),)
PRUNED = (*ADAPT, PruneChannels(ratio=0.25))
FUSED = (*PRUNED, Fuse())
SPARSE = (*FUSED, BlockPrune(block=8, flops=0.6))
FAST = (*SPARSE, Deploy(ways=("eager",), seconds=0.05, threads=(1,)))
OTHER = (
    BlockPrune(block=16, flops=0.7),
    Expedite(alpha=1, clusters=(4, 4)),
    Deploy(ways=("eager",), seconds=0.05, threads=(1,)),
)
CHAINS = {
    "adapt": ADAPT,
    "adapt, prune": PRUNED,
    "adapt, prune, fuse": FUSED,
    "adapt, prune, fuse, blocks": SPARSE,
    "adapt, prune, fuse, blocks, deploy": FAST,
    "blocks, clusters, deploy": OTHER,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Classify(num_classes=4).build(create_model("vit_nano")).eval()


@pytest.fixture(scope="module", params=CHAINS)
def changed(request, model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = chain(*CHAINS[request.param])(model, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return made


def test_it_answers(changed):
    with torch.no_grad():
        assert changed(X).shape == (8, 4)
        assert changed(X).isfinite().all()


def test_it_trains(changed):
    if isinstance(changed, Deployed):
        changed.requires_grad_(True)  # what is deployed is frozen until somebody wants it otherwise
    trainable = [p for p in changed.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trainable]
    optimizer = torch.optim.SGD(trainable, 0.01)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(changed(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        after = F.cross_entropy(changed(X), Y).item()  # without gradients: what was packed or fused must be made anew
        for p, old in zip(trainable, kept):
            p.copy_(old)
    assert losses[-1] < losses[0]
    assert after < losses[0]


def test_it_is_saved_and_loaded(changed, tmp_path):
    save_model(changed, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(X), changed(X))


def test_it_is_exported(changed, tmp_path):
    report = export(changed, X[:2], tmp_path, formats=("torch",), dynamic=("batch",), quiet=True)
    assert (tmp_path / "model.pt2").exists()
    assert report.rows[0]["difference"] < 1e-5


def test_it_is_served(changed):
    from lynceus.serve import serve
    from lynceus.serve.client import Client

    with serve(changed, port=0) as server, Client(server.url) as client:
        found = [client.predict(picture)["label"] for picture in X[:3]]
    with torch.no_grad():
        assert found == changed(X[:3]).argmax(-1).tolist()
