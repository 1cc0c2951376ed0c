"""The API as a page, from the OpenAPI description; FastAPI's own page loads its scripts from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

EXAMPLE = """curl {base}v1/images/generations \\
  -H 'Content-Type: application/json' \\
  -d '{"prompt": "a large red circle", "seed": 7}'"""


def page(described: Mapping[str, Any], base: str) -> str:
    """HTML of an OpenAPI description; `base` is the address that the server was reached at, with a last slash."""
    schemas = described.get("components", {}).get("schemas", {})
    operations = [
        (method.upper(), path, operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    body = "".join(_operation(method, path, operation, schemas) for method, path, operation in operations)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        '<title>API of fewstep serve</title><link rel="stylesheet" href="/page.css"></head><body class="reference"><main>'
        f'<p><a href="/">fewstep</a></p><h1>API</h1><p>Machines read <a href="/openapi.json">openapi.json</a>.</p>'
        f"<pre>{escape(EXAMPLE.replace('{base}', base))}</pre>{body}</main></body></html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    title = f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(operation.get('summary', ''))}</p>"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rsplit("/", 1)[-1]
    if name not in schemas:
        return title
    rows = "".join(_rows(schemas[name]))
    head = "<thead><tr><th>field<th>value<th></tr></thead>"
    return f'{title}<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _rows(schema: Mapping[str, Any]) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
        needed = " (needed)" if name in schema.get("required", ()) else ""
        said = escape(field.get("description", "")) + needed
        yield f"<tr><td><code>{escape(name)}</code><td>{escape(', '.join(map(_kind, kinds)))}<td>{said}</tr>"


def _kind(kind: Mapping[str, Any]) -> str:
    if "enum" in kind:
        return " | ".join(map(str, kind["enum"]))
    low, high = kind.get("minimum"), kind.get("maximum", kind.get("exclusiveMaximum"))
    bounds = f" {low:g} to {high:.16g}" if low is not None and high is not None else ""
    longest = f", at most {kind['maxLength']} characters" if "maxLength" in kind else ""
    return f"{kind.get('type', 'any')}{bounds}{longest}"
