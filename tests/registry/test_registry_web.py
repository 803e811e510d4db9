"""The pages: what they show, what they refuse. Every rule of the guard has a request that breaks it."""

import html
import json
import re
import shutil
import time

import pytest

from cairn.errors import InputError
from cairn.registry.index import Index
from cairn.registry.query import find
from cairn.registry.statements import claim, describe
from cairn.registry.web import charts, guard, pages
from cairn.registry.web.server import _bind
from tests.cli.conftest import cairn  # noqa: F401

pytest.importorskip("starlette")
pytest.importorskip("jinja2")
from starlette.testclient import TestClient

from cairn.registry.web.app import create_app

HOME = "http://127.0.0.1:8420"
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7*7 }}"


@pytest.fixture
def tree(zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "zoo")
    return tmp_path / "zoo"


@pytest.fixture
def site(tree, tmp_path):
    """An index of a copy of the zoo, and a client that asks for its pages."""
    with Index(tmp_path / "i.sqlite") as index:
        index.add(tree)
        yield Site(index, TestClient(create_app(index.path), base_url=HOME))


class Site:
    """Index and client together."""

    def __init__(self, index, client):
        self.index, self.client = index, client

    def key(self, query):
        return find(self.index, query).rows[0]["key"]

    def run(self, name):
        return self.index.row("SELECT key FROM runs WHERE name = ?", (name,))["key"]

    def addresses(self):
        last, mixed, run = self.key("run:run step=20"), self.key("mixed"), self.run("run")
        return [
            *("/", "/runs", "/checkpoints", "/checkpoints?q=llama+step>=15", f"/run/{run}", f"/run/{run}/live"),
            *(f"/checkpoint/{last}", f"/checkpoint/{mixed}", f"/checkpoint/{last}/card", f"/checkpoint/{mixed}/risks", f"/lineage/{mixed}"),
            *(f"/compare?c={last}&c={mixed}", f"/compare?c={last}&c={mixed}&weights=1"),
        ]

    def form(self, key):
        return re.search(r'name="form" value="([^"]+)"', self.client.get(f"/checkpoint/{key}").text)[1]


def test_every_page_answers_and_loads_nothing_from_elsewhere(site):
    for address in site.addresses():
        answer = site.client.get(address)
        assert answer.status_code == 200, address
        assert "default-src 'none'" in answer.headers["content-security-policy"] and answer.headers["x-content-type-options"] == "nosniff"
        links = re.findall(r'(?:src|href|action)="([^"]*)"', answer.text)
        assert all(link.startswith("/") and not link.startswith("//") for link in links), address
        assert "<script>" not in answer.text and " style=" not in answer.text and not re.search(r"\son\w+=", answer.text)


def test_nothing_is_written_by_looking(site, tree):
    def state():
        return {path: path.stat().st_mtime_ns for path in tree.rglob("*")}

    before, rows = state(), site.index.rows("SELECT * FROM checkpoints ORDER BY key")
    for address in site.addresses():
        site.client.get(address)
    assert state() == before and site.index.rows("SELECT * FROM checkpoints ORDER BY key") == rows


def test_pages_show_what_was_measured(site):
    key = site.key("run:run step=20")
    (loss,) = [row for row in site.index.results(key) if row["metric"] == "loss"]
    text = site.client.get(f"/checkpoint/{key}").text
    assert charts.number(loss["value"]) in text and charts.number(loss["value"] - 1.96 * loss["stderr"]) in text
    live = site.client.get(f"/run/{site.run('run')}/live").text
    points = json.loads(html.unescape(re.search(r'data-name="training" data-points="([^"]+)"', live)[1]))
    rows = [
        json.loads(line) for line in (pages.Path(site.index.row("SELECT path FROM runs WHERE name = 'run'")["path"]) / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(x, y) for *_, x, y in points] == [(row["tokens"], row["loss"]) for row in rows]
    assert "measured: held-out, loss" in live


def test_claims_stand_against_measurements(site, tree):
    key = site.key("run:run step=20")
    (loss,) = [row for row in site.index.results(key) if row["metric"] == "loss"]
    claim(tree / "run/checkpoints/step-00000020", "loss", 1.0, stderr=0.01, task={"name": "held-out", "sequences": 8})
    site.index.refresh()
    text = site.client.get(f"/checkpoint/{key}").text
    assert "over-claimed" in text and charts.number(loss["value"]) in text


def test_lineage_can_be_walked_box_by_box(site):
    seen, todo = set(), [f"/lineage/{site.key('mixed')}"]
    while todo:
        address = todo.pop()
        if address not in seen:
            seen.add(address)
            todo += re.findall(r'<a href="(/lineage/[^"]+)"', site.client.get(address).text.split('class="lineage"')[1])
    keys = {f"/lineage/{row['key']}" for row in site.index.rows("SELECT key FROM checkpoints")}
    assert seen == keys


def test_a_run_is_seen_as_it_trains(site, tree):
    key = site.run("run")
    first = site.client.get(f"/run/{key}/live")
    again = site.client.get(f"/run/{key}/live", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    with (tree / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "tokens": 4000, "loss": 0.125, "learning_rate": 1e-3, "tokens_per_second": 9000.0, "held-out/loss": 7.5}) + "\n")
    now = site.client.get(f"/run/{key}/live", headers={"If-None-Match": first.headers["etag"]})
    assert now.status_code == 200 and "0.125" in now.text and "held out <b>7.5" in now.text and "training</span>" in now.text
    site.index.refresh()
    assert "Training now" in site.client.get("/").text


def test_the_prompt_box_writes_what_the_command_writes(site, tree):
    from cairn.generation.text import generate

    key = site.key("mixed")
    fields = {"form": site.form(key), "prompt": "the stone ", "new_tokens": "8", "temperature": "0.5", "seed": "3"}
    answer = site.client.post(f"/checkpoint/{key}/generate", data=fields, headers={"origin": HOME})
    expected = generate(tree / "mixed", "the stone ", new_tokens=8, temperature=0.5, seed=3)
    assert answer.status_code == 200 and html.escape(expected, quote=False) in answer.text.replace("&#39;", "'").replace("&#34;", '"')
    for wrong in ({"new_tokens": "many"}, {"new_tokens": "100000"}, {"temperature": "nan"}, {"seed": "-1"}):
        answer = site.client.post(f"/checkpoint/{key}/generate", data=fields | wrong)
        assert answer.status_code == 200 and 'class="problem"' in answer.text and 'class="written"' not in answer.text


def test_the_prompt_box_talks_where_there_is_a_template(site, tree, tmp_path):
    from cairn.checkpoint.foreign.export import export
    from cairn.generation.text import generate

    assert 'name="chat"' not in site.client.get(f"/checkpoint/{site.key('mixed')}").text
    folder = tmp_path / "zoo" / "talker"
    export(tree / "mixed", folder)
    for name in ("manifest.json", "lineage.json"):
        (folder / name).unlink()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    site.index.add(folder.parent)
    key = site.key("talker")
    assert 'name="chat"' in site.client.get(f"/checkpoint/{key}").text
    fields = {"form": site.form(key), "prompt": "the <b>stone", "new_tokens": "8", "temperature": "0", "chat": "yes"}
    answer = site.client.post(f"/checkpoint/{key}/generate", data=fields, headers={"origin": HOME}).text
    expected = generate(folder, "the <b>stone!", new_tokens=8, temperature=0)
    assert f"<b>the &lt;b&gt;stone</b>\n{html.escape(expected, quote=False)}" in answer.replace("&#39;", "'").replace("&#34;", '"')
    (folder / "chat_template.jinja").write_text("{% if %}")
    assert "has a syntax error in line 1" in site.client.post(f"/checkpoint/{key}/generate", data=fields, headers={"origin": HOME}).text


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"headers": {"origin": "http://evil.example"}}, 403),
        ({"headers": {"origin": "null"}}, 403),
        ({"headers": {"sec-fetch-site": "cross-site"}}, 403),
        ({"headers": {"host": "evil.example"}}, 421),
        ({"headers": {"host": "evil.example:8420", "origin": "http://evil.example:8420"}}, 421),
        ({"data": {"form": "guessed", "prompt": "a"}}, 403),
        ({"data": {"prompt": "a"}}, 403),
        ({"content": b'{"prompt": "a"}', "headers": {"content-type": "application/json"}}, 415),
        ({"data": {"form": "x", "prompt": "a" * 70_000}}, 413),
        ({"method": "GET"}, 405),
        ({"method": "PUT"}, 405),
        ({"method": "DELETE"}, 405),
    ],
)
def test_forms_from_elsewhere_are_refused(site, change, status):
    key = site.key("mixed")
    request = {"method": "POST", "data": {"form": site.form(key), "prompt": "the ", "new_tokens": "1"}} | change
    if "content" in request or request["method"] != "POST":
        request.pop("data")
    answer = site.client.request(url=f"/checkpoint/{key}/generate", **request)
    assert answer.status_code == status and 'class="written"' not in answer.text


def test_a_foreign_name_for_this_machine_is_refused(site):
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::ffff:evil]"):
        assert site.client.get("/", headers={"host": host}).status_code == 421
    for host in ("localhost:8420", "127.0.0.1", "[::1]:8420", "LOCALHOST"):
        assert site.client.get("/", headers={"host": host}).status_code == 200


def test_elsewhere_a_token_is_asked_for(site):
    app = create_app(site.index.path, hosts=None, token="s3cret-stone")
    client = TestClient(app, base_url="http://10.0.0.7:8420", follow_redirects=False)
    for answer in (client.get("/"), client.get("/?token=wrong"), client.get("/static/cairn.css"), client.post("/checkpoint/x/generate", data={"form": "x"})):
        assert answer.status_code == 401 and "checkpoint/" not in answer.text
    assert client.get("/", headers={"authorization": "Bearer s3cret-stone"}).status_code == 200
    entered = client.get("/runs?token=s3cret-stone")
    assert entered.status_code == 303 and entered.headers["location"] == "/runs" and "HttpOnly; SameSite=Strict" in entered.headers["set-cookie"]
    assert client.get("/runs").status_code == 200


@pytest.mark.parametrize("path", ["//evil.com/", "///evil.com/x", "/%5cevil.com/", "/%5C%5Cevil.com", "//evil.com:80//", "/\\evil.com"])
def test_the_token_leads_to_a_path_of_this_server_alone(site, path):
    client = TestClient(create_app(site.index.path, hosts=None, token="s3cret-stone"), base_url="http://10.0.0.7:8420", follow_redirects=False)
    scope = client.get(f"http://10.0.0.7:8420{path}?token=s3cret-stone&q=a%20b")
    where = scope.headers["location"]
    assert scope.status_code == 303 and where.startswith("/") and not where.startswith(("//", "/\\")) and where.endswith("?q=a+b")


@pytest.mark.parametrize("token", [None, "", " ", "\n"])
def test_an_empty_token_is_no_token(site, tmp_path, monkeypatch, token):
    from cairn.registry.web import server

    with pytest.raises(InputError, match="need a token"):
        create_app(site.index.path, hosts=None, token=token)
    with pytest.raises(InputError, match="need a token"):
        create_app(site.index.path, hosts={"10.0.0.7"}, token=token)
    assert TestClient(create_app(site.index.path, token=token), base_url=HOME).get("/").status_code == 200, "on the loopback none is needed"
    told = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: told.append(self.config.app))
    server._run([], host="0.0.0.0", port=0, token=token, index=tmp_path / "new.sqlite", refresh=9.0, device=None, ready=told.append)
    address, app = told
    drawn = re.search(r"\?token=([A-Za-z0-9_-]{30,})$", address)[1]
    client = TestClient(app, base_url="http://10.0.0.7:8420")
    assert client.get("/").status_code == 401 and client.get("/?token=").status_code == 401
    assert client.get("/", headers={"authorization": f"Bearer {drawn}"}).status_code == 200


@pytest.mark.parametrize("token", ["short", "with a blank in it", "semi;colon;token", "x" * 300, "ünïcödé-token"])
def test_a_token_that_is_guessed_or_does_not_fit_an_address_is_refused(site, token):
    with pytest.raises(InputError, match="A token has 8 to 256"):
        create_app(site.index.path, hosts=None, token=token)


OUTWARD = [
    *("/checkpoint/..%2f..%2fetc%2fpasswd", "/checkpoint/%2fetc", "/run/../../etc/passwd/live", "/static/..%2fapp.py", "/static/%2e%2e/guard.py"),
    *("/static/app.py", "/lineage/' OR 1=1 --", "/compare?c=../../etc&c=b", "/nothing"),
]


@pytest.mark.parametrize("address", OUTWARD)
def test_no_address_leads_out_of_the_index(site, address):
    answer = site.client.get(address)
    assert answer.status_code == 404 and "root:" not in answer.text and "import" not in answer.text


def test_links_that_lead_out_of_the_folders_are_not_followed(tree, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "recipe.yaml").write_text("password: hunter2")
    (secret / "rows.jsonl").write_text(json.dumps({"step": 20, "tokens": 1, "loss": 1.0, "prompt": "", "text": "hunter2"}) + "\n")
    for name, target in (("samples.jsonl", "rows.jsonl"), ("metrics.jsonl", "rows.jsonl"), ("recipe.yaml", "recipe.yaml")):
        (tree / "run" / name).unlink(missing_ok=True)
        (tree / "run" / name).symlink_to(secret / target)
    (tree / "branch/samples.jsonl").unlink(missing_ok=True)
    (tree / "branch/samples.jsonl").symlink_to(secret / "rows.jsonl")
    (tree / "mixed/README.md").symlink_to(secret / "recipe.yaml")
    with Index(tmp_path / "i.sqlite") as index:
        report = index.add(tree)
        assert any("leads out" in problem for problem in report.problems) and report.runs == 1
        client = TestClient(create_app(index.path), base_url=HOME)
        addresses = [
            "/",
            "/runs",
            *(f"/checkpoint/{row['key']}" for row in index.rows("SELECT key FROM checkpoints")),
            f"/run/{index.row('SELECT key FROM runs')['key']}",
        ]
        assert all("hunter2" not in client.get(address).text for address in addresses)
        # A place that has become a link since it was indexed is not opened either.
        key = find(index, "average").rows[0]["key"]
        shutil.move(tree / "average", secret / "average")
        (tree / "average").symlink_to(secret / "average")
        assert client.get(f"/checkpoint/{key}/card").status_code == 404


def test_hostile_names_and_metadata_are_escaped(tree, tmp_path):
    (tree / "mixed").rename(tree / '<b>mixed & "co"\'')
    place = tree / '<b>mixed & "co"\''
    for what in (place, tree / "run"):
        describe(what, [f"{name}={json.dumps(HOSTILE)}" for name in ("name", "license", "intended_use", "limitations", "citation", "paper")])
    claim(place, HOSTILE, 1.0, dataset=HOSTILE, claimed_by=HOSTILE)
    with (tree / "run/samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "tokens": 1, "prompt": HOSTILE, "text": HOSTILE}) + "\n")
    with (tree / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "tokens": 6000, "loss": 1.0, f"x/{HOSTILE}": 2.0, "tokens_per_second": "fast", "learning_rate": None}) + "\n")
    with Index(tmp_path / "i.sqlite") as index:
        index.add(tree)
        site = Site(index, TestClient(create_app(index.path), base_url=HOME))
        hostile = index.row("SELECT key FROM checkpoints WHERE path LIKE '%mixed%'")["key"]
        key = index.row("SELECT key FROM checkpoints WHERE path LIKE '%/run/%20'")["key"]
        run = site.run("run")
        asked = [*("/", "/runs", f"/run/{run}", f"/run/{run}/live", f"/compare?c={key}&c={hostile}", f"/checkpoints?q={HOSTILE}")]
        asked += [
            f"/{page}/{each}{more}"
            for each in (key, hostile)
            for page, more in (("checkpoint", ""), ("checkpoint", "/card"), ("checkpoint", "/risks"), ("lineage", ""))
        ]
        for address in asked:
            text = site.client.get(address).text
            assert "<script>alert" not in text and "<img" not in text.replace('<img src="/static/cairn.svg"', "") and "<b>mixed" not in text, address
            assert ">49<" not in text
        assert "&lt;script&gt;" in site.client.get("/").text


@pytest.mark.parametrize("bad", [["--host", "256.1.1.1"], ["--port", "70000"]])
def test_serving_where_one_can_not_is_a_sentence(bad, cairn, tmp_path):  # noqa: F811
    answer = cairn("serve", "--index", tmp_path / "i.sqlite", *bad)
    assert answer.status == 2 and "Traceback" not in answer.err


def test_a_port_that_is_taken_is_told():
    bound = _bind("127.0.0.1", 0)
    bound.listen()
    with pytest.raises(InputError, match="--port"):
        _bind("127.0.0.1", bound.getsockname()[1])
    bound.close()


def test_curves():
    assert charts.ticks(0, 10) == [0, 2.5, 5, 7.5, 10] and charts.ticks(3, 3) == [3]
    many = [(float(i), float(i % 7)) for i in range(10_000)] + [(1e4, float("nan"))]
    thin = charts.thinned(many)
    assert len(thin) <= 300 and thin[-1] == (9999.0, 9999 % 7) and thin == sorted(thin)
    assert "nothing yet" in charts.lines("loss", []) and "<svg" in charts.lines("loss", [charts.Series("a", [(1.0, 2.0)])])
    assert [charts.number(value) for value in (1_234_567, 0.000012, 3.14159, 12_345)] == ["1.23M", "1.2e-05", "3.142", "12.3k"]


def test_guard_reads_hosts():
    assert [guard.host_of(h) for h in ("a:80", "[::1]:80", "A", "", "[::1")] == ["a", "::1", "a", "", ""]


def test_a_run_at_rest_is_not_running():
    run = {"updated": time.time() - 10, "total_units": 100, "units": 50}
    assert pages.is_running(run) and not pages.is_running(run | {"units": 100}) and not pages.is_running(run | {"updated": time.time() - 1000})
