"""The names and parameters that users' code depends on. A change here is a change for them."""

from __future__ import annotations

import inspect

import pytest

import aiomm

NAMES = [
    "AiommError",
    "Allocation",
    "Cancelled",
    "Extent",
    "Field",
    "IncompatibleSchema",
    "Lease",
    "OfferedTicket",
    "PeerLost",
    "PlaneUnavailable",
    "PoolClosed",
    "ProtocolError",
    "Receiver",
    "Reception",
    "Rejected",
    "Schema",
    "Sender",
    "State",
    "Ticket",
    "Transfer",
    "TransferStats",
    "TransferTimeout",
]


def test_the_public_names() -> None:
    """Exactly these, and every one can be had."""
    assert aiomm.__all__ == NAMES
    assert all(getattr(aiomm, name).__name__ == name for name in NAMES)
    assert set(NAMES) <= set(dir(aiomm))


def test_a_name_that_does_not_exist() -> None:
    """The error is the one of any module."""
    with pytest.raises(AttributeError, match="module 'aiomm' has no attribute 'Pool'"):
        aiomm.Pool  # noqa: B018


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("Receiver", "schema * bind connect device planes on_failure **settings"),
        ("Receiver.expect", "self request_id * timeout"),
        ("Receiver.receive", "self request * source timeout"),
        ("Receiver.cancel", "self request_id reason"),
        ("Receiver.metrics", "self"),
        ("Receiver.start", "self"),
        ("Receiver.aclose", "self"),
        ("Sender", "schema * bind planes **settings"),
        ("Sender.claim", "self ticket * to num_tokens timeout"),
        ("Sender.send", "self request tensors * to metadata stream timeout"),
        ("Sender.offer", "self request_id tensors * metadata stream timeout"),
        ("Sender.start", "self"),
        ("Sender.aclose", "self"),
        ("Transfer.send", "self tensors * metadata stream"),
        ("Transfer.cancel", "self reason"),
        ("Transfer.add_done_callback", "self callback"),
        ("Transfer.done", "self"),
        ("Transfer.exception", "self"),
        ("Transfer.events", "self"),
        ("OfferedTicket.withdraw", "self"),
        ("OfferedTicket.to_bytes", "self"),
        ("OfferedTicket.to_json", "self"),
        ("Lease.release", "self stream"),
        ("Lease.wait_stream", "self stream"),
        ("Lease.detach", "self"),
        ("Field", "dtype *shape"),
        ("Schema", "**fields"),
        ("Ticket.to_bytes", "self"),
        ("Ticket.to_json", "self"),
        ("Ticket.from_bytes", "encoded"),
        ("Ticket.from_json", "encoded"),
        ("AiommError", "message * story"),
    ],
)
def test_the_parameters(function: str, parameters: str) -> None:
    """The names and kinds of the parameters; `*` stands before the ones with a keyword."""
    target: object = aiomm
    for name in function.split("."):
        target = getattr(target, name)
    assert _spelled(inspect.signature(target)) == parameters  # type: ignore[arg-type]


def _spelled(signature: inspect.Signature) -> str:
    words: list[str] = []
    prefixes = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not {"*"} & set(words):
            words.append("*")
        words.append(prefixes.get(parameter.kind.name, "") + parameter.name)
    return " ".join(words)


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("Lease", "buffered_chunks metadata num_tokens request_id stats is_view"),
        (
            "TransferStats",
            "block_indices buffered_chunks nbytes num_tokens plane refused_planes request_id "
            "resumes seconds start_offsets states",
        ),
        ("Ticket", "address epoch key kind num_tokens request_id"),
        ("Transfer", "request_id state transferred_tokens"),
    ],
)
def test_the_attributes(name: str, attributes: str) -> None:
    """What is documented to be read is there, by the source or by annotation."""
    source = inspect.getsource(getattr(aiomm, name))
    for attribute in attributes.split():
        assert any(
            form in source
            for form in (f"self.{attribute}", f"def {attribute}(", f"    {attribute}: ")
        ), attribute


def test_the_tree_of_errors() -> None:
    """Every error is an AiommError; two are also what Python calls such a thing."""
    errors = [
        each
        for each in (getattr(aiomm, name) for name in NAMES)
        if isinstance(each, type) and issubclass(each, aiomm.AiommError)
    ]
    assert len(errors) == 9
    assert issubclass(aiomm.TransferTimeout, TimeoutError)
    assert issubclass(aiomm.IncompatibleSchema, ValueError)
    retryable = {each.__name__ for each in errors if each.retryable}
    assert retryable == {"PeerLost", "TransferTimeout"}
