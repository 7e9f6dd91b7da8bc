"""`/v1/files`: what batches are made of, and what they give."""

from __future__ import annotations

from typing import IO

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from headrace.server.batch_object import FileObject, describe_page
from headrace.server.batches import find_batches, read_page
from headrace.server.errors import ApiError
from headrace.server.store import Store, make_id, now, refuse_full_disk

MOST_BYTES = 200 * 10**6
MOST_NAME = 255
# Of these a client may bring some; the last is what batches write.
PURPOSES = ("batch", "user_data", "batch_output")
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = ("file", "purpose", ANCHOR, SECONDS)
LEAST_SECONDS, MOST_SECONDS = 3600, 2_592_000


async def create_file(http: HttpRequest) -> Response:
    batches, owner = find_batches(http)
    try:
        with refuse_full_disk():
            # Contents go to a temporary file as they come, and from there to the store.
            async with http.form(max_files=1, max_fields=len(FIELDS)) as form:
                upload, file = read_form(form, owner)
                await run_in_threadpool(keep, batches.store, file, upload.file)
    except MultiPartException as error:
        raise ApiError(400, "invalid_form", f"the form cannot be read: {error.message}") from None
    except UnicodeError as error:
        raise ApiError(400, "invalid_form", f"the form cannot be read in its charset: {error}") from None
    except HTTPException as error:
        raise ApiError(400, "invalid_form", f"the form cannot be read: {error.detail}") from None
    return JSONResponse(file.describe())


def read_form(form: FormData, owner: str) -> tuple[UploadFile, FileObject]:
    """The contents and their description. Raises ApiError, naming the field."""
    unknown = sorted(set(form) - set(FIELDS))
    if unknown:
        name = mend(unknown[0])
        raise ApiError(400, "unknown_field", f"{name!r:.80} is no field of a file: take it out", name)
    upload, purpose = form.get("file"), form.get("purpose")
    if not isinstance(upload, UploadFile):
        raise ApiError(400, "missing_field", "file is missing: send a form (multipart/form-data) with a file", "file")
    if purpose not in PURPOSES[:-1]:
        allowed = " or ".join(PURPOSES[:-1])
        raise ApiError(400, "invalid_value", f"purpose must be {allowed}, got {purpose!r:.40}", "purpose")
    size = upload.size or 0
    if size > MOST_BYTES:
        raise ApiError(413, "file_too_large", f"the file has {size:,} bytes; {MOST_BYTES:,} are allowed", "file")
    if size == 0:
        raise ApiError(400, "empty_file", "the file is empty", "file")
    created, seconds = now(), read_seconds(form)
    return upload, FileObject(
        id=make_id("file-"),
        owner=owner,
        bytes=size,
        created_at=created,
        filename=mend(upload.filename or "file")[:MOST_NAME],
        purpose=str(purpose),
        expires_at=None if seconds is None else created + seconds,
    )


def mend(name: str) -> str:
    """A name with halves of characters replaced: a form may claim a charset that spells them, and UTF-8 has none."""
    return name.encode(errors="replace").decode()


def read_seconds(form: FormData) -> int | None:
    """How long the file is kept, None for ever."""
    anchor, text = form.get(ANCHOR), form.get(SECONDS)
    if anchor is None and text is None:
        return None
    if anchor != "created_at":
        raise ApiError(400, "invalid_value", f"{ANCHOR} must be created_at, got {anchor!r:.40}", ANCHOR)
    if (
        not isinstance(text, str)
        or len(text) > 9
        or not text.isdecimal()
        or not LEAST_SECONDS <= int(text) <= MOST_SECONDS
    ):
        message = f"{SECONDS} must be a whole number from {LEAST_SECONDS} to {MOST_SECONDS}, got {text!r:.40}"
        raise ApiError(400, "invalid_value", message, SECONDS)
    return int(text)


def keep(store: Store, file: FileObject, source: IO[bytes]) -> None:
    with refuse_full_disk():
        store.remove_expired()
    store.add_file(file, source)


async def list_files(http: HttpRequest) -> Response:
    batches, owner = find_batches(http)
    purpose = http.query_params.get("purpose")
    if purpose is not None and purpose not in PURPOSES:
        raise ApiError(400, "invalid_value", f"purpose must be one of {', '.join(PURPOSES)}", "purpose")
    page = read_page(http, 10_000, 10_000)
    found, more = await run_in_threadpool(batches.store.list_files, owner, page, purpose)
    return JSONResponse(describe_page([file.describe() for file in found], more))


async def retrieve_file(http: HttpRequest) -> Response:
    batches, owner = find_batches(http)
    found = await run_in_threadpool(batches.store.find_file, owner, http.path_params["file"])
    return JSONResponse(found.describe())


async def read_content(http: HttpRequest) -> Response:
    batches, owner = find_batches(http)
    found = await run_in_threadpool(batches.store.find_file, owner, http.path_params["file"])
    path = batches.store.path_of(found.id)
    return FileResponse(path, media_type="application/octet-stream", filename=found.filename)


async def delete_file(http: HttpRequest) -> Response:
    batches, owner = find_batches(http)
    name = http.path_params["file"]
    await run_in_threadpool(batches.store.remove_file, owner, name)
    return JSONResponse({"id": name, "object": "file", "deleted": True})


def file_routes() -> list[Route]:
    return [
        Route("/v1/files", create_file, methods=["POST"]),
        Route("/v1/files", list_files, methods=["GET"]),
        Route("/v1/files/{file}", retrieve_file, methods=["GET"]),
        Route("/v1/files/{file}", delete_file, methods=["DELETE"]),
        Route("/v1/files/{file}/content", read_content, methods=["GET"]),
    ]
