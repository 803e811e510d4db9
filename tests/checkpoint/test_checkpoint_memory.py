"""Snapshots in memory: no death leaves half of one, no loss that parity covers loses a byte, and nothing partial is given back."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from cairn.checkpoint.format import read, verify
from cairn.checkpoint.format.documents import as_json
from cairn.checkpoint.format.lineage import Lineage
from cairn.checkpoint.format.parts import Part
from cairn.checkpoint.memory import attend, link
from cairn.checkpoint.memory.area import BODY, CLEAN
from cairn.checkpoint.memory.keeper import Server
from cairn.checkpoint.memory.link import Link, Settings
from cairn.checkpoint.memory.persist import persist
from cairn.checkpoint.memory.plan import find
from cairn.checkpoint.memory.restore import MemoryReader, Snapshot
from cairn.checkpoint.memory.snapshots import Snapshots, groups
from cairn.checkpoint.saving import write
from cairn.checkpoint.saving.write import spec_of
from cairn.errors import DamagedError, InputError, NotFoundError
from tests.checkpoint.test_checkpoint_area import header
from tests.checkpoint.test_checkpoint_parts import played
from tests.faults import flip

LINEAGE = Lineage(kind="run", name="train")


class Nodes:
    """Keepers of `size` nodes of which each has its own memory; jobs are played by threads."""

    def __init__(self, folder, size, parity, addresses=None):
        self.run, self.parity, self.folder = folder / "run", parity, folder
        (self.run / link.KEEPERS).mkdir(parents=True)
        self.settings = [
            Settings(run=str(self.run), name=f"n{r}-0", node=f"n{r}", folder=str(folder / f"m{r}"), address=(addresses or ["127.0.0.1"] * size)[r])
            for r in range(size)
        ]
        self.servers = {rank: Server(settings) for rank, settings in enumerate(self.settings)}
        self.size = size
        self.said = []

    def job(self, action, size=None, **options):
        """`action(snapshots, peers)` of each process of a job; an error of one is raised here."""
        size = size or self.size

        def play(peers):
            group = groups([f"n{r}" for r in range(size)], 8, self.parity)[peers.rank]
            snapshots = Snapshots(self.settings[peers.rank], group, self.parity, peers, say=self.said.append, **options)
            return action(snapshots, peers)

        results = played(size, play)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def save(self, *steps, commit=lambda rank, step: True):
        """A job that makes snapshots of these steps and dies; waits until the last is as whole as it gets."""

        def action(snapshots, peers):
            for step in steps:
                specs, parts = described(step, peers.rank, peers.size)
                if not snapshots.begin(step, specs, parts, files(step)):
                    continue
                for stem, mine in parts.items():
                    for part in mine:
                        snapshots.put(stem, part, state(step)[stem][part.name][part.slices])
                if commit(peers.rank, step):
                    snapshots.commit()
            if snapshots._last is not None:
                snapshots._ask("protected", wait=20 if all(commit(rank, steps[-1]) for rank in range(peers.size)) else 0.5, **snapshots._last._asdict())
            peers.gather(None)
            snapshots._link.close()

        self.job(action)

    def lose(self, rank):
        """A node and its memory are gone."""
        server = self.servers.pop(rank)
        server.close()
        server.keeper.close()
        shutil.rmtree(server.home.folder)

    def end(self):
        for rank in list(self.servers):
            self.lose(rank)


@pytest.fixture
def nodes(tmp_path, request):
    made = []

    def make(size, parity=1, **options):
        made.append(Nodes(tmp_path / f"nodes-{len(made)}", size, parity, **options))
        link.allow(made[-1].run)  # its keepers were started by other processes
        return made[-1]

    yield make
    for each in made:
        each.end()


def test_a_keeper_that_ends_as_it_is_attached_to_is_looked_for_again(nodes, monkeypatch):
    ask, left = Link.ask, [2]

    def failing(self, act, **fields):
        if act == "attach" and left[0]:
            left[0] -= 1
            raise link.GoneError("it has just gone")
        return ask(self, act, **fields)

    monkeypatch.setattr(Link, "ask", failing)
    nodes(1).save(1)
    assert left == [0]
    left[0] = 3  # one that is never there is not looked for for ever
    with pytest.raises(link.GoneError):
        nodes(1).save(1)


def state(step):
    """A state that shows its step in every item; odd shapes, several dtypes, more than one block."""
    generator = torch.Generator().manual_seed(step)
    model = {"w": torch.randn(701, 1503, generator=generator) + step, "b": torch.randn(5, generator=generator).to(torch.bfloat16)}
    return {"model": model, "optimizer": {"w/exp_avg": torch.randn(701, 1503, generator=generator), "w/step": torch.tensor(float(step))}}


def files(step):
    documents = {"config.json": {"model_type": "x"}, "trainer.json": {"step": step, "tokens": 10 * step}, "lineage.json": LINEAGE.model_dump(mode="json")}
    return {name: as_json(document) for name, document in documents.items()}


def described(step, rank, size):
    """Specs of all tensors, and this rank's rows of `w` and its share of the rest."""
    specs = {stem: [spec_of(name, tensor) for name, tensor in tensors.items()] for stem, tensors in state(step).items()}
    block = -(-701 // size)
    first, last = min(rank * block, 701), min((rank + 1) * block, 701)
    rows = {"model": ["w"], "optimizer": ["w/exp_avg"]}
    parts = {stem: [Part(name, (first, 0), (last - first, 1503)) for name in names if last > first] for stem, names in rows.items()}
    if rank == size - 1:
        parts["model"].append(Part("b", (0,), (5,)))
        parts["optimizer"].append(Part("w/step", (), ()))
    return specs, parts


def same(snapshot, step):
    """Whether a snapshot is the state of a step to the last bit."""
    folders = {"model": snapshot.tensors, "optimizer": snapshot.optimizer}
    return snapshot.step == step and all(torch.equal(folders[stem][name].load(), tensor) for stem, ts in state(step).items() for name, tensor in ts.items())


@pytest.mark.parametrize(("size", "parity"), [(2, 1), (3, 1), (5, 1), (4, 2), (5, 3)])
def test_every_loss_within_the_parity_is_rebuilt_and_every_greater_one_is_refused(size, parity, nodes):
    cluster = nodes(size, parity)
    cluster.save(3)
    whole = find(cluster.run)
    assert same(Snapshot(whole), 3) and len(whole.parity) == size
    for count in range(1, size + 1):
        for lost in itertools.combinations(range(size), count):
            rest = type(whole)(
                whole.run, whole.version, {r: s for r, s in whole.data.items() if r not in lost}, {r: s for r, s in whole.parity.items() if r not in lost}
            )
            assert (count < size and rest.whole()) is (count <= parity), lost
            if count == parity and lost[0] < 2:
                snapshot = Snapshot(rest)
                assert same(snapshot, 3) and snapshot.memory.rebuilt
    for rank in range(parity):
        cluster.lose(rank)
    assert same(Snapshot(find(cluster.run)), 3)
    cluster.lose(parity)
    assert find(cluster.run) is None


def test_a_version_without_its_parity_survives_trainers_and_not_a_node(nodes):
    cluster = nodes(3)
    cluster.save(2)
    for server in cluster.servers.values():
        for area in server.keeper.parity:
            area.clear()
    assert same(Snapshot(find(cluster.run)), 2)
    cluster.lose(1)
    assert find(cluster.run) is None


def test_processes_at_different_versions_go_back_to_the_newest_that_all_have(nodes):
    cluster = nodes(3)
    cluster.save(2, 4, commit=lambda rank, step: step == 2 or rank == 1)
    held = {area.header.step for area in cluster.servers[1].keeper.data if area.clean}
    assert held == {2, 4} and find(cluster.run).version.step == 2
    cluster.lose(0)
    assert same(Snapshot(find(cluster.run)), 2)


def test_the_version_before_stays_until_the_new_one_is_whole_everywhere(nodes):
    """A member that never commits holds everyone back: step 6 is left out rather than written over step 2."""
    cluster = nodes(3)

    def action(snapshots, peers):
        done = []
        for step in (2, 4, 6):
            specs, parts = described(step, peers.rank, peers.size)
            done.append(snapshots.begin(step, specs, parts, files(step)))
            if done[-1]:
                for stem, part in ((stem, part) for stem, mine in parts.items() for part in mine):
                    snapshots.put(stem, part, state(step)[stem][part.name][part.slices])
                if step == 4 and peers.rank == 2:
                    snapshots._last = snapshots._version  # believes it has committed, as if its message were still on the way
                    snapshots._slot = -1
                else:
                    snapshots.commit()
        snapshots._link.close()
        return done

    assert cluster.job(action, wait=5) == [[True, True, False]] * 3
    assert any("left out" in text or "not whole" in text for text in cluster.said)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(area.state == 1 for server in cluster.servers.values() for area in server.keeper.data):
        time.sleep(0.02)
    assert same(Snapshot(find(cluster.run)), 2)


def damage(server, kind, block):
    """Flip a byte in a block of the clean area of a kind."""
    area = next(area for area in getattr(server.keeper, kind) if area.state == CLEAN)
    flip(area.path, BODY + area.header.table + block * 4 * 2**20 + 11)


def test_a_damaged_block_is_an_erasure(nodes):
    cluster = nodes(3)
    cluster.save(2, 4)
    newest = next(area for area in cluster.servers[1].keeper.data if area.header.step == 4)
    flip(newest.path, BODY + newest.header.table + 999)
    plan = find(cluster.run)
    assert plan.version.step == 4 and plan.data[1].damaged == (0,)
    snapshot = Snapshot(plan)
    assert same(snapshot, 4) and snapshot.memory.rebuilt == 1
    newest = next(area for area in cluster.servers[2].keeper.data if area.header.step == 4)
    flip(newest.path, BODY + newest.header.table + 999)
    assert same(Snapshot(find(cluster.run)), 2), "two erasures in one stripe: the version before is whole"


def test_damage_after_the_look_is_an_error_and_not_a_wrong_number(nodes):
    cluster = nodes(2, 0)
    cluster.save(2)
    plan = find(cluster.run)
    damage(cluster.servers[1], "data", 0)
    with pytest.raises(DamagedError, match="process 1"):
        MemoryReader(plan).read(1, 0, 100, memoryview(bytearray(100)))
    assert find(cluster.run) is None


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_job_of_another_size_reads_its_own_parts(size, nodes):
    """Rows become columns: whatever box a process asks for is put together from what the members hold."""
    cluster = nodes(3)
    cluster.save(2)
    cluster.lose(1)
    snapshot = Snapshot(find(cluster.run))
    width = -(-1503 // size)
    for rank in range(size):
        first, last = min(rank * width, 1503), min((rank + 1) * width, 1503)
        part = Part("w", (3, first), (690, last - first))
        assert torch.equal(snapshot.tensors["w"].read_part(part), state(2)["model"]["w"][part.slices])
    assert snapshot.optimizer["w/step"].load().item() == 2 and snapshot.tensors["w"].flat(10, 20).equal(state(2)["model"]["w"].flatten()[10:20])


def test_what_is_persisted_is_the_checkpoint_that_a_save_would_have_made(nodes, tmp_path):
    cluster = nodes(3)
    cluster.save(2)
    cluster.lose(2)
    tensors = state(2)
    trainer = {"step": 2, "tokens": 20}
    direct = write.save(
        tmp_path / "direct", model=tensors["model"], optimizer=tensors["optimizer"], config={"model_type": "x"}, trainer=trainer, lineage=LINEAGE
    )
    saved = persist(cluster.run)
    assert saved.digest == direct.digest and saved.path == cluster.run / "checkpoints" / "step-00000002" and verify.verify(saved.path).sound
    assert persist(cluster.run).path == saved.path, "once is enough"
    with pytest.raises(InputError, match="exists"):
        persist(cluster.run, tmp_path / "direct")


def test_memory_that_is_being_read_is_not_written(nodes):
    cluster = nodes(1, 0)
    cluster.save(2, 4)
    version = find(cluster.run).version
    with Link(link.homes(cluster.run)["n0-0"]) as reader:
        reader.ask("lease", step=2, attempt=version.attempt)
        with pytest.raises(InputError, match="in use"):
            cluster.servers[0].keeper.begin(header(6, 10), version)
    deadline = time.monotonic() + 5
    while cluster.servers[0].keeper._leases.total() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cluster.servers[0].keeper.begin(header(6, 10), version)["slot"] in (0, 1), "a reader that is gone holds nothing"


@pytest.mark.parametrize("kept", [2, 4])
def test_the_version_to_go_back_to_is_not_written_over_even_if_it_is_the_oldest(kept, nodes):
    cluster = nodes(1, 0)
    cluster.save(2, 4)
    keeper = cluster.servers[0].keeper
    keeper.begin(header(6, 10), find(cluster.run).version._replace(step=kept))
    assert [area.header.step for area in keeper.data if area.state == CLEAN] == [kept]


def test_a_stranger_is_not_answered(nodes):
    import socket

    cluster = nodes(2)
    home = link.homes(cluster.run)["n0-0"]
    with socket.create_connection((home.host, home.port)) as stranger:
        stranger.sendall(json.dumps({"act": "hello", "secret": "guess"}).encode() + b"\n" + b'{"act": "status"}\n')
        assert stranger.makefile("rb").read() == b""
    assert (cluster.run / link.KEEPERS / "n0-0.json").stat().st_mode & 0o077 == 0


def test_an_earlier_larger_job_leaves_no_keeper_behind(nodes):
    cluster = nodes(3)
    cluster.save(2)

    def smaller(snapshots, peers):
        for step in (2, 4):
            specs, parts = described(step, peers.rank, peers.size)
            assert snapshots.begin(step, specs, parts, files(step))
            for stem, part in ((stem, part) for stem, mine in parts.items() for part in mine):
                snapshots.put(stem, part, state(step)[stem][part.name][part.slices])
            snapshots.commit()
        snapshots._link.close()

    cluster.job(smaller, size=2)
    assert cluster.servers[2]._leaving.is_set() and not cluster.servers[1]._leaving.is_set()


@pytest.fixture
def network():
    """A network namespace with a cable into it: (its name, our address, its address, the end of the cable on our side)."""
    name, ours, theirs, cable = f"cairn-{os.getpid()}", "10.213.7.1", "10.213.7.2", f"cv{os.getpid()}"
    steps = [
        f"netns add {name}",
        f"link add {cable} type veth peer name {cable}p",
        f"link set {cable}p netns {name}",
        f"addr add {ours}/30 dev {cable}",
        f"link set {cable} up",
        f"-n {name} addr add {theirs}/30 dev {cable}p",
        f"-n {name} link set {cable}p up",
    ]
    if shutil.which("ip") is None or subprocess.run(["ip", *steps[0].split()], capture_output=True).returncode:
        pytest.skip("network namespaces are not to be had here")
    try:
        for step in steps[1:]:
            if subprocess.run(["ip", *step.split()], capture_output=True).returncode:
                pytest.skip("virtual cables are not to be had here")
        yield name, ours, theirs, cable
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def test_a_node_that_is_cut_off_is_a_lost_one_until_it_is_back(network, nodes):
    """Its keeper lives on, in a network of its own, and nobody can reach it."""
    name, ours, theirs, cable = network
    cluster = nodes(2, addresses=[ours, theirs])
    cluster.lose(1)
    (cluster.run / link.KEEPERS / "n1-0.json").unlink()
    keeper = [sys.executable, "-m", "cairn.checkpoint.memory.keeper", cluster.settings[1].model_dump_json()]
    subprocess.run(["ip", "netns", "exec", name, *keeper], check=True, timeout=60)
    pid = link.homes(cluster.run)["n1-0"].pid
    try:
        cluster.save(2)
        assert find(cluster.run).lost == []
        subprocess.run(["ip", "link", "set", cable, "down"], check=True)
        plan = find(cluster.run)
        assert plan.lost == [1] and same(Snapshot(plan), 2)
        subprocess.run(["ip", "link", "set", cable, "up"], check=True)
        assert find(cluster.run).lost == []
    finally:
        os.kill(pid, 9)


def test_status_and_stop_say_what_there_is(nodes, tmp_path):
    cluster = nodes(2)
    cluster.save(2, 4)
    found = attend.status(cluster.run)
    assert found["newest"] == 4 and [keeper["steps"] for keeper in found["keepers"]] == [[2, 4], [2, 4]] and found["keepers"][0]["parity_steps"] == [2, 4]
    stopped = attend.stop(cluster.run)
    assert stopped["stopped"] == 2 and read.open(stopped["checkpoint"]).step == 4
    with pytest.raises(NotFoundError, match="has no keepers"):
        attend.status(tmp_path)


def test_a_folder_with_a_long_name_is_reached(tmp_path):
    folder = tmp_path / ("long-" * 20) / ("name-" * 10)
    (tmp_path / "run" / link.KEEPERS).mkdir(parents=True)
    server = Server(Settings(run=str(tmp_path / "run"), name="x-0", node=link.node(), folder=str(folder)))
    with contextlib.closing(Link(server.home)) as conversation:
        assert conversation.ask("status")["name"] == "x-0"
    server._leave()
    assert not folder.exists() and threading.active_count() < 50
