"""The sampler against SciPy and PyTorch; the geometry of affine views."""

import keras
import numpy as np
import pytest
import scipy.ndimage
from keras import ops

from saccade.core import compilation, gradients, sampling

import transformer

pytestmark = pytest.mark.every_backend


def numpy(x):
    return ops.convert_to_numpy(x)


def identity_points(height, width):
    rows, columns = np.mgrid[0:height, 0:width].astype("float32")
    return np.stack([rows, columns], -1)[None]


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.random((2, 6, 9, 3)).astype("float32")


@pytest.fixture
def points():
    rng = np.random.default_rng(1)
    return rng.uniform(-3, 11, (2, 4, 5, 2)).astype("float32")


@pytest.mark.parametrize("padding", sampling.PADDINGS)
class TestSampleBilinear:
    def test_identity_is_exact(self, images, padding):
        points = np.repeat(identity_points(6, 9), 2, 0)
        out = sampling.sample_bilinear(images, points, padding)
        np.testing.assert_array_equal(numpy(out), images)

    def test_agrees_with_scipy(self, images, points, padding):
        out = numpy(sampling.sample_bilinear(images, points, padding))
        # Padding by hand: SciPy's own "constant" does not blend at the edge.
        mode = {"zeros": "constant", "edge": "edge"}[padding]
        for b in range(2):
            for c in range(3):
                want = scipy.ndimage.map_coordinates(
                    np.pad(images[b, ..., c], 12, mode=mode),
                    [points[b, ..., 0] + 12, points[b, ..., 1] + 12],
                    order=1,
                )
                np.testing.assert_allclose(out[b, ..., c], want, atol=2e-5)

    def test_agrees_with_torch_forward_and_backward(
        self, images, points, padding
    ):
        torch = pytest.importorskip("torch")
        weights = np.random.default_rng(2).normal(size=(2, 4, 5, 3))
        weights = weights.astype("float32")

        def loss(images, points):
            out = sampling.sample_bilinear(images, points, padding)
            return ops.sum(ops.multiply(out, weights), axis=(1, 2, 3))

        out = sampling.sample_bilinear(images, points, padding)
        tensors = [ops.convert_to_tensor(v) for v in (images, points)]
        _, to_images = gradients.value_and_grad(
            lambda x: loss(x, tensors[1]), tensors[0]
        )
        _, to_points = gradients.value_and_grad(
            lambda x: loss(tensors[0], x), tensors[1]
        )
        theirs = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
        where = torch.tensor(points, requires_grad=True)
        size = torch.tensor([6.0, 9.0])
        grid = ((where + 0.5) / size * 2 - 1).flip(-1)
        want = torch.nn.functional.grid_sample(
            theirs,
            grid,
            padding_mode={"zeros": "zeros", "edge": "border"}[padding],
            align_corners=False,
        ).permute(0, 2, 3, 1)
        (want * torch.tensor(weights)).sum().backward()
        np.testing.assert_allclose(numpy(out), want.detach().numpy(), atol=2e-5)
        np.testing.assert_allclose(
            numpy(to_images),
            theirs.grad.permute(0, 2, 3, 1).numpy(),
            atol=5e-5,
        )
        np.testing.assert_allclose(
            numpy(to_points), where.grad.numpy(), atol=1e-4
        )

    def test_gradient_of_a_ramp(self, images, padding):
        """d ramp / d column = 1 inside, and nothing moves far outside."""
        ramp = np.tile(np.arange(9, dtype="float32"), (1, 6, 1))[..., None]
        points = np.array([[[1.7, 2.3], [3.2, 5.5], [2.0, -30.0]]], "float32")
        _, gradient = gradients.value_and_grad(
            lambda p: ops.sum(
                sampling.sample_bilinear(ramp, p, padding), axis=(1, 2)
            ),
            ops.convert_to_tensor(points),
        )
        np.testing.assert_allclose(
            numpy(gradient)[0], [[0, 1], [0, 1], [0, 0]], atol=1e-5
        )

    def test_compiles(self, images, points, padding):
        def sample(images, points):
            return sampling.sample_bilinear(images, points, padding)

        compiled = compilation.compile_call(sample)
        np.testing.assert_allclose(
            numpy(compiled(images, points)),
            numpy(sample(images, points)),
            atol=1e-6,
        )


def test_one_batch_of_any_shape_of_points(images):
    flat = np.random.default_rng(0).uniform(0, 5, (2, 12, 2)).astype("float32")
    deep = flat.reshape(2, 3, 2, 2, 2)
    np.testing.assert_array_equal(
        numpy(sampling.sample_bilinear(images, deep)).reshape(2, 12, 3),
        numpy(sampling.sample_bilinear(images, flat)),
    )


@pytest.mark.parametrize(
    "shapes,padding,match",
    [
        (((1, 2, 2, 1), (1, 4, 3)), "zeros", r"points.shape=\(1, 4, 3\)"),
        (((2, 2, 1), (1, 4, 2)), "zeros", r"images.shape=\(2, 2, 1\)"),
        (((1, 2, 2, 1), (1, 4, 2)), "wrap", "padding='wrap'"),
    ],
)
def test_errors_say_what_came(shapes, padding, match):
    images, points = (np.zeros(shape, "float32") for shape in shapes)
    with pytest.raises(ValueError, match=match):
        sampling.sample_bilinear(images, points, padding)


IDENTITY = np.array([[1, 0, 0, 0, 1, 0]], "float32")


@pytest.mark.parametrize("size", [(7, 7), (6, 9), (320, 320)])
def test_identity_view_is_the_image_bit_for_bit(size):
    image = np.random.default_rng(0).random((1, *size, 2)).astype("float32")
    view, box, centre = transformer.SpatialTransformer()(image, IDENTITY)
    np.testing.assert_array_equal(numpy(view), image)
    np.testing.assert_array_equal(numpy(box), [[0, 0, 1, 1]])
    np.testing.assert_array_equal(numpy(centre), [[0, 0]])


@pytest.mark.parametrize("view", [(5, 4), (12, 12), (6, 9)])
def test_points_agree_with_torch_affine_grid(view):
    torch = pytest.importorskip("torch")
    theta = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    ours = numpy(sampling.affine_points(theta, (6, 9), view))
    grid = torch.nn.functional.affine_grid(
        torch.tensor(theta.reshape(3, 2, 3)), (3, 1, *view), False
    ).numpy()
    want = (grid[..., ::-1] + 1) / 2 * [6, 9] - 0.5
    np.testing.assert_allclose(ours, want, atol=1e-4)


@pytest.mark.parametrize("view", [None, (4, 4), (40, 24)])
@pytest.mark.parametrize("side", [(16, 16), (17, 30)])
def test_box_and_centre_are_where_the_view_reads(view, side):
    """The box is half a view pixel beyond the outermost samples."""
    height, width = side
    theta = np.array([[0.5, 0.3, 0.25, -0.5]], "float32")
    layer = transformer.SpatialTransformer(view)
    _, box, centre = layer(np.zeros((1, *side, 1), "float32"), theta)
    rows, columns = view or side
    points = numpy(sampling.affine_points(theta, side, (rows, columns)))[0]
    down, right = points[1, 0, 0] - points[0, 0, 0], None
    right = points[0, 1, 1] - points[0, 0, 1]
    want = [
        (points[0, 0, 0] - down / 2 + 0.5) / height,
        (points[0, 0, 1] - right / 2 + 0.5) / width,
        (points[-1, -1, 0] + down / 2 + 0.5) / height,
        (points[-1, -1, 1] + right / 2 + 0.5) / width,
    ]
    np.testing.assert_allclose(numpy(box)[0], want, atol=1e-5)
    np.testing.assert_allclose(
        numpy(centre)[0],
        points.reshape(-1, 2).mean(0) - [(height - 1) / 2, (width - 1) / 2],
        atol=1e-4,
    )


def test_box_of_a_rotated_view_encloses_all_its_samples():
    turn = np.pi / 5
    theta = np.array(
        [[np.cos(turn), -np.sin(turn), 0.1, np.sin(turn), np.cos(turn), 0]]
    ).astype("float32")
    theta = theta * np.array([0.5, 0.5, 1, 0.5, 0.5, 1], "float32")
    top, left, bottom, right = numpy(transformer.affine_box(theta))[0]
    points = numpy(sampling.affine_points(theta, (50, 50), (80, 80)))
    places = (points.reshape(-1, 2) + 0.5) / 50
    low, high = places.min(0), places.max(0)
    assert top <= low[0] and left <= low[1]
    assert bottom >= high[0] and right >= high[1]
    np.testing.assert_allclose([top, left], low, atol=0.02)


@pytest.mark.parametrize("which", ["box", "centre"])
def test_box_and_centre_have_a_gradient(which):
    theta = ops.convert_to_tensor(np.array([[0.5, 0.1, 0.5, -0.2]], "float32"))
    fn = {
        "box": lambda t: transformer.affine_box(t)[..., 1],
        "centre": lambda t: transformer.affine_centre(t, (20, 30))[..., 1],
    }[which]
    _, gradient = gradients.value_and_grad(fn, theta)
    want = {"box": [-0.5, 0.5, 0, 0], "centre": [0, 15, 0, 0]}[which]
    np.testing.assert_allclose(numpy(gradient)[0], want)


def test_restricted_equals_full():
    restricted = np.array([[0.5, 0.1, 0.7, -0.2]], "float32")
    full = np.array([[0.5, 0, 0.1, 0, 0.7, -0.2]], "float32")
    np.testing.assert_array_equal(numpy(sampling.full_affine(restricted)), full)
    with pytest.raises(ValueError, match=r"theta.shape=\(1, 5\)"):
        sampling.full_affine(np.zeros((1, 5), "float32"))


def test_several_views_at_once_equal_one_at_a_time(images):
    theta = np.random.default_rng(0).normal(size=(2, 3, 6)).astype("float32")
    layer = transformer.SpatialTransformer((4, 5))
    views, boxes, centres = map(numpy, layer(images, theta))
    assert views.shape == (2, 3, 4, 5, 3)
    for i in range(3):
        view, box, centre = map(numpy, layer(images, theta[:, i]))
        np.testing.assert_allclose(views[:, i], view, atol=1e-6)
        np.testing.assert_allclose(boxes[:, i], box, atol=1e-6)
        np.testing.assert_allclose(centres[:, i], centre, atol=1e-5)


def test_layer_survives_a_config_round_trip():
    layer = transformer.SpatialTransformer((4, 5), "edge")
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert copy.view_size == (4, 5) and copy.padding == "edge"
