"""The owner changes the model: what is checked before, who waits, who ends, and what serves when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dwarfstar_engine.api.keybook import KeyStore, key_folder
from dwarfstar_engine.cli import serve, shared
from dwarfstar_engine.cli.standby import Understudy
from dwarfstar_engine.cluster.state import ClusterState, Version
from dwarfstar_engine.errors import ClusterError, DwarfStarError, ModelError, NoModel, Overloaded, Unavailable
from dwarfstar_engine.node import loader as module
from dwarfstar_engine.node import moves as moves_module
from dwarfstar_engine.node.coordinator import Coordinator
from dwarfstar_engine.node.loader import Chosen
from dwarfstar_engine.node.roster import RosterStore, remove
from dwarfstar_engine.node.source import NO_MODEL, Source, open_source
from dwarfstar_engine.node.vocab import ToyVocab, Vocab
from dwarfstar_engine.plan.advisor import Kind
from dwarfstar_engine.plan.forecast import Objective, Strategy
from dwarfstar_engine.plan.owned import OwnedPlan
from dwarfstar_engine.plan.proportional import Plan, StagePlan
from dwarfstar_engine.plan.shares import Wanted
from dwarfstar_engine.serving import Request, Sampling
from dwarfstar_engine.settings import Settings
from dwarfstar_engine.views import LoadRequest, PlanRequest
from dwarfstar_engine.wire.generated import control_pb2 as pb
from dwarfstar_engine.wire.trust import utc_now
from unit import test_several
from unit.test_recovery import Player, Sink, make, playing, serves, until
from unit.test_steering import cuts, refused, said, slices

OTHER = LoadRequest(model="toy:6")
SOON_S = 4.0


def served(coordinator: Coordinator) -> str:
    return coordinator.source.name if serves(coordinator) else ""


def ask(coordinator: Coordinator) -> Sink:
    sink = Sink()
    coordinator.generate(Request((97,), Sampling(), model=coordinator.model().name), sink)
    return sink


async def loads(coordinator: Coordinator, wanted: LoadRequest = OTHER) -> Any:
    async with asyncio.timeout(SOON_S):
        return await coordinator.loader.load(wanted)


async def test_another_model_is_served_on_the_same_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        await until(lambda: served(coordinator) == "toy:8")
        view = await loads(coordinator, LoadRequest(model="toy:6", context=256, slots=2))
        assert (view.model, view.before, view.streams, view.context, view.slots) == ("toy:6", "toy:8", 0, 256, 2)
        assert view.plan is not None and [stage.layers for stage in view.plan.stages] == [(0, 3), (3, 6)]
        assert served(coordinator) == "toy:6" and slices(coordinator) == [("id-a", (0, 3)), ("id-b", (3, 6))]
        assert (coordinator.context, coordinator.settings.slots, coordinator.model().layers) == (256, 2, 6)
        assert a.told.count("release") == b.told.count("release") == 1, "the old stages are put down, once"
        assert a.told[-3:] == ["release", "assign", "link"]
        assert any("the model toy:6 is loaded by the owner in" in text for text in said(coordinator, "owner_model"))
        assert view.epoch == coordinator.epoch and coordinator.status().model is not None
        back = await loads(coordinator, LoadRequest(model="toy:8"))
        assert back.context == 4096 and coordinator.settings.slots == 4, "as the engine was started"


async def test_a_check_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, a, _):
        await until(lambda: served(coordinator) == "toy:8")
        ask(coordinator)
        told = len(a.told)
        view = await loads(coordinator, LoadRequest(model="toy:6", check=True))
        assert (view.streams, view.before) == (1, "toy:8") and view.plan is not None
        assert view.plan.predicted.single_tok_s > 0
        assert served(coordinator) == "toy:8" and coordinator.epoch == 1 and len(a.told) == told


def bad_files(folder: Path) -> dict[str, str]:
    """What to load, and what the refusal says."""
    (folder / "no.gguf").write_bytes(b"this is a letter to my aunt, and no model" * 10)
    (folder / "short.gguf").write_bytes(b"GGUF\x03\0\0\0")
    return {
        str(folder / "gone.gguf"): "no model",
        str(folder): "is a folder",
        str(folder / "no.gguf"): "no.gguf",
        str(folder / "short.gguf"): "short.gguf",
    }


async def test_what_cannot_be_served_is_refused_and_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, a, _):
        await until(lambda: served(coordinator) == "toy:8")
        told = len(a.told)
        for name, why in bad_files(tmp_path).items():
            error = await refused(coordinator.loader.load(LoadRequest(model=name)))
            assert why in error.message and "\n" not in error.message
        for member in coordinator.members.values():
            member.device.effective_vram_bytes = 120 << 20
        too_large = await refused(coordinator.loader.load(LoadRequest(model="toy:200")))
        assert too_large.code == "model_too_large_for_remaining_capacity"

        async def unreadable(source: Source) -> Vocab:
            raise ModelError(f"{source.name}: its vocabulary is not readable")

        coordinator.open_vocab = unreadable
        assert "its vocabulary" in (await refused(coordinator.loader.load(OTHER))).message
        coordinator.loader.base = coordinator.settings.model_copy(update={"mixed": True})
        assert (await refused(coordinator.loader.load(OTHER))).code == "needs_restart"
        assert served(coordinator) == "toy:8" and coordinator.epoch == 1 and len(a.told) == told
        assert not said(coordinator, "owner_model")


async def test_requests_in_flight_finish_and_new_ones_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await until(lambda: served(coordinator) == "toy:8")
        sink = Sink()
        running = coordinator.generate(Request((97,), Sampling()), sink)
        work = asyncio.create_task(loads(coordinator))
        await until(lambda: not coordinator.loader._open.is_set())
        waiting = asyncio.create_task(coordinator.settled())
        await until(lambda: coordinator.status().throughput.queued == 1)
        assert served(coordinator) == "toy:8" and not waiting.done() and not work.done()
        running.cancel()  # it is over
        view = await work
        await waiting
        assert not sink.errors and view.streams == 0 and coordinator.model().name == "toy:6"


async def test_requests_that_take_too_long_end_and_may_be_sent_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.0)
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await until(lambda: served(coordinator) == "toy:8")
        old = coordinator.model().name
        sinks = [ask(coordinator) for _ in range(6)]
        view = await loads(coordinator)
        assert view.streams == 6
        for sink in sinks:
            assert isinstance(sink.errors[0], Unavailable) and sink.errors[0].retry_after_s
            assert "toy:6" in sink.errors[0].message
        with pytest.raises(Unavailable, match="toy:6 is served now"):  # made tokens before the gate closed
            coordinator.generate(Request((97,), Sampling(), model=old), Sink())


async def test_as_many_wait_as_for_a_slot_and_not_for_ever(tmp_path: Path) -> None:
    coordinator = make(tmp_path, queue=1, slots=1)
    coordinator.settings = coordinator.settings.model_copy(update={"rescue_s": 0.2})
    coordinator.loader._open.clear()
    waiting = [asyncio.create_task(coordinator.settled()) for _ in range(2)]
    await until(lambda: coordinator.loader.waiting == 2)
    with pytest.raises(Overloaded):
        await coordinator.settled()
    for task in waiting:
        with pytest.raises(Unavailable, match="being changed"):
            await task
    assert coordinator.loader.waiting == 0


async def test_the_model_before_is_loaded_again_if_the_new_one_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b):
        await until(lambda: served(coordinator) == "toy:8")
        await coordinator.steering.commit(cuts(6), 0)
        b.refuses = "toy:6"
        waiting: list[asyncio.Task[None]] = []

        async def failed() -> DwarfStarError:
            work = asyncio.create_task(coordinator.loader.load(OTHER))
            await until(lambda: not coordinator.loader._open.is_set())
            waiting.append(asyncio.create_task(coordinator.settled()))
            return await refused(work)

        error = await failed()
        assert error.message == "toy:6 could not be loaded: b: it died; toy:8 is loaded again"
        assert error.message in said(coordinator, "owner_model")
        await waiting[0]
        assert served(coordinator) == "toy:8" and slices(coordinator)[0] == ("id-a", (0, 6)), "as its owner had it"
        assert coordinator.loader.kept[1].name == "toy:8" and coordinator.vocab.size
        b.refuses = ""
        assert (await loads(coordinator)).model == "toy:6"
        assert not coordinator.steering.decided
        assert (await refused(coordinator.steering.undo(0))).code == "nothing_to_undo"


async def test_no_model_is_served_after_unloading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, a, b):
        await until(lambda: served(coordinator) == "toy:8")
        view = await coordinator.loader.unload()
        assert (view.model, view.before, view.streams) == ("", "toy:8", 0)
        await until(lambda: a.told[-1] == b.told[-1] == "release")
        await until(lambda: coordinator.health().get("code") == "no_model")
        with pytest.raises(NoModel):
            coordinator.model()
        status = coordinator.status()
        assert status.model is None and not status.stages and "no model is loaded" in status.reason
        assert (await refused(coordinator.loader.unload())).code == "no_model"
        assert (await refused(coordinator.steering.propose(PlanRequest()))).code == "no_model"
        late = Player(coordinator, "c")
        coordinator.nodes.attach(late.member)
        sent = [late.member.outbox.get_nowait() for _ in range(late.member.outbox.qsize())]
        assert any(message.HasField("release") for message in sent), "it may hold what was unloaded"
        coordinator.nodes.broken(late.member)
        assert said(coordinator, "no_plan") == []
        assert (await loads(coordinator)).before == "" and served(coordinator) == "toy:6"


async def test_one_change_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(moves_module, "LOAD_S", SOON_S)
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b):
        await until(lambda: served(coordinator) == "toy:8")
        b.answers = False
        plan = asyncio.create_task(coordinator.steering.commit(cuts(6), 0))
        await until(lambda: coordinator.steering.order.locked())
        assert (await refused(coordinator.loader.load(OTHER))).code == "busy"
        assert (await refused(coordinator.loader.unload())).code == "busy"
        b.answers = True
        b.say(pb.STAGE_STATE_FAILED)
        plan.cancel()
        await asyncio.wait({plan})
        first = asyncio.create_task(loads(coordinator))
        await until(lambda: coordinator.loader._changing.locked())
        assert (await refused(coordinator.loader.load(LoadRequest(model="toy:5")))).code == "busy"
        await first


async def test_it_goes_on_when_whoever_ordered_it_goes_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, *_):
        await until(lambda: served(coordinator) == "toy:8")
        running = coordinator.generate(Request((97,), Sampling()), Sink())
        caller = asyncio.create_task(coordinator.loader.load(OTHER))
        await until(lambda: not coordinator.loader._open.is_set())
        caller.cancel()
        await asyncio.wait({caller})
        running.cancel()
        await until(lambda: served(coordinator) == "toy:6" and coordinator.loader._open.is_set())


async def test_a_coordinator_that_retires_ends_the_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b):
        await until(lambda: served(coordinator) == "toy:8")
        b.answers = False
        work = asyncio.create_task(coordinator.loader.load(OTHER))
        await until(lambda: coordinator.main.name == "toy:6")
        coordinator.retire("another node leads")
        assert "could not be loaded" in (await refused(work)).message
        assert coordinator.main.name == coordinator.loader.kept[1].name == "toy:8"


async def test_nodes_are_dealt_out_for_the_new_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with test_several.playing(monkeypatch, tmp_path, "a", "b") as (coordinator, _):
        await until(lambda: test_several.rings(coordinator) == ["a", "b"])
        await loads(coordinator)
        assert test_several.rings(coordinator) == ["a", "b"] and served(coordinator) == "toy:6"
        await coordinator.loader.unload()
        await until(lambda: set(coordinator.dealer.dealt.values()) == {0})
        await loads(coordinator, LoadRequest(model="toy:8"))
        assert sorted(test_several.rings(coordinator)) == ["a", "b"]


async def test_what_was_taken_for_a_model_is_for_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with test_several.playing(monkeypatch, tmp_path, "a", "b", replicas=0) as (coordinator, players):
        await until(lambda: test_several.rings(coordinator) == ["ab"])
        await coordinator.take(Kind.REPLICAS)
        assert sorted(test_several.rings(coordinator)) == ["a", "b"]
        players["b"].refuses = "toy:6"
        assert "toy:8 is loaded again" in (await refused(coordinator.loader.load(OTHER))).message
        assert sorted(test_several.rings(coordinator)) == ["a", "b"], "as its owner had it"
        players["b"].refuses = ""
        await loads(coordinator)
        assert sorted(filter(None, test_several.rings(coordinator))) == ["ab"] and served(coordinator) == "toy:6"
        assert not coordinator.dealer.taken


async def test_a_change_that_is_not_over_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with playing(monkeypatch, tmp_path) as (coordinator, _, b):
        await until(lambda: served(coordinator) == "toy:8")
        state = ClusterState().changed(1, "a", **shared.model_of(coordinator, ClusterState()))
        b.answers = False
        work = asyncio.create_task(loads(coordinator))
        await until(lambda: coordinator.main.name == "toy:6")
        assert shared.model_of(coordinator, state) == {"model": "toy:8", "wishes": state.wishes}
        await until(lambda: b.layers.end == 6)
        b.answers = True
        b.say(pb.STAGE_STATE_READY)  # once: a stage that is linked says it no more
        await work
        assert shared.model_of(coordinator, state)["model"] == "toy:6"


async def test_what_is_kept_is_what_is_served(tmp_path: Path) -> None:
    """By an engine that is started again, and by a node that leads in its place."""
    leader = make(tmp_path, context=512)
    settings = leader.settings.model_copy(update={"context": 128, "slots": 2})
    source = open_source("toy:6", tmp_path)
    leader.loader.adopt(Chosen(settings, source, source, ToyVocab()))
    state = ClusterState().changed(1, "a", **shared.model_of(leader, ClusterState()))
    assert state.model == "toy:6"
    found = shared.find_source(Settings(home=tmp_path), state)
    assert found.fingerprint == source.fingerprint
    again = shared.as_loaded(Settings(home=tmp_path), state)
    assert (again.context, again.slots) == (128, 2)
    assert shared.as_loaded(Settings(home=tmp_path, context=64), state).context == 64, "its start names another"
    assert shared.settings_of(Settings(home=tmp_path), state).context == 128
    leader.loader.adopt(Chosen(settings, NO_MODEL, NO_MODEL, ToyVocab()))
    empty: Mapping[str, Any] = shared.model_of(leader, state)
    assert empty["model"] == "" and not shared.find_source(Settings(), state.changed(1, "a", **empty)).loaded


def kept(coordinator: Coordinator, name: str, before: ClusterState) -> ClusterState:
    """The cluster's state once that model was loaded; empty: once it was unloaded."""
    source = open_source(name, coordinator.settings.home) if name else NO_MODEL
    settings = coordinator.settings.model_copy(update={"context": 128, "slots": 2})
    coordinator.loader.adopt(Chosen(settings, source, source, ToyVocab()))
    return before.changed(2, "a", **shared.model_of(coordinator, before))


async def test_a_node_that_takes_over_serves_the_present_model(tmp_path: Path) -> None:
    leader = make(tmp_path)
    understudy = Understudy(Settings(home=tmp_path), leader.trust, "k-1")
    with pytest.raises(ClusterError, match="start the engine first"):
        await understudy.make(ClusterState())
    state = kept(leader, "toy:6", ClusterState())
    made = await understudy.make(state)
    assert (made.main.name, made.context, made.settings.slots) == ("toy:6", 128, 2)
    state = kept(leader, "", state)
    made = await understudy.make(state)
    assert not made.main.loaded and made.status().model is None
    await understudy.close()


async def test_an_engine_that_leads_again_serves_what_was_loaded_meanwhile(tmp_path: Path) -> None:
    """By another leader; but at its start the model that it was started with counts."""
    engine = make(tmp_path)
    state = kept(make(tmp_path), "toy:6", ClusterState())
    chair = serve._chair(engine, engine.settings)

    class Lead:
        boot_version = state.version

    chair.lead = Lead()  # type: ignore[assignment]
    assert (await chair._make(state)).main.name == "toy:8"
    Lead.boot_version = Version()
    assert (await chair._make(state)).main.name == "toy:6" and engine.context == 128
    assert (await chair._make(kept(make(tmp_path), "", state))).main is NO_MODEL


async def test_what_is_described_for_the_cluster_is_marked(tmp_path: Path) -> None:
    """Every change of what is to be kept changes the mark, and a file that cannot be read leaves none."""
    engine = make(tmp_path)
    chair = serve._chair(engine, engine.settings)
    chair._coordinator = engine
    keys = KeyStore(key_folder(tmp_path), utc_now)
    roster = RosterStore(tmp_path / "trust", utc_now)
    later = utc_now() + timedelta(hours=1)
    plan = Plan((StagePlan("id-a", (0, 8), 1, 1),))
    changes: list[Callable[[], object]] = [
        lambda: keys.issue("laptop"),
        lambda: keys.revoke("laptop"),
        lambda: roster.change(lambda held: remove(held, "k-1", "one", later, utc_now())),
        lambda: engine.steering.lent.update({"id-a": "50%"}),
        lambda: engine.nodes.names.update({"id-a": "desk"}),
        lambda: setattr(engine.planner, "planned", plan),
        lambda: setattr(engine.steering, "_owned", OwnedPlan("f", (("id-a", 8),), Strategy.FASTEST, Objective.SINGLE)),
        lambda: setattr(engine.dealer, "wanted", Wanted(2)),
        lambda: kept(engine, "toy:6", ClusterState()),
        lambda: kept(engine, "", ClusterState()),
    ]
    assert chair.mark() is None, "nobody has looked yet"
    for change in changes:
        before, _ = chair.wanted(ClusterState()), (mark := chair.mark())
        assert mark is not None and mark == chair.mark()
        change()
        assert chair.mark() != mark and chair.wanted(ClusterState()) != before
    keys.path.write_bytes(b"{")
    chair.wanted(ClusterState())
    assert chair.mark() is None, "it is looked at again until it can be read"


async def test_the_draft_model_is_used_with_its_own_model_only(tmp_path: Path) -> None:
    drafts: Any = object()
    coordinator = make(tmp_path)
    coordinator.drafter = drafts

    def chosen(name: str, **given: int) -> Chosen:
        source = open_source(name, tmp_path)
        return Chosen(coordinator.loader.base.model_copy(update=given), source, source, ToyVocab())

    coordinator.loader.adopt(chosen("toy:6"))
    assert coordinator.drafter is None
    assert "the draft model is not used" in coordinator.status().warnings[0]
    coordinator.loader.adopt(chosen("toy:8"))
    assert coordinator.drafter is drafts
    coordinator.loader.adopt(chosen("toy:8", slots=8))
    assert coordinator.drafter is None, "it was started for fewer"
