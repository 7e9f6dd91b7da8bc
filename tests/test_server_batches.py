"""Batches through their routes: what they answer, how they fail, end early, go on after a kill, and whose they are."""

from __future__ import annotations

import base64
import io
import json
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from batch_app import (
    answer_batches,
    batches_of,
    open_client,
    start_batch,
    strip_times,
    upload,
    watch,
)
from jobs import Rows, batch_row, batch_rows, engine_options, run, without_times, write_lines
from servers import serving
from starlette.testclient import TestClient

from headrace import LLM
from headrace.cache.policies.selecting import NoRoom
from headrace.engine.engine import Engine
from headrace.engine.outputs import RequestOutput
from headrace.options import ServeOptions
from headrace.server import batches as batches_module
from headrace.server.batch_check import check_lines
from headrace.server.batch_object import Batch, FileObject
from headrace.server.models import Models
from headrace.server.store import Store, make_id, now

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_client(tmp_path_factory.mktemp("data"), tiny_model) as found:
        yield found


def encode(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_of(count: int, **body: Any) -> Rows:
    return batch_rows(count, model="tiny", **body)


def read_content(client: httpx.Client, file_id: str | None) -> Rows:
    if file_id is None:
        return []
    answer = client.get(f"/v1/files/{file_id}/content")
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]


def outcome(client: httpx.Client, batch: dict[str, Any]) -> tuple[Rows, Rows]:
    """The lines of the output and of the error file."""
    return read_content(client, batch["output_file_id"]), read_content(client, batch["error_file_id"])


def test_a_batch_is_answered_as_a_job_is(client: TestClient, tiny_model: Path, tmp_path: Path) -> None:
    rows = [*rows_of(300), *({**row, "custom_id": f"again-{row['custom_id']}"} for row in rows_of(20))]
    batch = start_batch(client, encode(rows), metadata={"for": "test"})
    assert batch["object"] == "batch" and batch["status"] == "validating" and batch["metadata"] == {"for": "test"}
    assert batch["expires_at"] - batch["created_at"] == 24 * 3600 and batch["completion_window"] == "24h"
    batch = watch(client, batch["id"])
    assert batch["status"] == "completed" and batch["errors"] is None and batch["error_file_id"] is None
    assert batch["request_counts"] == {"total": 320, "completed": 320, "failed": 0} and batch["model"] == "tiny"
    moments = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
    assert moments == sorted(moments) and batch["failed_at"] is batch["cancelled_at"] is batch["expired_at"] is None
    output = tmp_path / "out.jsonl"
    report = run(tiny_model, write_lines(tmp_path / "in.jsonl", rows), output)
    assert strip_times(outcome(client, batch)[0]) == without_times(output)
    usage = batch["usage"]
    assert usage["input_tokens"] == report["job"]["prompt_tokens"] and usage["output_tokens"] == 320 * 4
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    file = client.get(f"/v1/files/{batch['output_file_id']}").json()
    assert file["purpose"] == "batch_output" and file["bytes"] > 0 and file["expires_at"] is None
    assert list((batches_of(client).store.folder / "batches").iterdir()) == []


def test_random_rows_are_answered_alike_in_every_batch(client: TestClient) -> None:
    content = encode(rows_of(8, temperature=1.0, n=2))
    found = [outcome(client, watch(client, start_batch(client, content)["id"]))[0] for _ in range(2)]
    assert strip_times(found[0]) == strip_times(found[1])
    texts = {choice["message"]["content"] for line in found[0] for choice in line["response"]["body"]["choices"]}
    assert len(texts) > 8


def test_rows_that_the_engine_refuses_are_in_the_error_file(client: TestClient) -> None:
    rows = [*rows_of(3), batch_row("long", "word " * 2000, model="tiny"), batch_row("bias", "x", logit_bias={"999": 1})]
    batch = watch(client, start_batch(client, encode(rows))["id"])
    assert batch["status"] == "completed" and batch["request_counts"] == {"total": 5, "completed": 3, "failed": 2}
    output, errors = outcome(client, batch)
    assert [line["custom_id"] for line in output] == ["row-0", "row-1", "row-2"]
    found = {line["custom_id"]: (line["response"], line["error"]["code"], line["error"]["line"]) for line in errors}
    assert found == {"long": (None, "context_length", 4), "bias": (None, "token_range", 5)}


def test_openais_own_client_understands_all_answers(tiny_model: Path, tmp_path: Path) -> None:
    with open_client(tmp_path, tiny_model) as client:
        assistant = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)
        after: Any = {"anchor": "created_at", "seconds": 7200}
        file = assistant.files.create(file=("in.jsonl", encode(rows_of(3))), purpose="batch", expires_after=after)
        assert file.expires_at == file.created_at + 7200 and file.status == "processed"
        window: Any = {"completion_window": "24h", "endpoint": "/v1/chat/completions"}
        names = [assistant.batches.create(input_file_id=file.id, **window).id for _ in range(3)]
        for name in names:
            watch(client, name)
        assert [batch.id for batch in assistant.batches.list(limit=2)] == names[::-1]
        batch = assistant.batches.retrieve(names[0])
        assert batch.request_counts is not None and batch.request_counts.completed == 3
        assert batch.usage is not None and batch.usage.output_tokens == 12 and batch.output_file_id is not None
        assert len(assistant.files.content(batch.output_file_id).text.splitlines()) == 3
        outputs = [each.id for each in assistant.files.list(purpose="batch_output", limit=1)]
        assert len(outputs) == 3 and batch.output_file_id in outputs
        with pytest.raises(openai.ConflictError):
            assistant.batches.cancel(names[0])
        assert assistant.files.delete(file.id).deleted


def test_rows_may_ask_for_vectors(client: TestClient, tiny_model: Path) -> None:
    bodies = [{"model": "tiny", "input": f"wheel {number}", "encoding_format": "base64"} for number in range(20)]
    rows = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": body}
        for number, body in enumerate(bodies)
    ]
    batch = watch(client, start_batch(client, encode(rows), endpoint="/v1/embeddings")["id"])
    assert batch["status"] == "completed" and batch["usage"]["output_tokens"] == 0
    with LLM(**vars(engine_options(tiny_model))) as llm:
        expected = llm.embed([body["input"] for body in bodies])
    for line, vector in zip(outcome(client, batch)[0], expected, strict=True):
        (entry,) = line["response"]["body"]["data"]
        assert base64.b64decode(entry["embedding"]) == struct.pack(f"<{len(vector)}f", *vector)


def test_completions_are_answered_too(client: TestClient) -> None:
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "The"}}
    batch = watch(client, start_batch(client, encode([row]), endpoint="/v1/completions")["id"])
    assert outcome(client, batch)[0][0]["response"]["body"]["object"] == "text_completion"


GOOD = json.dumps(batch_row("good", "x", model="tiny"))


@pytest.mark.parametrize(
    ("text", "line", "code", "word"),
    [
        (f"{GOOD}\nnot json\n", 2, "invalid_json", "not JSON"),
        (f"{GOOD}\n[1]\n", 2, "not_an_object", "a list"),
        (f"{GOOD}\n\n{GOOD.replace('good', 'b')}\n", 2, "blank_line", "blank"),
        (f"{GOOD}\n{GOOD}\n", 2, "duplicate_custom_id", "line 1"),
        (GOOD.replace("chat/", "") + "\n", 1, "mismatched_url", "/v1/chat/completions"),
        (f"{GOOD}\n{GOOD.replace('good', 'b').replace('tiny', 'gpt')}", 2, "model_not_found", "gpt"),
        (GOOD.replace('"method"', '"way"'), 1, "missing_field", "method"),
        (GOOD.replace("POST", "GET"), 1, "invalid_value", "POST"),
        (GOOD.replace('"good"', '""'), 1, "invalid_value", "custom_id"),
        (GOOD.replace('"messages"', '"temperature": -1, "messages"'), 1, "invalid_value", "temperature"),
        (GOOD.replace('"tiny"', "5"), 1, "invalid_value", "body.model"),
        (GOOD.replace('"messages"', '"wheels": 1, "messages"'), 1, "unknown_field", "wheels"),
        ("\n\n", None, "empty_file", "no rows"),
    ],
)
def test_one_wrong_line_fails_the_whole_batch(
    client: TestClient, text: str, line: int | None, code: str, word: str
) -> None:
    batch = watch(client, start_batch(client, text.encode())["id"])
    assert batch["status"] == "failed" and batch["failed_at"] is not None and batch["output_file_id"] is None
    assert batch["errors"]["object"] == "list" and len(batch["errors"]["data"]) == 1
    error = batch["errors"]["data"][0]
    assert (error["line"], error["code"]) == (line, code) and word in error["message"]


def test_rows_name_models_as_requests_do(client: TestClient, tiny_model: Path, tmp_path: Path) -> None:
    names = {"none": {}, "name": {"model": "tiny"}, "path": {"model": str(tiny_model)}}
    rows = [batch_row(name, "x", **fields) for name, fields in names.items()]
    batch = watch(client, start_batch(client, encode(rows))["id"])
    assert (batch["status"], batch["model"]) == ("completed", "tiny")
    assert (
        len({line["response"]["body"]["choices"][0]["message"]["content"] for line in outcome(client, batch)[0]}) == 1
    )

    other = tmp_path / "other"
    other.symlink_to(tiny_model)
    models = Models(engine_options(tiny_model), ServeOptions(also=(str(other),)))
    rows += [batch_row(name, "x", model=name) for name in ("other", str(other), "gpt")]
    path = write_lines(tmp_path / "in.jsonl", rows)
    found = check_lines(path, "/v1/chat/completions", models.find, lambda: None)
    codes = [(4, "mismatched_model"), (5, "mismatched_model"), (6, "model_not_found")]
    assert [(error.line, error.code) for error in found.errors] == codes and found.model == "tiny"


def test_at_most_a_hundred_errors_are_listed(client: TestClient) -> None:
    batch = watch(client, start_batch(client, encode(rows_of(150, temperature=-1)))["id"])
    assert [error["line"] for error in batch["errors"]["data"]] == list(range(1, 101))
    assert batch["errors"]["data"][0]["param"] == "body.temperature"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"endpoint": "/v1/responses"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"input_file_id": "file-none"}, 404, None),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"metadata": {str(index): "" for index in range(17)}}, 400, "metadata"),
        ({"metadata": {"a": "x" * 513}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, 400, "output_expires_after.seconds"),
        ({"speed": "high"}, 400, "speed"),
    ],
)
def test_what_cannot_be_a_batch(client: TestClient, change: dict[str, Any], status: int, param: str | None) -> None:
    body = {"input_file_id": upload(client, GOOD.encode()), "endpoint": "/v1/chat/completions"}
    answer = client.post("/v1/batches", json=body | {"completion_window": "24h"} | change)
    assert answer.status_code == status and answer.json()["error"]["param"] == param


def test_a_file_for_another_purpose_is_no_batch(client: TestClient) -> None:
    body = {"input_file_id": upload(client, GOOD.encode(), purpose="user_data"), "completion_window": "24h"}
    answer = client.post("/v1/batches", json=body | {"endpoint": "/v1/chat/completions"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_purpose"


def test_outputs_expire_when_asked(client: TestClient) -> None:
    after = {"anchor": "created_at", "seconds": 3600}
    batch = watch(client, start_batch(client, GOOD.encode(), output_expires_after=after)["id"])
    file = client.get(f"/v1/files/{batch['output_file_id']}").json()
    assert file["expires_at"] == file["created_at"] + 3600


def test_lists_come_in_pages_newest_first(tiny_model: Path, tmp_path: Path) -> None:
    with open_client(tmp_path, tiny_model) as client:
        names = [start_batch(client, GOOD.encode())["id"] for _ in range(5)]
        for name in names:
            watch(client, name)
        assert client.get("/v1/batches").json()["has_more"] is False
        seen, after = [], ""
        while True:
            page = client.get(f"/v1/batches?limit=2{after}").json()
            found = [batch["id"] for batch in page["data"]]
            assert (page["first_id"], page["last_id"]) == (found[0], found[-1])
            seen += found
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert seen == names[::-1]
        for wrong in ("limit=0", "limit=101", "limit=x", "after=batch_none"):
            assert client.get(f"/v1/batches?{wrong}").status_code == 400
        assert batches_of(client).count() == {"completed": 5}


def test_batches_are_their_owners(client: TestClient) -> None:
    batch = start_batch(client, GOOD.encode(), owner="anna")
    path, bert = f"/v1/batches/{batch['id']}", {"x-owner": "bert"}
    assert client.get(path, headers=bert).status_code == 404
    assert client.post(f"{path}/cancel", headers=bert).status_code == 404
    assert client.get("/v1/batches", headers=bert).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    body = {"input_file_id": batch["input_file_id"], "endpoint": batch["endpoint"], "completion_window": "24h"}
    assert client.post("/v1/batches", json=body, headers=bert).status_code == 404
    anna = {"x-owner": "anna"}
    while (found := client.get(path, headers=anna).json())["status"] != "completed":
        pass
    assert client.get(f"/v1/files/{found['output_file_id']}", headers=anna).status_code == 200
    assert client.get(f"/v1/files/{found['output_file_id']}/content", headers=bert).status_code == 404


def test_a_cancelled_batch_keeps_what_was_answered(client: TestClient) -> None:
    batch = start_batch(client, encode(rows_of(3000, max_tokens=16)))
    watch(client, batch["id"], ("in_progress",), rows=1)
    described = next(each for each in batches_of(client).describe() if each["id"] == batch["id"])
    assert described["status"] == "in_progress" and described["total"] == 3000
    assert described["seconds_left"] is None or described["seconds_left"] > 0
    answer = client.post(f"/v1/batches/{batch['id']}/cancel")
    assert answer.status_code == 200 and answer.json()["status"] == "cancelling"
    batch = watch(client, batch["id"])
    assert batch["status"] == "cancelled" and batch["cancelled_at"] >= batch["cancelling_at"]
    output, errors = outcome(client, batch)
    counts = batch["request_counts"]
    assert (len(output), len(errors)) == (counts["completed"], counts["failed"]) and 0 < len(output) < 3000
    assert Counter(line["custom_id"] for line in output + errors) == {f"row-{index}": 1 for index in range(3000)}
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    again = client.post(f"/v1/batches/{batch['id']}/cancel")
    assert again.status_code == 409 and "cancelled" in again.json()["error"]["message"]


def test_a_batch_that_waits_for_its_turn_is_cancelled_at_once(client: TestClient) -> None:
    running = [start_batch(client, encode(rows_of(2000)))["id"] for _ in range(2)]
    waiting = start_batch(client, encode(rows_of(10)))["id"]
    client.post(f"/v1/batches/{waiting}/cancel")
    found = watch(client, waiting)
    assert found["status"] == "cancelled" and found["request_counts"]["total"] == 0
    states = [client.get(f"/v1/batches/{name}").json()["status"] for name in running]
    assert "completed" not in states
    for name in running:
        client.post(f"/v1/batches/{name}/cancel")
        watch(client, name)


def add_directly(store: Store, rows: Rows, **changes: Any) -> Batch:
    """A batch put into a data folder without a server."""
    content = encode(rows)
    file = FileObject(
        id=make_id("file-"), owner="", bytes=len(content), created_at=now(), filename="in.jsonl", purpose="batch"
    )
    store.add_file(file, io.BytesIO(content))
    batch = Batch(
        **{
            "id": make_id("batch_"),
            "owner": "",
            "endpoint": "/v1/chat/completions",
            "input_file_id": file.id,
            "created_at": now(),
            "expires_at": now() + 24 * 3600,
        }
        | changes
    )
    store.add_batch(batch)
    return batch


def test_rows_that_are_not_done_in_time_expire(tiny_model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    batch = add_directly(store, rows_of(20), expires_at=now() - 1)
    store.close()
    with open_client(tmp_path, tiny_model) as client:
        found = watch(client, batch.id)
        assert found["status"] == "expired" and found["expired_at"] is not None
        assert found["request_counts"] == {"total": 20, "completed": 0, "failed": 20}
        output, errors = outcome(client, found)
    assert output == [] and {line["error"]["code"] for line in errors} == {"batch_expired"}


def test_a_closed_server_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    content = encode(rows_of(2000, max_tokens=8))
    with open_client(tmp_path, tiny_model) as client:
        name = start_batch(client, content)["id"]
        before = watch(client, name, ("in_progress",), rows=50)
        store = batches_of(client).store
    assert before["status"] == "in_progress" and store.journal_of(name).exists()
    with open_client(tmp_path, tiny_model) as client:
        found = watch(client, name, ("in_progress", "completed"))
        assert found["request_counts"]["completed"] >= 50
        found = watch(client, name)
        assert found["status"] == "completed" and found["request_counts"]["completed"] == 2000
        output, _ = outcome(client, found)
        assert [line["custom_id"] for line in output] == [f"row-{index}" for index in range(2000)]


def test_other_settings_do_not_mix_into_a_batch(tiny_model: Path, tmp_path: Path) -> None:
    with open_client(tmp_path, tiny_model) as client:
        name = start_batch(client, encode(rows_of(3000)))["id"]
        watch(client, name, ("in_progress",), rows=1)
    with open_client(tmp_path, tiny_model, seed=5) as client:
        batch = watch(client, name)
        assert batch["status"] == "failed" and batch["errors"]["data"][0]["code"] == "settings_changed"
        assert "seed was not set and is 5" in batch["errors"]["data"][0]["message"]
        output, errors = outcome(client, batch)
    assert output and len(output) + len(errors) == 3000


def test_killed_at_random_instants_every_row_is_answered_once(tiny_model: Path, tmp_path: Path) -> None:
    piles = [
        [*rows_of(600, max_tokens=24), batch_row("long", "word " * 2000, model="tiny")],
        rows_of(400, max_tokens=24, temperature=0.8),
        rows_of(100, max_tokens=12),
    ]
    names: dict[str, list[str]] = {}
    for place in ("calm", "killed"):
        store = Store(tmp_path / place)
        names[place] = [add_directly(store, rows).id for rows in piles]
        store.close()
    answer_batches(tmp_path / "calm", tiny_model, max_sequences=6)
    arguments = [str(HERE / "batch_killer.py"), str(tmp_path / "killed"), str(tiny_model), "25"]
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["killed"] == 25 and said["lost"] == 0
    assert len(set(said["begins"])) > 3, "the kills must have hit the batches at work"
    calm, killed = (read_all(tmp_path / place, names[place]) for place in ("calm", "killed"))
    assert killed == calm
    assert [len(each["output"]) + len(each["error"]) for each in killed] == [601, 400, 100]
    assert len(list((tmp_path / "killed" / "files").iterdir())) == 3 + 4
    assert list((tmp_path / "killed" / "batches").iterdir()) == []


def read_all(folder: Path, names: list[str]) -> list[dict[str, Rows]]:
    """The lines of the output and error files of batches, without times."""
    store, found = Store(folder), []
    for name in names:
        batch = store.find_batch("", name)
        assert batch.status == "completed" and batch.completed + batch.failed == batch.total
        files = {"output": batch.output_file_id, "error": batch.error_file_id}
        found.append(
            {
                kind: [] if file is None else strip_times(
                    [json.loads(line) for line in store.path_of(file).read_text().splitlines()]
                )
                for kind, file in files.items()
            }
        )  # fmt: skip
    store.close()
    return found


def test_a_full_disk_holds_a_batch_up_and_loses_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batches_module, "PAUSE", 0.2)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        with open_client(disk, tiny_model) as client:
            name = start_batch(client, encode(rows_of(700, logprobs=True, top_logprobs=5)))["id"]
            watch(client, name, ("in_progress",))
            while "the disk refuses" not in caplog.text:
                form = {"files": {"file": ("a", b"x" * 100_000)}, "data": {"purpose": "user_data"}}
                full = client.post("/v1/files", **form)
            assert full.status_code == 507 and full.json()["error"]["code"] == "insufficient_storage"
            assert client.get(f"/v1/batches/{name}").json()["status"] == "in_progress"
            assert not list((disk / "files").glob("*.part"))
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            batch = watch(client, name)
            assert batch["status"] == "completed" and len(outcome(client, batch)[0]) == 700
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("error", [RuntimeError("the wheel broke"), NoRoom("the wheel broke")])
def test_a_row_that_breaks_the_engine_fails_alone(
    error: Exception, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def fall(engine: Engine) -> list[RequestOutput]:
        if any(sequence.request.id.endswith("-poison") for sequence in engine.state.sequences.values()):
            raise error
        return step(engine)

    monkeypatch.setattr(Engine, "step", fall)
    poison = [batch_row(f"{place}-poison", f"x{place}", model="tiny") for place in range(2)]
    batch = watch(client, start_batch(client, encode([poison[0], *rows_of(20), poison[1]]))["id"])
    assert batch["request_counts"] == {"total": 22, "completed": 20, "failed": 2}
    errors = outcome(client, batch)[1]
    assert [(line["custom_id"], line["error"]["code"]) for line in errors] == [
        ("0-poison", "server_error"),
        ("1-poison", "server_error"),
    ]
    assert "the wheel broke" in errors[0]["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_stopped_or_killed_goes_on(number: signal.Signals, tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--data", str(tmp_path), "--max-sequences", "4")
    with serving(tiny_model, *flags) as server, server.client() as client:
        name = start_batch(client, encode(rows_of(600, max_tokens=8)))["id"]
        watch(client, name, ("in_progress",), rows=1)
        assert server.stop(number) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    with serving(tiny_model, *flags) as server, server.client() as client:
        assert client.get(f"/v1/batches/{name}").json()["status"] in ("in_progress", "finalizing", "completed")
        batch = watch(client, name)
        assert batch["request_counts"] == {"total": 600, "completed": 600, "failed": 0}
        assert [line["custom_id"] for line in outcome(client, batch)[0]] == [f"row-{index}" for index in range(600)]
        assert server.stop() == 0
