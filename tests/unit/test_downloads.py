"""Downloads: whatever the way to the hub does, the models folder holds whole models or nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dwarfstar_engine.errors import HubError, ModelError, ModelFileError
from dwarfstar_engine.model.gguf import read_model
from dwarfstar_engine.model.hub_names import DOWNLOADS, HubFile, Offer, Reference, offers
from dwarfstar_engine.node import pull as pull_module
from dwarfstar_engine.node.pull import (
    MAX_TRIES,
    PART,
    ROOM_LEFT_BYTES,
    Body,
    Progress,
    Tools,
    pull,
    read_offer,
    unfinished,
)
from dwarfstar_engine.node.pulled import MAX_KEPT, Pulled, find_pulled, note_pulled, read_record
from dwarfstar_engine.node.source import find_model
from dwarfstar_engine.wire.private_files import locked
from support import gguf_bytes as g

WHOLE = g.gguf_bytes(g.llama_pairs(4), g.llama_tensors(4))
ASKED = Reference("owner/name", quantisation="Q8_0")
CHUNK = 300
BROKEN = HubError("the connection broke", code="hub_unreachable", passing=True)


@dataclass
class Server:
    """Gives bytes until ``cuts`` says: after how many bytes each answer breaks off (none: at its end)."""

    data: dict[str, bytes]
    cuts: list[int | None] = field(default_factory=list)
    trouble: BaseException = BROKEN
    ranges: bool = True
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    total: int | None = None

    @contextlib.contextmanager
    def read(self, file: HubFile, start: int, stop: int) -> Iterator[Body]:
        self.asked.append((file.name, start, stop))
        start = start if self.ranges else 0
        yield Body(start, self.total, self._chunks(self.data[file.name][start:stop]))

    def _chunks(self, data: bytes) -> Iterator[bytes]:
        cut = self.cuts.pop(0) if self.cuts else None
        sent = data if cut is None else data[:cut]
        yield from (sent[at : at + CHUNK] for at in range(0, len(sent), CHUNK))
        if cut is not None:
            raise self.trouble


@dataclass
class Room:
    """What the download does besides, recorded."""

    free: int = 1 << 40
    told: list[Progress] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def tools(self) -> Tools:
        return Tools(tell=self.told.append, sleep=self.waits.append, free_bytes=lambda folder: self.free)


def offer_of(data: dict[str, bytes], *, hashed: bool = True) -> Offer:
    (found,) = offers(
        HubFile(name, len(content), hashlib.sha256(content).hexdigest() if hashed else "", f"https://hub/{name}")
        for name, content in data.items()
    )
    return found


ONE = {"m-Q8_0.gguf": WHOLE}
OFFER = offer_of(ONE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != DOWNLOADS)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / DOWNLOADS).rglob("*") if path.suffix != ".lock" and path.is_file())


def test_a_model_is_pulled(tmp_path: Path) -> None:
    room, server = Room(), Server(ONE)
    path = pull(server, OFFER, tmp_path / "new", ASKED, room.tools())
    assert path == tmp_path / "new" / "m-Q8_0.gguf" and path.read_bytes() == WHOLE
    assert left(tmp_path / "new") == ["pulled.json"] and not room.waits
    assert [p.done for p in room.told] == sorted(p.done for p in room.told) and room.told[-1].done == OFFER.size
    assert pull(server, OFFER, tmp_path / "new", ASKED, room.tools()) == path
    assert len(server.asked) == 1  # it is there already


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(0, len(WHOLE)), max_size=MAX_TRIES),
    stops=st.lists(st.integers(0, len(WHOLE)), max_size=3),
    ranges=st.booleans(),
)
def test_broken_connections_and_ended_pulls_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], stops: list[int], ranges: bool
) -> None:
    folder = tmp_path_factory.mktemp("models")
    for stop in stops:  # pulls that somebody ended
        with contextlib.suppress(KeyboardInterrupt):
            pull(Server(ONE, [stop], KeyboardInterrupt(), ranges), OFFER, folder, ASKED, Room().tools())
            break  # it was faster
        assert names(folder) == []
    if names(folder):
        assert (folder / OFFER.files[0].name).read_bytes() == WHOLE
        return
    had = unfinished(OFFER, folder)
    server = Server(ONE, [*cuts], ranges=ranges)
    assert pull(server, OFFER, folder, ASKED, Room().tools()).read_bytes() == WHOLE
    if had < len(WHOLE):
        assert server.asked[0][1] == had
    starts = [start for _, start, _ in server.asked]
    assert not ranges or starts == sorted(starts)


def test_a_pull_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pull(Server(ONE, [1000], KeyboardInterrupt()), OFFER, tmp_path, ASKED, Room().tools())
    assert left(tmp_path) == ["m-Q8_0.gguf" + PART] and unfinished(OFFER, tmp_path) == 1000
    room, server = Room(), Server(ONE)
    pull(server, OFFER, tmp_path, ASKED, room.tools())
    assert server.asked == [("m-Q8_0.gguf", 1000, len(WHOLE))]
    assert room.told[0].doing == "checking" and room.told[-1].doing == "pulling"


def test_other_content_of_the_same_name_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pull(Server(ONE, [1000], KeyboardInterrupt()), OFFER, tmp_path, ASKED, Room().tools())
    other = {"m-Q8_0.gguf": g.gguf_bytes(g.llama_pairs(5), g.llama_tensors(5))}
    server = Server(other)
    assert pull(server, offer_of(other), tmp_path, ASKED, Room().tools()).read_bytes() == other["m-Q8_0.gguf"]
    assert server.asked[0][1] == 0


def test_a_part_that_was_damaged_is_told_by_its_hash_and_deleted(tmp_path: Path) -> None:
    damaged = bytearray(WHOLE)
    damaged[-40] ^= 1
    with pytest.raises(HubError, match=r"is damaged: .*pull it again") as refused:
        pull(Server({"m-Q8_0.gguf": bytes(damaged)}), OFFER, tmp_path, ASKED, Room().tools())
    assert refused.value.code == "hub_damaged" and names(tmp_path) == left(tmp_path) == []
    pull(Server(ONE), OFFER, tmp_path, ASKED, Room().tools())


def test_without_a_hash_the_directory_is_checked(tmp_path: Path) -> None:
    offer = offer_of(ONE, hashed=False)
    with pytest.raises(ModelFileError):
        pull(Server({"m-Q8_0.gguf": bytes(len(WHOLE))}), offer, tmp_path, ASKED, Room().tools())
    assert names(tmp_path) == left(tmp_path) == []
    pull(Server(ONE), offer, tmp_path, ASKED, Room().tools())
    assert names(tmp_path) == ["m-Q8_0.gguf"]


def test_tries_are_bounded_and_wait_longer(tmp_path: Path) -> None:
    room, server = Room(), Server(ONE, [0] * 100)
    with pytest.raises(HubError, match="connection broke"):
        pull(server, OFFER, tmp_path, ASKED, room.tools())
    assert [progress.doing for progress in room.told] == ["waiting"] * MAX_TRIES
    assert len(server.asked) == MAX_TRIES + 1 and room.waits == sorted(room.waits) and room.waits[-1] > room.waits[0]
    with pytest.raises(KeyboardInterrupt):
        pull(Server(ONE, [1000], KeyboardInterrupt()), OFFER, tmp_path, ASKED, room.tools())
    server = Server(ONE, [0] * 100)
    with pytest.raises(HubError, match="connection broke"):
        pull(server, OFFER, tmp_path, ASKED, room.tools())
    assert len(server.asked) == MAX_TRIES + 1  # what was there before is nothing new
    busy = HubError("busy", retry_after_s=7.0, passing=True)
    room = Room()
    pull(Server(ONE, [500], busy), OFFER, tmp_path, ASKED, room.tools())
    assert room.waits == [7.0]


def test_a_server_without_ranges_cannot_keep_it_busy_for_ever(tmp_path: Path) -> None:
    room, server = Room(), Server(ONE, [900, 300] * 100, ranges=False)
    with pytest.raises(HubError):
        pull(server, OFFER, tmp_path, ASKED, room.tools())
    assert len(server.asked) <= 2 * MAX_TRIES


def test_what_does_not_pass_is_not_tried_again(tmp_path: Path) -> None:
    server = Server(ONE, [500], HubError("gone", code="hub_not_found"))
    with pytest.raises(HubError, match="gone"):
        pull(server, OFFER, tmp_path, ASKED, Room().tools())
    assert len(server.asked) == 1 and unfinished(OFFER, tmp_path) == 500


def test_an_answer_that_ends_early_or_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "SPAN_BYTES", 1000)  # each answer is a part
    server = Server(ONE)
    assert pull(server, OFFER, tmp_path / "a", ASKED, Room().tools()).read_bytes() == WHOLE
    assert [start for _, start, _ in server.asked] == list(range(0, len(WHOLE), 1000))
    longer = Server({"m-Q8_0.gguf": WHOLE + b"more"}, ranges=False)
    monkeypatch.setattr(pull_module, "SPAN_BYTES", 1 << 40)
    assert pull(longer, OFFER, tmp_path / "b", ASKED, Room().tools()).read_bytes() == WHOLE
    with pytest.raises(HubError, match="was replaced"):
        pull(Server(ONE, total=len(WHOLE) + 4), OFFER, tmp_path / "c", ASKED, Room().tools())


# --- the disk ---


def test_too_little_room_is_said_before_anything_is_pulled(tmp_path: Path) -> None:
    room, server = Room(free=ROOM_LEFT_BYTES + len(WHOLE) - 1), Server(ONE)
    with pytest.raises(HubError, match="make room for") as refused:
        pull(server, OFFER, tmp_path, ASKED, room.tools())
    assert refused.value.code == "disk_full" and not server.asked
    room.free += 1
    pull(server, OFFER, tmp_path, ASKED, room.tools())


def test_what_is_here_needs_no_room(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pull(Server(ONE, [1000], KeyboardInterrupt()), OFFER, tmp_path, ASKED, Room().tools())
    pull(Server(ONE), OFFER, tmp_path, ASKED, Room(free=ROOM_LEFT_BYTES + len(WHOLE) - 1000).tools())


def test_a_disk_that_fills_up_keeps_what_came(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(HubError, match="is full: make room and pull again") as refused:
        pull(Server(ONE, [1500], full), OFFER, tmp_path, ASKED, Room().tools())
    assert refused.value.code == "disk_full" and unfinished(OFFER, tmp_path) == 1500


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="cannot be used"):
        pull(Server(ONE), OFFER, tmp_path / "file" / "models", ASKED, Room().tools())


def test_two_pulls_of_one_model(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pull(Server(ONE, [1000], KeyboardInterrupt()), OFFER, tmp_path, ASKED, Room().tools())
    (lock,) = (tmp_path / DOWNLOADS).glob("*.lock")
    with locked(lock, 0.0), pytest.raises(HubError, match="another pull") as refused:
        pull(Server(ONE), OFFER, tmp_path, ASKED, Room().tools())
    assert refused.value.code == "pull_running"


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "m-Q8_0.gguf"
    for content in (b"short", bytes(len(WHOLE))):
        path.write_bytes(content)
        with pytest.raises(HubError, match="move it away"):
            pull(Server(ONE), OFFER, tmp_path, ASKED, Room().tools())
        assert path.read_bytes() == content
    path.write_bytes(WHOLE)  # the same, whoever put it there
    server = Server(ONE)
    pull(server, OFFER, tmp_path, ASKED, Room().tools())
    assert not server.asked


# --- split models ---


def split(folder: Path) -> dict[str, bytes]:
    tensors = g.llama_tensors(4)
    paths = g.write_split(folder, g.llama_pairs(4), [[], tensors[:4], tensors[4:]])
    return {path.name: path.read_bytes() for path in paths}


def test_a_split_model_appears_whole(tmp_path: Path) -> None:
    (made := tmp_path / "made").mkdir()
    data, folder = split(made), tmp_path / "models"
    offer = offer_of(data)
    server = Server(data, [None, None, 100], KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pull(server, offer, folder, ASKED, Room().tools())
    assert names(folder) == []
    room, server = Room(), Server(data)
    first = pull(server, offer, folder, ASKED, room.tools())
    assert server.asked == [("m-00003-of-00003.gguf", 100, len(data["m-00003-of-00003.gguf"]))]
    assert names(folder) == sorted(data) and read_model(first).n_layers == 4
    assert room.told[-1].done == room.told[-1].total == sum(map(len, data.values()))
    assert find_model("m", folder) == first  # the model's name, without that of a part


def test_a_move_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    (made := tmp_path / "made").mkdir()
    data, folder = split(made), tmp_path / "models"
    folder.mkdir()
    last = max(data)
    (folder / last).write_bytes(data[last])
    server = Server(data)
    pull(server, offer_of(data), folder, ASKED, Room().tools())
    assert names(folder) == sorted(data) and last not in {name for name, _, _ in server.asked}


@pytest.mark.parametrize("moves", range(3))
def test_the_part_that_names_the_model_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    (made := tmp_path / "made").mkdir()
    data, folder = split(made), tmp_path / "models"
    real, done = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal done
        if target.parent == folder:
            if done == moves:
                raise OSError(errno.EIO, "Input/output error")
            done += 1
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(HubError, match="Input/output error"):
            pull(Server(data), offer_of(data), folder, ASKED, Room().tools())
    assert len(names(folder)) == moves and "m-00001-of-00003.gguf" not in names(folder)
    server = Server(data)
    pull(server, offer_of(data), folder, ASKED, Room().tools())
    assert names(folder) == sorted(data) and not server.asked


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    (made := tmp_path / "made").mkdir()
    data = split(made)
    data["m-00003-of-00003.gguf"] = data["m-00002-of-00003.gguf"]
    with pytest.raises(ModelFileError):
        pull(Server(data), offer_of(data), tmp_path / "models", ASKED, Room().tools())
    assert names(tmp_path / "models") == left(tmp_path / "models") == []


# --- the directory first ---


@pytest.mark.parametrize("ranges", [True, False])
def test_the_directory_is_read_from_the_head_alone(monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    big = g.gguf_bytes(g.llama_pairs(4, vocab=200_000), [*g.llama_tensors(4), g.Tensor("big", (1 << 22,))])
    data = {"m-Q8_0.gguf": big}
    room, server = Room(), Server(data, [700_000, None, 0], ranges=ranges)
    model = read_offer(server, offer_of(data), room.tools())
    assert (model.architecture, model.n_layers, len(model.tensors)) == ("llama", 4, 12)
    assert len(room.waits) == 2 and max(stop for *_, stop in server.asked) < len(big) - (1 << 22)


def test_what_is_no_gguf_is_known_at_its_head() -> None:
    data = {"m-Q8_0.gguf": b"<html>not found</html>" * 100_000}
    server = Server(data)
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        read_offer(server, offer_of(data), Room().tools())
    assert len(server.asked) == 1


def test_a_head_that_does_not_come() -> None:
    server = Server(ONE, [0] * 100)
    with pytest.raises(HubError):
        read_offer(server, OFFER, Room().tools())
    assert len(server.asked) == MAX_TRIES


# --- what was pulled is known by its name on the hub ---


def test_a_hubs_name_finds_what_was_pulled(tmp_path: Path) -> None:
    path = pull(Server(ONE), OFFER, tmp_path, ASKED, Room().tools())
    for name in ("owner/name", "owner/name:Q8_0", "owner/name:q8_0", "owner/name/m-Q8_0.gguf"):
        assert find_model(name, tmp_path) == path
    for name in ("owner/other", "owner/name:Q4_0", "owner/name/x.gguf"):
        with pytest.raises(ModelError, match=f"`dwarfstar pull {name} --models {tmp_path}` gets it"):
            find_model(name, tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match="dwarfstar pull"):
        find_model("owner/name:Q8_0", tmp_path)


def test_a_hubs_name_that_means_two(tmp_path: Path) -> None:
    for name in ("a-Q8_0.gguf", "b-Q4_0.gguf"):
        data = {name: WHOLE}
        pull(Server(data), offer_of(data), tmp_path, ASKED, Room().tools())
    with pytest.raises(ModelError, match="any of a-Q8_0, b-Q4_0"):
        find_model("owner/name", tmp_path)
    assert find_model("owner/name:Q4_0", tmp_path).name == "b-Q4_0.gguf"


def test_the_record_is_bounded_and_believed_only_so_far(tmp_path: Path) -> None:
    entry = Pulled(file="m0.gguf", repo="o/n")
    for i in range(MAX_KEPT + 3):
        if i in (0, MAX_KEPT + 2):
            note_pulled(tmp_path, replace_file(entry, i))
        elif i == 1:
            many = tuple(replace_file(entry, n) for n in range(MAX_KEPT))
            record = read_record(tmp_path).model_copy(update={"models": many})
            (tmp_path / DOWNLOADS / "pulled.json").write_text(record.model_dump_json())
    kept = read_record(tmp_path).models
    assert len(kept) == MAX_KEPT and kept[-1].file == f"m{MAX_KEPT + 2}.gguf" and kept[0].file == "m1.gguf"
    (tmp_path / "m.gguf").write_bytes(WHOLE)
    (tmp_path / "sub").mkdir()
    note_pulled(tmp_path / "sub", Pulled(file="../m.gguf", repo="o/n"))
    assert find_pulled(tmp_path / "sub", Reference("o/n")) == ()  # it leads out of the folder
    (tmp_path / DOWNLOADS / "pulled.json").write_text("{]")
    assert read_record(tmp_path).models == ()


def replace_file(entry: Pulled, number: int) -> Pulled:
    return entry.model_copy(update={"file": f"m{number}.gguf"})
