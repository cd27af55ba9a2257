"""Keras, TensorFlow and the device they compute on: device, precision, XLA, and batches split over CPU cores.

Other modules import `keras` from here, because the backend is chosen before its import, which also hides TensorFlow's
log lines.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

from cnnpipe.errors import ProviderError, one_line
from cnnpipe.machine import ask_driver, find_processor, usable_cores

__all__ = [
    "BatchNormalization",
    "compiles_with_xla",
    "computing_in",
    "count_parts",
    "full_float32",
    "keras",
    "make_repeatable",
    "pipeline",
    "replicated",
    "select_device",
    "select_precision",
    "split_batch",
]

_PARTS: Final = 2
"""Number of parts of a batch that a CPU computes side by side, however many cores it has: see `split_batch`."""

_MIN_PART_IMAGES: Final = 16
"""Smallest part of a batch: with fewer images, convolutions are slow and batch normalisation has poor statistics."""

_CHATTER: Final = re.compile(r"I0000 |WARNING: All log messages before absl::|E0000 .* failed call to cuInit")
"""Lines that TensorFlow's C++ code writes at any log level: remarks, and that a machine has no GPU."""


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Hold back the stderr of the process, and write it afterwards without TensorFlow's remarks."""
    if "CNNPIPE_DEBUG" in os.environ:
        yield
        return
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)
            held.seek(0)
            for line in held.read().decode("utf-8", "replace").splitlines(keepends=True):
                if not _CHATTER.match(line):
                    sys.stderr.write(line)


# Only fatal messages: loading a compiled step is reported as an error, and real errors are raised anyway.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Otherwise TensorFlow takes all memory of a GPU, and leaves none for the export in the same process.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
# Keras must not read settings from the environment or from keras.json in the user's home: they would change the type of
# the weights or the number of epochs without a record in the run.
for _name in [name for name in os.environ if name.startswith("KERAS_")]:
    del os.environ[_name]
os.environ["KERAS_BACKEND"] = "tensorflow"
with _without_chatter(), tempfile.TemporaryDirectory() as os.environ["KERAS_HOME"]:
    import keras

    del os.environ["KERAS_HOME"]  # read at the import only
    import tensorflow as tf

    # The parts of a batch run side by side, each operation on some of the cores. Set here, because it holds for the
    # whole process and changes the last bits of the weights.
    tf.config.threading.set_intra_op_parallelism_threads(max(1, usable_cores() // _PARTS))
    tf.config.threading.set_inter_op_parallelism_threads(usable_cores())
    # Makes TensorFlow report its search for a driver now and not at the first operation. Listing does not initialise
    # the GPUs; `select_device` can still hide them.
    tf.config.list_physical_devices()


@keras.saving.register_keras_serializable("cnnpipe")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Keras' layer without a learned scale, trained with one fused operation instead of a dozen.

    It makes whole training steps 1.1 times as fast on a CPU. The variance for inference is the unbiased one (N - 1).
    """

    def __init__(self, momentum: float = 0.6, **options: Any) -> None:
        super().__init__(momentum=momentum, **{**options, "scale": False})

    def call(self, inputs: Any, training: bool = False, mask: Any = None) -> Any:  # (N, H, W, C) -> same
        """Return images with mean 0 and variance 1 in each channel, plus the learned shift."""
        if not training:
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance, *_ = tf.compat.v1.nn.fused_batch_norm(
            *(inputs, tf.ones_like(self.beta), self.beta, self.moving_mean, self.moving_variance),
            epsilon=self.epsilon,
            exponential_avg_factor=1.0 - self.momentum,
        )
        self.moving_mean.assign(mean)
        self.moving_variance.assign(variance)
        return outputs


def select_device(device: str) -> str:
    """Make Keras use the requested device.

    Args:
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda` (the first GPU), `cuda:N` or `cuda:all`.
    Returns:
        Device in use: `cpu`, `cuda:N`, or `cuda:all` if there are several.
    Raises:
        ProviderError: there is no such device, or this process already uses another.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if device == "cpu" or (device == "auto" and not gpus):
        _use_only([])
        return "cpu"
    number = device.partition(":")[2]
    index = int(number) if number.isdecimal() else 0
    if index >= len(gpus):
        raise ProviderError(
            f"device {device!r} was requested, but TensorFlow finds {len(gpus)} GPUs: "
            f"{ask_driver().problem or 'the libraries of CUDA are missing, see `make setup CUDA=1`'}; "
            "fix that, or use --device cpu"
        )
    used = gpus if number == "all" else [gpus[index]]
    _use_only(used)
    return "cuda:all" if len(used) > 1 else f"cuda:{index}"


@contextmanager
def replicated() -> Iterator[int]:
    """Train models that are built and compiled in this context on all devices in use; yield the number of devices.

    Each device takes an equal part of every batch, and normalises it on its own.
    """
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        yield 1
        return
    with tf.distribute.MirroredStrategy(devices).scope():
        yield len(devices)


def compiles_with_xla(device: str) -> bool:
    """Return whether training steps are compiled by XLA.

    On one H100 an epoch of `fast` takes 0.5 s with XLA and 3 s without. Compiling takes over a minute there, once: its
    code is kept in the artifacts folder. A CPU trains faster without XLA; several GPUs do not support it.

    Args:
        device: result of `select_device`.
    """
    return device not in ("cpu", "cuda:all")


def select_precision(precision: str, device: str) -> str:
    """Return the compute precision: `float32`, `bfloat16` or `float16`.

    Args:
        precision: one of these, or `auto`.
        device: result of `select_device`.
    Raises:
        ProviderError: float16 on a CPU, where it is far slower than float32.
    """
    if device == "cpu":
        if precision == "float16":
            raise ProviderError("precision float16 is for GPUs; on a CPU use float32")
        if precision != "auto":
            return precision
        return "bfloat16" if _bfloat16_is_faster() else "float32"
    if precision != "auto":
        return precision
    capability = _compute_capability()
    # Tensor cores came with 7.0 (float16), bfloat16 with 8.0: docs.nvidia.com/cuda/cuda-c-programming-guide
    return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"


@contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Make layers that are built in this context compute in a precision of `select_precision`, on float32 weights."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision if precision == "float32" else f"mixed_{precision}")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def make_repeatable(seed: int, device: str) -> None:
    """Make training repeatable from the seed, as far as the device allows it.

    Seeds Keras, NumPy and Python. On a CPU, TensorFlow also uses deterministic operations for the rest of the process,
    at no cost in speed; not on a GPU, where they are slower.

    Args:
        device: result of `select_device`.
    """
    keras.utils.set_random_seed(seed)
    if device == "cpu":
        tf.config.experimental.enable_op_determinism()


def pipeline(batches: keras.utils.PyDataset) -> tf.data.Dataset:
    """Return the input of Keras' `fit` and `evaluate` for batches; a thread reads ahead.

    Keras' own pipeline is tuned while it runs, and its end waits for the tuning: up to 5 s at first, later up to a
    minute (TensorFlow 2.21, Keras 3.15).

    Args:
        batches: nested tuples of arrays (B, …) of any size B; read in order for each epoch.
    """
    signature = keras.tree.map_structure(lambda part: tf.TensorSpec((None, *part.shape[1:]), part.dtype), batches[0])
    dataset = tf.data.Dataset.from_generator(
        lambda: (batches[index] for index in range(len(batches))), output_signature=signature
    )
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.prefetch(2).apply(tf.data.experimental.assert_cardinality(len(batches))).with_options(options)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute in full float32 in this context: by default TensorFlow uses TF32, of 13 bits less, on newer GPUs."""
    allowed = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(allowed)


def _bfloat16_is_faster() -> bool:
    """Return whether bfloat16 was measured to be faster than float32 with TensorFlow on this kind of processor.

    On an AMD EPYC (Zen 4) `fast` trains 1.5 times as fast and `baseline` 1.4 times; on an Intel Xeon without AMX 0.75
    times. A Xeon with AMX was not tried. Read from the processor and not timed, because the precision changes the
    weights and must always be the same.
    """
    processor = find_processor()
    return processor.vendor == "AuthenticAMD" and "avx512_bf16" in processor.flags


def _compute_capability() -> tuple[int, int]:
    """Return the lowest compute capability of the GPUs in use."""
    details = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.get_visible_devices("GPU")]
    return min(tuple(each["compute_capability"]) for each in details)


def _use_only(gpus: list[Any]) -> None:
    """Hide all other GPUs; an empty list hides all."""
    if tf.config.get_visible_devices("GPU") == gpus:
        return
    try:
        tf.config.set_visible_devices(gpus, "GPU")
    except RuntimeError as error:
        reason = one_line(error)
        raise ProviderError(f"TensorFlow already uses another device: {reason}; start a new process") from error


def count_parts(batch_size: int, device: str) -> int:
    """Return the number of parts that batches are split into.

    Args:
        batch_size: number of images in the smallest batch.
        device: result of `select_device`.
    """
    return _PARTS if device == "cpu" and batch_size >= _PARTS * _MIN_PART_IMAGES else 1  # a GPU wants one large batch


def split_batch(network: keras.Model, parts: int) -> Callable[[Sequence[keras.KerasTensor]], keras.KerasTensor]:
    """Return what applies a network to the parts of its batch side by side; the weights are the same objects.

    Otherwise the cores of a CPU wait for each other after every operation: on two cores, training steps of `baseline`
    are 1.2 times as fast this way, and those of `fast` 1.2 to 1.4 times. In training, batch normalisation takes the
    statistics of each part; with many small parts, the last few images would determine the statistics for inference.
    """
    if parts > 1:
        return _SplitBatch(network, parts)
    return lambda inputs: network(inputs if len(inputs) > 1 else inputs[0])  # of a list of one, Keras warns


class _SplitBatch(keras.layers.Layer):  # type: ignore[misc]
    """A network that is applied to independent parts of its batch."""

    def __init__(self, network: keras.Model, parts: int) -> None:
        super().__init__(name="split_batch")
        self.network = network
        self._parts = parts

    def call(self, inputs: Sequence[keras.KerasTensor], training: bool = False) -> keras.KerasTensor:
        """Return the network's output for the whole batch in its order, (N, classes).

        Args:
            inputs: inputs of the network, each (N, …).
        """
        ops = keras.ops
        length = ops.shape(inputs[0])[0]
        edges = [index * length // self._parts for index in range(self._parts + 1)]
        parts = [[each[start:end] for each in inputs] for start, end in pairwise(edges)]
        outputs = [self.network(part if len(inputs) > 1 else part[0], training=training) for part in parts]
        return ops.concatenate(outputs)

    def compute_output_shape(self, input_shape: Sequence[tuple[int | None, ...]]) -> tuple[int | None, ...]:
        """Return the shape of the output."""
        return (input_shape[0][0], *self.network.output_shape[1:])
