"""How far from the reference a kernel of a declared arithmetic may end up, element by element; docs/bound.md."""
