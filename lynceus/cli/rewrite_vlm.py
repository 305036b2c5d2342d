"""`lynceus rewrite vlm_tokens MODEL`: a vision-language model of transformers that drops image tokens on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import merged, parse, with_options
from lynceus.core.errors import AdviceError, MissingError

if TYPE_CHECKING:
    from torch import Tensor, nn

TARGET = "lynceus.rewrite.vlm_tokens:VlmTokens"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures prefill time and FLOPs, draws the kept tokens, and saves the options beside the model."""

    model: Positional[Path]  # a local folder of transformers with a LLaVA-like model (config.json, safetensors)
    picture: Path | None = None  # an image file for the measured prompt; default: random pixels
    prompt: str | None = None  # the question asked of it, where the folder has a processor; default: random words
    words: int = 32  # random words of the prompt without one
    batch: int = 1  # prompts read at once
    repeats: int = 5  # timed prefills of both models, in turns
    seed: int = 0  # of random pixels and words
    out: Path | None = None  # folder; default: runs/rewrite/vlm_tokens


def main(argv: Sequence[str]) -> int:
    options = parse(
        with_options(Options, rewrite=TARGET),
        argv,
        prog="lynceus rewrite vlm_tokens",
        description="Fewer image tokens inside a vision-language model (FEATHER, FastV): no training, same weights.",
    )
    if min(options.batch, options.repeats, options.words) < 1:
        raise AdviceError("--batch, --repeats and --words are at least 1.")
    rewrite = merged(options, "rewrite")
    from dataclasses import fields

    from lynceus.rewrite.vlm_tokens import prune, watch
    from lynceus.rewrite.vlm_tokens.measure import measure, picture
    from lynceus.rewrite.vlm_tokens.saved import open_vlm, save

    model = open_vlm(options.model)
    chosen = {f.name: getattr(rewrite, f.name) for f in fields(rewrite) if f.name != "criterion"}
    pruned = prune(model, **chosen)
    inputs, image = _prompt(model, options)
    out = run_folder(options.out, "rewrite", "vlm_tokens")
    report = measure(model, pruned, inputs, repeats=options.repeats, seed=options.seed)
    with watch() as seen:
        pruned(**inputs)
    count = int(seen[0].image[0].sum())
    side = round(count**0.5)
    if side * side == count:
        report.figures |= picture(image, seen[0], (side, side))
    else:
        report.notes.append(f"{count} image tokens are no square, so they are not drawn.")
    save(pruned, out, source=options.model)
    given = {k: v for k, v in chosen.items() if v is not None and v != 0.0}
    text = ", ".join(f"{k}={v!r}" for k, v in given.items())
    twin = (
        "from lynceus.rewrite.vlm_tokens import prune\nfrom lynceus.rewrite.vlm_tokens.measure import measure\n"
        "from lynceus.rewrite.vlm_tokens.saved import open_vlm, save\n\n"
        f"model = open_vlm({str(options.model)!r})\npruned = prune(model, {text})\n"
        f"save(pruned, {str(out)!r}, source={str(options.model)!r})\n"
        f"# inputs: your own, as the model's processor gives them\n"
        f"print(measure(model, pruned, inputs, repeats={options.repeats}).table())"
    )
    show(report, out=out, twin=twin)
    print(f"\nthe options: {out}/vlm_tokens.json  (lynceus.rewrite.vlm_tokens.saved.load({str(out)!r}))")
    return 0


def _prompt(model: nn.Module, options: Any) -> tuple[dict[str, Any], Tensor | None]:
    """What the model's forward takes, and the image to draw on, (3, h, w) in [0, 1]."""
    import torch

    if options.prompt is not None:
        return _processed(model, options)
    from lynceus.core.rng import generator
    from lynceus.rewrite.vlm_tokens import image_token

    config: Any = model.config
    size = getattr(config.vision_config, "image_size", None)
    if size is None or str(config.model_type) not in ("llava", "vipllava"):
        raise AdviceError(
            f"Random pixels can be made for plain LLaVA models only, not for {type(model).__name__}; give --prompt "
            "TEXT and --picture FILE with a folder that holds the model's processor too."
        )
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    draw = generator(options.seed, "prompt")
    if options.picture is not None:
        from PIL import Image

        from lynceus.rewrite.vlm_tokens.measure import pixels_of

        image = pixels_of(Image.open(_there(options.picture)), (height, width))
    else:
        image = torch.rand(3, height, width, generator=draw)
    pixels = image[None].expand(options.batch, -1, -1, -1)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels).pooler_output  # type: ignore[operator]
    count, token = len(features[0]), image_token(config) or 0
    words = torch.randint(3, config.text_config.vocab_size, (options.batch, options.words), generator=draw)
    words = words - (words == token).long()
    places = torch.full((options.batch, count), token)
    return {"input_ids": torch.cat([words[:, :1], places, words[:, 1:]], 1), "pixel_values": pixels}, image


def _processed(model: nn.Module, options: Any) -> tuple[dict[str, Any], Tensor | None]:
    if options.picture is None:
        raise AdviceError("--prompt asks about a picture: give --picture FILE too.")
    from PIL import Image

    from lynceus.rewrite.vlm_tokens.measure import pixels_of
    from lynceus.rewrite.vlm_tokens.saved import open_processor

    processor = open_processor(options.model)
    image = Image.open(_there(options.picture)).convert("RGB")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options.prompt}]}]
    if getattr(processor, "chat_template", None):
        text = processor.apply_chat_template(said, add_generation_prompt=True)
    else:
        text = f"{getattr(processor, 'image_token', '<image>')}\n{options.prompt}"
    made = processor(images=[image] * options.batch, text=[text] * options.batch, return_tensors="pt")
    return dict(made), pixels_of(image, None)


def _there(file: Path) -> Path:
    if not file.is_file():
        raise MissingError(f"There is no picture {file} (looked at {file.resolve()}).")
    return file
