"""What this server answers over HTTP, as an OpenAPI document and as a page for people."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ingot import __version__

_PARAMETER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Operation:
    """One method of one path: what it does, what its body looks like, what it answers."""

    method: str
    path: str
    summary: str
    body: str = ""
    answer: str = ""


_OF_MODELS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
OPERATIONS = (
    Operation("get", "/v2", "The server's name, version and extensions", answer="ServerMetadata"),
    Operation("get", "/v2/health/live", "200 while the process answers"),
    Operation("get", "/v2/health/ready", "200 while requests should be sent here, else 400"),
    Operation("get", "/v2/models/stats", "Statistics of every model", answer="Statistics"),
    *(
        Operation(method, path + end, summary, body, answer)
        for path in _OF_MODELS
        for method, end, summary, body, answer in (
            ("get", "", "Inputs and outputs", "", "ModelMetadata"),
            ("get", "/ready", "200 if the model serves, else 400", "", ""),
            ("get", "/config", "The complete configuration", "", "Object"),
            ("get", "/stats", "Statistics of the model", "", "Statistics"),
            ("post", "/infer", "Infer; binary tensors may follow the JSON", "InferRequest", "InferResponse"),
            ("post", "/generate", "Infer; inputs and outputs are keys of a flat object", "Object", "Object"),
            ("post", "/generate_stream", "The same, answered as server-sent events", "Object", "Object"),
            ("get", "/trace/setting", "Trace settings of the model", "", "Object"),
            ("post", "/trace/setting", "Change them; null resets one", "Object", "Object"),
        )
    ),
    Operation("post", "/v2/repository/index", "Models and their states", "Index", "IndexAnswer"),
    Operation("post", "/v2/repository/models/{model}/load", "Load or reload a model", "Load"),
    Operation("post", "/v2/repository/models/{model}/unload", "Unload a model", "Load"),
    *(
        Operation(method, f"/v2/{kind}sharedmemory{end}", summary, body, answer)
        for kind in ("system", "cuda")
        for method, end, summary, body, answer in (
            ("get", "/status", "Registered regions", "", "Objects"),
            ("get", "/region/{region}/status", "A registered region", "", "Objects"),
            ("post", "/region/{region}/register", "Register a region", "Object", ""),
            ("post", "/region/{region}/unregister", "Forget a region", "", ""),
            ("post", "/unregister", "Forget all regions", "", ""),
        )
    ),
    Operation("get", "/v2/logging", "Log settings", answer="Object"),
    Operation("post", "/v2/logging", "Change log settings", "Object", "Object"),
    Operation("get", "/v2/trace/setting", "Trace settings", answer="Object"),
    Operation("post", "/v2/trace/setting", "Change trace settings; null resets one", "Object", "Object"),
    Operation("get", "/openapi.json", "This document", answer="Object"),
    Operation("get", "/docs", "This document as a page"),
)


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


def _list(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item}


_TEXT, _NUMBER, _ANYTHING = {"type": "string"}, {"type": "integer"}, {"type": "object", "additionalProperties": True}
_TENSOR = _object(
    ("name", "shape", "datatype"), name=_TEXT, shape=_list({"type": "integer", "minimum": 0}),
    datatype={"type": "string", "example": "FP32"}, parameters=_ANYTHING, data=_list({}),
)  # fmt: skip
_DESCRIBED = _list(_object(name=_TEXT, datatype=_TEXT, shape=_list(_NUMBER)))
SCHEMAS: Mapping[str, Any] = {
    "Error": _object(("error",), error=_TEXT),
    "Object": _ANYTHING,
    "Objects": _list(_ANYTHING),
    "ServerMetadata": _object(name=_TEXT, version=_TEXT, extensions=_list(_TEXT)),
    "ModelMetadata": _object(name=_TEXT, versions=_list(_TEXT), platform=_TEXT, inputs=_DESCRIBED, outputs=_DESCRIBED),
    "InferRequest": _object(
        ("inputs",), id=_TEXT, parameters=_ANYTHING, inputs=_list(_TENSOR),
        outputs=_list(_object(("name",), name=_TEXT, parameters=_ANYTHING)),
    ),
    "InferResponse": _object(
        model_name=_TEXT, model_version=_TEXT, id=_TEXT, parameters=_ANYTHING, outputs=_list(_TENSOR)
    ),
    "Statistics": _object(model_stats=_list(_ANYTHING)),
    "Index": _object(ready={"type": "boolean"}),
    "IndexAnswer": _list(_object(("name",), name=_TEXT, version=_TEXT, state=_TEXT, reason=_TEXT)),
    "Load": _object(parameters=_ANYTHING),
}  # fmt: skip


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0", "info": {"title": "Ingot model server", "version": __version__}, "paths": paths,
        "components": {"schemas": dict(SCHEMAS), "securitySchemes": schemes},
    }  # fmt: skip


def _described(operation: Operation) -> dict[str, Any]:
    names = _PARAMETER.findall(operation.path)
    entry: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names],
        "responses": {
            "200": {"description": "done", **(_content(operation.answer) if operation.answer else {})},
            "default": {"description": "refused", **_content("Error")},
        },
    }
    if operation.body:
        entry["requestBody"] = _content(operation.body)
    return entry


def _content(schema: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "td{padding:.2rem .8rem .2rem 0;vertical-align:top}code{font-size:.95em}"
)


def page() -> str:
    """The same for people; needs nothing from elsewhere."""
    rows = "".join(
        f"<tr><td><code>{o.method.upper()}</code></td><td><code>{html.escape(o.path)}</code></td>"
        f"<td>{html.escape(o.summary)}</td></tr>"
        for o in OPERATIONS
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Ingot model server</title>'
        f"<style>{_STYLE}</style></head><body><h1>Ingot model server {__version__}</h1>"
        f'<p>The KServe v2 protocol with Triton\'s extensions. <a href="/openapi.json">openapi.json</a></p>'
        f"<table>{rows}</table></body></html>"
    )
