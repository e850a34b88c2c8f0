"""The contract of a data module: what is missing is named, with its use and an example."""

import pytest
from lightning.pytorch import LightningDataModule

from lightning_modules.data.protocol import check_data_module, in_chans, num_classes, require

_CONFIG = {
    "input_size": (1, 32, 32),
    "mean": (0.5,),
    "std": (0.5,),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


class _Data(LightningDataModule):
    def __init__(self, names=("cat", "dog", "cow"), config=_CONFIG) -> None:
        super().__init__()
        self.data_config = config
        self._names = names

    @property
    def class_names(self):
        return self._names

    def val_dataloader(self):
        return []


def test_two_attributes_are_enough():
    data = _Data()
    assert check_data_module(data) is data
    assert (num_classes(data), in_chans(data)) == (3, 1)


def test_what_is_missing_is_named_with_its_use_and_an_example():
    class Nothing(LightningDataModule):
        pass

    for ask in (check_data_module, num_classes):
        with pytest.raises(
            ValueError, match=r"(?s)Nothing lacks class_names.*one output each.*cat"
        ):
            ask(Nothing())
    with pytest.raises(ValueError, match=r'(?s)data_config.*"input_size": \(3, 224, 224\)'):
        in_chans(Nothing())


def test_a_curriculum_is_asked_for_only_where_it_is_needed():
    with pytest.raises(ValueError, match=r"(?s)lacks set_curriculum\..*phases` empty"):
        require(_Data(), "set_curriculum")


def test_a_loader_that_lightning_would_only_miss_later_is_named():
    with pytest.raises(ValueError, match=r"(?s)lacks train_dataloader\..*shuffled"):
        require(_Data(), "val_dataloader", "train_dataloader")
    with pytest.raises(ValueError, match=r"(?s)lacks test_dataloader\..*`mobileone validate`"):
        require(_Data(), "test_dataloader")


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        ((), {}, "`class_names` is empty"),
        (("cat", "cat"), {}, "repeated: .*cat"),
        (("cat",), {"std": (1.0, 1.0)}, "`std`.*each of the 1 channels"),
        (("cat",), {"size": 224}, "has an unknown size"),
    ],
)
def test_values_that_cannot_be_are_refused(names, change, message):
    with pytest.raises(ValueError, match=message):
        check_data_module(_Data(names, {**_CONFIG, **change}))


def test_a_config_without_a_key_is_refused():
    short = {key: value for key, value in _CONFIG.items() if key != "std"}
    with pytest.raises(ValueError, match=r"lacks std\. It needs input_size"):
        check_data_module(_Data(config=short))


def test_an_error_within_a_property_is_not_hidden():
    class Broken(_Data):
        @property
        def class_names(self):
            return self.no_such_attribute

    with pytest.raises(AttributeError, match="no_such_attribute"):
        num_classes(Broken())
