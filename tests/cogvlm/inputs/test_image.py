"""Images to tensors, against pixels worked out by hand."""

import io
import warnings

import numpy
import pytest
import torch
from PIL import Image

from sat_lora import DataError
from sat_lora.cogvlm.inputs.image import image_tensor, load_image, no_images
from sat_lora.cogvlm.network import vision
from sat_lora.data import samples
from tests.support.tiny import tiny_model

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def colour_of(tensor):
    """The one colour of an image that has one, as bytes."""
    assert tensor.dtype == torch.float32
    assert (tensor - tensor[:, :1, :1]).abs().max() < 1e-6
    return [round(255 * (tensor[c, 0, 0].item() * STD[c] + MEAN[c]), 3) for c in range(3)]


def test_pixels_are_scaled_and_normalised_by_channel():
    pixels = numpy.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=numpy.uint8)
    tensor = image_tensor(Image.fromarray(pixels), (7, 7))
    assert tensor.shape == (3, 7, 7)
    for channel, row, column in numpy.ndindex(3, 7, 7):
        expected = (pixels[row, column, channel] / 255 - MEAN[channel]) / STD[channel]
        assert tensor[channel, row, column].item() == pytest.approx(expected, abs=1e-5)


def keys_bicubic(pixels, size):
    """A row of pixels enlarged by Keys' cubic convolution with a = -0.5, as Pillow's BICUBIC is defined."""

    def weight(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    result = []
    for place in range(size):
        centre = (place + 0.5) * len(pixels) / size
        weights = [weight(centre - (i + 0.5)) for i in range(len(pixels))]
        result.append(sum(w * p for w, p in zip(weights, pixels)) / sum(weights))
    return result


def test_resizing_is_bicubic():
    row = [30, 200, 90, 90, 160, 40]
    image = Image.fromarray(numpy.array([row] * 6, dtype=numpy.uint8)).convert("RGB")
    tensor = image_tensor(image, (6, 24))
    got = tensor[0, 2] * STD[0] + MEAN[0]
    expected = torch.tensor(keys_bicubic(row, 24)).clamp(0, 255) / 255
    torch.testing.assert_close(got, expected, rtol=0, atol=0.6 / 255)


def test_an_image_that_is_not_square_is_squeezed_and_not_cropped():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))  # the left half red, the right half blue
    tensor = image_tensor(image, (14, 14))
    assert tensor.shape == (3, 14, 14)
    assert colour_of(tensor[:, :, :5]) == [255, 0, 0] and colour_of(tensor[:, :, -5:]) == [0, 0, 255]


def test_the_size_is_height_and_width():
    image = Image.new("RGB", (10, 10), (255, 0, 0))
    image.paste((0, 0, 255), (0, 5, 10, 10))  # the lower half blue
    tensor = image_tensor(image, (20, 6))
    assert tensor.shape == (3, 20, 6)
    assert colour_of(tensor[:, :7]) == [255, 0, 0] and colour_of(tensor[:, -7:]) == [0, 0, 255]


@pytest.mark.parametrize(
    ("mode", "value", "colour"),
    [
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("LA", (77, 10), [248, 248, 248]),  # on white: 255 - (255 - 77) * 10 / 255
        ("RGBA", (10, 200, 30, 0), [255, 255, 255]),
        ("RGBA", (10, 200, 30, 255), [10, 200, 30]),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("P", 3, [9, 10, 11]),
    ],
)
def test_every_mode_becomes_rgb(mode, value, colour, tmp_path):
    image = Image.new(mode, (8, 8), value)
    if mode == "P":
        image.putpalette(range(256))
    assert colour_of(image_tensor(image, (5, 5))) == colour
    path = tmp_path / "x.tiff"
    image.save(path)
    assert colour_of(load_image(path, (5, 5))) == colour


def encoded(kind):
    pixels = numpy.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=numpy.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_a_cut_file_is_named(tmp_path, kind):
    path = tmp_path / "cut.img"
    content = encoded(kind)
    for keep in (0, 3, 40, len(content) // 2):
        path.write_bytes(content[:keep])
        with pytest.raises(DataError, match="cut.img: cannot be read as an image: "):
            load_image(path, (14, 14))


def test_text_a_folder_and_nothing_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for name in ("text.png", "folder.png", "nowhere.png"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as an image: "):
            load_image(tmp_path / name, (14, 14))


def test_an_image_too_large_to_be_one_is_named(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="bomb.png: cannot be read as an image: 40 x 40 pixels are more than --max-p"):
        load_image(tmp_path / "bomb.png", (14, 14), max_pixels=1599)
    assert load_image(tmp_path / "bomb.png", (14, 14), max_pixels=1600).shape == (3, 14, 14)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_no_damage_gives_another_exception(tmp_path, kind):
    """One that nobody expects would stop one rank and leave the others waiting."""
    path, generator, outcomes = tmp_path / "x.img", numpy.random.default_rng(0), set()
    for _ in range(150):
        content = numpy.frombuffer(encoded(kind), dtype=numpy.uint8).copy()
        places = generator.integers(0, min(len(content), generator.choice([60, len(content)])), 5)
        content[places] = generator.integers(0, 256, 5)
        path.write_bytes(content.tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes.add(load_image(path, (14, 14)).shape)
            except DataError:
                outcomes.add("broken")
    assert "broken" in outcomes and outcomes <= {"broken", (3, 14, 14)}


def test_data_and_model_carry_the_same_where_there_is_no_image(single_process_group, monkeypatch):
    """Both ask `no_images` for it."""
    model, made = tiny_model(), []

    def noted(size, device=None):
        made.append(tuple(size))
        return no_images(size, device)

    monkeypatch.setattr(samples, "no_images", noted)
    monkeypatch.setattr(vision, "no_images", noted)
    of_model, of_data = model.mixins["eva"].no_images(), samples.collate([], image_size=(21, 21))["images"]
    assert torch.equal(of_model, of_data) and of_data.shape == (0, 3, 21, 21) and of_data.dtype == torch.float32
    assert made == [(21, 21)] * 2
