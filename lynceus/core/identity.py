"""Names for models and images by what they are, so that kept results are found again and never mixed up."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lynceus.core.subject import Subject


def model_key(subject: Subject) -> str:
    """A hash of weights, structure, normalisation and input size; equal models have equal keys on every machine.

    A plain function has no weights to hash: its key holds only while the object lives, and begins with "object-"."""
    if not isinstance(subject.model, nn.Module):
        return f"object-{id(subject.model):x}-{id(subject._features):x}-{subject.size}"
    digest = hashlib.blake2b(digest_size=12)
    modules = [subject.model] + ([subject.normalise] if subject.normalise is not None else [])
    for module in modules:
        digest.update(f"{type(module).__module__}.{module!r}".encode())
        tensors = [*module.named_parameters(), *module.named_buffers()]  # buffers that are not in the state count too
        for name, tensor in sorted(tensors, key=lambda item: item[0]):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    if subject._features is not None:
        digest.update(f"features-{id(subject._features):x}".encode())
    digest.update(f"{subject.size} {getattr(subject.model, 'config', None)}".encode())
    return ("object-" if subject._features is not None else "") + digest.hexdigest()


def image_key(image: Tensor) -> bytes:
    """16 bytes that name an image: its pixels, shape and dtype."""
    value = image.detach().cpu().contiguous()
    digest = hashlib.blake2b(value.numpy().data, digest_size=16)
    digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
    return digest.digest()
