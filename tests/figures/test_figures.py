"""Figures show the given arrays at the right positions."""

import inspect
import io
import threading

import matplotlib.colors
import matplotlib.text
import numpy as np
import pytest
from PIL import Image

from saccade.evaluation import curves
from saccade.figures import confusion
from saccade.figures import curves as figure_curves
from saccade.figures import images as figure_images
from saccade.figures import style as figure_style

NAMES = ("zero", "leatherback_turtle", "two")


def pictures(n=3, height=12, width=12, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((n, height, width, channels)).astype("float32")


def panels(figure, columns):
    return np.array(figure.axes, dtype=object).reshape(-1, columns)


def drawn(axis):
    """Returns the only image of a panel, with channels."""
    (image,) = axis.get_images()
    array = np.ma.filled(image.get_array(), np.nan)
    return array[..., None] if array.ndim == 2 else array


def marks(axis, kind):
    """Returns the marks of a kind ("gaze", "shift", "box") by branch."""
    found = {}
    for artist in [*axis.lines, *axis.patches]:
        words = (artist.get_gid() or "").split()
        if len(words) == 2 and words[0] == kind:
            found[int(words[1])] = artist
    return [found[branch] for branch in sorted(found)]


def attack_arguments(n=3, **size):
    clean = pictures(n, **size) * 0.8 + 0.1
    noise = np.random.default_rng(1).uniform(-0.05, 0.05, clean.shape)
    return dict(
        clean=clean,
        adversarial=(clean + noise).astype("float32"),
        labels=np.arange(n) % 3,
        clean_predictions=np.arange(n) % 3,
        adversarial_predictions=np.arange(1, n + 1) % 3,
        class_names=NAMES,
    )


class TestAmplification:
    @pytest.mark.parametrize("epsilon", [0.05, 1 / 255, 8 / 255, 0.3, 0.9])
    def test_factor_uses_the_range_without_clipping(self, epsilon):
        delta = np.float32(epsilon) * np.array([-1, 0.3, 1], "float32")
        factor = figure_images.amplification(delta)
        assert factor * epsilon <= 0.5 * (1 + 2e-4)
        assert factor * epsilon > 0.5 * 0.9  # Two digits lose at most 10%.

    def test_factor_has_two_digits(self):
        assert figure_images.amplification(np.float32([0.05])) == 10
        assert f"{figure_images.amplification([8 / 255]):g}" == "15"

    @pytest.mark.parametrize("delta", [[0.0, 0.0], [np.nan, 1.0], []])
    def test_factor_is_one_without_a_finite_perturbation(self, delta):
        assert figure_images.amplification(np.array(delta)) == 1.0


class TestAttackGrid:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_images_are_drawn_unchanged(self, channels):
        arguments = attack_arguments(channels=channels)
        figure = figure_images.attack_grid(**arguments)
        grid = panels(figure, 3)
        assert len(grid) == 3
        for row, (clean, adversarial, _) in enumerate(grid):
            np.testing.assert_array_equal(drawn(clean), arguments["clean"][row])
            np.testing.assert_array_equal(
                drawn(adversarial), arguments["adversarial"][row]
            )

    def test_grey_scale_is_fixed(self):
        """The contrast of a dark image is not stretched."""
        arguments = attack_arguments()
        arguments["clean"] = arguments["clean"] * 0.2
        arguments["adversarial"] = arguments["clean"]
        figure = figure_images.attack_grid(**arguments)
        for axis in figure.axes:
            (image,) = axis.get_images()
            assert image.get_clim() == (0.0, 1.0)
            assert image.cmap.name == "gray"
            assert image.get_interpolation() == "nearest"

    def test_perturbation_is_amplified_by_the_factor_in_the_header(self):
        arguments = attack_arguments(channels=3)
        figure = figure_images.attack_grid(**arguments)
        grid = panels(figure, 3)
        (header,) = [t.get_text() for t in grid[0, 2].texts]
        factor = float(header.split("×")[1])
        for row in range(3):
            delta = arguments["adversarial"][row] - arguments["clean"][row]
            shown = drawn(grid[row, 2])
            np.testing.assert_allclose((shown - 0.5) / factor, delta, atol=1e-5)
            assert shown.min() >= 0 and shown.max() <= 1
            assert f"L∞ {np.abs(delta).max():.3g}" in grid[row, 2].get_title()

    def test_zero_perturbation_is_mid_grey(self):
        arguments = attack_arguments()
        arguments["adversarial"] = arguments["clean"]
        grid = panels(figure_images.attack_grid(**arguments), 3)
        assert np.all(drawn(grid[0, 2]) == 0.5)
        assert "× 1" in grid[0, 2].texts[0].get_text()

    def test_correct_and_wrong_predictions_differ_in_mark_and_colour(self):
        grid = panels(figure_images.attack_grid(**attack_arguments()), 3)
        correct, wrong = grid[1, 0].title, grid[1, 1].title
        assert correct.get_text() == "✓ leatherback turtle"
        assert wrong.get_text() == "✗ two"
        assert correct.get_color() == figure_style.RIGHT
        assert wrong.get_color() == figure_style.WRONG

    def test_lines_connect_clean_and_adversarial_gazes(self):
        before = np.array([[[0.0, 0.0], [2.0, -3.0]]])
        after = np.array([[[1.0, 4.0], [2.0, -3.5]]])
        figure = figure_images.attack_grid(
            **attack_arguments(1, height=11, width=21),
            clean_gazes=before,
            adversarial_gazes=after,
        )
        clean, adversarial, perturbation = panels(figure, 3)[0]
        centre = np.array([5.0, 10.0])  # Of 11 x 21 pixels.
        for branch, line in enumerate(marks(adversarial, "shift")):
            ends = np.stack(line.get_data(), axis=-1)[:, ::-1] - centre
            np.testing.assert_allclose(
                ends, [before[0, branch], after[0, branch]]
            )
        assert len(marks(adversarial, "shift")) == 2
        assert not marks(clean, "shift") and not marks(perturbation, "gaze")

    def test_max_rows_limits_the_rows(self):
        assert len(figure_images.attack_grid(**attack_arguments(5)).axes) == 15
        figure = figure_images.attack_grid(**attack_arguments(5), max_rows=2)
        assert len(figure.axes) == 6

    def test_errors_name_the_received_shapes(self):
        arguments = attack_arguments()
        with pytest.raises(ValueError, match=r"one shape.*\(2, 12"):
            figure_images.attack_grid(
                **{**arguments, "adversarial": arguments["clean"][:2]}
            )
        with pytest.raises(ValueError, match=r"clean images.*\(0, 12"):
            figure_images.attack_grid(
                **{**arguments, "clean": arguments["clean"][:0]}
            )

    def test_confidences_and_targets_are_shown(self):
        grid = panels(
            figure_images.attack_grid(
                **attack_arguments(),
                clean_confidences=[0.871, np.nan, 0.9999],
                adversarial_confidences=[0.5, 0.25, 1.0],
                targets=[1, 0, -1],
            ),
            3,
        )
        assert grid[0, 0].get_title() == "✓ zero (87%)"
        assert grid[1, 0].get_title() == "✓ leatherback turtle"
        assert grid[2, 0].get_title() == "✓ two (99.9%)"
        assert grid[0, 1].get_title() == "✗ leatherback turtle (50%)"
        notes = [row[1].get_xlabel() for row in grid]
        assert notes == [
            "target leatherback turtle: reached",
            "target zero: missed",
            "",
        ]

    def test_images_misclassified_before_the_attack_are_marked(self):
        arguments = attack_arguments()
        arguments["clean_predictions"] = np.array([0, 2, -1])
        grid = panels(figure_images.attack_grid(**arguments), 3)
        notes = [row[1].get_xlabel() for row in grid]
        assert notes == ["", *["misclassified before attack"] * 2]
        assert grid[2, 0].get_title() == "✗ non-finite"


class TestGlimpseGrid:
    @pytest.mark.parametrize("height,width", [(12, 12), (9, 30), (40, 16)])
    def test_gazes_and_boxes_are_at_their_coordinates(self, height, width):
        gazes = np.array([[[0.0, 0.0], [-3.0, 4.5]]])
        boxes = np.array([[[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.5, 1.25]]])
        figure = figure_images.glimpse_grid(
            pictures(1, height, width),
            [0],
            [0],
            NAMES,
            gazes=gazes,
            boxes=boxes,
        )
        (axis,) = figure.axes
        # (0, 0) is the centre of the top-left pixel, so the edges of the image
        # are half a pixel outside, and its centre is at (size - 1) / 2.
        centre_row, centre_column = (height - 1) / 2, (width - 1) / 2
        positions = [mark.get_data() for mark in marks(axis, "gaze")]
        np.testing.assert_allclose(
            np.ravel(positions),
            [centre_column, centre_row, centre_column + 4.5, centre_row - 3],
        )
        whole, part = marks(axis, "box")
        assert whole.get_bbox().extents == pytest.approx(
            [-0.5, -0.5, width - 0.5, height - 0.5]
        )
        assert part.get_bbox().extents == pytest.approx(
            [
                0.5 * width - 0.5,
                0.25 * height - 0.5,
                1.25 * width - 0.5,
                0.5 * height - 0.5,
            ]
        )

    def test_box_beyond_the_image_is_visible(self):
        boxes = np.array([[[-0.2, 0.0, 1.1, 1.0]]])
        figure = figure_images.glimpse_grid(
            pictures(1), [0], [0], NAMES, boxes=boxes
        )
        (axis,) = figure.axes
        (box,) = marks(axis, "box")
        left, top, right, bottom = box.get_bbox().extents
        assert axis.get_ylim()[1] < top and bottom < axis.get_ylim()[0]
        assert axis.get_xlim()[0] < left and right < axis.get_xlim()[1]

    @pytest.mark.parametrize("branches", range(1, 11))
    def test_branch_has_the_same_colour_everywhere(self, branches):
        rng = np.random.default_rng(branches)
        views = rng.random((2, branches, 7, 5, 1)).astype("float32")
        boxes = rng.random((2, branches, 4)) / 2 + [0, 0, 0.5, 0.5]
        gazes = rng.normal(size=(2, branches, 2))
        figure = figure_images.glimpse_grid(
            pictures(2),
            [0, 1],
            [0, 2],
            NAMES,
            gazes=gazes,
            boxes=boxes,
            views=views,
        )
        grid = panels(figure, 1 + branches)
        colours = set()
        for branch in range(branches):
            frame = grid[1, 1 + branch].spines["left"].get_edgecolor()
            box = marks(grid[1, 0], "box")[branch].get_edgecolor()
            gaze = marks(grid[1, 0], "gaze")[branch].get_markerfacecolor()
            assert matplotlib.colors.same_color(frame, gaze)
            assert matplotlib.colors.same_color(frame, box)
            colours.add(matplotlib.colors.to_hex(frame))
            np.testing.assert_array_equal(
                drawn(grid[1, 1 + branch]), views[1, branch]
            )
        assert len(colours) == branches

    def test_coinciding_branches_stay_visible(self):
        gazes = np.zeros((1, 3, 2))
        boxes = np.tile([0.2, 0.2, 0.8, 0.8], (1, 3, 1))
        figure = figure_images.glimpse_grid(
            pictures(1), [0], [0], NAMES, gazes=gazes, boxes=boxes
        )
        sizes = [m.get_markersize() for m in marks(figure.axes[0], "gaze")]
        lines = [m.get_linewidth() for m in marks(figure.axes[0], "box")]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
        assert lines == sorted(lines, reverse=True) and len(set(lines)) == 3

    def test_images_without_gazes_boxes_and_views(self):
        figure = figure_images.glimpse_grid(
            pictures(2, channels=3), [0, 7], [0, 1], NAMES
        )
        assert len(figure.axes) == 2
        assert figure.axes[1].get_ylabel() == "7"  # A class without a name.

    def test_large_photographs_are_antialiased(self):
        figure = figure_images.glimpse_grid(
            pictures(1, 320, 320, 3), [0], [0], NAMES
        )
        (image,) = figure.axes[0].get_images()
        assert image.get_interpolation() == "antialiased"

    def test_views_of_wrong_rank_are_refused(self):
        with pytest.raises(ValueError, match=r"views.*\(3, 12, 12, 1\)"):
            figure_images.glimpse_grid(
                pictures(), [0] * 3, [0] * 3, NAMES, views=pictures()
            )


class TestGazeShift:
    def test_distances_are_euclidean(self):
        clean = np.zeros((4, 2, 2))
        adversarial = clean.copy()
        adversarial[:, 0] = [3.0, 4.0]
        figure = figure_images.gaze_shift(clean, adversarial, (40, 60, 1))
        left, right = figure.axes
        assert right.get_title() == "median 2.5 px, largest 5 px"
        labels = [text.get_text() for text in right.get_legend().get_texts()]
        assert labels == ["gaze 1: median 5", "gaze 2: median 0"]
        heights = sum(patch.get_height() > 0 for patch in right.patches)
        assert heights == 2  # One bin for each gaze.

    def test_arrows_start_at_the_clean_gaze_within_the_limits(self):
        clean = np.array([[[1.0, -2.0]], [[0.0, 30.0]]])
        adversarial = clean + [[[2.0, 5.0]], [[-50.0, 0.0]]]
        left = figure_images.gaze_shift(clean, adversarial, (41, 61)).axes[0]
        (arrows,) = left.collections
        np.testing.assert_allclose(arrows.get_offsets(), [[28, 21], [60, 20]])
        np.testing.assert_allclose(arrows.U, [5, 0])
        np.testing.assert_allclose(arrows.V, [2, -50])
        bottom, top = left.get_ylim()
        assert bottom > 40.5 and top < -30  # Rows grow downwards.

    def test_misclassified_and_robust_images_have_their_own_panels(self):
        clean = np.zeros((3, 1, 2))
        adversarial = np.array([[[3.0, 4.0]], [[0.0, 1.0]], [[0.0, 7.0]]])
        figure = figure_images.gaze_shift(
            clean, adversarial, (40, 40), misclassified=[True, False, True]
        )
        titles = [axis.get_title() for axis in figure.axes[1:]]
        assert titles == [
            "2 misclassified by the attack: median 6 px, largest 7 px",
            "1 still robust: median 1 px, largest 1 px",
        ]
        figure = figure_images.gaze_shift(
            clean, adversarial, (40, 40), misclassified=[True] * 3
        )
        assert len(figure.axes) == 2

    @pytest.mark.parametrize("shape", [(0, 2, 2), (3, 2)])
    def test_missing_gazes_are_refused(self, shape):
        with pytest.raises(ValueError, match="gazes of one shape"):
            figure_images.gaze_shift(np.zeros(shape), np.zeros(shape), (40, 40))


class TestTrainingCurves:
    def rows(self, **more):
        accuracy = ("0.2", "0.7", "0.6")
        return [
            {"epoch": str(i + 1), "loss": str(2.0 - i), "accuracy": value}
            | {key: values[i] for key, values in more.items()}
            for i, value in enumerate(accuracy)
        ]

    def test_curves_show_the_columns_of_the_history(self):
        rows = self.rows(
            validation_loss=("2.5", "2.0", "1.5"),
            validation_accuracy=("0.1", "0.4", "0.5"),
        )
        loss, accuracy = figure_curves.training_curves(rows).axes
        np.testing.assert_array_equal(
            loss.lines[0].get_xydata(), [[1, 2], [2, 1], [3, 0]]
        )
        np.testing.assert_array_equal(
            loss.lines[1].get_ydata(), [2.5, 2.0, 1.5]
        )
        labels = [t.get_text() for t in accuracy.get_legend().get_texts()]
        assert labels[-1] == "best: 50.0% in epoch 3"

    def test_no_star_without_validation(self):
        rows = self.rows(validation_accuracy=("", "", ""))
        loss, accuracy = figure_curves.training_curves(rows).axes
        assert len(loss.lines) == 1
        labels = [t.get_text() for t in accuracy.get_legend().get_texts()]
        assert labels == ["training"]

    @pytest.mark.parametrize(
        "rates,expected",
        [
            ([1e-3, 1e-3, 1e-3, 1e-4, 1e-4], [4]),
            ([1e-3, 7e-4, 4e-4, 1e-4, 0.0], []),  # A cosine does not drop.
        ],
    )
    def test_learning_rate_drops_are_lines(self, rates, expected):
        rows = [
            {"epoch": i + 1, "loss": 1.0, "learning_rate": rate}
            for i, rate in enumerate(rates)
        ]
        loss, _ = figure_curves.training_curves(rows).axes
        drops = [line.get_xdata()[0] for line in loss.lines[1:]]
        assert drops == expected

    def test_empty_history_is_refused(self):
        with pytest.raises(ValueError, match="at least one epoch"):
            figure_curves.training_curves([])


def test_figure_is_saved_atomically(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    figure = figure_images.glimpse_grid(
        pictures(), [0] * 3, [0] * 3, NAMES, path=path
    )
    with Image.open(path) as image:
        image.load()
        expected = figure.get_size_inches() * figure.dpi
        assert np.abs(np.array(image.size) - expected).max() <= 1
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")),
    )
    with pytest.raises(OSError, match="disk full"):
        figure_images.glimpse_grid(
            pictures(), [0] * 3, [0] * 3, NAMES, path=tmp_path / "other.png"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_figures_work_in_threads_without_pyplot():
    import matplotlib.pyplot

    results = []

    def work():
        figure = figure_images.attack_grid(**attack_arguments())
        buffer = io.BytesIO()
        figure.savefig(buffer)
        results.append(buffer.tell())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results and results[0] > 1000
    assert not matplotlib.pyplot.get_fignums()


class TestAttentionGrid:
    def maps(self, n=2, steps=3, heads=2):
        maps = np.random.default_rng(0).random((n, steps * heads, 4, 5))
        return maps / maps.sum(axis=(2, 3), keepdims=True)

    def draw(self, **kwargs):
        images = np.random.default_rng(1).random((2, 16, 20, 3))
        return figure_images.attention_grid(
            images, self.maps(), 3, [0, 1], [0, 0], ["cat", "dog"], **kwargs
        )

    def test_columns_show_the_mean_of_the_heads_of_a_step(self):
        *axes, _ = self.draw().axes  # The last is the colour bar.
        assert len(axes) == 2 * 4
        _, overlay = axes[2].images  # The first image's second step.
        want = self.maps()[0, 2:4].mean(axis=0)
        np.testing.assert_allclose(overlay.get_array(), want, rtol=1e-5)
        peak = f"{want.max() * want.size:.1f}x"
        assert axes[2].get_title() == peak

    def test_per_head_gives_each_head_a_row(self):
        figure = self.draw(per_head=True, row_names=["clean", "attacked"])
        *axes, _ = figure.axes
        assert len(axes) == 4 * 4
        _, overlay = axes[4 + 3].images  # The second head at the last step.
        np.testing.assert_allclose(
            overlay.get_array(), self.maps()[0, 5], rtol=1e-5
        )
        assert axes[12].get_xlabel() == "attacked, head 2"

    def test_last_step_is_always_shown(self):
        *axes, _ = self.draw(max_steps=2, max_rows=1).axes
        heads = [axis.texts[-1].get_text() for axis in axes]
        assert heads == ["image", "step 1", "step 3"]

    def test_panels_share_the_scale_of_the_colour_bar(self):
        figure = self.draw(max_steps=2)
        *axes, bar = figure.axes
        shown = self.maps().reshape(2, 3, 2, 4, 5).mean(axis=2)[:, [0, 2]]
        overlays = [axis.images[1] for axis in axes if len(axis.images) == 2]
        assert len(overlays) == 4
        for overlay in overlays:
            limits = overlay.get_clim()
            np.testing.assert_allclose(limits, (0, shown.max()), rtol=1e-5)
        np.testing.assert_allclose(bar.get_ylim(), limits)
        figure.canvas.draw()
        for tick, label in zip(
            bar.get_yticks(), bar.get_yticklabels(), strict=True
        ):  # A uniform map of 4 x 5 cells is 1x everywhere.
            number = float(label.get_text().removesuffix("x"))
            assert number == pytest.approx(tick * 20)
        assert "1x = 1/20" in bar.get_ylabel()

    def test_maps_of_wrong_shape_are_refused(self):
        with pytest.raises(ValueError, match="num_steps"):
            figure_images.attention_grid(
                np.zeros((2, 8, 8, 1)), self.maps(), 4, [0, 1], [0, 1], []
            )


class TestConfusionMatrices:
    def test_cells_show_counts_and_fractions(self):
        counts = np.array([[3, 1, 0], [0, 0, 0]])
        figure = confusion.confusion_matrices(
            {"clean": counts, "adversarial": counts[::-1]},
            ["cat", "dog", "non-finite"],
        )
        clean, adversarial, _ = figure.axes
        np.testing.assert_allclose(
            clean.images[0].get_array(), [[0.75, 0.25], [0, 0]]
        )
        assert [t.get_text() for t in clean.texts] == ["3", "1"]
        names = [label.get_text() for label in clean.get_xticklabels()]
        assert names == ["cat", "dog"]  # No prediction was non-finite.
        assert adversarial.get_title() == "adversarial images"

    def test_nonfinite_predictions_have_a_column(self):
        figure = confusion.confusion_matrices(
            {"clean": [[1, 0, 2], [0, 3, 0]]}, ["cat", "dog", "non-finite"]
        )
        names = [x.get_text() for x in figure.axes[0].get_xticklabels()]
        assert names == ["cat", "dog", "non-finite"]

    def test_matrices_of_wrong_shape_are_refused(self):
        with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
            confusion.confusion_matrices({"clean": np.eye(2)}, ["a", "b", "c"])


# Folder and class names that a formula parser, font or file system may misread.
UNUSUAL_NAMES = (
    "$x$",
    "$",
    "\\frac{",
    "a_b^c",
    "100%",
    "two\nlines",
    "very " * 40 + "long",
    "w" * 200,
    "犬と猫",
    "\U0001f40d",
    "bytes \udcff",
    "../a/b",
    "\x1b[31m\x00",
    "",
)


@pytest.mark.parametrize("first", range(0, len(UNUSUAL_NAMES), 3))
def test_every_figure_draws_unusual_names_literally(first, recwarn):
    """Names are drawn literally, without formulas, errors or warnings."""
    names = (*UNUSUAL_NAMES[first : first + 3], "b", "c")[:3]
    title = "\n".join(names)
    gazes = np.random.default_rng(0).normal(size=(3, 2, 2))
    predictions = np.array([0, 2, -1])
    figures = [
        figure_images.attack_grid(
            **{**attack_arguments(), "class_names": names},
            targets=[0, 1, 2],
            title=title,
        ),
        figure_images.glimpse_grid(
            pictures(), [0, 1, 2], predictions, names, title=title
        ),
        figure_images.attention_grid(
            pictures(),
            np.full((3, 1, 2, 2), 0.25),
            1,
            [0, 1, 2],
            predictions,
            names,
            row_names=names,
            title=title,
        ),
        figure_images.gaze_shift(gazes, gazes + 1, (12, 12), title=title),
        figure_curves.training_curves(
            [{"epoch": 1, "loss": 2.0, "accuracy": 0.1}], title=title
        ),
        confusion.confusion_matrices(
            {names[0]: np.zeros((3, 4), int)},
            [*names, "non-finite"],
            title=title,
        ),
        curves.accuracy_curves(
            [
                {"robust_accuracy": 0.5, "epsilon": radius, "dataset": data}
                for data in names
                for radius in (0.1, 0.2)
            ],
            title=title,
        ),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO(), dpi=20)
        for text in figure.findobj(matplotlib.text.Text):
            assert not text.get_parse_math() or not text.get_text()
    assert not [str(warning.message) for warning in recwarn]


def test_every_figure_function_is_in_the_test_above():
    source = inspect.getsource(test_every_figure_draws_unusual_names_literally)
    for module in (figure_images, figure_curves, confusion, curves):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            makes = "path" in inspect.signature(function).parameters
            if makes and not name.startswith("_") and "csv" not in name:
                known = f".{name}(" in source
                assert known or name == "finish", name


def test_names_without_glyphs_show_the_class_id():
    names = ["\U000f0000", "\U000f0001"]  # No font has these.
    assert figure_style.fit_name(names, 0, 24) == "□ (0)"
    assert figure_style.fit_name(names, 1, 24) == "□ (1)"
