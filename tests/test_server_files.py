"""Files through their routes: what goes in comes out, in pages, to its owner alone, all of it or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from batch_app import batches_of, open_client, start_batch, upload, watch
from jobs import batch_row
from starlette.testclient import TestClient

from headrace.core import InputError
from headrace.server import files
from headrace.server.batch_object import FileObject
from headrace.server.store import Store, insert_file, now

ROW = json.dumps(batch_row("a", "x")).encode()


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_client(tmp_path_factory.mktemp("data"), tiny_model) as found:
        yield found


def test_a_file_comes_back_as_it_went_in(client: TestClient) -> None:
    content = os.urandom(3_000_000)
    data = {"purpose": "user_data"}
    file = client.post("/v1/files", files={"file": ("wheel ö.bin", content)}, data=data).json()
    assert file["object"] == "file" and file["bytes"] == len(content) and file["filename"] == "wheel ö.bin"
    assert file["purpose"] == "user_data" and file["status"] == "processed" and file["expires_at"] is None
    assert client.get(f"/v1/files/{file['id']}").json() == file
    answer = client.get(f"/v1/files/{file['id']}/content")
    assert answer.content == content and answer.headers["content-type"] == "application/octet-stream"
    assert client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    for answer in (client.get(f"/v1/files/{file['id']}"), client.delete(f"/v1/files/{file['id']}")):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "file_not_found"
    assert not batches_of(client).store.path_of(file["id"]).exists()


@pytest.mark.parametrize("name", ["../server.sqlite", "..%2Fserver.sqlite", ".", "server.lock"])
def test_no_other_file_can_be_had(client: TestClient, name: str) -> None:
    assert client.get(f"/v1/files/{name}/content").status_code == 404


def test_lists_come_in_pages_and_by_purpose(tiny_model: Path, tmp_path: Path) -> None:
    with open_client(tmp_path, tiny_model) as client:
        names = [upload(client, b"x", purpose=purpose) for purpose in ("batch", "user_data", "batch", "batch")]

        def ids(query: str) -> list[str]:
            return [file["id"] for file in client.get(f"/v1/files?{query}").json()["data"]]

        assert ids("") == names[::-1] and ids("order=asc") == names
        assert ids("purpose=user_data") == [names[1]] and ids("purpose=batch_output") == []
        assert ids(f"limit=2&after={names[3]}") == [names[2], names[1]]
        assert ids(f"order=asc&purpose=batch&after={names[0]}") == [names[2], names[3]]
        assert client.get(f"/v1/files?limit=3&after={names[3]}").json()["has_more"] is False
        assert client.get("/v1/files?limit=3").json()["has_more"] is True
        for wrong in ("limit=0", "limit=-1", "limit=x", "order=up", "purpose=fun", f"after={names[0]}x"):
            answer = client.get(f"/v1/files?{wrong}")
            assert answer.status_code == 400 and answer.json()["error"]["param"] == wrong.split("=")[0]


def test_files_are_their_owners(client: TestClient) -> None:
    name, bert = upload(client, b"secret", owner="anna"), {"x-owner": "bert"}
    assert client.get(f"/v1/files/{name}", headers=bert).status_code == 404
    assert client.get(f"/v1/files/{name}/content", headers=bert).status_code == 404
    assert client.delete(f"/v1/files/{name}", headers=bert).status_code == 404
    assert client.get("/v1/files", headers=bert).json()["data"] == []
    assert client.get(f"/v1/files?after={upload(client, b'x', owner='bert')}", headers=bert).json()["data"] == []
    assert client.get(f"/v1/files?after={name}", headers=bert).status_code == 400
    assert client.get(f"/v1/files/{name}/content", headers={"x-owner": "anna"}).content == b"secret"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "purpose"),
        ({"purpose": "fine-tune"}, 400, "purpose"),
        ({"purpose": "batch_output"}, 400, "purpose"),
        ({"purpose": "batch", "colour": "red"}, 400, "colour"),
        ({"purpose": "batch", "expires_after[seconds]": "3600"}, 400, "expires_after[anchor]"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "1"},
            400,
            "expires_after[seconds]",
        ),
    ],
)
def test_what_cannot_be_a_file(client: TestClient, fields: dict[str, str], status: int, param: str) -> None:
    answer = client.post("/v1/files", files={"file": ("a", b"x")}, data=fields)
    assert answer.status_code == status and answer.json()["error"]["param"] == param


def send_form(client: TestClient, charset: str, *heads: str) -> httpx.Response:
    """A form of parts with these headers, in a charset of the client's choice."""
    kind = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    parts = (f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\nbatch\r\n" for head in heads)
    return client.post("/v1/files", content="".join([*parts, "--b--\r\n"]).encode(), headers=kind)


def test_names_that_no_utf_8_can_spell(client: TestClient) -> None:
    purpose, half = 'name="purpose"', r"a\ud800"
    kept = send_form(client, "unicode_escape", purpose, f'name="file"; filename="{half}"')
    assert kept.status_code == 200 and kept.json()["filename"] == "a?"
    wrong = send_form(client, "unicode_escape", purpose, f'name="{half}"')
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "a?"
    unread = send_form(client, "undefined", purpose)
    assert unread.status_code == 400 and unread.json()["error"]["code"] == "invalid_form"


def test_forms_that_cannot_be_read(client: TestClient) -> None:
    boundary = {"content-type": "multipart/form-data; boundary=b"}
    wrong = client.post("/v1/files", content=b"folly", headers=boundary)
    assert wrong.status_code == 400 and wrong.json()["error"]["code"] == "invalid_form"
    head = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    head += b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf of'
    assert client.post("/v1/files", content=head, headers=boundary).json()["error"]["param"] == "file"
    assert client.post("/v1/files", json={"file": "x"}).json()["error"]["param"] == "file"
    empty = client.post("/v1/files", files={"file": ("a", b"")}, data={"purpose": "batch"})
    assert empty.status_code == 400 and empty.json()["error"]["code"] == "empty_file"
    two = [("file", ("a", b"x")), ("file", ("b", b"x"))]
    assert client.post("/v1/files", files=two, data={"purpose": "batch"}).json()["error"]["code"] == "invalid_form"


def test_a_file_that_is_too_large(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    before = client.get("/v1/files").json()["data"]
    answer = client.post("/v1/files", files={"file": ("a", b"x" * 1001)}, data={"purpose": "batch"})
    assert answer.status_code == 413 and "1,001 bytes" in answer.json()["error"]["message"]
    assert client.get("/v1/files").json()["data"] == before


def test_a_file_expires(client: TestClient) -> None:
    after = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = client.get(f"/v1/files/{upload(client, b'x', **after)}").json()
    assert file["expires_at"] == file["created_at"] + 3600
    store = batches_of(client).store
    old = FileObject(
        id="file-old", owner="", bytes=1, created_at=now(), filename="a", purpose="batch", expires_at=now() - 1
    )
    store.path_of(old.id).write_bytes(b"x")
    with store._change() as database:
        insert_file(database, old)
    assert client.get("/v1/files/file-old").status_code == 404
    assert "file-old" not in [each["id"] for each in client.get("/v1/files").json()["data"]]
    upload(client, b"x")
    assert not store.path_of(old.id).exists()


def test_the_input_of_a_batch_stays_until_it_is_done(client: TestClient) -> None:
    rows = b"\n".join(ROW.replace(b'"a"', b'"%d"' % index) for index in range(2000))
    batch = start_batch(client, rows)
    answer = client.delete(f"/v1/files/{batch['input_file_id']}")
    assert answer.status_code == 409 and batch["id"] in answer.json()["error"]["message"]
    client.post(f"/v1/batches/{batch['id']}/cancel")
    watch(client, batch["id"])
    assert client.delete(f"/v1/files/{batch['input_file_id']}").status_code == 200


def test_one_server_holds_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    code = f"from pathlib import Path\nfrom headrace.server.store import Store\nStore(Path({str(tmp_path)!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = f"InputError: {tmp_path} is in use by another server (process {os.getpid()}): stop it, or choose another"
    assert result.returncode == 1 and said in result.stderr
    store.close()
    Store(tmp_path).close()


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot hold a server's data"):
        Store(tmp_path / "file")
    (tmp_path / "server.sqlite").write_text("no database at all" * 100)
    with pytest.raises(InputError, match="cannot hold a server's data"):
        Store(tmp_path)
    assert not (tmp_path / "server.lock").exists()


def test_what_a_killed_server_left_behind_is_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = FileObject(id="file-a", owner="", bytes=1, created_at=now(), filename="a", purpose="batch")
    store.add_file(file, (tmp_path / "server.lock").open("rb"))
    store.close()
    for name in ("files/file-b", "files/file-c.part", "batches/batch_x.journal", "batches/batch_x.jsonl.part"):
        (tmp_path / name).write_text("x")
    store = Store(tmp_path)
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["file-a"]
    assert list((tmp_path / "batches").iterdir()) == []
    assert store.find_file("", "file-a") == file == msgspec.json.decode(msgspec.json.encode(file), type=FileObject)
    store.close()


def test_a_full_disk_refuses_a_file_and_keeps_nothing_of_it(tiny_model: Path, tmp_path: Path) -> None:
    mounted = ["mount", "-t", "tmpfs", "-o", "size=384k", "tmpfs", str(tmp_path)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        with open_client(tmp_path, tiny_model) as client:
            kept = upload(client, b"x")
            answer = client.post("/v1/files", files={"file": ("a", b"x" * 10**6)}, data={"purpose": "batch"})
            assert answer.status_code == 507 and answer.json()["error"]["code"] == "insufficient_storage"
            assert [file["id"] for file in client.get("/v1/files").json()["data"]] == [kept]
            assert [path.name for path in (tmp_path / "files").iterdir()] == [kept]
            assert client.get(f"/v1/files/{upload(client, b'y' * 1000)}/content").content == b"y" * 1000
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
