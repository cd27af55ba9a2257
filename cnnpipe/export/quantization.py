"""A model in smaller numbers: int8 for CPUs, fp16 for CUDA. Input and output stay what the contract says."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _ort

from cnnpipe.errors import ModelError, one_line
from cnnpipe.export.graphs import end_in_float32, feed_pixels, fuse_dense_layers
from cnnpipe.manifest import INPUT_NAME
from cnnpipe.prepare.dataset import PreparedDataset
from cnnpipe.storage import storage_errors
from cnnpipe.train.networks import WHITENING_NAME

__all__ = ["Images", "convert_fp16", "quantize_int8", "sample_calibration_images"]

Images = npt.NDArray[np.uint8]  # (N, H, W, 3) RGB

_QUANTIZED_OPERATORS: Final = ["Conv", "Gemm", "MatMul", "Relu", "MaxPool", "Reshape", "Transpose"]
"""Every other operator stays float32, the softmax first of all: of 256 steps between 0 and 1 many classes would tie."""

_LAYERS: Final = ("Conv", "Gemm", "MatMul")
_CALIBRATION_BATCH: Final = 8
"""Small, so that the layers of large images fit into memory; nothing but the highest and lowest values is kept."""

_CALIBRATION_SEED: Final = 0

_ERRORS: Final = (
    *(ValueError, KeyError, RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError),
    *(_ort.Fail, _ort.InvalidArgument, _ort.InvalidGraph, _ort.NotImplemented, _ort.RuntimeException),
)
"""What a quantiser raises about a graph that it does not know; its own classes of error there are none."""


def sample_calibration_images(dataset: PreparedDataset, number: int) -> Images:
    """Return training images to calibrate with, always the same ones: (number or all there are, H, W, 3) uint8."""
    images = dataset.images("train")
    random = np.random.default_rng(_CALIBRATION_SEED)
    chosen = random.choice(len(images), min(number, len(images)), replace=False)
    return np.asarray(images[np.sort(chosen)])


def quantize_int8(model: onnx.ModelProto, images: Images, folder: Path) -> onnx.ModelProto:
    """Return the model with 8-bit weights and activations, as float operators between Quantize and Dequantize nodes.

    Activations are unsigned, so that 0 is the lowest and a Relu costs nothing; weights are signed, with a scale for
    each filter, and of 7 bits: then no sum of two products passes 16 bits, and a CPU without VNNI instructions, where
    such sums would be cut off, gives the same result as one with them. The last layer stays float32, and so does one
    that whitens, see `cnnpipe.train.networks`: it makes much of small differences, which 8 bits round away.

    Args:
        model: as exported, in fp32.
        images: (N, H, W, 3) uint8 training images, from which the ranges of the activations are taken.
        folder: for temporary files.
    Raises:
        ModelError: the quantiser cannot do this model.
        StorageError: the temporary files cannot be written.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    exported, prepared, quantized = (folder / f"{name}.onnx" for name in ("exported", "prepared", "quantized"))
    with _model_errors("int8"), storage_errors(folder), _quiet():
        onnx.save(model, exported)
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared)
        feed_pixels(graph)
        fuse_dense_layers(graph)
        kept = _name_layers(graph.graph)
        onnx.save(graph, prepared)
        quantize_static(
            prepared,
            quantized,
            _calibration_reader(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTIZED_OPERATORS,
            nodes_to_exclude=kept,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return _finish(onnx.load(quantized), model)


def _name_layers(graph: onnx.GraphProto) -> list[str]:
    """Give every layer a name of its own, and return the names of those that stay float32."""
    layers = [node for node in graph.node if node.op_type in _LAYERS]
    kept = [node for node in layers if WHITENING_NAME in node.name or node is layers[-1]]
    for index, node in enumerate(layers):
        node.name = f"layer_{index}"
    return [node.name for node in kept]


def _calibration_reader(images: Images) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._starts = iter(range(0, len(images), _CALIBRATION_BATCH))

        def get_next(self) -> dict[str, Images] | None:
            start = next(self._starts, None)
            return None if start is None else {INPUT_NAME: images[start : start + _CALIBRATION_BATCH]}

    return Reader()


def convert_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model in 16-bit floats but for the softmax, which is as quick in float32 and exact.

    Raises:
        ModelError: the model cannot be converted.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto.FromString(model.SerializeToString())  # the conversion changes what it is given
    with _model_errors("fp16"):
        converted = convert_float_to_float16(
            copy, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Softmax"]
        )
        end_in_float32(converted)
        return _finish(converted, model)


def _finish(made: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Give a model the original's description, check it, and take out what it does not need."""
    del made.metadata_props[:], made.graph.value_info[:]
    made.producer_name, made.producer_version = original.producer_name, original.producer_version
    made.doc_string = original.doc_string
    domains = {node.domain for node in made.graph.node}
    used = [opset for opset in made.opset_import if opset.domain in domains]
    del made.opset_import[:]
    made.opset_import.extend(used)
    onnx.checker.check_model(made, full_check=True)
    return made


@contextlib.contextmanager
def _model_errors(precision: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise ModelError(f"no {precision} model can be made of this one: {one_line(error)}; leave it out") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the quantiser says of its own steps from the log; what it fails with is raised."""
    logger = logging.getLogger("onnxruntime.quantization")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(3)
        logger.setLevel(level)
