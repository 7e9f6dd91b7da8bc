"""What goes wrong, in the words and the form that clients know. Knows no route."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from headrace.core import RowError
from headrace.engine.sampling import NOT_A_NUMBER

# By HTTP status: OpenAI's error type, Anthropic's error type.
TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("server_error", "overloaded_error"),
}
# Messages repeat what a client sent; longer ones are cut.
LONGEST_MESSAGE = 1000
OTHER = {4: ("invalid_request_error", "invalid_request_error"), 5: ("server_error", "api_error")}


class ApiError(Exception):
    """A request that is answered with an error: `code` is a stable word, `param` the field that is wrong."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


def describe_error(error: ApiError, anthropic: bool = False) -> dict[str, object]:
    """The body of an error answer, as OpenAI or Anthropic give it."""
    message = str(error)
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]} ..."
    openai_type, anthropic_type = TYPES.get(error.status) or OTHER[4 if error.status < 500 else 5]
    if anthropic:
        details = {"error_code": error.code}
        return {"type": "error", "error": {"type": anthropic_type, "message": message, "details": details}}
    return {"error": {"message": message, "type": openai_type, "param": error.param, "code": error.code}}


def error_response(error: ApiError, anthropic: bool = False) -> JSONResponse:
    return JSONResponse(describe_error(error, anthropic), status_code=error.status, headers=error.headers)


def is_anthropic(path: str) -> bool:
    """Whether a route answers as Anthropic's API does."""
    return path.startswith("/v1/messages")


def from_row_error(error: RowError) -> ApiError:
    """A request that can never be answered, as rows of a job cannot: but for what the model makes of it, its own
    fault."""
    code = "context_length_exceeded" if error.code == "context_length" else error.code
    if code == NOT_A_NUMBER:
        return ApiError(500, code, str(error))
    return ApiError(400, code, str(error), find_param(str(error)))


def find_param(message: str) -> str | None:
    """The field that a message begins with, as messages about fields do."""
    word = message.split(" ", 1)[0].rstrip(":,")
    return word if word.isascii() and word[:1].islower() and not word.isalpha() else None
