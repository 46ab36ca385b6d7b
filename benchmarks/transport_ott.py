"""The potentials that ott-jax's ``MetaInitializer`` predicts, trained for so many seconds; run by ``benchmarks.transport``.

``python transport_ott.py GIVEN FOUND EPSILON SECONDS``, by a Python with ``ott-jax`` and ``flax``, on one core. GIVEN has the
training images and the test pairs, FOUND gets the potentials in our convention: ott's are ``f + epsilon log alpha``. Its
geometry is its own for grids, which knows the Kronecker structure; compilation is not counted.
"""

from __future__ import annotations

import os
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ott.geometry import grid
from ott.initializers.neural import meta_initializer

HIDDEN, BATCH = (512, 512, 512), 256


class MLP(nn.Module):
    """The network of ott's own example: relu, three hidden layers."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        for width in HIDDEN:
            z = nn.relu(nn.Dense(width)(z))
        return nn.Dense(784)(z)


def main(given: str, found: str, epsilon: float, seconds: float) -> None:
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    data = np.load(given)
    images = data["train"]
    geometry = grid.Grid(grid_size=(28, 28), epsilon=epsilon)
    learned = meta_initializer.MetaInitializer(geometry, MLP(), optax.adam(1e-3), rng=jax.random.PRNGKey(0))
    generator = np.random.default_rng(0)

    def pairs() -> list[np.ndarray]:
        chosen = images[generator.integers(len(images), size=(2, BATCH))].astype(np.float32)
        return list(chosen / chosen.sum(-1, keepdims=True))

    learned.update(learned.state, *pairs())  # compiles
    steps, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        loss, _, learned.state = learned.update(learned.state, *map(jnp.asarray, pairs()))
        loss.block_until_ready()
        steps += 1
    alpha, beta = data["alpha"], data["beta"]
    potential = np.asarray(learned._compute_f(jnp.asarray(alpha), jnp.asarray(beta), learned.state.params))
    with np.errstate(divide="ignore"):
        ours = np.where(alpha > 0, potential - epsilon * np.log(alpha), 0)
    spent = f"{time.process_time() - started:.0f} s of CPU time"
    detail = f"{steps} steps of {BATCH} pairs in {spent}, MLP of {HIDDEN}, loss {float(loss):.4f}"
    np.savez(found, potential=ours.astype(np.float32), detail=detail)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
