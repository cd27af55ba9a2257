"""Remove what older nights have left."""
