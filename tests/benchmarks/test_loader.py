"""The benchmark of the loader: all programs read every file."""

import loader
import pytest
from PIL import Image

pytest.importorskip("tensorflow")


def test_each_program_reads_every_file(tmp_path, capsys):
    paths = loader.make_files(tmp_path, 5)
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (500, 375)
    config = loader.LoaderConfig(image_size=32, batch_size=2, rounds=1)
    record = loader.measure(config, paths)
    for found in record.values():
        assert set(found["images_per_second"]) == {
            *("saccade", "tf.data", "pillow")
        }
        assert min(found["images_per_second"].values()) > 0
    loader.show(record)
    assert "crops" in capsys.readouterr().out
