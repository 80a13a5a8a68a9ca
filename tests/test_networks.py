"""Which classifiers may guide which networks."""

from pathlib import Path

import pytest

from trainer import config as configs
from trainer.networks import TrainedNetwork, check_guide


@pytest.mark.parametrize(
    ("network", "classifier"),
    [
        ("imagenet64", "classifier64"),
        ("imagenet128", "classifier128"),
        ("imagenet128_ablation", "classifier128"),
        ("imagenet256", "classifier256"),
        ("imagenet256_uncond", "classifier256"),
        ("upsample64_256", "classifier256"),
        ("imagenet512", "classifier512"),
        ("upsample128_512", "classifier512"),
        ("digits", "digits_classifier"),
    ],
)
def test_the_presets_of_a_published_pair_fit(network: str, classifier: str) -> None:
    guide, guided = (
        TrainedNetwork(configs.load(preset), Path(), "", preset) for preset in (classifier, network)
    )
    check_guide(guide, network=guided)
