"""Pictures show the pixels they were given, boxes lie where they were drawn, and no figure is kept."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import types
import weakref

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image

from slipstream.plot import plot_crops, show_batch

mpl.use("Agg")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), np.uint8))


def batch_of(count: int, size: int) -> torch.Tensor:
    return torch.stack([photo(size, size, seed) for seed in range(count)])


def pictures(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in figure.axes[0].images]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def rectangles(figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def rendered(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.array(Image.open(file).convert("RGB"))


def hwc(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda x: x, 0),
        (lambda x: x.flip(3).flip(3), 0),
        (lambda x: x.contiguous(memory_format=torch.channels_last), 0),
        (lambda x: x.to(torch.int64), 0),
        (lambda x: x / 255, 0),
        (lambda x: (x / 255).half(), 1),
        (lambda x: (x / 255).bfloat16(), 1),
        (lambda x: x.float(), 0),
        (lambda x: (x / 255 - MEAN) / STD, 0),
        (lambda x: ((x / 255 - MEAN) / STD).bfloat16(), 2),
        (lambda x: (x / 255).requires_grad_(), 0),
    ],
    ids=["uint8", "flipped", "channels_last", "int64", "0-1", "half", "bfloat16", "0-255", "norm", "norm bf16", "grad"],
)
def test_values_of_any_type_and_range_show_the_same_picture(change, tolerance):
    images = batch_of(2, 16)
    shown = pictures(show_batch(change(images)))
    for picture, image in zip(shown, images, strict=True):
        assert picture.dtype == np.uint8
        assert np.abs(picture.astype(int) - hwc(image)).max() <= tolerance


def test_the_range_is_judged_over_the_batch():
    dark = torch.full((3, 4, 4), 0.5)
    bright = torch.full((3, 4, 4), -1.0)
    assert (pictures(show_batch([dark]))[0] == 128).all()
    expected = ((0.5 * STD + MEAN) * 255).round().flatten().to(torch.uint8).numpy()
    assert (pictures(show_batch([dark, bright]))[0] == expected).all()


def test_other_normalisations_can_be_named():
    images = batch_of(1, 8)
    shown = pictures(show_batch(images / 127.5 - 1, normalized=([0.5] * 3, [0.5] * 3)))
    assert (shown[0] == hwc(images[0])).all()


def test_a_little_overshoot_is_clipped_and_nan_is_black():
    image = torch.tensor([-0.01, 0.5, 1.01, float("nan")]).view(1, 2, 2).expand(3, 2, 2)
    assert pictures(show_batch([image]))[0][..., 0].tolist() == [[0, 128], [255, 0]]


def test_grey_images_show_as_grey():
    image = photo(5, 6)[:1]
    assert (pictures(show_batch([image]))[0] == hwc(image.expand(3, 5, 6))).all()


def test_images_of_unlike_sizes_keep_their_aspect():
    figure = show_batch([photo(30, 60), photo(60, 30), photo(1, 50)], nrow=2, title="Ragged")
    for image, (h, w) in zip(figure.axes[0].images, [(30, 60), (60, 30), (1, 50)], strict=True):
        left, right, bottom, top = image.get_extent()
        assert (right - left) / (bottom - top) == pytest.approx(w / h)
    assert texts(figure) == ["Ragged"]


def test_nrow_images_lie_in_a_row_without_overlap_inside_the_figure():
    figure = show_batch(batch_of(7, 8), nrow=3)
    extents = np.array([image.get_extent() for image in figure.axes[0].images])
    assert [len(np.unique(extents[:, i].round(6))) for i in (0, 3)] == [3, 3]
    assert len(np.unique(extents.round(6), axis=0)) == 7
    width, height = figure.get_size_inches()
    assert (extents >= 0).all()
    assert (extents[:, 1] <= width).all()
    assert (extents[:, 2] <= height).all()


def test_the_saved_file_shows_the_image():
    red = torch.zeros(3, 32, 32, dtype=torch.uint8)
    red[0] = 200
    pixels = rendered(show_batch([red]))
    assert pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].tolist() == [200, 0, 0]


def test_figsize_is_kept():
    assert show_batch(batch_of(2, 8), figsize=(3, 4)).get_size_inches().tolist() == [3, 4]
    assert plot_crops({"a": batch_of(2, 8)}, figsize=(5, 2)).get_size_inches().tolist() == [5, 2]


def crops_with_boxes() -> dict[str, object]:
    return {
        "global_0": (batch_of(3, 32) / 255 - MEAN) / STD,
        "global_0_box": torch.tensor([[0, 0, 40, 60], [2, 3, 20, 10], [1, 1, 1, 1]], dtype=torch.int32),
        "global_0_flip": torch.tensor([False, True, False]),
        "local_0": batch_of(3, 16),
        "local_0_box": torch.tensor([[10, 20, 5, 6], [0, 0, 9, 9], [5, 6, 7, 8]], dtype=torch.int32),
        "label": torch.arange(3),
        "path": ["a", "b", "c"],
        "_indices": torch.tensor([7, 1281166, 3]),
    }


def test_contact_sheet_has_one_row_a_crop_and_the_sources_above():
    sources = [photo(40, 60), photo(60, 40), photo(50, 50)]
    figure = plot_crops(crops_with_boxes(), sources=sources, title="Sheet")
    shown = pictures(figure)
    assert len(shown) == 9
    assert all((picture == hwc(source)).all() for picture, source in zip(shown, sources, strict=False))
    assert (shown[3] == hwc(photo(32, 32, 0))).all()
    assert (shown[8] == hwc(photo(16, 16, 2))).all()
    tops = [image.get_extent()[3] for image in figure.axes[0].images]
    assert max(tops[:3]) < min(tops[3:6]) < min(tops[6:])
    assert {"Sheet", "global_0", "32 x 32 float32", "local_0", "16 x 16 uint8", "source"} <= set(texts(figure))
    assert [text for text in texts(figure) if text.startswith("sample")] == ["sample 7", "sample 1281166", "sample 3"]
    assert texts(figure).count("flip") == 1


def test_boxes_lie_on_the_source_in_their_crops_colour():
    batch = crops_with_boxes()
    figure = plot_crops(batch, sources=[photo(40, 60), photo(60, 40), photo(50, 50)], samples=[1])
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    colors = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    for crop, box in (("global_0", [2, 3, 20, 10]), ("local_0", [0, 0, 9, 9])):
        pixel = (right - left) / 40
        assert pixel == pytest.approx((bottom - top) / 60)
        expected = [left + box[1] * pixel, top + box[0] * pixel, box[3] * pixel, box[2] * pixel]
        drawn = [
            [*rectangle.get_xy(), rectangle.get_width(), rectangle.get_height()]
            for rectangle in rectangles(figure)
            if to_hex(rectangle.get_edgecolor()) == colors[crop]
        ]
        assert any(found == pytest.approx(expected) for found in drawn), crop


def test_boxes_of_large_sources_are_not_shifted_by_thinning():
    batch = {"a": batch_of(1, 8), "a_box": torch.tensor([[1000, 2000, 500, 700]], dtype=torch.int32)}
    figure = plot_crops(batch, sources=[photo(2000, 4000)])
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    box = rectangles(figure)[0]
    assert box.get_x() == pytest.approx((left + right) / 2)
    assert box.get_y() == pytest.approx((top + bottom) / 2)
    assert max(pictures(figure)[0].shape) <= 2000


def test_rows_keep_the_relative_size_of_crops():
    figure = plot_crops({"a": batch_of(1, 224), "b": batch_of(1, 160), "c": batch_of(1, 8)})
    widths = [image.get_extent()[1] - image.get_extent()[0] for image in figure.axes[0].images]
    assert widths[1] / widths[0] == pytest.approx(160 / 224)
    assert widths[2] / widths[0] == pytest.approx(0.5)


def test_crops_and_samples_can_be_chosen():
    figure = plot_crops(crops_with_boxes(), crops=["local_0"], samples=[2, 0])
    assert [picture.tolist() for picture in pictures(figure)] == [hwc(photo(16, 16, i)).tolist() for i in (2, 0)]
    assert len(pictures(plot_crops(crops_with_boxes(), samples=2))) == 4
    assert len(pictures(plot_crops({"a": batch_of(9, 8)}))) == 6


def test_lists_of_crops_are_named_as_their_boxes_are():
    listed = {"image": [batch_of(2, 8), batch_of(2, 16)], "image_1_flip": torch.tensor([True, False])}
    figure = plot_crops(listed)
    assert {"image_0", "image_1", "flip"} <= set(texts(figure))
    assert {"crop_0", "crop_1"} <= set(texts(plot_crops([batch_of(2, 8), batch_of(2, 16)])))
    assert "crop" in texts(plot_crops(batch_of(2, 8)))
    assert "many sizes uint8" in texts(plot_crops({"image": [photo(5, 6), photo(6, 5)]}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: show_batch([]), "images must hold at least one image"),
        (lambda: show_batch(batch_of(1, 4), nrow=0), "nrow must be 1 or more, got 0"),
        (
            lambda: show_batch(torch.zeros(2, 4, 5, 5)),
            r"images must be \[C, H, W\] with C 1 or 3 .*got shape \[4, 5, 5\]",
        ),
        (lambda: plot_crops({"label": torch.arange(3)}), r"batch must hold a crop .* got the fields \['label'\]"),
        (lambda: plot_crops({"a": batch_of(2, 4)}, crops=["b"]), r"crops must name some of \['a'\], got \['b'\]"),
        (lambda: plot_crops({"a": batch_of(2, 4)}, crops=[]), r"crops must name some of \['a'\], got \[\]"),
        (lambda: plot_crops({"a": batch_of(2, 4)}, samples=0), "samples must be a number of samples >= 1"),
        (lambda: plot_crops({"a": batch_of(2, 4)}, samples=[2]), r"samples must be .* \[0, 2\), got \[2\]"),
        (
            lambda: plot_crops({"a": batch_of(2, 4)}, sources=[photo(4, 4)]),
            "sources must hold an image for sample 1, got 1",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: show_batch(None), r"images must be images \[C, H, W\], got NoneType"),
        (lambda: show_batch([Image.new("RGB", (4, 4))]), r"images must be decoded images .*, got Image"),
        (lambda: show_batch(batch_of(1, 4), nrow="8"), "nrow must be an int, got '8'"),
        (lambda: plot_crops({"a": batch_of(2, 4)}, samples=2.5), "samples must be an int, got 2.5"),
        (lambda: plot_crops({"a": batch_of(2, 4)}, samples="2"), "samples must be an int, got '2'"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.filterwarnings("error")
def test_arrays_generators_and_numpys_ints_are_as_good():
    batch = batch_of(4, 8)
    expected = pictures(show_batch(batch, nrow=2))
    flipped = [image.numpy()[:, ::-1, ::-1].copy()[:, ::-1, ::-1] for image in batch]
    read_only = np.frombuffer(batch.numpy().tobytes(), np.uint8).reshape(batch.shape)
    for images in (flipped, read_only, (image for image in batch)):
        for mine, theirs in zip(pictures(show_batch(images, nrow=np.int64(2))), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for samples in (np.int64(2), torch.tensor([0, 1]), range(2)):
        assert len(pictures(plot_crops({"a": batch}, samples=samples))) == 2


def test_names_and_titles_are_text_and_no_formulas():
    rendered(show_batch(batch_of(1, 8), title="$x_{$"))
    rendered(plot_crops({"$a_{$": batch_of(1, 8)}))


def test_encoded_images_are_refused_with_the_way_to_decode_them():
    with pytest.raises(TypeError, match=r"images must be decoded .*decode_images=True.*, got bytes"):
        show_batch([b"\xff\xd8\xff"])


def test_a_batch_given_to_show_batch_is_sent_to_plot_crops():
    with pytest.raises(TypeError, match=r"got a dict of \['a', 'label'\]: plot_crops takes a batch"):
        show_batch({"a": batch_of(2, 4), "label": torch.arange(2)})


def test_figures_are_unknown_to_pyplot_and_go_when_dropped():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figure = plot_crops(crops_with_boxes(), sources=[photo(40, 60), photo(60, 40), photo(50, 50)])
    rendered(figure)
    assert pyplot.get_fignums() == before
    gone = weakref.ref(figure)
    del figure
    gc.collect()
    assert gone() is None


def test_a_notebook_shows_the_figure_once(monkeypatch):
    ipython = pytest.importorskip("IPython")
    import IPython.display

    shell = types.SimpleNamespace(kernel=object(), execution_count=4)
    shown = []
    monkeypatch.setattr(ipython, "get_ipython", lambda: shell)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    figure = show_batch(batch_of(1, 8))
    assert len(shown) == 1
    assert shown[0].data.startswith(b"\x89PNG")
    figure._ipython_display_()  # the cell's result
    assert len(shown) == 1
    shell.execution_count = 5
    figure._ipython_display_()  # a later cell asks for it
    assert len(shown) == 2


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib$"):
        show_batch(batch_of(1, 8))


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, slipstream.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_show_as_cpu_tensors_do():
    images = batch_of(2, 8)
    for here, there in zip(pictures(show_batch(images)), pictures(show_batch(images.cuda())), strict=True):
        assert (here == there).all()
    batch = {key: v.cuda() if isinstance(v, torch.Tensor) else v for key, v in crops_with_boxes().items()}
    assert len(pictures(plot_crops(batch, sources=[photo(50, 60).cuda()] * 3))) == 9
