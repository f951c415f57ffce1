"""Reading a jaxpr: what a traced JAX program computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def floating_results(jaxpr: jax.extend.core.Jaxpr) -> set[tuple[str, str]]:
    """(primitive, floating dtype) of every value a jaxpr computes, those of inner jaxprs included."""
    found = set()
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            dtype = getattr(variable.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                found.add((equation.primitive.name, str(dtype)))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= floating_results(inner)
    return found
