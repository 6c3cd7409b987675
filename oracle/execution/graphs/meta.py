"""What an operator would return, found without running it: from torch's own rules for tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import NotEmulated
from .leaves import leaves, map_leaves

Allocate = Callable[[Tensor], Tensor]


class Shapes:
    """The results of one operator, without their values.

    `new`, after `results`: one entry for each tensor returned, the memory allocated for it, or None where the
    operator returns an argument that it has written.
    """

    def __init__(self, user: str, func: Any, args: Any, kwargs: Any) -> None:
        self.new: list[Tensor | None] = []
        self._func = func
        self._bound = _bind(func, args, kwargs)
        self._twins: dict[int, Tensor] = {}
        meta_args, meta_kwargs = map_leaves(self._without_memory, (args, kwargs))
        try:
            self._returned = func(*meta_args, **meta_kwargs)
        except NotImplementedError as error:
            raise NotEmulated(f"{user}: torch has no rule for the sizes of its results") from error
        for name, value in self._written():
            for tensor in leaves(value):
                if isinstance(tensor, Tensor) and self._twins[id(tensor)].shape != tensor.shape:
                    raise NotEmulated(f"{user}: {name} is resized inside of a capture, which is not emulated")

    def results(self, allocate: Allocate) -> Any:
        """What the operator returns: the arguments that it writes, and memory from `allocate` for everything else."""
        returns = self._func._schema.returns
        whole = self._returned if len(returns) > 1 else (self._returned,)
        written = {alias: value for alias, value in self._aliases() if alias}
        results = []
        for declared, returned in zip(returns, whole, strict=True) if returns else ():
            if declared.alias_info is not None:
                results.append(written[_alias(declared)])
                self.new += [None for _ in leaves(returned)]
                continue
            fresh = map_leaves(lambda leaf: allocate(leaf) if isinstance(leaf, Tensor) else leaf, returned)
            self.new += [leaf if isinstance(leaf, Tensor) else None for leaf in leaves(fresh)]
            results.append(fresh)
        if not returns:
            return None
        return tuple(results) if len(returns) > 1 else results[0]

    def _aliases(self) -> list[tuple[frozenset[str], Any]]:
        arguments = self._func._schema.arguments
        return [(_alias(declared), self._bound[declared.name]) for declared in arguments]

    def _written(self) -> list[tuple[str, Any]]:
        arguments = self._func._schema.arguments
        return [
            (declared.name, self._bound[declared.name])
            for declared in arguments
            if declared.alias_info is not None and declared.alias_info.is_write
        ]

    def _without_memory(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        if isinstance(leaf, torch.Generator):
            return None
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._twins:
            twin = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
            self._twins[id(leaf)] = twin
        return self._twins[id(leaf)]


def _bind(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by their names; None for those left to their defaults."""
    names = [declared.name for declared in func._schema.arguments]
    return {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}


def _alias(declared: Any) -> frozenset[str]:
    alias = declared.alias_info
    return frozenset() if alias is None else frozenset(alias.before_set)
