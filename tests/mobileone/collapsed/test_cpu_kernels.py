"""The CPU kernels: where they are built, and what never reaches them."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from mobileone import MobileOneBlock, set_collapse
from mobileone.collapsed import cpu_build as build
from mobileone.collapsed import cpu_kernels as native
from mobileone.collapsed import path_of
from mobileone.collapsed.cost_model import Path as Form

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no compiler for the kernels")


@needs_kernels
def test_another_default_device_does_not_reach_the_kernels():
    x = torch.randn(2, 6, 9, 8)
    for shape in ({"groups": 6}, {"kernel_size": 1}):
        block = MobileOneBlock(6, 6, **shape)
        set_collapse(block, "always")
        assert path_of(block, x) is not Form.BRANCHES
        expected = block(x)
        with torch.device("meta"):
            y = block(x)
            y.sum().backward()
        assert torch.equal(y, expected)
        assert all(p.grad.device.type == "cpu" for p in block.parameters())
    mean, var = native.channel_moments(x)
    with torch.device("meta"):
        assert torch.equal(native.channel_moments(x)[1], var)
        assert native.gradient_sums(x, None, x, None, mean.float(), None).device.type == "cpu"


@needs_kernels
@pytest.mark.parametrize(
    "x",
    [
        torch.empty(2, 3, 5, 5, device="meta"),
        torch.ones(2, 3, 5, 5, dtype=torch.float64),
        torch.ones(2, 3, 5, 5).to(memory_format=torch.channels_last),
        None,
    ],
    ids=["meta", "float64", "channels_last", "None"],
)
def test_the_kernels_refuse_what_they_cannot_read(x):
    moments = torch.empty(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="channel_moments"):
        native._call("channel_moments", 2, 3, 25, x, *moments)
    with pytest.raises(ValueError, match="argument 2"):
        native._call("channel_moments", 2, 3, 25, torch.ones(2, 3, 5, 5), moments[0])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A home that is not there, folders for temporary files, and a build of half a second."""
    monkeypatch.setattr(build, "_FLAGS", ("-O0", "-march=native", "-fopenmp", "-fPIC", "-shared"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    # a user without an entry in passwd, as `docker run --user` makes it
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    return tmp_path


@needs_kernels
def test_without_a_home_the_library_is_kept_privately(place, caplog):
    folder = place / f"mobileone-{os.getuid()}"
    assert build.load()._name.startswith(str(folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert caplog.records == []
    folder.chmod(0o777)  # somebody could have planted a library
    assert build.load() is None
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "open to others" in record.getMessage()


@needs_kernels
def test_where_the_cache_takes_no_file_another_folder_does(place, monkeypatch, caplog):
    blocked = place / "cache"
    blocked.write_text("a file where the folder should be; root may write into read-only ones")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert build.load()._name.startswith(str(place / "mobileone-"))
    assert caplog.records == []


@needs_kernels
def test_a_library_cut_short_is_built_again(place):
    first = Path(build.load()._name)
    whole, written = first.read_bytes(), first.stat().st_mtime_ns
    assert Path(build.load()._name) == first and first.stat().st_mtime_ns == written
    first.rename(first.with_suffix(".whole"))  # this process has it mapped
    first.write_bytes(whole[:5000])
    second = Path(build.load()._name)
    assert second.stem.endswith(build._hash(second.read_bytes()))
    assert [path.stat().st_size > 5000 for path in first.parent.glob("*.so")] == [True]


def folder_of_cache(place, monkeypatch, mode=0o755, parent=0o755):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    folder = place / "cache/mobileone"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    folder.parent.chmod(parent)
    return folder


@needs_kernels
@pytest.mark.parametrize("mode, parent", [(0o777, 0o755), (0o775, 0o755), (0o700, 0o777)])
def test_a_cache_that_others_can_write_to_is_not_used(place, monkeypatch, mode, parent):
    folder = folder_of_cache(place, monkeypatch, mode, parent)
    assert build.load()._name.startswith(str(place / "mobileone-"))
    assert not any(folder.iterdir())


@needs_kernels
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("level", ["cache/mobileone", "cache"])
def test_a_cache_of_another_user_is_not_used(place, monkeypatch, level):
    folder = folder_of_cache(place, monkeypatch)
    os.chown(place / level, 12345, 12345)  # as `sudo` finds the home of who calls it
    assert build.load()._name.startswith(str(place / "mobileone-"))
    assert not any(folder.iterdir())


@needs_kernels
def test_a_cache_that_others_can_read_is_used_and_a_named_pipe_in_it_is_not(place, monkeypatch):
    folder = folder_of_cache(place, monkeypatch)
    monkeypatch.setattr(build, "_digest", lambda compiler: "0")
    os.mkfifo(folder / "collapsed-0-0.so")
    assert build.load()._name.startswith(str(folder))
