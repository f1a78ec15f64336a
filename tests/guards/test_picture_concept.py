"""The guard of pictures: any and strict counting, a classifier of the user's own, and detectors that misbehave."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("diffusers")

from davylamp.core import InputError, Message, UnknownNameError
from davylamp.guards.picture_concept import PictureConcept, picture_concept
from davylamp.models import tiny_diffusion as tiny
from davylamp.models.pictures import data_url


def reply(*shapes):
    rng = np.random.default_rng(1)
    return (Message("assistant", media=tuple(data_url(tiny.draw(shape, "red", "black", rng)) for shape in shapes)),)


def judge(guard, messages):
    return asyncio.run(guard(messages))


def test_any_and_two_of_three():
    one, both = reply("disc", "square", "cross"), reply("disc", "disc", "cross")
    assert judge(picture_concept(), one).value > 0.5 > judge(picture_concept(hits=2), one).value
    assert judge(picture_concept(hits=2), both).value > 0.5 > judge(picture_concept(), reply("square")).value
    assert judge(picture_concept(hits=2), reply("disc")).value < 0.5  # fewer pictures than hits
    assert judge(picture_concept(label="square"), reply("square")).value > 0.5


def test_could_not_tell():
    assert judge(picture_concept(), (Message("assistant", "I cannot paint that"),)).value is None
    assert judge(picture_concept(), (Message("assistant", media=("nowhere.png",)),)).value is None


def test_detectors_that_misbehave():
    class Detector:
        labels = ("disc", "none")

        def __init__(self, out):
            self.out = out

        def __call__(self, refs):
            return self.out

    for out in ([[0.5, float("nan")]], [[0.5, 0.5]] * 2):
        with pytest.raises(InputError, match="must give 1 x 2 finite chances"):
            judge(PictureConcept(Detector(out), "disc", 1, 0.5), reply("disc"))
    assert judge(PictureConcept(Detector([[0.45, 0.55]]), "disc", 1, 0.45), reply("disc")).value == pytest.approx(0.5)
    for bad in ({"hits": 0}, {"threshold": 0.0}):
        with pytest.raises(InputError):
            picture_concept(**bad)
    with pytest.raises(UnknownNameError, match="Did you mean 'disc'"):
        picture_concept(label="disk")


def test_an_image_classifier_of_transformers(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
                       id2label={0: "car", 1: "horn"}, label2id={"car": 0, "horn": 1})  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = judge(picture_concept(model=str(tmp_path), label="car"), reply("disc", "cross"))
    assert 0 < found.value < 1 and "2 pictures" in found.why
    with pytest.raises(InputError, match="is no image classifier"):
        picture_concept(model=str(tmp_path / "nowhere"), label="car")
