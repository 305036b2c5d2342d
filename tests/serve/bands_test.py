"""Large pictures are resized in bands: the very numbers of the ordinary way."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.serve import preprocess
from lynceus.tasks.classify import resized


@given(
    h=st.integers(1, 300),
    w=st.integers(1, 300),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    policy=st.sampled_from(["crop", "squash"]),
    last=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_bands_change_no_bit(h, w, size, policy, last):
    image = torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(h * w))
    image = image.permute(2, 0, 1) if last else image.permute(2, 0, 1).contiguous()
    found = preprocess.resized_in_bands(image, size, policy)
    assert torch.equal(found, resized(image, size, policy))


def test_prepare_takes_them_for_large_pictures(monkeypatch):
    asked = []
    monkeypatch.setattr(preprocess, "resized_in_bands", lambda *a: asked.append(a))
    large = torch.zeros(3, 1200, 1000, dtype=torch.uint8)
    preprocess.prepare(large, (8, 8), "crop", exact=True)
    preprocess.prepare(large[:, :100], (8, 8), "crop", exact=True)
    preprocess.prepare(large, (8, 8), "crop", exact=False)
    assert len(asked) == 1
