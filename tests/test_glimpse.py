"""The retina, fixations and augmentation, held to their definitions."""

import keras
import numpy as np
import pytest
import scipy.ndimage
from keras import ops

from saccade.core import gradients, randomness, sampling
from saccade.data import augment

import glimpse

pytestmark = pytest.mark.every_backend


def numpy(x):
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize("size", [32, 40, 96, 224, 320])
class TestRetinaMapping:
    def test_reaches_the_border(self, size):
        """The last of size // 2 samples is fitted to land on size / 2."""
        p0, p1 = glimpse.retina_mapping(size, size)
        last = size // 2 - 1
        assert abs(p0 * last**2 + p1 * last - size / 2) < 0.03 * size

    def test_magnifies_the_fovea_and_shrinks_the_periphery(self, size):
        p0, p1 = glimpse.retina_mapping(size, size)
        assert p0 > 0 and 0 < p1 < 1
        assert 2 * p0 * (size // 2) + p1 > 1

    def test_solves_the_density_equation(self, size):
        """Independent: iterate the recursion from the fitted first step."""
        p0, p1 = glimpse.retina_mapping(size, size)
        growth = np.log(10) / (size // 2)
        low, high = 1e-3, size
        for _ in range(100):
            step = (low + high) / 2
            radius, radii = 0.0, [0.0]
            for _ in range(size // 2 - 1):
                radius += np.exp(growth * min(radius, size) / 2) * step
                radii.append(radius)
            low, high = (low, step) if radius > size / 2 else (step, high)
        radii = np.array(radii)
        r = np.arange(len(radii))
        fitted = p0 * r**2 + p1 * r
        basis = np.stack([r**2, r], 1)
        want = basis @ np.linalg.lstsq(basis, radii, rcond=None)[0]
        np.testing.assert_allclose(fitted, want, atol=1e-3 * size)


def test_mapping_of_other_view_sizes_and_errors():
    p0, p1 = glimpse.retina_mapping(320, 64)
    assert abs(p0 * 31**2 + p1 * 31 - 160) < 16
    with pytest.raises(ValueError, match="max_ratio=1"):
        glimpse.retina_mapping(32, 32, 1)
    with pytest.raises(ValueError, match="view_size=2"):
        glimpse.retina_mapping(32, 2)


def test_retina_points_follow_the_definition():
    """An output pixel at offset v reads gaze + v / |v| * r_image(|v|)."""
    gaze = np.array([[3.5, -2.0]], "float32")
    points = numpy(glimpse.retina_points(gaze, (40, 40), (40, 40)))[0]
    p0, p1 = glimpse.retina_mapping(40, 40)
    for i, j in [(0, 0), (19, 20), (33, 7), (39, 39)]:
        v = np.array([i - 19.5, j - 19.5])
        radius = np.linalg.norm(v)
        want = 19.5 + gaze[0] + v / radius * (p0 * radius**2 + p1 * radius)
        np.testing.assert_allclose(points[i, j], want, rtol=1e-5)


def test_fovea_box_is_where_the_view_magnifies():
    gaze = np.array([[[4.0, -6.0]]], "float32")
    box = numpy(glimpse.fovea_box(gaze, (96, 96), (96, 96)))[0, 0]
    points = numpy(glimpse.retina_points(gaze, (96, 96), (96, 96)))[0, 0]
    # Along a row through the gaze, neighbours closer than a pixel magnify.
    columns = points[48, :, 1]
    dense = np.flatnonzero(np.diff(columns) < 1.0)
    left, right = columns[dense[0]], columns[dense[-1] + 1]
    np.testing.assert_allclose(box[[1, 3]] * 96 - 0.5, [left, right], atol=1.5)
    np.testing.assert_allclose(
        (box[:2] + box[2:]) / 2 * 96 - 48, [4.0, -6.0], atol=1e-4
    )


class TestRetinalWarp:
    def test_is_the_sampler_at_the_retinas_points(self):
        rng = np.random.default_rng(0)
        images = rng.random((3, 20, 20, 2)).astype("float32")
        gazes = rng.uniform(-8, 8, (3, 2)).astype("float32")
        out = numpy(glimpse.retinal_warp(images, gazes))
        points = numpy(glimpse.retina_points(gazes, (20, 20), (20, 20)))
        np.testing.assert_allclose(
            out, numpy(sampling.sample_bilinear(images, points)), atol=1e-6
        )

    def test_a_shared_gaze_is_the_same_gaze_for_all(self):
        images = np.random.default_rng(0).random((3, 16, 16, 1)).astype("f4")
        gaze = np.array([2.0, -3.0], "float32")
        np.testing.assert_array_equal(
            numpy(glimpse.retinal_warp(images, gaze)),
            numpy(glimpse.retinal_warp(images, np.tile(gaze, (3, 1)))),
        )

    def test_a_dot_at_the_gaze_lands_in_the_middle(self):
        """First coordinate down, second to the right, from the centre."""
        image = np.zeros((1, 41, 41, 1), "float32")
        image[0, 20 + 8, 20 - 11] = 1.0
        view = numpy(glimpse.retinal_warp(image, np.array([8.0, -11.0], "f4")))
        assert view.argmax() == 20 * 41 + 20
        np.testing.assert_allclose(view.max(), 1.0, atol=1e-5)

    def test_gradient_to_the_gaze_is_the_finite_difference(self):
        rng = np.random.default_rng(0)
        rows, columns = np.mgrid[0:24, 0:24] / 24
        smooth = np.sin(5 * rows + 1) * np.cos(4 * columns) + 1
        image = smooth[None, ..., None].astype("float32")
        weights = rng.normal(size=(1, 24, 24, 1)).astype("float32")
        # Weights on the inside only: a kink at the border has no derivative.
        weights[:, :7] = weights[:, -7:] = 0
        weights[:, :, :7] = weights[:, :, -7:] = 0

        def loss(gaze):
            view = glimpse.retinal_warp(image, gaze)
            return ops.sum(ops.multiply(view, weights), axis=(1, 2, 3))

        at = np.array([[1.3, -0.7]], "float32")
        _, gradient = gradients.value_and_grad(loss, ops.convert_to_tensor(at))
        for axis in range(2):
            step = np.zeros((1, 2), "float32")
            step[0, axis] = 0.05
            slope = numpy(loss(at + step) - loss(at - step)) / 0.1
            np.testing.assert_allclose(
                numpy(gradient)[0, axis], slope[0], rtol=0.1, atol=0.02
            )

    def test_layer_on_several_gazes(self):
        images = np.random.default_rng(0).random((2, 16, 16, 3)).astype("f4")
        gazes = np.random.default_rng(1).uniform(-5, 5, (2, 3, 2)).astype("f4")
        views, boxes = glimpse.RetinalWarp((12, 12))(images, gazes)
        assert views.shape == (2, 3, 12, 12, 3) and boxes.shape == (2, 3, 4)
        one = glimpse.retinal_warp(images, gazes[:, 1], (12, 12))
        np.testing.assert_allclose(numpy(views)[:, 1], numpy(one), atol=1e-6)


def scipy_blur(images, radius):
    """The handover's blur by another program, along the two image axes."""
    sigma = np.zeros(images.ndim)
    sigma[-3:-1] = radius / 2
    return scipy.ndimage.gaussian_filter(
        images.astype("float64"), sigma, mode="constant", truncate=4
    )


def slices(images, gazes, side):
    """Crops by slicing a wide black frame; `(batch, n, side, side, c)`."""
    wide = 2 * max(images.shape)
    framed = np.pad(images, [(0, 0), (wide, wide), (wide, wide), (0, 0)])
    found = []
    for image, looked in zip(framed, gazes, strict=True):
        corners = wide + (np.array(images.shape[1:3]) - side) // 2 + looked
        found.append(
            [image[r : r + side, c : c + side] for r, c in corners.astype(int)]
        )
    return np.array(found)


class TestBlur:
    # Also where the kernel is wider than the image.
    @pytest.mark.parametrize("radius", [1, 2, 4, 6, 8])
    @pytest.mark.parametrize("shape", [(2, 24, 30, 3), (1, 2, 16, 16, 1)])
    def test_is_scipys(self, radius, shape):
        images = np.random.default_rng(0).random(shape).astype("f4")
        want = scipy_blur(images, radius)
        got = numpy(glimpse.gaussian_blur(images, radius))
        np.testing.assert_allclose(got, want, atol=2e-6)
        got = numpy(glimpse.low_pass(images, radius))
        start = radius // 2
        want = want[..., start::radius, start::radius, :]
        np.testing.assert_allclose(got, want, atol=2e-6)

    def test_gradient_is_the_transpose(self):
        """The operator is symmetric: its gradient blurs the upstream one."""
        rng = np.random.default_rng(0)
        images, upstream = rng.normal(size=(2, 2, 12, 14, 3)).astype("f4")

        def loss(x):
            blurred = glimpse.gaussian_blur(x, 4)
            return ops.sum(ops.multiply(blurred, upstream), (1, 2, 3))

        _, gradient = gradients.value_and_grad(loss, images)
        np.testing.assert_allclose(
            numpy(gradient), scipy_blur(upstream, 4), atol=2e-6
        )

    @pytest.mark.parametrize("radius", [0, -1, 1.5])
    def test_the_radius_is_whole(self, radius):
        with pytest.raises(ValueError, match=f"radius={radius}"):
            glimpse.gaussian_blur(np.zeros((1, 4, 4, 1), "f4"), radius)


class TestCrop:
    @pytest.mark.parametrize("side", [1, 6, 7, 20])
    @pytest.mark.parametrize("size", [(16, 16), (15, 18)])
    def test_is_a_slice_bit_for_bit(self, side, size):
        rng = np.random.default_rng(side)
        images = rng.random((3, *size, 2)).astype("f4")
        gazes = rng.integers(-9, 10, (3, 4, 2)).astype("f4")
        crops, boxes = glimpse.crop(images, gazes, side)
        np.testing.assert_array_equal(numpy(crops), slices(images, gazes, side))
        height = (numpy(boxes)[..., 2] - numpy(boxes)[..., 0]) * size[0]
        np.testing.assert_allclose(height, side, rtol=1e-5)

    def test_box_is_where_the_pixels_are(self):
        rows, columns = np.mgrid[0:16, 0:16].astype("f4")
        image = np.stack([rows, columns], axis=-1)[None]
        crops, boxes = glimpse.crop(image, np.array([[[2.0, -3.0]]]), 6)
        first, last = numpy(crops)[0, 0, 0, 0], numpy(crops)[0, 0, -1, -1]
        np.testing.assert_allclose(
            numpy(boxes)[0, 0] * 16, [*first, *(last + 1)], atol=1e-5
        )

    def test_gazes_are_rounded_to_whole_pixels(self):
        images = np.random.default_rng(0).random((1, 12, 12, 1)).astype("f4")
        between = np.array([[[0.5, -0.5], [1.4, -1.6]]], "f4")
        whole = np.array([[[1.0, 0.0], [1.0, -2.0]]], "f4")
        np.testing.assert_array_equal(
            numpy(glimpse.crop(images, between, 5)[0]),
            slices(images, whole, 5),
        )

    def test_gradient_goes_back_where_it_came_from(self):
        rng = np.random.default_rng(0)
        images = rng.random((2, 10, 10, 3)).astype("f4")
        gazes = np.array([[[4.0, -1.0], [1, 1]], [[-6, 2], [0, 0]]], "f4")
        upstream = rng.normal(size=(2, 2, 6, 6, 3)).astype("f4")

        def loss(x):
            crops, _ = glimpse.crop(x, gazes, 6)
            return ops.sum(ops.multiply(crops, upstream), (1, 2, 3, 4))

        _, gradient = gradients.value_and_grad(loss, images)
        want = np.zeros((2, 30, 30, 3))
        for i in range(2):
            for j in range(2):
                row, column = (12 + gazes[i, j]).astype(int)
                want[i, row : row + 6, column : column + 6] += upstream[i, j]
        np.testing.assert_allclose(
            numpy(gradient), want[:, 10:20, 10:20], atol=1e-5
        )


class TestCoarseFixation:
    @pytest.mark.parametrize(
        "size,variant,want",
        [
            (320, "crop", glimpse.Coarse(224, 48)),
            (320, "upsample", glimpse.Coarse(160, 80, enlarge=2)),
            (320, "blur", glimpse.Coarse(240, 40, blur=6)),
            (32, "crop", glimpse.Coarse(24, 4)),
            (32, "upsample", glimpse.Coarse(16, 8, enlarge=2)),
            (32, "blur", glimpse.Coarse(24, 4, blur=2)),
            (160, "crop", glimpse.Coarse(112, 24)),
            (96, "blur", glimpse.Coarse(72, 12, blur=2)),
            (64, "upsample", glimpse.Coarse(32, 16, enlarge=2)),
        ],
    )
    def test_figures_of_the_handover_and_their_proportions(
        self, size, variant, want
    ):
        assert glimpse.coarse_fixation(size, variant) == want

    def test_at_its_reach_the_crop_touches_the_border(self):
        for size in range(8, 400):
            for variant in glimpse.COARSE_VARIANTS:
                found = glimpse.coarse_fixation(size, variant)
                assert found.reach > 0
                assert found.side + 2 * found.reach == size

    @pytest.mark.parametrize("variant", glimpse.COARSE_VARIANTS)
    def test_views_are_blurred_and_enlarged_crops(self, variant):
        rng = np.random.default_rng(0)
        images = rng.random((2, 32, 32, 3)).astype("f4")
        found = glimpse.coarse_fixation(32, variant)
        gazes = rng.integers(-found.reach, found.reach + 1, (2, 3, 2))
        layer = glimpse.CoarseFixation(found.side, found.blur, found.enlarge)
        views, boxes = layer(images, gazes.astype("f4"))
        want = slices(images, gazes, found.side)
        if variant == "upsample":
            want = np.kron(want, np.ones((2, 2, 1)))
        if variant == "blur":
            want = scipy_blur(want, 2)
        np.testing.assert_allclose(numpy(views), want, atol=2e-6)
        assert numpy(boxes).min() >= 0 and numpy(boxes).max() <= 1

    def test_near_names(self):
        with pytest.raises(ValueError, match="Did you mean upsample"):
            glimpse.coarse_fixation(32, "upsampled")


class TestCorticalSampling:
    @pytest.mark.parametrize(
        "size,freeze,want",
        [
            (
                320,
                False,
                glimpse.Scales((40, 80, 160, 240), (1, 2, 4, 6), 40),
            ),
            (
                320,
                True,
                glimpse.Scales((40, 80, 160, 320), (1, 2, 4, 8), 80, (3,)),
            ),
            (32, False, glimpse.Scales((12, 24), (1, 2), 4)),
            (96, False, glimpse.Scales((12, 24, 48, 72), (1, 2, 4, 6), 12)),
        ],
    )
    def test_figures_of_the_handover_and_their_proportions(
        self, size, freeze, want
    ):
        assert glimpse.cortical_scales(size, freeze) == want

    def test_any_size_has_scales_of_equally_many_pixels_inside_it(self):
        for size in range(8, 400):
            for freeze in (False, True)[: 1 + (size > 64)]:
                found = glimpse.cortical_scales(size, freeze)
                kept = {
                    side / radius
                    for side, radius in zip(
                        found.sides, found.radii, strict=True
                    )
                }
                assert len(kept) == 1 and found.sides[-1] <= size
                moving = found.sides[-2 if freeze else -1]
                assert 0 < 2 * found.reach <= size - moving

    @pytest.mark.parametrize("centred", [(), (2,)])
    def test_views_are_low_passed_crops(self, centred):
        rng = np.random.default_rng(0)
        images = rng.random((2, 40, 40, 3)).astype("f4")
        gazes = rng.integers(-4, 5, (2, 5, 2)).astype("f4")
        layer = glimpse.CorticalSampling((8, 16, 32), (1, 2, 4), centred)
        views, boxes, places = layer(images, gazes)
        assert views.shape == (2, 15, 8, 8, 3)
        for scale, (side, radius) in enumerate([(8, 1), (16, 2), (32, 4)]):
            at = gazes * (scale not in centred)
            want = scipy_blur(slices(images, at, side), radius)
            start = radius // 2
            want = want[..., start::radius, start::radius, :]
            np.testing.assert_allclose(
                numpy(views)[:, scale::3], want, atol=2e-6
            )
            np.testing.assert_array_equal(numpy(places)[:, scale::3], at)
            box = numpy(boxes)[:, scale::3]
            np.testing.assert_allclose(
                (box[..., :2] + box[..., 2:]) / 2 * 40 - 20, at, atol=1e-4
            )
            np.testing.assert_allclose(
                box[..., 2:] - box[..., :2], side / 40, atol=1e-6
            )

    def test_what_does_not_fit_is_said(self):
        with pytest.raises(ValueError, match=r"sides=\(8, 18\)"):
            glimpse.CorticalSampling((8, 18), (1, 2))
        with pytest.raises(ValueError, match="True with 32 pixels"):
            glimpse.cortical_scales(32, freeze=True)


class TestFixations:
    def test_whole_pixels_are_drawn_uniformly(self):
        layer = glimpse.Fixations(2.7, whole=True, seed=1)
        images = np.zeros((2000, 8, 8, 1))
        gazes = numpy(layer(images, training=True))
        values, counts = np.unique(gazes, return_counts=True)
        np.testing.assert_array_equal(values, [-2, -1, 0, 1, 2])
        assert counts.min() > 700 and counts.max() < 900  # Of 800 each.
        fixed = numpy(layer(images[:1], training=False))
        want = [[[0, 0], [-2, 2], [2, -2], [-2, -2], [2, 2]]]
        np.testing.assert_array_equal(fixed, want)

    def test_a_random_gaze_in_evaluation_is_drawn_anew(self):
        layer = glimpse.Fixations(4, whole=True, test_gazes="random", seed=1)
        assert layer.stochastic
        one, two = (numpy(layer(np.zeros((9, 8, 8, 1)))) for _ in range(2))
        assert one.shape == (9, 1, 2) and np.any(one != two)

    def test_it_reaches_forward(self):
        with pytest.raises(ValueError, match="reach=-1"):
            glimpse.Fixations(-1)

    def test_evaluation_looks_at_the_five_fixed_gazes(self):
        layer = glimpse.Fixations(8)
        gazes = numpy(layer(np.zeros((2, 32, 32, 1)), training=False))
        want = [[0, 0], [-8, 8], [8, -8], [-8, -8], [8, 8]]
        np.testing.assert_array_equal(gazes, [want, want])

    def test_training_draws_one_gaze_for_each_image(self):
        layer = glimpse.Fixations(8, seed=1)
        gazes = numpy(layer(np.zeros((500, 32, 32, 1)), training=True))
        assert gazes.shape == (500, 1, 2)
        assert np.abs(gazes).max() <= 8 and np.abs(gazes).max() > 7.5
        assert len(np.unique(gazes[:, 0, 0])) > 400
        assert np.all(np.abs(gazes.mean(0)) < 1.0)

    def test_given_gazes_are_used_always(self):
        layer = glimpse.Fixations(8, given=[[1, 2]])
        for training in (False, True):
            gazes = numpy(layer(np.zeros((3, 32, 32, 1)), training=training))
            np.testing.assert_array_equal(gazes, np.tile([[[1, 2]]], (3, 1, 1)))


class TestAugment:
    keys = staticmethod(
        lambda n, step=0: randomness.example_keys(0, np.arange(n), step)
    )

    def test_none_changes_nothing(self):
        images = np.random.default_rng(0).random((2, 8, 8, 3)).astype("f4")
        out = augment.augment(images, self.keys(2), augment.Augmentation())
        np.testing.assert_array_equal(numpy(out), images)

    def test_flip_mirrors_about_half_of_the_images_exactly(self):
        image = np.random.default_rng(0).random((1, 8, 9, 3)).astype("f4")
        images = np.repeat(image, 200, 0)
        out = numpy(
            augment.augment(
                images, self.keys(200), augment.Augmentation(flip=True)
            )
        )
        same = (out == images).all((1, 2, 3))
        mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
        assert np.all(same ^ mirrored)
        assert 70 < mirrored.sum() < 130

    @pytest.mark.parametrize("crop", [0.5, 0.9])
    def test_crop_reads_a_square_inside_the_image(self, crop):
        """On the images of row and column numbers one sees what is read."""
        places = np.mgrid[0:20, 0:20].transpose(1, 2, 0).astype("float32")
        images = np.repeat(places[None], 100, 0)
        out = numpy(
            augment.augment(
                images, self.keys(100), augment.Augmentation(crop=crop)
            )
        )
        middle = out[:, 5:15, 5:15]  # The border blends with black.
        sides = (middle[:, -1, 0, 0] - middle[:, 0, 0, 0]) / 9
        wide = (middle[:, 0, -1, 1] - middle[:, 0, 0, 1]) / 9
        np.testing.assert_allclose(sides, wide, atol=1e-4)
        assert sides.min() >= crop - 1e-4 and sides.max() <= 1.0
        assert sides.max() - sides.min() > 0.7 * (1 - crop)
        centre = (middle.min((1, 2)) + middle.max((1, 2))) / 2 - 9.5
        reach = (1 - sides)[:, None] * 10
        assert np.all(np.abs(centre) <= reach + 1e-3)
        assert np.abs(centre / reach).max() > 0.9

    def test_area_and_aspect_of_a_crop_are_drawn(self):
        places = np.mgrid[0:40, 0:40].transpose(1, 2, 0).astype("float32")
        images = np.repeat(places[None], 400, 0)
        drawn = augment.Augmentation(area=0.1, aspect=4 / 3)
        out = numpy(augment.augment(images, self.keys(400), drawn))
        middle = out[:, 10:30, 10:30]
        high = (middle[:, -1, 0, 0] - middle[:, 0, 0, 0]) / 19
        wide = (middle[:, 0, -1, 1] - middle[:, 0, 0, 1]) / 19
        # Above, a side may be longer than the image.
        free = high * wide < 0.5
        aspect = np.log(wide / high)[free] / np.log(4 / 3)
        assert np.abs(aspect).max() < 1.01 and np.abs(aspect.mean()) < 0.1
        assert np.std(aspect) == pytest.approx(1 / np.sqrt(3), abs=0.06)
        assert (high * wide).min() > 0.1 - 1e-3
        assert np.mean(high * wide < 0.3) == pytest.approx(2 / 9, abs=0.06)
        assert high.max() <= 1 + 1e-4 and wide.max() <= 1 + 1e-4
        # Nothing is read outside the image.
        for axis, side in ((0, high), (1, wide)):
            centre = middle[..., axis].mean((1, 2)) - 19.5
            assert np.all(np.abs(centre) <= (1 - side) * 20 + 1e-3)

    def test_rotation_turns_by_at_most_its_angle(self):
        places = np.mgrid[0:21, 0:21].transpose(1, 2, 0).astype("float32")
        images = np.repeat(places[None], 200, 0)
        out = numpy(
            augment.augment(
                images, self.keys(200), augment.Augmentation(rotation=0.5)
            )
        )
        arm = out[:, 10, 15] - out[:, 10, 10]
        angle = np.arctan2(arm[:, 0], arm[:, 1])
        np.testing.assert_allclose(np.linalg.norm(arm, axis=1), 5, atol=1e-3)
        assert np.abs(angle).max() <= 0.5 + 1e-4
        assert angle.max() > 0.4 and angle.min() < -0.4

    def test_images_are_drawn_separately_and_by_key_alone(self):
        images = np.repeat(
            np.random.default_rng(0).random((1, 12, 12, 1)), 6, 0
        ).astype("float32")
        digits = augment.AUGMENTATIONS["digits"]
        keys = self.keys(6)
        out = numpy(augment.augment(images, keys, digits))
        assert len(np.unique(out.reshape(6, -1), axis=0)) == 6
        tail = numpy(augment.augment(images[4:], keys[4:], digits))
        np.testing.assert_array_equal(out[4:], tail)
        other = numpy(augment.augment(images, self.keys(6, step=1), digits))
        assert np.all((out != other).any((1, 2, 3)))


@pytest.mark.parametrize(
    "layer",
    [
        glimpse.RetinalWarp((8, 8), 5.0),
        glimpse.Fixations(3, given=[[1, 2]], seed=4),
        glimpse.Fixations(3, test_gazes="random", whole=True),
        glimpse.CoarseFixation(8, blur=2, enlarge=3),
        glimpse.CorticalSampling((8, 16), (1, 2), centred=(1,)),
    ],
    ids=["retina", "fixations", "whole", "coarse", "cortical"],
)
def test_layers_survive_a_config_round_trip(layer):
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert copy.get_config() == layer.get_config()
