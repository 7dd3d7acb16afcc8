"""The program ``dwarfstar``. With a command it runs that; else it opens the app, or serves in the foreground.

Settings are read here, once. Errors of the tree become one sentence on stderr and their exit code.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

import dwarfstar_engine
from dwarfstar_engine.cli import app as app_module
from dwarfstar_engine.cli import chat as chat_module
from dwarfstar_engine.cli import remote, running
from dwarfstar_engine.cli.events import FollowOption, SinceOption
from dwarfstar_engine.cli.events import show as show_events
from dwarfstar_engine.cli.keys import keys_app
from dwarfstar_engine.cli.load import load as load_model
from dwarfstar_engine.cli.load import unload as unload_model
from dwarfstar_engine.cli.models import models as list_models
from dwarfstar_engine.cli.models import pull_model
from dwarfstar_engine.cli.status_text import status_text
from dwarfstar_engine.errors import DwarfStarError, SettingsError
from dwarfstar_engine.node.source import find_model
from dwarfstar_engine.plan.advisor import Kind
from dwarfstar_engine.plan.forecast import Objective, Strategy
from dwarfstar_engine.settings import Settings, load_settings
from dwarfstar_engine.views import PlanRequest
from dwarfstar_engine.wire import loop

app = typer.Typer(
    name="dwarfstar",
    help="One GGUF model, split by layers over the machines you own, behind one OpenAI endpoint.",
    epilog="To serve: dwarfstar --serve MODEL, or dwarfstar --serve --demo to try it with a small model and three "
    "nodes on this machine. Its options: dwarfstar --serve --help",
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(keys_app, name="key")
app.command("models")(list_models)
app.command("pull")(pull_model)
app.command("load")(load_model)
app.command("unload")(unload_model)
node_commands = typer.Typer(invoke_without_command=True)
token_commands = typer.Typer(invoke_without_command=True)
app.add_typer(node_commands, name="node")
app.add_typer(token_commands, name="token")
# ``dwarfstar [MODEL] [OPTIONS]`` has no command word, so it is a program of its own.
starter = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Home = Annotated[Path | None, typer.Option(help="Folder of identity, certificates and logs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Discovery = Annotated[
    bool | None,
    typer.Option(
        "--discovery/--no-discovery", help="Find machines in the local network, by multicast DNS.", show_default=False
    ),
]
Models = Annotated[Path | None, typer.Option(help="Folder of GGUF files.")]


def _settings(**given: Any) -> Settings:
    return load_settings(given, os.environ)


def _numbers(text: str | None, name: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise SettingsError(
            f"--{name} takes whole numbers separated by commas, as in 10,20 (given: {text!r})"
        ) from None


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _status_text(home: Path) -> str:
    return status_text(remote.status(running.require(home), home), shutil.get_terminal_size().columns)


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        loop.run(work)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _log_to_stderr(verbose: bool) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)


@starter.command()
def start(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A GGUF file, a name in the models folder, or 'demo'.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Headless: serve in the foreground.")] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="The demo model on three local nodes, none of which can hold it.")
    ] = False,
    local_nodes: Annotated[int, typer.Option(min=0, max=64, help="Node processes on this machine.")] = 0,
    pin: Annotated[bool, typer.Option("--pin", help="Pin each local node's stage to cores of its own.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of each stage.")] = None,
    cuts: Annotated[str | None, typer.Option(help="Layer boundaries by hand, as in 10,20.")] = None,
    wait_nodes: Annotated[int | None, typer.Option(help="Nodes to wait for before the first plan.")] = None,
    pipelines: Annotated[
        str | None, typer.Option(help="Pipelines over different nodes, each with the whole model: a number, or auto.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Nodes that each hold the whole model.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the HTTP API.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the HTTP API; 0 takes a free one.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate of the HTTP API, PEM: makes it HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of --tls-cert, PEM.")] = None,
    control_host: Annotated[str | None, typer.Option(help="Address other nodes reach this machine at.")] = None,
    control_port: Annotated[int | None, typer.Option(help="Port other nodes attach to; 0 takes a free one.")] = None,
    discovery: Discovery = None,
    context: Annotated[int | None, typer.Option(help="Tokens of one request, prompt and answer.")] = None,
    slots: Annotated[int | None, typer.Option(help="Requests generated at the same time.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Prompt tokens that travel in one frame.")] = None,
    wire: Annotated[str | None, typer.Option(help="Precision between stages: auto, f32 (exact), f16 or q8.")] = None,
    kv: Annotated[str | None, typer.Option(help="KV cache: f16, q8_0 or q4_0.")] = None,
    prefix_cache: Annotated[
        str | None, typer.Option(help="Keep KV cells for requests that begin alike: exact, full or off.")
    ] = None,
    speculation: Annotated[str | None, typer.Option(help="Guess tokens ahead: auto, on or off.")] = None,
    draft_model: Annotated[str | None, typer.Option(help="A small model of the same vocabulary that guesses.")] = None,
    batching: Annotated[str | None, typer.Option(help="Tokens of several requests together: auto, or exact.")] = None,
    queue: Annotated[int | None, typer.Option(help="Requests that may wait for a slot.")] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds a request may take at most.")] = None,
    on_loss: Annotated[
        str | None, typer.Option(help="When a node is lost: rescue its streams, or fail them at once.")
    ] = None,
    fallback: Annotated[
        str | None, typer.Option(help="Smaller models for when the model does not fit any more, as in a,b.")
    ] = None,
    standby: Annotated[
        int | None, typer.Option(help="Copies of each stage on another node, loaded, for its loss: 0 or 1.")
    ] = None,
    record_mib: Annotated[
        int | None, typer.Option(help="MiB a stage keeps of what it sent, so that only lost layers compute again.")
    ] = None,
    carry: Annotated[
        str | None, typer.Option(help="Carry cells of layers that move: auto (if that is quicker), on or off.")
    ] = None,
    replan: Annotated[
        str | None, typer.Option(help="Use nodes that come later: auto, idle (when nobody is served) or off.")
    ] = None,
    effective_vram: Annotated[
        str | None, typer.Option(help="What each node lends: GiB, as in 18; 50%; or -2, GiB to keep back.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Share layers out by effective VRAM (proportional), or for speed (fastest).")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="With fastest: for one stream (single), or for all (throughput).")
    ] = None,
    auto_balance: Annotated[
        str | None, typer.Option(help="When stages are unequally busy: off, advise, or on (move layers).")
    ] = None,
    mixed: Annotated[
        bool | None,
        typer.Option("--mixed", help="Nodes may hold another quantisation of the model.", show_default=False),
    ] = None,
    gpu_layers: Annotated[int | None, typer.Option(help="Layers of a stage on the GPU; -1: all.")] = None,
    split_mode: Annotated[
        str | None, typer.Option(help="llama.cpp's use of several GPUs: none, layer, row, tensor.")
    ] = None,
    home: Home = None,
    models: Models = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
    attach: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="App: the control address of an engine elsewhere.")
    ] = None,
    readonly: Annotated[bool, typer.Option("--readonly", help="App: look, and change nothing.")] = False,
    low_bandwidth: Annotated[
        bool | None,
        typer.Option("--low-bandwidth/--no-low-bandwidth", help="App: 1 Hz. Default: over SSH.", show_default=False),
    ] = None,
    ascii_only: Annotated[
        bool | None, typer.Option("--ascii/--no-ascii", help="App: ASCII characters only.", show_default=False)
    ] = None,
    mouse: Annotated[bool | None, typer.Option("--mouse/--no-mouse", help="App.", show_default=False)] = None,
    theme: Annotated[str | None, typer.Option(help="App: its colours, as in night, day, contrast.")] = None,
) -> None:
    """Open the terminal app, with an engine in the background; with --serve, or without a terminal, serve in the
    foreground."""
    settings = _settings(
        host=host, port=port, tls_cert=tls_cert, tls_key=tls_key,
        control_host=control_host, control_port=control_port, context=context, slots=slots,
        chunk=chunk, wire=wire, kv=kv, prefix_cache=prefix_cache, speculation=speculation, batching=batching,
        draft_model=draft_model, queue=queue, request_timeout_s=request_timeout, on_loss=on_loss,
        fallback=_names(fallback) or None,
        standby=standby, record_mib=record_mib, carry=carry, replan=replan,
        effective_vram=effective_vram, strategy=strategy, objective=objective, auto_balance=auto_balance, mixed=mixed,
        gpu_layers=gpu_layers, split_mode=split_mode, threads=threads, cuts=_numbers(cuts, "cuts"),
        wait_nodes=wait_nodes, pipelines=pipelines, replicas=replicas, discovery=discovery, home=home, models=models,
    )  # fmt: skip
    if model is not None and demo:
        raise SettingsError("--demo brings its own model: leave the other one out")
    if not serve and app_module.can_draw(os.environ):
        look = app_module.Look(attach, readonly, low_bandwidth, ascii_only, mouse, theme)
        app_module.open_app(settings, look, sys.argv[1:], wants_engine=model is not None or demo)
        return
    if model is None and not demo and not serve:
        print(_status_text(settings.home))
        return
    from dwarfstar_engine.cli.serve import Start
    from dwarfstar_engine.cli.serve import serve as run_engine

    _log_to_stderr(verbose)
    _run(run_engine(Start(model or ("demo" if demo else ""), local_nodes, demo, pin), settings))


@node_commands.callback()
def node(
    context: typer.Context,
    join: Annotated[
        list[str] | None, typer.Option(help="Where to join, HOST or HOST:PORT; repeat it for several. Default: look.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Join token, from `dwarfstar token` there.")] = None,
    attach: Annotated[str | None, typer.Option(hidden=True)] = None,
    effective_vram: Annotated[
        str | None, typer.Option(help="What to lend: GiB, as in 18; a share, 50%; or GiB to keep back, -2.")
    ] = None,
    can_lead: Annotated[
        bool | None, typer.Option("--can-lead", help="Take the coordinator's place when that is lost.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="With --can-lead: address of the HTTP API.")] = None,
    port: Annotated[int | None, typer.Option(help="With --can-lead: port of the HTTP API; 0 takes a free one.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the stage.")] = None,
    cpus: Annotated[str | None, typer.Option(help="Cores to pin the stage to, as in 0,1.")] = None,
    gpu_layers: Annotated[int | None, typer.Option(help="Layers on the GPU; -1: all.")] = None,
    split_mode: Annotated[str | None, typer.Option(help="llama.cpp's use of several GPUs.")] = None,
    listen: Annotated[str | None, typer.Option(help="Address other nodes reach this machine at.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its file of the model; another quantisation if that is allowed.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of this node.")] = None,
    discovery: Discovery = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds to look for the coordinator. Default: until it is there.")
    ] = None,
    home: Home = None,
    models: Models = None,
    ram_gb_s: Annotated[float, typer.Option("--ram-gb-s", min=0.0, hidden=True)] = 0.0,
    cores: Annotated[int, typer.Option("--cores", min=0, hidden=True)] = 0,
    parent: Annotated[bool, typer.Option("--parent", hidden=True)] = False,
) -> None:
    """Lend this machine to a coordinator: the first time with the line that `dwarfstar token` prints there."""
    from dwarfstar_engine.cli.lend import lend

    if context.invoked_subcommand is not None:
        context.obj = home
        return
    settings = _settings(
        effective_vram=effective_vram, threads=threads, gpu_layers=gpu_layers, split_mode=split_mode,
        control_host=listen, name=name, discovery=discovery, home=home, models=models,
        can_lead=can_lead, host=host, port=port, model=model,
    )  # fmt: skip
    _log_to_stderr(True)
    pinned = _numbers(cpus, "cpus") or ()
    _run(
        lend(
            settings, join or (), token, attach, pinned,
            watch_parent=parent, timeout_s=timeout, ram_gb_s=ram_gb_s, cores=cores,
        )
    )  # fmt: skip


@node_commands.command("remove")
def node_remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name or id, as `dwarfstar status` shows them.")],
    home: Home = None,
) -> None:
    """Refuse a machine from now on. To let it in again, make a new token."""
    from dwarfstar_engine.cli.lend import remove_node

    print(f"dwarfstar: {remove_node(_settings(home=home or context.obj), name)}")


@node_commands.command("override", context_settings={"ignore_unknown_options": True})
def node_override(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name or id, as `dwarfstar status` shows them.")],
    value: Annotated[str, typer.Argument(metavar="VALUE|reset", help="GiB, as in 18; 50%; -2; or reset.")],
    replan: Annotated[bool, typer.Option("--replan", help="Move layers if that is needed.")] = False,
    home: Home = None,
) -> None:
    """Set what a node lends, from now on, while it runs."""
    settings = _settings(home=home or context.obj)
    text = "" if value == "reset" else value
    told = remote.override(running.require(settings.home), settings.home, name, text, replan=replan)
    lent = f"lends {told.effective_vram_gib:.2f} GiB" + (f" ({told.override})" if told.override else "")
    print(f"dwarfstar: {told.node} {lent}" + ("; layers were moved" if told.replanned else ""))


@app.command()
def drain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name or id, as `dwarfstar status` shows them.")],
    undo: Annotated[bool, typer.Option("--undo", help="Plan for it again.")] = False,
    home: Home = None,
) -> None:
    """Move a node's layers to the others, without an end to any request: then it may leave."""
    settings = _settings(home=home)
    print(f"dwarfstar: {remote.drain(running.require(settings.home), settings.home, name, undo=undo)}")


@app.command()
def status(home: Home = None, as_json: AsJson = False) -> None:
    """What runs, where, and how fast."""
    settings = _settings(home=home)
    engine = running.require(settings.home)
    print(remote.status_json(engine, settings.home) if as_json else _status_text(settings.home))


@app.command()
def events(
    since: SinceOption = 0,
    follow: FollowOption = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """What happened in the cluster, and why."""
    show_events(_settings(home=home), since, follow=follow, as_json=as_json)


@app.command()
def stop(home: Home = None) -> None:
    """End the engine that runs from this home."""
    settings = _settings(home=home)
    remote.stop(running.require(settings.home), settings.home)
    print("dwarfstar: stopped")


@token_commands.callback()
def token(
    context: typer.Context,
    hours: Annotated[float, typer.Option(help="How long it is valid.")] = 24.0,
    uses: Annotated[int | None, typer.Option(help="Machines it lets in; default: any number.")] = None,
    control_host: Annotated[str | None, typer.Option(help="As the engine will be started with.")] = None,
    control_port: Annotated[int | None, typer.Option(help="As the engine will be started with.")] = None,
    home: Home = None,
) -> None:
    """Make a join token, and print the command to run on the machine that joins."""
    from dwarfstar_engine.cli.lend import new_join_token

    if context.invoked_subcommand is not None:
        context.obj = home
        return
    settings = _settings(control_host=control_host, control_port=control_port, home=home)
    line, notes = new_join_token(settings, hours, uses)
    for note in notes:
        print(f"dwarfstar: {note}", file=sys.stderr)
    print(line)


@token_commands.command("list")
def token_list(context: typer.Context, home: Home = None, as_json: AsJson = False) -> None:
    """The tokens that were made: their ids, which are no secrets, and what they are still good for."""
    from dwarfstar_engine.cli.lend import list_tokens, tokens_text

    tokens = list_tokens(_settings(home=home or context.obj))
    print(json.dumps({"tokens": tokens}, indent=2) if as_json else tokens_text(tokens))


@token_commands.command("revoke")
def token_revoke(
    context: typer.Context,
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `dwarfstar token list` shows it.")],
    home: Home = None,
) -> None:
    """Let nobody in with a token any more. Machines that joined with it stay: see `dwarfstar node remove`."""
    from dwarfstar_engine.cli.lend import revoke_token

    revoke_token(_settings(home=home or context.obj), token_id)
    print(f"dwarfstar: revoked {token_id}")


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask once; without it, prompts are read line by line.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    url: Annotated[str | None, typer.Option(help="Another endpoint than the engine running here.")] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--api-key", "--key", help="API key; default: DWARFSTAR_API_KEY or OPENAI_API_KEY.", metavar="KEY"
        ),
    ] = None,
    home: Home = None,
) -> None:
    """Talk to the model."""
    target = chat_module.target(url, key, _settings(home=home).home, os.environ)
    options = {
        name: value
        for name, value in (("temperature", temperature), ("seed", seed), ("max_tokens", max_tokens))
        if value is not None
    }
    first = [{"role": "system", "content": system}] if system else []
    if prompt is None:
        chat_module.converse(target, options, first)
    else:
        chat_module.ask(target, [*first, {"role": "user", "content": prompt}], options)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A GGUF file, a name in the models folder, or 'demo'.")] = "demo",
    peers: Annotated[
        Path | None, typer.Option(help="Folder of llama-server and ggml-rpc-server, from benchmarks/build_peers.py.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Some of: decode,ttft,itl,turn,speculation. Default: all.")] = None,
    without: Annotated[str | None, typer.Option(help="Leave out some of: unsplit,all-cores,rpc.")] = None,
    nodes: Annotated[int, typer.Option(min=1, max=16, help="Machines, or local nodes, of the split.")] = 2,
    cuts: Annotated[str | None, typer.Option(help="Layer boundaries, as in 18; default: the planner's.")] = None,
    runs: Annotated[int, typer.Option(min=1, max=100, help="Runs that count, after one that does not.")] = 5,
    tokens: Annotated[int, typer.Option(min=24, max=1000, help="Tokens of a decode answer.")] = 96,
    slots: Annotated[int, typer.Option(min=8, max=64, help="Requests at the same time, of every peer.")] = 8,
    context: Annotated[int, typer.Option(min=1024, max=1 << 20, help="Tokens of a request, of every peer.")] = 4096,
    link_delay: Annotated[
        float | None, typer.Option(min=0.0, max=1000.0, help="Emulate a network: one-way delay, ms (root, Linux).")
    ] = None,
    link_mbit: Annotated[float, typer.Option(min=1.0, max=1e5, help="Rate of that network, Mbit/s.")] = 1000.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures of every run.")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="Write two charts.")] = None,
    show: Annotated[Path | None, typer.Option(help="Measure nothing: print what --json wrote.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --show: as Markdown.")] = False,
    models: Models = None,
) -> None:
    """Measure DwarfStar beside llama.cpp's own servers, in turns."""
    from dwarfstar_engine.bench.link import Link
    from dwarfstar_engine.bench.peers import Shape
    from dwarfstar_engine.bench.suite import Plan
    from dwarfstar_engine.cli import bench as bench_module

    output = bench_module.Output(json_file, svg_file)
    if show is not None:
        bench_module.show(show, output, markdown=markdown)
        return
    path = model if model.startswith("toy:") else str(find_model(model, _settings(models=models).models_dir))
    plan = Plan(
        shape=Shape(path, nodes, _numbers(cuts, "cuts") or (), slots, context),
        runs=runs,
        tokens=tokens,
        only=_names(only),
        without=_names(without),
        peers=peers,
        link=None if link_delay is None else Link(link_delay, link_mbit),
    )
    bench_module.measure(plan, output)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A GGUF file, a name in the models folder, or 'demo'.")
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(help="A described cluster, TOML; default: the nodes of the running engine.")
    ] = None,
    strategy: Annotated[Strategy | None, typer.Option(help="Layers by effective VRAM, or least time.")] = None,
    objective: Annotated[Objective | None, typer.Option(help="With fastest: for one stream, or for many.")] = None,
    context: Annotated[int | None, typer.Option(min=16, max=1 << 20, help="Tokens of one request.")] = None,
    slots: Annotated[int | None, typer.Option(help="Requests generated at the same time.")] = None,
    kv: Annotated[str | None, typer.Option(help="KV cache: f16, q8_0 or q4_0.")] = None,
    layers: Annotated[int | None, typer.Option(help="Of a model without a file: its layers,")] = None,
    weights_gib: Annotated[float | None, typer.Option(help="its weights,")] = None,
    kv_gib: Annotated[float | None, typer.Option(help="its KV cache at the context,")] = None,
    head_gib: Annotated[float | None, typer.Option(help="its output head, a part of the weights,")] = None,
    active_gib: Annotated[float | None, typer.Option(help="of experts, what one token reads.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes to leave out, as in a,b.")] = None,
    pin: Annotated[list[str] | None, typer.Option(help="Layers a node must have, as in tower=0:12; repeat it.")] = None,
    effective_vram: Annotated[
        list[str] | None, typer.Option(help="What a node lends, as in tower=18, =50% or =-2; repeat it.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan, TOML.")] = None,
    cuts: Annotated[str | None, typer.Option(help="Of the running engine: boundaries by hand, as in 12,20.")] = None,
    commit: Annotated[bool, typer.Option("--commit", help="Carry the proposal out, while streams go on.")] = False,
    apply: Annotated[Path | None, typer.Option(help="Carry out a plan that --save wrote.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Back to the plan before.")] = False,
    auto: Annotated[bool, typer.Option("--auto", help="Let the planner decide again.")] = False,
    take: Annotated[
        Kind | None, typer.Option(help="Of the running engine: serve as this alternative of the advisor's.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = None,
    models: Models = None,
    as_json: AsJson = False,
) -> None:
    """The plan that runs, or what if: who would get which layers, how fast that would be, and whether to split at all.

    Without --topology, a model or figures it is about the engine that runs from this home.
    """
    from dwarfstar_engine.cli import plan as plan_module

    sizes = {"layers": layers, "weights_gib": weights_gib, "kv_gib": kv_gib, "head_gib": head_gib}
    shape = {key: size for key, size in {**sizes, "active_gib": active_gib, "context": context}.items() if size}
    asked = plan_module.Asked(
        model=model,
        shape=shape if layers or weights_gib else {},
        topology=topology,
        strategy=strategy or Strategy.FASTEST,
        objective=objective or Objective.SINGLE,
        context=context,
        exclude=_names(exclude),
        pin=pin or (),
        lend=effective_vram or (),
    )
    settings = _settings(home=home, models=models, context=context, slots=slots, kv=kv)
    described = topology or model or asked.shape or effective_vram or slots or kv
    orders = commit or apply or undo or auto or cuts or take
    if described and orders:
        raise SettingsError("a plan of the running engine takes no --topology, model, figures or --effective-vram")
    if not described and (orders or running.find(settings.home) is not None):
        from dwarfstar_engine.cli.plan_running import Wish
        from dwarfstar_engine.cli.plan_running import show as show_running

        request = PlanRequest(
            strategy=None if strategy is None else strategy.value,
            objective=None if objective is None else objective.value,
            cuts=_numbers(cuts, "cuts"),
            pins=plan_module.pins_of(pin or ()),
            excluded=_names(exclude),
            context=context,
            auto=auto,
            take=None if take is None else take.value,
        )
        wish = Wish(request, commit, undo, apply, yes, save)
        show_running(wish, settings, json_wanted=as_json)
        return
    plan_module.show(asked, settings, json_wanted=as_json, save_to=save)


@app.command()
def version() -> None:
    """Print the version."""
    print(dwarfstar_engine.__version__)


def _names_command(arguments: list[str]) -> bool:
    """Whether the first word is a command; else it is ``dwarfstar [MODEL] [OPTIONS]``."""
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    groups = {group.name for group in app.registered_groups}
    return bool(arguments) and (arguments[0] in commands | groups or arguments[0] == "--help")


def run() -> None:
    """Entry point."""
    arguments = ["version"] if sys.argv[1:] == ["--version"] else sys.argv[1:]
    program = app if _names_command(arguments) else starter
    try:
        program(arguments, prog_name="dwarfstar")
    except DwarfStarError as error:
        print(f"dwarfstar: {error.message}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    run()
