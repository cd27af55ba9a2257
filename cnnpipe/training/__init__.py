"""The wing that trains: needs TensorFlow/Keras."""
