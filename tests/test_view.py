"""The page of a run on this machine: SQL that is typed into it, and requests that are refused."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import DESKTOP, PHONE, Browser, asked, browse, complaints, needs_browser, open_page, wait
from conftest import outside_environment
from runs import BuiltRun, build_run
from seg_command import seg

from seg_core.run.query import query
from seg_core.view import site as site_module
from seg_core.view.server import HOST, MAX_BODY, ViewServer
from seg_core.view.site import RunSite

Headers = dict[str, str]
JSON_HEADER = {"Content-Type": "application/json"}
ENDLESS = "SELECT count(*) FROM range(10000000) a, range(10000000) b"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltRun:
    """A run of two scenes, of which a part failed."""
    return BuiltRun(*build_run(tmp_path_factory.mktemp("view"), failed_parts=[1]))


@pytest.fixture(scope="module")
def server(built: BuiltRun) -> Iterator[ViewServer]:
    with serving(RunSite(built.run)) as found:
        yield found


class serving:  # noqa: N801 - used like a function
    """A server of a site, in a thread."""

    def __init__(self, site: RunSite) -> None:
        self.server = ViewServer(site, 0)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    def __enter__(self) -> ViewServer:
        self.thread.start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.server.site.close()
        self.thread.join()


def request(
    server: ViewServer, method: str, path: str, headers: Headers | None = None, body: str | None = None
) -> tuple[int, str, Headers]:
    """What the server says to a request, whose path may be below the token."""
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=60)
    try:
        connection.request(method, path.replace("TOKEN", server.token), body, headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode(), dict(response.headers)
    finally:
        connection.close()


def ask(server: ViewServer, sql: str, headers: Headers | None = None) -> tuple[int, Any]:
    """The status and the answer to a query."""
    body = json.dumps({"sql": sql})
    status, text, _ = request(server, "POST", "/TOKEN/query", {**JSON_HEADER, **(headers or {})}, body)
    return status, json.loads(text) if status == 200 else text


def test_a_query_has_the_answer_of_seg_query(server: ViewServer, built: BuiltRun) -> None:
    sql = "SELECT scene_id, tile_row, coverage, mask FROM tiles ORDER BY 1, 2, tile_col"
    status, found = ask(server, sql)
    expected = query(built.run, sql).to_pylist()
    assert (status, found["columns"], found["note"]) == (200, ["scene_id", "tile_row", "coverage", "mask"], "")
    assert [row[:3] for row in found["rows"]] == [[*each.values()][:3] for each in expected]
    masks = [None if each["mask"] is None else f"<{len(each['mask']):,} bytes>" for each in expected]
    assert [row[3] for row in found["rows"]] == masks


def test_rows_are_capped_and_the_answer_says_so(server: ViewServer) -> None:
    _, found = ask(server, "SELECT range AS n FROM range(1001)")
    assert [row[0] for row in found["rows"]] == list(range(1000))
    assert found["note"].startswith("These are the first 1,000 rows")
    _, found = ask(server, "SELECT range AS n FROM range(1000)")
    assert (len(found["rows"]), found["note"]) == (1000, "")


def test_values_are_short_and_exact(server: ViewServer) -> None:
    sql = "SELECT repeat('x', 100000), 9007199254740993::HUGEINT, {'a': 1.5}, NULL, 'nan'::DOUBLE, DATE '2020-01-02'"
    sql += ", TIMESTAMP 'infinity'"
    _, found = ask(server, sql)
    (row,) = found["rows"]
    assert row == ["x" * 300 + " ...", "9007199254740993", '{"a": 1.5}', None, "nan", "2020-01-02", "infinity"]


@pytest.mark.parametrize(
    "sql",
    [
        "COPY tiles TO '{folder}/out.csv'",
        "ATTACH '{folder}/out.db'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '{folder}/run/run.json'",
        "SET enable_external_access = true",
        "CREATE TABLE mine AS SELECT 1",
        "SELECT 1; SELECT 2",
        "SELECT nothing FROM tiles",
        "SELEC",
        "",
    ],
)
def test_what_seg_query_refuses_is_refused_with_its_line(
    server: ViewServer, built: BuiltRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], sql: str
) -> None:
    sql = sql.replace("{folder}", str(tmp_path))
    (tmp_path / "run").symlink_to(built.run)
    status, found = ask(server, sql)
    _, err = seg(capsys, "query", built.run, sql, code=2)
    assert status == 200
    assert f"seg: {found['error']}\n" == err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_query_that_takes_too_long_is_stopped(built: BuiltRun) -> None:
    with serving(RunSite(built.run, seconds=0.2)) as server:
        _, found = ask(server, ENDLESS)
        assert found == {"error": "SQL: took longer than 0.2 s: seg query takes the time that it needs"}
        assert ask(server, "SELECT 1")[1]["rows"] == [[1]]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_this_machine_may_ask_by_each_of_its_names(server: ViewServer, name: str) -> None:
    host = f"{name}:{server.server_port}"
    assert ask(server, "SELECT 1", {"Host": host, "Origin": f"http://{host}"})[0] == 200


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Host", "example.com"),
        ("Host", "example.com:PORT"),
        ("Host", "127.0.0.1.example.com:PORT"),
        ("Host", "localhost"),
        ("Host", "localhost:1"),
        ("Host", ""),
        ("Origin", "http://example.com"),
        ("Origin", "http://localhost:1"),
        ("Origin", "https://localhost:PORT"),
        ("Origin", "null"),
    ],
)
def test_other_hosts_and_origins_are_refused(server: ViewServer, header: str, value: str) -> None:
    headers = {header: value.replace("PORT", str(server.server_port))}
    assert ask(server, "SELECT 1", headers)[0] == 403
    status, text, _ = request(server, "GET", "/TOKEN/", headers)
    assert status == 403
    assert "<html" not in text


def test_a_request_without_a_host_or_with_two_is_refused(server: ViewServer) -> None:
    for hosts in ("", f"Host: localhost:{server.server_port}\r\nHost: example.com\r\n"):
        with socket.create_connection((HOST, server.server_port), timeout=60) as connection:
            connection.sendall(f"GET /{server.token}/ HTTP/1.0\r\n{hosts}\r\n".encode())
            assert connection.makefile("rb").readline().startswith(b"HTTP/1.0 403")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/query", 404),
        ("GET", "/WRONG/", 404),
        ("GET", "/TOKEN/query", 404),
        ("GET", "/TOKEN/../../etc/passwd", 404),
        ("POST", "/query", 404),
        ("POST", "/TOKEN/", 404),
        ("PUT", "/TOKEN/query", 501),
        ("DELETE", "/TOKEN/", 501),
        ("OPTIONS", "/TOKEN/query", 501),
        ("HEAD", "/TOKEN/", 501),
    ],
)
def test_there_is_nothing_but_the_page_and_its_answers(server: ViewServer, method: str, path: str, status: int) -> None:
    assert request(server, method, path, JSON_HEADER, "{}" if method == "POST" else None)[0] == status


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, '{"sql": "SELECT 1"}', 415),
        ({"Content-Type": "text/plain"}, '{"sql": "SELECT 1"}', 415),
        (JSON_HEADER, '{"sql": 1}', 400),
        (JSON_HEADER, "[]", 400),
        (JSON_HEADER, "SELECT 1", 400),
        (JSON_HEADER, "x" * (MAX_BODY + 1), 413),
        ({**JSON_HEADER, "Content-Length": "many"}, "x", 413),
    ],
)
def test_what_is_no_question_is_refused(server: ViewServer, headers: Headers, body: str, status: int) -> None:
    assert request(server, "POST", "/TOKEN/query", headers, body)[0] == status


def test_only_this_machine_reaches_it(server: ViewServer) -> None:
    assert server.socket.getsockname() == ("127.0.0.1", server.server_port)
    _, _, headers = request(server, "GET", "/TOKEN/")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"


def test_a_page_is_made_anew_when_the_run_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = BuiltRun(*build_run(tmp_path))
    last = growing.path(2)
    content = last.read_bytes()
    last.unlink()
    made, make_page = [], site_module.make_page
    monkeypatch.setattr(site_module, "make_page", lambda *args, **given: made.append(1) or make_page(*args, **given))
    site = RunSite(growing.run)
    assert "not finished: 4 of 18 tiles" in site.page()
    assert "not finished: 4 of 18 tiles" in site.page()
    assert len(made) == 1
    last.write_bytes(content)
    assert "complete: all 18 tiles" in site.page()
    assert len(made) == 2


def test_an_error_that_nobody_expects_is_a_line_too(server: ViewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise ValueError("it\nbroke")

    monkeypatch.setattr(server.site, "ask", fail)
    assert ask(server, "SELECT 1") == (500, "seg: ValueError: it broke\n")


def test_a_run_that_is_gone_is_said_on_its_page(tmp_path: Path) -> None:
    run, _ = build_run(tmp_path)
    with serving(RunSite(run)) as server:
        Path(run).rename(tmp_path / "moved")
        status, text, _ = request(server, "GET", "/TOKEN/")
        assert status == 500
        assert text.startswith(f"seg: {run}")
        assert text.count("\n") == 1
        assert "error" in ask(server, "SELECT 1")[1]


def test_a_port_that_is_in_use_is_refused(
    server: ViewServer, built: BuiltRun, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = seg(capsys, "view", built.run, "--port", server.server_port, code=2)
    assert out == ""
    assert err == f"seg: --port {server.server_port}: is in use: name another one, or 0 for any that is free\n"


@pytest.mark.parametrize("port", ["65536", "-1", "x"])
def test_what_is_no_port_is_refused(built: BuiltRun, capsys: pytest.CaptureFixture[str], port: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        seg(capsys, "view", built.run, f"--port={port}")
    assert f"{port}: expected a port from 0 to 65535" in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = seg(capsys, "view", tmp_path, "--port", "0", code=2)
    assert out == ""
    assert err.startswith(f"seg: {tmp_path}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_it_serves_until_it_is_told_to_stop(built: BuiltRun, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "aerial_seg.cli.main", "view", built.run, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=outside_environment()) as process:
        assert process.stdout is not None
        url = urlsplit(json.loads(process.stdout.readline())["url"])
        connection = http.client.HTTPConnection(HOST, url.port, timeout=60)
        connection.request("POST", f"{url.path}query", json.dumps({"sql": ENDLESS}), JSON_HEADER)
        other = http.client.HTTPConnection(HOST, url.port, timeout=60)
        other.request("GET", url.path)
        assert other.getresponse().read().startswith(b"<!DOCTYPE html>")
        process.send_signal(number)
        assert process.wait(60) == code
        connection.close()
        other.close()


@pytest.fixture(scope="module", params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def browser(server: ViewServer, request: pytest.FixtureRequest) -> Iterator[Browser]:
    with browse(request.param) as found:
        open_page(found, server.url)
        yield found


def type_sql(browser: Browser, sql: str) -> None:
    """Type SQL into the box, and wait for the answer."""
    field, button = (browser.find_element("id", f"ask-{name}") for name in ("sql", "run"))
    field.clear()
    field.send_keys(sql)
    button.click()
    wait(browser, button.is_enabled)


@needs_browser
def test_sql_is_answered_by_a_table(browser: Browser, server: ViewServer) -> None:
    type_sql(browser, "SELECT scene_id, count(*) AS n FROM tiles GROUP BY 1 ORDER BY 1")
    answer = browser.find_element("id", "ask-answer")
    wait(browser, lambda: "north/a.tif" in answer.text)
    assert answer.text.split() == ["scene_id", "n", "north/a.tif", "12", "south/b.tif", "2"]
    assert browser.find_element("id", "ask-note").text == "2 rows"
    assert not complaints(browser)
    assert asked(browser) == {server.url, f"{server.url}query"}


@needs_browser
def test_wrong_sql_shows_its_line_until_the_next_answer(browser: Browser) -> None:
    line, answer = (browser.find_element("id", f"ask-{name}") for name in ("error", "answer"))
    type_sql(browser, "SELECT nothing FROM tiles")
    wait(browser, line.is_displayed)
    assert "nothing" in line.text
    assert "seg query RUN --schema lists the columns" in line.text
    assert not answer.is_displayed()
    type_sql(browser, "SELECT '<b>x</b>' AS text")
    wait(browser, answer.is_displayed)
    assert not line.is_displayed()
    assert "<b>x</b>" in answer.text
    assert not complaints(browser)


@needs_browser
def test_a_wide_answer_does_not_widen_the_page(browser: Browser) -> None:
    type_sql(browser, "SELECT * FROM tiles")
    wait(browser, lambda: browser.find_element("id", "ask-note").text == "14 rows")
    wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
