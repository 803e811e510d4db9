"""Corpora: contents decide what is prepared, stores are corpora too, and what cannot be measured is said at the start."""

import json
import os
import warnings

import pytest

from cairn.data import corpora, reading
from cairn.data.text import tokenizer, tokens
from cairn.data.text.tokenizer import byte_level
from cairn.errors import InputError, Notice


def write_text(path, text):
    path.write_text(text)
    return str(path)


def write_jsonl(path, text):
    path.write_text(json.dumps({"text": text}) + "\n")
    return str(path)


def write_parquet(path, text):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [text]}), path, use_dictionary=False, compression="none")
    return str(path)


def write_hf(path, text):
    datasets = pytest.importorskip("datasets")
    import shutil

    shutil.rmtree(path, ignore_errors=True)
    datasets.Dataset.from_dict({"text": [text]}).save_to_disk(path)
    return {"name": "hf", "path": str(path)}


def write_generated(path, text):
    from blake3 import blake3

    path.mkdir(exist_ok=True)
    data = (json.dumps({"text": text}) + "\n").encode()
    (path / "texts.jsonl").write_bytes(data)
    provenance = {"checkpoint": "0" * 64, "texts": blake3(data).hexdigest(), "sampling": {}}
    (path / "provenance.json").write_text(json.dumps(provenance))
    return {"name": "generated", "path": str(path)}


WRITERS = {"a.txt": write_text, "a.jsonl": write_jsonl, "a.parquet": write_parquet, "hf": write_hf, "generated": write_generated}


def times(folder):
    return {path: (path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("name", WRITERS)
def test_contents_decide_what_is_prepared(tmp_path, monkeypatch, name):
    """Other texts of the same size, at the same place, with the times set back, are another corpus; the same texts elsewhere are the same."""
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "data"
    home.mkdir()
    corpus = WRITERS[name](home / name, "one text and")
    before = times(home)
    first = tokens.prepare_cached(corpus, byte_level(), held_out=0.0)
    corpus = WRITERS[name](home / name, "and one text")
    for path, at in before.items():
        if path.exists():
            os.utime(path, ns=at)
    second = tokens.prepare_cached(corpus, byte_level(), held_out=0.0)
    assert second.digest != first.digest and byte_level().decode(second.train.tokens[1:].tolist()) == "and one text"
    moved = tmp_path / "moved"
    home.rename(moved)
    corpus = json.loads(json.dumps(corpus).replace(str(home), str(moved)))
    assert tokens.prepare_cached(corpus, byte_level(), held_out=0.0).path == second.path


def test_a_named_set_whose_file_was_changed_is_another(tmp_path, monkeypatch, real_data):
    import shutil

    from cairn.data import datasets

    spec = {"name": "dataset", "dataset": "tiny-shakespeare"}
    before = corpora.resolve(spec).fingerprint()
    shutil.copytree(datasets.find("tiny-shakespeare"), tmp_path / "tiny-shakespeare")
    monkeypatch.setenv("CAIRN_DATA", str(tmp_path))
    assert corpora.resolve(spec).fingerprint() == before
    path = next(path for path in (tmp_path / "tiny-shakespeare").iterdir() if path.suffix == ".txt")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"Citizen", b"Denizen", 1))
    assert corpora.resolve(spec).fingerprint() != before


def test_the_standard_library_alone_is_a_part_that_packages_do_not_change(tmp_path, monkeypatch):
    import sysconfig

    package = tmp_path / "site"
    package.mkdir()
    paths = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths | {"purelib": str(package), "platlib": str(package)})

    def found(part):
        corpus = corpora.resolve({"name": "python-source", "max_bytes": None, "part": part})
        return corpus.fingerprint(), [document.id for document in corpus.documents()]

    before = {part: found(part) for part in ("installation", "standard-library")}
    (package / "mine.py").write_text('"""Nobody else has this."""\n')
    after = {part: found(part) for part in before}
    assert after["standard-library"] == before["standard-library"] and after["installation"] != before["installation"]
    names = after["standard-library"][1]
    assert "json/decoder.py" in names and "mine.py" not in names and not any(name.startswith(("_sysconfigdata", "sitecustomize")) for name in names)
    assert "mine.py" in after["installation"][1]
    assert corpora.resolve({"name": "python-docs", "part": "standard-library"}).describe()["license"] == "PSF-2.0"


def test_what_is_read_is_noted_for_whoever_asks(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with reading.noted() as outer:
        with reading.noted() as inner:
            corpora.resolve({"name": "python-docs", "part": "standard-library", "max_bytes": "10 KiB"})
            corpora.resolve(str(tmp_path / "a.txt"))
        corpora.resolve("python-source")
    (name,) = inner
    assert name.startswith("python-docs {") and "standard-library" in name and len(outer) == 2
    again = corpora.resolve({"name": "python-docs", "part": "standard-library", "max_bytes": "10 KiB"})
    assert reading.digests(inner)[name]["digest"] == again.digest()
    with reading.noted() as none:
        pass
    corpora.resolve("python-docs")
    assert none == {}


@pytest.fixture
def prepared(tmp_path):
    """A store as `cairn data prepare` makes it, from a field that is not called text."""
    from typer.testing import CliRunner

    from cairn.cli.main import app

    rows = [{"body": f"Paragraph {number}: what is written here differs a little from its neighbours, number {number * 7}."} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = [
        "data",
        "prepare",
        str(tmp_path / "rows.jsonl"),
        "field=body",
        "--tokenizer",
        "bpe:300",
        "--held-out",
        "0.2",
        "-o",
        str(tmp_path / "store"),
        "--json",
    ]
    done = CliRunner().invoke(app, order)
    assert done.exit_code == 0, done.output
    return tmp_path / "store", json.loads(done.stdout)


def test_a_store_is_a_corpus_as_preparing_it_says(tmp_path, prepared, small_recipe):
    from cairn.training import recipe as recipes
    from cairn.training.run import train

    store, said = prepared
    use = [setting.replace("NAME", "walks") for setting in said["use"].split()]
    run = train(small_recipe, tmp_path / "run", [*use, "training.tokens=2 steps"])
    assert run.newest().tokenizer.digest == tokens.open_store(store).tokenizer_digest
    feed = recipes.load(run.path / "recipe.yaml").data.open(7, run.newest().tokenizer)[1]
    assert feed.sources[0].store.digest == said["digest"]
    with pytest.raises(InputError, match=r"prepared with another tokenizer; data\.tokenizer="):
        tokens.prepare_cached(str(store), byte_level())
    with pytest.raises(InputError, match="is a token store"):
        tokenizer.resolve_tokenizer({"bpe": 300}, [str(store)])


def test_a_setting_that_the_corpus_does_not_know_names_the_nearest(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert [document.text for document in corpora.with_settings(str(tmp_path / "a.jsonl"), ["field=body"]).documents()] == ["x"]
    with pytest.raises(InputError, match="field"):
        corpora.with_settings(str(tmp_path / "a.jsonl"), ["feild=body"])


def opened(recipe, changes):
    from cairn.training import recipe as recipes

    parsed = recipes.load(recipe).overridden(changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parsed.data.open(parsed.seed)
    return [str(warning.message) for warning in caught if issubclass(warning.category, Notice)]


def test_that_nothing_is_held_out_is_said_at_the_start(small_recipe, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"Book {number} is short.")
    source = f"data.sources.walks.corpus={tmp_path}/*.txt"
    (said,) = opened(small_recipe, [source, "data.held_out=0.01", "data.sequence_length=16"])
    assert "of 4 documents" in said and "data.held_out" in said
    assert opened(small_recipe, [source, "data.held_out=0", "data.sequence_length=16"]) == [] == opened(small_recipe, [])


def test_books_have_held_out_passages(small_recipe, tmp_path):
    """Four long files without a blank line: each is many documents, and some of them are held out."""
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("".join(f"Sentence {i} of book {number}. " for i in range(20_000)))
    assert opened(small_recipe, [f"data.sources.walks.corpus={tmp_path}/*.txt", "data.held_out=0.05"]) == []
