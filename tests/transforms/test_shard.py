"""A step that the compiler divides over a mesh: the gradients of one device, and where all of it lies.

Gradients are compared, not trajectories: Adam divides a gradient by its own size, so a wrong factor
of 8 leaves hardly a trace in what it makes of it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fnml import transforms
from fnml.core import LayoutError, Metrics, ShapeError, State, init, make_mesh, shardings
from fnml.models import GPTConfig, MLPConfig, gpt, mlp
from fnml.parallel import DATA, EXPERT, FSDP, TENSOR, combine
from fnml.train import cross_entropy, train_step
from fnml.transforms import shard, state_shardings

B, T, V = 8, 8, 32
SMALL = GPTConfig(vocab=V, width=16, layers=2, heads=4, context=T, unroll=1, dropout=0.1)
BATCH = P(("data", "expert"))
DENSE = gpt(SMALL, residual=BATCH)
EXPERTS = gpt(
    GPTConfig(vocab=V, width=16, layers=2, heads=4, context=T, unroll=1, experts=4), residual=BATCH
)
TOKENS = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
DATA_BATCH = {"x": TOKENS[:, :-1], "y": TOKENS[:, 1:]}
KEY = jax.random.key(7)


def loss_of(model):
    def loss_fn(params, batch, key):
        loss = cross_entropy(model.apply(params, batch["x"], key=key), batch["y"])
        return loss.value, Metrics(loss.weight)

    return loss_fn


def grad_of(model):
    return jax.value_and_grad(loss_of(model), has_aux=True)


@functools.cache
def alone(model_name):
    """Return the parameters of a model, and their gradient on one device."""
    model = {"dense": DENSE, "experts": EXPERTS}[model_name]
    params = init(model.spec, jax.random.key(0))
    return model, params, jax.jit(grad_of(model))(params, DATA_BATCH, KEY)[1]


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def assert_same_gradient(found, expected, relative=1e-6):
    found, expected = flat(found), flat(expected)
    norm = np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) <= relative * norm
    assert abs(np.linalg.norm(found) / norm - 1) <= 1e-5


def by_compiler(model, axes, rules):
    """Return the gradient as a step of its own: it takes parameters and returns what is like them."""
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    placed = shardings(model.spec, mesh, rules)
    divided = P(tuple(axis for axis in ("data", "expert") if axis in axes) or None)

    def step(params, batch):
        (loss, _), grads = grad_of(model)(params, batch, KEY)
        return grads, loss

    return shard(step, mesh, placed, divided)


class Form(NamedTuple):
    """A way of dividing, by rules for the compiler."""

    axes: dict[str, int]
    rules: Any
    model: str = "dense"


FORMS = {
    "data": Form({"data": 8}, DATA),
    "fsdp": Form({"data": 8}, FSDP),
    "tensor": Form({"model": 4}, TENSOR),
    "data x tensor": Form({"data": 2, "model": 4}, TENSOR),
    "fsdp x tensor": Form({"data": 2, "model": 4}, combine(FSDP, TENSOR)),
    "expert": Form({"data": 2, "expert": 4}, EXPERT, "experts"),
    "fsdp x expert x tensor": Form(
        {"data": 2, "expert": 2, "model": 2}, combine(FSDP, EXPERT, TENSOR), "experts"
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_is_that_of_one_device(name):
    axes, rules, model_name = FORMS[name]
    model, params, expected = alone(model_name)
    found, _ = by_compiler(model, axes, rules)(params, DATA_BATCH)
    assert_same_gradient(found, expected)
    for where, x in zip(jax.tree.leaves(model.spec), jax.tree.leaves(found), strict=True):
        ways = [dict(axes).get(rules.get(axis) or "", 1) for axis in where.axes]
        assert x.addressable_shards[0].data.shape == tuple(
            size // n for size, n in zip(where.shape, ways, strict=True)
        )


def mapped(model, check_vma):
    """Average over 8 devices by hand, in the form that is right in both modes of shard_map."""
    mesh = make_mesh({"data": 8})

    def local(params, batch):
        params = lax.pcast(params, "data", to="varying")
        return lax.pmean(grad_of(model)(params, batch, None)[1], "data")

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )
    return jax.jit(run)


@pytest.mark.parametrize("name", ["shard_map checked", "shard_map unchecked", "pmap", "exact"])
def test_the_mapped_roads_have_the_gradient_of_one_device_too(name):
    # Dropout draws apart for each shard here, so there is none.
    model, params, _ = alone("dense")
    grad_fn = grad_of(model)
    expected = jax.jit(grad_fn)(params, DATA_BATCH, None)[1]
    if name.startswith("shard_map"):
        found = mapped(model, name.endswith(" checked"))(params, DATA_BATCH)
    else:
        whole = jax.value_and_grad(lambda p, b, key: loss_of(model)(p, b, None), has_aux=True)
        exact = transforms.data_parallel(whole, make_mesh({"data": 8}))
        lay = exact if name == "exact" else transforms.pmap(whole, jax.devices(), reduce="fast")
        found = jax.jit(lay)(params, DATA_BATCH, KEY)[1]
    assert_same_gradient(found, expected)


def sharded_training(make_step, rules, optimizer, model=DENSE, axes=None):
    """Return a step divided over a mesh, and its first state in its places."""
    mesh = make_mesh(axes or {"data": 2, "model": 4})
    state = State.create(init(model.spec, jax.random.key(0)), optimizer, jax.random.key(1))
    places = state_shardings(state, shardings(model.spec, mesh, rules))
    return shard(make_step, mesh, places), jax.device_put(state, places), places


def test_a_whole_step_keeps_a_part_of_everything_on_each_device():
    optimizer = transforms.ema(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), 0.9)
    plain = train_step(grad_of(DENSE), optimizer)
    rules = combine(FSDP, TENSOR)
    step, state, places = sharded_training(plain, rules, optimizer)
    new, metrics = step(state, DATA_BATCH)
    expected, one = jax.jit(plain)(jax.device_put(state, jax.devices()[0]), DATA_BATCH)
    np.testing.assert_allclose(metrics["loss"].value, one["loss"].value, rtol=1e-6)
    # Adam's first step divides by the gradient's size; its average keeps the gradient itself.
    mu = [s.opt_state.inner[1][0].mu for s in (new, expected)]
    assert_same_gradient(*mu)
    for x, where in zip(jax.tree.leaves(new), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim)
    # Two moments, the average and the parameters; norms have no dimension for the second axis.
    whole, held = (
        sum(part(x).nbytes for x in jax.tree.leaves((new.params, new.opt_state)))
        for part in (lambda x: x, lambda x: x.addressable_shards[0].data)
    )
    norms = 5 * SMALL.width * 4 * 4
    counts = 2 * 4
    assert held - counts == (whole - norms - counts) // 8 + norms // 2


def assert_places(optimizer, params, expected_sharded):
    """Check that moments lie as their parameters do, and the rest everywhere; count the former."""
    mesh = make_mesh({"data": 8})
    where = jax.tree.map(
        lambda p: NamedSharding(mesh, P(*(["data"] + [None] * (p.ndim - 1)))), params
    )
    state = State.create(params, optimizer, KEY, {"w": jnp.ones((8, 2))})
    places = state_shardings(jax.eval_shape(lambda: state), where)
    sharded = 0
    for path, place in jax.tree.leaves_with_path(places.opt_state):
        leaf = functools.reduce(lambda tree, key: key_of(tree, key), path, state.opt_state)
        divided = leaf.ndim and leaf.shape[0] % 8 == 0
        assert place.spec == (P("data", *[None] * (leaf.ndim - 1)) if divided else P()), path
        sharded += bool(divided)
    assert sharded == expected_sharded
    assert places.model_state["w"].spec == places.key.spec == places.step.spec == P()
    # What is put there stays there.
    jax.device_put(state, places)


def key_of(tree, key):
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            where = getattr(key, name)
            return (
                getattr(tree, where)
                if isinstance(where, str) and hasattr(tree, where)
                else tree[where]
            )
    raise AssertionError(key)


PARAMS = {"a": {"w": jnp.ones((8, 3)), "b": jnp.ones((8,))}, "w": [jnp.ones((16, 2))]}
LABELS = {"a": {"w": "x", "b": "y"}, "w": ["y"]}


@pytest.mark.parametrize(
    ("optimizer", "count"),
    [
        (optax.sgd(0.1), 0),
        (optax.adamw(0.1), 6),
        (optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)), 3),
        (optax.masked(optax.adam(0.1), {"a": {"w": True, "b": False}, "w": [True]}), 4),
        (optax.multi_transform({"x": optax.adam(0.1), "y": optax.sgd(0.1, 0.9)}, LABELS), 4),
        (optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), 9),
        (transforms.ema(optax.adam(0.1), 0.9), 9),
    ],
    ids=["sgd", "adamw", "chain", "masked", "multi_transform", "MultiSteps", "ema"],
)
def test_optimizer_state_lies_as_its_parameters(optimizer, count):
    assert_places(optimizer, PARAMS, count)


def test_the_longest_path_decides_and_another_shape_does_not_count():
    params = {"w": jnp.ones((8, 8)), "a": {"w": jnp.ones((8, 8))}}
    mesh = make_mesh({"data": 8})
    where = {
        "w": NamedSharding(mesh, P("data")),
        "a": {"w": NamedSharding(mesh, P(None, "data"))},
    }
    places = state_shardings(State.create(params, optax.adam(0.1), KEY), where)
    assert places.opt_state[0].mu["a"]["w"].spec == P(None, "data")
    assert places.opt_state[0].mu["w"].spec == P("data")
    factored = state_shardings(
        State.create(params, optax.scale_by_factored_rms(min_dim_size_to_factor=4), KEY), where
    )
    assert factored.opt_state.v_row["w"].spec == P()


def test_frozen_parameters_have_no_optimizer_state_to_place():
    model = transforms.lora(DENSE, rank=2)
    optimizer = transforms.train_only(optax.adam(1e-2), model)
    plain = train_step(transforms.trainable_value_and_grad(loss_of(model), model), optimizer)
    step, state, _ = sharded_training(plain, combine(FSDP, TENSOR), optimizer, model)
    new, _ = step(state, DATA_BATCH)
    expected, _ = jax.jit(plain)(jax.device_put(state, jax.devices()[0]), DATA_BATCH)
    assert_same_gradient(new.opt_state[0].mu, expected.opt_state[0].mu)


def change(old, new):
    """Return by how much parameters fell: the gradient, under plain descent at a rate of 1."""
    return jax.tree.map(jnp.subtract, *jax.device_get((old.params, new.params)))


def test_other_transforms_go_inside():
    sgd, loss = optax.sgd(1.0), transforms.remat(loss_of(DENSE), "nothing")
    grad_fn = transforms.accumulate(jax.value_and_grad(loss, has_aux=True), 2)
    plain = transforms.skip_nonfinite(train_step(grad_fn, sgd))
    step, state, _ = sharded_training(plain, combine(FSDP, TENSOR), sgd)
    new, _ = step(state, DATA_BATCH)
    expected, _ = jax.jit(plain)(jax.device_put(state, jax.devices()[0]), DATA_BATCH)
    # A difference of parameters has lost the digits that they share.
    assert_same_gradient(change(state, new), change(state, expected), 1e-5)


def test_exact_data_parallelism_inside_keeps_its_bits_on_sharded_parameters():
    sgd, mesh = optax.sgd(1.0), make_mesh({"data": 2, "model": 4})
    plain = train_step(transforms.data_parallel(grad_of(DENSE), mesh), sgd)
    step, state, _ = sharded_training(plain, FSDP, sgd)
    new, _ = step(state, DATA_BATCH)
    everywhere = jax.device_put(state, NamedSharding(mesh, P()))
    expected, _ = jax.jit(plain)(everywhere, DATA_BATCH)
    np.testing.assert_array_equal(flat(new.params), flat(expected.params))


def test_several_steps_in_one_dispatch():
    optimizer = optax.sgd(0.1)
    plain = train_step(grad_of(DENSE), optimizer)
    mesh = make_mesh({"data": 2, "model": 4})
    state = State.create(init(DENSE.spec, jax.random.key(0)), optimizer, jax.random.key(1))
    places = state_shardings(state, shardings(DENSE.spec, mesh, FSDP))
    stacked = jax.tree.map(lambda x: np.stack([x, x[::-1]]), DATA_BATCH)
    step = shard(transforms.fuse(plain, 2), mesh, places, P(None, "data"), donate=True)
    expected, wanted = jax.jit(transforms.fuse(plain, 2))(state, stacked)
    placed = jax.device_put(state, places)
    new, metrics = step(placed, stacked)
    np.testing.assert_allclose(metrics["loss"].total, wanted["loss"].total, rtol=1e-6)
    assert_same_gradient(new.params, expected.params)
    assert all(x.is_deleted() for x in jax.tree.leaves(placed.params))


def test_what_cannot_be_divided_is_refused_with_every_name():
    mesh = make_mesh({"data": 8})
    where = {"a": NamedSharding(mesh, P("data")), "b": NamedSharding(mesh, P(None, "data"))}
    step = shard(lambda state, batch: (state, 0.0), mesh, where)
    state = {"a": jnp.ones(12), "b": jnp.ones((8, 9))}
    with pytest.raises(LayoutError) as error:
        step(state, {"x": np.ones((6, 2)), "y": np.float32(1)})
    for words in (
        "state/a: dimension 0 of (12,) has size 12, which 8 devices",
        "state/b: dimension 1 of (8, 9) has size 9",
        "batch/x: dimension 0 of (6, 2) has size 6",
        "batch/y: the shape () has fewer dimensions",
    ):
        assert words in str(error.value), str(error.value)


def test_what_lies_elsewhere_is_refused_with_the_cure():
    mesh = make_mesh({"data": 8})
    step = shard(lambda state, batch: (state, 0.0), mesh, NamedSharding(mesh, P("data")))
    elsewhere = jax.device_put(jnp.ones(8), NamedSharding(mesh, P()))
    with pytest.raises(LayoutError, match=r"jax.device_put\(state, shardings\) moves it"):
        step(elsewhere, np.ones(8))


def test_an_error_of_the_step_stays_what_it_is():
    mesh = make_mesh({"data": 8})

    def step(state, batch):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        shard(step, mesh, NamedSharding(mesh, P()))(jnp.ones(8), np.ones(8))


def test_axes_and_meshes_that_do_not_go_together_are_refused():
    mesh, other = make_mesh({"data": 8}), make_mesh({"rows": 8})
    with pytest.raises(LayoutError, match=r"\['model'\], and the mesh has \('data',\)"):
        shard(lambda s, b: (s, b), mesh, NamedSharding(mesh, P()), P("model"))
    with pytest.raises(LayoutError, match="of another mesh"):
        shard(lambda s, b: (s, b), mesh, NamedSharding(other, P()))
    state = State.create({"w": jnp.ones(8)}, optax.sgd(0.1), KEY)
    for wrong in ({}, {"w": P("data")}, {"v": NamedSharding(mesh, P())}):
        with pytest.raises(ShapeError, match="a NamedSharding for each parameter"):
            state_shardings(state, wrong)


def test_a_kernel_is_not_left_to_the_compiler_to_divide():
    from fnml.pallas_kernels._implementation import Choice, choose

    mesh = make_mesh({"data": 8})
    seen = []

    def step(state, batch):
        seen.append(choose("k", "auto", {"tpu": [], "cuda": []}))
        inside = jax.shard_map(
            lambda x: (seen.append(choose("k", "auto", {"tpu": [], "cuda": []})), x)[1],
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
        return state, inside(batch)

    shard(step, mesh, NamedSharding(mesh, P()))(jnp.ones(8), np.ones(8, np.float32))
    assert seen == [Choice(only="lax"), Choice(tpu="tpu", cuda="cuda")]
    assert choose("k", "auto", {"tpu": []}) == Choice(tpu="tpu")


def test_the_residual_stream_is_divided_only_where_a_mesh_is_set():
    _, params, _ = alone("dense")
    told, free = DENSE, gpt(SMALL)

    def constraints(model, mesh):
        def apply(params):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return model.apply(params, DATA_BATCH["x"])

        jaxpr = jax.make_jaxpr(apply if mesh else lambda p: model.apply(p, DATA_BATCH["x"]))(params)
        return [
            eqn.params["sharding"].spec
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "sharding_constraint"
        ]

    mesh = make_mesh({"data": 8})
    assert constraints(told, mesh) == [P("data")]
    assert constraints(told, None) == constraints(free, mesh) == []


def test_perceptrons_need_no_word_about_their_activations():
    model = mlp(MLPConfig(inputs=64, hidden=(32, 32), outputs=16))
    mesh = make_mesh({"data": 8})
    x = np.random.default_rng(1).normal(size=(512, 64)).astype(np.float32)
    y = np.arange(512, dtype=np.int32) % 16

    def step(params, batch):
        def loss_fn(params):
            return cross_entropy(model.apply(params, batch["x"]), batch["y"]).value

        return jax.grad(loss_fn)(params), ()

    places = shardings(model.spec, mesh, FSDP)
    params = init(model.spec, jax.random.key(0))
    run = jax.jit(shard(step, mesh, places))
    placed = jax.device_put(params, places)
    text = run.lower(placed, {"x": x, "y": y}).compile().as_text()
    assert "f32[64,64]" in text and "f32[512," not in text
    assert_same_gradient(
        run(placed, {"x": x, "y": y})[0], jax.jit(step)(params, {"x": x, "y": y})[0]
    )
