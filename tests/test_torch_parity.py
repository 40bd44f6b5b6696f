"""The PyTorch networks that the trainer is measured against compute what ours compute: logits, gradients, steps; in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import CONV, MLP, assert_close, config_of, quick_jit, setting_of, small_run, streams_from
from vffjax.errors import UserError
from vffjax.rules import local as rules
from vffjax.rules import similarity as losses
from vffjax.rules import vff
from vffjax.training.augment import normalise
from vffjax.training.trainer import train_step

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[bench]'")
import torch_networks  # noqa: E402
import torch_peers  # noqa: E402
from vffjax.networks.layers import FIXED  # noqa: E402

# Three cells do not divide the 16x16 images' maps of 8x8 and 4x4: head cells overlap.
RECIPE = {"activation": "gelu", "norm_scale": False, "initialisation": "identity", "decay": "linear", "bias_rate": 3.0}
NETWORKS = {
    "mlp": MLP,
    "conv4": CONV | {"head_grid": 3},
    "cifarnet": {"network": "cifarnet", "widths": (4, 6), "whitening": 2} | RECIPE,
}
BP = {"rule": "head", "grouping": "all"}
VFF = {"rule": "vff", "labelling": "triplet"}
SHAPE = (16, 16, 2)
# Sums over up to 512 inputs in another order, in values of about 1.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}

networks = pytest.mark.parametrize("network", NETWORKS)


def both(network, classes=3, examples=0, **changes):
    """Our tiny run, and the peer that starts from it."""
    run = small_run(config_of(**NETWORKS[network] | changes), classes=classes, shape=SHAPE, examples=examples)
    first = run.states[0].params["layers_0"]
    if FIXED in first:
        first[FIXED] = jnp.asarray(np.random.default_rng(0).normal(size=first[FIXED].shape) / 3, jnp.float32)
    return run, torch_peers.Peer(run.plan, run.task, run.states, "cpu")


def tensors(*arrays):
    """What a peer's step takes: bytes as they are, labels as int64."""
    return [torch.from_numpy(np.array(a, np.uint8 if a.dtype == jnp.uint8 else np.int64)) for a in arrays]


def channels_first(x):
    return torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1) if x.ndim == 4 else x))


def channels_last(x):
    x = x.detach().numpy()
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def in_our_layout(group, take):
    """`take` of each of the group's parameters, in a tree like ours; a fixed kernel has gradient 0."""
    values = take(group.head.bias) is group.head.bias

    def kernel(weight):
        return np.einsum("oihw->hwio" if weight.ndim == 4 else "oi->io", weight)

    def of(parameter):
        return take(parameter).detach().numpy().copy()

    tree = {"head": {"kernel": kernel(of(group.head.weight)), "bias": of(group.head.bias)}}
    for i, layer in enumerate(group.layers):
        if isinstance(layer, torch_networks.Whitening):
            tree[f"layers_{i}"] = {FIXED: kernel(layer.kernel.numpy().copy() if values else 0 * layer.kernel.numpy())}
            continue
        norm = {"bias": of(layer.norm.bias)} | ({"scale": of(layer.norm.weight)} if layer.norm.weight.requires_grad else {})
        tree[f"layers_{i}"] = {"kernel": kernel(of(layer.linear.weight)), "norm": norm}
    return tree


@networks
@pytest.mark.parametrize("train", [False, True])
def test_features_logits_and_running_statistics_of_every_group(network, train):
    run, peer = both(network, **VFF)
    ours = normalise(run.data.images, run.task.mean, run.task.std)
    theirs, n = channels_first(ours), len(ours)
    for group, state, peer_group in zip(run.plan.groups, run.states, peer.network, strict=True):
        peer_group.train(train)
        features = quick_jit(lambda params, stats, x, group=group: group.features(params, stats, x, n, train))
        before = state.batch_stats
        ours, stats = features(state.params, before, ours)
        theirs = peer_group.features(theirs)
        assert_close(channels_last(theirs), ours, **TOLERANCE)
        assert_close(peer_group.logits(theirs).detach().numpy(), group.logits(state.params, ours), **TOLERANCE)
        for i, layer in enumerate(peer_group.layers):
            if isinstance(layer, torch_networks.Whitening):
                continue
            old, new = before[f"layers_{i}"]["norm"], stats[f"layers_{i}"]["norm"]
            assert_close(layer.norm.running_mean.numpy(), new["mean"][0], **TOLERANCE)
            # PyTorch's running variance divides by one less than the values of a channel, ours by all of them.
            values = n * (1 if network == "mlp" else np.prod([16 // factor for factor in _factors(run.plan, group, i)]))
            biased = old["var"][0] + (layer.norm.running_var.numpy() - 0.9 * old["var"][0]) * (values - 1) / values - 0.1 * old["var"][0]
            assert_close(biased if train else layer.norm.running_var.numpy(), new["var"][0], **TOLERANCE)


def _factors(plan, group, i):
    """By what both sides of the image are divided where layer `i` of a group normalises."""
    own = group.module.layers
    before = [layer for earlier in plan.groups[: plan.groups.index(group)] for layer in earlier.module.layers] + list(own[:i])
    first = [own[i].pool] if getattr(own[i], "pools_first", False) else []
    factor = int(np.prod([getattr(layer, "pool", 1) for layer in before] + first))
    return factor, factor


@networks
def test_back_propagation_has_our_gradient_of_every_parameter(network):
    run, peer = both(network, label_smoothing=0.1, **BP)
    images, labels, *_ = run.batch()
    streams = streams_from(run, jax.random.key(0), normalise(images, run.task.mean, run.task.std), labels)

    def loss(params):
        return rules.local_loss(params, setting_of(run, 0, jax.random.key(0)), run.plan.groups[0], run.states[0].batch_stats, streams)[0]

    value, gradient = quick_jit(jax.value_and_grad(loss))(run.states[0].params)
    peer_images, peer_labels = tensors(images, labels)
    group = peer.network[0]
    peer_value = torch_peers.head_loss(run.plan.config, group, group.features(peer.prepare(peer_images)), peer_labels)
    peer_value.backward()
    assert_close(peer_value.item(), float(value), **TOLERANCE)
    assert_close(in_our_layout(group, lambda p: p.grad), gradient, **TOLERANCE)


@pytest.mark.parametrize("similarity", ["position", "flat", "grid", "pooled"])
@pytest.mark.parametrize("shape", [(5, 5, 5, 3), (5, 7)])
def test_triplet_cscl_of_given_features_and_its_gradient(similarity, shape):
    config = config_of(similarity=similarity, margin=0.3, temperature=0.2)
    maps = np.maximum(np.random.default_rng(0).normal(size=(3, *shape)), 0).astype(np.float32)
    maps[1, 2] = 0.0  # a map of dead units has cosine 0, not NaN

    def loss(maps):
        embedded = [losses.embed(z, similarity) for z in maps]
        return jax.vmap(vff.cscl_triplet, in_axes=(0, 0, 0, None, None))(*embedded, 0.3, 0.2).mean()

    value, gradient = quick_jit(jax.value_and_grad(loss))(jnp.asarray(maps))
    theirs = [channels_first(z).requires_grad_() for z in maps]
    peer_value = torch_peers.cscl_triplet(*theirs, config)
    peer_value.backward()
    assert_close(peer_value.item(), float(value), rtol=1e-5)
    # At zero features the gradient is finite, and a million times as large as elsewhere.
    assert_close(np.stack([channels_last(z.grad) for z in theirs]), gradient, rtol=1e-4, atol=1e-7)


@networks
@pytest.mark.parametrize("head_weight", [0.0, 0.3, 1.0])
def test_the_three_stream_step_moves_each_group_by_the_gradient_of_its_own_loss(network, head_weight):
    """Plain descent at rate 1 makes a step the gradient; with two classes the wrong label is no matter of chance."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "bias_rate": 1.0}
    run, peer = both(network, classes=2, head_weight=head_weight, label_smoothing=0.1, margin=0.1, temperature=0.5, **plain, **VFF)
    images, labels, *_ = run.batch()
    x = normalise(images, run.task.mean, run.task.std)
    streams, total = [x, x + run.task.codebook[labels], x + run.task.codebook[1 - labels]], 0.0

    def loss(params, group, stats, streams):
        features = [group.features(params, stats, z, len(z), True)[0] for z in streams]  # each by its own statistics
        embedded = [losses.embed(z, "grid") for z in features]
        local = jax.vmap(vff.cscl_triplet, in_axes=(0, 0, 0, None, None))(*embedded, 0.1, 0.5).mean()
        logits = group.logits(params, rules.scale_gradient(features[0], head_weight))
        return local + rules.head_cross_entropy(logits, labels, 0.1), features

    before = [in_our_layout(group, lambda p: p) for group in peer.network]
    found = float(peer.step(*tensors(images, labels)))
    for group, state, old, peer_group in zip(run.plan.groups, run.states, before, peer.network, strict=True):
        gradient = jax.value_and_grad(lambda p, z, group=group, state=state: loss(p, group, state.batch_stats, z), has_aux=True)
        (value, streams), expected = quick_jit(gradient)(state.params, streams)
        total += float(value)
        moved = jax.tree.map(lambda a, b: a - b, old, in_our_layout(peer_group, lambda p: p))
        assert_close(moved, expected, **TOLERANCE)
    assert_close(found, total, **TOLERANCE)


@networks
def test_one_graph_of_all_groups_makes_the_steps_that_group_after_group_makes(network, monkeypatch):
    """What torch.compile is given; its own work is not repeated here."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: given.append((function.__name__, mode)) or function)
    changes = {"classes": 2, "head_weight": 0.3, "learning_rate": 0.1, "optimizer": "sgd", **VFF}
    run, eager = both(network, **changes)
    whole = torch_peers.Peer(run.plan, run.task, run.states, "cpu", "some mode")
    assert given == [("_sum_of_losses", "some mode")]
    start = in_our_layout(whole.network[1], lambda p: p)
    losses = [[float(peer.step(*tensors(*run.batch()[:2]))) for _ in range(2)] for peer in (eager, whole)]
    assert_close(*losses, rtol=1e-6)
    for one, other in zip(eager.network, whole.network, strict=True):
        assert_close(in_our_layout(one, lambda p: p), in_our_layout(other, lambda p: p), rtol=1e-5, atol=1e-6)
    assert not np.allclose(start["head"]["bias"], in_our_layout(whole.network[1], lambda p: p)["head"]["bias"])


def test_a_group_s_rate_is_its_own():
    changes = {"learning_rate": 0.1, "group_decay": 0.5, "warmup_epochs": 0.0, **VFF}
    for overrides, rates in (({}, (0.05, 0.1)), ({"group0": {"learning_rate": 0.3}}, (0.3, 0.1))):
        _, peer = both("conv4", overrides=overrides, **changes)
        found = [optimizer._optimizer.param_groups[0]["lr"] for optimizer in peer.optimizers]
        assert found == pytest.approx(rates)


def test_a_configuration_that_the_peer_would_not_obey_is_refused():
    with pytest.raises(UserError, match=r"config\.frozen_groups=1: "):
        both("conv4", frozen_groups=1, **VFF)
    with pytest.raises(UserError, match=r"config\.labelling='shared': "):
        both("conv4")


@networks
@pytest.mark.parametrize("implementation", torch_peers.IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_four_steps_of_back_propagation_from_warm_up_into_the_cosine(network, optimizer, implementation):
    settings = {"optimizer": optimizer, "learning_rate": 1e-2, "weight_decay": 0.5, "warmup_epochs": 1.0, "clip_norm": 1.0}
    run, peer = both(network, examples=24, epochs=3, **settings, **BP)
    peer.use_optimizers(implementation)
    states = run.states
    step = quick_jit(lambda states, batch: train_step(run.plan.program, None, run.task, states, batch)[0])
    for number in range(4):
        batch = run.batch(12 * (number % 2), step=number)
        states = step(states, batch)
        peer.step(*tensors(batch.images, batch.labels))
    assert_close(in_our_layout(peer.network[0], lambda p: p), states[0].params, rtol=1e-3, atol=1e-4)


def test_views_are_mirrored_padded_and_cropped():
    images = np.random.default_rng(0).integers(1, 256, (6, 4, 5, 2), np.uint8)
    mirrored, starts = np.array([0, 1, 0, 1, 0, 1], bool), np.array([[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 0]])
    found = torch_peers.take_views(*map(torch.from_numpy, (images, mirrored, starts)), padding=2)
    for i, view in enumerate(found.numpy()):
        padded = np.pad(images[i][:, ::-1] if mirrored[i] else images[i], ((2, 2), (2, 2), (0, 0)))
        row, column = starts[:, i]
        np.testing.assert_array_equal(view, padded[row : row + 4, column : column + 5])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
def test_augmentation_draws_what_the_configuration_asks_for(flip, padding):
    images = torch.arange(1, 13, dtype=torch.uint8).reshape(1, 3, 4, 1).expand(400, -1, -1, -1)
    views = {view.tobytes() for view in torch_peers.augment(images, config_of(flip=flip, crop_padding=padding)).numpy()}
    assert len(views) == (1 + flip) * (1 + 2 * padding) ** 2


@networks
@pytest.mark.parametrize("rule", [BP, VFF], ids=["BP", "VFF"])
def test_alternating_flips_mirror_each_image_in_every_other_epoch(rule, network, monkeypatch):
    """Each image has its own first pixel, and its last column is 0, which is the first one where the image is mirrored."""
    _, peer = both(network, examples=96, classes=2, flip=True, alternating_flip=True, **rule)
    images = np.random.default_rng(0).integers(1, 256, (96, *SHAPE), np.uint8)
    images[:, :, -1] = 0
    images[:, 0, 0] = np.arange(1, 97)[:, None]
    seen = []
    monkeypatch.setattr(peer, "_normalised", lambda views, sound=peer._normalised: seen.append(views.numpy().copy()) or sound(views))
    epochs = []
    for _ in range(3):
        peer.epoch(*tensors(images, np.zeros(96, np.int64)))
        views, mirrored = np.concatenate(seen), np.empty(96, bool)
        turned = ~views[:, :, 0].any((1, 2))
        np.testing.assert_array_equal(np.where(turned[:, None, None, None], views[:, :, ::-1], views)[:, :, -1], 0)
        mirrored[np.where(turned, views[:, 0, -1, 0], views[:, 0, 0, 0]).astype(int) - 1] = turned
        epochs.append(mirrored)
        seen.clear()
    assert 24 < epochs[0].sum() < 72
    np.testing.assert_array_equal(epochs[1], ~epochs[0])
    np.testing.assert_array_equal(epochs[2], epochs[0])


def test_cutout_clears_one_square_that_may_hang_over_the_edge():
    found = torch_peers.cut_out(torch.ones(200, 2, 8, 10), 4)[:, 0].numpy() == 0
    for hole in found:
        rows, columns = hole.any(1), hole.any(0)
        np.testing.assert_array_equal(hole, rows[:, None] & columns[None])
        for side in (rows, columns):
            at = np.flatnonzero(side)
            assert len(at) == at[-1] - at[0] + 1 <= 4
            assert len(at) == 4 or at[0] == 0 or at[-1] == len(side) - 1
    assert found.any(0).all()  # no corner is safe


@networks
def test_an_epoch_takes_every_image_once_in_a_new_order(network):
    run, peer = both(network, examples=26, **BP)
    seen = []
    peer.step = lambda images, labels, mirrored: seen.append(images) or torch.tensor(float(len(seen)))
    images, labels = tensors(*run.data[:2])
    assert float(peer.epoch(images, labels)) == 1.5  # the mean of its steps' losses
    peer.epoch(images, labels)
    first, second = ([row.tobytes() for batch in part for row in batch.numpy()] for part in (seen[:2], seen[2:]))
    assert len(set(first)) == len(set(second)) == 24  # the last, smaller batch is left out
    assert first != second


@networks
@pytest.mark.parametrize("rule", [BP, VFF])
def test_bf16_is_autocast_of_the_same_network(network, rule):
    found = {}
    for precision in ("f32", "bf16"):
        run, peer = both(network, classes=2, precision=precision, **rule)
        found[precision] = float(peer.step(*tensors(*run.batch()[:2])))
        assert {p.dtype for group in peer.network for p in group.parameters()} == {torch.float32}
    assert found["f32"] != found["bf16"]
    assert found["f32"] == pytest.approx(found["bf16"], rel=0.03)


def test_weights_of_another_shape_are_not_broadcast():
    run, peer = both("mlp", **BP)
    params = jax.tree.map(lambda a: a[:1], run.states[0].params)
    with pytest.raises(ValueError, match="shape"):
        torch_peers.load_from_jax(peer.network, [params], [run.states[0].batch_stats])
