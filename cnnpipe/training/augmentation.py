"""What training does to a batch of images before the network sees it; backend-neutral, and on the device."""

from __future__ import annotations

from cnnpipe.training.backend import keras, replica_number

__all__ = ["Augmentation", "shrink"]


class _ReplicaSeeds(keras.random.SeedGenerator):  # type: ignore[misc]
    """Seeds that differ between the devices that share a batch, which all have the same state."""

    def next(self, ordered: bool = True) -> keras.KerasTensor:
        """Return the next seed, (2,)."""
        ops = keras.ops
        seed = super().next(ordered)
        own = ops.cast(replica_number(), seed.dtype) * 1_000_003  # a prime: far from the next seeds of the others
        return seed + ops.stack([own, ops.zeros((), seed.dtype)])


@keras.saving.register_keras_serializable("cnnpipe")
class Augmentation(keras.layers.Layer):  # type: ignore[misc]
    """Random shifts of a batch of images, in training only; `Batches` mirrors them.

    Every image draws its own, of up to `max_shift` of each side, the uncovered edge filled by the nearest pixels. Works
    on uint8, so it moves a quarter of float32's bytes.
    """

    def __init__(self, max_shift: float = 1 / 16, seed: int = 0) -> None:
        super().__init__(trainable=False, name="augmentation", dtype="uint8")
        self.max_shift = max_shift
        self.seed_generator = _ReplicaSeeds(seed)

    def call(self, images: keras.KerasTensor, training: bool = False) -> keras.KerasTensor:  # (N, H, W, C) -> same
        """Return the images, changed if `training`."""
        if not training:
            return images
        ops = keras.ops
        number, (height, width, channels) = ops.shape(images)[0], images.shape[1:]
        rows = self._source_indices(number, height)  # (N, H)
        columns = self._source_indices(number, width)  # (N, W)
        image_starts = ops.arange(number, dtype="int32")[:, None, None] * (height * width)
        pixels = image_starts + rows[:, :, None] * width + columns[:, None, :]  # (N, H, W), into the flattened batch
        return ops.take(ops.reshape(images, (-1, channels)), pixels, axis=0)

    def _source_indices(self, number: int, length: int) -> keras.KerasTensor:
        """Return, for each image, the index along one side that each place takes its pixel from, (N, length)."""
        reach = round(self.max_shift * length)
        shift = keras.random.randint((number, 1), -reach, reach + 1, dtype="int32", seed=self.seed_generator)
        return keras.ops.clip(keras.ops.arange(length, dtype="int32")[None, :] + shift, 0, length - 1)


def shrink(images: keras.KerasTensor, size: tuple[int, int]) -> keras.KerasTensor:  # uint8 (N, H, W, C) -> same
    """Return smaller images, each pixel from all that it covers.

    Args:
        size: (height, width), pixels.
    """
    ops = keras.ops
    smaller = ops.image.resize(ops.cast(images, "float32"), size, antialias=True)
    return ops.cast(ops.clip(ops.round(smaller), 0, 255), "uint8")
