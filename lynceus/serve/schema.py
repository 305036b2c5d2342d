"""What /docs and /openapi.json tell of the requests that take pictures, with examples."""

from __future__ import annotations

from typing import Any

_BINARY = {"schema": {"type": "string", "format": "binary"}}
# one red pixel
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
_ONE = {"label": 2, "name": "dog", "confidence": 0.91, "scores": [0.03, 0.06, 0.91]}
_SPANS = [
    {"name": "receive", "start_ms": 0.0, "ms": 0.2},
    {"name": "decode", "start_ms": 0.2, "ms": 1.5},
    {"name": "infer", "start_ms": 1.7, "ms": 7.1},
]
SETTINGS_EXAMPLE = {"max_batch": 4, "max_wait_ms": 2.0}

_STATUSES = (
    (400, "The request cannot be read", "The body is empty; send a picture.", "bad_request"),
    (401, "The key is missing", "This server asks for its key, in x-api-key.", "no_key"),
    (404, "There is no such model", "There is no model of this name; there are: pets.", "unknown_model"),
    (408, "The body did not come in time", "The body did not come within 30 seconds.", "slow_client"),
    (413, "The request or picture is too large", "A request has at most 32 MB.", "too_large"),
    (415, "Not a picture", "This is no picture of a kind that is taken.", "not_a_picture"),
    (422, "The picture is damaged", "The JPEG ends too soon.", "corrupt"),
    (500, "The model failed for this picture", "pets raised RuntimeError for this picture.", "model_failed"),
    (503, "Too much is on the way; see Retry-After", "256 requests are on the way.", "overloaded"),
    (504, "The deadline has passed", "The request waited longer than its deadline.", "expired"),
)

PREDICT: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/jpeg": _BINARY,
            "application/octet-stream": _BINARY,
            "application/x-npy": _BINARY,
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "format": "byte"},
                        "images": {"type": "array", "items": {"type": "string", "format": "byte"}},
                    },
                },
                "examples": {
                    "one": {"summary": "One picture in base64", "value": {"image": _PIXEL}},
                    "several": {"summary": "Several pictures", "value": {"images": [_PIXEL, _PIXEL]}},
                },
            },
        },
    },
    "parameters": [
        {"name": n, "in": "query", "schema": {"type": t}, "description": d, "examples": {"example": {"value": v}}}
        for n, t, d, v in (
            ("trace", "boolean", "1: the spans of this request in the answer", True),
            ("scores", "boolean", "1: the scores of all classes, however many", True),
            ("version", "string", "version of the model", "1"),
            ("deadline_s", "number", "seconds after which an answer is of no use", 0.5),
        )
    ],
    "responses": {
        "200": {
            "description": "What the model says; one picture's answer, or `results` of several",
            "content": {
                "application/json": {
                    "schema": {"type": "object"},
                    "examples": {
                        "one": {"value": {"id": "e606dccb00000000", **_ONE}},
                        "traced": {
                            "summary": "With ?trace=1",
                            "value": {"id": "e606", **_ONE, "trace": {"id": "e606", "total_ms": 8.8, "spans": _SPANS}},
                        },
                        "several": {"value": {"id": "e606dccb00000001", "results": [_ONE, _ONE]}},
                    },
                }
            },
        },
        **{
            str(code): {
                "description": text,
                "content": {
                    "application/json": {"schema": {"type": "object"}, "example": {"error": said, "kind": kind}}
                },
            }
            for code, text, said, kind in _STATUSES
        },
    },
}

SETTINGS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}, "example": SETTINGS_EXAMPLE}},
    }
}
