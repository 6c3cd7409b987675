"""A decoder's step over one bucket: what lies between two attentions in pieces, for modes to capture or compile.

piece 0: plan, embedding, norm, projections, rotary, KV update of layer 0
attend   layer 0: the candidate's operation
piece 1: output projection and MLP of layer 0; norm, projections, rotary, KV update of layer 1
...
piece num_layers: output projection and MLP of the last layer, final norm
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.problem import Rules
from ..candidate import Candidate, plan_for
from ..execution.program import Call, Tensors
from .buffers import Buffers, Caches
from .heads import Heads, Rotation, heads_of
from .shapes import ModelShape
from .weights import Layer, Weights

Attend = Callable[[int, dict[str, Any]], None]


class Flow(NamedTuple):
    """What a piece hands to the next one: memory of the captures' pool."""

    hidden: Tensor  # [num_tokens, hidden_size]
    rotation: Rotation
    shared: dict[str, Any]  # attention's arguments that all layers share: the plan, where there is one


@dataclass
class ModelStep:
    """One model over one bucket's memory, with a candidate's operators."""

    shape: ModelShape
    weights: Weights
    buffers: Buffers
    caches: Caches
    candidate: Candidate
    keeps_layers: bool = False  # each layer's attention has an output of its own; else one serves all layers
    call: Call = field(init=False)
    rules: Rules = field(init=False)
    heads: Heads = field(init=False)
    answers: list[Tensors] = field(init=False)  # of each layer: out, lse

    def __post_init__(self) -> None:
        num_tokens, embedding = self.buffers.bucket.num_tokens, self.weights.embedding
        self.call = self.candidate.call
        self.rules = Rules(softmax_scale=self.shape.softmax_scale)
        self.heads = heads_of(self.shape, num_tokens, embedding.dtype, embedding.device)

        def answer() -> Tensors:
            rows = (num_tokens, self.shape.num_query_heads)
            out = torch.zeros(*rows, self.shape.value_row, dtype=embedding.dtype, device=embedding.device)
            return {"out": out, "lse": torch.zeros(rows, dtype=torch.float32, device=embedding.device)}

        count = self.shape.num_layers
        self.answers = [answer() for _ in range(count)] if self.keeps_layers else [answer()] * count

    @property
    def num_pieces(self) -> int:
        return self.shape.num_layers + 1

    @property
    def outputs(self) -> Tensors:
        """What attention wrote, by layer: "out 0", "lse 0" and so on."""
        return {f"{name} {index}": tensor for index, one in enumerate(self.answers) for name, tensor in one.items()}

    def __call__(self) -> tuple[Tensors, Tensors]:
        """All of it: `outputs`, and the last hidden states as "hidden" [num_tokens, hidden_size]."""
        return self.run(self.attend)

    def run(self, attend: Attend) -> tuple[Tensors, Tensors]:
        """The same with another way to attend."""
        flow = self.piece(0, None)
        for index in range(self.shape.num_layers):
            attend(index, self.arguments(index, flow))
            flow = self.piece(index + 1, flow)
        return self.outputs, {"hidden": flow.hidden}

    def piece(self, number: int, flow: Flow | None) -> Flow:
        """What lies before attention of layer `number`, from attention of the layer before it on."""
        flow = self._begin() if flow is None else self._continued(number - 1, flow)
        if number < self.shape.num_layers:
            self._before(number, flow)
            return flow
        return Flow(self._norm(flow.hidden, self.weights.final_norm), flow.rotation, flow.shared)

    def arguments(self, index: int, flow: Flow) -> dict[str, Any]:
        """Of attention in layer `index`."""
        read = {**self.heads.queries, **self.caches[index], "batch": self.buffers.batch, "rules": self.rules}
        return {**read, **self.answers[index], **flow.shared}

    def attend(self, index: int, arguments: dict[str, Any]) -> None:
        """Attention of layer `index`, into its answer."""
        self.call(self.heads.operation, dict(arguments))  # a dict of its own: replays give the same one again

    def _begin(self) -> Flow:
        buffers, weights = self.buffers, self.weights
        shared = plan_for(self.candidate, buffers.batch, buffers.capacity)
        rotation = Rotation(weights.cosines[buffers.positions], weights.sines[buffers.positions])
        return Flow(F.embedding(buffers.tokens, weights.embedding), rotation, shared)

    def _continued(self, index: int, flow: Flow) -> Flow:
        return Flow(self._after(index, flow.hidden), flow.rotation, flow.shared)

    def _before(self, index: int, flow: Flow) -> None:
        layer = self.weights.layers[index]
        rows = self.heads.project(self._norm(flow.hidden, layer["attention_norm"]), layer, flow.rotation)
        self.call(self.heads.update, {**rows, **self.caches[index], "slot_mapping": self.buffers.slot_mapping})

    def _after(self, index: int, hidden: Tensor) -> Tensor:
        layer = self.weights.layers[index]
        attended = self.heads.gather(self.answers[index]["out"], layer)
        hidden = hidden + attended @ layer["output"]
        return hidden + self._mlp(self._norm(hidden, layer["mlp_norm"]), layer)

    def _mlp(self, x: Tensor, layer: Layer) -> Tensor:
        gate, up = (x @ layer["gate_up"]).chunk(2, dim=1)
        return (F.silu(gate) * up) @ layer["down"]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden_size,), weight, self.shape.rms_norm_eps)
