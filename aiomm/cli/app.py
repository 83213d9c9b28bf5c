"""The commands and their options. Parsing only; each command's work stands in its own module."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import __version__
from ..config import ReceiverSettings, SenderSettings, settings_from
from ..protocol.frames import check_request_id
from ..types import Field, Schema
from . import bench_options
from .device import ensure_well_formed
from .endpoint import EndpointOptions
from .running import Exit, fail, finish

__all__ = ["app"]

EXIT_CODES = (
    "Exit codes: 0 all is well; 1 a transfer failed; 2 the command line, or a file, address or "
    "plane in it, is not usable; 130 interrupted by Ctrl-C."
)
app = typer.Typer(
    name="aiomm",
    help="Move multimodal embeddings between processes.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)


class PlaneChoice(StrEnum):
    """How bytes may move."""

    AUTO = "auto"
    CUDA_IPC = "cuda_ipc"
    SHM = "shm"
    MOONCAKE = "mooncake"
    TCP = "tcp"


class ControlChoice(StrEnum):
    """How control frames may move."""

    AUTO = "auto"
    ZMQ = "zmq"
    AIOZMQ = "aiozmq"


class BindChoice(StrEnum):
    """Which side listens."""

    RECEIVER = "receiver"
    SENDER = "sender"


BindOption = Annotated[
    str | None, typer.Option("--bind", metavar="ADDR", help="Listen here: tcp://HOST:PORT.")
]
ConnectOption = Annotated[
    str | None, typer.Option("--connect", metavar="ADDR", help="Connect to the side that listens.")
]
FieldOption = Annotated[
    list[str] | None,
    typer.Option(
        "--field",
        metavar="NAME=DTYPE[:DIMS]",
        help="A field per token, such as embeddings=bfloat16:3584; once for each.",
    ),
]
TimeoutOption = Annotated[
    float, typer.Option(min=0.001, metavar="SECONDS", help="For each transfer, from its start.")
]
DeviceOption = Annotated[
    str, typer.Option(metavar="cpu|cuda:N", help="Where the tensors and the pool lie.")
]
PlaneOption = Annotated[PlaneChoice, typer.Option(help="How bytes move.")]
KeyFileOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="This side's key, NAME.key_secret of `aiomm keygen`."),
]
KnownKeysOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEYS",
        help="Public keys of peers: files, folders of *.key files, or keys, with commas between. "
        "Without it: the same key as this side's.",
    ),
]
AdvertiseOption = Annotated[
    str | None, typer.Option(metavar="HOST", help="How other hosts reach this one.")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Allow addresses off this host without keys.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"aiomm {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def aiomm(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Move multimodal embeddings between processes."""


@app.command(epilog=EXIT_CODES)
def demo(
    tokens: Annotated[int, typer.Option(min=0, help="Tokens of each request.")] = 2000,
    hidden: Annotated[int, typer.Option(min=1, help="Elements of one embedding.")] = 3584,
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Of them at a time.")] = 8,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 128,
    default_blocks: Annotated[int, typer.Option(min=1, help="Reserved at first.")] = 8,
    pool_blocks: Annotated[int, typer.Option(min=1, help="Blocks of the pool.")] = 64,
    plane: PlaneOption = PlaneChoice.AUTO,
    device: DeviceOption = "cpu",
    control: Annotated[
        ControlChoice, typer.Option(help="How control frames move.")
    ] = ControlChoice.AUTO,
    bind: Annotated[BindChoice, typer.Option(help="Which side listens.")] = BindChoice.RECEIVER,
    announce: Annotated[
        bool, typer.Option("--announce", help="Tell the length in the claim.")
    ] = False,
    image: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Run a vision tower over this picture."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Move requests between a language and an encoder process, and compare every byte."""
    _check_environment()
    ensure_well_formed(device)
    from ..demo.messages import Options
    from .demo import demonstrate

    options = Options(
        tokens=tokens,
        hidden=hidden,
        requests=requests,
        concurrency=concurrency,
        block_size=block_size,
        default_blocks=default_blocks,
        pool_blocks=pool_blocks,
        plane=plane.value,
        device=device,
        control=control.value,
        bind=bind.value,
        announce=announce,
        image=None if image is None else str(image),
    )
    finish(demonstrate(options, as_json=as_json, console=console, errors=errors), errors=errors)


@app.command(epilog=EXIT_CODES)
def send(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.safetensors...", show_default=False)],
    connect: ConnectOption = None,
    bind: BindOption = None,
    request_id: Annotated[
        str | None, typer.Option(help="Of the one file; otherwise its name without the ending.")
    ] = None,
    field: FieldOption = None,
    plane: PlaneOption = PlaneChoice.AUTO,
    timeout: TimeoutOption = 300.0,
    key_file: KeyFileOption = None,
    known_keys: KnownKeysOption = None,
    advertise: AdvertiseOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Send safetensors files, to `aiomm recv` or to any receiver.

    A file travels whole. If the receiver at --connect has fields instead, the file's tensors
    are sent as fields, with their first dimension as tokens; --field chooses which, and sends
    them so at once.
    """
    from .sending import SendOptions, send_files

    _check_environment()
    endpoint = EndpointOptions(
        connect=connect,
        bind=bind,
        plane=plane.value,
        timeout=timeout,
        key_file=key_file,
        known_keys=known_keys,
        advertise=advertise,
        insecure=insecure,
    )
    _check_endpoint(endpoint)
    if request_id is not None and len(files) > 1:
        raise typer.BadParameter("one id is for one file", param_hint="--request-id")
    if request_id is not None:
        try:
            check_request_id(request_id)
        except ValueError as exc:
            raise typer.BadParameter(str(exc), param_hint="--request-id") from exc
    options = SendOptions(
        endpoint=endpoint,
        request_id=request_id,
        schema=_schema(field),
    )
    finish(send_files(files, options, errors=errors), errors=errors)


@app.command(epilog=EXIT_CODES)
def recv(
    bind: BindOption = None,
    connect: ConnectOption = None,
    field: FieldOption = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, metavar="DIR", help="Where the files go.")
    ] = Path(),
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop after so many transfers, failed ones included. Without it go on until "
            "Ctrl-C, or with --connect until the sending command is through.",
        ),
    ] = None,
    plane: PlaneOption = PlaneChoice.AUTO,
    timeout: TimeoutOption = 300.0,
    key_file: KeyFileOption = None,
    known_keys: KnownKeysOption = None,
    advertise: AdvertiseOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Receive files from `aiomm send`, or from any sender with --field.

    Each becomes REQUEST-ID.safetensors, whole or not at all; a file of that name is replaced.
    Characters that do not belong into a file name are percent-encoded. The path of every file
    is printed on stdout, everything else on stderr.
    """
    from .receiving import ReceiveOptions, receive_files

    _check_environment()
    endpoint = EndpointOptions(
        connect=connect,
        bind=bind,
        plane=plane.value,
        timeout=timeout,
        key_file=key_file,
        known_keys=known_keys,
        advertise=advertise,
        insecure=insecure,
    )
    _check_endpoint(endpoint)
    options = ReceiveOptions(
        endpoint=endpoint,
        schema=_schema(field),
        out=out,
        count=count,
    )
    finish(receive_files(options, console=console, errors=errors), errors=errors)


@app.command(epilog=EXIT_CODES)
def keygen(
    path: Annotated[
        Path, typer.Argument(metavar="[PATH]", help="Where, without an ending; a name will do.")
    ] = Path("aiomm"),
) -> None:
    """Make a key pair for hosts that other hosts talk to.

    PATH.key_secret is for --key-file (or AIOMM_KEY_FILE) of its own host alone; PATH.key goes
    to the hosts that talk to it, for their --known-keys. Hosts that trust each other alike may
    as well share one PATH.key_secret, and then need no --known-keys.
    """
    from ..control.keys import write_key_pair

    try:
        secret, public = write_key_pair(path)
    except OSError as exc:
        raise fail(str(exc), Exit.USAGE, errors=errors) from None
    print(f"{secret}\n{public}")


@app.command(epilog=EXIT_CODES)
def doctor(as_json: JsonOption = False) -> None:
    """Find out what this machine can do: planes, versions, limits, settings."""
    from .doctor import diagnose

    finish(diagnose(as_json=as_json, console=console), errors=errors)


@app.command(epilog=EXIT_CODES)
def bench(
    plane: PlaneOption = PlaneChoice.AUTO,
    device: DeviceOption = "cpu",
    sizes: bench_options.SizesOption = "64KiB,1MiB,8MiB,64MiB",
    rounds: bench_options.RoundsOption = 15,
    arrival: bench_options.ArrivalOption = None,
    concurrency: bench_options.ConcurrencyOption = 1,
    resume: bench_options.ResumeOption = False,
    stream: bench_options.StreamOption = False,
    busy: bench_options.BusyOption = None,
    switch_interval: bench_options.SwitchIntervalOption = 5.0,
    heartbeat: bench_options.HeartbeatOption = False,
    checksum: bench_options.ChecksumOption = False,
    as_json: JsonOption = False,
    plot: bench_options.PlotOption = None,
    peers: bench_options.PeersOption = None,
    save: bench_options.SaveOption = None,
) -> None:
    """Measure transfers between two processes, against a memcpy of the same bytes."""
    _check_environment()
    ensure_well_formed(device)
    from ..bench.plan import Plan
    from .bench import Outputs, measure

    if arrival is None:
        choices = bench_options.ArrivalChoice
        arrival = choices.BACK_TO_BACK if busy else choices.BOTH
    plan = Plan(
        plane=plane.value,
        device=device,
        sizes=_sizes(sizes),
        rounds=rounds,
        arrivals=bench_options.ARRIVALS[arrival],
        concurrency=concurrency,
        resume=resume,
        stream=stream,
        busy=busy.value if busy else None,
        switch_interval=switch_interval / 1000,
        heartbeat=heartbeat,
        checksum=checksum,
    )
    outputs = Outputs(as_json, plot, peers, save)
    finish(measure(plan, outputs, console=console, errors=errors), errors=errors)


def _sizes(text: str) -> tuple[int, ...]:
    from ..bench.plan import size_from

    try:
        return tuple(dict.fromkeys(size_from(each) for each in text.split(",")))
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--sizes") from exc


def _check_environment() -> None:
    try:
        settings_from(ReceiverSettings, {})
        settings_from(SenderSettings, {})
    except ValueError as exc:
        raise fail(str(exc), Exit.USAGE, errors=errors) from None


def _check_endpoint(endpoint: EndpointOptions) -> None:
    if (endpoint.bind is None) == (endpoint.connect is None):
        raise typer.BadParameter("give one of them", param_hint="--bind / --connect")
    endpoint.check()


def _schema(texts: list[str] | None) -> Schema | None:
    from .files import field_from

    fields: dict[str, Field] = {}
    for text in texts or ():
        try:
            name, field = field_from(text)
            if name in fields:
                raise typer.BadParameter(f"{name!r} is given twice", param_hint="--field")
            fields[name] = field
        except ValueError as exc:
            raise typer.BadParameter(str(exc), param_hint="--field") from exc
    return Schema(**fields) if fields else None
