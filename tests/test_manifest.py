"""What a model says of itself survives the ONNX metadata and the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnpipe.errors import ModelError, RegistryError
from cnnpipe.manifest import (
    MANIFEST_FILE,
    FileDigest,
    ModelInfo,
    RunManifest,
    TrainingStatistics,
    digest_files,
    read_manifest,
    write_manifest,
)

STATISTICS = TrainingStatistics(
    num_images=1149,
    channel_mean=(78.1, 78.2, 1 / 3),
    channel_std=(91.0, 91.5, 92.0),
    brightness_deciles=tuple(float(number) for number in range(11)),
    class_shares=(0.3, 0.7),
)


def _info(class_names: tuple[str, ...] = ("cat", "dog")) -> ModelInfo:
    return ModelInfo(
        cnnpipe_version="0.1.0",
        name="pets",
        run_id="20260101T020000Z",
        preset="baseline",
        class_names=class_names,
        image_size=(32, 48),
        dataset_fingerprint="0123456789ab",
        test_accuracy=2 / 3,
        training_statistics=STATISTICS,
    )


def _manifest() -> RunManifest:
    return RunManifest(
        model=_info(),
        created="2026-01-01T02:00:00+00:00",
        dataset={"name": "pets", "num_images": {"train": 1149}},
        metrics={"accuracy": 2 / 3},
        parity={"fp32": {"agreement": 1.0}},
        promoted=True,
        promotion_reason="first champion",
        files={"model.onnx": FileDigest(bytes=3, sha256="0" * 64)},
    )


def test_metadata_are_text_with_a_key_for_each_field() -> None:
    metadata = _info(("Größe", "日本")).to_metadata()
    assert sorted(metadata) == sorted(ModelInfo.model_fields)
    assert metadata["name"] == "pets"
    assert metadata["class_names"] == '["Größe", "日本"]'
    assert metadata["image_size"] == "[32, 48]"
    assert json.loads(metadata["training_statistics"])["num_images"] == 1149


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=4))
def test_any_class_names_survive_an_onnx_file(names: list[str]) -> None:
    info = _info(tuple(names))
    model = onnx.ModelProto()
    onnx.helper.set_model_props(model, info.to_metadata())
    read = onnx.ModelProto.FromString(model.SerializeToString())
    metadata = {entry.key: entry.value for entry in read.metadata_props}
    assert ModelInfo.from_metadata(metadata, Path("model.onnx")) == info


def test_metadata_of_other_tools_beside_ours_are_passed_over() -> None:
    metadata = _info().to_metadata() | {"author": "somebody"}
    assert ModelInfo.from_metadata(metadata, Path("model.onnx")) == _info()


@pytest.mark.parametrize("key", sorted(ModelInfo.model_fields))
def test_missing_key_is_a_model_error(key: str) -> None:
    metadata = _info().to_metadata()
    del metadata[key]
    with pytest.raises(ModelError, match=r"other\.onnx is an ONNX file, but carries no cnnpipe metadata"):
        ModelInfo.from_metadata(metadata, Path("other.onnx"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("class_names", "cat,dog"), ("class_names", '["cat"]'), ("image_size", "[32]"), ("test_accuracy", "NaN")],
)
def test_damaged_key_is_a_model_error(key: str, value: str) -> None:
    with pytest.raises(ModelError, match="use one exported by `cnnpipe export`"):
        ModelInfo.from_metadata(_info().to_metadata() | {key: value}, Path("other.onnx"))


def test_manifest_is_read_back_as_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, _manifest())
    assert read_manifest(tmp_path) == _manifest()


def test_run_without_manifest_is_not_complete(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=rf"is not a complete run: it has no {MANIFEST_FILE}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"model": 1}', b"\xff\xfe", b"[]"])
def test_damaged_manifest_is_a_registry_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(RegistryError, match=r"manifest\.json cannot be read: .*; train again") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_digests_are_of_every_finished_file_but_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes(b"")
    (tmp_path / "a.csv").write_bytes(b"abc")
    (tmp_path / ".a.0123.csv").write_bytes(b"half")
    (tmp_path / MANIFEST_FILE).write_bytes(b"{}")
    (tmp_path / "folder").mkdir()
    digests = digest_files(tmp_path)
    assert list(digests) == ["a.csv", "b.csv"]
    assert digests["a.csv"].bytes == 3
    assert digests["a.csv"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
