"""Token labeling: every patch has a soft label of its own, made by an annotator network; with mix-token.

Paper: Jiang et al., All Tokens Matter: Token Labeling for Training Better Vision Transformers, NeurIPS 2021,
arXiv 2104.10858; used by VOLO, arXiv 2106.13112
Code: zihangJiang/TokenLabeling (labels), sail-sg/volo (losses)
Licence: Apache-2.0

Works with any backbone: VOLO has classifiers for its patches, others get one on their last map for the time of
training. Label maps hold the annotator's five largest logits at every place of its last map, in half precision.
VOLO-D1 on ImageNet-1K, 300 epochs of batch 1024 on 8 GPUs: 83.8% without, 84.2% with token labels, say the authors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lynceus.core.config import to_dict
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.nouns import Task
from lynceus.core.types import Batch, Sample
from lynceus.layers.token_mix import NO_BOX, Box, draw_box, kept_share, swap_box
from lynceus.recipes.supervised import Supervised, SupervisedConfig, random_crop_box, resized_crop
from lynceus.train.fit import FitConfig

LARGEST = 2048  # whole numbers up to here are exact in half precision


# the authors' schedules; RandAugment, which they add to the views, is not here
IMAGENET = FitConfig(epochs=300, batch_size=1024, lr=1.6e-3, weight_decay=0.05, warmup=20 / 300, betas=(0.9, 0.999))
FINE_TUNE = FitConfig(  # at 384 or 448 pixels, with TokenLabelConfig(ground_truth=True)
    epochs=30, batch_size=512, lr=8e-6, final_lr=0.5, weight_decay=1e-8, warmup=5 / 30, betas=(0.9, 0.999)
)
VIEWS = SupervisedConfig(view=224, scale=(0.08, 1.0), flip=0.5, erase=0.25)


# losses -------------------------------------------------------------------------------------------
def soft_cross_entropy(logits: Float[Tensor, "*n k"], target: Float[Tensor, "*n k"]) -> Float[Tensor, ""]:
    """Mean over all rows of -sum target * log softmax(logits)."""
    return -(target * F.log_softmax(logits, -1)).sum(-1).mean()


def token_label_loss(
    logits: Float[Tensor, "b k"],
    patches: Float[Tensor, "b n k"],
    box: Box,
    target: Float[Tensor, "b k *columns"],
    *,
    dense_weight: float = 0.5,
    class_weight: float = 1.0,
    ground_truth: bool = False,
) -> dict[str, Tensor]:
    """The loss on the class token's logits and on those of all patches, already un-mixed.

    target: (b, k, 2 + n), whose columns are the true class (one-hot), the soft label of the image, and those of the
    patches row by row; or (b, k), one label for the image and every patch. box: what mix-token swapped, in patches.
    ground_truth: the image's label leans on the true class, by 0.9 where the annotator is wrong and 0.5 where it is
    right - the weight is the soft label's: 0.9 soft + 0.1 true, and 0.5 of both (fine-tuning).
    """
    n = patches.shape[1]
    if target.ndim == 2:
        whole, each = target, target[:, None].expand(-1, n, -1)
    else:
        if target.shape[2] != n + 2:
            raise AdviceError(
                f"{n} patches need targets of {n + 2} columns (true class, image, patches), not {target.shape[2]}; "
                "make them with token_targets(..., size=(rows, columns))."
            )
        true, whole, each = target[:, :, 0], target[:, :, 1], target[:, :, 2:].transpose(1, 2)
        if ground_truth:
            agree = (true.argmax(-1) == whole.argmax(-1)).unsqueeze(-1)
            share = torch.where(agree, 0.5, 0.9).to(whole.dtype)
            whole = whole * share + true * (1 - share)
    kept = kept_share(box, n)
    if kept < 1:
        whole = kept * whole + (1 - kept) * whole.flip(0)
    one, many = soft_cross_entropy(logits, whole), soft_cross_entropy(patches, each)
    return {"loss": class_weight * one + dense_weight * many, "class_loss": one, "token_loss": many}


# label maps ---------------------------------------------------------------------------------------
@torch.no_grad()
def annotate(annotator: nn.Module, image: Float[Tensor, "b c h w"], *, count: int = 5) -> Float[Tensor, "b 2 m H W"]:
    """Label maps of images: the classifier of `annotator` (a lynceus backbone in eval mode, image normalised for it) at
    every place of its last map; the `count` largest logits and their classes, as half precision."""
    net: Any = annotator
    features, maps = net.features_and_stages(image)
    b, _, h, w = maps[-1].shape
    if features.ndim == 4:
        each = features.permute(0, 2, 3, 1).reshape(b * h * w, -1, 1, 1)
        logits = net.forward_head(each)
    else:
        patches = features[:, features.shape[1] - h * w :].reshape(b * h * w, 1, -1)
        head = getattr(net, "aux_head", None)
        # a sequence of the same token: whatever the head reads, it is this one
        logits = head(patches[:, 0]) if isinstance(head, nn.Linear) else net.forward_head(patches.expand(-1, 9, -1))
    return largest(logits.view(b, h, w, -1).permute(0, 3, 1, 2), count=count)


def largest(logits: Float[Tensor, "b k h w"], *, count: int = 5) -> Float[Tensor, "b 2 m h w"]:
    """The largest `count` logits of every place ([:, 0]) and their classes ([:, 1]), as half precision."""
    if logits.shape[1] > LARGEST:
        raise AdviceError(
            f"Label maps keep classes in half precision, exact up to {LARGEST}; there are {logits.shape[1]}. "
            "Take an annotator of fewer classes."
        )
    values, classes = logits.topk(min(count, logits.shape[1]), 1)
    return torch.stack([values, classes.to(values.dtype)], 1).half()


def dense_map(labels: Float[Tensor, "b 2 m h w"], num_classes: int) -> Float[Tensor, "b k h w"]:
    """Label maps with a channel per class, float32; classes that are not among the kept are 0."""
    b, _, _, h, w = labels.shape
    out = labels.new_zeros((b, num_classes, h, w), dtype=torch.float32)
    return out.scatter_(1, labels[:, 1].long(), labels[:, 0].float())


def cropped_labels(
    maps: Float[Tensor, "b k h w"], boxes: Float[Tensor, "b 4"], size: tuple[int, int]
) -> Float[Tensor, "b k m"]:
    """Soft labels of a crop: column 0 of the whole crop, then one per patch of its grid `size`, row by row.

    boxes: (x1, y1, x2, y2) of the crop, as shares of the image in [0, 1]. RoI-align of the map, then softmax.
    """
    from torchvision.ops import roi_align

    h, w = maps.shape[-2:]
    corners = boxes.to(maps) * maps.new_tensor([w, h, w, h]) - 0.5
    corners = torch.cat([torch.arange(len(maps), device=maps.device, dtype=maps.dtype)[:, None], corners], 1)
    whole, each = (roi_align(maps, corners, side).flatten(2) for side in ((1, 1), size))
    return torch.cat([whole, each], 2).softmax(1)


def token_targets(
    labels: Float[Tensor, "b 2 m h w"],
    boxes: Float[Tensor, "b 4"],
    true: Int[Tensor, " b"],
    *,
    num_classes: int,
    size: tuple[int, int],
    mirrored: Tensor | None = None,
    smoothing: float = 0.1,
) -> Float[Tensor, "b k m2"]:
    """Targets of `token_label_loss` (b, k, 2 + rows * columns) from label maps and the crops that were taken.

    mirrored: (b,) bool, which crops were mirrored left and right. smoothing: label smoothing of every column.
    """
    soft = cropped_labels(dense_map(labels, num_classes), boxes, size)
    if mirrored is not None:
        each = soft[:, :, 1:].unflatten(2, size)
        each = torch.where(mirrored[:, None, None, None], each.flip(-1), each)
        soft = torch.cat([soft[:, :, :1], each.flatten(2)], 2)
    off = smoothing / num_classes
    one_hot = F.one_hot(true, num_classes).to(soft.dtype).unsqueeze(2) * (1 - smoothing) + off
    # the authors' on and off values, which give soft labels a sum of 1 + off
    return torch.cat([one_hot, soft * (1 - smoothing + off) + off], 2)


def save_label_maps(path: str | Path, maps: Mapping[str, Tensor]) -> Path:
    """Writes label maps (2, m, h, w) by the ids of their images as one safetensors file."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in maps.items()}, str(path))
    return path


def read_label_maps(path: str | Path) -> dict[str, Tensor]:
    """The label maps of such a file."""
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise MissingError(f"There are no label maps at {str(path)!r}; make them with label_maps and save_label_maps.")
    return load_file(str(path))


def label_maps(
    annotator: nn.Module, samples: Iterable[Sample], *, size: int | None = None, count: int = 5
) -> dict[str, Tensor]:
    """Label maps (2, m, h, w) of whole images by their ids. annotator: a lynceus backbone; size: side that images are
    brought to (None: as they are)."""
    from lynceus.tasks.classify import Classify

    net: Any = annotator
    seer = Classify(num_classes=max(net.num_classes, 2), image_size=size, resize="squash").build(net.eval())
    device = next(net.parameters()).device
    out = {}
    for sample in samples:
        out[sample.id] = annotate(net, seer.prepared(sample.image[None].to(device)), count=count)[0].cpu()
    return out


# the recipe ---------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLabelConfig:
    """dense_weight, class_weight: of the patches' and the class token's loss. ground_truth: lean on the true class, for
    fine-tuning. mix: parameter of the beta distribution of mix-token, 0 for none. smoothing: of all labels.
    """

    dense_weight: float = 0.5
    class_weight: float = 1.0
    ground_truth: bool = False
    mix: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.dense_weight < 0 or self.class_weight < 0 or self.dense_weight + self.class_weight == 0:
            raise AdviceError("dense_weight and class_weight are at least 0, and one of them above.")
        if self.mix < 0:
            raise AdviceError(f"mix cannot be below 0; it is {self.mix}. 0 turns mix-token off.")
        if not 0 <= self.smoothing < 1:
            raise AdviceError(f"smoothing is a share in [0, 1), not {self.smoothing}.")


class PatchLogits(nn.Module):
    """Logits of the image and of every patch, with mix-token, for any backbone.

    A backbone that has `token_logits` does it itself. Another gets a classifier `patch_head` on its last map, and is
    mixed in its pixels, along the borders of patches: for non-overlapping patches that is mixing their embeddings.
    """

    def __init__(self, backbone: Any, num_classes: int):
        super().__init__()
        own = hasattr(backbone, "token_logits") and getattr(backbone.config, "dense", False)
        self.patch_head = None if own else nn.Linear(backbone.stages[-1].channels, num_classes)
        self.sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def grid(self, backbone: Any, image: Tensor) -> tuple[int, int]:
        """Rows and columns of the last map of such images."""
        size = (int(image.shape[-2]), int(image.shape[-1]))
        if size not in self.sizes:
            training = backbone.training
            with torch.no_grad():
                last = backbone.eval().forward_stages(image[:1])[-1]
            backbone.train(training)
            self.sizes[size] = (int(last.shape[-2]), int(last.shape[-1]))
        return self.sizes[size]

    def forward(self, backbone: Any, image: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """image: normalised (b, c, h, w). Logits (b, k) and (b, n, k), the latter un-mixed."""
        if self.patch_head is None:
            logits, patches = backbone.token_logits(image, box)
            return logits, patches
        stride = backbone.stages[-1].stride
        mixed = swap_box(image.permute(0, 2, 3, 1), box, scale=stride).permute(0, 3, 1, 2)
        features, maps = backbone.features_and_stages(mixed)
        last = backbone.norm_level(maps[-1], len(maps) - 1).permute(0, 2, 3, 1)
        return backbone.forward_head(features), swap_box(self.patch_head(last), box).flatten(1, 2)


class TokenLabel(Supervised):
    """Learns to classify from a label for every patch.

    task: Classify of one label. backbone: a lynceus backbone; VOLO with dense=True has the classifier of patches built
    in. labels: label maps by sample id (`read_label_maps`). annotator: a lynceus backbone of the same classes that
    labels what the network sees, in place of stored maps. With neither, every patch has the image's label.
    views: crops and flips, as in Supervised; its mixing must be off.
    """

    def __init__(
        self,
        task: Task,
        backbone: nn.Module,
        config: TokenLabelConfig | None = None,
        *,
        labels: Mapping[str, Tensor] | None = None,
        annotator: nn.Module | None = None,
        views: SupervisedConfig | None = None,
    ):
        views = views or SupervisedConfig()
        if views.mixup or views.cutmix:
            raise AdviceError("Token labels mix tokens themselves (TokenLabelConfig.mix): take mixup=0 and cutmix=0.")
        if labels is not None and (annotator is not None or views.crop or (views.flip and not views.view)):
            raise AdviceError(
                "Stored label maps follow the crops of SupervisedConfig(view=...) only: leave out the annotator, "
                "crop=0, and flip with a view."
            )
        super().__init__(task, backbone, views)
        self.method = config or TokenLabelConfig()
        self.num_classes = len(task.classes)  # type: ignore[attr-defined]
        self.patches = PatchLogits(self.model.backbone, self.num_classes)
        self.labels = labels
        # in a list: neither trained, nor saved, nor averaged with what is learnt
        self._annotator = [] if annotator is None else [annotator.eval().requires_grad_(False)]

    def transform(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        """A random resized crop and flip that remembers where it was taken, for the label map."""
        view = self.config.view
        if generator is None or not view:
            return self._labelled(sample, (0.0, 0.0, 1.0, 1.0), False)
        h, w = int(sample.image.shape[-2]), int(sample.image.shape[-1])
        top, left, high, wide = box = random_crop_box(h, w, self.config.scale, generator)
        image = resized_crop(sample.image, box, view)
        mirrored = bool(self.config.flip and float(torch.rand((), generator=generator)) < self.config.flip)
        image = image.flip(-1) if mirrored else image
        cut = replace_image(sample, image)
        return self._labelled(cut, (left / w, top / h, (left + wide) / w, (top + high) / h), mirrored)

    def _labelled(self, sample: Sample, crop: tuple[float, float, float, float], mirrored: bool) -> Sample:
        if self.labels is None:
            return sample
        if sample.id not in self.labels:
            raise AdviceError(
                f"There is no label map for {sample.id!r} among {len(self.labels)}; make them with "
                "label_maps(annotator, data), which keeps them by the ids of the data."
            )
        extra = {**sample.extra, "label_map": self.labels[sample.id], "crop": torch.tensor(crop), "mirrored": mirrored}
        return replace(sample, extra=extra)

    @property
    def views(self) -> bool:
        return self.labels is not None or self.config.view > 0

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Supervised's, and the box of mix-token, remembered with every sample."""
        batch = super().augment(batch, generator)
        box = NO_BOX
        if self.method.mix:
            grid = self.patches.grid(self.model.backbone, self.model.prepared(batch.image[:1]))
            box = draw_box(*grid, generator, beta=self.method.mix)
        batch.extra = [{**e, "box": box} for e in (batch.extra or [{}] * len(batch))]
        return batch

    def targets(self, batch: Batch, image: Tensor) -> Tensor:
        """(b, k, 2 + n) from label maps or the annotator, else (b, k)."""
        if batch.label is None or batch.label.ndim != 1 or bool((batch.label < 0).any()):
            raise AdviceError("Token labels need one label for every image, as a class number.")
        k, smoothing = self.num_classes, self.method.smoothing
        if self.labels is None and not self._annotator:
            one_hot = F.one_hot(batch.label, k).float()
            return one_hot * (1 - smoothing) + smoothing / k
        size = self.patches.grid(self.model.backbone, image)
        if self._annotator:
            maps = annotate(self._annotator[0], image)
            boxes = image.new_tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(maps), -1)
            return token_targets(maps, boxes, batch.label, num_classes=k, size=size, smoothing=smoothing)
        found = [e["label_map"] for e in batch.extra]
        if len({m.shape for m in found}) > 1:
            raise AdviceError(
                "Label maps of several sizes make no batch; label_maps(annotator, data, size=224) makes them alike."
            )
        maps = torch.stack(found).to(image.device)
        boxes = torch.stack([e["crop"] for e in batch.extra]).to(image.device)
        mirrored = torch.tensor([e["mirrored"] for e in batch.extra], device=image.device)
        return token_targets(maps, boxes, batch.label, num_classes=k, size=size, mirrored=mirrored, smoothing=smoothing)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image = self.model.prepared(batch.image)
        target = self.targets(batch, image)
        box = batch.extra[0].get("box", NO_BOX) if batch.extra else NO_BOX
        logits, patches = self.patches(self.model.backbone, image, box)
        m = self.method
        losses = token_label_loss(
            logits.float(), patches.float(), box, target,
            dense_weight=m.dense_weight, class_weight=m.class_weight, ground_truth=m.ground_truth,
        )  # fmt: skip
        right = (logits.argmax(-1) == batch.label).float().mean()
        return {**losses, "accuracy": right.detach()}

    def param_groups(self) -> list[dict[str, Any]]:
        groups = super().param_groups()
        if self.patches.patch_head is not None:
            head = self.patches.patch_head
            groups += [{"params": [head.weight]}, {"params": [head.bias], "weight_decay": 0.0}]
        return groups

    def describe(self) -> dict[str, Any]:
        labels = "maps" if self.labels is not None else "annotator" if self._annotator else "of the image"
        return {**super().describe(), "recipe": "token-label", "token_label": to_dict(self.method), "labels": labels}


def replace_image(sample: Sample, image: Tensor) -> Sample:
    """The sample with another image; boxes and masks, which belong to the old one, are left out."""
    return Sample(image=image, label=sample.label, id=sample.id, path=sample.path, extra=sample.extra)
