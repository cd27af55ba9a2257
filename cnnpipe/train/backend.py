"""Keras, TensorFlow and the device they compute on.

Other modules take `keras` from here: the backend is chosen before the import, and TensorFlow's chatter is held back.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

from cnnpipe.devices import ask_driver
from cnnpipe.errors import ProviderError, one_line
from cnnpipe.machine import find_processor, usable_cores

__all__ = [
    "LANES",
    "BatchNormalization",
    "compiles_with_xla",
    "computing_in",
    "count_lanes",
    "full_float32",
    "keras",
    "make_repeatable",
    "pipeline",
    "replicated",
    "select_device",
    "select_precision",
    "spread",
]

LANES: Final = 2
"""Parts of a batch that a CPU computes side by side, however many cores it has: see `spread`."""

_CHATTER: Final = re.compile(r"I0000 |WARNING: All log messages before absl::|E0000 .* failed call to cuInit")
"""Lines of TensorFlow's C++, written whatever its log level: remarks, and that a machine without a GPU has none."""


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Hold back the process's stderr, and let through afterwards all of it but TensorFlow's chatter."""
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


# Only what ends the process: a compiled step that is loaded is reported as an error, and errors are raised anyway.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Else TensorFlow takes all memory of a GPU, and the export that follows in the same process gets none.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
# No setting of Keras comes from the environment or from the keras.json in a user's home: it would decide over the type
# of the weights or the number of epochs, and no record of the run would say so.
for _name in [name for name in os.environ if name.startswith("KERAS_")]:
    del os.environ[_name]
os.environ["KERAS_BACKEND"] = "tensorflow"
with _without_chatter(), tempfile.TemporaryDirectory() as os.environ["KERAS_HOME"]:
    import keras

    del os.environ["KERAS_HOME"]  # read at the import only
    import tensorflow as tf

    # Lanes run side by side, and each operation takes its part of the cores. Said here, because it holds for the whole
    # process, and decides over the last bits of the weights.
    tf.config.threading.set_intra_op_parallelism_threads(max(1, usable_cores() // LANES))
    tf.config.threading.set_inter_op_parallelism_threads(usable_cores())
    # Here it reports its search for a driver, else at the first operation. Listing them sets none of them up, after
    # which `select_device` could no longer hide any.
    tf.config.list_physical_devices()


@keras.saving.register_keras_serializable("cnnpipe")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Keras' layer without a scale of its own, whose training takes one operation for a dozen of Keras'.

    Whole training steps are 1.1 times as fast with it on a CPU. The variance kept for inference is that of N - 1.
    """

    def __init__(self, momentum: float = 0.6, **options: Any) -> None:
        super().__init__(momentum=momentum, **{**options, "scale": False})

    def call(self, inputs: Any, training: bool = False, mask: Any = None) -> Any:  # (N, H, W, C) -> same
        """Return the images with mean 0 and variance 1 in each channel, and the learned shift."""
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
    """Make Keras use the device that was asked for.

    Args:
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda` (the first GPU), `cuda:N` or `cuda:all`.
    Returns:
        What is used: `cpu`, `cuda:N`, or `cuda:all` if there are several.
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
            f"device {device!r} was asked for, but TensorFlow sees {len(gpus)} GPUs: "
            f"{ask_driver().problem or 'the libraries of CUDA are missing, see `make setup CUDA=1`'}; "
            "mend that, or use --device cpu"
        )
    used = gpus if number == "all" else [gpus[index]]
    _use_only(used)
    return "cuda:all" if len(used) > 1 else f"cuda:{index}"


@contextmanager
def replicated() -> Iterator[int]:
    """Let models that are made and compiled meanwhile be trained on all devices in use, and give their number.

    Each takes its share of every batch, with batch normalisation of its own.
    """
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        yield 1
        return
    with tf.distribute.MirroredStrategy(devices).scope():
        yield len(devices)


def compiles_with_xla(device: str) -> bool:
    """Return whether training steps are compiled by XLA.

    On one H100 an epoch of `fast` takes 0.5 s with XLA and 3 s without; one of `baseline` 2 s. Compiling takes a minute
    and more there, once: see `stages.train_run`. A CPU trains faster without it, and several GPUs are not supported.

    Args:
        device: what `select_device` returned.
    """
    return device not in ("cpu", "cuda:all")


def select_precision(asked: str, device: str) -> str:
    """Return in what to compute: `float32`, `bfloat16` or `float16`.

    Args:
        asked: one of them, or `auto`.
        device: what `select_device` returned.
    Raises:
        ProviderError: float16 on a CPU, where it takes minutes for what float32 does in seconds.
    """
    if device == "cpu":
        if asked == "float16":
            raise ProviderError("precision float16 is for GPUs; on a CPU use float32")
        if asked != "auto":
            return asked
        return "bfloat16" if _processor_is_made_for_bfloat16() else "float32"
    if asked != "auto":
        return asked
    capability = _compute_capability()
    # Tensor cores came with 7.0 (float16), bfloat16 with 8.0: docs.nvidia.com/cuda/cuda-c-programming-guide
    return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"


@contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Let layers made meanwhile compute in a precision of `select_precision`, on float32 weights."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision if precision == "float32" else f"mixed_{precision}")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def make_repeatable(seed: int, device: str) -> None:
    """Make training depend on the seed, as far as the device lets it.

    Seeds Keras, NumPy and Python. On a CPU, TensorFlow is also told to use its deterministic operations, for the rest
    of the process; the baseline trains as fast with them. On a GPU, where they cost speed, that is left alone.

    Args:
        device: what `select_device` returned.
    """
    keras.utils.set_random_seed(seed)
    if device == "cpu":
        tf.config.experimental.enable_op_determinism()


def pipeline(batches: keras.utils.PyDataset) -> tf.data.Dataset:
    """Return what Keras' `fit` and `evaluate` should be given for batches, which are read ahead by a thread.

    The pipeline that Keras itself makes is tuned while it runs, and its end waits until the tuning looks up: after 5 s
    at the latest at first, after minutes once a minute (TensorFlow 2.21, Keras 3.15).

    Args:
        batches: nested tuples of arrays (B, …) of any size B; read in order, again for each epoch.
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
    """Compute in whole float32 meanwhile: on newer GPUs TensorFlow drops 13 bits of every factor (TF32) by default."""
    allowed = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(allowed)


def _processor_is_made_for_bfloat16() -> bool:
    """Return whether bfloat16 is faster than float32 with TensorFlow on this processor, by what was measured.

    On an AMD EPYC of Zen 4 `fast` trains 1.5 times as fast, `baseline` 1.4 times; on an Intel Xeon without AMX 0.75
    times. One with AMX was not tried. Asked of the processor, not timed: the answer decides over the weights, and must
    always be the same.
    """
    processor = find_processor()
    return processor.vendor == "AuthenticAMD" and "avx512_bf16" in processor.flags


def _compute_capability() -> tuple[int, int]:
    """Return the lowest of the GPUs in use."""
    details = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.get_visible_devices("GPU")]
    return min(tuple(each["compute_capability"]) for each in details)


def _use_only(gpus: list[Any]) -> None:
    """Hide the other GPUs; with none, all of them."""
    if tf.config.get_visible_devices("GPU") == gpus:
        return
    try:
        tf.config.set_visible_devices(gpus, "GPU")
    except RuntimeError as error:
        reason = one_line(error)
        raise ProviderError(f"TensorFlow already uses another device: {reason}; start a new process") from error


_MIN_LANE_IMAGES: Final = 16
"""Images in a part: with fewer, convolutions are slow and the statistics of batch normalisation are poor."""


def count_lanes(batch_size: int, device: str) -> int:
    """Return how many parts batches are split into.

    Args:
        batch_size: images of the smallest batch.
        device: what `backend.select_device` returned.
    """
    return LANES if device == "cpu" and batch_size >= LANES * _MIN_LANE_IMAGES else 1  # a GPU wants one large batch


def spread(network: keras.Model, lanes: int) -> keras.layers.Layer:
    """Return a layer that does what the network does, to each part of its batches; the weights are the same objects.

    In training, batch normalisation sees the parts apart from each other.
    """
    return _Lanes(network, lanes) if lanes > 1 else network


class _Lanes(keras.layers.Layer):  # type: ignore[misc]
    """A network that takes its batch in parts that do not depend on each other, side by side."""

    def __init__(self, network: keras.Model, number: int) -> None:
        super().__init__(name="lanes")
        self.network = network
        self._number = number

    def call(self, inputs: Sequence[keras.KerasTensor], training: bool = False) -> keras.KerasTensor:
        """Return the network's output for the whole batch in its order, (N, classes).

        Args:
            inputs: what the network takes, each (N, …).
        """
        ops = keras.ops
        length = ops.shape(inputs[0])[0]
        edges = [index * length // self._number for index in range(self._number + 1)]
        parts = [[each[start:end] for each in inputs] for start, end in pairwise(edges)]
        given = [part if len(inputs) > 1 else part[0] for part in parts]  # as the network is called otherwise
        return ops.concatenate([self.network(part, training=training) for part in given])

    def compute_output_shape(self, input_shape: Sequence[tuple[int | None, ...]]) -> tuple[int | None, ...]:
        """Return the shape of what comes out for the shapes that go in."""
        return (input_shape[0][0], *self.network.output_shape[1:])
