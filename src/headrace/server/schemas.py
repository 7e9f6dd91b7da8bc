"""JSON schemas of the bodies that the routes take and give. Data only; a field that is null counts as absent."""

from __future__ import annotations

from typing import Any

from headrace.job.openai import HARMLESS, NO_EFFECT
from headrace.server import projections
from headrace.server.response_body import NEVER

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(kind: str, **limits: Any) -> Schema:
    return {"type": [kind, "null"], **limits}


def listing(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def record(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


WHOLE, NUMBER, TEXT, SWITCH = {"type": "integer"}, {"type": "number"}, {"type": "string"}, {"type": "boolean"}
OBJECT = {"type": "object"}


def only(*values: Any) -> Schema:
    """Values that ask for nothing, where others would ask for what is not there."""
    return {"enum": [*values, None]}


SAMPLING: Schema = (
    {name: only(*values) for name, values in HARMLESS.items()}
    | {
        "model": nullable("string"),
        "max_tokens": nullable("integer", minimum=0),
        "max_completion_tokens": nullable("integer", minimum=1),
        "min_tokens": nullable("integer", minimum=0),
        "n": nullable("integer", minimum=1, maximum=128),
        "temperature": nullable("number", minimum=0, maximum=100),
        "top_p": nullable("number", minimum=1e-9, maximum=1),
        "top_k": nullable("integer", minimum=-1),
        "min_p": nullable("number", minimum=0, maximum=1),
        "presence_penalty": nullable("number", minimum=-2, maximum=2),
        "frequency_penalty": nullable("number", minimum=-2, maximum=2),
        "repetition_penalty": nullable("number", minimum=0.001, maximum=100),
        "seed": nullable("integer"),
        "stop": {"anyOf": [nullable("string"), listing(TEXT)]},
        "stop_token_ids": {"anyOf": [listing(WHOLE | {"minimum": 0}), {"type": "null"}]},
        "logit_bias": nullable("object", additionalProperties={"type": "number", "minimum": -100, "maximum": 100}),
        "ignore_eos": nullable("boolean"),
        "skip_special_tokens": nullable("boolean"),
        "include_stop_str_in_output": nullable("boolean"),
        "add_special_tokens": nullable("boolean"),
        "stream": nullable("boolean"),
        "stream_options": nullable("object", properties={"include_usage": nullable("boolean")}),
        "response_format": nullable("object", properties={"type": {"enum": ["text", "json_object", "json_schema"]}}),
        "structured_outputs": nullable("object"),
        "guided_json": {},
        "guided_regex": nullable("string"),
        "guided_choice": {"anyOf": [listing(TEXT), {"type": "null"}]},
        "guided_grammar": nullable("string"),
        "priority": nullable("integer"),
        "service_tier": {"enum": ["auto", "default", "standard", "priority", "flex", None]},
        "prompt_cache_key": nullable("string"),
        "parallel_tool_calls": nullable("boolean"),
        "best_of": nullable("integer", minimum=1),
    }
    | {name: {} for name in NO_EFFECT if name not in ("priority", "service_tier", "prompt_cache_key")}
)

MESSAGE = record(
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [nullable("string"), listing(record({"type": {"const": "text"}, "text": TEXT}, "type"))]},
        "name": nullable("string"),
        "tool_calls": {"anyOf": [listing(OBJECT), {"type": "null"}]},
        "tool_call_id": nullable("string"),
    },
    "role",
)
FUNCTION = record(
    {"name": TEXT, "description": nullable("string"), "parameters": nullable("object"), "strict": nullable("boolean")},
    "name",
)
TOOL = record({"type": {"const": "function"}, "function": FUNCTION}, "type", "function")
NAMED_TOOL = record({"type": {"const": "function"}, "name": TEXT}, "type", "name")
CHOICE = {"anyOf": [{"enum": ["none", "auto", "required", None]}, OBJECT]}
CHAT_BODY = record(
    SAMPLING
    | {
        "messages": listing(MESSAGE) | {"minItems": 1},
        "logprobs": nullable("boolean"),
        "top_logprobs": nullable("integer", minimum=0, maximum=20),
        "tools": {"anyOf": [listing(TOOL), {"type": "null"}]},
        "tool_choice": CHOICE,
        "echo": only(False),
        "chat_template_kwargs": nullable("object"),
        "add_generation_prompt": nullable("boolean"),
        "continue_final_message": nullable("boolean"),
    },
    "messages",
)
TOKENS = listing(WHOLE | {"minimum": 0})
COMPLETION_BODY = record(
    SAMPLING
    | {
        "prompt": {"anyOf": [TEXT, listing(TEXT), TOKENS, listing(TOKENS)]},
        "echo": nullable("boolean"),
        "logprobs": nullable("integer", minimum=0, maximum=20),
    },
    "prompt",
)
# Fields that the other forms of chat take beside their own.
EXTRAS = {name: CHAT_BODY["properties"][name] for name in (*projections.EXTRAS, *projections.NO_EFFECT)}
PARTS = {"anyOf": [TEXT, listing(record({"type": TEXT}, "type"))]}
COUNTED_BODY = record(
    EXTRAS
    | {
        "messages": listing(record({"role": {"enum": ["user", "assistant", "system"]}, "content": PARTS}, "role"))
        | {"minItems": 1},
        "system": {"anyOf": [PARTS, {"type": "null"}]},
        "max_tokens": nullable("integer", minimum=1),
        "temperature": nullable("number", minimum=0, maximum=1),
        "top_p": SAMPLING["top_p"],
        "stop_sequences": {"anyOf": [listing(TEXT) | {"maxItems": 16}, {"type": "null"}]},
        "stream": nullable("boolean"),
        "tools": {"anyOf": [listing(record({"name": TEXT, "input_schema": OBJECT}, "name")), {"type": "null"}]},
        "tool_choice": record({"type": {"enum": ["auto", "any", "tool", "none"]}}, "type")
        | {"type": ["object", "null"]},
        "output_config": nullable("object", properties={"format": nullable("object")}),
        "metadata": nullable("object", properties={"user_id": nullable("string")}),
        "service_tier": {"enum": ["auto", "standard_only", None]},
        "thinking": only({"type": "disabled"}),
        "thread": only(),
        "cache_control": {},
    },
    "messages",
)
MESSAGE_BODY = COUNTED_BODY | {"required": ["messages", "max_tokens"]}
RESPONSE_BODY = record(
    EXTRAS
    | {name: only(False) for name in NEVER}
    | {
        "input": {"anyOf": [TEXT, listing(OBJECT) | {"minItems": 1}]},
        "instructions": nullable("string"),
        "max_output_tokens": nullable("integer", minimum=1),
        "temperature": SAMPLING["temperature"],
        "top_p": SAMPLING["top_p"],
        "stop": SAMPLING["stop"],
        "stream": nullable("boolean"),
        "stream_options": nullable("object", properties={"include_obfuscation": only(False)}),
        "text": nullable("object", properties={"format": nullable("object"), "verbosity": only("medium")}),
        "tools": {"anyOf": [listing(NAMED_TOOL), {"type": "null"}]},
        "tool_choice": CHOICE,
        "parallel_tool_calls": nullable("boolean"),
        "include": {"anyOf": [TEXT, listing(TEXT), {"type": "null"}]},
        "top_logprobs": nullable("integer", minimum=0, maximum=20),
        "reasoning": nullable("object", properties={"effort": only("none")}),
        "truncation": only("disabled"),
        "metadata": nullable("object"),
        "user": nullable("string"),
        "safety_identifier": nullable("string"),
        "service_tier": SAMPLING["service_tier"],
        "prompt_cache_retention": {},
        "prompt_cache_options": {},
        "max_tool_calls": {},
    },
    "input",
)
USAGE = record({"prompt_tokens": WHOLE, "total_tokens": WHOLE}, "prompt_tokens", "total_tokens")
REASON = {"enum": ["stop", "length", "tool_calls"]}
ANSWER = {"id": TEXT, "object": TEXT, "created": WHOLE, "model": TEXT, "usage": USAGE, "system_fingerprint": TEXT}
NAMED = {"id": TEXT, "object": TEXT}

SCHEMAS: Schema = {
    "Error": record(
        {
            "error": record(
                {"message": TEXT, "type": TEXT, "param": nullable("string"), "code": nullable("string")}, "message"
            )
        },
        "error",
    ),
    "ChatCompletion": record(
        ANSWER
        | {
            "choices": listing(
                record(
                    {"index": WHOLE, "message": OBJECT, "logprobs": nullable("object"), "finish_reason": REASON},
                    "index",
                    "message",
                    "finish_reason",
                )
            )
        },
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
    ),
    "Completion": record(
        ANSWER
        | {
            "choices": listing(
                record(
                    {"index": WHOLE, "text": TEXT, "logprobs": nullable("object"), "finish_reason": REASON},
                    "index",
                    "text",
                    "finish_reason",
                )
            )
        },
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
    ),
    "Embeddings": record(
        {
            "object": {"const": "list"},
            "data": listing(
                record({"index": WHOLE, "object": TEXT, "embedding": {"type": ["array", "string"]}}, "index")
            ),
            "model": TEXT,
            "usage": USAGE,
        },
        "data",
        "model",
        "usage",
    ),
    "Model": record(NAMED | {"created": WHOLE, "owned_by": TEXT}, "id", "object", "created", "owned_by"),
    "File": record(
        NAMED | {"bytes": WHOLE, "created_at": WHOLE, "filename": TEXT, "purpose": TEXT},
        "id",
        "object",
        "bytes",
        "created_at",
        "filename",
        "purpose",
    ),
    "Batch": record(
        NAMED | {"endpoint": TEXT, "status": TEXT, "input_file_id": TEXT, "created_at": WHOLE},
        "id",
        "object",
        "endpoint",
        "status",
    ),
    "Message": record(
        {
            "id": TEXT,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": TEXT,
            "content": listing(record({"type": {"enum": ["text", "tool_use"]}}, "type")),
            "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
            "stop_sequence": nullable("string"),
            "usage": record({"input_tokens": WHOLE, "output_tokens": WHOLE}, "input_tokens", "output_tokens"),
        },
        "id",
        "type",
        "role",
        "model",
        "content",
        "stop_reason",
        "usage",
    ),
    "Response": record(
        {
            "id": TEXT,
            "object": {"const": "response"},
            "created_at": WHOLE,
            "model": TEXT,
            "status": {"enum": ["completed", "incomplete", "failed"]},
            "output": listing(record({"type": {"enum": ["message", "function_call"]}}, "type")),
            "usage": nullable("object"),
        },
        "id",
        "object",
        "created_at",
        "model",
        "status",
        "output",
        "usage",
    ),
    "Page": record({"object": {"const": "list"}, "data": listing(OBJECT)}, "object", "data"),
}
