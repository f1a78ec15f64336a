"""The guard of pictures: any and strict counting, an image classifier of transformers, and detectors that misbehave."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("diffusers")

from davylamp.core import InputError, Message, UnknownNameError
from davylamp.guards.picture_concept import PictureConcept, picture_concept
from davylamp.models.pictures import blank


class Detector:
    labels = ("disc", "none")

    def __init__(self, *chances):
        self.chances = chances

    def __call__(self, refs):
        return [[chance, 1 - chance] for chance in self.chances]


def judge(guard, pictures=3):
    return asyncio.run(guard((Message("assistant", media=(blank(),) * pictures),)))


@pytest.mark.parametrize("hits, chances, shown", [(1, (0.9, 0.1, 0.2), True), (2, (0.9, 0.1, 0.2), False), (2, (0.9, 0.6, 0.2), True),
                                                  (1, (0.4, 0.1, 0.2), False)])  # fmt: skip
def test_any_and_two_of_three(hits, chances, shown):
    verdict = judge(PictureConcept(Detector(*chances), "disc", hits, 0.5))
    assert (verdict.value >= 0.5) == shown
    assert f"{sum(chance >= 0.5 for chance in chances)} of 3" in verdict.why


def test_the_threshold_lies_at_one_half():
    for chance, value in ((0.45, 0.5), (0.0, 0.0), (1.0, 1.0), (0.225, 0.25), (0.725, 0.75)):
        assert judge(PictureConcept(Detector(chance), "disc", 1, 0.45), 1).value == pytest.approx(value)
    assert judge(PictureConcept(Detector(0.9), "disc", 2, 0.5), 1).value == 0.0  # fewer pictures than hits


def test_could_not_tell():
    guard = PictureConcept(Detector(0.9), "disc", 1, 0.5)
    assert judge(guard, 0).value is None


def test_detectors_that_misbehave():
    for chances in ((float("nan"),), (0.5, 0.5)):
        with pytest.raises(InputError, match="must give 1 x 2 finite chances"):
            judge(PictureConcept(Detector(*chances), "disc", 1, 0.5), 1)
    for bad in ({"hits": 0}, {"threshold": 0.0}):
        with pytest.raises(InputError, match="picture_concept must be"):
            picture_concept(**{"model": "nowhere", "label": "a", **bad})
    with pytest.raises(UnknownNameError, match="Did you mean 'disc'"):
        PictureConcept(Detector(), "disk", 1, 0.5)


def test_an_image_classifier_of_transformers(tmp_path):
    """The value is that of the model's own softmax, computed here by hand from the processor's pixels."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
                       id2label={0: "car", 1: "horn"}, label2id={"car": 0, "horn": 1})  # fmt: skip
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = judge(picture_concept(model=str(tmp_path), label="car"), 2)
    grey = torch.full((1, 3, 32, 32), (128 / 255 - 0.5) / 0.5)  # ViT's processor scales to [-1, 1]
    with torch.inference_mode():
        chance = float(model(grey).logits.softmax(-1)[0, 0])
    assert found.value == pytest.approx(chance, abs=1e-3)
    with pytest.raises(InputError, match="is no image classifier"):
        picture_concept(model=str(tmp_path / "nowhere"), label="car")
    assert np.isfinite(chance)
