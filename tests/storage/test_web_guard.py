"""Who is let in, and what every answer says to a browser."""

import pytest

testclient = pytest.importorskip("starlette.testclient", reason="pip install 'logitcache[web]'")

from starlette.applications import Starlette  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from logitcache_storage.web.guard import POLICY, Access, Guard, access_for, is_loopback  # noqa: E402

TOKEN = "t" * 32


def client(access, host="127.0.0.1:8765"):
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("inside"))])
    return testclient.TestClient(Guard(app, access), base_url=f"http://{host}", raise_server_exceptions=False)


def test_every_answer_forbids_what_no_page_needs():
    pages = client(Access(None))
    for answer in (pages.get("/"), pages.get("/nowhere"), pages.post("/"), client(Access(TOKEN)).get("/")):
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
    rules = dict(rule.strip().split(" ", 1) for rule in POLICY.split(";"))
    assert rules["default-src"] == "'none'" and rules["script-src"] == rules["style-src"] == "'self'"
    assert "unsafe" not in POLICY and "*" not in POLICY and rules["frame-ancestors"] == "'none'"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_there_is_nothing_to_write(method):
    answer = client(Access(None)).request(method, "/")
    assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD" and "read-only" in answer.text


def test_head_is_answered():
    assert client(Access(None)).head("/").status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9000", "127.0.0.1", "LOCALHOST:8765", "[::1]:8765", "[::1]", "127.0.0.2:8765"]
)
def test_this_machine_may_be_called_by_its_own_names(host):
    assert client(Access(None)).get("/", headers={"host": host}).text == "inside"


@pytest.mark.parametrize(
    "host",
    ["attacker.example", "attacker.example:8765", "localhost.attacker.example", "127.0.0.1.nip.io", "", "0.0.0.0"],
)
def test_a_name_that_was_made_to_point_here_is_refused(host):
    answer = client(Access(None)).get("/", headers={"host": host})
    assert answer.status_code == 403 and "localhost" in answer.text and "inside" not in answer.text


def test_without_the_token_nothing_is_shown():
    pages = client(Access(TOKEN), host="machine.example:8765")
    for address in ("/", "/static/x", "/?token=", f"/?token={TOKEN[:-1]}", "/?token=é", f"/?Token={TOKEN}"):
        answer = pages.get(address)
        assert answer.status_code == 403 and "inside" not in answer.text and "set-cookie" not in answer.headers
    assert pages.get("/", headers={"cookie": 'logitcache="; x'}).status_code == 403
    assert pages.get("/", headers={"cookie": f"logitcache={TOKEN[:-1]}u"}).status_code == 403


def test_the_token_is_kept_so_that_links_work():
    pages = client(Access(TOKEN, "logitcache-8765"), host="machine.example:8765")
    answer = pages.get(f"/?token={TOKEN}")
    assert answer.text == "inside"
    kept = answer.headers["set-cookie"].split("; ")
    assert kept[0] == f"logitcache-8765={TOKEN}" and {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(kept)
    again = pages.get("/")
    assert again.text == "inside" and "set-cookie" not in again.headers


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        *((host, True) for host in ("127.0.0.1", "127.0.0.53", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.1.7", "machine.example", "localhost.evil", "")),
    ],
)
def test_only_the_loopback_interface_goes_without_a_token(host, is_local):
    assert is_loopback(host) == is_local
    access = access_for(host, 8765)
    assert (access.token is None) == is_local
    if not is_local:
        assert len(access.token) >= 32 and access.token != access_for(host, 8765).token
