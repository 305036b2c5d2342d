"""`python -m bench [NAME ...]`: the measurements, one after the other; without names, those that need no images."""

import subprocess
import sys
from pathlib import Path

ALONE = (
    "backbones",
    "scan",
    "deploy",
    "split",
    "swin",
    "swin_v2",
    "cvt",
    "halonet",
    "soft",
    "data",
    "train",
    "reengineer",
    "trust_verify",
    "block_prune",
    "serve",
    "policy",
    "vlm_tokens",
    "streaming",
    "expedite",
    "prune_tokens",
)  # minutes each
IMAGES = (
    "adapters",
    "crop_selection",
    "gauntlet",
    "off_the_shelf",
    "scaling",
    "convnext_ladder",
    "small_data",
    "trust_attacks",
    "trust_corrupt",
    "trust_edits",
    "trust_fooling",
    "trust_game",
    "trust_level_sets",
    "trust_robustify",
)  # $LYNCEUS_TEST_DATA; up to an hour each


def main() -> int:
    names = sys.argv[1:] or list(ALONE)
    wrong = [n for n in names if n not in ALONE + IMAGES]
    if wrong:
        print(f"There is no bench {wrong[0]!r}; there are: {', '.join(ALONE + IMAGES)}.", file=sys.stderr)
        return 2
    for name in names:
        print(
            f"\n== {name}: {(Path(__file__).parent / f'{name}.py').read_text().splitlines()[0].strip(chr(34))}\n",
            flush=True,
        )
        subprocess.run([sys.executable, "-m", f"bench.{name}"], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
