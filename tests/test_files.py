"""Statistics files under threads, damage and forgery: whole or a StatsFileError, links kept."""

import io
import json
import os
import random
import stat
import struct
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import bnstats
from bnstats import PopulationStats
from bnstats.errors import InvalidValueError, StatsFileError


def measured(channels=3):
    return bnstats.measure_population_stats(
        nn.Sequential(nn.BatchNorm1d(channels)), torch.randn(40, channels).split(8)
    )


def contents(path):
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def forge(path, change):
    """Write a file whose checksums are right and whose content is not."""
    arrays = contents(path)
    arrays["header"] = json.loads(str(arrays["header"]))
    change(arrays)
    arrays["header"] = np.asarray(json.dumps(arrays["header"]))
    np.savez(path, **arrays)


def test_two_threads_that_save_to_one_path_leave_it_whole_for_readers_at_any_time(tmp_path):
    path, versions = tmp_path / "stats.npz", [measured(2), measured(300)]
    versions[0].save(path)
    failures, done = [], threading.Event()

    def save(stats):
        try:
            for _ in range(60):
                stats.save(path)
        except Exception as error:
            failures.append(error)

    def read():
        while not done.is_set():
            try:
                assert PopulationStats.load(path)["0"].num_features in (2, 300)
            except Exception as error:
                failures.append(error)

    writers = [threading.Thread(target=save, args=(stats,)) for stats in versions]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not failures
    assert os.listdir(tmp_path) == ["stats.npz"]


def test_a_link_is_written_through_and_stays(tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real.npz", tmp_path / "link.npz"
    link.symlink_to("there/real.npz")
    for channels in (2, 3):  # first to a file that is not there yet
        measured(channels).save(link)
        assert link.is_symlink()
        assert not real.is_symlink()
        assert PopulationStats.load(real)["0"].num_features == channels
    assert sorted(os.listdir(tmp_path)) == ["link.npz", "there"]
    assert os.listdir(tmp_path / "there") == ["real.npz"]


def test_a_file_keeps_its_permissions_and_a_new_one_gets_the_usual(tmp_path):
    path, usual = tmp_path / "stats.npz", tmp_path / "usual"
    usual.touch()
    measured().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    path.chmod(0o640)
    measured().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe, stats, received = tmp_path / "pipe", measured(), []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    stats.save(pipe)
    reader.join()
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "copy.npz").write_bytes(received[0])
    assert torch.equal(PopulationStats.load(tmp_path / "copy.npz")["0"].mean, stats["0"].mean)


def test_what_the_system_refuses_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        PopulationStats.load(tmp_path / "missing.npz")
    with pytest.raises(IsADirectoryError):
        PopulationStats.load(tmp_path)
    with pytest.raises(IsADirectoryError):
        measured().save(tmp_path)


def test_a_file_of_the_first_version_still_loads(tmp_path):
    path, stats = tmp_path / "old.npz", measured()
    first = ["count", "num_batches", "mean", "var", "mean_stderr", "var_stderr", "correction"]
    header = {"format": "bnstats population statistics", "version": 1, "layers": ["0"]}
    header |= {"method": "pooled", "num_skipped": 0}
    arrays = {f"0/{key}": np.asarray(getattr(stats["0"], key)) for key in first}
    np.savez(path, header=np.asarray(json.dumps(header)), **arrays)
    loaded = PopulationStats.load(path)["0"]
    for key in first:
        assert np.array_equal(getattr(loaded, key), getattr(stats["0"], key))
    assert loaded.eps == 1e-5
    assert loaded.mean_var_cov.isnan().all()
    assert loaded.spread.isnan().all()


def put(key, value):
    return lambda arrays: arrays.__setitem__(key, np.asarray(value))


def put_header(**entries):
    return lambda arrays: arrays["header"].update(entries)


FORGED = {
    "negative variance": put("0/var", [1.0, -1e-9, 1.0]),
    "variance NaN": put("0/var", [1.0, np.nan, 1.0]),
    "mean infinite": put("0/mean", [1.0, np.inf, 1.0]),
    "complex mean": put("0/mean", [1.0, 1j, 1.0]),
    "integer mean": put("0/mean", [1, 2, 3]),
    "half precision": put("0/mean", np.ones(3, np.float16)),
    "negative error": put("0/mean_stderr", [1.0, -1.0, 1.0]),
    "text": put("0/mean", ["1", "2", "3"]),
    "negative count": put("0/count", -1),
    "no values": put("0/count", 0),
    "fraction of a value": put("0/count", 1.5),
    "no batch": put("0/num_batches", 0),
    "correction 2": put("0/correction", 2),
    "negative eps": put("0/eps", -1e-5),
    "eps NaN": put("0/eps", np.nan),
    "complex spread": put("0/spread", np.ones((3, 3, 3), complex)),
    "spread infinite": put("0/spread", np.full((3, 3, 3), np.inf)),
    "spread of fewer channels": put("0/spread", np.ones((2, 3, 3))),
    "another shape": put("0/var", np.ones((3, 1))),
    "fewer channels": put("0/var", np.ones(2)),
    "a number for a tensor": put("0/mean", 1.0),
    "a layer missing": put_header(layers=["0", "1"]),
    "one name twice": put_header(layers=["0", "0"]),
    "names that are none": put_header(layers=[None]),
    "layers that are none": put_header(layers=5),
    "method none": put_header(method=None),
    "negative skipped": put_header(num_skipped=-1),
    "skipped a list": put_header(num_skipped=[]),
    "another format": put_header(format="x"),
    "no version": put_header(version="1"),
    "header a list": lambda arrays: arrays.__setitem__("header", []),
    "field missing": lambda arrays: arrays.pop("0/eps"),
    "spread missing": lambda arrays: arrays.pop("0/spread"),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED.keys())
def test_values_that_no_measurement_gives_are_refused(tmp_path, change):
    path = tmp_path / "stats.npz"
    measured().save(path)
    forge(path, change)
    with pytest.raises(StatsFileError, match=r"stats\.npz: expected a file that"):
        PopulationStats.load(path)


def test_nor_are_they_saved(tmp_path):
    layer = measured()["0"]
    wrong = bnstats.LayerStats(**{**vars(layer), "var": -layer.var})
    with pytest.raises(InvalidValueError, match="var: expected 0 or more, got -"):
        PopulationStats({"0": wrong}).save(tmp_path / "stats.npz")
    assert os.listdir(tmp_path) == []


def repack(path, name, content, method=zipfile.ZIP_STORED):
    """Put other bytes in the place of one entry, under a right checksum."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in {**entries, f"{name}.npy": content}.items():
            archive.writestr(key, value, method if key == f"{name}.npy" else zipfile.ZIP_STORED)


def array_of(header):
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(24)


def npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


HOSTILE = {
    "a gigabyte claimed": array_of("{'descr':'<f8','fortran_order':False,'shape':(1<<27,),}"),
    "a gigabyte": array_of("{'descr':'<f8','fortran_order':False,'shape':(134217728,),}"),
    "a terabyte claimed": array_of("{'descr':'<f8','fortran_order':False,'shape':(1<<40,),}"),
    "a petabyte": array_of("{'descr':'<f8','fortran_order':False,'shape':(10**14,),}"),
    "huge": array_of("{'descr':'<f8','fortran_order':False,'shape':(99999999999999999,),}"),
    "negative shape": array_of("{'descr':'<f8','fortran_order':False,'shape':(-1,),}"),
    "two negatives": array_of("{'descr':'<f8','fortran_order':False,'shape':(-1,-3,),}"),
    "objects": array_of("{'descr':'|O','fortran_order':False,'shape':(3,),}"),
    "no tokens": array_of("{'descr':'<f8','fortran_order':False,'shape':(3L,"),
    "unclosed": array_of("{'descr': '''"),
    "deep": array_of("(" * 5000),
    "empty strings": array_of("{'descr':'<U0','fortran_order':False,'shape':(3,),}"),
    "empty": b"",
    "deep json": npy("[" * 100_000),
    "a huge number": npy('{"format": 1e999, "version": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize("entry", ["header", "0/mean"])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_entries_are_refused_before_anything_is_allocated(tmp_path, entry, content):
    path = tmp_path / "stats.npz"
    measured().save(path)
    repack(path, entry, content)
    tracemalloc.start()
    try:
        with pytest.raises(StatsFileError):
            PopulationStats.load(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_which_save_never_writes_are_refused(tmp_path, method):
    path = tmp_path / "bomb.npz"
    measured().save(path)
    repack(path, "0/mean", npy(np.zeros(1_000_000)), method)
    with pytest.raises(StatsFileError):
        PopulationStats.load(path)


def test_encrypted_entries_are_refused(tmp_path):
    path = tmp_path / "stats.npz"
    measured().save(path)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + offset] |= 1
            start = content.find(signature, start + 4)
    path.write_bytes(content)
    with pytest.raises(StatsFileError):
        PopulationStats.load(path)


def mutate(content, rng):
    """Damage a file as disks, transfers and editors do."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(content) or 1)
        length = rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0:
            content[at : at + 1] = bytes([(content[at] if content else 0) ^ 1 << rng.randrange(8)])
        elif kind == 1:
            content[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            content[at : at + length] = rng.choice((b"\x00", b"\xff")) * length
        elif kind == 3:
            del content[at : at + length]
        elif kind == 4:
            content[at:at] = content[at : at + length]
        else:
            del content[at:]
    return bytes(content)


def test_of_ten_thousand_damaged_files_none_escapes_and_none_loads_as_something_else(tmp_path):
    rng, path = random.Random(0), tmp_path / "stats.npz"
    stats = measured(1)
    stats.save(path)
    whole = path.read_bytes()
    # Half of the damage where zip keeps its directory, which no checksum covers.
    directory = whole.index(b"PK\x01\x02")
    loaded = 0
    for index in range(10_000):
        head, tail = (whole[:directory], whole[directory:]) if index % 2 else (b"", whole)
        path.write_bytes(head + mutate(tail, rng))
        try:
            found = PopulationStats.load(path)
        except StatsFileError:
            continue
        loaded += 1
        assert repr(found) == repr(stats)
        for key, value in vars(stats["0"]).items():
            assert np.array_equal(getattr(found["0"], key), value, equal_nan=True)
    assert loaded < 4000
