"""A run in an object store: steps work in it as in a folder, another machine goes on from it, one at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from tersor.cli import app
from tersor.errors import TersorError
from tersor.run import Run
from tersor.run.mirror import LEASE, Mirror, mirrored
from tersor.steps import build_plan, study
from tersor.urls import url_of
from tiny_models import small_net
from tiny_models import vector_batches as batches

OFTEN = 0.05  # seconds


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    yield f"memory://bucket/{request.node.name}"
    store.rm("/bucket", recursive=True)


def names_at(url: str) -> set[str]:
    store, root = fsspec.core.url_to_fs(url)
    store.invalidate_cache()
    return {str(path)[len(root) + 1 :] for path in store.find(root)}


def built(folder: Path, out: Path, options: dict[str, Any]) -> bytes:
    opened = study(small_net(), batches(4), folder, **options)
    build_plan(opened, opened.plan("5bits"), out)
    opened.run.close()
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        (Path("s3://bucket/a/run"), "s3://bucket/a/run"),
        (Path("file:///shared/run"), "file:///shared/run"),
        (Path("demo/run"), None),
        ("C:/runs/one", None),
        ("", None),
    ],
)
def test_what_is_a_url(place: str | Path, url: str | None) -> None:
    assert url_of(place) == url


def test_another_machine_goes_on_from_it(quick: dict[str, Any], url: str, tmp_path: Path) -> None:
    """Nothing is observed or drawn a second time, the artifact is the same, and what lies there is the whole run."""
    here = built(tmp_path / "plain", tmp_path / "out", quick)
    with mirrored(url, tmp_path / "first") as folder:
        study(small_net(), batches(4), folder, **quick).run.close()
        expected = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"run.lock"}
    assert names_at(url) == expected and LEASE not in expected
    with mirrored(url, tmp_path / "second") as folder:
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("summaries/**/*.safetensors")}
        assert before and built(folder, tmp_path / "there", quick) == here
        assert {p: p.stat().st_mtime_ns for p in before} == before
    with mirrored(url, tmp_path / "first") as folder:  # the copy of before is brought to what the second left
        run = Run(folder)
        assert len(run.plans()) == 1
        run.close()


def test_it_is_sent_while_steps_work(url: str, tmp_path: Path) -> None:
    """So that a machine that is lost takes the last seconds with it at most."""
    with mirrored(url, tmp_path, OFTEN) as folder:
        run = Run(folder, create=True)
        run.put("one", 1)
        deadline = time.monotonic() + 30
        while "run.db" not in names_at(url) and time.monotonic() < deadline:
            time.sleep(OFTEN)
        assert names_at(url) == {"run.db", LEASE}
        run.close()
    assert names_at(url) == {"run.db"}


def test_nothing_is_sent_twice(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    sent: list[str] = []
    store = type(fsspec.filesystem("memory"))
    put = store.put_file
    monkeypatch.setattr(store, "put_file", lambda s, a, b, **k: (sent.append(Path(b).name), put(s, a, b, **k))[1])
    for number in range(3):
        with mirrored(url, tmp_path) as folder:
            run = Run(folder, create=True)
            if number == 0:
                run.put_tensors("summaries/a", {"x": torch.ones(3)})
            run.put("fact", min(number, 1))
            run.close()
    assert sent == ["a.safetensors", "run.db", "run.db"]


def test_what_is_removed_on_one_side_is_removed_on_the_other(url: str, tmp_path: Path) -> None:
    import torch

    with mirrored(url, tmp_path) as folder:
        run = Run(folder, create=True)
        for name in ("a", "b"):
            run.put_tensors(name, {"x": torch.ones(3)})
        run.close()
    with mirrored(url, tmp_path) as folder:
        (folder / "a.safetensors").unlink()
    assert names_at(url) == {"b.safetensors", "run.db"}
    store, root = fsspec.core.url_to_fs(url)
    store.rm(root, recursive=True)
    with mirrored(url, tmp_path) as folder:
        assert not [p for p in folder.rglob("*") if p.name != "run.lock"]


def test_a_process_that_was_killed_goes_on_where_it_stopped(url: str, tmp_path: Path) -> None:
    """What it had not sent yet counts, as long as no other machine has worked there since."""
    with mirrored(url, tmp_path) as folder:
        run = Run(folder, create=True)
        run.put("one", 1)
    run.put("two", 2)  # as one does that is killed before the next sending
    run.close()
    with mirrored(url, tmp_path) as folder:
        run = Run(folder)
        assert run.get("two") == 2
        run.close()
    with mirrored(url, tmp_path / "other") as folder:
        run = Run(folder)
        assert run.get("two") == 2
        run.close()


def test_one_process_at_a_time(url: str, tmp_path: Path) -> None:
    store, root = fsspec.core.url_to_fs(url)
    lease = {"pid": 7, "host": "elsewhere", "until": time.time() + 60.0}
    store.pipe_file(f"{root}/{LEASE}", json.dumps(lease).encode())
    with pytest.raises(TersorError, match=r"Process 7 on elsewhere works in memory://.*; wait for it, or [56]\d s"):
        mirrored(url, tmp_path).__enter__()
    store.pipe_file(f"{root}/{LEASE}", json.dumps({**lease, "until": time.time() - 1.0}).encode())
    with mirrored(url, tmp_path):
        assert json.loads(store.cat_file(f"{root}/{LEASE}"))["pid"] == os.getpid()


def test_one_that_was_killed_here_is_not_waited_for(url: str, tmp_path: Path) -> None:
    store, root = fsspec.core.url_to_fs(url)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lease = {"pid": gone.pid, "host": socket.gethostname(), "until": time.time() + 60.0}
    store.pipe_file(f"{root}/{LEASE}", json.dumps(lease).encode())
    with mirrored(url, tmp_path):
        pass
    assert names_at(url) == set()


def test_a_lease_that_was_lost_ends_the_sending(url: str, tmp_path: Path) -> None:
    """A machine that slept, while another went on, overwrites nothing."""
    store, root = fsspec.core.url_to_fs(url)
    with pytest.raises(TersorError, match="Process 7 on elsewhere works in"), mirrored(url, tmp_path, 60) as folder:
        run = Run(folder, create=True)
        run.put("one", 1)
        run.close()
        lease = {"pid": 7, "host": "elsewhere", "until": time.time() + 60.0}
        store.pipe_file(f"{root}/{LEASE}", json.dumps(lease).encode())
    assert names_at(url) == {LEASE}


def test_a_failure_of_the_store_is_tried_again(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    put = Mirror._sent

    def failing(self: Mirror, name: str, path: Path) -> Any:
        if not failed.is_set():
            failed.set()
            raise ConnectionError("the network is down")
        return put(self, name, path)

    monkeypatch.setattr(Mirror, "_sent", failing)
    with mirrored(url, tmp_path, OFTEN) as folder:
        Run(folder, create=True).close()
        assert failed.wait(30)
    assert names_at(url) == {"run.db"}


def test_a_store_that_stays_away_is_told(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Mirror, name: str, path: Path) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr(Mirror, "_sent", failing)
    sentence = r"cannot be reached: the network is down; what was found is in .*, and the same command sends it\."
    with pytest.raises(TersorError, match=sentence), mirrored(url, tmp_path) as folder:
        Run(folder, create=True).close()


@pytest.mark.parametrize("name", ["../stray.safetensors", "a/../../stray"])
def test_a_name_that_lies_outside_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    found = {f"/bucket/run/{name}": {"size": 1, "created": 0}}
    monkeypatch.setattr(type(store), "find", lambda *_, **__: found)
    with pytest.raises(TersorError, match="which lies outside of it"):
        mirrored("memory://bucket/run", tmp_path / "cache").__enter__()
    assert not list(tmp_path.rglob("stray*")) and not store.exists(f"/bucket/run/{LEASE}")


@pytest.mark.parametrize("url", ["nowhere://bucket/run", "s3x://b"])
def test_a_scheme_that_nobody_knows_is_told(url: str, tmp_path: Path) -> None:
    with pytest.raises(TersorError, match=f"{url} cannot be reached: Protocol not known"):
        mirrored(url, tmp_path).__enter__()


def test_steps_do_not_take_it_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TersorError, match=r"s3://bucket/run is no folder here; open it by `with tersor\.mirrored\("):
        study(small_net(), batches(4), "s3://bucket/run")
    assert not list(tmp_path.iterdir())


def test_commands_take_a_url(quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any that fsspec knows: here a folder by its URL, with copies in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/shared/run"
    with mirrored(url) as folder:
        study(small_net(), batches(4), folder, **quick).run.close()
    found = CliRunner().invoke(app, ["plan", url, "--budget", "5bits", "--json"])
    assert found.exit_code == 0, found.output
    run = Run(tmp_path / "shared" / "run")
    assert run.plans() == ["5bits"]
    run.close()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An object server on this machine that speaks S3, with a bucket; its URL."""
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    known = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    old = {name: os.environ.get(name) for name in (*known, "AWS_DEFAULT_REGION")}
    os.environ.update(known, AWS_DEFAULT_REGION="us-east-1")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("runs")
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield "s3://runs/one"
    finally:
        server.kill()
        server.wait()
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_a_study_goes_on_from_an_object_server(quick: dict[str, Any], s3: str, tmp_path: Path) -> None:
    """Stopped on one machine, ended on another; the artifact is that of a folder here."""
    here = built(tmp_path / "plain", tmp_path / "out", quick)

    class Stopped(Exception):
        pass

    def stop(step: str, *_: Any) -> None:
        if step == "draw":
            raise Stopped

    with pytest.raises(Stopped), mirrored(s3, tmp_path / "first", OFTEN) as folder:
        study(small_net(), batches(4), folder, progress=stop, **quick)
    assert any(name.startswith("summaries/") for name in names_at(s3)) and LEASE not in names_at(s3)
    with mirrored(s3, tmp_path / "second", OFTEN) as folder:
        assert built(folder, tmp_path / "there", quick) == here
    assert "run.db" in names_at(s3)
