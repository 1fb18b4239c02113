"""expert_moe: any routing, computed by devices that hold some of the experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fnml.core import LayoutError, make_mesh
from fnml.models import moe
from fnml.parallel import expert_moe

E, D, M = 4, 8, 6


def make(axes):
    return make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])


def draw(shunned):
    """Parameters whose router gives the ``shunned`` experts nothing, and tokens."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    router = normal(D, E).at[:, jnp.array(shunned, jnp.int32)].add(-20.0)
    params = {"router": router, "gate": normal(E, D, M), "up": normal(E, D, M)}
    return {**params, "down": normal(E, M, D)}, jnp.abs(normal(4, 6, D))


def with_grads(layer, k):
    def loss(x, params):
        y, routes = layer(x, params, experts_per_token=k)
        return jnp.sum(jnp.sin(y)) + routes.balance, (y, routes.sizes)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


CASES = [
    # Where it runs, how it is told, the experts that get nothing, experts per token.
    ({"expert": 4}, {}, [2], 2),
    ({"expert": 2, "data": 4}, {"batch": "data"}, [0, 1], 2),
    ({"data": 2, "sequence": 2, "expert": 2}, {"batch": "data", "sequence": "sequence"}, [], 1),
    ({"expert": 4, "data": 2}, {}, [0, 1, 3], 1),
]


@pytest.mark.parametrize(("axes", "options", "shunned", "k"), CASES, ids=str)
def test_it_is_the_mixture_of_one_device(axes, options, shunned, k):
    params, x = draw(shunned)
    grads, (y, sizes) = with_grads(expert_moe(make(axes), **options), k)(x, params)
    grads_r, (y_r, sizes_r) = with_grads(moe, k)(x, params)
    np.testing.assert_array_equal(sizes, sizes_r)
    assert int(sizes.sum()) == 24 * k and not np.any(np.asarray(sizes)[shunned])
    for a, b in zip(*map(jax.tree.leaves, ((y, grads), (y_r, grads_r))), strict=True):
        # Each token's experts are added up in another order: some ulps, relative in norm.
        assert np.linalg.norm(np.float64(a) - b) <= 1e-6 * np.linalg.norm(b)


def test_each_device_holds_its_experts_alone():
    mesh = make({"expert": 4})
    params, x = draw([])
    lies = {name: P() if name == "router" else P("expert") for name in params}
    shapes = {
        name: jax.ShapeDtypeStruct(
            p.shape, p.dtype, sharding=jax.sharding.NamedSharding(mesh, lies[name])
        )
        for name, p in params.items()
    }
    compiled = jax.jit(lambda x, p: expert_moe(mesh)(x, p)[0]).lower(x, shapes).compile()
    # 4 * 6 * 8 tokens, a router of 8 x 4, and of each of three arrays one expert in four.
    expected = 4 * (x.size + D * E + 3 * D * M)
    assert compiled.memory_analysis().argument_size_in_bytes == expected
    assert "all-gather" not in compiled.as_text()


def test_misuse_is_named():
    mesh = make({"data": 2, "expert": 4})
    with pytest.raises(LayoutError, match=r"axis='exprt'.*'expert'\?"):
        expert_moe(mesh, "exprt")
    params, x = draw([])
    with pytest.raises(LayoutError, match=r"x \(3, 6, 8\), of which 2 .* do not divide axis 0"):
        expert_moe(mesh, batch="data")(x[:3], params)
    six = {name: jnp.concatenate([p, p[:2]]) for name, p in params.items() if name != "router"}
    with pytest.raises(LayoutError, match="6 experts, which 4 devices along 'expert' do not"):
        expert_moe(mesh)(x, {**six, "router": params["router"]})
    with pytest.raises(LayoutError, match="inside a shard_map or pmap over"):
        jax.shard_map(
            lambda x: expert_moe(mesh)(x, params)[0],
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )(x)
