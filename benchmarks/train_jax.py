"""The updates of three recipes in JAX and optax, K of them as one jitted ``lax.scan``: the rival of compiled training.

The same networks, objectives, batch sizes, optimizers and clipping, written as JAX's users write them; contexts are drawn inside.
Needs jax and optax. One thread, if ``XLA_FLAGS`` was set before jax was imported: :func:`one_thread`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any


def one_thread() -> None:
    """Let XLA compute in one thread, as the other sides do."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def scanned(loss: Callable[[Any, Any], Any], parameters: Any, optimizer: Any, K: int) -> Callable[[], float]:
    """Makes K updates of ``loss(parameters, key)`` in one call, and gives the last loss."""
    import jax
    import optax

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry: Any, key: Any) -> Any:
        def update(carry: Any, key: Any) -> Any:
            parameters, state = carry
            value, gradient = jax.value_and_grad(loss)(parameters, key)
            change, state = optimizer.update(gradient, state, parameters)
            return (optax.apply_updates(parameters, change), state), value

        return jax.lax.scan(update, carry, jax.random.split(key, K))

    parameters = jax.tree.map(lambda x: x + 0, parameters)  # given away, so none of them twice
    held = [(parameters, optimizer.init(parameters)), jax.random.key(1)]

    def call() -> float:
        held[1], key = jax.random.split(held[1])
        held[0], values = run(held[0], key)
        return float(values[-1])

    return call


def dense(key: Any, *widths: int) -> list[Any]:
    """Layers of a network, as ``torch.nn.Linear`` begins them."""
    import jax

    layers = []
    for n, m in zip(widths, widths[1:], strict=False):
        key, a, b = jax.random.split(key, 3)
        bound = 1 / math.sqrt(n)
        layers.append(
            (
                jax.random.uniform(a, (n, m), minval=-bound, maxval=bound),
                jax.random.uniform(b, (m,), minval=-bound, maxval=bound),
            )
        )
    return layers


def mlp(layers: list[Any], x: Any, activation: Callable[[Any], Any]) -> Any:
    for W, c in layers[:-1]:
        x = activation(x @ W + c)
    W, c = layers[-1]
    return x @ W + c


def maml_sinusoid(K: int) -> Callable[[], float]:
    """25 tasks, five steps of gradient descent differentiated through, on a network of 1,761 weights."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.flatten_util import ravel_pytree

    w0, unravel = ravel_pytree(dense(jax.random.key(0), 1, 40, 40, 1))

    def error(b: Any, x: Any, y: Any) -> Any:
        return ((mlp(unravel(w0 + b), x[:, None], jnp.tanh)[:, 0] - y) ** 2).mean()

    def task(parameters: Any, x: Any, y: Any) -> Any:
        b, log_lr = parameters
        for k in range(5):
            b = b - jnp.exp(log_lr[k]) * jax.grad(error)(b, x[:10], y[:10])
        return error(b, x[10:], y[10:])

    def loss(parameters: Any, key: Any) -> Any:
        u = jax.random.uniform(key, (25, 22))
        amplitude, phase, x = 0.1 + 4.9 * u[:, :1], math.pi * u[:, 1:2], 10 * u[:, 2:] - 5
        return jax.vmap(task, (None, 0, 0))(parameters, x, amplitude * jnp.sin(x - phase)).mean()

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(_one_cycle(0.01, 3000), weight_decay=0.01))
    return scanned(loss, (jnp.zeros_like(w0), jnp.full(5, math.log(0.02))), optimizer, K)


def sphere(K: int) -> Callable[[], float]:
    """256 sets of four bowls, read by a set transformer."""
    import jax
    import jax.numpy as jnp
    import optax

    width, heads, gamma = 48, 4, 0.5
    keys = jax.random.split(jax.random.key(0), 10)
    norm = (jnp.ones(width), jnp.zeros(width))
    parameters = {
        "embed": dense(keys[0], 4, width),
        "layers": [
            {
                "qkv": dense(keys[3 * k + 1], width, 3 * width),
                "out": dense(keys[3 * k + 2], width, width),
                "feed": dense(keys[3 * k + 3], width, 2 * width, width),
                "norms": (norm, norm),
            }
            for k in range(2)
        ],
        "norm": norm,
        "readout": dense(keys[9], width, 3),
    }

    def normed(x: Any, p: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return p[0] * x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) + p[1]

    gelu = functools.partial(jax.nn.gelu, approximate=False)

    def network(p: Any, x: Any) -> Any:
        x = mlp(p["embed"], x, gelu)
        for layer in p["layers"]:
            q, k, v = jnp.split(mlp(layer["qkv"], normed(x, layer["norms"][0]), gelu), 3, -1)
            q, k, v = (t.reshape(*t.shape[:2], heads, -1) for t in (q, k, v))
            weights = jax.nn.softmax(jnp.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(width // heads), -1)
            seen = jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape)
            x = x + mlp(layer["out"], seen, gelu)
            x = x + mlp(layer["feed"], normed(x, layer["norms"][1]), gelu)
        return mlp(p["readout"], normed(x, p["norm"]).mean(1), gelu)

    def length(x: Any) -> Any:
        return jnp.sqrt((x * x).sum(-1) + 1e-24)

    def loss(p: Any, key: Any) -> Any:
        first, second = jax.random.split(key)
        y = jax.random.normal(first, (256, 4, 3))
        y, offsets = y / length(y)[..., None], 0.7 * jax.random.uniform(second, (256, 4))
        b = network(p, jnp.concatenate([y, offsets[..., None]], -1))
        x = (b / length(b)[:, None])[:, None]
        bowls = (2 * jnp.arctan2(length(x - y), length(x + y))) ** 2 / 2 + offsets
        value = -gamma * jax.nn.logsumexp(-bowls / gamma, axis=1)
        return (value + (length(b) - 1) ** 2).mean()

    return scanned(loss, parameters, optax.adamw(_one_cycle(0.004, 4000), weight_decay=0.01), K)


def vae_digits(K: int) -> Callable[[], float]:
    """128 images of 64 pixels; a posterior of 8 dimensions, the divergence in closed form."""
    import jax
    import jax.numpy as jnp
    import optax

    from amortized.contexts.images import handwritten_digits

    images = jnp.asarray(handwritten_digits("train")[0].numpy())
    one, two = jax.random.split(jax.random.key(0))
    parameters = {"encoder": dense(one, 64, 256, 256, 16), "decoder": dense(two, 8, 128, 64)}

    def loss(p: Any, key: Any) -> Any:
        first, second = jax.random.split(key)
        a = images[jax.random.randint(first, (128,), 0, len(images))]
        mean, log_scale = jnp.split(mlp(p["encoder"], a, jax.nn.relu), 2, -1)
        u = jax.random.uniform(second, (128, 8), minval=1e-6, maxval=1 - 1e-6)
        z = mean + jnp.exp(log_scale) * jax.scipy.special.ndtri(u)
        logits = mlp(p["decoder"], z, jax.nn.silu)
        distortion = optax.sigmoid_binary_cross_entropy(logits, a).sum(1)
        return (distortion + 0.5 * (mean**2 + jnp.exp(2 * log_scale) - 1 - 2 * log_scale).sum(1)).mean()

    return scanned(loss, parameters, optax.adam(0.001), K)


def _one_cycle(greatest: float, steps: int) -> Any:
    import optax

    return optax.cosine_onecycle_schedule(steps, greatest, pct_start=0.1)
