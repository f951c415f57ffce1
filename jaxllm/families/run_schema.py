"""JSON Schema of the run file, for editors: RunConfig with every family's keys merged into `model`."""

from __future__ import annotations

from typing import Any

from jaxllm.config.schema import ModelConfig, RunConfig
from jaxllm.families import FAMILIES


def run_file_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a run file.  `model` is one of: each family with its own keys, or `from`."""
    schema = RunConfig.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    source = ModelConfig.model_json_schema(by_alias=True)["properties"]["from"]
    branches: list[dict[str, Any]] = [
        {
            "title": "from",
            "description": source["description"],
            "type": "object",
            "properties": {"from": {"type": "string", "description": source["description"]}},
            "required": ["from"],
            "additionalProperties": False,
        }
    ]
    for name, module in FAMILIES.items():
        keys = module.Keys.model_json_schema(ref_template=f"#/$defs/{name}_{{model}}")
        definitions.update({f"{name}_{key}": value for key, value in keys.pop("$defs", {}).items()})
        branches.append(
            {
                **keys,
                "title": name,
                "properties": {"family": {"const": name, "description": "The model family."}, **keys["properties"]},
                "required": ["family", *keys.get("required", ())],
            }
        )
    definitions["ModelConfig"] = {"title": "ModelConfig", "description": ModelConfig.__doc__, "oneOf": branches}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "jaxllm run file"}
