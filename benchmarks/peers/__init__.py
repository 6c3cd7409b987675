"""Implementations side by side: ours and every peer, called on the same tensors. Nothing of a peer is imported here.

A peer's function `prepare(problem) -> Prepared` allocates, plans and compiles; what it returns can then be captured.
It raises ImportError where the peer is not installed and Unsupported where it does not do what is asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pageproof.oracle import NumericContract
from pageproof.oracle.building.problem import Problem

ATTENTION = ("attention",)
ABSORBED = ("mla_attention",)
ALL_ATTENTION = ("attention", "mla_attention", "mla_attention_decompressed")
UPDATES = ("update_kv_cache", "update_mla_cache")


class Unsupported(Exception):
    """What the peer does not do, or does in a way that no contract here can say."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One implementation ready to be captured."""

    work: Callable[[], None]  # one layer's operation
    outputs: dict[str, Tensor]  # what it writes, named and shaped like the problem's outputs; all or some of them
    contract: NumericContract  # its arithmetic; not looked at for cache updates, which are exact
    collect: Callable[[], None] | None = None  # brings into `outputs` what the work leaves elsewhere; not timed
    plan: Callable[[], None] | None = None  # what is done once per step, for all layers, and timed apart
    plan_on: str = "device"  # or "host": cannot be captured
    note: str = ""  # what a reader of its time has to know


@dataclass(frozen=True)
class Peer:
    """Where a peer's function is, what it is for, and the sections where it is measured without being named."""

    target: str
    operations: tuple[str, ...]
    sections: tuple[str, ...] | None = None

    def prepare(self, problem: Problem) -> Prepared:
        module, _, function = self.target.partition(":")
        prepared: Prepared = getattr(importlib.import_module(module), function)(problem)
        return prepared


PEERS: dict[str, Peer] = {
    "ours": Peer("peers.ours:with_plan_given", ALL_ATTENTION),
    "ours-planning": Peer("peers.ours:planning_itself", ALL_ATTENTION, ("mixed",)),
    "ours-invariant": Peer("peers.ours:batch_invariant", ALL_ATTENTION, ("decode", "mixed", "mla")),
    "ours-8192": Peer("peers.ours:in_the_widest_bucket", ATTENTION, ("mixed",)),
    "ours-update": Peer("peers.ours:update", UPDATES),
    "vllm-2d": Peer("peers.vllm:unsplit", ATTENTION),
    "vllm-3d": Peer("peers.vllm:split", ATTENTION),
    "vllm-mla": Peer("peers.vllm:latent", ABSORBED),
    "vllm-update": Peer("peers.vllm:update", ("update_kv_cache",)),
    "sglang-8": Peer("peers.sglang:in_8_splits", (*ATTENTION, *ABSORBED)),
    "sglang-32": Peer("peers.sglang:in_32_splits", (*ATTENTION, *ABSORBED)),
    "sglang-128": Peer("peers.sglang:in_128_splits", (*ATTENTION, *ABSORBED)),
    "sglang-extend": Peer("peers.sglang:extend", ATTENTION),
    "flashinfer-decode": Peer("peers.flashinfer:decode", ATTENTION),
    "flashinfer-fa2": Peer("peers.flashinfer:fa2", (*ATTENTION, *ABSORBED)),
    "flashinfer-fa3": Peer("peers.flashinfer:fa3", (*ATTENTION, *ABSORBED)),
    "flashinfer-update": Peer("peers.flashinfer:update", ("update_kv_cache",)),
    "sdpa-cudnn": Peer("peers.torch_attention:cudnn", ATTENTION),
    "sdpa-flash": Peer("peers.torch_attention:flash", ATTENTION),
    # Compiles anew for every shape, some 20 s each.
    "flex": Peer("peers.torch_attention:flex", ATTENTION, ("prefill",)),
    "torch-update": Peer("peers.torch_attention:update", UPDATES),
}


def is_ours(name: str) -> bool:
    return name.partition("-")[0] == "ours"


def chosen(asked: list[str] | None, operation: str, section: str) -> dict[str, Peer]:
    """The peers of one row. `asked`: names, or families ("vllm" for all that begin with "vllm-"); None: the usual."""
    here = {name: peer for name, peer in PEERS.items() if operation in peer.operations}
    if asked is None:
        return {name: peer for name, peer in here.items() if peer.sections is None or section in peer.sections}

    def is_named(name: str, peer: Peer) -> bool:
        usual = peer.sections is None or section in peer.sections
        return name in asked or (usual and name.partition("-")[0] in asked)

    return {name: peer for name, peer in here.items() if is_named(name, peer)}


def unknown(asked: list[str]) -> list[str]:
    """Of the names asked for those that are neither a peer's nor a family's."""
    return [name for name in asked if name not in PEERS and name not in {known.partition("-")[0] for known in PEERS}]
