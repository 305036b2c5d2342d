"""The servers that `bench.serve` measures beside ours, each with the same model and the same answer.

python -m bench._serve_servers naive --port 8100

naive: FastAPI, one process, PIL, one request at a time, as a first version is written. ray: Ray Serve's own way with
the settings given; `bench._serve_litserve` is LitServe's. --decode pil resizes as naive does; turbo takes our decoder
(libjpeg-turbo, scaled while decoding) and our resizing, which is what their users could write, so that servers are
compared and not decoders.
"""

from __future__ import annotations

import argparse
import io
import os
from typing import Any

import torch

SIDE = 224


def model() -> Any:
    """MobileNetV3-small as a classifier of pixels in [0, 1]; random weights, the same in every process."""
    import timm

    from lynceus.core.rng import borrowed
    from lynceus.tasks.classify import Classify

    with borrowed(0, "weights"):
        backbone = timm.create_model("mobilenetv3_small_100")
    return Classify(num_classes=1000, image_size=SIDE, resize="crop").build(backbone).eval()


def __getattr__(name: str) -> Any:
    if name == "MOBILENET":  # `python:bench._serve_servers:MOBILENET`
        return model()
    raise AttributeError(name)


def from_pil(body: bytes) -> torch.Tensor:
    """Decode, resize, crop with PIL as tutorials do: (3, 224, 224) in [0, 1]."""
    import numpy as np
    from PIL import Image

    image = Image.open(io.BytesIO(body)).convert("RGB")
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, round(s * scale)) for s in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.crop((left, top, left + SIDE, top + SIDE))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def from_turbo(body: bytes) -> torch.Tensor:
    """Our own decoding and resizing at its fastest setting."""
    from lynceus.serve.decode import decode
    from lynceus.serve.preprocess import prepare

    return prepare(decode(body, least=(SIDE, SIDE)), (SIDE, SIDE), "crop", exact=False).float() / 255


DECODERS = {"pil": from_pil, "turbo": from_turbo}


def answers(logits: torch.Tensor) -> list[dict[str, Any]]:
    best = logits.softmax(-1).max(-1)
    return [{"label": i, "confidence": s} for i, s in zip(best.indices.tolist(), best.values.tolist())]


def naive(args: argparse.Namespace) -> None:
    import uvicorn
    from fastapi import FastAPI, Request

    torch.set_num_threads(args.threads)
    net, decode = model(), DECODERS[args.decode]
    app = FastAPI()

    async def predict(request):  # type: ignore[no-untyped-def]
        image = decode(await request.body())
        with torch.inference_mode():
            return answers(net(image[None]))[0]

    predict.__annotations__["request"] = Request
    app.post("/predict")(predict)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


def ray(args: argparse.Namespace) -> None:
    import signal

    import ray as core
    from ray import serve

    decode = DECODERS[args.decode]
    core.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    @serve.deployment(
        num_replicas=args.workers,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0.5},
        logging_config={"enable_access_log": False},
    )
    class API:
        def __init__(self) -> None:
            from concurrent.futures import ThreadPoolExecutor

            torch.set_num_threads(args.threads)
            self.net, self.pool = model(), ThreadPoolExecutor(args.pool)

        async def __call__(self, request: Any) -> dict[str, Any]:
            body = await request.body()
            if args.batch == 1:
                with torch.inference_mode():
                    return answers(self.net(decode(body)[None]))[0]
            import asyncio

            image = await asyncio.get_running_loop().run_in_executor(self.pool, decode, body)
            return await self.together(image)

        @serve.batch(max_batch_size=args.batch, batch_wait_timeout_s=args.wait)
        async def together(self, images: list[torch.Tensor]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                return answers(self.net(torch.stack(images)))

    serve.start(http_options={"host": "127.0.0.1", "port": args.port}, proxy_location="HeadOnly")
    serve.run(API.bind(), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    core.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("naive", "ray"))
    settings(parser)
    args = parser.parse_args()
    {"naive": naive, "ray": ray}[args.kind](args)


def settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--decode", choices=tuple(DECODERS), default="pil")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--wait", type=float, default=0.005)
    parser.add_argument("--pool", type=int, default=4)


if __name__ == "__main__":
    main()
