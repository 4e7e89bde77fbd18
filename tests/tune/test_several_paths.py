"""A run over several folders: what lies where, whose weights count, and what is said of a profile made elsewhere."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from profiles import profile

import tierflow
from tierflow import machine
from tierflow.config import ConfigError, load_config
from tierflow.settings import available, drive_settings, nvme_directories
from tierflow.swap import Tier


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    made = [tmp_path / "a", tmp_path / "b"]
    for folder in made:
        folder.mkdir()
    return [str(folder) for folder in made]


def over(folders: list[str], model: Any, **keys: Any) -> dict[str, Any]:
    config = tiny.config("nvme", Path(folders[0]), **tiny.tight(model, "nvme"))
    for block in ("offload_param", "offload_optimizer"):
        config["zero_optimization"][block]["nvme_path"] = folders
    return config | keys


def test_a_run_spreads_its_bytes_by_the_profiles_weights_and_has_the_same_bits(folders: list[str], tmp_path: Path) -> None:
    # named the other way round: the weights follow the folders
    profile(paths=folders[::-1], weights=[0.25, 0.75], block_size=4096).write_to(tmp_path / "p.json")
    losses, shares = [], []
    for keys in ({"aio": str(tmp_path / "p.json")}, {"aio": {"block_size": 4096}}, None):
        torch.manual_seed(0)
        model = tiny.llama(layers=2, hidden=32)
        _, optimizer = tierflow.offload(model, over(folders if keys else folders[0], model, **(keys or {})))  # type: ignore[arg-type]
        try:
            losses.append(tiny.train(model, optimizer, 2))
            store = optimizer.engine.manager.store
            assert [path.path for path in store.paths] == (folders if keys else folders[:1])
            shares.append(store.paths[0].bytes_written / sum(path.bytes_written for path in store.paths))
            optimizer.engine.report()
        finally:
            optimizer.close()
    assert shares[0] == pytest.approx(0.75, abs=0.05) and shares[1] == pytest.approx(0.5, abs=0.05)
    assert losses[0] == losses[1] == losses[2]


def test_path_objects_will_do_wherever_a_folder_is_named(folders: list[str], tmp_path: Path) -> None:
    paths, new = [Path(folder) for folder in folders], tmp_path / "new"
    auto, listed = load_config({}), load_config({"zero_optimization": {"offload_optimizer": {"nvme_path": folders}}})
    assert nvme_directories(auto, paths) == nvme_directories(listed, new) == tuple(folders)
    assert not new.exists()  # the config's folders come first, and only a default is made
    assert nvme_directories(auto, new) == (str(new),) and new.is_dir()
    assert nvme_directories(auto, None) == ()
    with pytest.raises(ConfigError, match="expected different folders"):
        nvme_directories(auto, [new, f"{tmp_path}/./new"])


def test_a_missing_folder_is_named(folders: list[str]) -> None:
    model, gone = tiny.llama(layers=2, hidden=32), folders[1] + "/gone"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError, match=gone):
        tierflow.offload(model, over([folders[0], gone], model))
    assert len(os.listdir("/proc/self/fd")) == before


def test_weights_and_rates_are_those_of_the_profiles_folders_alone(folders: list[str], tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    profile(paths=folders, weights=[0.25, 0.75]).write_to(file)
    config = load_config({"aio": str(file)})
    options, drive, note = drive_settings(config, folders)
    assert options["weights"] == [0.25, 0.75] and drive == config.drive and not note
    inside = Path(folders[0], "swap")  # on the drive that was measured
    inside.mkdir()
    assert drive_settings(config, [str(inside), folders[1]])[1:] == (config.drive, "")
    for others in (folders[:1], ["/proc", "/sys"]):
        options, drive, note = drive_settings(config, others)
        assert "weights" not in options and drive is None and options["block_size"] == 1 << 20
        assert all(word in note for word in [str(file), *folders, *others, f"tierflow tune {' '.join(others)}"])
    assert drive_settings(config, ())[2] == ""  # nothing is on a drive then


def test_a_profile_of_other_folders_is_said_once(folders: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile(paths=["/mnt/elsewhere"], weights=[1.0]).write_to(tmp_path / "p.json")
    model = tiny.llama(layers=2, hidden=32)
    with caplog.at_level(logging.WARNING):
        _, optimizer = tierflow.offload(model, over(folders, model, aio=str(tmp_path / "p.json")))
        tiny.train(model, optimizer, 1)
        optimizer.close()
    assert sum("was made for /mnt/elsewhere" in record.getMessage() for record in caplog.records) == 1


def test_a_profile_with_too_few_weights_is_refused(tmp_path: Path) -> None:
    text = profile(paths=["/a", "/b"], weights=[1.0, 1.0]).model_dump_json()
    (tmp_path / "p.json").write_text(text.replace('"weights":[1.0,1.0]', '"weights":[1.0]'))
    with pytest.raises(ConfigError, match=r"weights: .*one for each path"):
        load_config({"aio": str(tmp_path / "p.json")})


def test_folders_of_one_file_system_share_its_room(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, real = torch.device("cpu"), os.stat

    def free(path: str) -> int:
        return {folders[0]: 128_000, folders[1]: 1_280_000}[path]

    monkeypatch.setattr(machine, "disk_free", free)
    assert available(cpu, folders[:1])[Tier.NVME] == 128_000
    assert available(cpu, folders)[Tier.NVME] == 128_000  # one file system, whatever its second folder is said to have
    assert Tier.NVME not in available(cpu, ())

    class Other:
        st_dev = -1

    monkeypatch.setattr(os, "stat", lambda path, *a, **k: Other() if str(path) == folders[1] else real(path, *a, **k))
    # two: the first is full when the store has twice its room, or eight times where it has an eighth
    assert available(cpu, folders)[Tier.NVME] == 256_000
    assert available(cpu, folders, [1.0, 7.0])[Tier.NVME] == min(128_000 * 8, 1_280_000 * 8 // 7)
