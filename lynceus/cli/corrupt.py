"""`lynceus data corrupt SOURCE --out FOLDER`: a corrupted copy of a data set, like CIFAR-10-C or ImageNet-C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lynceus.cli._run import Code, call, indent, run_folder
from lynceus.cli._schema import parse
from lynceus.core.errors import AdviceError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every picture under noise, blur, weather and digital damage, as .npy files or folders of pictures."""

    source: Positional[str] = "digits"  # digits, a folder of class folders, a .parquet, .csv or COCO .json file ...
    out: Path = Path("runs/corrupted")  # a new folder; one begun with the same options is gone on with
    corruptions: tuple[str, ...] = ("benchmark",)  # names, groups (noise, blur ...), benchmark (15) or all (19)
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)  # 1 to 5
    scale: Literal["auto", "imagenet", "cifar"] = "auto"  # constants; auto goes by the size of the pictures
    layout: Literal["array", "folder"] = "array"  # NAME.npy as CIFAR-10-C has, or NAME/SEVERITY/CLASS/ as ImageNet-C
    side: int | None = None  # bring pictures to this short side and cut them square first
    quality: int | None = None  # folders: JPEG of this quality instead of PNG (published: 85)
    split: str | None = None  # train, val or test, where the source has them
    limit: int | None = None  # this many pictures, spread evenly
    seed: int = 0  # of every picture's own generator


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus data corrupt")
    if options.side is not None and options.side < 1:
        raise AdviceError(f"--side is 1 pixel or more, not {options.side}; without it nothing is resized.")
    import lynceus.data
    from lynceus.data.corrupt import corrupt_dataset

    dataset = lynceus.data.open(options.source, split=options.split, limit=options.limit)
    run_folder(options.out, "data", "corrupt", resume=True)  # said before the work when it cannot be written
    folder = corrupt_dataset(
        dataset,
        options.out,
        corruptions=options.corruptions,
        severities=options.severities,
        scale=options.scale,
        layout=options.layout,
        side=options.side,
        quality=options.quality,
        seed=options.seed,
    )
    opened = call("lynceus.data.open", options.source, split=options.split, limit=options.limit)
    twin = call(
        "corrupt_dataset",
        Code(opened),
        str(options.out),
        corruptions=options.corruptions,
        severities=options.severities,
        scale=options.scale,
        layout=options.layout,
        side=options.side,
        quality=options.quality,
        seed=options.seed,
    )
    print(f"{folder}: {len(dataset)} pictures, {len(options.severities)} severities")
    lines = f"import lynceus.data\nfrom lynceus.data.corrupt import corrupt_dataset\n\nprint({twin})"
    print(f"\nthe same in Python:\n\n{indent(lines)}")
    return 0
