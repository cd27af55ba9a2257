"""Train an image-classification CNN on a schedule and classify folders of images in bulk."""

__version__ = "0.1.0"
