"""The OpenAPI document of the HTTP half of the protocol, as this server speaks it.

Ours, since the published one cannot be used as it stands: it has templates in its paths, knows versioned routes only and requires `data`.
"""

from __future__ import annotations

from typing import Any

_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]{0,62}$"}}
_VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}

_TENSOR = {"name": {"type": "string"}, "datatype": {"$ref": "#/components/schemas/Datatype"}, "shape": {"type": "array", "items": {"type": "integer"}}}
_PARAMETERS = {"parameters": {"type": "object"}}
_DATA = {"data": {"type": "array", "items": {}, "description": "nested or flat, row major; absent where binary_data_size says that it follows the JSON"}}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _list(of: str) -> dict[str, Any]:
    return {"type": "array", "items": {"$ref": f"#/components/schemas/{of}"}}


SCHEMAS: dict[str, Any] = {
    "Error": _object({"error": {"type": "string"}}, ["error"]),
    "Datatype": {"type": "string", "enum": ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"]},
    "Live": _object({"live": {"type": "boolean"}}, ["live"]),
    "Ready": _object({"ready": {"type": "boolean"}}, ["ready"]),
    "ServerMetadata": _object({"name": {"type": "string"}, "version": {"type": "string"}, "extensions": {"type": "array", "items": {"type": "string"}}}, ["name", "version", "extensions"]),
    "TensorMetadata": _object({**_TENSOR, **_PARAMETERS}, ["name", "datatype", "shape"]),
    "ModelMetadata": _object(
        {"name": {"type": "string"}, "versions": {"type": "array", "items": {"type": "string"}}, "platform": {"type": "string"}, "inputs": _list("TensorMetadata"), "outputs": _list("TensorMetadata")},
        ["name", "versions", "platform", "inputs", "outputs"],
    ),
    "RequestInput": _object({**_TENSOR, **_PARAMETERS, **_DATA}, ["name", "datatype", "shape"]),
    "RequestOutput": _object({"name": {"type": "string"}, **_PARAMETERS}, ["name"]),
    "InferenceRequest": _object({"id": {"type": "string"}, **_PARAMETERS, "inputs": _list("RequestInput"), "outputs": _list("RequestOutput")}, ["inputs"]),
    "ResponseOutput": _object({**_TENSOR, **_PARAMETERS, **_DATA}, ["name", "datatype", "shape"]),
    "InferenceResponse": _object(
        {"id": {"type": "string"}, "model_name": {"type": "string"}, "model_version": {"type": "string"}, "outputs": _list("ResponseOutput")},
        ["model_name", "model_version", "outputs"],
    ),
    "Object": {"type": "object"},
    "Index": {"type": "array", "items": _object({name: {"type": "string"} for name in ("name", "version", "state", "reason")}, ["name", "version", "state"])},
    "LoadRequest": _object(_PARAMETERS, []),
}

# (path below /v2, method, what it does, schema of the answer, schema of the request, codes of errors)
_ROUTES: list[tuple[str, str, str, str, str, tuple[int, ...]]] = [
    ("", "get", "the server and its extensions", "ServerMetadata", "", ()),
    ("/health/live", "get", "whether the server runs", "Live", "", ()),
    ("/health/ready", "get", "whether every model is warm", "Ready", "", (503,)),
    ("/openapi.json", "get", "this document", "Object", "", ()),
    ("/models/stats", "get", "statistics of all models", "Object", "", ()),
    ("/repository/index", "post", "models and versions, and what cannot be loaded", "Index", "Object", (400,)),
    ("/repository/models/{model}/load", "post", "load or replace a model", "Object", "LoadRequest", (400, 409)),
    ("/repository/models/{model}/unload", "post", "unload a model", "Object", "LoadRequest", (400, 404)),
]
_OF_MODEL: list[tuple[str, str, str, str, str, tuple[int, ...]]] = [
    ("", "get", "inputs, outputs and versions", "ModelMetadata", "", (404,)),
    ("/ready", "get", "whether it is warm", "Ready", "", (404, 503)),
    ("/config", "get", "configuration as perf_analyzer reads it", "Object", "", (404,)),
    ("/stats", "get", "counts and times since it was loaded", "Object", "", (404,)),
    ("/lineage", "get", "engine, version, run and data that answers come from", "Object", "", (404,)),
    ("/traffic", "get", "who answers: default version, canary, shadow and what it was found to answer, precision ladders", "Object", "", (404,)),
    ("/infer", "post", "outputs for inputs", "InferenceResponse", "InferenceRequest", (400, 404, 413, 503)),
]


def openapi(version: str) -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    paths: dict[str, Any] = {}
    for route, method, summary, answer, request, codes in _ROUTES:
        paths.setdefault(f"/v2{route}", {})[method] = _operation(summary, answer, request, codes, [_MODEL] if "{model}" in route else [])
    for prefix, parameters in (("/v2/models/{model}", [_MODEL]), ("/v2/models/{model}/versions/{version}", [_MODEL, _VERSION])):
        for route, method, summary, answer, request, codes in _OF_MODEL:
            paths.setdefault(f"{prefix}{route}", {})[method] = _operation(summary, answer, request, codes, parameters)
    return {"openapi": "3.1.0", "info": {"title": "Open Inference Protocol V2", "version": version}, "paths": paths, "components": {"schemas": SCHEMAS}}


def _operation(summary: str, answer: str, request: str, codes: tuple[int, ...], parameters: list[dict[str, Any]]) -> dict[str, Any]:
    responses = {"200": {"description": summary, "content": _content(answer)}}
    responses |= {str(code): {"description": "why not", "content": _content("Error")} for code in codes}
    operation: dict[str, Any] = {"summary": summary, "parameters": parameters, "responses": responses}
    return operation | ({"requestBody": {"content": _content(request)}} if request else {})


def _content(schema: str) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    if schema in ("InferenceRequest", "InferenceResponse"):
        # The JSON and behind it the tensors; Inference-Header-Content-Length is the length of the former.
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return content
