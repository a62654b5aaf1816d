"""The detector as a whole: every switch, awkward inputs, determinism, mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dino_scale.config.schema import BackboneConfig, DenoisingConfig, LossConfig, ModelConfig
from dino_scale.errors import ConfigError
from dino_scale.loss.criterion import Criterion
from dino_scale.model.attention import DeformableAttention
from dino_scale.model.denoising import group_count
from dino_scale.model.dino import Dino, build_model
from dino_scale.model.outputs import Outputs
from dino_scale.model.postprocess import detect
from dino_scale.structures import Targets
from tests.support.tiny_detector import ANCESTORS, CLASSES, TINY, generator, images, targets, tiny


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(config: ModelConfig = TINY, classes: int = CLASSES) -> Dino:
    torch.manual_seed(0)
    return build_model(config, classes)


def loss_of(outputs: Outputs, boxes: Targets) -> Tensor:
    return Criterion(LossConfig())(outputs, boxes, float(max(len(boxes.labels), 1)))["total"]


@pytest.mark.parametrize("name", ANCESTORS)
@pytest.mark.parametrize("counts", [(3, 1), (0, 4), (0, 0)])
def test_every_switch_trains_every_parameter(name: str, counts: tuple[int, ...]) -> None:
    """ZeRO stage 3 needs a gradient for every parameter in every step, also without boxes."""
    model = built(tiny(**ANCESTORS[name])).train()
    boxes = targets(*counts)
    outputs = model(*images(2), boxes, generator())
    loss = loss_of(outputs, boxes)
    assert torch.isfinite(loss)
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", ANCESTORS)
def test_every_switch_learns_and_detects(name: str) -> None:
    model = built(tiny(**ANCESTORS[name])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    boxes, losses = targets(2, 1), []
    for _ in range(20):
        loss = loss_of(model(*images(2), boxes, generator()), boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        found = detect(model.eval()(*images(2)), [(480, 640), (300, 200)], detections=30)
    for one in found:
        assert one.scores.shape == (30,) and one.boxes.shape == (30, 4)
        assert torch.equal(one.scores, one.scores.sort(descending=True).values)
        assert int(one.labels.max()) < CLASSES


@pytest.mark.parametrize(("coordinates", "moving"), [(2, (0, 1)), (4, (0, 1)), (4, (2, 3))])
def test_learned_references_get_their_gradient(coordinates: int, moving: tuple[int, int]) -> None:
    """The operator returns none for its reference points; the one that arrives is compared with differences."""
    torch.manual_seed(0)
    attention = DeformableAttention(hidden=32, heads=4, levels=2, points=3, impl="reference")
    torch.nn.init.normal_(attention.offsets.weight, std=0.1)
    shapes, padding = ((5, 7), (3, 4)), torch.zeros(2, 47, dtype=torch.bool)
    tokens, query = torch.randn(2, 47, 32), torch.randn(2, 20, 32)
    reference = 0.3 + 0.4 * torch.rand(2, 20, 2, coordinates)

    def moved(by: Tensor) -> Tensor:
        return attention(query, reference + by, tokens, padding, shapes).double().square().sum()

    by = torch.zeros_like(reference).requires_grad_()
    (gradient,) = torch.autograd.grad(moved(by), by)
    direction = torch.zeros_like(gradient)
    direction[..., moving] = gradient[..., moving]
    direction /= direction.norm()
    step = 3e-4
    with torch.no_grad():
        numeric = (moved(step * direction) - moved(-step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=5e-3)


def test_denoising_does_not_touch_matching_queries() -> None:
    model = built()
    boxes = targets(3, 2)
    with torch.no_grad():
        trained = model.train()(*images(2), boxes, generator())
        plain = model.eval()(*images(2))
    torch.testing.assert_close(trained.logits, plain.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(trained.boxes, plain.boxes, rtol=0, atol=1e-6)
    assert trained.denoising is not None and plain.denoising is None
    assert trained.denoising.logits.shape == (2, 2, 2 * 2 * 3, CLASSES)


def test_noise_comes_from_the_generator_alone() -> None:
    model = built().train()
    boxes = targets(3, 2)

    def noised(seed: int, disturbance: int) -> Tensor:
        torch.manual_seed(disturbance)
        with torch.no_grad():
            outputs = model(*images(2), boxes, generator(seed))
        assert outputs.denoising is not None
        return outputs.denoising.boxes

    assert torch.equal(noised(1, 10), noised(1, 11))
    assert not torch.equal(noised(1, 10), noised(2, 10))
    with pytest.raises(ValueError, match="needs a torch"):
        model(*images(2), boxes)


def test_images_do_not_see_each_other() -> None:
    model = built().eval()
    pixels, padding = images(3)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        straight, shuffled = model(pixels, padding), model(pixels[order], padding[order])
    torch.testing.assert_close(straight.logits[:, order], shuffled.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(straight.boxes[:, order], shuffled.boxes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("forward", ["once", "twice"])
def test_look_forward_twice_changes_gradients_only(forward: str) -> None:
    """The box of the last layer reaches the layer before through its reference only when looked twice."""
    model = built(tiny(look_forward=forward, denoising=DenoisingConfig(kind="none"))).train()
    torch.nn.init.normal_(model.decoder.box_head.layers[-1].weight, std=0.1)
    memory, layout = model.encode(*images(1))
    queries = model.queries(memory, layout)
    stop = model.decoder.layers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))
    decoded = model.decode(queries, None, memory.detach(), layout)
    stop.remove()
    content = model.decoder.layers[0].feedforward_norm.weight
    (gradient,) = torch.autograd.grad(decoded.boxes[1].sum(), content, allow_unused=True)
    reached = gradient is not None and bool(gradient.abs().sum() > 0)
    assert reached == (forward == "twice")


def test_fewer_tokens_than_queries_give_fewer_queries() -> None:
    model = built().train()
    pixels, padding = images(1, height=16, width=16)
    boxes = targets(4)
    outputs = model(pixels, padding, boxes, generator())
    assert outputs.logits.shape[2] == 2 * 2 + 1 + 1 + 1
    loss_of(outputs, boxes).backward()
    many = targets(8)  # more boxes than queries: one stays without, as in the official matcher
    loss_of(model(pixels, padding, many, generator()), many).backward()


def test_image_of_one_pixel() -> None:
    with torch.no_grad():
        outputs = built().eval()(torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1, dtype=torch.bool))
    assert outputs.logits.shape == (2, 1, 4, CLASSES)
    assert torch.isfinite(outputs.logits).all() and torch.isfinite(outputs.boxes).all()


def test_denoising_is_bounded() -> None:
    assert [group_count(100, most) for most in (0, 1, 3, 100, 101, 500)] == [1, 100, 33, 1, 1, 1]
    model = built(tiny(denoising=DenoisingConfig(queries=100))).train()
    assert model.denoiser is not None
    assert model.denoiser(targets(500, 2), generator()).content.shape == (2, 1000, 32)


def test_one_class() -> None:
    model = built(classes=1).train()
    boxes = targets(2, 1, classes=1)
    loss = loss_of(model(*images(2), boxes, generator()), boxes)
    assert torch.isfinite(loss)
    with pytest.raises(ConfigError, match="number of classes is 0"):
        build_model(TINY, 0)


def test_duplicate_boxes_get_different_queries() -> None:
    model = built().train()
    one = targets(1)
    twice = Targets(one.labels.repeat(2), one.boxes.repeat(2, 1), (2,))
    loss = loss_of(model(*images(1), twice, generator()), twice)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("attention", ["reference", "auto"])
def test_bf16_autocast_is_close_and_keeps_coordinates(attention: str) -> None:
    model = built(tiny(attention=attention)).train()
    boxes = targets(3, 2)
    exact = model(*images(2), boxes, generator())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*images(2), boxes, generator())
    assert rough.boxes.dtype == torch.float32
    assert rough.denoising is not None and exact.denoising is not None
    # The boxes of denoising queries do not depend on which proposals were selected.
    torch.testing.assert_close(rough.denoising.boxes, exact.denoising.boxes, rtol=0, atol=0.02)
    torch.testing.assert_close(rough.denoising.logits.float(), exact.denoising.logits, rtol=0, atol=0.1)
    loss = loss_of(rough, boxes)
    torch.testing.assert_close(loss, loss_of(exact, boxes), rtol=0.05, atol=0)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_coordinates_stay_float32_under_bf16() -> None:
    """What says where something is: reference points, proposals, noised boxes and boxes; what is there may be bf16."""
    model = built().train()
    seen: list[torch.dtype] = []
    values: list[torch.dtype] = []

    def look(_: torch.nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        query, reference_points, *_rest = inputs
        seen.append(reference_points.dtype)
        values.append(query.dtype)

    hooks = [part.register_forward_hook(look) for part in model.modules() if isinstance(part, DeformableAttention)]
    steps: list[torch.dtype] = []
    heads = (model.decoder.box_head, model.queries.box_head)
    hooks += [head.register_forward_hook(lambda _, __, out: steps.append(out.dtype)) for head in heads]
    boxes = targets(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        memory, layout = model.encode(*images(2))
        queries = model.queries(memory, layout)
        assert model.denoiser is not None
        noised = model.denoiser(boxes, generator())
        decoded = model.decode(queries, noised, memory, layout)
    for hook in hooks:
        hook.remove()
    assert decoded.logits.dtype == torch.bfloat16, "autocast did nothing"
    assert len(seen) == 3 and set(seen) == {torch.float32}
    assert len(steps) == 3 and set(steps) == {torch.float32}
    found = (queries.reference, queries.encoder_boxes, noised.reference, decoded.boxes, *decoded.references)
    assert {tensor.dtype for tensor in (*found, layout.valid_ratios) if tensor is not None} == {torch.float32}


def test_recomputed_swin_trains_the_detector_alike() -> None:
    """Checkpointed activations and drop path: at equal seeds the loss and every gradient are the same to the bit."""
    backbone = BackboneConfig(
        name="swin_tiny_patch4_window7_224",
        arguments={"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]},
        outputs=(1, 2, 3),
        norm="native",
        frozen_stages=0,
        drop_path=0.3,
    )
    boxes, results = targets(3, 2), []
    for recompute in (False, True):
        model = built(tiny(backbone=replace(backbone, checkpoint_activations=recompute))).train()
        torch.manual_seed(5)
        loss = loss_of(model(*images(2), boxes, generator()), boxes)
        loss.backward()
        results.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain_loss, plain), (loss, recomputed) = results
    assert torch.equal(plain_loss, loss)
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())


@pytest.mark.parametrize("name", ["deformable_detr_two_stage", "dab_deformable_detr", "dn_deformable_detr", "dino"])
def test_five_hundred_boxes_in_one_image(name: str) -> None:
    """More boxes than queries, and one group of denoising queries that holds them all."""
    model = built(tiny(**ANCESTORS[name])).train()
    boxes = targets(500, 1)
    outputs = model(*images(2), boxes, generator())
    if outputs.denoising is not None:
        assert outputs.denoising.groups == 1
        assert outputs.denoising.logits.shape[2] == 500 * model.denoiser.blocks
    loss_of(outputs, boxes).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("counts", [(1,), (40, 3), (99, 101), (500, 0, 7), (0, 0)])
@pytest.mark.parametrize("queries", [1, 30, 100, 1000])
def test_denoising_queries_are_bounded(counts: tuple[int, ...], queries: int) -> None:
    """At most 2 * max(wanted, boxes of the fullest image) for each image, whatever the counts."""
    model = built(tiny(denoising=DenoisingConfig(queries=queries)))
    assert model.denoiser is not None
    content = model.denoiser(targets(*counts), generator()).content
    assert content.shape[1] <= 2 * max(queries, *counts)


def test_points_exclude_denoising() -> None:
    with pytest.raises(ConfigError, match=r"query_form is 'point' but model\.denoising\.kind is 'contrastive'"):
        build_model(tiny(query_form="point"), CLASSES)


def test_heads_are_held_once() -> None:
    model = built()
    names = [name for name in model.state_dict() if "decoder.box_head" in name or "decoder.class_head" in name]
    assert len(names) == 3 * 2 + 2
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(list(model.parameters()))


def test_class_tensors_count_classes() -> None:
    model = built()
    state = model.state_dict()
    assert {name: state[name].shape[0] for name in model.class_tensors()} == {
        "decoder.class_head.weight": CLASSES,
        "decoder.class_head.bias": CLASSES,
        "queries.class_head.weight": CLASSES,
        "queries.class_head.bias": CLASSES,
        "denoiser.label_embedding.weight": CLASSES + 1,
    }
    with_other_classes = build_model(TINY, CLASSES + 3).state_dict()
    changed = {name for name, tensor in with_other_classes.items() if tensor.shape != state[name].shape}
    assert changed == model.class_tensors()


def test_initial_values() -> None:
    """Official initialisation: rare classes, boxes at their reference, equal heads, content bounded by Xavier."""
    model = built(tiny(queries=300))
    assert torch.allclose(model.decoder.class_head.bias, torch.tensor(-4.59511985))
    assert not model.decoder.box_head.layers[-1].weight.any()
    for own, selected in (
        (model.decoder.class_head, model.queries.class_head),
        (model.decoder.box_head, model.queries.box_head),
    ):
        for one, other in zip(own.parameters(), selected.parameters(), strict=True):
            assert torch.equal(one, other) and one is not other
    bound = (6 / (300 + 32)) ** 0.5
    assert 0.9 * bound < float(model.queries.content.weight.detach().abs().max()) <= bound
    attention = model.encoder.layers[0].attention
    assert not attention.offsets.weight.any() and not attention.weights.weight.any() and not attention.value.bias.any()
    assert model.level_embedding.weight.std() > 0.5
