"""LoRA+ on a transformer that is plain functions and a dict of arrays, with a mixture of experts.

    python examples/12_plain_transformer.py

Layers lie in stacked arrays, as in maxtext and jax-llm-examples, and `jax.lax.scan` runs them; `jax.lax.ragged_dot`
groups the experts' products. Adapters on both cost thin products, as those of a layer do.
"""

import jax
import jax.numpy as jnp
import optax

from loraplus_jax import LoRAPlusConfig, describe, lora_plus_adamw, merge
from loraplus_jax.functions import apply_lora_plus, init_lora, whole_weights

LAYERS, WIDTH, HEADS, EXPERTS, HIDDEN, VOCABULARY = 2, 32, 4, 4, 64, 17


def make_params(key):
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "layers": {
            "qkv": (LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS),
            "out": (LAYERS, HEADS, WIDTH // HEADS, WIDTH),
            "router": (LAYERS, WIDTH, EXPERTS),
            "gate_up": (LAYERS, EXPERTS, WIDTH, 2 * HIDDEN),
            "down": (LAYERS, EXPERTS, HIDDEN, WIDTH),
        },
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    draws = [
        jax.random.normal(key, shape) * shape[-2] ** -0.5 for key, shape in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, draws)


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def attention(x, layer):
    q, k, v = jnp.moveaxis(jnp.einsum("bti,iknh->bktnh", norm(x), layer["qkv"]), 1, 0)
    return x + jnp.einsum(
        "btnh,nho->bto", jax.nn.dot_product_attention(q, k, v, is_causal=True), layer["out"]
    )


def experts(x, layer):
    """Each token goes to its best expert."""
    rows = norm(x).reshape(-1, WIDTH)
    weights = jax.nn.softmax(rows @ layer["router"])
    chosen = jnp.argmax(weights, -1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=EXPERTS)
    gate, up = jnp.split(jax.lax.ragged_dot(rows[order], layer["gate_up"], sizes), 2, -1)
    y = jax.lax.ragged_dot(jax.nn.silu(gate) * up, layer["down"], sizes)
    y = y[jnp.argsort(order)] * jnp.take_along_axis(weights, chosen[:, None], -1)
    return x + y.reshape(x.shape)


def forward(params, tokens):
    x = params["embed"][tokens]
    x, _ = jax.lax.scan(lambda x, layer: (experts(attention(x, layer), layer), None), x, params["layers"])
    return norm(x) @ params["embed"].T


# One letter per axis: i input, o output, any other a batch axis: l the layers, e the experts.
RULES = {
    "layers/qkv": "liooo",
    "layers/out": "liio",
    "layers/(gate_up|down)": "leio",
}
CONFIG = LoRAPlusConfig(target_parameters=RULES, rank=4, rank_pattern={"qkv": 8}, lr_ratio=4.0)


def main():
    params = make_params(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (16, 12), 0, VOCABULARY)
    tokens = tokens.at[:, 6:].set(tokens[:, :6])  # the second half repeats the first

    apply = apply_lora_plus(forward, CONFIG)
    lora, specs = init_lora(jax.random.key(2), params, CONFIG, check=(forward, tokens))
    tx = lora_plus_adamw(1e-2, lr_ratio=CONFIG.lr_ratio, specs=specs)
    merged = whole_weights(forward, CONFIG, params, tokens)
    print(describe(lora, tx, specs, frozen=params, merged=merged))

    def loss_fn(lora):
        logits = apply(params, lora, tokens[:, :-1])[:, 5:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 6:]).mean()

    @jax.jit
    def step(lora, state):
        loss, grads = jax.value_and_grad(loss_fn)(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    state, losses = tx.init(lora), []
    for _ in range(150):
        lora, state, loss = step(lora, state)
        losses.append(float(loss))

    tuned = merge({"params": params}, lora, specs)["params"]
    same = float(jnp.abs(forward(tuned, tokens) - apply(params, lora, tokens)).max())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}; merged differs by {same:.1e}")
    return losses[0], losses[-1], same, len(merged)


if __name__ == "__main__":
    main()
