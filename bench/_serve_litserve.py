"""LitServe as `bench.serve` measures it: the model and the answer of the other servers, its own way and settings.

python -m bench._serve_litserve --port 8100 --workers 4 --threads 1 --batch 8 --decode turbo
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import litserve
import torch
from fastapi import Body

from bench._serve_servers import DECODERS, answers, model, settings


class API(litserve.LitAPI):
    def __init__(self, decode: str, batch: int, wait: float, pool: int, threads: int):
        super().__init__(max_batch_size=batch, batch_timeout=wait)
        self.how, self.together, self.hands, self.threads = decode, batch > 1, pool, threads

    def setup(self, device: str) -> None:
        torch.set_num_threads(self.threads)
        self.net, self.decode = model(), DECODERS[self.how]
        self.pool = ThreadPoolExecutor(self.hands)  # decoding a batch one by one is what their users complain of

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request if self.together else self.decode(request)

    def batch(self, inputs: list[Any]) -> Any:
        return torch.stack(list(self.pool.map(self.decode, inputs)))

    def predict(self, x: torch.Tensor) -> Any:
        with torch.inference_mode():
            return answers(self.net(x)) if self.together else answers(self.net(x[None]))[0]

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return output


API.decode_request.__annotations__["request"] = Annotated[bytes, Body()]  # the raw body, as the others take it


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    settings(parser)
    parser.add_argument("--doors", type=int, default=1)
    parser.add_argument("--fast-queue", action="store_true")
    args = parser.parse_args()
    api = API(args.decode, args.batch, args.wait, args.pool, args.threads)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=args.workers, fast_queue=args.fast_queue)
    server.run(
        host="127.0.0.1", port=args.port, num_api_servers=args.doors, generate_client_file=False, log_level="warning"
    )


if __name__ == "__main__":
    main()
